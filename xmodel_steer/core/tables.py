"""HTML tables of a few rows, for notebooks."""

from collections.abc import Mapping
from html import escape


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """Make an HTML table with escaped texts; leave out empty rows."""
    cells = (
        f'<tr><th style="text-align: left">{escape(name)}</th><td style="text-align: left">{escape(value)}</td></tr>'
        for name, value in rows.items()
        if value
    )
    return f"<table><caption>{escape(title)}</caption>{''.join(cells)}</table>"

"""HTML tables of a few rows, for notebooks."""

from collections.abc import Mapping

from xmodel_steer.core.texts import on_page


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """Make an HTML table with escaped texts; leave out empty rows."""
    cells = (
        f'<tr><th style="text-align: left">{on_page(name)}</th><td style="text-align: left">{on_page(value)}</td></tr>'
        for name, value in rows.items()
        if value
    )
    return f"<table><caption>{on_page(title)}</caption>{''.join(cells)}</table>"

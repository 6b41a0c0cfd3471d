"""MkDocs hook: equations become MathML when the site is built, so that a page needs neither a network nor JavaScript."""

import html
import re

from latex2mathml.converter import convert

_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(content: str, **_: object) -> str:
    """Replace what arithmatex marked as LaTeX by MathML."""

    def rendered(found: re.Match[str]) -> str:
        tag, opening, latex = found.groups()
        display = "block" if opening == "[" else "inline"
        return f'<{tag} class="equation">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'

    return _EQUATION.sub(rendered, content)

"""HTML of the explorer's parts."""

from collections.abc import Sequence
from html import escape

from xmodel_steer.core.texts import on_page


def text_html(heading: str, colour: str, prompt: str, text: str) -> str:
    """Render a text under its heading, marked by a colour."""
    return (
        f'<div style="border-left:3px solid {colour};padding-left:8px;line-height:1.45">'
        f'<div style="font-weight:600">{on_page(heading)}</div>'
        f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">'
        f'<span style="opacity:.6">{escape(prompt)}</span><span class="xs-text">{escape(text)}</span></div></div>'
    )


def bars_html(tokens: Sequence[tuple[str, Sequence[float]]], keys: Sequence[tuple[str, str]]) -> str:
    """Render next tokens with bars, whose names and colours are ``keys``."""

    def bar(share: float, fill: str) -> str:
        return (
            f'<div style="display:flex;align-items:center;gap:6px;font-size:11px;line-height:1.25">'
            f'<div style="background:{fill};height:7px;width:{260 * share:.1f}px"></div>{share:.1%}</div>'
        )

    if not tokens:
        return ""
    rows = "".join(
        f'<tr><td style="text-align:right;font-family:monospace;white-space:pre;padding-right:8px">{on_page(shown(token))}</td>'
        f'<td style="text-align:left">{"".join(bar(s, fill) for s, (_, fill) in zip(shares, keys, strict=True))}</td></tr>'
        for token, shares in tokens
    )
    legend = " ".join(f'<span style="color:{fill}">■</span> {name}' for name, fill in keys)
    return f'<div style="line-height:1.6"><b>next token</b>: {legend}</div><table>{rows}</table>'


def shown(token: str) -> str:
    """Make white space in a token visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"


# On pages that are not served safely (http from another host) the browser has no clipboard object.
_COPY = (
    "const text = this.nextElementSibling.textContent;"
    "const done = () => { this.textContent = 'Copied'; setTimeout(() => this.textContent = 'Copy code', 1500) };"
    "if (navigator.clipboard) { navigator.clipboard.writeText(text).then(done) } else {"
    "getSelection().selectAllChildren(this.nextElementSibling); document.execCommand('copy') && done() }"
)


def code_html(code: str) -> str:
    """Render code with a button that copies it."""
    return (
        f'<button class="lm-Widget jupyter-widgets jupyter-button" onclick="{escape(_COPY)}">Copy code</button>'
        f'<pre style="line-height:1.35;white-space:pre-wrap;margin-top:4px">{escape(code)}</pre>'
    )

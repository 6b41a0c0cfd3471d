"""Texts of users, models and servers, made safe to print: control characters visible, secrets removed."""

import html
import json
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

# C0 and C1 controls, and the characters that turn the direction of text.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_USERINFO = re.compile(r"(://)[^\s/?#\"'<>]+@")
_TOKEN = re.compile(r"\b((?i:bearer|basic)(?:\s|%20|\+)+)(?=[a-z.:]*[A-Z0-9_=+/~%-])[\w.~+/=%:-]{6,}")


def visible(text: str, *, lines: bool = False) -> str:
    r"""Write control characters as escapes, which no terminal obeys.

    Args:
        text: The text.
        lines: Keep line ends and tabs.

    Example:
        >>> print(visible("sweet \x1b[31mtalk"))
        sweet \x1b[31mtalk
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0] if lines and match[0] in "\n\t" else match[0].encode("unicode_escape").decode()

    return _CONTROLS.sub(escaped, text)


def encodable(text: str) -> str:
    """Replace half surrogate pairs, which have no encoding, by question marks."""
    return text.encode(errors="replace").decode()


def named(file: object, error: object) -> str:
    """Return an error's text that begins with its file's name, once."""
    name, text = str(file)[:200], str(error)
    return text if text.startswith(name) else f"{name}: {text}"


def on_page(text: str) -> str:
    """Escape a text for HTML; write its control characters as escapes.

    A character that turns the direction of text would turn the page's own words too.
    """
    return html.escape(visible(text, lines=True))


def redacted(text: str, secrets: Iterable[str] = (), *, answer: bool = False) -> str:
    """Replace secrets in a text, in every encoding, by ``***``.

    Without known secrets, the userinfo of URLs and the tokens of Authorization headers are replaced.

    Args:
        text: The text, before it is cut.
        secrets: Keys, user names and passwords.
        answer: The text is a model's answer: only known secrets of eight or more characters are replaced.

    Example:
        >>> redacted("https://me:hunter2@host: no such key hunter2", ["hunter2"])
        'https://***@host: no such key ***'
    """
    forms = {form for secret in secrets for form in _forms(secret) if len(form) >= (8 if answer else 4)}
    for form in sorted(forms, key=len, reverse=True):
        text = re.sub(re.escape(form), "***", text, flags=re.IGNORECASE)
    return text if answer else _TOKEN.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


def _forms(secret: str) -> set[str]:
    """List a secret's encodings in URLs, JSON, HTML, Python and base64."""
    data = secret.encode(errors="surrogatepass")
    coded = {b64encode(data).decode(), urlsafe_b64encode(data).decode()}
    written = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    in_urls = {quote(data, safe=""), quote(data), quote_plus(data)}
    written |= {form.replace("/", "\\/") for form in written} | {html.escape(secret)}
    return written | in_urls | coded | {form.rstrip("=") for form in coded}

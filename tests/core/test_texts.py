"""Texts that are safe to print: no control character is obeyed, no secret is shown."""

import html
import json
from base64 import b64encode, urlsafe_b64encode
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmodel_steer.core.tables import html_table
from xmodel_steer.core.texts import redacted, visible

CONTROLS = {*map(chr, (*range(32), *range(127, 160))), *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


@given(st.text(st.characters() | st.sampled_from(sorted(CONTROLS))))
def test_no_control_character_is_left_and_all_other_text_stays(text: str) -> None:
    shown = visible(text)
    assert not CONTROLS & set(shown) and visible(shown) == shown
    if not CONTROLS & set(text):
        assert shown == text
    lines = visible(text, lines=True)
    assert CONTROLS & set(lines) <= {"\n", "\t"} and lines.count("\n") == text.count("\n")


@pytest.mark.parametrize("text", ["mañana", "שלום", "日本語", "👩\u200d💻", "a\u00a0b", "e\u0301"])
def test_letters_of_all_languages_stay(text: str) -> None:
    assert visible(text) == text


FORMS = {
    "plain": str, "upper": str.upper, "url": lambda s: quote(s, safe=""), "path": quote, "query": quote_plus, "json": lambda s: json.dumps(s)[1:-1],
    "escaped slashes": lambda s: json.dumps(s)[1:-1].replace("/", "\\/"), "html": html.escape, "repr": lambda s: repr(s)[1:-1], "bytes": lambda s: repr(s.encode())[2:-1],
    "basic": lambda s: b64encode(s.encode()).decode(), "base64": lambda s: urlsafe_b64encode(s.encode()).decode().rstrip("="),
    "lower url": lambda s: quote(s, safe="").lower(),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@given(secret=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40))
def test_a_secret_is_found_in_every_form_and_nothing_around_it_is_lost(form: str, secret: str) -> None:
    text = redacted(f"said § {FORMS[form](secret)} § to him", [secret])
    assert text == "said § *** § to him"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://anna:pa@ss@host/v1?x=1", "https://***@host/v1?x=1"),
        ("proxy http://token@proxy:80 and http://host/a@b", "proxy http://***@proxy:80 and http://host/a@b"),
        ("{'authorization': 'Bearer sk-12345678'}", "{'authorization': 'Bearer ***'}"),
        ('{"Authorization":"Basic dXNlcjpwYXNz=="}', '{"Authorization":"Basic ***"}'),
        ("basic authentication is required.", "basic authentication is required."),
        ("a bearer of good news", "a bearer of good news"),
    ],
)
def test_unknown_secrets_are_found_where_they_are_usual(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(text, answer=True) == text  # a model's answer is changed by known secrets alone


def test_a_table_is_no_markup() -> None:
    name = '<img src=x onerror="alert(1)">\u202e'
    page = html_table(name, {name: name, "empty": ""})
    assert "<img" not in page and "\u202e" not in page

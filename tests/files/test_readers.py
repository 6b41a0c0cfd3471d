"""Contrast sets and corpora from files, as people's programs write them."""

import gzip
import json
from pathlib import Path

import pytest

from xmodel_steer.core.errors import PromptError
from xmodel_steer.files.readers import read_contrast, read_prompts


@pytest.mark.parametrize("between", ["\n\n", "\r\n\r\n", "\n \t\n", "\n\n\n\n", "\r\n \r\n\r\n"])
def test_a_text_file_has_a_document_per_paragraph_whatever_ends_its_lines(between: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    line = "\r\n" if "\r" in between else "\n"
    file.write_bytes(f"\ufeffOne{line}line more{between}Zwei ü{between}".encode())
    assert [prompt.text for prompt in read_prompts(file)] == ["One\nline more", "Zwei ü"]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_read_from_json_lines_and_csv_packed_or_not(packed: bool, tmp_path: Path) -> None:
    for name, text in (
        ("a.jsonl", '{"text": "one\\u2028two"}\r\n\n{"messages": [{"role": "user", "content": "hi"}]}\n'),
        ("a.csv", 'text,n\r\n"one\u2028two",1\r\n"a, ""b""",2\r\n'),
    ):
        file = tmp_path / f"{name}{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        first, second = read_prompts(file)
        assert first.text == "one\u2028two"
        assert (second.text, [m.content for m in second.messages]) in ((None, ["hi"]), ('a, "b"', []))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n"just text"\n', "line 2 is no row of columns such as"),
        ("a.jsonl", b'[{"role": "user", "content": "hi"}]\n', "line 1 is no row of columns such as"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"label": 1}\n', "row 1: "),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        (
            "a.jsonl.gz",
            gzip.compress(json.dumps({"text": "x" * 999}).encode(), mtime=0)[:-20] + b"\xff" * 20,
            "is not UTF-8 text",
        ),
        ("a.jsonl.gz", b"no gzip", "is not UTF-8 text"),
        ("a.txt", b" \n\n ", "has no prompts"),
        ("a.json", b"{}", "needs a .jsonl or .csv file"),
    ],
)
def test_what_cannot_be_read_is_one_error_that_names_the_file(
    name: str, data: bytes, says: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(PromptError, match=f"{name}: {says}"):
        read_prompts(file)


def test_a_missing_file_and_a_row_without_sides_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "nowhere.txt")
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"positive": "a", "negative": "b"}\n{"positive": "c", "negative": "d"}\n')
    made = read_contrast(file)
    assert [[p.text for p in side] for side in (made.positive, made.negative)] == [["a", "c"], ["b", "d"]]
    file.write_text('{"one": "a"}\n')
    with pytest.raises(PromptError, match=r"pairs.jsonl: "):
        read_contrast(file)

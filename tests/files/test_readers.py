"""Contrast sets and corpora from files, as people's programs write them."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.errors import PromptError
from xmodel_steer.files.readers import PAIRS, read_contrast, read_prompts


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
        ("a.jsonl", b'{"label": 1}\n', "rows: number 1: no text, prompt or messages"),
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
    for read in (read_prompts, read_contrast):  # a file is named once
        for place in (file, str(file), tmp_path / "missing.jsonl", tmp_path / "missing.csv"):
            with pytest.raises(PromptError) as told:
                read(place)
            assert str(told.value).count(str(place)) == 1, told.value


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


SIDES = [["a", "c"], ["b", "d"]]


def sides(contrast: ContrastSet) -> list[list[str | None]]:
    return [[prompt.text for prompt in side] for side in (contrast.positive, contrast.negative)]


@pytest.mark.parametrize("pair", [*PAIRS, ("good", "bad")], ids="/".join)
@pytest.mark.parametrize("kind", ["rows", "a.jsonl", "a.csv"])
def test_pairs_of_columns_are_known_or_named(pair: tuple[str, str], kind: str, tmp_path: Path) -> None:
    rows = [{pair[0]: p, "id": p + n, pair[1]: n} for p, n in zip(*SIDES, strict=True)]
    source: object = rows
    if kind != "rows":
        source = tmp_path / kind
        pd.DataFrame(rows).to_csv(source, index=False) if kind == "a.csv" else source.write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    columns = None if pair in PAIRS else {"good": "positive", "bad": "negative"}
    made = read_contrast(source, columns=columns)
    assert sides(made) == SIDES and made.paired
    swapped = read_contrast(source, columns={pair[0]: "negative", pair[1]: "positive"})
    assert sides(swapped) == SIDES[::-1]


def test_answers_with_a_behaviour_continue_their_question() -> None:
    row = {"question": "Is it?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
    assert sides(read_contrast([row])) == [["Is it? (A)"], ["Is it? (B)"]]
    assert sides(read_contrast([row], columns=dict(zip([*row][1:], PAIRS[0], strict=True)))) == [
        [" (A)"], [" (B)"],
    ]  # fmt: skip


def test_columns_of_labelled_rows_and_of_prompts_are_named(tmp_path: Path) -> None:
    rows = [{"sentence": "a", "class": 1, "text": "x"}, {"sentence": "b", "class": 0, "text": "y"}]
    columns = {"sentence": "text", "class": "label"}
    assert sides(read_contrast(rows, columns=columns)) == [["a"], ["b"]]
    assert sides(read_contrast(rows, columns={"class": "label"})) == [["x"], ["y"]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (rows, pd.DataFrame(rows), file):
        assert [prompt.text for prompt in read_prompts(source, columns={"sentence": "prompt"})] == ["a", "b"]
    with pytest.raises(PromptError, match=r"a.jsonl: row 1: no column 'line'; its columns are class, sentence, text"):
        read_prompts(file, columns={"line": "text"})


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ([{"one": "a", "two": "b"}], None, r'the columns one, two hold no contrast; .*columns=\{"good": "positive"'),
        ([{"positive": "a", "negative": "b"}, {"positive": "c"}], None, "the columns negative, positive hold no contrast"),
        ([{"one": "a"}], {"one": "positive", "two": "negative"}, "row 1: no column 'two'; its columns are one"),
        ([{"one": "a"}], {"one": "good"}, "columns: 'good' is none of positive, negative, messages, prompt, text, label"),
        ([], None, "no rows; each needs positive and negative"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there_are_listed(rows: list, columns: dict | None, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        read_contrast(rows, columns=columns)

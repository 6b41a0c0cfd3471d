"""Readers of contrast sets and corpora."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts, rows_of
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.texts import named

#: Pairs of columns that hold the two sides: with the behaviour, and without it.
PAIRS = (
    ("positive", "negative"),
    ("chosen", "rejected"),
    ("with", "without"),
    ("answer_matching_behavior", "answer_not_matching_behavior"),
)


def read_contrast(source: Any, *, columns: Mapping[str, str] | None = None) -> ContrastSet:
    """Read a contrast set from a ``.jsonl`` or ``.csv`` file, or from rows.

    A file may be gzipped. Both sides of a row are its columns ``positive`` and ``negative``, or another pair of
    `PAIRS`; else a row has a prompt and a ``label``, see `ContrastSet.from_records`. Answers with and without a
    behaviour, as in the data of contrastive activation addition, continue the row's ``question``.

    Args:
        source: A path, or what `ContrastSet.from_records` takes: dictionaries, a pandas frame, a
            ``datasets.Dataset``.
        columns: Names of your columns and what they hold, such as ``{"good": "positive", "bad": "negative"}`` or
            ``{"sentence": "text", "class": "label"}``.

    Raises:
        PromptError: The file is missing, is of another kind, or a row cannot be used.
    """
    if not isinstance(source, str | Path):
        return ContrastSet.from_records(_sided(rows_of(source), columns))
    try:
        return ContrastSet.from_records(_sided(rows_of_file(Path(source)), columns))
    except PromptError as error:
        raise PromptError(named(source, error)) from None


def _sided(rows: list[dict[str, Any]], columns: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Rename the columns of a contrast set to those of `ContrastSet.from_records`."""
    if columns is not None:
        return _renamed(rows, columns)
    pair = next((pair for pair in PAIRS if all(row.keys() >= set(pair) for row in rows)), None)
    if pair is None:
        if any("label" in row for row in rows):
            return rows
        raise PromptError(
            f"the columns {_names(rows)} hold no contrast; each row needs positive and negative, or text and label. "
            'Say which columns do, such as columns={"good": "positive", "bad": "negative"}'
        )
    if pair[0] == "answer_matching_behavior":
        rows = [row | {name: f"{row.get('question') or ''}{row[name]}" for name in pair} for row in rows]
    return _renamed(rows, dict(zip(pair, PAIRS[0], strict=True)))


_PROMPTS = {"text", "prompt", "messages"}


def _renamed(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rename columns; refuse missing ones and unknown new names."""
    known = [*PAIRS[0], *sorted(_PROMPTS), "label"]
    if unknown := [name for name in columns.values() if name not in known]:
        raise PromptError(f"columns: {unknown[0]!r} is none of {', '.join(known)}; give {{your column: one of these}}")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in columns if name not in row]:
            raise PromptError(f"row {number}: no column {missing[0]!r}; its columns are {_names([row])}")
    hidden = _PROMPTS if _PROMPTS & set(columns.values()) else set()  # a row's prompt is the first of these
    return [
        {key: value for key, value in row.items() if key not in hidden}
        | {name: row[column] for column, name in columns.items()}
        for row in rows
    ]


def _names(rows: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({str(name) for row in rows for name in row})) or "(none)"


def read_prompts(source: Any, *, columns: Mapping[str, str] | None = None) -> tuple[Prompt, ...]:
    """Read prompts or documents from a ``.jsonl``, ``.csv`` or ``.txt`` file, or from rows.

    JSONL and CSV rows have a ``text``, ``prompt`` or ``messages`` column; a text file has one document per paragraph
    (paragraphs are separated by blank lines). JSONL and CSV may be gzipped.

    Args:
        source: A path, or what `as_prompts` takes: a list of strings, of chats or of rows, a pandas series or frame,
            a ``datasets.Dataset``.
        columns: The name of your column of prompts and what it holds, such as ``{"sentence": "text"}``.

    Raises:
        PromptError: The file is missing, is of another kind, is empty, or a row cannot be used.
    """
    if not isinstance(source, str | Path):
        if not (prompts := as_prompts(_renamed(rows_of(source), columns) if columns else source)):
            raise PromptError("prompts: there are none")
        return prompts
    path = Path(source)
    if path.suffix == ".txt":
        paragraphs = re.split(r"\n\s*\n", _text(path).replace("\r\n", "\n"))
        prompts = tuple(Prompt(text=p.strip()) for p in paragraphs if p.strip())
    else:
        try:
            prompts = as_prompts(_renamed(rows_of_file(path), columns or {}), what="rows")
        except PromptError as error:
            raise PromptError(named(path, error)) from None
    if not prompts:
        raise PromptError(f"{path}: has no prompts")
    return prompts


def _text(path: Path) -> str:
    try:
        exists = path.is_file()
    except OSError:  # a name that is too long: a text
        exists = False
    if not exists:
        raise PromptError(f"{str(path)[:200]}: no such file; for a text instead of a file, [text]")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PromptError(f"{path}: is not UTF-8 text ({error})") from None


def rows_of_file(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``.jsonl`` or ``.csv`` file, also gzipped, as dictionaries.

    Raises:
        PromptError: The file is missing, of another kind, or damaged.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        try:
            return list(csv.DictReader(io.StringIO(_text(path), newline="")))
        except csv.Error as error:
            raise PromptError(f"{path}: is not a table ({error})") from None
    if not name.endswith(".jsonl"):
        raise PromptError(f"{str(path)[:200]}: needs a .jsonl or .csv file; for a text instead of a file, [text]")
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}: line {number} is not JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(row, dict):
            raise PromptError(f'{path}: line {number} is no row of columns such as {{"text": "..."}}')
        rows.append(row)
    return rows

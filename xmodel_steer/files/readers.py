"""Contrast sets and corpora from files."""

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts, prompt_of_row
from xmodel_steer.core.prompts import Prompt


def read_contrast(source: Any) -> ContrastSet:
    """Read a contrast set from a ``.jsonl`` or ``.csv`` file, or from rows.

    A file may be gzipped.

    Args:
        source: A path, or what `ContrastSet.from_records` takes: dictionaries, a pandas frame, a
            ``datasets.Dataset``.

    Raises:
        PromptError: The file is missing, is of another kind, or a row cannot be used.
    """
    if not isinstance(source, str | Path):
        return ContrastSet.from_records(source)
    try:
        return ContrastSet.from_records(rows_of_file(Path(source)))
    except PromptError as error:
        raise PromptError(f"{source}: {error}") from None


def read_prompts(source: Any) -> tuple[Prompt, ...]:
    """Prompts or documents from a ``.jsonl`` (also gzipped), ``.csv`` or ``.txt`` file, or from rows.

    JSONL and CSV rows have a ``text``, ``prompt`` or ``messages`` column; a text file has one
    document per paragraph (paragraphs are separated by blank lines).

    Args:
        source: A path, or what `as_prompts` takes: a list of strings, of chats or of rows, a pandas series or
            frame, a ``datasets.Dataset``.

    Raises:
        PromptError: The file is missing, is of another kind, is empty, or a row cannot be used.
    """
    if not isinstance(source, str | Path):
        if not (prompts := as_prompts(source)):
            raise PromptError("prompts: there are none")
        return prompts
    path = Path(source)
    if path.suffix == ".txt":
        paragraphs = [p.strip() for p in re.split(r"\n\s*\n", _text(path).replace("\r\n", "\n")) if p.strip()]
        prompts = tuple(Prompt(text=p) for p in paragraphs)
    else:
        made = []
        for number, row in enumerate(rows_of_file(path), 1):
            try:
                made.append(prompt_of_row(row))
            except PromptError as error:
                raise PromptError(f"{path}: row {number}: {error}") from None
        prompts = tuple(made)
    if not prompts:
        raise PromptError(f"{path}: has no prompts")
    return prompts


def _text(path: Path) -> str:
    try:
        there = path.is_file()
    except OSError:  # a name that is too long: a text
        there = False
    if not there:
        raise PromptError(f"{str(path)[:200]}: no such file; for a text instead of a file, [text]")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PromptError(f"{path}: is not UTF-8 text ({error})") from None


def rows_of_file(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``.jsonl`` or ``.csv`` file as dictionaries.

    It may be gzipped.

    Raises:
        PromptError: The file is missing, of another kind, or damaged.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(_text(path), newline="")))
    if not name.endswith(".jsonl"):
        raise PromptError(f"{str(path)[:200]}: needs a .jsonl or .csv file; for a text instead of a file, [text]")
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}: line {number} is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise PromptError(f'{path}: line {number} is no row of columns such as {{"text": "..."}}')
        rows.append(row)
    return rows

"""Conversion of lists, frames and rows to prompts."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from io import IOBase
from typing import Any

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt, described


def as_prompts(values: Any, *, what: str = "prompts") -> tuple[Prompt, ...]:
    """Make prompts from strings, message lists, prompts or rows; refuse everything else.

    Args:
        values: A list or another ordered iterable (a pandas series or frame, a ``datasets.Dataset``, a
            generator). An element is a string, a list of chat messages, a Prompt, or a row with a
            column ``text``, ``prompt`` or ``messages``.
        what: Name of the argument, for the message.

    Raises:
        PromptError: The argument has another form, or an element cannot be a prompt.
    """
    return tuple(iter_prompts(values, what=what))


def iter_prompts(values: Any, *, what: str = "prompts") -> Iterator[Prompt]:
    """Iterate over the prompts that `as_prompts` makes."""
    for number, item in enumerate(items_of(values, what), 1):
        try:
            yield prompt_of_row(item) if isinstance(item, Mapping) else Prompt.of(filled(item))
        except PromptError as error:
            raise PromptError(f"{what}: number {number}: {error}") from None


def items_of(values: Any, what: str) -> Iterable[Any]:
    """Return an iterable of prompts or rows; refuse other values.

    The rows of a pandas frame become dictionaries. Other iterables are returned unread.

    Args:
        values: Any value.
        what: Name of the argument, for the message.

    Raises:
        PromptError: The value is one prompt, a mapping, a set, a file, or not iterable.
    """
    if isinstance(values, str | bytes | bytearray | Prompt):
        raise PromptError(
            f"{what}: give a list of prompts; for a single one, [prompt]; got {described(values)} (to read a file: xs.read_prompts)"
        )
    if isinstance(values, os.PathLike | IOBase):
        raise PromptError(
            f"{what}: needs prompts, got {described(values)}; read it with xs.read_prompts or xs.read_contrast"
        )
    if isinstance(values, Mapping):
        first = next(iter(values), None)
        advice = f"give one of them, data[{first!r}]"
        if {"role", "content"} <= values.keys():
            advice = "a list of prompts, each of which is a string or a list of such messages: [[message]]"
        elif any(isinstance(value, str) for value in values.values()):
            advice = "for a single row, [row]"
        elif all(isinstance(value, list | tuple) for value in values.values()):
            advice = "for rows of these columns, pandas.DataFrame(data)"
        raise PromptError(f"{what}: needs a list, got {described(values)}; {advice}")
    if isinstance(values, set | frozenset):
        raise PromptError(
            f"{what}: a set has no order, so that results could not be told apart; give a list, sorted(...)"
        )
    if hasattr(values, "iloc") and hasattr(values, "columns"):  # a pandas frame, which iterates over its columns
        return values.to_dict("records")
    if hasattr(values, "tolist"):  # a pandas series, an array
        values = values.tolist()
        values = None if isinstance(values, str) else values  # an array without dimensions
    elif hasattr(values, "columns"):
        raise PromptError(
            f"{what}: needs a list of prompts or rows, got {described(values)}; turn it into a list of dictionaries"
        )
    if not isinstance(values, Iterable):
        raise PromptError(f"{what}: needs a list of prompts or rows, got {described(values)}")
    return values


def require_disjoint(what: str, sets: Mapping[str, Iterable[str]]) -> None:
    """Refuse sets that share a text: reported text must not choose or fit anything.

    Args:
        what: The operation, for the message.
        sets: Contents (`Prompt.content_key`) of each set, under its name.

    Raises:
        PromptError: A text is in two sets.
    """
    owner: dict[str, str] = {}
    for name, contents in sets.items():
        for content in set(contents):
            if owner.setdefault(content, name) != name:
                raise PromptError(
                    f"{what}: the same text is in the {owner[content]} and the {name} set ({content[:60]!r}); "
                    "what chooses or fits must not be reported on, remove it from one"
                )


_ON = {"1", "1.0", "true", "positive", "pos", "yes"}
_OFF = {"0", "0.0", "-1", "-1.0", "false", "negative", "neg", "no"}


def rows_of(records: Any) -> list[dict[str, Any]]:
    """Return rows as dictionaries, from an iterable, a pandas frame or a ``datasets.Dataset``.

    Raises:
        PromptError: The argument has another form, or a row is no dictionary.
    """
    if isinstance(records, str):
        raise PromptError("rows: got one string; give a list of rows, or read a file with xs.read_contrast")
    rows = list(items_of(records, "rows"))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise PromptError(f"rows: row {number} is {type(row).__name__}, not a dictionary of columns")
    return [dict(row) for row in rows]


def prompt_of_row(row: Mapping[str, Any]) -> Prompt:
    """Make a prompt from a row's first filled ``text``, ``prompt`` or ``messages``.

    Raises:
        PromptError: No column is filled, or the cell is no prompt.
    """
    columns = [column for column in ("text", "prompt", "messages") if column in row]
    for column in columns:
        if not _empty(row[column]):
            return Prompt.of(chat_or_text(row[column]))
    if columns:
        raise PromptError("an empty cell; drop the row or fill it in")
    advice = "rename one"
    if {"role", "content"} <= row.keys():
        advice = "it is one chat message: a prompt is a list of messages, [message]"
    raise PromptError(f"no text, prompt or messages among the columns {sorted(map(str, row))}; {advice}")


def label_of(row: Mapping[str, Any]) -> bool:
    """Read the label of a row: True with the behaviour, False without it."""
    label = str(row.get("label", "")).strip().lower()
    if label in _ON:
        return True
    if label in _OFF:
        return False
    raise PromptError(
        f"label {row.get('label')!r} is not 1/0, true/false or positive/negative "
        f"(columns: {sorted(map(str, row))}; a paired row has positive and negative)"
    )


def _empty(value: Any) -> bool:
    """Tell whether a cell is empty: None, or pandas' NaN."""
    return value is None or (isinstance(value, float) and value != value)


def filled(value: Any) -> Any:
    """Refuse an empty cell."""
    if _empty(value):
        raise PromptError("an empty cell; drop the row or fill it in")
    return value


def chat_or_text(value: Any) -> Any:
    """Parse chat messages in JSON text, as in CSV files; return other values."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return filled(value)

"""Strict JSON: numbers that JSON lacks are written as null and listed; none, and no name twice, is read."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError, UndefinedWarning


def dump_json(record: Any, path: Path, indent: int | None = None) -> str:
    """Return a record as strict JSON, whatever its numbers are.

    A number that is NaN or infinite becomes null. The record then gets a list ``undefined`` with the place and the
    value of each such number, and the reason where an estimate gives one; `parse_record` restores it. A value that
    JSON lacks is written as its ``repr``.

    Args:
        record: The record; numbers and arrays of NumPy and torch are written as Python's.
        path: The file, for messages.
        indent: Spaces of indentation.

    Raises:
        ArtifactError: The record contains itself.
    """
    gone: list[dict[str, Any]] = []
    try:
        plain = _plain(record, (), "", gone)
    except RecursionError as error:
        raise ArtifactError(f"{path}: not written, the record holds itself") from error
    if gone:
        plain["undefined"] = gone
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair needs an escape
        text = json.dumps(plain, allow_nan=False, indent=indent)
    return text


def _plain(value: Any, at: tuple[str | int, ...], reason: str, gone: list[dict[str, Any]]) -> Any:
    """Convert a value to JSON's kinds, and list numbers that JSON lacks."""
    if isinstance(value, Mapping):
        why = value.get("undefined")
        names = {key: key if isinstance(key, str) else str(_plain(key, (), "", [])) for key in value}
        why = why if isinstance(why, str) else ""
        return {names[key]: _plain(item, (*at, names[key]), why, gone) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*at, i), reason, gone) for i, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return _plain(value.tolist(), at, reason, gone)
    if isinstance(value, float) and not math.isfinite(value):
        was = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        gone.append({"at": list(at), "was": was, **({"reason": reason} if reason else {})})
        return None
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def tell_undefined(path: Path) -> None:
    """Warn of numbers that a written record lacks without a reason.

    Args:
        path: The JSON file.
    """
    listed = json.loads(path.read_text(encoding="utf-8")).get("undefined", ())
    names = [".".join(map(str, gone["at"])) for gone in listed if "reason" not in gone]
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(f"{path}: NaN or infinite, and written as null: {shown}", UndefinedWarning, stacklevel=4)


def restored(record: Any) -> Any:
    """Restore the numbers that `dump_json` replaced with null.

    Args:
        record: A record as it was read; it loses its list ``undefined``.

    Raises:
        LookupError: The list names a missing place.
        ValueError: The list names a place with a value.
    """
    listed = record.pop("undefined", ()) if isinstance(record, dict) else ()
    for gone in listed:
        place, last = record, gone["at"][-1]
        for step in gone["at"][:-1]:
            place = place[step]
        if place[last] is not None or gone["was"] not in ("NaN", "Infinity", "-Infinity"):
            raise ValueError(f"the list of undefined numbers does not fit {gone['at']}")
        place[last] = float(gone["was"])
    return record


def load_json(text: str | bytes) -> Any:
    """Parse strict JSON: no NaN, no infinity, no name twice in a record.

    Raises:
        ValueError: It is not strict JSON, or holds too many lists in each other.
    """
    try:
        return json.loads(text, parse_constant=_refused, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("lists or records lie too deep in each other") from None


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a name occurs twice in one record")
    return record

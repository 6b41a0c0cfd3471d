"""Refusal of arguments of a wrong type."""

from typing import Any


def require_type(what: str, kind: type | tuple[type, ...], *values: Any, takes: str = "") -> None:
    """Refuse values of other types: ``{what} takes {takes}, got ...``.

    Raises:
        TypeError: A value has another type.
    """
    for value in values:
        if not isinstance(value, kind):
            name = takes or getattr(kind, "__name__", "")
            text = f" {value!r}" if isinstance(value, str | int | float) else ""
            raise TypeError(f"{what} takes {name}, got {type(value).__name__}{text[:60]}")

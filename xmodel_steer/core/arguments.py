"""Refusal of arguments of a wrong type."""

from typing import Any


def require_type(what: str, kind: type | tuple[type, ...], *values: Any, takes: str = "") -> None:
    """Refuse values of another type.

    Args:
        what: The function or the field, for the message.
        kind: The type, or several.
        values: The values.
        takes: Words for the type, for the message; its name by default.

    Raises:
        TypeError: A value is of another type.
    """
    for value in values:
        if not isinstance(value, kind):
            names = takes or " or ".join(t.__name__ for t in (kind if isinstance(kind, tuple) else (kind,)))
            text = f" {value!r}" if isinstance(value, str | int | float) else ""
            raise TypeError(f"{what} takes {names}, got {type(value).__name__}{text[:60]}")

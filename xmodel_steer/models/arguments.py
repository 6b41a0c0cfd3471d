"""Checks of arguments that every verb takes."""

from numbers import Integral, Real
from typing import Any


def require_counts(**counts: Any) -> None:
    """Refuse a count that is no whole number of at least 1.

    Raises:
        TypeError: One is something else, such as a string.
        ValueError: One is 0 or less.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def require_number(**numbers: Any) -> None:
    """Refuse a value that is no number.

    Raises:
        TypeError: One is something else, such as a string.
    """
    for name, value in numbers.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")


def require_side(**sides: Any) -> None:
    """Refuse a side that is neither left nor right.

    Raises:
        ValueError: Says what came.
    """
    for name, value in sides.items():
        if value not in ("left", "right"):
            raise ValueError(f"{name} must be 'left' or 'right', got {value!r}")

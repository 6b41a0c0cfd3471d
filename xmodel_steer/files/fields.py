"""Checks of what a file holds: types, shapes and ranges of the fields of a record and of tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def expect(record: Mapping[str, Any], **types: Any) -> None:
    """Refuse a record whose fields have other types.

    Args:
        record: The record.
        types: The type of each field, or several. An int is also a float, a bool is no number.

    Raises:
        TypeError: Names the field.
        KeyError: A field is missing.
    """
    if missing := [name for name in types if name not in record]:
        raise KeyError(f"{missing[0]} is missing")
    expect_known(record, types)


def expect_known(record: Mapping[Any, Any], types: Mapping[Any, Any]) -> None:
    """Refuse a record whose fields have other types; a field may be missing.

    Raises:
        TypeError: It is no record, or names the field.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"needs a record, got {str(record)[:60]!r}")
    for name, allowed in types.items():
        if name not in record:
            continue
        value = record[name]
        kinds = allowed if isinstance(allowed, tuple) else (allowed,)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} must be {wanted}, got {str(value)[:60]!r}")


def counts_of(record: Mapping[str, Any], name: str, length: int | None = None) -> tuple[int, ...]:
    """Return a field that is a list of counts.

    Raises:
        ValueError: It is none, or of another length.
    """
    counts = record[name]
    right = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not right or (length is not None and len(counts) != length):
        raise ValueError(f"{name} must be {'' if length is None else f'{length} '}counts, got {str(counts)[:60]}")
    return tuple(counts)


def tensor_of(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], *, least: float | None = None) -> Tensor:
    """Return a tensor of a shape, of floating-point numbers.

    Raises:
        ValueError: It has another shape or dtype, or a number under ``least``.
        KeyError: It is missing.
    """
    tensor = tensors[name]
    if tuple(tensor.shape) != tuple(shape) or not tensor.is_floating_point():
        raise ValueError(f"{name} must be floats {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
    if least is not None and bool((tensor < least).any()):
        raise ValueError(f"{name} has numbers under {least:g}")
    return tensor

"""Files that are whole or absent: JSON records and safetensors with a schema number, never pickle.

A file is written under a scratch name and renamed in one step, so that a file with its final name is whole.
"""

import errno
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError, UndefinedWarning
from xmodel_steer.core.finite import is_finite

SCHEMA = 1
KEY = "xmodel_steer"
MEASURED = ("LayerGrid", "DataCurve")  # their numbers may be undefined


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record of them to a safetensors file.

    Raises:
        ArtifactError: A value of a tensor is NaN, unless it was measured, or the file cannot be written.
    """
    if kind not in MEASURED:
        refuse_nan(tensors, path)
    header = {"schema": SCHEMA, "kind": kind, **record}
    plain: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().resolve_neg().contiguous()
        memory = values.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory
        plain[name] = values.clone() if memory in held else values
        held.add(memory)
    metadata = {KEY: dump_json(header, path)}
    _whole(path, lambda scratch: save_file(plain, scratch, metadata=metadata))


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all.

    Raises:
        ArtifactError: The folder cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    _whole(path, lambda scratch: scratch.write_bytes(data))


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a scratch name; rename it once it is on disk."""
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        scratch = Path(name)
        os.close(handle)
        write(scratch)
        with scratch.open("r+b") as written:
            os.fsync(written.fileno())
        scratch.chmod(0o644)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(disk_trouble(path, error)) from error
    finally:
        if scratch is not None and scratch.exists():
            scratch.unlink()


def disk_trouble(path: Path, error: OSError | SafetensorError) -> str:
    """Say why a file could not be written, and what to do."""
    full = os.strerror(errno.ENOSPC)
    if getattr(error, "errno", None) == errno.ENOSPC or full in str(error):  # safetensors passes on the words alone
        return f"{path}: no space left on the device, nothing was written; free some or choose another place"
    return f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); choose another place"


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
    """
    listed = record.pop("undefined", ()) if isinstance(record, dict) else ()
    for gone in listed:
        place = record
        for step in gone["at"][:-1]:
            place = place[step]
        place[gone["at"][-1]] = float(gone["was"])
    return record


def refuse_nan(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not finite.

    Raises:
        ArtifactError: Names the tensor.
    """
    for name, tensor in tensors.items():
        # A target dimension that does not vary has no R²: NaN is its value there.
        if name != "score.r2" and not is_finite(tensor):
            raise ArtifactError(
                f"{path}: tensor {name!r} has NaN or infinity; such an artifact is neither written nor read"
            )


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the record and the tensors of a file that `write_tensors` wrote.

    Raises:
        ArtifactError: The file is missing, foreign, truncated, of a newer schema, or has NaN.
    """
    with _opened(path) as opened:
        header = _header(opened, path)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    if header.get("kind") not in MEASURED:
        refuse_nan(tensors, path)
    return header, tensors


def read_header(path: Path) -> dict[str, Any]:
    """Read the record of a file that `write_tensors` wrote, without its tensors.

    Raises:
        ArtifactError: The file is missing, foreign, truncated, or of a newer schema.
    """
    with _opened(path) as opened:
        return _header(opened, path)


def _header(opened: Any, path: Path) -> dict[str, Any]:
    metadata = opened.metadata() or {}
    if KEY not in metadata:
        raise ArtifactError(f"{path}: is a safetensors file, but not one of xmodel_steer")
    return parse_record(metadata[KEY], path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path}: is not a whole safetensors file ({error}); it was cut short, or is something else"
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a JSON file.

    Raises:
        ArtifactError: The file is damaged, foreign, or of a newer schema.
    """
    try:
        return parse_record(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: is damaged or foreign, it is no text ({error})") from error


def parse_record(text: str, path: Path) -> dict[str, Any]:
    """Parse a record whose schema this version knows.

    Raises:
        ArtifactError: The record is damaged, foreign or of a newer schema.
    """
    try:
        header = restored(json.loads(text))
        schema = header["schema"]
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"{path}: is damaged or foreign, its record cannot be read ({error})") from error
    if not isinstance(schema, int) or schema < 1:
        raise ArtifactError(f"{path}: xmodel_steer never wrote schema {schema!r}")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: was written by a newer version (schema {schema}, this one reads up to {SCHEMA}); "
            "upgrade with pip install -U xmodel-steer"
        )
    return header

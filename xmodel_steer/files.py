"""Files that are whole or not there: JSON records and safetensors with a schema number, never pickle.

A file is written under a scratch name and takes its own in one step, so that what has the name is whole.
"""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xmodel_steer.errors import ArtifactError
from xmodel_steer.vectors import is_finite

SCHEMA = 1
KEY = "xmodel_steer"


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record of them to a safetensors file.

    Raises:
        ArtifactError: A value is NaN, or the file cannot be written.
    """
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
    """Let a file be written under a scratch name, and give it its own when it is on the disk."""
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
    """What to tell a user whose file could not be written."""
    full = os.strerror(errno.ENOSPC)
    if getattr(error, "errno", None) == errno.ENOSPC or full in str(error):  # safetensors only passes the words on
        return f"{path}: no space left on the device, nothing was written; free some or choose another place"
    return f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); choose another place"


def dump_json(record: Any, path: Path, indent: int | None = None) -> str:
    """A record as JSON.

    Raises:
        ArtifactError: A number in it is NaN or infinite.
    """
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError as error:
        raise ArtifactError(f"{path}: not written, a number in it is NaN or infinite ({error})") from error


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
    """The record and the tensors of a file that `write_tensors` wrote.

    Raises:
        ArtifactError: The file is missing, foreign, truncated, of a newer schema, or has NaN.
    """
    with _opened(path) as opened:
        header = _header(opened, path)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    refuse_nan(tensors, path)
    return header, tensors


def read_header(path: Path) -> dict[str, Any]:
    """The record of a file that `write_tensors` wrote, without its tensors.

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
    """The record of a JSON file.

    Raises:
        ArtifactError: It is not one, or of a newer schema.
        UnicodeDecodeError: It is no text.
    """
    return parse_record(path.read_text(encoding="utf-8"), path)


def parse_record(text: str, path: Path) -> dict[str, Any]:
    """A record out of JSON, whose schema this version knows.

    Raises:
        ArtifactError: It is damaged, foreign or newer.
    """
    try:
        header = json.loads(text)
        schema = header["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is damaged or foreign, its record cannot be read ({error})") from error
    if not isinstance(schema, int) or schema < 1:
        raise ArtifactError(f"{path}: schema {schema!r} is not one that xmodel_steer ever wrote")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: was written by a newer version (schema {schema}, this one reads up to {SCHEMA}); "
            "upgrade with pip install -U xmodel-steer"
        )
    return header

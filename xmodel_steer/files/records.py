"""Files that are whole or absent: JSON records and safetensors with a schema number, never pickle.

Each carries the SHA-256 of its record and of each tensor, which every read compares.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError, UncheckedWarning, XModelSteerError
from xmodel_steer.core.finite import is_finite
from xmodel_steer.core.texts import named
from xmodel_steer.files.places import whole_file
from xmodel_steer.files.strict import dump_json, load_json, restored

SCHEMA = 2
CHECKED = 2  # the first schema with checksums
KEY, DIGEST, TENSORS = "xmodel_steer", "sha256", "tensors"
_NO_DIGEST = "0" * 64  # in the text that is hashed
MEASURED = ("LayerGrid", "DataCurve")  # their numbers may be undefined


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and their record to a safetensors file, with checksums.

    Raises:
        ArtifactError: A value of a tensor is NaN, unless it was measured, or the file cannot be written.
    """
    if kind not in MEASURED:
        refuse_nan(tensors, path)
    plain: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().resolve_neg().contiguous()
        memory = values.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory
        plain[name] = values.clone() if memory in held else values
        held.add(memory)
    hashes = {name: digest_of(tensor) for name, tensor in plain.items()}
    # One entry: safetensors writes several in any order, and an interrupted harvest must end with the same bits.
    metadata = {KEY: sealed({"kind": kind, **record, TENSORS: hashes}, path)}
    whole_file(path, lambda scratch: save_file(plain, scratch, metadata=metadata))


def write_record(path: Path, record: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a record to a JSON file, with its checksum.

    Raises:
        ArtifactError: The folder cannot be written, or the disk is full.
    """
    write_atomically(path, sealed(record, path, indent))


def sealed(record: Mapping[str, Any], path: Path, indent: int | None = None) -> str:
    """Return a record as JSON that begins with its own SHA-256.

    The hash is that of the text with zeros in its place.
    """
    text = dump_json({DIGEST: ""} | dict(record) | {"schema": SCHEMA, DIGEST: _NO_DIGEST}, path, indent)
    return text.replace(_NO_DIGEST, _sha256(text), 1)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all.

    Raises:
        ArtifactError: The folder cannot be written, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    whole_file(path, lambda scratch: scratch.write_bytes(data))


def digest_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bits, in hexadecimal."""
    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every fault of reading a file into an error that names it.

    Raises:
        ArtifactError: The file is missing, or damaged, or of another program.
    """
    try:
        yield
    except (ArtifactError, Warning):  # a warning, where the user makes errors of them
        raise
    except FileNotFoundError as error:
        missing = Path(str(error.filename))
        raise ArtifactError(f"{missing if path in missing.parents else path}: no such file") from error
    except XModelSteerError as error:
        raise ArtifactError(named(path, error)) from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{path}: is not a whole safetensors file ({error}); it was cut short, or is something else"
        ) from error
    except Exception as error:  # a damaged file may fail in any way
        says = f"{type(error).__name__}: {str(error)[:200]}"
        raise ArtifactError(f"{path}: is damaged or foreign ({says}); make or copy it again") from error


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the record and the tensors of a file, and compare their checksums.

    Raises:
        ArtifactError: The file is missing, foreign, damaged, of a newer schema, or has NaN.
    """
    with opened(path) as (file, header):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        hashes = header.pop(TENSORS, None)
        if hashes is not None and hashes.keys() != tensors.keys():
            raise ArtifactError(f"{path}: is damaged, its tensors are not those of its record")
        for name, digest in (hashes or {}).items():
            require_digest(path, name, tensors[name], digest)
    if header.get("kind") not in MEASURED:
        refuse_nan(tensors, path)
    return header, tensors


def require_digest(path: Path, name: str, tensor: Tensor, digest: str) -> None:
    """Refuse a tensor whose bits have changed.

    Raises:
        ArtifactError: Names the tensor.
    """
    if digest_of(tensor) != digest:
        raise ArtifactError(f"{path}: is damaged, {name} does not match its checksum; make or copy it again")


def read_header(path: Path) -> dict[str, Any]:
    """Read the record of a file that `write_tensors` wrote, without its tensors.

    Raises:
        ArtifactError: The file is missing, foreign, damaged, or of a newer schema.
    """
    with opened(path) as (_, header):
        return header


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a file that `write_tensors` wrote; yield its handle and its record.

    Raises:
        ArtifactError: As for `read_header`.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    with reading(path), safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise ArtifactError(f"{path}: is a safetensors file, but not one of xmodel_steer")
        yield file, parse_record(metadata[KEY], path)


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a JSON file.

    Raises:
        ArtifactError: The file is damaged, foreign, or of a newer schema.
    """
    with reading(path):
        return parse_record(path.read_text(encoding="utf-8"), path)


def parse_record(text: str, path: Path) -> dict[str, Any]:
    """Parse a record whose schema this version knows, and compare its hash.

    Raises:
        ArtifactError: The record is damaged, foreign or of a newer schema.
    """
    with reading(path):
        header = restored(load_json(text))
        schema, digest = header["schema"], header.pop(DIGEST, None)
    if type(schema) is not int or schema < 1:
        raise ArtifactError(f"{path}: xmodel_steer never wrote schema {schema!r}")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path}: was written by a newer version (schema {schema}, this one reads up to {SCHEMA}); "
            "upgrade with pip install -U xmodel-steer"
        )
    if schema < CHECKED:
        warnings.warn(
            f"{path}: was written before files carried checksums, so damage may show as other numbers; save it again to add them",
            UncheckedWarning,
            stacklevel=4,
        )
    elif digest != _sha256(text.replace(str(digest), _NO_DIGEST, 1)):
        raise ArtifactError(
            f"{path}: is damaged or was edited, its record does not match its checksum; make or copy it again"
        )
    return header

"""Control vectors of llama.cpp in GGUF files."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError, SiteError
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.records import parse_record, sealed, write_atomically
from xmodel_steer.interop.spaces import RECORD, one_per_block, row_of, rows_of, vectors_of


def write_control_vector(
    vectors: SteeringVector | Sequence[SteeringVector], path: str | Path, *, model_hint: str | None = None
) -> Path:
    """Write vectors as a llama.cpp control vector (GGUF), which repeng reads too.

    ``llama-server -m model.gguf --control-vector FILE`` (``--control-vector-scaled FILE:2.0`` for twice the strength)
    then adds each vector to the output of its block at every token, as ``Add`` does with positions ``"all"``.
    Directions are stored as float32; the format has no class means and no scales.

    Args:
        vectors: Vectors of one model after its blocks (``resid_post``), one a block, none of block 0.
        path: The file. An older one is replaced.
        model_hint: Architecture of the model, such as ``"llama"``, a label that llama.cpp does not read; by default
            the model's name.

    Returns:
        The path.

    Raises:
        SiteError: A vector is of block 0 or of another stream, where llama.cpp cannot write.
        SpaceMismatchError: The vectors are of several models, or of one whose weights were processed.
        ValueError: There are no vectors, or two of one block.
        ArtifactError: The file cannot be written.

    Example:
        >>> write_control_vector(2.0 * vector, "joy.gguf", model_hint="llama")  # doctest: +SKIP
    """
    from gguf import GGUFWriter

    path = Path(path)
    per_block = one_per_block(vectors, "write_control_vector")
    if per_block[0].space.site.layer == 0:
        raise SiteError(
            "write_control_vector: llama.cpp steers the output of blocks 1 and later, got a vector of block 0; "
            "find the vector at another layer, or leave this one out"
        )
    directions = [v.direction.detach().to("cpu", torch.float32).contiguous() for v in per_block]
    record = sealed({"vectors": list(map(row_of, per_block, directions))}, path)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vector.gguf"
        writer = GGUFWriter(file, "controlvector")
        writer.add_string(
            "controlvector.model_hint", model_hint if model_hint is not None else per_block[0].space.model
        )
        writer.add_uint32("controlvector.layer_count", len(per_block))
        writer.add_string(RECORD, record)  # llama.cpp and repeng ignore it
        for vector, direction in zip(per_block, directions, strict=True):
            writer.add_tensor(f"direction.{vector.space.site.layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(path, file.read_bytes())
    return path


def read_control_vector(path: str | Path, model: Any = None) -> tuple[SteeringVector, ...]:
    """Read a control vector of llama.cpp, repeng or `write_control_vector`.

    Args:
        path: A GGUF file.
        model: The model that the vectors are for, TransformerLens' or a plain Hugging Face model: such a file names no
            weights. Files of `write_control_vector` name their spaces, so there it is optional.

    Returns:
        One vector for each block in the file, in order, without scale and class means.

    Raises:
        ArtifactError: The file is missing, damaged or no control vector, or names no space and no model was given.
        SpaceMismatchError: The vectors are of another model, or have another width.
        SiteError: The model has no such block.
    """
    path = Path(path)
    tensors, records = _read_gguf(path)
    return vectors_of(path, tensors, records, model, "control vector")


def _read_gguf(path: Path) -> tuple[dict[int, Tensor], dict[int, dict[str, Any]]]:
    """Read a control vector's directions and this library's records, if any, by block."""
    from gguf import GGMLQuantizationType, GGUFReader

    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises many kinds for foreign or truncated files
        raise ArtifactError(
            f"{path}: is not a whole GGUF file ({type(error).__name__}: {str(error)[:200]}); it was cut short, or is something else"
        ) from error
    architecture = fields.get("general.architecture")
    if architecture != "controlvector":
        raise ArtifactError(f"{path}: needs a GGUF file of architecture 'controlvector', got {architecture!r}")
    tensors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        name = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if name is None or tensor.tensor_type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise ArtifactError(
                f"{path}: a control vector has float32 tensors direction.K of one dimension, got {tensor.name!r}, "
                f"{tensor.tensor_type.name} {tuple(int(n) for n in tensor.shape)}; llama.cpp refuses it too"
            )
        tensors[int(name[1])] = torch.tensor(tensor.data)
    if not tensors:
        raise ArtifactError(f"{path}: has no direction")
    return tensors, rows_of(path, parse_record(fields[RECORD], path), tensors) if RECORD in fields else {}

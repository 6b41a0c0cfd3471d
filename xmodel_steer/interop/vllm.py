"""Vectors of hotwire-vllm, a steering plugin of vLLM: one row per block in a ``.pt`` file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError, SiteError
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.places import whole_file
from xmodel_steer.files.records import read_record, reading, write_record
from xmodel_steer.interop.spaces import one_per_block, row_of, rows_of, vectors_of


def write_vllm_vector(
    vectors: SteeringVector | Sequence[SteeringVector],
    path: str | Path,
    *,
    strength: float = 1.0,
    positions: str = "all",
    layers: int | None = None,
) -> Path:
    """Write vectors for the vLLM plugin hotwire-vllm 0.1, and the steering request.

    With ``HOTWIRE_VECTORS=joy.pt`` the plugin adds scale · row to a block's output, as `Add` does, where a request asks
    for it. ``joy.pt.json`` holds that request, under ``vllm_xargs``, and each vector's site, norm and space.

    The ``.pt`` is ``torch.save`` of a plain float32 tensor ``(layers, d)``, zero but in the vectors' rows, unscaled. The
    pickle in that format runs no code where it is read with ``weights_only=True``, as the plugin does.

    Args:
        vectors: Vectors of one model after its blocks (``resid_post``), one a block.
        path: The file, ending in ``.pt``; requests name it by its stem. An older one is replaced.
        strength: Scale in the request.
        positions: Tokens that the request steers: ``"all"``, or ``"generated"`` (the plugin's ``decode_only``).
        layers: Number of the model's blocks; by default the rows end with the deepest vector. Where a request names a
            missing row, the plugin leaves its whole batch unsteered.

    Returns:
        The path.

    Raises:
        SiteError: A vector is of another stream, or of a block that the model lacks.
        SpaceMismatchError: The vectors are of several models, or of one whose weights were processed.
        ValueError: There are no vectors, two of one block, or one that is zero; or another argument is wrong.
        ArtifactError: A file cannot be written.
    """
    path = Path(path)
    per_block = one_per_block(vectors, "write_vllm_vector")
    if path.suffix != ".pt" or not math.isfinite(strength) or positions not in ("all", "generated"):
        raise ValueError(
            "write_vllm_vector: needs a path that ends in .pt, a finite strength, and positions 'all' or 'generated', "
            f"got {path.name!r}, {strength!r} and {positions!r}"
        )
    deepest = per_block[-1].space.site.layer
    if layers is not None and layers <= deepest:
        raise SiteError(f"write_vllm_vector: a model of {layers} blocks has no block {deepest}, they count from 0")
    matrix = torch.zeros(layers or deepest + 1, per_block[0].space.width)
    spec, facts = [], []
    for vector in per_block:
        layer = vector.space.site.layer
        row = matrix[layer] = vector.direction.detach().to("cpu", torch.float32)
        if not row.any():
            raise ValueError(
                f"write_vllm_vector: {vector.label!r} is a zero vector, which steers nothing; leave it out"
            )
        facts.append({"site": str(vector.space.site), "norm": vector.norm()} | row_of(vector, row))
        spec.append({"id": path.stem, "layer": layer, "scale": float(strength)})
        spec[-1] |= {"decode_only": True} if positions == "generated" else {}
    whole_file(path, lambda scratch: torch.save(matrix, scratch))
    # The plugin takes its list as a string.
    write_record(Path(f"{path}.json"), {"vectors": facts, "vllm_xargs": {"hotwire": json.dumps(spec)}}, indent=1)
    return path


def read_vllm_vector(path: str | Path, model: Any = None) -> tuple[SteeringVector, ...]:
    """Read a ``.pt`` as the plugin hotwire-vllm does; no code in it is run.

    Args:
        path: A tensor ``(layers, d)``, or a dictionary whose first tensor it is.
        model: The model that the vectors are for, TransformerLens' or a plain Hugging Face model; optional where the
            ``.pt.json`` of `write_vllm_vector` lies next to the file.

    Returns:
        One vector for each row that is not zero, in order, without scale and class means.

    Raises:
        ArtifactError: The file is missing, damaged or something else, or names no space and no model was given.
        SpaceMismatchError: The vectors are of another model, or have another width.
        SiteError: The model has no such block.
    """
    path = Path(path)
    with reading(path):
        value = torch.load(path, map_location="cpu", weights_only=True)
    value = next((v for v in value.values() if isinstance(v, Tensor)), None) if isinstance(value, dict) else value
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArtifactError(
            f"{path}: needs a tensor of one row per block, got {shape}; a vector (d,) names no block: give it as "
            "from_steering_vectors({block: vector}, model)"
        )
    tensors = {i: value[i].clone() for i in value.any(1).nonzero()[:, 0].tolist()}
    if not tensors:
        raise ArtifactError(f"{path}: has no direction")
    record = Path(f"{path}.json")
    rows = rows_of(path, read_record(record), tensors) if record.is_file() else {}
    return vectors_of(path, tensors, rows, model, "vLLM vector")

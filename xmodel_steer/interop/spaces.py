"""Spaces of vectors of other programs."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import ArtifactError, ModelError, SiteError, SpaceMismatchError, XModelSteerError
from xmodel_steer.core.spaces import Site, Space, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.records import digest_of, require_digest
from xmodel_steer.models.facts import HookedModel
from xmodel_steer.models.identity import fingerprint
from xmodel_steer.models.sites import space_of

#: The key of this library's record in a GGUF file: part of the file format.
RECORD = "xmodel_steer.vectors"


def one_per_block(vectors: SteeringVector | Sequence[SteeringVector], what: str) -> list[SteeringVector]:
    """Require vectors after different blocks of one unprocessed model; sort them by block."""
    values = [vectors] if isinstance(vectors, SteeringVector) else list(vectors)
    require_type(what, SteeringVector, *values)
    values = [member for vector in values for member in vector.members()]
    if not values:
        raise ValueError(f"{what}: give at least one vector")
    first = values[0].space
    for vector in values:
        require_after_block(vector.space, what)
        if (first.fingerprint, first.width) != (vector.space.fingerprint, vector.space.width):
            raise SpaceMismatchError(
                f"{what}: needs vectors of one model, got {first} and {vector.space}; write a file for each model"
            )
    values.sort(key=lambda vector: vector.space.site.layer)
    layers = [vector.space.site.layer for vector in values]
    for layer, following in pairwise(layers):
        if layer == following:
            raise ValueError(f"{what}: needs one vector a block, got several of block {layer}; add them up (v + w)")
    return values


def require_after_block(space: Space, what: str) -> None:
    """Refuse all spaces but a published model's after a block."""
    if space.site.stream != "resid_post":
        raise SiteError(
            f"{what}: the vector acts after a block (resid_post), got one of {space}; find it at Site({space.site.layer})"
        )
    if space.processing != "none":
        raise SpaceMismatchError(
            f"{what}: needs a vector of the model as published, got one of {space}, whose weights were processed; "
            "find it in the model that xs.load returns, which is unprocessed"
        )


def decoder_blocks(model: Any, name: str | None = None) -> torch.nn.ModuleList:
    """Find the decoder blocks: the outermost module list of the model's depth."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    if name is not None:
        if name not in lists:
            raise ModelError(
                f"{hf_name(model)}: blocks={name!r} is no list of blocks, there are {', '.join(lists) or 'none'}"
            )
        return lists[name]
    depth = getattr(text_config(model), "num_hidden_layers", None)
    outer = {path: m for path, m in lists.items() if not re.search(r"\.\d+(\.|$)", f".{path}")}
    fitting = [path for path, m in outer.items() if len(m) == depth]
    if len(fitting) != 1:
        raise ModelError(
            f"{hf_name(model)}: needs one list of {depth} decoder blocks, found {', '.join(fitting) or 'none'}; "
            f"name it with blocks=..., one of {', '.join(outer) or 'none that is a ModuleList'}"
        )
    return outer[fitting[0]]


def text_config(model: Any) -> Any:
    """Return the language model's part of a configuration."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def hf_name(model: Any) -> str:
    """Return the name that a transformers model was loaded under."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def require_hf_space(model: Any, depth: int, space: Space, trust: bool = False, named: bool = True) -> None:
    """Refuse a space of another model; with ``named``, the same name suffices."""
    what = f"steering {hf_name(model)}"
    require_after_block(space, what)
    width = int(text_config(model).hidden_size)
    if space.width != width or space.site.layer >= depth:
        raise SpaceMismatchError(
            f"{what}: has {depth} blocks of width {width}, got a vector of {space}; carry it over with a map "
            "(mapping.transport(vector))"
        )
    if trust or (named and short(hf_name(model)) == short(space.model)):
        return
    weights = fingerprint(model)
    if weights != space.fingerprint:
        raise SpaceMismatchError(
            f"{what}: neither its name nor its weights ({weights}) are those of the vector's {space}. A vector of one "
            "model means nothing in another: carry it over with a map (mapping.transport(vector)); "
            "if it is the same model under another name, steer with steering_hf(..., trust=True)"
        )


def short(name: str) -> str:
    """Return the last part of a name or path, in lower case."""
    return re.split(r"[/:\\]", name.rstrip("/"))[-1].lower()


def space_for(model: Any, site: Site, width: int, stated: Space | None, what: str) -> Space:
    """Make the space of a direction at a site, or check the stated one."""
    if isinstance(model, HookedModel):
        space = space_of(model, site)
        require_after_block(space, what)
    else:
        depth = len(decoder_blocks(model))
        if site.layer >= depth:
            raise SiteError(f"{hf_name(model)}: has layers 0 to {depth - 1}, no {site}")
        if stated is not None:
            require_hf_space(model, depth, stated)
            return stated
        space = Space(hf_name(model), site, int(text_config(model).hidden_size), fingerprint(model))
    if stated is not None:
        require_same_space(space, stated, what)
    if space.width != width:
        raise SpaceMismatchError(
            f"{what}: {space} needs directions of {space.width} numbers, got {width}; is it another model's?"
        )
    return space


def row_of(vector: SteeringVector, direction: Tensor) -> dict[str, Any]:
    """Record everything about a vector that another program's file has no place for."""
    return {
        "space": vector.space.to_dict(),
        "label": vector.label,
        "counts": list(vector.counts),
        "origin": vector.origin,
        "sha256": digest_of(direction),
    }


def rows_of(path: Path, record: Mapping[str, Any], tensors: Mapping[int, Tensor]) -> dict[int, dict[str, Any]]:
    """Return a record's rows by block; refuse those that are not of these directions."""
    try:
        rows = {row["space"]["layer"]: row for row in record["vectors"]}
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is damaged, its record lacks or misstates {error}") from error
    if rows.keys() != tensors.keys():
        raise ArtifactError(
            f"{path}: is damaged, its record is about blocks {sorted(rows)}, it holds {sorted(tensors)}"
        )
    for block, row in rows.items():
        if "sha256" in row:  # absent before schema 2
            require_digest(path, f"direction.{block}", tensors[block], row["sha256"])
    return rows


def vectors_of(
    path: Path, tensors: Mapping[int, Tensor], rows: Mapping[int, dict[str, Any]], model: Any, kind: str
) -> tuple[SteeringVector, ...]:
    """Make vectors of a file's directions, in its rows' spaces or the model's."""
    if not rows and model is None:
        raise ArtifactError(
            f"{path}: was not written by xmodel_steer and does not say which weights it is for; "
            f"give the model: read_{kind.lower().replace(' ', '_')}(path, model)"
        )
    vectors = []
    for layer, direction in sorted(tensors.items()):
        row = rows.get(layer, {})
        try:
            space = Space.from_dict(row["space"]) if row else None
            if model is not None:
                space = space_for(model, Site(layer), len(direction), space, f"reading {path.name}")
            assert space is not None
            label, counts = row.get("label", path.stem), tuple(row.get("counts", (0, 0)))
            about = row.get("origin", f"{kind} {path.name}")
            vectors.append(SteeringVector(direction, space, label, counts=(counts[0], counts[1]), origin=about))
        except (SpaceMismatchError, SiteError):
            raise
        except (XModelSteerError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: is damaged, direction.{layer}: {error}") from error
    return tuple(vectors)

"""Vectors, maps, moments, grids and curves as safetensors files.

Every file names its schema. Nothing is pickled. A file that has its name is whole.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.claiming import claim
from xmodel_steer.files.fields import counts_of, expect, tensor_of
from xmodel_steer.files.records import read_tensors, reading, write_tensors
from xmodel_steer.maps.affine import AffineMap, Map, MapScore
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.curves import DataCurve
from xmodel_steer.maps.layers import LayerGrid
from xmodel_steer.maps.moments import Moments, PartMoments
from xmodel_steer.maps.pairs import PARTS

Tensors = dict[str, Tensor]
Record = dict[str, Any]


def save_artefact(value: SteeringVector | Map | Moments | LayerGrid | DataCurve, path: Path) -> Path:
    """Write a vector, map, moments, grid or curve to a ``.safetensors`` file; see `save`."""
    kind = type(value).__name__
    if kind not in _KINDS:
        raise TypeError(f"save: cannot save {kind}; vectors, maps, moments, grids, curves and results can be saved")
    claim(path, kind)
    tensors, record = _KINDS[kind][0](value)
    try:
        _KINDS[kind][1]({"kind": kind, **record}, tensors)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: not written, since it could not be read again: {error}") from error
    write_tensors(path, kind, tensors, record)
    return path


def read_artefact(path: Path) -> Any:
    """Read a file that `save_artefact` wrote; see `read`."""
    header, tensors = read_tensors(path)
    kind = header.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ArtifactError(f"{path}: holds a {kind!r}, which this version cannot read")
    with reading(path):
        return _KINDS[kind][1](header, tensors)


def _fields(value: Any, *names: str) -> Record:
    return {name: getattr(value, name) for name in names}


def _records(spaces: Iterable[Space]) -> list[Record]:
    return [space.to_dict() for space in spaces]


# --- vectors ----------------------------------------------------------------------------------
_VECTOR_TENSORS = ("direction", "positive_mean", "negative_mean", "scale")


def _vector_parts(vector: SteeringVector) -> tuple[Tensors, Record]:
    tensors = {name: value for name, value in _fields(vector, *_VECTOR_TENSORS).items() if value is not None}
    record = _fields(vector, "label", "origin") | {"space": vector.space.to_dict(), "counts": list(vector.counts)}
    return tensors, record


def _vector_from(header: Record, tensors: Tensors) -> SteeringVector:
    expect(header, label=str, origin=str)
    positive, negative = counts_of(header, "counts", 2)
    space = Space.from_dict(header["space"])
    for name in tensors.keys() & set(_VECTOR_TENSORS):
        tensor_of(tensors, name, (space.width,), least=0.0 if name == "scale" else None)
    return SteeringVector(
        direction=tensors["direction"],
        space=space,
        counts=(positive, negative),
        label=header["label"],
        origin=header["origin"],
        **{name: tensors.get(name) for name in _VECTOR_TENSORS[1:]},
    )


# --- maps -------------------------------------------------------------------------------------
# The tensors of each kind of map, with their sizes: the source's width, the target's, the hidden layer's.
_SCALES = {"source_scale": "s", "target_scale": "t"}
_MAP_TENSORS = {
    AffineMap: {"weight": "st", "bias": "t", **_SCALES},
    AutoencoderMap: {
        "encoder": "sh", "encoder_bias": "h", "decoder": "ht", "decoder_bias": "t", "source_mean": "s", "target_mean": "t",
        **_SCALES,
    },
}  # fmt: skip


def _map_parts(mapping: Map) -> tuple[Tensors, Record]:
    tensors = _fields(mapping, *_MAP_TENSORS[type(mapping)])
    record: Record = {
        "source": mapping.source.to_dict(),
        "target": mapping.target.to_dict(),
        "info": dict(mapping.info),
    }
    if isinstance(mapping, AutoencoderMap):
        record["standardised"] = mapping.standardised
    if (score := mapping.score_test) is not None:
        tensors["score.r2"] = score.r2
        record["score"] = _fields(score, "cosine", "norm_ratio", "count", "documents")
    return tensors, record


def _map_from(header: Record, tensors: Tensors) -> Map:
    kind = {kind.__name__: kind for kind in _MAP_TENSORS}[header["kind"]]
    expect(header, info=dict)
    source, target = (Space.from_dict(header[end]) for end in ("source", "target"))
    sizes = {"s": source.width, "t": target.width}
    extra = {}
    if kind is AutoencoderMap:
        expect(header, standardised=bool)
        extra, sizes["h"] = {"standardised": header["standardised"]}, tensors["encoder_bias"].numel()
    score = None
    if "score" in header:
        expect(header["score"], cosine=float, norm_ratio=float, count=int, documents=int)
        score = MapScore(r2=tensor_of(tensors, "score.r2", (target.width,)), **header["score"])
    return kind(
        **{
            name: tensor_of(tensors, name, [sizes[s] for s in shape], least=0.0 if name in _SCALES else None)
            for name, shape in _MAP_TENSORS[kind].items()
        },
        **extra,
        source=source,
        target=target,
        score_test=score,
        info=header["info"],
    )


# --- moments ----------------------------------------------------------------------------------
_BY_SITE = ("source_means", "target_means", "source_scatters", "target_scatters")
_BY_PAIR = ("cross", "shuffled", "sketch")


def _name(part: str, kind: str, *sites: Site) -> str:
    return "/".join([part, kind, *(site.key for site in sites)])


def _moments_parts(moments: Moments) -> tuple[Tensors, Record]:
    tensors: Tensors = {}
    for name, part in moments.parts.items():
        for kind in _BY_SITE:
            tensors |= {_name(name, kind, site): value for site, value in getattr(part, kind).items()}
        for kind in _BY_PAIR:
            tensors |= {_name(name, kind, *pair): value for pair, value in getattr(part, kind).items()}
    record = _fields(moments, "paired", "eligible") | {
        "source": _records(moments.source.values()),
        "target": _records(moments.target.values()),
        "pairs": [[s.key, t.key] for s, t in moments.pairs],
        "counts": {name: [part.count, part.documents] for name, part in moments.parts.items()},
        "settings": dict(moments.settings),
        "sketch": list(moments.sketch),
        "shards": list(moments.shards),
        "shuffled": bool(moments.parts["train"].shuffled),
    }
    return tensors, record


def _moments_from(header: Record, tensors: Tensors) -> Moments:
    source, target = ({s.site: s for s in map(Space.from_dict, header[end])} for end in ("source", "target"))
    ends = [{site.key: site for site in end} for end in (source, target)]
    old = [pair if len(pair) == 2 else (f"{pair[0]}.{pair[1]}", f"{pair[2]}.{pair[3]}") for pair in header["pairs"]]
    pairs = tuple((ends[0][s], ends[1][t]) for s, t in old)
    every = tuple(itertools.product(source, target)) if header.get("sketch") else ()
    kept: dict[str, Any] = {
        **{kind: [(site,) for site in (source if kind.startswith("source") else target)] for kind in _BY_SITE},
        **{"cross": pairs, "shuffled": pairs if header.get("shuffled", True) else (), "sketch": every},
    }

    def shape(kind: str, key: Sequence[Site]) -> tuple[int, ...]:
        if kind in _BY_SITE:
            width = (source if kind.startswith("source") else target)[key[0]].width
            return (width,) if kind.endswith("means") else (width, width)
        return source[key[0]].width, len(header["sketch"]) if kind == "sketch" else target[key[1]].width

    def part(name: str) -> PartMoments:
        count, documents = counts_of(header["counts"], name, 2)
        values: dict[str, Any] = {
            kind: {
                (key if len(key) > 1 else key[0]): tensor_of(tensors, _name(name, kind, *key), shape(kind, key))
                for key in keys
            }
            for kind, keys in kept.items()
        }
        if any(bool((m.diagonal() < 0).any()) for side in _BY_SITE[2:] for m in values[side].values()):
            raise ValueError(f"{name} has a negative variance")
        return PartMoments(count=count, documents=documents, **values)

    expect(header, paired=int, eligible=int, settings=dict)
    return Moments(
        source,
        target,
        pairs,
        {name: part(name) for name in PARTS},
        *(header[name] for name in ("paired", "eligible", "settings")),
        *(tuple(header.get(name, ())) for name in ("sketch", "shards")),
    )


# --- grids and curves -------------------------------------------------------------------------
_GRID_PARTS = ("validation", "test")


def _grid_parts(grid: LayerGrid) -> tuple[Tensors, Record]:
    tensors = {f"{part}/{name}": torch.from_numpy(v) for part in _GRID_PARTS for name, v in getattr(grid, part).items()}
    tensors |= {name: torch.from_numpy(value) for name, value in _fields(grid, "cka", "r2_error").items()}
    record = {
        "source": _records(grid.source),
        "target": _records(grid.target),
        "penalties": list(grid.penalties),
        "sketch": grid.sketch,
        "counts": {name: list(count) for name, count in grid.counts.items()},
    }
    return tensors, record


def _grid_from(header: Record, tensors: Tensors) -> LayerGrid:
    def part(name: str) -> Record:
        return {key.split("/")[1]: value.numpy() for key, value in tensors.items() if key.startswith(f"{name}/")}

    source, target = (tuple(map(Space.from_dict, header[end])) for end in ("source", "target"))
    layers, penalties = (len(source), len(target)), header["penalties"]
    expect(header, sketch=int, counts=dict, penalties=list)
    counts = {name: counts_of(header["counts"], name, 2) for name in header["counts"]}
    if not all(isinstance(penalty, int | float) for penalty in penalties):
        raise ValueError(f"penalties must be numbers, got {str(penalties)[:60]}")
    for name in tensors:
        every = (*layers, len(penalties))
        if name.startswith("test/") and tuple(tensors[name].shape) == every:  # as kept at first: at every penalty
            best = tensor_of(tensors, "validation/r2", every).numpy().argmax(-1)
            tensors = tensors | {name: tensors[name].gather(-1, torch.from_numpy(best)[..., None])[..., 0]}
        tensor_of(tensors, name, every if name.startswith("validation/") else layers)
    return LayerGrid(
        source,
        target,
        tuple(penalties),
        *map(part, _GRID_PARTS),
        cka=tensors["cka"].numpy(),
        sketch=header["sketch"],
        r2_error=tensors["r2_error"].numpy(),
        counts={name: (rows, documents) for name, (rows, documents) in counts.items()},
    )


def _curve_parts(curve: DataCurve) -> tuple[Tensors, Record]:
    tensors = {f"r2/{name}": torch.tensor(values, dtype=torch.float64) for name, values in curve.r2.items()}
    record = _fields(curve, "recommended", "growing", "test_tokens") | {
        "source": curve.source.to_dict(),
        "target": curve.target.to_dict(),
        "tokens": list(curve.tokens),
        "fitters": list(curve.r2),
    }
    return tensors, record


def _curve_from(header: Record, tensors: Tensors) -> DataCurve:
    expect(header, recommended=int, growing=(float, type(None)), test_tokens=int, fitters=list)
    tokens = counts_of(header, "tokens")
    for name in header["fitters"]:
        tensor_of(tensors, f"r2/{name}", (len(tokens),))
    return DataCurve(
        Space.from_dict(header["source"]),
        Space.from_dict(header["target"]),
        tokens,
        {name: tuple(tensors[f"r2/{name}"].tolist()) for name in header["fitters"]},
        *(header[name] for name in ("recommended", "growing", "test_tokens")),
    )


#: For each kind, the function that returns its tensors and its record, and the one that puts it together again.
_KINDS: Mapping[str, tuple[Callable[[Any], tuple[Tensors, Record]], Callable[[Record, Tensors], Any]]] = {
    "SteeringVector": (_vector_parts, _vector_from),
    "AffineMap": (_map_parts, _map_from),
    "AutoencoderMap": (_map_parts, _map_from),
    "Moments": (_moments_parts, _moments_from),
    "LayerGrid": (_grid_parts, _grid_from),
    "DataCurve": (_curve_parts, _curve_from),
}

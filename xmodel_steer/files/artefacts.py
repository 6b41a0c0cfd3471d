"""Files: vectors, maps and moments as safetensors, results as a folder around ``result.json``.

Every file names its schema. Nothing is pickled. What has its name is whole.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError, XModelSteerError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.claiming import claim
from xmodel_steer.files.records import read_tensors, write_tensors
from xmodel_steer.maps.affine import AffineMap, Map, MapScore
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.curves import DataCurve
from xmodel_steer.maps.layers import LayerGrid
from xmodel_steer.maps.moments import Moments, PartMoments
from xmodel_steer.maps.pairs import PARTS


def save_artefact(value: SteeringVector | Map | Moments | LayerGrid | DataCurve, path: Path) -> Path:
    """Write a vector, a map, moments, a grid or a curve to a ``.safetensors`` file; see `save`."""
    if isinstance(value, SteeringVector):
        tensors, record = vector_parts(value)
    elif isinstance(value, Map):
        tensors, record = map_parts(value)
    elif isinstance(value, Moments):
        tensors, record = moments_parts(value)
    elif isinstance(value, LayerGrid):
        tensors, record = grid_parts(value)
    elif isinstance(value, DataCurve):
        tensors, record = curve_parts(value)
    else:
        raise TypeError(
            f"save: cannot save {type(value).__name__}; vectors, maps, moments, grids, curves and results can be saved"
        )
    write_tensors(claim(path, type(value).__name__), type(value).__name__, tensors, record)
    return path


def require_place(path: Path, kind: type) -> None:
    """Refuse a file that may not be written; see `claim`."""
    claim(path, kind.__name__)


def read_artefact(path: Path) -> Any:
    """Read what `save_artefact` wrote; see `read`."""
    header, tensors = read_tensors(path)
    makers = {
        "SteeringVector": vector_from,
        "AffineMap": map_from,
        "AutoencoderMap": map_from,
        "Moments": moments_from,
        "LayerGrid": grid_from,
        "DataCurve": curve_from,
    }
    maker = makers.get(header["kind"])
    if maker is None:
        raise ArtifactError(f"{path}: holds a {header['kind']!r}, which this version cannot read")
    try:
        return maker(header, tensors)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, XModelSteerError):
            raise ArtifactError(f"{path}: {error}") from error
        raise ArtifactError(f"{path}: is damaged, {header['kind']} lacks or misstates {error}") from error


# --- vectors ----------------------------------------------------------------------------------
_VECTOR_TENSORS = ("direction", "positive_mean", "negative_mean", "scale")


def vector_parts(vector: SteeringVector) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of a vector."""
    tensors = {name: getattr(vector, name) for name in _VECTOR_TENSORS if getattr(vector, name) is not None}
    record = {
        "space": vector.space.to_dict(),
        "label": vector.label,
        "counts": list(vector.counts),
        "origin": vector.origin,
    }
    return tensors, record


def vector_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> SteeringVector:
    """Make a vector of what `vector_parts` gave."""
    return SteeringVector(
        direction=tensors["direction"],
        space=Space.from_dict(header["space"]),
        label=header["label"],
        positive_mean=tensors.get("positive_mean"),
        negative_mean=tensors.get("negative_mean"),
        counts=(header["counts"][0], header["counts"][1]),
        scale=tensors.get("scale"),
        origin=header["origin"],
    )


# --- maps -------------------------------------------------------------------------------------
_MAP_TENSORS = {
    AffineMap: ("weight", "bias", "source_scale", "target_scale"),
    AutoencoderMap: (
        "encoder",
        "encoder_bias",
        "decoder",
        "decoder_bias",
        "source_mean",
        "target_mean",
        "source_scale",
        "target_scale",
    ),
}


def map_parts(mapping: Map) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of a map."""
    tensors = {name: getattr(mapping, name) for name in _MAP_TENSORS[type(mapping)]}
    record: dict[str, Any] = {
        "source": mapping.source.to_dict(),
        "target": mapping.target.to_dict(),
        "info": dict(mapping.info),
    }
    if isinstance(mapping, AutoencoderMap):
        record["standardised"] = mapping.standardised
    score = mapping.score_test
    if score is not None:
        tensors["score.r2"] = score.r2
        record["score"] = {name: getattr(score, name) for name in ("cosine", "norm_ratio", "count", "documents")}
    return tensors, record


def map_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> Map:
    """Make a map of what `map_parts` gave."""
    kind = {made.__name__: made for made in _MAP_TENSORS}[header["kind"]]
    return kind(
        **{name: tensors[name] for name in _MAP_TENSORS[kind]},
        **({"standardised": header["standardised"]} if kind is AutoencoderMap else {}),
        source=Space.from_dict(header["source"]),
        target=Space.from_dict(header["target"]),
        score_test=MapScore(r2=tensors["score.r2"], **header["score"]) if "score" in header else None,
        info=header["info"],
    )


# --- moments ----------------------------------------------------------------------------------
_BY_SITE = ("source_means", "target_means", "source_scatters", "target_scatters")
_BY_PAIR = ("cross", "shuffled", "sketch")


def _site_key(site: Site) -> str:
    return f"{site.layer}.{site.stream}"


def moments_parts(moments: Moments) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of moments."""
    tensors: dict[str, Tensor] = {}
    for name, part in moments.parts.items():
        for kind in _BY_SITE:
            tensors |= {f"{name}/{kind}/{_site_key(site)}": value for site, value in getattr(part, kind).items()}
        for kind in _BY_PAIR:
            tensors |= {f"{name}/{kind}/{_site_key(s)}/{_site_key(t)}": v for (s, t), v in getattr(part, kind).items()}
    record = {
        "source": [space.to_dict() for space in moments.source.values()],
        "target": [space.to_dict() for space in moments.target.values()],
        "pairs": [[s.layer, s.stream, t.layer, t.stream] for s, t in moments.pairs],
        "counts": {name: [part.count, part.documents] for name, part in moments.parts.items()},
        "paired": moments.paired,
        "eligible": moments.eligible,
        "settings": dict(moments.settings),
        "sketch": list(moments.sketch),
        "shards": list(moments.shards),
        "shuffled": bool(moments.parts["train"].shuffled),
    }
    return tensors, record


def moments_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> Moments:
    """Make moments of what `moments_parts` gave."""
    source = {space.site: space for space in map(Space.from_dict, header["source"])}
    target = {space.site: space for space in map(Space.from_dict, header["target"])}
    pairs = tuple((Site(a, b), Site(c, d)) for a, b, c, d in header["pairs"])

    every = tuple(itertools.product(source, target)) if header.get("sketch") else ()
    kept = {"cross": pairs, "shuffled": pairs if header.get("shuffled", True) else (), "sketch": every}

    def part(name: str) -> PartMoments:
        ends = {"source": source, "target": target}
        by_site: dict[str, Any] = {
            kind: {site: tensors[f"{name}/{kind}/{_site_key(site)}"] for site in ends[kind.split("_")[0]]}
            for kind in _BY_SITE
        }
        by_pair: dict[str, Any] = {
            kind: {(s, t): tensors[f"{name}/{kind}/{_site_key(s)}/{_site_key(t)}"] for s, t in kept[kind]}
            for kind in _BY_PAIR
        }
        count, documents = header["counts"][name]
        return PartMoments(count=count, documents=documents, **by_site, **by_pair)

    return Moments(
        source,
        target,
        pairs,
        {name: part(name) for name in PARTS},
        header["paired"],
        header["eligible"],
        header["settings"],
        tuple(header.get("sketch", ())),
        tuple(header.get("shards", ())),
    )


# --- grids and curves -------------------------------------------------------------------------
def grid_parts(grid: LayerGrid) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of a layer grid."""
    tensors = {f"{part}/{name}": torch.from_numpy(v) for part in _GRID_PARTS for name, v in getattr(grid, part).items()}
    tensors |= {"cka": torch.from_numpy(grid.cka), "r2_error": torch.from_numpy(grid.r2_error)}
    record = {
        "source": [space.to_dict() for space in grid.source],
        "target": [space.to_dict() for space in grid.target],
        "penalties": list(grid.penalties),
        "sketch": grid.sketch,
        "counts": {name: list(count) for name, count in grid.counts.items()},
    }
    return tensors, record


_GRID_PARTS = ("validation", "test")


def grid_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> LayerGrid:
    """Make a layer grid of what `grid_parts` gave."""

    def part(name: str) -> dict[str, Any]:
        return {key.split("/")[1]: value.numpy() for key, value in tensors.items() if key.startswith(f"{name}/")}

    return LayerGrid(
        tuple(map(Space.from_dict, header["source"])),
        tuple(map(Space.from_dict, header["target"])),
        tuple(header["penalties"]),
        *map(part, _GRID_PARTS),
        cka=tensors["cka"].numpy(),
        sketch=header["sketch"],
        r2_error=tensors["r2_error"].numpy(),
        counts={name: (rows, documents) for name, (rows, documents) in header["counts"].items()},
    )


def curve_parts(curve: DataCurve) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of a data curve."""
    tensors = {f"r2/{name}": torch.tensor(values, dtype=torch.float64) for name, values in curve.r2.items()}
    record = {
        "source": curve.source.to_dict(),
        "target": curve.target.to_dict(),
        "tokens": list(curve.tokens),
        "fitters": list(curve.r2),
        **{name: getattr(curve, name) for name in ("recommended", "growing", "test_tokens")},
    }
    return tensors, record


def curve_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> DataCurve:
    """Make a data curve of what `curve_parts` gave."""
    return DataCurve(
        Space.from_dict(header["source"]),
        Space.from_dict(header["target"]),
        tuple(header["tokens"]),
        {name: tuple(tensors[f"r2/{name}"].tolist()) for name in header["fitters"]},
        header["recommended"],
        header["growing"],
        header["test_tokens"],
    )

"""Files: vectors, maps and moments as safetensors, results as a folder around ``result.json``.

Every file names its schema. Nothing is pickled. What has its name is whole.
"""

import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError, XModelSteerError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.records import (
    SCHEMA,
    disk_trouble,
    dump_json,
    read_header,
    read_record,
    read_tensors,
    restored,
    tell_undefined,
    write_atomically,
    write_tensors,
)
from xmodel_steer.maps.affine import AffineMap, AutoencoderMap, Map, MapScore
from xmodel_steer.maps.layers import DataCurve, LayerGrid
from xmodel_steer.maps.moments import PARTS, Moments, PartMoments
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.recipe.results import Arm, TransferResult, Verdict, arm_record


def save(value: SteeringVector | Map | Moments | LayerGrid | DataCurve | TransferResult, path: str | Path) -> Path:
    """Write a vector, a map, moments, a grid or a curve to a ``.safetensors`` file, or a result to a folder.

    Args:
        value: What to save.
        path: A file, or for a result a folder. An older artifact of the same kind is replaced;
            anything else in the way is left alone.

    Returns:
        The path.

    Raises:
        ArtifactError: A vector, a map or moments have NaN, something else is in the way, or the disk is full. What was measured
            is written with the numbers that it has: NaN is null, and the record says where.
    """
    path = Path(path)
    return _save_result(value, path) if isinstance(value, TransferResult) else save_artefact(value, path)


def save_artefact(value: SteeringVector | Map | Moments | LayerGrid | DataCurve, path: Path) -> Path:
    """Write a vector, a map, moments, a grid or a curve to a ``.safetensors`` file; see `save`."""
    if isinstance(value, SteeringVector):
        tensors, record = _vector_parts(value)
    elif isinstance(value, Map):
        tensors, record = _map_parts(value)
    elif isinstance(value, Moments):
        tensors, record = _moments_parts(value)
    elif isinstance(value, LayerGrid):
        tensors, record = _grid_parts(value)
    elif isinstance(value, DataCurve):
        tensors, record = _curve_parts(value)
    else:
        raise TypeError(
            f"save: cannot save {type(value).__name__}; vectors, maps, moments, grids, curves and results can be saved"
        )
    require_place(path, type(value))
    write_tensors(path, type(value).__name__, tensors, record)
    return path


_MAPS = {"AffineMap", "AutoencoderMap"}


def require_place(path: Path, kind: type) -> None:
    """Refuse a file that may not be written, or be replaced by one of this kind.

    Raises:
        ArtifactError: It is a folder, or holds something else.
    """
    name = kind.__name__
    if path.is_dir():
        raise ArtifactError(f"{path}: is a folder; give a file name such as {path / f'{name.lower()}.safetensors'}")
    if path.exists() and (there := _kind_of(path)) not in (_MAPS if name in _MAPS else {name}):
        raise ArtifactError(f"{path}: exists and holds {there or 'something else'}, no {name}; choose another name")


def _kind_of(path: Path) -> str | None:
    """What a file says that it holds; None where it is none of ours, or is damaged."""
    try:
        return read_header(path)["kind"]
    except (ArtifactError, KeyError):
        return None


def read(path: str | Path) -> Any:
    """Read what `save` wrote.

    Args:
        path: A ``.safetensors`` file, or a result's folder.

    Raises:
        ArtifactError: The file is missing, foreign, truncated, of a newer schema, or has NaN.
    """
    path = Path(path)
    return _read_result(path) if path.is_dir() else read_artefact(path)


def read_artefact(path: Path) -> Any:
    """Read what `save_artefact` wrote; see `read`."""
    header, tensors = read_tensors(path)
    makers = {
        "SteeringVector": _vector_from,
        "AffineMap": _map_from,
        "AutoencoderMap": _map_from,
        "Moments": _moments_from,
        "LayerGrid": _grid_from,
        "DataCurve": _curve_from,
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


def _vector_parts(vector: SteeringVector) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: getattr(vector, name) for name in _VECTOR_TENSORS if getattr(vector, name) is not None}
    record = {
        "space": vector.space.to_dict(),
        "label": vector.label,
        "counts": list(vector.counts),
        "origin": vector.origin,
    }
    return tensors, record


def _vector_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> SteeringVector:
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


def _map_parts(mapping: Map) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _map_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> Map:
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


def _moments_parts(moments: Moments) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _moments_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> Moments:
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
def _grid_parts(grid: LayerGrid) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def _grid_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> LayerGrid:
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


def _curve_parts(curve: DataCurve) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"r2/{name}": torch.tensor(values, dtype=torch.float64) for name, values in curve.r2.items()}
    record = {
        "source": curve.source.to_dict(),
        "target": curve.target.to_dict(),
        "tokens": list(curve.tokens),
        "fitters": list(curve.r2),
        **{name: getattr(curve, name) for name in ("recommended", "growing", "test_tokens")},
    }
    return tensors, record


def _curve_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> DataCurve:
    return DataCurve(
        Space.from_dict(header["source"]),
        Space.from_dict(header["target"]),
        tuple(header["tokens"]),
        {name: tuple(tensors[f"r2/{name}"].tolist()) for name in header["fitters"]},
        header["recommended"],
        header["growing"],
        header["test_tokens"],
    )


# --- results ----------------------------------------------------------------------------------
def may_hold_run(folder: Path) -> bool:
    """Whether a run may be written there: nothing is in the way but an empty folder or an older run."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    file = folder / "result.json"
    if not file.is_file():
        return not any(folder.iterdir())
    try:
        return read_record(file).get("kind") == "TransferResult"
    except ArtifactError:
        return False


def _save_result(result: TransferResult, folder: Path) -> Path:
    if not may_hold_run(folder):
        raise ArtifactError(f"{folder}: exists and is not a run folder; choose another place, nothing was written")
    record = {
        "schema": SCHEMA,
        "kind": "TransferResult",
        "label": result.label,
        "unit": result.unit,
        "verdict": _verdict_record(result.verdict()),
        "headline": result.headline,
        "source": dict(result.source),
        "target": dict(result.target),
        "map": dict(result.map),
        "similarity": result.similarity,
        "arms": [arm_record(arm) for arm in result.arms],
        "selection": result.selection,
        "spec": result.spec,
        "splits": result.splits,
        "seeds": result.seeds,
        "versions": result.versions,
        "vectors": sorted(result.vectors),
        "has_map": result.mapping is not None,
    }
    rows = [
        {
            "arm": arm.arm,
            "strength": arm.strength,
            "budget": arm.budget,
            "unit": unit,
            "score": score,
            **({"seeds": arm.table[i]} if arm.table else {}),
            **({"text": arm.texts[i]} if arm.texts else {}),
            **({"judge": arm.raw[i]} if arm.raw else {}),
        }
        for arm in result.arms
        for i, (unit, score) in enumerate(zip(result.splits["evaluation"], arm.scores, strict=True))
    ]
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        write_atomically(scratch / "result.json", dump_json(record, folder, indent=1))
        write_atomically(scratch / "generations.jsonl", "".join(dump_json(row, folder) + "\n" for row in rows))
        for name, vector in result.vectors.items():
            save(vector, scratch / "vectors" / f"{name}.safetensors")
        if result.mapping is not None:
            save(result.mapping, scratch / "map.safetensors")
        os.chmod(scratch, 0o755)
        _swap(scratch, folder)
    except OSError as error:
        if isinstance(error, XModelSteerError):
            raise
        raise ArtifactError(disk_trouble(folder, error)) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    tell_undefined(folder / "result.json")
    return folder


_RUN = {"result.json", "generations.jsonl", "vectors", "map.safetensors", "report.html"}


def _swap(scratch: Path, folder: Path) -> None:
    """Put a finished folder in place of an older one, which is only removed afterwards; what others have put into it stays."""
    if not folder.exists():
        scratch.rename(folder)
        return
    older = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(older / folder.name)
    try:
        scratch.rename(folder)
    except OSError:
        (older / folder.name).rename(folder)
        older.rmdir()
        raise
    for own in (older / folder.name).iterdir():
        if own.name not in _RUN:
            own.rename(folder / own.name)
    shutil.rmtree(older, ignore_errors=True)


def _read_result(folder: Path) -> TransferResult:
    file = folder / "result.json"
    if not file.is_file():
        raise ArtifactError(f"{folder}: has no result.json, it is not a run folder")
    record = read_record(file)
    if record.get("kind") != "TransferResult":
        raise ArtifactError(f"{file}: is a {record.get('kind')!r}, not a TransferResult")
    try:
        rows = [
            restored(json.loads(line))
            for line in (folder / "generations.jsonl").read_text(encoding="utf-8").split("\n")
            if line
        ]
        arms = tuple(_arm_from(arm, rows) for arm in record["arms"])
        there = sorted(f.stem for f in (folder / "vectors").glob("*.safetensors"))
        vectors = {name: read(folder / "vectors" / f"{name}.safetensors") for name in record.get("vectors", there)}
        mapping = read(folder / "map.safetensors") if record.get("has_map", True) else None
        names = (
            "label",
            "unit",
            "source",
            "target",
            "map",
            "headline",
            "selection",
            "similarity",
            "spec",
            "splits",
            "versions",
            "seeds",
        )
        return TransferResult(arms=arms, vectors=vectors, mapping=mapping, **{name: record[name] for name in names})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{folder}: is damaged or incomplete ({type(error).__name__}: {error})") from error


def _arm_from(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Arm:
    key = ("arm", "strength", "budget")
    own = [row for row in rows if all(row[name] == record[name] for name in key)]
    if len(own) != record["n"]:
        raise ValueError(f"{record['arm']} at {record['strength']} has {len(own)} of {record['n']} scores")
    return Arm(
        arm=record["arm"],
        strength=record["strength"],
        effect=_estimate_from(record, "effect", "low", "high"),
        change=_estimate_from(record, "change", "change_low", "change_high"),
        kl=record["kl"],
        perplexity=record["perplexity"],
        agreement=record["agreement"],
        budget=record["budget"],
        reached=record["reached"],
        side={name: Estimate.of(estimate) for name, estimate in record.get("side", {}).items()},
        scores=tuple(row["score"] for row in own),
        seeds=tuple(record.get("seeds", ())),
        table=tuple(tuple(row["seeds"]) for row in own if "seeds" in row),
        texts=tuple(row["text"] for row in own if "text" in row),
        raw=tuple(row["judge"] for row in own if "judge" in row),
    )


def _verdict_record(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict) | {
        "efficiency": verdict.efficiency.record(),
        "controls": {name: found.record() for name, found in verdict.controls.items()},
        "comparisons": [
            vars(c)
            | {"difference": c.difference.record()}
            | ({"undefined": why} if (why := c.difference.undefined) else {})
            for c in verdict.comparisons
        ],
    }


def _estimate_from(record: dict[str, Any], *names: str) -> Estimate:
    own = dict(zip(("value", "low", "high"), (record[name] for name in names), strict=True))
    found = Estimate.of(own | {"n": record["n"]})
    # An arm's reason is that of both its estimates.
    return replace(found, undefined=record.get("undefined", "")) if math.isnan(found.low) else found

"""Save and read: artefacts as files, results as folders."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import ArtifactError, XModelSteerError
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.artefacts import read_artefact, save_artefact
from xmodel_steer.files.records import (
    SCHEMA,
    disk_trouble,
    dump_json,
    read_record,
    restored,
    tell_undefined,
    write_atomically,
)
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.curves import DataCurve
from xmodel_steer.maps.layers import LayerGrid
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.recipe.arms import Arm, arm_record
from xmodel_steer.recipe.results import TransferResult
from xmodel_steer.recipe.verdicts import Verdict


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


def read(path: str | Path) -> Any:
    """Read what `save` wrote.

    Args:
        path: A ``.safetensors`` file, or a result's folder.

    Raises:
        ArtifactError: The file is missing, foreign, truncated, of a newer schema, or has NaN.
    """
    path = Path(path)
    return _read_result(path) if path.is_dir() else read_artefact(path)


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

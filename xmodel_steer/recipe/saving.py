"""Save and read: artefacts as files, results as folders."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import ArtifactError, CacheWarning, XModelSteerError
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.artefacts import read_artefact, save_artefact
from xmodel_steer.files.claiming import claim
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
from xmodel_steer.recipe.records import arm_of, older, result_of
from xmodel_steer.recipe.results import Result, prompt_rows

RESULT, TEXTS, REPORT = "result.json", "generations.jsonl", "report.html"
UNFINISHED = "unfinished"  # in the folder of a run that was cut off
KINDS = ("Result", "TransferResult", "study")  # the last two were written by earlier versions
_RUN = {RESULT, TEXTS, REPORT, "vectors", "maps", "map.safetensors"}


def save(value: SteeringVector | Map | Moments | LayerGrid | DataCurve | Result, path: str | Path) -> Path:
    """Write an artefact to a file, or a result to a folder.

    Vectors, maps, moments, grids and curves become ``.safetensors`` files.

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
    return _save_result(value, path) if isinstance(value, Result) else save_artefact(value, path)


def save_or_spare(result: Result, folder: Path) -> Path:
    """Save a result, in a temporary folder if its own cannot be written.

    Then a warning says where it is.

    Returns:
        The folder that it was written to.

    Raises:
        ArtifactError: It could be written to neither.
    """
    try:
        return save(result, folder)
    except ArtifactError as error:
        spare = Path(tempfile.mkdtemp(prefix="xmodel-steer-")) / folder.name
        try:
            save(result, spare)
        except ArtifactError:
            raise error from None
        warnings.warn(f"{error}; the run was written to {spare}", CacheWarning, stacklevel=2)
        return spare


def read(path: str | Path) -> Any:
    """Read what `save` wrote.

    Args:
        path: A ``.safetensors`` file, or the folder of a run, a demo or a study.

    Raises:
        ArtifactError: The file is missing, foreign, truncated, of a newer schema, or has NaN.
    """
    path = Path(path)
    return _read_result(path) if path.is_dir() else read_artefact(path)


def _save_result(result: Result, folder: Path) -> Path:
    claim(folder, "Result", also={UNFINISHED})
    files = {"vectors": _files(result.vectors), "maps": _files(result.maps)}
    record = {
        "schema": SCHEMA,
        "kind": "Result",
        **{name: value for name, value in vars(result).items() if name in result.__dataclass_fields__},
        "conclusions": list(result.conclusions),
        "verdicts": {recipe: verdict.record() for recipe, verdict in result.verdicts.items()},
        "arms": [arm.row() | ({} if arm.scores else {"scored": False}) for arm in result.arms],
        **files,
    }
    rows = [{"number": i} | row for i, arm in enumerate(result.arms) for row in prompt_rows(arm)]
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        write_atomically(scratch / RESULT, dump_json(record, folder, indent=1))
        write_atomically(scratch / TEXTS, "".join(dump_json(row, folder) + "\n" for row in rows))
        for kind, named in files.items():
            for name, file in named.items():
                save_artefact(getattr(result, kind)[name], scratch / kind / file)
        os.chmod(scratch, 0o755)
        _swap(scratch, folder)
    except OSError as error:
        if isinstance(error, XModelSteerError):
            raise
        raise ArtifactError(disk_trouble(folder, error)) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    tell_undefined(folder / RESULT)
    return folder


def _files(named: Mapping[str, Any]) -> dict[str, str]:
    """Give each name a file that every file system takes."""
    files: dict[str, str] = {}
    for name in named:
        plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:80] or "unnamed"
        same = sum(file.startswith(f"{plain}.") or file.startswith(f"{plain}~") for file in files.values())
        files[name] = f"{plain}~{same}.safetensors" if same else f"{plain}.safetensors"
    return files


def _swap(scratch: Path, folder: Path) -> None:
    """Put a finished folder in place of an older one.

    The older one is only removed afterwards; other files in it are kept.
    """
    if not folder.exists():
        scratch.rename(folder)
        return
    older_run = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(older_run / folder.name)
    try:
        scratch.rename(folder)
    except OSError:
        (older_run / folder.name).rename(folder)
        older_run.rmdir()
        raise
    for file in (older_run / folder.name).iterdir():
        if file.name not in _RUN:
            file.rename(folder / file.name)
    shutil.rmtree(older_run, ignore_errors=True)


def _read_result(folder: Path) -> Result:
    file = folder / RESULT
    if not file.is_file():
        raise ArtifactError(f"{folder}: has no result.json, it is not a run folder")
    record = read_record(file)
    kind = record.pop("kind", None)
    if kind not in KINDS:
        raise ArtifactError(f"{file}: is a {kind!r}, not a Result")
    try:
        texts = folder / TEXTS
        lines = texts.read_text(encoding="utf-8").split("\n") if texts.is_file() or kind != "study" else []
        rows = [restored(json.loads(line)) for line in lines if line]
        if kind != "Result":
            record = older(kind, record, rows, [f.stem for f in sorted((folder / "vectors").glob("*.safetensors"))])
        arms = tuple(
            arm_of(arm, [row for row in rows if row.get("number") == i]) for i, arm in enumerate(record.pop("arms"))
        )
        read_all = {
            what: {name: read_artefact(folder / place) for name, place in _places(record.pop(what), what).items()}
            for what in ("vectors", "maps")
        }
        return result_of(record, arms, **read_all)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{folder}: is damaged or incomplete ({type(error).__name__}: {error})") from error


def _places(files: Mapping[str, str], kind: str) -> dict[str, str]:
    return {name: file if "/" in file else f"{kind}/{file}" for name, file in files.items()}

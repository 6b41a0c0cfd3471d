"""Save and read: artefacts as files, results as folders."""

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import ArtifactError, CacheWarning
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.artefacts import read_artefact, save_artefact
from xmodel_steer.files.cache import sha256_of
from xmodel_steer.files.claiming import claim
from xmodel_steer.files.places import disk_trouble, locked, whole_folder
from xmodel_steer.files.records import CHECKED, read_record, reading, write_atomically, write_record
from xmodel_steer.files.strict import dump_json, load_json, restored, tell_undefined
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.curves import DataCurve
from xmodel_steer.maps.layers import LayerGrid
from xmodel_steer.maps.moments import Moments
from xmodel_steer.recipe.records import arm_of, older, require_recomputed, result_of
from xmodel_steer.recipe.results import Result, prompt_rows

RESULT, TEXTS, REPORT = "result.json", "generations.jsonl", "report.html"
UNFINISHED = "unfinished"  # in the folder of a run that was cut off
KINDS = ("Result", "TransferResult", "study")  # the last two were written by earlier versions
_NAME = re.compile(r"((vectors|maps|\.)/)?[\w~-][\w.~-]*")  # of a file in a run's folder


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
        "kind": "Result",
        **{name: value for name, value in vars(result).items() if name in result.__dataclass_fields__},
        "conclusions": list(result.conclusions),
        "verdicts": {recipe: verdict.record() for recipe, verdict in result.verdicts.items()},
        "arms": [arm.row() | ({} if arm.scores else {"scored": False}) for arm in result.arms],
        **files,
    }
    rows = [{"number": i} | row for i, arm in enumerate(result.arms) for row in prompt_rows(arm)]
    try:
        with locked(folder), whole_folder(folder, _replaced(folder)) as scratch:
            write_atomically(scratch / TEXTS, "".join(dump_json(row, folder) + "\n" for row in rows))
            for kind, named in files.items():
                for name, file in named.items():
                    save_artefact(getattr(result, kind)[name], scratch / kind / file)
            # The record binds the files, so that none of another run is read with it.
            hashes = {place: sha256_of(scratch / place) for place in _bound(files)}
            write_record(scratch / RESULT, record | {"files": hashes}, indent=1)
    except OSError as error:
        raise ArtifactError(disk_trouble(folder, error)) from error
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


def _bound(files: Mapping[str, Mapping[str, str]]) -> list[str]:
    """List the files that a record binds, as places in the folder.

    Raises:
        ArtifactError: A name leads out of the folder.
    """
    places = [TEXTS, *(place for kind in files for place in _places(files[kind], kind).values())]
    if wrong := [place for place in places if not _NAME.fullmatch(place)]:
        raise ArtifactError(f"{wrong[0][:200]!r} is no name of a file in the folder of a run")
    return places


def _replaced(folder: Path) -> list[str]:
    """List an older run's files; all others in its folder are the user's."""
    own = [RESULT, TEXTS, REPORT, "map.safetensors"]
    try:
        with warnings.catch_warnings(action="ignore"):
            record = read_record(folder / RESULT)
        named = {kind: record[kind] for kind in ("vectors", "maps") if isinstance(record.get(kind), dict)}
        older_run = [f"vectors/{name}.safetensors" for name in record.get("vectors", ()) if "vectors" not in named]
        return [*own, *_bound(named), *older_run]
    except (ArtifactError, TypeError):
        return own


def _read_result(folder: Path) -> Result:
    file = folder / RESULT
    for _ in range(5):
        stamp = _stamp(file)
        try:
            return _read_once(folder)
        except ArtifactError:
            if _stamp(file) == stamp:  # else the folder was replaced meanwhile
                raise
    return _read_once(folder)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        return file.stat().st_ino, file.stat().st_mtime_ns
    except OSError:
        return None


def _read_once(folder: Path) -> Result:
    file = folder / RESULT
    if not file.is_file():
        raise ArtifactError(f"{folder}: has no result.json, it is not a run folder")
    with reading(folder):
        record = read_record(file)
        kind = record.pop("kind", None)
        if kind not in KINDS:
            raise ArtifactError(f"{file}: is a {kind!r}, not a Result")
        hashes = record.pop("files", {})
        for place, digest in hashes.items():
            if not _NAME.fullmatch(place) or sha256_of(folder / place) != digest:
                raise ArtifactError(
                    f"{folder / place}: is not the file that this run wrote; copy the whole folder again, or run it again"
                )
        texts = folder / TEXTS
        rows = list(_rows(texts)) if texts.is_file() or kind != "study" else []
        if kind != "Result":
            record = older(kind, record, rows, [f.stem for f in sorted((folder / "vectors").glob("*.safetensors"))])
        named = {what: record.pop(what) for what in ("vectors", "maps")}
        places = _bound(named)
        if record["schema"] >= CHECKED and kind == "Result" and hashes.keys() != set(places):
            raise ArtifactError(f"{file}: is damaged, it binds other files than it names")
        by_arm: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            by_arm.setdefault(row.get("number"), []).append(row)
        arms = tuple(arm_of(arm, by_arm.get(i, [])) for i, arm in enumerate(record.pop("arms")))
        require_recomputed(arms)
        read_all = {
            what: {name: read_artefact(folder / place) for name, place in _places(files, what).items()}
            for what, files in named.items()
        }
        return result_of(record, arms, **read_all)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read one record per line."""
    with reading(file):
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line:
                yield restored(load_json(line))


def _places(files: Mapping[str, str], kind: str) -> dict[str, str]:
    return {name: file if "/" in file else f"{kind}/{file}" for name, file in files.items()}

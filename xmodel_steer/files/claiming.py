"""Claims on places: checks before the work that its result may be written."""

import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path

from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.files.places import disk_trouble, sweep
from xmodel_steer.files.records import read_header, read_record

#: Kinds that are folders, each with the file that names the kind.
FOLDERS = {
    "Result": "result.json",
    "organism": "organism.json",
    "ActivationStore": "end.json",
}
# Kinds that replace each other; the last two of a run were written by earlier versions.
_PEERS = {"AffineMap", "AutoencoderMap"}, {"Result", "TransferResult", "study"}


def claim(path: str | Path, kind: str, *, also: Collection[str] = ()) -> Path:
    """Refuse a place that cannot be written, or that holds something else.

    Call it before the work: it makes the parent folder and tries to write. A result of the same kind may be replaced.

    Args:
        path: A file, or for a kind of `FOLDERS` a folder.
        kind: The kind that the record names, such as ``"Moments"`` or ``"Result"``.
        also: Names that may lie in the folder without a record, such as those of unfinished work.

    Returns:
        The path.

    Raises:
        ArtifactError: Something else is in the way, or the place cannot be written.
    """
    path = Path(path)
    for folder in (path, path.absolute().parent):
        sweep(folder)
    try:
        if kind not in FOLDERS and path.is_dir():
            example = path / f"{kind.lower()}.safetensors"
            raise ArtifactError(f"{path}: is a folder; give a file name such as {example}")
        there = kind if _is_free(path, kind, also) else kind_at(path, kind) or "something else"
        if there != kind and not any({there, kind} <= peers for peers in _PEERS):
            raise ArtifactError(f"{path}: exists and holds {there}, no {kind}; choose another place")
        # A result replaces its folder in one step; other kinds write into a folder that is there.
        parent = path if path.is_dir() and kind != "Result" else path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ArtifactError(disk_trouble(path, error)) from error
    return path


def _is_free(path: Path, kind: str, also: Collection[str]) -> bool:
    """Tell whether a path is free, or a folder with scratch files at most."""
    if kind not in FOLDERS or not path.is_dir():
        return not path.exists()
    # A name that begins with a dot is a scratch file of a job that was killed.
    return all(file.name.startswith(".") or file.name in also for file in path.iterdir())


def kind_at(path: Path, kind: str) -> str | None:
    """Read the kind of a record; None for a foreign or damaged one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            record = read_record(path / FOLDERS[kind]) if kind in FOLDERS else read_header(path)
    except (ArtifactError, OSError):
        return None
    there = record.get("kind")
    return there if isinstance(there, str) else None

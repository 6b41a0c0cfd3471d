"""The user's cache folder: whole folders or none."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from xmodel_steer.core.errors import ArtifactError, DownloadError
from xmodel_steer.files.places import locked, remove, whole_folder

MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Return the user's cache folder: ``$XMODEL_STEER_CACHE``, or the platform's."""
    import platformdirs

    chosen = os.environ.get("XMODEL_STEER_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("xmodel_steer"))


def is_intact(folder: Path) -> bool:
    """Tell whether a cached folder has its manifest's files alone, each unchanged."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        there = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir() or f.is_symlink()}
        return bool(files) and there == {*files, MANIFEST} and all(sha256_of(folder / f) == h for f, h in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # missing, cut short, not ours
        return False


def sha256_of(file: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cached_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Return a cached folder; fill it where it is missing or damaged.

    One process fills it, others wait.

    Raises:
        DownloadError: The cache cannot be written, or the disk is full.
    """
    if is_intact(folder):
        return folder
    try:
        with locked(folder, wait=True):
            if not is_intact(folder):  # another process may have filled it meanwhile
                remove(folder)
                with whole_folder(folder) as scratch:
                    fill(scratch)
    except ArtifactError as error:
        raise DownloadError(f"{error}; or set XMODEL_STEER_CACHE to a folder that can be written") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError(
                f"{folder}: no space left on the device; free some, or set XMODEL_STEER_CACHE to a folder with room"
            ) from error
        raise
    return folder

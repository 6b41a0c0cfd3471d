"""The user's cache folder: whole folders or none."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from xmodel_steer.core.errors import DownloadError


def cache_folder() -> Path:
    """Return the user's cache folder: ``$XMODEL_STEER_CACHE``, or the platform's."""
    import platformdirs

    chosen = os.environ.get("XMODEL_STEER_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("xmodel_steer"))


def is_intact(folder: Path) -> bool:
    """Tell whether every file of a cached folder has its recorded hash."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, cut short, or not ours
        return False


def sha256_of(file: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def whole_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """Return a cached folder; fill it where it is missing or damaged."""
    if not (folder.is_dir() and is_intact(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder) as scratch:
            fill(scratch)
    return folder


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Fill a scratch folder that takes its name only when the block succeeds.

    Raises:
        DownloadError: The disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        os.chmod(scratch, 0o755)  # mkdtemp makes it private
        if not folder.exists():  # else another process was faster, with the same content
            scratch.rename(folder)
    except OSError as error:
        if error.errno == 28:
            raise DownloadError(
                f"{folder}: no space left on the device; free some, or set XMODEL_STEER_CACHE to a folder with room"
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

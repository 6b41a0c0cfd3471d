"""Places on disk: files and folders that are whole or absent, locks, and scratch that does not outlive its process."""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from xmodel_steer.core.errors import ArtifactError

# The names of scratch: of what, of which machine and process.
_SCRATCH = re.compile(r"\..*~([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_live: set[str] = set()  # this process's scratch
WAIT = 10.0  # seconds for another process to finish writing


def whole_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a scratch name; rename it once it is on disk.

    A symbolic link stays, and its file is replaced.

    Raises:
        ArtifactError: The folder cannot be written, or the disk is full.
    """
    try:
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(path) as scratch:
            # The process's umask decides who may read it.
            os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            allowed = scratch.stat().st_mode
            write(scratch)
            scratch.chmod(allowed)  # safetensors replaces the file
            with scratch.open("r+b") as written:
                os.fsync(written.fileno())
            os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(disk_trouble(path, error)) from error


@contextmanager
def whole_folder(path: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Fill a folder that takes its place in one step when the block succeeds.

    Args:
        path: The folder, or a symbolic link to it.
        replaced: Files of the older folder that go, as ``name`` or ``folder/name``. All others keep their place: they
            are linked into the new folder before that step, and those that came meanwhile after it.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(path) as scratch:
        yield scratch
        if path.exists():
            _link_others(path, scratch, replaced)
            _exchange(scratch, path)
            _link_others(scratch, path, replaced)
        else:
            scratch.rename(path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Make a folder next to a path, which is removed after the block."""
    with _scratch(path) as scratch:
        scratch.mkdir()
        yield scratch


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Name scratch next to a path; remove what is left of it."""
    sweep(path.parent)
    name = f".{path.name[:150]}~{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    scratch = path.parent / name
    _live.add(name)
    try:
        yield scratch
    finally:
        remove(scratch)
        _live.discard(name)


def _link_others(old: Path, new: Path, replaced: Collection[str], within: str = "") -> None:
    """Link an older folder's other files into the new one."""
    with os.scandir(old) as listed:
        entries = list(listed)
    for entry in entries:
        inside, place = f"{within}{entry.name}", new / entry.name
        if entry.is_dir(follow_symlinks=False):
            _link_others(Path(entry.path), place, replaced, f"{inside}/")
            if not place.exists() and not any(name.startswith(f"{inside}/") for name in replaced):
                place.mkdir(parents=True)  # an empty one
        elif inside not in replaced and not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(entry.path, place, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(entry.path, place, follow_symlinks=False)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@cache
def _swept(folder: str, process: int) -> None:
    for entry in Path(folder).iterdir():
        named = _SCRATCH.fullmatch(entry.name)
        if named and named[1] == _HOST and entry.name not in _live and not _runs(int(named[2])):
            remove(entry)


def sweep(folder: Path) -> None:
    """Remove the scratch of dead processes from a folder, once in each process."""
    if os.name == "posix" and folder.is_dir():
        with suppress(OSError):
            _swept(str(folder.resolve()), os.getpid())


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False  # scratch of a former process of this number: this one's own is in `_live`
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders, in one step where the system can."""
    if _exchanged(new, old):
        return
    aside = new.with_name(f"{new.name[: -len('00000000')]}{secrets.token_hex(4)}")
    _live.add(aside.name)
    try:
        old.rename(aside)
        try:
            new.rename(old)
        except BaseException:
            aside.rename(old)
            raise
        aside.rename(new)
    finally:
        _live.discard(aside.name)


def _exchanged(new: Path, old: Path) -> bool:
    """Exchange two paths atomically; tell whether the system could."""
    names = os.fsencode(new), os.fsencode(old)
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        code = libc.renameat2(here, names[0], here, names[1], swap)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        code = libc.renamex_np(names[0], names[1], 2)  # RENAME_SWAP
    else:
        return False
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that cannot
        return False
    raise OSError(number, os.strerror(number), str(old))


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder.

    Args:
        path: The place; the lock is a file ``.NAME.lock`` next to it.
        wait: Wait for another process to end; else refuse after `WAIT` seconds.

    Raises:
        ArtifactError: Another process holds it, or the folder cannot be written.
    """
    path = path.absolute()
    lock = FileLock(path.parent / f".{path.name[:150]}.lock", is_singleton=True)
    absent = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else WAIT)
    except Timeout:
        raise ArtifactError(
            f"{path}: another process is at work there; wait until it ends, or choose another place"
        ) from None
    except OSError as error:
        raise ArtifactError(disk_trouble(path, error)) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # filelock takes no lock whose file is gone, so that no two hold one
            remove(Path(lock.lock_file))
        lock.release()
        with suppress(OSError):  # folders that were made for the lock, and got nothing else
            for folder in absent:
                folder.rmdir()


def disk_trouble(path: Path, error: Exception) -> str:
    """Say why a file could not be written, and what to do."""
    full = os.strerror(errno.ENOSPC)
    if getattr(error, "errno", None) == errno.ENOSPC or full in str(error):  # safetensors passes on the words alone
        return f"{path}: no space left on the device, nothing was written; free some or choose another place"
    return f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); choose another place"

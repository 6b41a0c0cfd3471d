"""Saved intermediate results, so that an interrupted run resumes."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.files.places import locked, sweep
from xmodel_steer.files.records import read_record, write_record

T = TypeVar("T")


class _OpaqueError(Exception):
    """A part cannot be told from another one by a hash."""


@dataclass
class _Kept:
    """A folder of results, and the seconds that they spared since this was last asked."""

    folder: Path
    spared: float = 0.0
    counted: set[str] = field(default_factory=set)  # results whose time was counted


COMPUTES = ("torch", "transformers", "transformer-lens", "tokenizers")  # their versions may change a number
# A result, or the remains of one that an earlier version was writing.
_RESULT = re.compile(r"\.?[0-9a-f]{32}\.json(-\w+)?")
_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def resumable(folder: str | Path) -> Iterator[None]:
    """Save generated texts and measured damage in a folder while the block runs.

    After an interruption, the same block with the same folder reads the saved results. When it ends well they are deleted, and
    the folder if it is empty. A result is saved under a hash of everything that it depends on: every bit of the model and of what
    steers it, the prompts, the settings, this package's code and the versions of the libraries. Anything that changes is computed
    anew, also after a vector that another number of threads rounds differently. A model with other hooks saves nothing.

    Args:
        folder: The folder of the results. Texts in it are plain, also answers to harmful requests.

    Raises:
        ArtifactError: The folder cannot be written, or another process keeps its results there.

    Example:
        >>> with resumable("runs/refusal.unfinished"):                       # doctest: +SKIP
        ...     refusal_switch(source, target, curriculum("refusal")).save("runs/refusal")
    """
    folder = Path(folder)
    with locked(folder):
        sweep(folder)
        token = _kept.set(_Kept(folder))
        try:
            yield
        finally:
            _kept.reset(token)
        for file in folder.glob("*"):
            if _RESULT.fullmatch(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # others' files stay
            folder.rmdir()


def once(parts: Callable[[], Any], make: Callable[[], T]) -> T:
    """Call ``make``, or return its saved result.

    Outside a block of `resumable` it is always called.

    Args:
        parts: Everything that the result depends on, apart from code and versions: tensors, numbers, texts,
            dataclasses, and lists, tuples and sets of them. With anything else, such as a function, nothing is saved.
        make: Returns numbers, texts, and lists of them.
    """
    kept = _kept.get()
    if kept is None:
        return make()
    digest = hashlib.sha256(_programs().encode())
    try:
        _feed(digest.update, parts())
    except _OpaqueError:
        return make()
    file = kept.folder / f"{digest.hexdigest()[:32]}.json"
    if file.is_file():
        try:
            record = read_record(file)
            result = record["made"]
            if file.name not in kept.counted:
                kept.spared += record["seconds"]
                kept.counted.add(file.name)
            return result
        except (ArtifactError, KeyError, TypeError):  # damaged
            file.unlink()
    start = time.perf_counter()
    result = make()
    write_record(file, {"seconds": time.perf_counter() - start, "made": result})
    kept.counted.add(file.name)
    return result


@contextmanager
def anew() -> Iterator[None]:
    """Compute everything within the block, and save nothing: what is timed must be done."""
    token = _kept.set(None)
    try:
        yield
    finally:
        _kept.reset(token)


def spared() -> float:
    """Return the seconds that saved results spared since the last call."""
    kept = _kept.get()
    if kept is None:
        return 0.0
    seconds, kept.spared = kept.spared, 0.0
    return seconds


@cache
def _programs() -> str:
    """Hash this package's code and the versions of the libraries that compute."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    return json.dumps([code.hexdigest(), *map(version, COMPUTES)])


def _feed(update: Callable[[bytes], None], part: Any) -> None:
    """Feed a hash every bit of a part, and its type."""
    update(f"{type(part).__module__}.{type(part).__qualname__} ".encode())
    if isinstance(part, Tensor):
        values = part.detach().cpu().contiguous()
        update(f"{tuple(values.shape)} {values.dtype} ".encode())
        update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif is_dataclass(part) and not isinstance(part, type):
        for entry in fields(part):
            update(f"{entry.name} ".encode())
            _feed(update, getattr(part, entry.name))
    elif isinstance(part, str):
        data = part.encode()
        update(f"{len(data)} ".encode() + data)
    elif isinstance(part, list | tuple | Set):
        items = sorted(part, key=repr) if isinstance(part, Set) else part
        update(f"{len(items)} ".encode())
        for item in items:
            _feed(update, item)
    elif part is None or isinstance(part, bool | int | float):
        update(f"{part!r} ".encode())
    else:
        raise _OpaqueError(type(part).__qualname__)

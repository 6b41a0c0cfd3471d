"""What is computed is kept as it is made, so that a run that was cut off goes on where it stopped."""

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
from xmodel_steer.files.records import SCHEMA, dump_json, read_record, write_atomically

T = TypeVar("T")


class _OpaqueError(Exception):
    """There is a part that a hash cannot tell from another."""


@dataclass
class _Kept:
    """A folder of results, and the seconds that those of an earlier run took which were found there, since they were last asked for."""

    folder: Path
    spared: float = 0.0
    counted: set[str] = field(default_factory=set)  # the results whose time is in the clock


COMPUTES = ("torch", "transformers", "transformer-lens", "tokenizers")  # whose versions a number hangs on
# A result, or what is left of one that was being written.
_OWN = re.compile(r"\.?[0-9a-f]{32}\.json(-\w+)?")
_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextmanager
def resumable(folder: str | Path) -> Iterator[None]:
    """Keep generated texts and measured damage in a folder while the block runs; when it ends well they go, and the folder if it is empty.

    Run again after it was cut off, with the same folder, the block takes up what is there. A result is kept under a hash of all
    that it depends on: every bit of the model, the prompts, every bit of what steers it, the settings, this package's code and
    the versions of what it stands on. Whatever changes is computed anew: so is all that hangs on a vector which another
    number of threads rounds otherwise. Nothing is kept of a model that has other hooks on it already.

    Args:
        folder: Where to keep it. It holds texts in plain, those of harmful requests too.

    Raises:
        ArtifactError: The folder cannot be written.

    Example:
        >>> with resumable("runs/refusal.unfinished"):                       # doctest: +SKIP
        ...     refusal_switch(source, target, curriculum("refusal")).save("runs/refusal")
    """
    token = _kept.set(_Kept(Path(folder)))
    try:
        yield
    finally:
        _kept.reset(token)
    for file in Path(folder).glob("*"):
        if _OWN.fullmatch(file.name):
            file.unlink(missing_ok=True)
    with suppress(OSError):  # others' files stay
        Path(folder).rmdir()


def once(parts: Callable[[], Any], make: Callable[[], T]) -> T:
    """Call ``make``, or return its saved result.

    Outside the folder of `resumable` it is always called.

    Args:
        parts: All that it depends on, beside code and versions: tensors, numbers, texts, dataclasses, lists, tuples and sets of them.
            Where there is anything else, such as a function, nothing is kept.
        make: Gives numbers, texts, and lists of them.
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
            found = read_record(file)
            made = found["made"]
            if file.name not in kept.counted:
                kept.spared += found["seconds"]
                kept.counted.add(file.name)
            return made
        except (ArtifactError, KeyError, TypeError):  # damaged
            file.unlink()
    start = time.perf_counter()
    made = make()
    record = {"schema": SCHEMA, "seconds": time.perf_counter() - start, "made": made}
    write_atomically(file, dump_json(record, file))
    kept.counted.add(file.name)
    return made


def spared() -> float:
    """Seconds that results took when they were made which were taken up since this was last asked."""
    kept = _kept.get()
    if kept is None:
        return 0.0
    seconds, kept.spared = kept.spared, 0.0
    return seconds


@cache
def _programs() -> str:
    """Hash this package's code and the versions of what computes."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    return json.dumps([code.hexdigest(), *map(version, COMPUTES)])


def _feed(update: Callable[[bytes], None], part: Any) -> None:
    """Give a hash every bit of a part, with what kind of thing it is."""
    update(f"{type(part).__module__}.{type(part).__qualname__} ".encode())
    if isinstance(part, Tensor):
        held = part.detach().cpu().contiguous()
        update(f"{tuple(held.shape)} {held.dtype} ".encode())
        update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif is_dataclass(part) and not isinstance(part, type):
        for own in fields(part):
            update(f"{own.name} ".encode())
            _feed(update, getattr(part, own.name))
    elif isinstance(part, str):
        data = part.encode()
        update(f"{len(data)} ".encode() + data)
    elif isinstance(part, list | tuple | Set):
        held = sorted(part, key=repr) if isinstance(part, Set) else part
        update(f"{len(held)} ".encode())
        for own in held:
            _feed(update, own)
    elif part is None or isinstance(part, bool | int | float):
        update(f"{part!r} ".encode())
    else:
        raise _OpaqueError(type(part).__qualname__)

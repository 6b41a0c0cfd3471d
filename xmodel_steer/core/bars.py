"""Progress bars, with one context that silences them and one that joins them.

The only state is a context variable. No other module of the library imports tqdm.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from xmodel_steer.core.texts import visible

P = ParamSpec("P")
R = TypeVar("R")

_silent: ContextVar[bool] = ContextVar("silent", default=False)
_whole: ContextVar[Any] = ContextVar("whole", default=None)  # the bar of `stages`; inner bars report to it
_stage: ContextVar[str] = ContextVar("stage", default="")


@contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Show no progress bar within the block.

    Args:
        silent: False changes nothing, for use with a ``progress`` argument.

    Example:
        >>> with quiet():
        ...     pass  # xs.collect_moments(...)
    """
    token = _silent.set(_silent.get() or silent)
    try:
        yield
    finally:
        _silent.reset(token)


def silent() -> bool:
    """Tell whether bars are silenced here."""
    return _silent.get()


def tell(line: str) -> None:
    """Print a line to standard error, above the bars, unless they are silenced."""
    if line and not _silent.get():
        from tqdm.auto import tqdm

        tqdm.write(visible(line, lines=True), file=sys.stderr)


def with_progress(verb: Callable[P, R]) -> Callable[P, R]:
    """Make ``progress=False`` silence every bar within a function."""

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with quiet(not kwargs.get("progress", True)):
            return verb(*args, **kwargs)

    return wrapped


@contextmanager
def progress_bar(
    total: float | None, *, unit: str, desc: str, initial: float = 0, delay: float = 2.0, leave: bool = True
) -> Iterator[Any]:
    """Show a progress bar, or report to the bar of the surrounding `stages`.

    Control characters in titles are shown as escapes.

    Args:
        total: Units of work; None where unknown.
        unit: Name of a unit.
        desc: Title.
        initial: Units that were done before.
        delay: Seconds after which the bar appears.
        leave: Keep the bar when the work is done.

    Yields:
        An object with tqdm's ``update`` and ``set_postfix``.
    """
    from tqdm.auto import tqdm

    whole, desc, unit = _whole.get(), visible(desc), visible(unit)
    inner = whole is not None
    with tqdm(
        total=total, unit=unit, desc=desc, initial=initial, disable=inner or _silent.get(), delay=delay, leave=leave
    ) as shown:
        yield _Part(whole, total, desc, initial) if inner else shown


@contextmanager
def stages(title: str, count: int) -> Iterator[Callable[[str], None]]:
    """Show one bar for work of several stages; bars within report to it.

    Within another `stages`, stages are reported to the outer bar.

    Args:
        title: Title of the bar.
        count: Number of stages.

    Yields:
        A function that ends the current stage and begins a stage with a name.
    """
    from tqdm.auto import tqdm

    if _whole.get() is not None:
        outer = _whole.get()
        yield lambda name: outer.set_postfix_str(visible(name))
        return
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}{postfix}]"
    with tqdm(total=count, desc=visible(title), disable=_silent.get(), bar_format=shape) as whole:
        token = _whole.set(whole)
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            whole.update(min(begun, count) - whole.n)
            begun += 1
            _stage.set(visible(name))
            whole.set_postfix_str(visible(name))

        try:
            yield begin
            whole.update(count - whole.n)
        finally:
            _whole.reset(token)


class _Part:
    """A bar within `stages`, which shows its title and share behind the outer bar's."""

    def __init__(self, whole: Any, total: float | None, desc: str, done: float) -> None:
        self._whole, self._total, self._desc, self._done = whole, total, desc, done

    def update(self, n: float = 1) -> None:
        """Count finished units."""
        self._done += n
        share = f" {self._done / self._total:.0%}" if self._total else ""
        self._whole.set_postfix_str(f"{_stage.get()}: {self._desc}{share}", refresh=False)
        self._whole.update(0)  # redraws when it is time

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Ignore the postfix: the outer bar has no room for it."""

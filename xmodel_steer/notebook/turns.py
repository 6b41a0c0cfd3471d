"""Work that shares a notebook's kernel: one step per turn of its event loop, until it ends or is stopped."""

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from xmodel_steer.core.errors import XModelSteerError
from xmodel_steer.core.texts import on_page
from xmodel_steer.figures.style import COLOURS


class Turns:
    """A message, a "Stop" button, and the one run whose steps are taken in turn with the notebook's cells.

    JupyterLab delivers clicks on another thread. All forward passes run on the kernel's main thread.

    Args:
        name: The function that made the widgets, for the log.
    """

    def __init__(self, name: str) -> None:
        w = ipywidgets_of(name)
        self._function = name
        self._run: Iterator[Any] | None = None
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:  # outside a notebook a click blocks until all is done
            self._loop = None
        self.stop = w.Button(description="Stop", disabled=True)
        self.stop.on_click(lambda _: self.on_main_thread(self.finish, "Stopped."))
        self.message = w.HTML()

    def on_main_thread(self, act: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the kernel's main thread, when the running cell has ended."""
        if self._loop is None:
            act(*arguments)
        else:
            self._loop.call_soon_threadsafe(act, *arguments)

    # The methods below run on the main thread only.

    def begin(self, run: Iterator[Any], show: Callable[[Any], None], message: str) -> None:
        """Take a run's steps from now on, in the place of an earlier run's."""
        self._run = run
        self.say(message)
        self.stop.disabled = False
        self._advance(run, show)

    def _advance(self, run: Iterator[Any], show: Callable[[Any], None]) -> None:
        """Take one step, and schedule the next."""
        while run is self._run:
            try:
                with _interruptible():
                    view = next(run, None)
                    if view is not None:
                        show(view)
            except KeyboardInterrupt:
                self.finish("Stopped: the kernel was interrupted.")
            except Exception as error:
                ours = isinstance(error, XModelSteerError)
                if not ours:
                    logging.getLogger(__name__).exception("%s: a forward pass failed", self._function)
                self.finish(str(error) if ours else f"{type(error).__name__}: {error}", wrong=True)
            else:
                if view is None:
                    self.finish("")
                elif self._loop is not None:
                    self._loop.call_soon(self._advance, run, show)
                    return

    def finish(self, text: str, *, wrong: bool = False) -> None:
        """End the run."""
        self._run = None
        self.stop.disabled = True
        self.say(text, wrong=wrong)

    def say(self, text: str, *, wrong: bool = False) -> None:
        """Show a message."""
        colour = f"color:{COLOURS['mapped']};font-weight:600" if wrong else "opacity:.7"
        self.message.value = f'<span role="{"alert" if wrong else "status"}" style="{colour}">{on_page(text)}</span>'


def ipywidgets_of(name: str) -> Any:
    """Import ipywidgets.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            f'{name}: needs ipywidgets, which is not installed; pip install "xmodel-steer[notebook]", then restart the kernel'
        ) from error
    return ipywidgets


def notebook_name(value: Any, otherwise: str) -> str:
    """Find a value's name in the notebook, so that copied code runs there."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    names = shell.user_ns if shell else {}
    return next((n for n, v in list(names.items()) if v is value and not n.startswith("_")), otherwise)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let the interrupt button raise KeyboardInterrupt, which a kernel ignores while no cell runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

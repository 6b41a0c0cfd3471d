"""Output streams that never stop a run."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from xmodel_steer.core.texts import visible

# Colours, and the moves within a line and to lines above by which bars are drawn again.
_DRAWING = re.compile(r"(\x1b\[[0-9;]*m|\x1b\[[0-9]*[ABCDGK]|\x1b\[\?25[hl]|\r)")


class Stream:
    """An output stream that never stops a run: it writes what it can.

    A control character that draws no bar or colour becomes an escape, one that the console's encoding lacks a question
    mark. Text is dropped when its reader has left
    (``| head``), the disk is full or the stream was closed from the start.

    Args:
        stream: The stream; None where it was closed.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text as far as the stream accepts it."""
        parts = _DRAWING.split(text)
        parts[::2] = (visible(part, lines=True) for part in parts[::2])
        size, text = len(text), "".join(parts)
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding  # not the error's: that is "charmap" for every code page
            self._try(self._stream.write, text.encode(encoding, "replace").decode(encoding))
        return size

    def flush(self) -> None:
        """Write the buffer's contents."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        if self.lost is not None:
            return
        try:
            action(*arguments)
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError) as error:
            self.lost = error
            with suppress(OSError, ValueError):  # or Python would flush the buffer at its exit, and fail again
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

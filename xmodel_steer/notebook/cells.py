"""A widget of clickable cells: a grid for each kind of patch, under the tokens of both prompts."""

from functools import cache
from pathlib import Path
from typing import Any


def cells_widget(**values: Any) -> Any:
    """Make the widget.

    Args:
        values: Initial values of its traits.

    Raises:
        ImportError: anywidget is not installed.
    """
    return _widget_class()(**values)


@cache
def _widget_class() -> type:
    try:
        import anywidget
    except ImportError as error:
        raise ImportError(
            'explore_patching: needs anywidget, which is not installed; pip install "xmodel-steer[notebook]", then restart the kernel'
        ) from error
    import traitlets as t

    here = Path(__file__).parent

    class Cells(anywidget.AnyWidget):
        """Values to draw, and what was clicked; ``cells.js`` draws them."""

        _esm = here / "cells.js"
        _css = here / "cells.css"
        rows = t.List(t.Unicode()).tag(sync=True)  # the sites
        read = t.List(t.Unicode()).tag(sync=True)  # tokens of the text whose activations are read
        patched = t.List(t.Unicode()).tag(sync=True)  # tokens of the text that is patched
        labels = t.List(t.Unicode()).tag(sync=True)  # names of the two texts
        pairs = t.List().tag(sync=True)  # their positions that pair
        titles = t.Dict().tag(sync=True)  # by kind
        values = t.Dict().tag(sync=True)  # by kind, then by row and position; None where there is none
        bound = t.Float(1.0).tag(sync=True)  # the value of the strongest colour
        selected = t.Dict({"kind": "", "cells": []}).tag(sync=True)

    return Cells

"""Colours, layout and error bars of all figures."""

import html
import itertools
from collections.abc import Sequence
from typing import Any

from xmodel_steer.core.texts import visible
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.recipe.arms import Arm
from xmodel_steer.recipe.results import Result

# Okabe & Ito's colours, distinct for any colour vision; each arm has the same one in all figures.
COLOURS = {
    "unsteered": "#666666",
    "native": "#0072B2",
    "mapped": "#D55E00",
    "random": "#009E73",
    "shuffled": "#CC79A7",
}
_OTHERS = "#E69F00", "#56B4E9", "#882255"  # of arms that only some studies have
DASHES = {"native": "solid", "mapped": "solid", "random": "dash", "shuffled": "dot"}


def colours_of(result: Result) -> dict[str, str]:
    """Return a colour for every arm."""
    others = dict.fromkeys(arm.arm for arm in result.arms if arm.arm not in COLOURS)
    return COLOURS | dict(zip(others, itertools.cycle(_OTHERS), strict=False))


def bars(values: Sequence[Estimate]) -> dict[str, Any]:
    """Draw intervals as error bars."""
    return {"array": [v.high - v.value for v in values], "arrayminus": [v.value - v.low for v in values]}


def interval(arms: Sequence[Arm]) -> dict[str, Any]:
    """Make error bars of the arms' effects."""
    return {
        "type": "data",
        "symmetric": False,
        **bars([arm.effect for arm in arms]),
        "thickness": 1.5,
        "width": 4,
    }


def plain(text: object) -> str:
    """Escape tags, ``%{...}`` and ``$...$``, which Plotly reads in every text.

    Example:
        >>> plain("<b>joy</b>")
        '&lt;b&gt;joy&lt;/b&gt;'
    """
    return html.escape(visible(str(text)), quote=False).replace("%{", "%&#123;").replace("$", "&#36;")


def titled(title: str, note: str = "") -> str:
    """Make a title with a small note below it, both escaped."""
    return plain(title) + (f"<br><sup>{plain(note)}</sup>" if note else "")


def hover(*lines: str) -> str:
    """Make a hover text; escape with `plain` the texts in its lines."""
    return "<br>".join(lines) + "<extra></extra>"


def laid_out(title: str, note: str = "") -> dict[str, Any]:
    """Make a layout that suits a notebook, a report and a projector.

    Args:
        title: The title, as plain text.
        note: A smaller line below it, as plain text.
    """
    return {
        "template": "plotly_white",
        "title": {"text": titled(title, note), "y": 0.95},
        "legend": {"orientation": "h", "y": -0.22, "x": 0},
        "margin": {"t": 110, "b": 90, "l": 70, "r": 20},
        "height": 480,
        "font": {"size": 13},
    }

"""Colours, layout and error bars of all figures."""

from collections.abc import Sequence
from typing import Any

from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.recipe.arms import Arm

# Okabe & Ito's colours, distinct for any colour vision; each arm has the same one in all figures.
COLOURS = {
    "unsteered": "#666666",
    "native": "#0072B2",
    "mapped": "#D55E00",
    "random": "#009E73",
    "shuffled": "#CC79A7",
}
DASHES = {"native": "solid", "mapped": "solid", "random": "dash", "shuffled": "dot"}


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


def laid_out(title: str) -> dict[str, Any]:
    """Make a layout that suits a notebook, a report and a projector."""
    return {
        "template": "plotly_white",
        "title": {"text": title, "y": 0.95},
        "legend": {"orientation": "h", "y": -0.22, "x": 0},
        "margin": {"t": 110, "b": 90, "l": 70, "r": 20},
        "height": 480,
        "font": {"size": 13},
    }

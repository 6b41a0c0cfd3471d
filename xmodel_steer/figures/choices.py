"""Figures of what validation chose among, and of settings that were varied."""

import itertools
from collections.abc import Mapping
from typing import Any

from xmodel_steer.figures.style import bars, hover, laid_out, plain
from xmodel_steer.maps.statistics import Estimate, number
from xmodel_steer.recipe.arms import AGREEMENT
from xmodel_steer.recipe.results import Result

_LINES = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
_KINDS = "target layer", "source layer"


def layers_varied(result: Result) -> list[str]:
    """List the kinds of layer that validation chose among."""
    return [kind for kind in _KINDS if any(record["varied"] == kind for record in result.validation)]


def effect_by_layer(result: Result) -> Any:
    """Plot the validation score by layer, a line for each recipe.

    Each model has a panel. In a transfer the score is half the difference between the two signs. The layer that was
    taken has the large marker; where there is one recipe, the perplexity of neutral text over the unsteered one is
    written above each point.

    Args:
        result: A result that chose layers.

    Returns:
        A ``plotly.graph_objects.Figure``.

    Raises:
        ValueError: No layers were compared, because one of each model was given.
    """
    from plotly.subplots import make_subplots

    kinds = layers_varied(result)
    if not kinds:
        raise ValueError("plots.effect_by_layer: one layer of each model was given, nothing was compared")
    figure = make_subplots(rows=1, cols=len(kinds), shared_yaxes=True, horizontal_spacing=0.06)
    recipes = list(dict.fromkeys(record["recipe"] for record in result.validation))
    for column, kind in enumerate(kinds, 1):
        end = kind.split()[0]
        for recipe, colour in zip(recipes, itertools.cycle(_LINES), strict=False):
            figure.add_trace(_line(result, recipe, kind, colour, column == 1 and len(recipes) > 1), row=1, col=column)
        figure.update_xaxes(title_text=f"layer of the {end} model", row=1, col=column)
    figure.update_yaxes(title_text="validation score", row=1, col=1)
    figure.update_layout(
        **laid_out(
            f"{result.name}: validation score by layer",
            "validation prompts chose the layers (large markers) and are not reported on"
            + ("; diamonds: stacks, at their deepest layer" if any(map(_is_stack, result.validation)) else "")
            + ("; ×: perplexity over the unsteered one" if len(recipes) == 1 else ""),
        )
    )
    return figure


def _line(result: Result, recipe: str, kind: str, colour: str, legend: bool) -> Any:
    """Draw what was tried for a recipe; stacks are apart from the line."""
    import plotly.graph_objects as go

    end, alone = kind.split()[0], len({r["recipe"] for r in result.validation}) == 1
    tried = [r for r in result.validation if (r["recipe"], r["varied"]) == (recipe, kind)]
    first = {_site(r): r for r in reversed(tried)}  # layers that tie are tried with further operators
    choice = result.chosen.get(recipe, {})
    taken = choice.get(f"{end}_site", choice.get(f"{end}_layer"))
    points: list[Mapping[str, Any]] = []
    for record in sorted(first.values(), key=lambda r: (_is_stack(r), r["layer"])):
        points += [{"layer": None, "score": None}, record] if _is_stack(record) else [record]  # a gap ends the line
    ratios = [number(r["perplexity_ratio"], ".2f") if "perplexity_ratio" in r else "" for r in points]
    return go.Scatter(
        x=[r["layer"] for r in points],
        y=[r["score"] for r in points],
        name=plain(recipe),
        legendgroup=plain(recipe),
        showlegend=legend,
        mode="lines+markers+text" if alone else "lines+markers",
        text=[f"× {ratio}" if ratio else "" for ratio in ratios],
        textposition="top center",
        cliponaxis=False,
        line={"color": colour, "width": 2.5},
        marker={
            "size": [15 if taken in (_site(r), None if _is_stack(r) else r["layer"]) else 8 for r in points],
            "symbol": ["diamond" if _is_stack(r) else "circle" for r in points],
        },
        customdata=[plain(_site(r)) for r in points],
        hovertemplate=hover(plain(recipe), "%{customdata}", "score %{y:.3f}", "perplexity %{text}"),
    )


def _site(record: Mapping[str, Any]) -> str:
    return str(record.get("site", f"layer {record['layer']}"))


def _is_stack(record: Mapping[str, Any]) -> bool:
    return "+" in _site(record)


def curve(result: Result, name: str) -> Any:
    """Draw the varied settings as lines with intervals.

    Args:
        result: A result with curves.
        name: Name of the curve: what varies along the x axis.

    Returns:
        A ``plotly.graph_objects.Figure``.
    """
    import plotly.graph_objects as go

    points = result.curves[name]
    figure = go.Figure()
    shown = {"effect": "solid", AGREEMENT: "dash"}
    shared = [p for p in points if p["prompts"] == 0]
    for kind, colour in (("known", "#D55E00"), ("unknown", "#0072B2")):
        line = sorted([p for p in points if p["trigger"] == kind and p["prompts"]] + shared, key=lambda p: p["prompts"])
        for measure, dash in shown.items():
            values = [Estimate.of(p[measure]) for p in line]
            figure.add_trace(
                go.Scatter(
                    x=[p["prompts"] for p in line], y=[v.value for v in values], name=f"{measure}, trigger {kind}",
                    error_y=bars(values),
                    line={"color": colour, "dash": dash, "width": 2.5}, mode="lines+markers", marker={"size": 8},
                )
            )  # fmt: skip
    figure.update_layout(template="plotly_white", height=380, font={"size": 14})
    figure.update_xaxes(title_text=plain(name))
    figure.update_yaxes(title_text="share", range=[-0.05, 1.05])
    return figure

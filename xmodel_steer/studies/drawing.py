"""Figures of a study."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

from xmodel_steer.figures.style import COLOURS
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.studies.study import AGREEMENT, EFFICIENCY, EQUAL_STRENGTH, STRICTER, Study, StudyArm

OTHERS = "#E69F00", "#56B4E9", "#882255"  # of arms that only some studies have


def figure(study: Study) -> Any:
    """Draw the figure that a study's page begins with.

    Args:
        study: A study.

    Returns:
        A ``plotly.graph_objects.Figure``.
    """
    if all(arm.arm != "mapped" for arm in study.arms):
        return effects(study)
    return efficiencies(study) if any(EFFICIENCY in arm.beside for arm in study.arms) else measures(study)


def effects(study: Study) -> Any:
    """Draw the effect of every arm, a panel for each recipe.

    Args:
        study: A study whose arms are no vectors, such as maps.

    Returns:
        A ``plotly.graph_objects.Figure``, with 95 % intervals.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = list(dict.fromkeys(arm.recipe for arm in study.arms))
    names = list(dict.fromkeys(arm.arm for arm in study.arms))
    made = make_subplots(rows=1, cols=len(panels), subplot_titles=panels, shared_yaxes=True, horizontal_spacing=0.03)
    for column, recipe in enumerate(panels, 1):
        own = [arm for arm in study.arms if arm.recipe == recipe]
        made.add_trace(
            go.Scatter(
                x=[arm.effect.value for arm in own], y=[arm.arm for arm in own], error_x=_bars([arm.effect for arm in own]),
                mode="markers", marker={"size": 11, "color": [COLOURS.get(arm.arm, "#0072B2") for arm in own]}, showlegend=False,
                hovertemplate="%{y}<br>%{x:.3f}<extra></extra>",
            ), row=1, col=column,
        )  # fmt: skip
        made.update_xaxes(title_text="effect", row=1, col=column)
    made.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    made.update_layout(template="plotly_white", height=140 + 34 * len(names), font={"size": 14})
    return made


def measures(study: Study) -> Any:
    """Draw each arm's effect and costs side by side, a panel for each recipe.

    Args:
        study: A study.

    Returns:
        A ``plotly.graph_objects.Figure``: shares from 0 to 1, with 95 % intervals.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    steered = [arm for arm in study.arms if arm.arm != "unsteered"]
    colours = colours_of(study)
    panels = list(dict.fromkeys((arm.recipe, arm.at) for arm in steered))
    titles = [recipe if at == EQUAL_STRENGTH else f"{recipe}, {at}" for recipe, at in panels]
    figure = make_subplots(rows=len(panels), cols=1, subplot_titles=titles, vertical_spacing=0.33 / len(panels))
    shown: set[str] = set()
    for row, panel in enumerate(panels, 1):
        for arm in (a for a in steered if (a.recipe, a.at) == panel):
            names, values = zip(*_measured(arm), strict=True)
            figure.add_trace(
                go.Scatter(
                    # In lines: turned labels would reach into the next panel.
                    x=["<br>".join(textwrap.wrap(name, 16)) for name in names],
                    y=[v.value for v in values],
                    error_y=_bars(values) | {"thickness": 1.5},
                    name=arm.arm,
                    legendgroup=arm.arm,
                    showlegend=arm.arm not in shown,
                    mode="markers",
                    marker={"size": 11, "color": colours[arm.arm], "opacity": 0.85},
                    hovertemplate=f"{arm.arm}<br>%{{x}}<br>%{{y:.3f}}<extra></extra>",
                ),
                row=row,
                col=1,
            )
            shown.add(arm.arm)
        figure.update_yaxes(range=[-0.05, 1.05], title_text="share", row=row, col=1)
    figure.update_xaxes(tickangle=0)
    figure.update_layout(template="plotly_white", height=320 * len(panels) + 60, scattermode="group", font={"size": 14})
    return figure


def efficiencies(study: Study) -> Any:
    """How much of the native vector's effect each arm has, a row for each concept.

    Args:
        study: A study whose arms have an efficiency; concepts without a native effect have an empty row.

    Returns:
        A ``plotly.graph_objects.Figure``, with 95 % intervals.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = list(study.chosen)
    for name in ("mapped", "random", "shuffled"):
        own = [arm for arm in study.arms if arm.arm == name and EFFICIENCY in arm.beside]
        values = [arm.beside[EFFICIENCY] for arm in own]
        figure.add_trace(
            go.Scatter(
                x=[v.value for v in values], y=[arm.recipe for arm in own], error_x=_bars(values), name=name, mode="markers",
                marker={"size": 11, "color": COLOURS[name]}, hovertemplate=f"{name}<br>%{{y}}<br>%{{x:.2f}}<extra></extra>",
            )
        )  # fmt: skip
    for x, dash in ((0, "solid"), (1, "dash")):
        figure.add_vline(x=x, line={"color": "#666", "width": 1, "dash": dash})
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], range=[-0.6, len(names) - 0.4])
    figure.update_xaxes(
        title_text="transfer efficiency at equal KL: share of the native vector's effect (1: all of it)"
    )
    figure.update_layout(template="plotly_white", height=140 + 46 * len(names), scattermode="group", font={"size": 14})
    return figure


def layers_varied(study: Study) -> list[str]:
    """Return the kinds of layer that validation varied."""
    return [kind for kind in ("target layer", "source layer") if any(r["varied"] == kind for r in study.validation)]


def sweep(study: Study) -> Any:
    """How well each layer served on validation prompts, for the target's layer and for the source's.

    Args:
        study: A study that chose layers.

    Returns:
        A ``plotly.graph_objects.Figure`` with a line for each recipe.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    kinds = layers_varied(study)
    figure = make_subplots(rows=1, cols=len(kinds), subplot_titles=[f"{kind}" for kind in kinds], shared_yaxes=True)
    recipes = dict.fromkeys(record["recipe"] for record in study.validation)
    own_colours = itertools.cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"))
    colours = dict(zip(recipes, own_colours, strict=False))
    for column, kind in enumerate(kinds, 1):
        for recipe, colour in colours.items():
            tried = [r for r in study.validation if (r["recipe"], r["varied"]) == (recipe, kind)]
            first = {r["layer"]: r for r in reversed(tried)}  # layers that tie are tried with further operators
            own = sorted(first.values(), key=lambda r: r["layer"])
            figure.add_trace(
                go.Scatter(
                    x=[r["layer"] for r in own], y=[r["score"] for r in own], name=recipe, legendgroup=recipe,
                    showlegend=column == 1, mode="lines+markers", line={"color": colour, "width": 2.5}, marker={"size": 8},
                ), row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title_text=f"{kind} (of the {kind.split()[0]} model)", row=1, col=column)
    figure.update_yaxes(title_text="validation score", range=[0, 1.03], row=1, col=1)
    figure.update_layout(template="plotly_white", height=380, font={"size": 14})
    return figure


def curve(study: Study, name: str) -> Any:
    """Draw the varied settings as lines with intervals.

    Args:
        study: A study with curves.
        name: Name of the curve: what stands on the x axis.

    Returns:
        A ``plotly.graph_objects.Figure``.
    """
    import plotly.graph_objects as go

    points = study.curves[name]
    figure = go.Figure()
    shown = {"effect": "solid", AGREEMENT: "dash"}
    shared = [p for p in points if p["prompts"] == 0]
    for kind, colour in (("known", "#D55E00"), ("unknown", "#0072B2")):
        own = sorted([p for p in points if p["trigger"] == kind and p["prompts"]] + shared, key=lambda p: p["prompts"])
        for measure, dash in shown.items():
            values = [Estimate.of(p[measure]) for p in own]
            figure.add_trace(
                go.Scatter(
                    x=[p["prompts"] for p in own], y=[v.value for v in values], name=f"{measure}, trigger {kind}",
                    error_y=_bars(values),
                    line={"color": colour, "dash": dash, "width": 2.5}, mode="lines+markers", marker={"size": 8},
                )
            )  # fmt: skip
    figure.update_layout(template="plotly_white", height=380, font={"size": 14})
    figure.update_xaxes(title_text=name)
    figure.update_yaxes(title_text="share", range=[-0.05, 1.05])
    return figure


def _bars(values: Sequence[Estimate]) -> dict[str, Any]:
    return {"array": [v.high - v.value for v in values], "arrayminus": [v.value - v.low for v in values]}


def colours_of(study: Study) -> dict[str, str]:
    """Return a colour for every arm."""
    others = dict.fromkeys(arm.arm for arm in study.arms if arm.arm not in COLOURS)
    return COLOURS | dict(zip(others, itertools.cycle(OTHERS), strict=False))


def _measured(arm: StudyArm) -> list[tuple[str, Estimate]]:
    return [("effect", arm.effect), *((n, v) for n, v in arm.beside.items() if not n.endswith(STRICTER))]

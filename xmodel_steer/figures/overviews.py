"""Figures of every arm of a result: effects, costs and efficiencies, a panel or a row for each recipe."""

import textwrap
from typing import Any

from xmodel_steer.figures.doses import dose_response
from xmodel_steer.figures.style import COLOURS, bars, colours_of, hover, plain
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.recipe.arms import EFFICIENCY, EQUAL_STRENGTH, STRICTER, Arm
from xmodel_steer.recipe.results import Result


def overview(result: Result) -> Any:
    """Draw every arm of a result in one figure.

    Args:
        result: A result.

    Returns:
        A ``plotly.graph_objects.Figure``.
    """
    swept = [(arm.arm, arm.recipe) for arm in result.arms if arm.arm == "random" and arm.at == EQUAL_STRENGTH]
    if result.signs or len(set(swept)) < len(swept):
        return dose_response(result)
    if all(arm.arm != "mapped" for arm in result.arms):
        return effects(result)
    return efficiencies(result) if any(EFFICIENCY in arm.measures for arm in result.arms) else measures(result)


def effects(result: Result) -> Any:
    """Draw the effect of every arm, a panel for each recipe.

    Args:
        result: A result whose arms are no vectors, such as maps.

    Returns:
        A ``plotly.graph_objects.Figure``, with 95 % intervals.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = list(dict.fromkeys(arm.recipe for arm in result.arms))
    names = list(dict.fromkeys(arm.arm for arm in result.arms))
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=list(map(plain, panels)), shared_yaxes=True, horizontal_spacing=0.03
    )
    for column, recipe in enumerate(panels, 1):
        arms = [arm for arm in result.arms if arm.recipe == recipe]
        figure.add_trace(
            go.Scatter(
                x=[arm.effect.value for arm in arms], y=[plain(arm.arm) for arm in arms], error_x=bars([arm.effect for arm in arms]),
                mode="markers", marker={"size": 11, "color": [COLOURS.get(arm.arm, "#0072B2") for arm in arms]}, showlegend=False,
                hovertemplate=hover("%{y}", "%{x:.3f}"),
            ), row=1, col=column,
        )  # fmt: skip
        figure.update_xaxes(title_text="effect", row=1, col=column)
    figure.update_yaxes(categoryorder="array", categoryarray=[plain(name) for name in names[::-1]])
    figure.update_layout(template="plotly_white", height=140 + 34 * len(names), font={"size": 14})
    return figure


def measures(result: Result) -> Any:
    """Draw each arm's effect and costs side by side, a panel for each recipe.

    Args:
        result: A result.

    Returns:
        A ``plotly.graph_objects.Figure``: shares from 0 to 1, with 95 % intervals.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    steered = [arm for arm in result.arms if arm.arm != "unsteered"]
    colours = colours_of(result)
    panels = list(dict.fromkeys((arm.recipe, arm.at) for arm in steered))
    titles = [plain(recipe if at == EQUAL_STRENGTH else f"{recipe}, {at}") for recipe, at in panels]
    figure = make_subplots(rows=len(panels), cols=1, subplot_titles=titles, vertical_spacing=0.33 / len(panels))
    shown: set[str] = set()
    for row, panel in enumerate(panels, 1):
        for arm in (a for a in steered if (a.recipe, a.at) == panel):
            names, values = zip(*_measured(arm), strict=True)
            figure.add_trace(
                go.Scatter(
                    # In lines: turned labels would reach into the next panel.
                    x=["<br>".join(map(plain, textwrap.wrap(name, 16))) for name in names],
                    y=[v.value for v in values],
                    error_y=bars(values) | {"thickness": 1.5},
                    name=plain(arm.arm),
                    legendgroup=plain(arm.arm),
                    showlegend=arm.arm not in shown,
                    mode="markers",
                    marker={"size": 11, "color": colours[arm.arm], "opacity": 0.85},
                    hovertemplate=hover(plain(arm.arm), "%{x}", "%{y:.3f}"),
                ),
                row=row,
                col=1,
            )
            shown.add(arm.arm)
        figure.update_yaxes(range=[-0.05, 1.05], title_text="share", row=row, col=1)
    figure.update_xaxes(tickangle=0)
    figure.update_layout(template="plotly_white", height=320 * len(panels) + 60, scattermode="group", font={"size": 14})
    return figure


def efficiencies(result: Result) -> Any:
    """Draw each arm's share of the native effect, a row for each recipe.

    Args:
        result: A result whose arms have an efficiency; recipes without a native effect have an empty row.

    Returns:
        A ``plotly.graph_objects.Figure``, with 95 % intervals.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = list(result.chosen)
    for name in ("mapped", "random", "shuffled"):
        arms = [arm for arm in result.arms if arm.arm == name and EFFICIENCY in arm.measures]
        values = [arm.measures[EFFICIENCY] for arm in arms]
        figure.add_trace(
            go.Scatter(
                x=[v.value for v in values], y=[plain(arm.recipe) for arm in arms], error_x=bars(values), name=name, mode="markers",
                marker={"size": 11, "color": COLOURS[name]}, hovertemplate=hover(name, "%{y}", "%{x:.2f}"),
            )
        )  # fmt: skip
    for x, dash in ((0, "solid"), (1, "dash")):
        figure.add_vline(x=x, line={"color": "#666", "width": 1, "dash": dash})
    figure.update_yaxes(
        categoryorder="array", categoryarray=[plain(name) for name in names[::-1]], range=[-0.6, len(names) - 0.4]
    )
    figure.update_xaxes(
        title_text="transfer efficiency at equal KL: share of the native vector's effect (1: all of it)"
    )
    figure.update_layout(template="plotly_white", height=140 + 46 * len(names), scattermode="group", font={"size": 14})
    return figure


def _measured(arm: Arm) -> list[tuple[str, Estimate]]:
    return [("effect", arm.effect), *((n, v) for n, v in arm.measures.items() if not n.endswith(STRICTER))]

"""Effects and damage against strength."""

from typing import Any

from xmodel_steer.figures.style import COLOURS, DASHES, colours_of, hover, interval, laid_out
from xmodel_steer.recipe.arms import ARMS, EQUAL_KL, EQUAL_STRENGTH, Arm
from xmodel_steer.recipe.results import Result


def dose_response(result: Result) -> Any:
    """Draw effect, KL and perplexity against strength, a line per arm.

    Args:
        result: What `transfer` or `sweep` returned.

    Returns:
        A ``plotly.graph_objects.Figure`` with three panels.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    base = result.arm("unsteered")
    figure = make_subplots(
        rows=1,
        cols=3,
        subplot_titles=("behaviour", "KL from unsteered, neutral text", "perplexity, neutral text"),
        horizontal_spacing=0.09,
    )
    panels = (
        (1, lambda arm: arm.effect.value, "mean score"),
        (2, lambda arm: arm.kl, "nats per token"),
        (3, lambda arm: arm.perplexity, "perplexity"),
    )
    fixed = [arm for arm in result.arms if arm.arm != "unsteered" and arm.at == EQUAL_STRENGTH]
    colours = colours_of(result)
    for name in dict.fromkeys(arm.arm for arm in fixed):
        line = sorted((arm for arm in fixed if arm.arm == name), key=lambda arm: arm.strength)
        points = _with_base(line, base)
        strengths = [0.0 if arm is base else arm.strength for arm in points]
        for column, value, _ in panels:
            band = interval(points) if column == 1 else None
            figure.add_trace(
                go.Scatter(
                    x=strengths,
                    y=[value(arm) for arm in points],
                    error_y=band,
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": colours[name], "dash": DASHES.get(name, "solid"), "width": 2.5},
                    marker={"size": 7},
                    hovertemplate=hover(name, "strength %{x:g}", "%{y:.3f}"),
                ),
                row=1,
                col=column,
            )
    for column, _, title in panels:
        figure.update_xaxes(title_text="strength (native norms)", row=1, col=column, zeroline=False)
        figure.update_yaxes(title_text=title, row=1, col=column, zeroline=False)
    figure.add_shape(
        type="line",
        x0=0,
        x1=1,
        xref="x domain",
        y0=base.effect.value,
        y1=base.effect.value,
        yref="y",
        line={"color": COLOURS["unsteered"], "width": 1, "dash": "dash"},
    )
    figure.update_layout(
        **laid_out(
            f"{result.name}: {result.between}",
            f"{_measured(result)}; n = {base.effect.n}, bars are 95 % bootstrap intervals",
        )
    )
    return figure


def _with_base(line: list[Arm], base: Arm) -> list[Arm]:
    """Put the unsteered point between the negative and the positive strengths."""
    return [a for a in line if a.strength < 0] + [base] + [a for a in line if a.strength > 0]


def frontier(result: Result) -> Any:
    """Draw effect against damage, a path per arm.

    A path leads from strong negative to strong positive steering.

    An arm whose path lies further out does more for the same KL. Large markers are the arms at equal KL.

    Args:
        result: What `transfer` returned.

    Returns:
        A ``plotly.graph_objects.Figure``.
    """
    import plotly.graph_objects as go

    base = result.arm("unsteered")
    figure = go.Figure()
    for name in ARMS[1:]:
        fixed = sorted((a for a in result.arms if a.arm == name and a.at == EQUAL_STRENGTH), key=lambda a: a.strength)
        path = _with_base(fixed, base)
        fair = [a for a in result.arms if a.arm == name and a.at == EQUAL_KL]
        look = {"color": COLOURS[name], "dash": DASHES[name], "width": 2.5}
        shown = hover(name, "strength %{customdata:.2f}", "KL %{x:.3f}", "effect %{y:.3f}")
        figure.add_trace(
            go.Scatter(
                x=[a.kl for a in path], y=[a.effect.value for a in path], customdata=[a.strength for a in path],
                mode="lines+markers", name=name, legendgroup=name, line=look, marker={"size": 6}, hovertemplate=shown,
            )
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[a.kl for a in fair], y=[a.effect.value for a in fair], customdata=[a.strength for a in fair],
                error_y=interval(fair), mode="markers", name=f"{name}, equal KL", legendgroup=name, showlegend=False,
                marker={"size": 13, "symbol": "diamond", "color": COLOURS[name], "line": {"width": 1.5, "color": "white"}},
                hovertemplate=shown,
            )
        )  # fmt: skip
    figure.add_hline(y=base.effect.value, line={"color": COLOURS["unsteered"], "width": 1, "dash": "dash"})
    figure.update_layout(
        **laid_out(
            f"{result.name}: effect against damage",
            f"{_measured(result)}; n = {base.effect.n}; diamonds: strengths calibrated to the native vector's KL, "
            "with 95 % bootstrap intervals",
        )
    )
    figure.update_xaxes(title_text="KL from the unsteered model, neutral text (nats per token)", rangemode="tozero")
    figure.update_yaxes(title_text="mean score", zeroline=False)
    return figure


def _measured(result: Result) -> str:
    return result.unit if result.unit == "score" else f"score: {result.unit}"

"""Figures of results, as Plotly values: nothing is shown or written here."""

from typing import Any

import numpy as np

from xmodel_steer.layers import DataCurve, LayerGrid
from xmodel_steer.results import ARMS, Arm, TransferResult

# Okabe & Ito's colours, told apart with any colour vision; one per arm, everywhere.
COLOURS = {
    "unsteered": "#666666",
    "native": "#0072B2",
    "mapped": "#D55E00",
    "random": "#009E73",
    "shuffled": "#CC79A7",
}
_DASHES = {"native": "solid", "mapped": "solid", "random": "dash", "shuffled": "dot"}


def dose_response(result: TransferResult) -> Any:
    """Effect, KL and perplexity against strength, a line per arm with its 95 % interval.

    Args:
        result: What `transfer` returned.

    Returns:
        A ``plotly.graph_objects.Figure`` with three panels.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    base = result.arm("unsteered", 0)
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
    for name in ARMS[1:]:
        fixed = (arm for arm in result.arms if arm.arm == name and arm.budget is None)
        line = sorted(fixed, key=lambda arm: arm.strength)
        points = _with_base(line, base)
        strengths = [0.0 if arm is base else arm.strength for arm in points]
        for column, value, _ in panels:
            band = (
                {
                    "type": "data",
                    "symmetric": False,
                    "array": [arm.effect.high - arm.effect.value for arm in points],
                    "arrayminus": [arm.effect.value - arm.effect.low for arm in points],
                    "thickness": 1.5,
                    "width": 4,
                }
                if column == 1
                else None
            )
            figure.add_trace(
                go.Scatter(
                    x=strengths,
                    y=[value(arm) for arm in points],
                    error_y=band,
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": COLOURS[name], "dash": _DASHES[name], "width": 2.5},
                    marker={"size": 7},
                    hovertemplate=f"{name}<br>strength %{{x:g}}<br>%{{y:.3f}}<extra></extra>",
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
        template="plotly_white",
        title={
            "text": f"{result.label}: {result.source['model']} → {result.target['model']}"
            f"<br><sup>score: {result.unit}; n = {base.effect.n}, bars are 95 % bootstrap intervals</sup>",
            "y": 0.95,
        },
        legend={"orientation": "h", "y": -0.22, "x": 0},
        margin={"t": 110, "b": 90, "l": 70, "r": 20},
        height=480,
        font={"size": 13},
    )
    return figure


def _with_base(line: list[Arm], base: Arm) -> list[Arm]:
    """The unsteered point between the negative and the positive strengths."""
    return [a for a in line if a.strength < 0] + [base] + [a for a in line if a.strength > 0]


_METRICS = {
    "r2": "R² per dimension",
    "cosine": "cosine, standardised",
    "fvu": "variance unexplained, standardised",
    "norm_ratio": "norm ratio, standardised",
    "cka": "linear CKA, standardised",
}


def layer_grid(grid: LayerGrid, metric: str = "r2") -> Any:
    """Held-out quality of the map between every two layers: a heat map, all other metrics on hover.

    Args:
        grid: What `xmodel_steer.layer_grid` returned.
        metric: ``r2``, ``cosine``, ``fvu``, ``norm_ratio`` or ``cka``.

    Returns:
        A ``plotly.graph_objects.Figure``; the best source layer of each target layer, by
        validation, is marked.

    Raises:
        ValueError: The metric is unknown.
    """
    import plotly.graph_objects as go

    if metric not in _METRICS:
        raise ValueError(f"plots.layer_grid: metric must be one of {', '.join(_METRICS)}, got {metric!r}")
    sources = [space.site.layer for space in grid.source]
    targets = [space.site.layer for space in grid.target]
    penalties = np.array(grid.penalties)[grid.best]
    details = np.stack([*(grid.chosen(name) for name in _METRICS), penalties, grid.r2_error], -1)
    lines = [f"{name} %{{customdata[{k}]:.3f}}" for k, name in enumerate(_METRICS.values())]
    lines[0] += " ± %{customdata[6]:.3f}" if grid.sketch else ""
    heat = go.Heatmap(
        z=grid.chosen(metric),
        x=targets,
        y=sources,
        customdata=details,
        colorscale="Cividis",  # ordered for every colour vision
        colorbar={"title": {"text": _METRICS[metric], "side": "right"}},
        hovertemplate="source layer %{y} → target layer %{x}<br>"
        + "<br>".join(lines)
        + "<br>penalty %{customdata[5]:.2g}<extra></extra>",
    )
    quality = grid.chosen("r2", "validation")
    best = go.Scatter(
        x=targets,
        y=[sources[i] for i in quality.argmax(0)],
        mode="markers",
        marker={"symbol": "circle-open", "size": 11, "color": "white", "line": {"width": 2}},
        name="best source layer (validation)",
        showlegend=True,
        hoverinfo="skip",
    )
    figure = go.Figure([heat, best])
    rows, documents = grid.counts["test"]
    error = f"; from {grid.sketch} target dimensions, standard error {grid.r2_error.mean():.3f}" if grid.sketch else ""
    figure.update_layout(
        template="plotly_white",
        title={
            "text": f"{grid.source[0].model} → {grid.target[0].model}: {_METRICS[metric]}"
            f"<br><sup>{rows:,} test tokens of {documents} documents{error}</sup>"
        },
        legend={"orientation": "h", "y": -0.18, "x": 0, "bgcolor": "#888"},
        margin={"t": 90, "b": 90, "l": 70, "r": 20},
        height=620,
        width=720,
        font={"size": 13},
    )
    for update, title, layers in (
        (figure.update_xaxes, "target layer", targets),
        (figure.update_yaxes, "source layer", sources),
    ):
        update(title_text=title, dtick=2, showgrid=False, zeroline=False, range=[min(layers) - 0.5, max(layers) + 0.5])
    return figure


def data_curve(curve: DataCurve) -> Any:
    """Held-out R² against the number of training tokens, a line per fitter, with the recommendation.

    Args:
        curve: What `xmodel_steer.data_curve` returned.

    Returns:
        A ``plotly.graph_objects.Figure``.
    """
    import plotly.graph_objects as go

    colours = list(COLOURS.values())[1:]
    figure = go.Figure(
        [
            go.Scatter(
                x=curve.tokens,
                y=values,
                name=name,
                mode="lines+markers",
                line={
                    "color": colours[i % len(colours)],
                    "dash": ("solid", "dash", "dot", "dashdot")[i % 4],
                    "width": 2.5,
                },
                marker={"size": 7},
                hovertemplate=f"{name}<br>%{{x:,}} tokens<br>R² %{{y:.3f}}<extra></extra>",
            )
            for i, (name, values) in enumerate(curve.r2.items())
        ]
    )
    figure.add_vline(x=curve.recommended, line={"color": COLOURS["unsteered"], "width": 1, "dash": "dash"})
    figure.update_layout(
        template="plotly_white",
        title={
            "text": f"{curve.source.model} {curve.source.site} → {curve.target.model} {curve.target.site}"
            f"<br><sup>{curve.advice}; {curve.test_tokens:,} test tokens</sup>"
        },
        showlegend=len(curve.r2) > 1,
        margin={"t": 90, "b": 70, "l": 70, "r": 20},
        height=460,
        font={"size": 13},
    )
    figure.update_xaxes(title_text="training tokens", type="log")
    figure.update_yaxes(title_text="R² per dimension, test documents")
    return figure

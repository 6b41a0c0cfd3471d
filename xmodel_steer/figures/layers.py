"""Figures over layers and places."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from xmodel_steer.core.spaces import Space, Stack
from xmodel_steer.evaluation.recovery import KINDS, Kind, PatchingGrid
from xmodel_steer.figures.style import COLOURS, hover, laid_out, plain, titled
from xmodel_steer.maps.curves import DataCurve
from xmodel_steer.maps.layers import LayerGrid


def patching(grid: PatchingGrid) -> Any:
    """Plot the recovered share by layer and position, a map for each kind.

    Args:
        grid: The result of `patching_grid`.

    Returns:
        A ``plotly.graph_objects.Figure`` with heat maps on one scale. A position without a token to read is empty.
    """
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    tables: dict[Kind, np.ndarray] = {kind: grid.recovery(kind) for kind in grid.values}
    bound = float(np.nan_to_num(np.abs(np.stack(list(tables.values())))).max(initial=1.0))
    figure = make_subplots(
        rows=1, cols=len(tables), subplot_titles=tuple(KINDS[kind].replace(" ", "<br>", 1) for kind in tables),
        horizontal_spacing=0.05, shared_yaxes=True,
    )  # fmt: skip
    tokens = [plain(token) for token in grid.tokens]  # plotly reads <s> as a tag
    read = (f"{space.site.layer} → " if space else "" for space in grid.sources)
    rows = [f"{before}{space.site.layer}" for before, space in zip(read, grid.targets, strict=True)]
    for column, table in enumerate(tables.values(), 1):
        figure.add_trace(
            go.Heatmap(
                z=table, x=list(range(len(tokens))), y=rows,
                coloraxis="coloraxis", customdata=np.tile(np.array(tokens, dtype=object), (len(rows), 1)),
                hovertemplate=hover("layer %{y}", "position %{customdata}", "recovery %{z:.2f}"),
            ),
            row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title_text="position", tickvals=list(range(len(tokens))), ticktext=tokens, tickangle=60)
    title = "source layer → target layer" if any(grid.sources) else "layer"
    figure.update_yaxes(title_text=title, row=1, col=1, type="category")
    ends = dict.fromkeys(space.model for space in (*grid.sources, *grid.targets) if space)
    figure.update_layout(
        **laid_out(
            f"Recovered share of the {grid.measure}",
            f"{' → '.join(ends)}; 0: as corrupted, 1: as clean; {len(grid.clean)} pair{'s' * (len(grid.clean) > 1)} of prompts",
        ),
        coloraxis={"colorscale": "PuOr_r", "cmin": -bound, "cmax": bound, "colorbar": {"title": "recovery"}},
    )
    return figure


_METRICS = {
    "r2": "R² per dimension",
    "cosine": "cosine, standardised",
    "fvu": "variance unexplained, standardised",
    "norm_ratio": "norm ratio, standardised",
    "cka": "linear CKA, standardised",
}


def layer_grid(grid: LayerGrid, metric: str = "r2") -> Any:
    """Plot the map's held-out quality for every layer pair, with all metrics on hover.

    Args:
        grid: The result of `xmodel_steer.maps.layer_grid`.
        metric: ``r2``, ``cosine``, ``fvu``, ``norm_ratio`` or ``cka``.

    Returns:
        A ``plotly.graph_objects.Figure``: a heat map, with each target layer's best source layer by validation marked.

    Raises:
        ValueError: The metric is unknown.
    """
    import plotly.graph_objects as go

    if metric not in _METRICS:
        raise ValueError(f"plots.layer_grid: metric must be one of {', '.join(_METRICS)}, got {metric!r}")
    sources, targets = _places(grid.source), _places(grid.target)
    penalties = np.array(grid.penalties)[grid.best]
    details = np.stack([*(grid.chosen(name) for name in _METRICS), penalties, grid.r2_error], -1)
    lines = [f"{name} %{{customdata[{k}]:.3f}}" for k, name in enumerate(_METRICS.values())]
    lines[0] += " ± %{customdata[6]:.3f}" if grid.sketch else ""
    heat = go.Heatmap(
        z=grid.chosen(metric),
        x=targets,
        y=sources,
        customdata=details,
        colorscale="Cividis",  # its order is visible to any colour vision
        colorbar={"title": {"text": _METRICS[metric], "side": "right"}},
        hovertemplate=hover("source layer %{y} → target layer %{x}", *lines, "penalty %{customdata[5]:.2g}"),
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
            "text": titled(
                f"{grid.source[0].model} → {grid.target[0].model}: {_METRICS[metric]}",
                f"{rows:,} test tokens of {documents} documents{error}",
            )
        },
        legend={"orientation": "h", "y": -0.18, "x": 0, "bgcolor": "#888"},
        margin={"t": 90, "b": 90, "l": 70, "r": 20},
        height=620,
        width=720,
        font={"size": 13},
    )
    _label_axes(figure, sources, targets)
    return figure


def _places(spaces: Sequence[Space]) -> list[Any]:
    """Name the places on an axis: layers, or sites of several streams."""
    one_stream = len({space.site.stream for space in spaces}) == 1 and not any(
        isinstance(s.site, Stack) for s in spaces
    )
    return [space.site.layer if one_stream else plain(space.site) for space in spaces]


def _label_axes(figure: Any, sources: list[Any], targets: list[Any]) -> None:
    """Title a grid's axes; only layers have numeric ones."""
    for update, title, layers in (
        (figure.update_xaxes, "target layer", targets),
        (figure.update_yaxes, "source layer", sources),
    ):
        update(title_text=title, showgrid=False, zeroline=False)
        if all(isinstance(layer, int) for layer in layers):
            update(dtick=2, range=[min(layers) - 0.5, max(layers) + 0.5])
        else:
            update(type="category", title_text=title.replace("layer", "site"))


def data_curve(curve: DataCurve) -> Any:
    """Plot held-out R² over training tokens, a line per fitter, and the recommended number.

    Args:
        curve: The result of `xmodel_steer.maps.data_curve`.

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
                name=plain(name),
                mode="lines+markers",
                line={
                    "color": colours[i % len(colours)],
                    "dash": ("solid", "dash", "dot", "dashdot")[i % 4],
                    "width": 2.5,
                },
                marker={"size": 7},
                hovertemplate=hover(plain(name), "%{x:,} tokens", "R² %{y:.3f}"),
            )
            for i, (name, values) in enumerate(curve.r2.items())
        ]
    )
    figure.add_vline(x=curve.recommended, line={"color": COLOURS["unsteered"], "width": 1, "dash": "dash"})
    figure.update_layout(
        template="plotly_white",
        title={
            "text": titled(
                f"{curve.source.model} {curve.source.site} → {curve.target.model} {curve.target.site}",
                f"{curve.advice}; {curve.test_tokens:,} test tokens",
            )
        },
        showlegend=len(curve.r2) > 1,
        margin={"t": 90, "b": 70, "l": 70, "r": 20},
        height=460,
        font={"size": 13},
    )
    figure.update_xaxes(title_text="training tokens", type="log")
    figure.update_yaxes(title_text="R² per dimension, test documents")
    return figure

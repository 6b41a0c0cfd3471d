"""Figures of results, as Plotly values: nothing is shown or written here."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodel_steer.core.spaces import Site, Space, require_same_space
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.patching import PatchingGrid
from xmodel_steer.maps.layers import DataCurve, LayerGrid
from xmodel_steer.maps.statistics import number
from xmodel_steer.recipe.results import ARMS, Arm, TransferResult

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
            band = _interval(points) if column == 1 else None
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
        **_layout(
            f"{result.label}: {result.source['model']} → {result.target['model']}"
            f"<br><sup>score: {result.unit}; n = {base.effect.n}, bars are 95 % bootstrap intervals</sup>"
        )
    )
    return figure


def _with_base(line: list[Arm], base: Arm) -> list[Arm]:
    """The unsteered point between the negative and the positive strengths."""
    return [a for a in line if a.strength < 0] + [base] + [a for a in line if a.strength > 0]


def frontier(result: TransferResult) -> Any:
    """Effect against the damage that it costs: a path per arm, from strong negative to strong positive steering.

    An arm whose path lies further out does more for the same KL. Large markers are the arms at equal KL.

    Args:
        result: What `transfer` returned.

    Returns:
        A ``plotly.graph_objects.Figure``.
    """
    import plotly.graph_objects as go

    base = result.arm("unsteered", 0)
    figure = go.Figure()
    for name in ARMS[1:]:
        fixed = sorted((a for a in result.arms if a.arm == name and a.budget is None), key=lambda a: a.strength)
        path = _with_base(fixed, base)
        fair = [a for a in result.arms if a.arm == name and a.budget is not None]
        look = {"color": COLOURS[name], "dash": _DASHES[name], "width": 2.5}
        hover = f"{name}<br>strength %{{customdata:.2f}}<br>KL %{{x:.3f}}<br>effect %{{y:.3f}}<extra></extra>"
        figure.add_trace(
            go.Scatter(
                x=[a.kl for a in path], y=[a.effect.value for a in path], customdata=[a.strength for a in path],
                mode="lines+markers", name=name, legendgroup=name, line=look, marker={"size": 6}, hovertemplate=hover,
            )
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[a.kl for a in fair], y=[a.effect.value for a in fair], customdata=[a.strength for a in fair],
                error_y=_interval(fair), mode="markers", name=f"{name}, equal KL", legendgroup=name, showlegend=False,
                marker={"size": 13, "symbol": "diamond", "color": COLOURS[name], "line": {"width": 1.5, "color": "white"}},
                hovertemplate=hover,
            )
        )  # fmt: skip
    figure.add_hline(y=base.effect.value, line={"color": COLOURS["unsteered"], "width": 1, "dash": "dash"})
    figure.update_layout(
        **_layout(
            f"{result.label}: effect against damage"
            f"<br><sup>score: {result.unit}; n = {base.effect.n}; diamonds: strengths calibrated to the native vector's KL, "
            "with 95 % bootstrap intervals</sup>"
        )
    )
    figure.update_xaxes(title_text="KL from the unsteered model, neutral text (nats per token)", rangemode="tozero")
    figure.update_yaxes(title_text="mean score", zeroline=False)
    return figure


def effect_by_layer(result: TransferResult) -> Any:
    """What validation measured to choose the layers: half the difference that the two signs make, by layer.

    Each model has a panel of its own. Above each bar stands the perplexity of neutral text over the unsteered one; the layer that
    was taken is bold.

    Args:
        result: What `transfer` returned.

    Returns:
        A ``plotly.graph_objects.Figure``.

    Raises:
        ValueError: No layers were compared, because one of each model was given.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    groups = [("target", "native", "native vector"), ("source", "mapped", "mapped vector")]
    found = [(end, arm, title) for end, arm, title in groups if end in result.selection]
    if not found:
        raise ValueError("plots.effect_by_layer: the transfer was given one layer of each model, nothing was compared")
    figure = make_subplots(rows=1, cols=len(found), shared_yaxes=True, horizontal_spacing=0.06)
    for column, (end, arm, title) in enumerate(found, 1):
        records = result.selection[end]
        model = getattr(result, end)
        taken = str(Site(model["layer"], model["stream"]))
        sites = [record["candidate"] for record in records]
        damage = [f"× {number(record['perplexity_ratio'], '.2f')}" for record in records]
        figure.add_trace(
            go.Bar(
                x=sites,
                y=[record["gain"] for record in records],
                name=title,
                marker={"color": COLOURS[arm], "pattern": {"shape": "" if arm == "native" else "/"}},
                text=[f"<b>{d}</b>" if site == taken else d for site, d in zip(sites, damage, strict=True)],
                textposition="outside",
                cliponaxis=False,
                customdata=damage,
                hovertemplate="%{x}<br>gain %{y:.3f}<br>perplexity %{customdata}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(
            title_text=f"{end} site",
            type="category",
            tickvals=sites,
            ticktext=[f"<b>{site}</b>" if site == taken else site for site in sites],
            row=1,
            col=column,
        )
    figure.update_layout(
        **_layout(
            f"{result.label}: effect by layer, at strength 1<br><sup>validation prompts: they chose the layers (bold) and are not "
            "reported on; above the bars: perplexity over the unsteered one</sup>"
        )
    )
    figure.update_yaxes(title_text="gain: half of score at +1 minus score at -1", row=1, col=1)
    return figure


def vector_geometry(vectors: Mapping[str, Sequence[SteeringVector]], reference: Sequence[SteeringVector]) -> Any:
    """Norm of vectors by layer, and their cosine to a reference at the same layer, both in standardised coordinates.

    Args:
        vectors: Named groups, each with one vector per layer; every one needs a scale.
        reference: The vectors to compare with, such as the native ones, one per layer.

    Returns:
        A ``plotly.graph_objects.Figure`` with two panels.
    """
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, subplot_titles=("norm", "cosine to the reference"), horizontal_spacing=0.1)
    at = {vector.space.site: vector for vector in reference}
    groups: list[tuple[str, Sequence[SteeringVector]]] = [("reference", reference), *vectors.items()]
    for i, (name, group) in enumerate(groups):
        ordered = sorted(group, key=lambda v: v.space.site.layer)
        line = {"color": COLOURS.get(name, list(COLOURS.values())[i % len(COLOURS)]), "width": 2.5}
        for column, y in (
            (1, [v.norm(standardised=True) for v in ordered]),
            (2, [at[v.space.site].cosine(v) if v.space.site in at else None for v in ordered]),
        ):
            figure.add_trace(
                go.Scatter(
                    x=[v.space.site.layer for v in ordered], y=y, name=name, legendgroup=name, showlegend=column == 1,
                    mode="lines+markers", line=line, marker={"symbol": i},
                    hovertemplate=f"{name}<br>layer %{{x}}<br>%{{y:.3f}}<extra></extra>",
                ),
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="norm, standardised", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="cosine, standardised", range=[-1.05, 1.05], row=1, col=2)
    figure.update_layout(**_layout("Vectors by layer"))
    return figure


def patching(grid: PatchingGrid) -> Any:
    """Recovery of the logit difference by layer and position: mapped source activations beside the target's own.

    Args:
        grid: What `patching_grid` returned.

    Returns:
        A ``plotly.graph_objects.Figure`` with two heat maps on one scale; empty cells pair with no source token.
    """
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    kinds = {"mapped": "mapped source activations", "own": "the target's own (ceiling)"}
    tables = {kind: grid.recovery(kind) for kind in kinds}
    bound = float(np.nan_to_num(np.abs(np.stack(list(tables.values())))).max(initial=1.0))
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=tuple(kinds.values()), horizontal_spacing=0.08, shared_yaxes=True
    )
    tokens = [html.escape(token, quote=False) for token in grid.tokens]  # plotly reads <s> as a tag
    rows = [f"{s.site.layer} → {t.site.layer}" for s, t in zip(grid.sources, grid.targets, strict=True)]
    for column, table in enumerate(tables.values(), 1):
        figure.add_trace(
            go.Heatmap(
                z=table, x=list(range(len(grid.tokens))), y=rows,
                coloraxis="coloraxis", customdata=np.tile(np.array(tokens, dtype=object), (len(rows), 1)),
                hovertemplate="layers %{y}<br>position %{customdata}<br>recovery %{z:.2f}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title_text="position", tickvals=list(range(len(grid.tokens))), ticktext=tokens, tickangle=60)
    figure.update_yaxes(title_text="source layer → target layer", row=1, col=1, type="category")
    figure.update_layout(
        **_layout(
            f"{grid.sources[0].model} → {grid.targets[0].model}: recovered share of the logit difference"
            f"<br><sup>0: as corrupted, 1: as clean; mean of {len(grid.clean)} pairs of prompts</sup>"
        ),
        coloraxis={"colorscale": "PuOr_r", "cmin": -bound, "cmax": bound, "colorbar": {"title": "recovery"}},
    )
    return figure


def mapped_scatter(
    mapped: Activations, native: Activations, vector: SteeringVector | None = None, *, most: int = 2000
) -> Any:
    """Mapped against native activations of the same tokens, in the principal plane of the native ones.

    Standardised by the native rows' own mean and standard deviations, so that a few huge dimensions do not make the plane.

    Args:
        mapped: Images of source activations, row by row those of ``native``.
        native: The target's own activations.
        vector: A direction to draw.
        most: Rows that are drawn.

    Returns:
        A ``plotly.graph_objects.Figure``.

    Raises:
        SpaceMismatchError: The two live in different spaces.
        ValueError: They have different numbers of rows.
    """
    import plotly.graph_objects as go

    require_same_space(native.space, mapped.space, "plots.mapped_scatter")
    if len(mapped) != len(native):
        raise ValueError(f"plots.mapped_scatter: needs the same rows of both, got {len(mapped)} and {len(native)}")
    own, image = (a.values.double().cpu().numpy() for a in (native, mapped))
    mean, scale = own.mean(0), own.std(0)
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    own, image = (own - mean) * inverse, (image - mean) * inverse
    _, sizes, axes = np.linalg.svd(own, full_matrices=False)
    shares = sizes[:2] ** 2 / max((sizes**2).sum(), np.finfo(float).tiny)
    figure = go.Figure()
    for name, rows in (("native", own), ("mapped", image)):
        plane = rows[:most] @ axes[:2].T
        figure.add_trace(
            go.Scatter(
                x=plane[:, 0], y=plane[:, 1], mode="markers", name=name,
                marker={"color": COLOURS[name], "size": 5, "opacity": 0.6, "symbol": "circle" if name == "native" else "x"},
                hovertemplate=f"{name}<br>%{{x:.2f}}, %{{y:.2f}}<extra></extra>",
            )
        )  # fmt: skip
    if vector is not None:
        require_same_space(native.space, vector.space, "plots.mapped_scatter")
        x, y = (vector.direction.double().cpu().numpy() * inverse) @ axes[:2].T
        figure.add_annotation(
            x=x, y=y, ax=0, ay=0, xref="x", yref="y", axref="x", ayref="y", showarrow=True, arrowhead=2, arrowwidth=2.5,
            text=vector.label, font={"color": "black"},
        )  # fmt: skip
    figure.update_layout(
        **_layout(
            f"{native.space}: mapped against native activations<br><sup>{len(native)} tokens, standardised; the plane holds {shares.sum():.0%} of the native variance</sup>"
        )
    )
    for update, share, component in ((figure.update_xaxes, shares[0], 1), (figure.update_yaxes, shares[1], 2)):
        update(title_text=f"principal component {component} ({share:.0%}), standard deviations")
    return figure


def _interval(arms: Sequence[Arm]) -> dict[str, Any]:
    """Error bars of the effects."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [arm.effect.high - arm.effect.value for arm in arms],
        "arrayminus": [arm.effect.value - arm.effect.low for arm in arms],
        "thickness": 1.5,
        "width": 4,
    }


def _layout(title: str) -> dict[str, Any]:
    """What all figures share: readable in a notebook, in a report and on a projector."""
    return {
        "template": "plotly_white",
        "title": {"text": title, "y": 0.95},
        "legend": {"orientation": "h", "y": -0.22, "x": 0},
        "margin": {"t": 110, "b": 90, "l": 70, "r": 20},
        "height": 480,
        "font": {"size": 13},
    }


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
        update(title_text=title, showgrid=False, zeroline=False)
        if all(isinstance(layer, int) for layer in layers):
            update(dtick=2, range=[min(layers) - 0.5, max(layers) + 0.5])
        else:
            update(type="category", title_text=title.replace("layer", "site"))
    return figure


def _places(spaces: Sequence[Space]) -> list[Any]:
    """The layers of sites, or their whole names where they are of several streams."""
    one = len({space.site.stream for space in spaces}) == 1
    return [space.site.layer if one else str(space.site) for space in spaces]


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

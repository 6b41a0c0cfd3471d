"""Vectors and activations as points."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.figures.style import COLOURS, hover, laid_out, plain


def vector_geometry(vectors: Mapping[str, Sequence[SteeringVector]], reference: Sequence[SteeringVector]) -> Any:
    """Plot vectors' norm by layer, and their cosine to a reference there.

    Both are in standardised coordinates.

    Args:
        vectors: Named groups, each with one vector per layer; every vector needs a scale.
        reference: The vectors to compare with, such as the native ones, one per layer.

    Returns:
        A ``plotly.graph_objects.Figure`` with two panels.
    """
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, subplot_titles=("norm", "cosine to the reference"), horizontal_spacing=0.1)
    references = {vector.space.site: vector for vector in reference}
    groups: list[tuple[str, Sequence[SteeringVector]]] = [("reference", reference), *vectors.items()]
    for i, (name, group) in enumerate(groups):
        ordered = sorted(group, key=lambda v: v.space.site.layer)
        line = {"color": COLOURS.get(name, list(COLOURS.values())[i % len(COLOURS)]), "width": 2.5}
        for column, y in (
            (1, [v.norm(standardised=True) for v in ordered]),
            (2, [references[v.space.site].cosine(v) if v.space.site in references else None for v in ordered]),
        ):
            figure.add_trace(
                go.Scatter(
                    x=[v.space.site.layer for v in ordered], y=y, name=plain(name), legendgroup=plain(name), showlegend=column == 1,
                    mode="lines+markers", line=line, marker={"symbol": i},
                    hovertemplate=hover(plain(name), "layer %{x}", "%{y:.3f}"),
                ),
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="norm, standardised", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="cosine, standardised", range=[-1.05, 1.05], row=1, col=2)
    figure.update_layout(**laid_out("Vectors by layer"))
    return figure


def mapped_scatter(
    mapped: Activations, native: Activations, vector: SteeringVector | None = None, *, most: int = 2000
) -> Any:
    """Plot mapped and native activations in the native activations' principal plane.

    Both are standardised by the native mean and standard deviations, so that a few huge dimensions do not fix the plane.

    Args:
        mapped: Mapped source activations, with the same rows as ``native``.
        native: The target's own activations.
        vector: A direction to draw.
        most: Most rows to draw.

    Returns:
        A ``plotly.graph_objects.Figure``.

    Raises:
        SpaceMismatchError: The activations live in different spaces.
        ValueError: The activations have different numbers of rows.
    """
    import plotly.graph_objects as go

    require_same_space(native.space, mapped.space, "plots.mapped_scatter")
    if len(mapped) != len(native):
        raise ValueError(f"plots.mapped_scatter: needs the same rows of both, got {len(mapped)} and {len(native)}")
    values = {name: a.values.double().cpu().numpy() for name, a in (("native", native), ("mapped", mapped))}
    mean, scale = values["native"].mean(0), values["native"].std(0)
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    standardised = {name: (rows - mean) * inverse for name, rows in values.items()}
    _, sizes, axes = np.linalg.svd(standardised["native"], full_matrices=False)
    shares = sizes[:2] ** 2 / max((sizes**2).sum(), np.finfo(float).tiny)
    figure = go.Figure()
    for name, rows in standardised.items():
        plane = rows[:most] @ axes[:2].T
        figure.add_trace(
            go.Scatter(
                x=plane[:, 0], y=plane[:, 1], mode="markers", name=name,
                marker={"color": COLOURS[name], "size": 5, "opacity": 0.6, "symbol": "circle" if name == "native" else "x"},
                hovertemplate=hover(name, "%{x:.2f}, %{y:.2f}"),
            )
        )  # fmt: skip
    if vector is not None:
        require_same_space(native.space, vector.space, "plots.mapped_scatter")
        x, y = (vector.direction.double().cpu().numpy() * inverse) @ axes[:2].T
        figure.add_annotation(
            x=x, y=y, ax=0, ay=0, xref="x", yref="y", axref="x", ayref="y", showarrow=True, arrowhead=2, arrowwidth=2.5,
            text=plain(vector.label), font={"color": "black"},
        )  # fmt: skip
    figure.update_layout(
        **laid_out(
            f"{native.space}: mapped against native activations",
            f"{len(native)} tokens, standardised; the plane holds {shares.sum():.0%} of the native variance",
        )
    )
    for update, share, component in ((figure.update_xaxes, shares[0], 1), (figure.update_yaxes, shares[1], 2)):
        update(title_text=f"principal component {component} ({share:.0%}), standard deviations")
    return figure

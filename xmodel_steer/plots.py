"""Figures of results, as Plotly values: nothing is shown or written here."""

from typing import Any

from xmodel_steer.transfer import ARMS, Arm, TransferResult

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
        line = sorted((arm for arm in result.arms if arm.arm == name), key=lambda arm: arm.strength)
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

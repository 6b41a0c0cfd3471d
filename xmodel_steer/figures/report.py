"""A result for people: tables for the terminal, and one HTML file that needs no network."""

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from xmodel_steer.core.texts import on_page, visible
from xmodel_steer.figures.choices import curve, effect_by_layer, layers_varied
from xmodel_steer.figures.doses import frontier
from xmodel_steer.figures.overviews import overview
from xmodel_steer.figures.style import colours_of
from xmodel_steer.figures.texts import texts_html
from xmodel_steer.files.records import write_atomically
from xmodel_steer.maps.statistics import number
from xmodel_steer.recipe.arms import EQUAL_KL, OWN_KL, STRICTER, Arm
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.words import names_of, sentences, validated


def tables(result: Result) -> list[Any]:
    """Return a ``rich`` table of all arms for each recipe."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = []
    for recipe in result.recipes:
        arms = [arm for arm in result.arms if arm.recipe in (recipe, "")]
        between = "" if "models" in result.spec else f": {result.between}"
        called = recipe if len(result.recipes) > 1 else result.name
        # Texts, not strings: a name such as [/b] is no markup, on whichever console.
        title = Text(visible(f"{called}{between}, n = {arms[-1].effect.n}"))
        table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        cells = [cells_of(arm, short=True) for arm in arms]
        names = [name for name in dict.fromkeys(n for row in cells for n in row) if any(row.get(name) for row in cells)]
        for name in names:
            table.add_column(
                Text(visible(name)),
                justify="left" if name == "arm" else "right",
                no_wrap=name in ("arm", "strength", "effect", "change"),
                min_width=max(map(len, visible(name).split()), default=0),
            )
        for arm, row in zip(arms, cells, strict=True):
            style = "bold" if arm.arm == "mapped" else "dim" if arm.arm in ("random", "shuffled") else ""
            table.add_row(*(Text(visible(row.get(name, ""))) for name in names), style=style)
        shown.append(table)
    return shown


def cells_of(arm: Arm, *, short: bool = False) -> dict[str, str]:
    """Return one arm as text, by column.

    Args:
        arm: The arm.
        short: For a terminal: measures without their intervals, and without those that repeat a looser one.
    """
    spec = ".2f" if short else ".3f"
    measures = {
        name: number(measure.value, spec) if short else f"{measure:{spec}}"
        for name, measure in arm.measures.items()
        if not (short and name.endswith(STRICTER))
    }
    return {
        "arm": arm.title,
        "strength": _strength(arm),
        "effect": f"{arm.effect:{spec}}",
        "change": number(arm.change.value, "+" + spec),
        **measures,
        "KL": number(arm.kl, ".3f"),
        "ppl": number(arm.perplexity, ".1f"),
        "same": number(arm.agreement, ".0%") if not math.isnan(arm.agreement) else "",
    }


def _strength(arm: Arm) -> str:
    if math.isnan(arm.strength):
        return "=KL" if arm.at == EQUAL_KL else ""
    if not arm.strength:
        return "0"
    if arm.at == OWN_KL:
        return f"{arm.sign} in words"
    return f"{arm.strength:+.2f} =KL" if arm.at == EQUAL_KL else f"{arm.strength:+g}"


def summary(result: Result) -> list[str]:
    """List the models, the map and the choices of each recipe.

    One fact a line.
    """
    ends = [
        f"{end['model']} {end['hook']} (width {end['width']}, {end['dtype']})" if "hook" in end else end["model"]
        for end in (result.source, result.target)
    ]
    lines = [" → ".join(ends)]
    for recipe, choice in result.chosen.items():
        facts = _choice(choice)
        lines += [f"{recipe}: {'; '.join(facts)}"] if len(result.chosen) > 1 and facts else facts
    if any(arm.at == EQUAL_KL for arm in result.arms):
        lines.append(
            "rows marked =KL are at the strengths that disturb neutral text as much as the native vector does at the chosen strength"
        )
    lines.append(
        "every number in the tables is from evaluation prompts; ppl: perplexity of neutral text; "
        "same: share of its tokens where the likeliest next one is the unsteered model's"
    )
    reasons: dict[str, list[str]] = {}
    for arm in result.arms:
        if arm.undefined:
            reasons.setdefault(arm.undefined, []).append(f"{arm.arm} {_strength(arm)}".strip())
    return lines + [f"undefined ({reason}): {', '.join(arms)}" for reason, arms in reasons.items()]


def _choice(choice: Mapping[str, Any]) -> list[str]:
    """List a recipe's choices, its map's fit and its vector's similarity."""
    lines = []
    if "source_layer" in choice:
        operator = f", {choice['operator']}" if "operator" in choice else ""
        ends = [choice.get(f"{end}_site", f"layer {choice[f'{end}_layer']}") for end in ("source", "target")]
        lines.append(f"{' → '.join(ends).replace('→ layer ', '→ ')}{operator}, chosen on validation prompts")
    fitted = choice.get("map", {})
    if "r2" in fitted:
        loss = fitted.get("loss")
        losses = f", loss {number(loss['test'], '.2f')} (train {number(loss['train'], '.2f')})" if loss else ""
        penalty = f", penalty {fitted['penalty']:.2g}" if "penalty" in fitted else ""
        lines.append(
            f"map: {fitted.get('fitter', 'unnamed')}{penalty}, {fitted['train_tokens']:,} training tokens, coverage {fitted['coverage']:.0%}; "
            f"on {fitted['test_documents']} test documents: R² per dimension {number(fitted['r2'], '.2f')} "
            f"(5–95 %: {number(fitted['r2_low'], '.2f')}–{number(fitted['r2_high'], '.2f')}), "
            f"cosine {number(fitted['cosine'], '.2f')}, norm ratio {number(fitted['norm_ratio'], '.2f')}{losses}"
        )
    elif choice.get("map_r2") is not None:
        lines.append(f"map: R² per dimension {number(choice['map_r2'], '.2f')} on test documents")
    if "cosine" in choice:
        shuffled = choice.get("similarity", {}).get("shuffled", {})
        control = f"; shuffled map: cosine {number(shuffled['cosine'], '.2f')}" if shuffled else ""
        lines.append(
            f"mapped vector: cosine to native {number(choice['cosine'], '.2f')} (standardised), norm "
            f"{number(choice['norm_ratio'], '.2f')} of native before rescaling{control}"
        )
    return lines


def write_report(result: Result, path: str | Path) -> Path:
    """Write ``report.html``: conclusions, figures, table, texts side by side, and how it was made.

    Args:
        result: What `transfer`, a demo or a study returned, or what `read` did.
        path: The file; it needs no network to open.

    Raises:
        ArtifactError: It cannot be written.
    """
    path = Path(path)
    figures = [overview(result)]
    figures += [frontier(result)] if result.signs else []
    figures += [effect_by_layer(result)] if layers_varied(result) else []
    figures += [curve(result, name) for name in result.curves]
    names = ("chosen", "spec", "seeds", "versions", "hardware", "seconds", "command")
    page = _PAGE.format(
        title=on_page(f"{result.name}: {result.between}"),
        question=f"<p>{on_page(result.question)}</p>" if result.question else "",
        verdict="".join(f"<p class='plain'>{on_page(line)}</p>" for line in sentences(result))
        + "".join(f"<p>{on_page(line)}</p>" for line in (*result.conclusions, *result.doubts)),
        names="".join(f"<dt>{on_page(name)}</dt><dd>{on_page(said)}</dd>" for name, said in names_of(result).items()),
        validation=_validation(result),
        facts="".join(f"<li>{on_page(line)}</li>" for line in summary(result)),
        figures=figures_html(figures),
        table=_table(result),
        texts=texts_html(result),
        unit=on_page(result.unit),
        note=on_page(result.note),
        record=on_page(json.dumps({n: getattr(result, n) for n in names}, indent=1, ensure_ascii=False, default=repr)),
    )
    write_atomically(path, page.encode(errors="replace"))
    return path


def figures_html(figures: Sequence[Any]) -> str:
    """Draw figures on a page that needs no network.

    It brings plotly's basic script, packed, a tenth of the whole one.

    Args:
        figures: Plotly figures of scatters, bars or pies; the basic script draws no others.
    """
    packed = b64encode((resources.files("xmodel_steer") / "data" / "plotly-basic.min.js.gz").read_bytes()).decode()
    drawn = ",".join(figure.to_json() for figure in figures).replace("<", "\\u003c")  # no end of the script in a text
    places = "".join(f'<div id="figure-{i}"></div>' for i in range(len(figures)))
    return f"{places}<script>{_DRAW.replace('PACKED', packed).replace('FIGURES', drawn)}</script>"


_DRAW = """
(async () => {
  try {
    const packed = Uint8Array.from(atob("PACKED"), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.text = await new Response(stream).text();
    document.head.append(script);
    for (const [i, figure] of [FIGURES].entries())
      await Plotly.newPlot(`figure-${i}`, figure.data, figure.layout, { displaylogo: false, responsive: true });
  } catch (error) {
    document.getElementById("figure-0").textContent = `The figures could not be drawn here (${error}); all numbers are in the tables.`;
  }
})();
"""


def _table(result: Result) -> str:
    """Every arm in one table; a column that is empty is left out."""
    colours = colours_of(result)
    rows = []
    for arm in result.arms:
        cells = {"recipe": arm.recipe, **cells_of(arm)}
        # Where a strength says it all, the operator repeats it.
        cells["operator"] = arm.operator if math.isnan(arm.strength) else ""
        rows.append(cells | {"n": str(arm.effect.n)})
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if any(row.get(name) for row in rows)]
    if len(result.recipes) == 1:
        names.remove("recipe") if "recipe" in names else None
    marks = [f'<span style="color:{colours[arm.arm]}">■</span> ' for arm in result.arms]
    return _rows_html(
        names,
        [
            [f"{mark if n == 'arm' else ''}{on_page(row.get(n, ''))}" for n in names]
            for mark, row in zip(marks, rows, strict=True)
        ],
    )


def _rows_html(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{on_page(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table class='numbers'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _validation(result: Result) -> str:
    """Fold up what validation compared."""
    rows = validated(result)
    if not rows:
        return ""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if any(row.get(name) for row in rows)]
    left_out = sum("left out" in row for row in rows)
    told = f"What validation compared, on prompts of its own: {len(rows)} settings" + f", {left_out} left out" * bool(
        left_out
    )
    table = _rows_html(names, [[on_page(row.get(name, "")) for name in names] for row in rows])
    return f"<details><summary>{told}</summary>{table}</details>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
.verdict {{ font-size: 1.05rem; border-left: 5px solid #D55E00; padding: .2rem 1rem; background: #faf6f2; }}
.plain {{ font-size: 1.1rem; font-weight: 500; }}
.wide {{ overflow-x: auto; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }}
dt {{ font-weight: 600; }} dd {{ margin: 0; }}
table {{ border-collapse: collapse; margin: .6rem 0 1.2rem; }}
td, th {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; text-align: left; }}
.numbers {{ font-size: .85rem; font-variant-numeric: tabular-nums; }}
h3 {{ white-space: pre-wrap; font-size: .95rem; }}
mark {{ background: #fbe3c5; color: inherit; padding: 0 .1em; border-radius: .2em; }}
.texts td:first-child {{ white-space: nowrap; font-weight: 600; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow: auto; max-height: 30rem; }}
</style></head><body>
<h1>{title}</h1>
{question}
<div class="verdict">{verdict}</div>
{figures}
<h2>Every arm</h2>
<p>Effect: {unit}; on prompts that chose nothing. Intervals: 95 %, Wilson's for shares of prompts, bootstrap over prompts (and vectors, where an arm has several) for the others.
KL in nats per token; KL and perplexity on neutral text that fitted nothing. Strength 1 is the norm of the target's own vector, in
standardised coordinates, for every arm. {note}</p>
{table}
<dl>{names}</dl>
{texts}
<h2>How it was made</h2>
<ul>{facts}</ul>
{validation}
<pre>{record}</pre>
</body></html>
"""

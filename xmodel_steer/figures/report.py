"""A result for people: a table for the terminal, and one HTML file that needs no network."""

import html
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from difflib import SequenceMatcher
from importlib import resources
from pathlib import Path
from typing import Any

from xmodel_steer.figures.doses import dose_response, frontier
from xmodel_steer.figures.layers import effect_by_layer
from xmodel_steer.figures.style import COLOURS
from xmodel_steer.files.records import write_atomically
from xmodel_steer.maps.statistics import number
from xmodel_steer.recipe.arms import ARMS, Arm
from xmodel_steer.recipe.results import TransferResult


def table(result: TransferResult) -> Any:
    """Every arm at every strength, as a ``rich`` table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    # A label such as [/b] is no markup.
    title = Text(f"{result.label}: {result.source['model']} → {result.target['model']}")
    made = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, justify in _COLUMNS:
        made.add_column(name, justify=justify, no_wrap=True)
    for row in _rows(result):
        style = "bold" if row[0] == "mapped" else "dim" if row[0] in ("random", "shuffled") else ""
        made.add_row(*map(escape, row), style=style)
    return made


def summary(result: TransferResult) -> list[str]:
    """List what the table leaves out: the map, the choices, the verdict.

    One fact a line.
    """
    source, target, fitted = result.source, result.target, result.map
    lines = [
        f"{result.source['model']} {source['hook']} (width {source['width']}, {source['dtype']}) → "
        f"{target['model']} {target['hook']} (width {target['width']}, {target['dtype']})"
    ]
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
    mapped = result.similarity["mapped"]
    lines.append(
        f"mapped vector: cosine to native {number(mapped['cosine'], '.2f')} (standardised), norm {number(mapped['norm_ratio'], '.2f')} of native "
        f"before rescaling; shuffled map: cosine {number(result.similarity['shuffled']['cosine'], '.2f')}"
    )
    lines.append(
        f"headline strength {result.headline:g}, chosen with the layers on validation prompts; every number below is from evaluation prompts; "
        "rows marked =KL are at the strengths that disturb neutral text as much as the native vector does at the headline strength; "
        "ppl: perplexity of neutral text; same: tokens of it where the likeliest next one is the unsteered model's"
    )
    for name, base in result.arm("unsteered", 0).side.items():
        own = [(arm, sign, result.at_equal_kl(arm, sign).side[name]) for arm in ARMS[1:] for sign in result.signs]
        lines.append(
            f"{name} (unsteered {base:.2f}, n = {base.n}) at equal KL: "
            + ", ".join(f"{arm} {sign} {number(found.value, '.2f')}" for arm, sign, found in own)
        )
    reasons: dict[str, list[str]] = {}
    for arm in result.arms:
        if why := arm.effect.undefined or arm.change.undefined:
            reasons.setdefault(why, []).append(f"{arm.arm} {arm.strength:+.2f}")
    return lines + [f"undefined ({why}): {', '.join(arms)}" for why, arms in reasons.items()]


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("arm", "left"),
    ("strength", "right"),
    ("effect", "right"),
    ("95 % interval", "right"),
    ("change", "right"),
    ("n", "right"),
    ("KL", "right"),
    ("ppl", "right"),
    ("same", "right"),
)


def _rows(result: TransferResult) -> list[tuple[str, ...]]:
    return [
        (
            arm.arm if not arm.seeds else f"{arm.arm} × {len(arm.seeds)}",
            (f"{arm.strength:+g}" if arm.budget is None else f"{arm.strength:+.2f} =KL") if arm.strength else "0",
            number(arm.effect.value, "+.2f"),
            f"[{arm.effect.low:+.2f}, {arm.effect.high:+.2f}]" if not arm.effect.undefined else "undefined",
            number(arm.change.value, "+.2f"),
            str(arm.effect.n),
            number(arm.kl, ".3f"),
            number(arm.perplexity, ".1f"),
            number(arm.agreement, ".0%"),
        )
        for arm in result.arms
    ]


def write_report(result: TransferResult, path: str | Path) -> Path:
    """Write ``report.html``: verdict, figure, table, texts side by side, and how it was made.

    Args:
        result: What `transfer` returned.
        path: The file; it needs no network to open.

    Raises:
        ArtifactError: It cannot be written.
    """
    path = Path(path)
    verdict = result.verdict()
    drawn = [dose_response(result), frontier(result)]
    if "source" in result.selection or "target" in result.selection:
        drawn.append(effect_by_layer(result))
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in summary(result))
    page = _PAGE.format(
        title=html.escape(f"{result.label}: {result.source['model']} → {result.target['model']}"),
        verdict=html.escape(verdict.text),
        facts=facts,
        figures=figures_html(drawn),
        table=_html_table(result),
        texts=_html_texts(result),
        unit=html.escape(result.unit),
        record=html.escape(
            json.dumps(
                {
                    "selection": result.selection,
                    "similarity": result.similarity,
                    "spec": result.spec,
                    "seeds": result.seeds,
                    "versions": result.versions,
                },
                indent=1,
                ensure_ascii=False,
            )
        ),
    )
    write_atomically(path, page.encode(errors="replace"))
    return path


def figures_html(figures: Sequence[Any]) -> str:
    """Figures for one page, which needs no network: it brings plotly's basic script, packed, a tenth of the whole one.

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
    document.getElementById("figure-0").textContent = `The figures could not be drawn here (${error}); all numbers stand in the tables.`;
  }
})();
"""


def _html_table(result: TransferResult) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in _COLUMNS)
    body = ""
    for arm, row in zip(result.arms, _rows(result), strict=True):
        first = f'<td><span style="color:{COLOURS[arm.arm]}">■</span> {html.escape(row[0])}</td>'
        body += "<tr>" + first + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>"
    return f"<table class='numbers'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_texts(result: TransferResult, most: int = 8) -> str:
    """Show the first evaluation prompts' texts, one row per arm, for each sign."""
    prompts = result.splits.get("evaluation_texts", [])
    base = result.arm("unsteered", 0)
    shown: list[tuple[str, Arm]] = [("unsteered", base)]
    shown += [
        (f"{name} {arm.strength:+.2f}" + (f", mean of {len(arm.seeds)}" if len(arm.seeds) > 1 else ""), arm)
        for name in ("mapped", "native", "random", "shuffled")
        for arm in (result.at_equal_kl(name, sign) for sign in result.signs)
    ]
    if not base.texts:
        return "<p>This behaviour is measured without generating text.</p>"
    made = ""
    for i in range(min(most, len(base.texts))):
        prompt = html.escape(prompts[i]) if i < len(prompts) else html.escape(result.splits["evaluation"][i])
        rows = "".join(
            f'<tr><td style="color:{COLOURS[arm.arm]}">{html.escape(title)}</td><td>{_score(arm, i)}</td>'
            f"<td>{marked(arm.texts[i], base.texts[i])}</td></tr>"
            for title, arm in shown
        )
        made += f"<h3>{prompt} …</h3><table class='texts'>{rows}</table>"
    return made


def marked(text: str, base: str) -> str:
    """Mark the words of a text that another text lacks at their place.

    Example:
        >>> marked("a good day", "a bad day")
        'a <mark>good</mark> day'
    """
    words, others = (re.findall(r"\s+|\S+", t) for t in (text, base))
    made = ""
    for kind, _, _, start, end in SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        piece = html.escape("".join(words[start:end]))
        made += piece if kind == "equal" or not piece.strip() else f"<mark>{piece}</mark>"
    return made


def _score(arm: Arm, i: int) -> str:
    """Format the score of a text.

    Of several seeds only the first one's text is shown, with the mean of all.
    """
    return number(arm.scores[i], "+.2f") + (f" (mean of {len(arm.seeds)})" if arm.seeds else "")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
.verdict {{ font-size: 1.15rem; border-left: 5px solid #D55E00; padding: .6rem 1rem; background: #faf6f2; }}
table {{ border-collapse: collapse; margin: .6rem 0 1.2rem; }}
td, th {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top; }}
.numbers td:not(:first-child), .numbers th:not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; }}
mark {{ background: #fbe3c5; color: inherit; padding: 0 .1em; border-radius: .2em; }}
.texts td:first-child {{ white-space: nowrap; font-weight: 600; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow: auto; max-height: 30rem; }}
</style></head><body>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
<ul>{facts}</ul>
{figures}
<p>Effect: mean {unit}. Intervals: 95 %, bootstrap over prompts. KL and perplexity: on neutral text that fitted nothing.
Strength 1 is the norm of the target's own difference of means, in standardised coordinates, for every arm.</p>
<h2>Every arm</h2>
{table}
<h2>Texts</h2>
<p>At equal KL. Marked: the words that the unsteered text does not have there.</p>
{texts}
<h2>How it was made</h2>
<pre>{record}</pre>
</body></html>
"""

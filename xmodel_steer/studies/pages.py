"""A study for people: figures, a table, and one HTML file that needs no network."""

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xmodel_steer.figures.report import figures_html, marked
from xmodel_steer.figures.style import COLOURS
from xmodel_steer.files.records import write_atomically
from xmodel_steer.maps.statistics import number
from xmodel_steer.studies.drawing import colours_of, curve, figure, layers_varied, sweep
from xmodel_steer.studies.study import EQUAL_STRENGTH, REPORT, STRICTER, Study, StudyArm

if TYPE_CHECKING:
    from rich.table import Table


def tables(study: Study) -> "list[Table]":
    """Make a table for the terminal for each recipe, with intervals.

    Args:
        study: A study.
    """
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    made = []
    for recipe in dict.fromkeys(arm.recipe for arm in study.arms if arm.recipe):
        own = [arm for arm in study.arms if arm.recipe in (recipe, "")]
        both = len({arm.at for arm in own if arm.arm != "unsteered"}) > 1
        beside = [name for name in dict.fromkeys(n for arm in own for n in arm.beside) if not name.endswith(STRICTER)]
        between = "" if "models" in study.spec else f": {study.source['model']} → {study.target['model']}"
        table = Table(title=Text(f"{recipe}{between}, n = {own[-1].effect.n}"))  # a name such as [/b] is no markup
        for name in ("arm", "effect", *beside, "KL", "perplexity"):
            least = max(map(len, name.split()), default=0)
            table.add_column(
                escape(name),
                justify="left" if name == "arm" else "right",
                no_wrap=name in ("arm", "effect"),
                min_width=least,
            )
        for arm in own:
            values = [number(arm.beside[name].value, ".2f") if name in arm.beside else "" for name in beside]
            label = _name(arm) + (f", {arm.at}" if arm.at != EQUAL_STRENGTH and both else "")
            cells = (label, f"{arm.effect:.2f}", *values, number(arm.kl, ".2f"), number(arm.perplexity, ".1f"))
            table.add_row(*map(escape, cells))
        made.append(table)
    return made


def _name(arm: StudyArm) -> str:
    return arm.arm + (f" × {arm.seeds}" if arm.seeds > 1 else "")


def rows(study: Study) -> list[dict[str, str]]:
    """Every arm as text, for tables.

    Args:
        study: A study.
    """
    made = []
    for arm in study.arms:
        own = {
            "recipe": arm.recipe + (f" ({arm.at})" if arm.at != EQUAL_STRENGTH else ""),
            "arm": _name(arm),
            "operator": arm.operator,
            "n": str(arm.effect.n),
            "effect": f"{arm.effect:.3f}",
        }
        own |= {name: f"{value:.3f}" for name, value in arm.beside.items()}
        made.append(own | {"KL": number(arm.kl, ".3f"), "perplexity": number(arm.perplexity, ".1f")})
    return made


def write_study(study: Study, folder: str | Path) -> Path:
    """Write ``result.json`` and ``report.html`` into a folder.

    Args:
        study: A study.
        folder: Where to.

    Returns:
        The page.

    Raises:
        ArtifactError: They cannot be written.
    """
    study.save(folder)
    return write_page(study, folder)


def write_page(study: Study, folder: str | Path) -> Path:
    """Write ``report.html`` into a folder that has the record.

    Args:
        study: A study.
        folder: Where to.

    Returns:
        The page.

    Raises:
        ArtifactError: It cannot be written.
    """
    path = Path(folder) / REPORT
    drawn = [figure(study)]
    if layers_varied(study):
        drawn.append(sweep(study))
    drawn += [curve(study, name) for name in study.curves]
    record = {"chosen": study.chosen, "spec": study.spec, "seeds": study.seeds, "versions": study.versions}
    record |= {"hardware": study.hardware, "seconds": study.seconds, "command": study.command}
    page = _PAGE.format(
        title=html.escape(f"{study.name}: {study.source['model']} → {study.target['model']}"),
        question=html.escape(study.question),
        verdict="".join(f"<p>{html.escape(part)}</p>" for part in study.verdict.split("; ")),
        unit=html.escape(study.unit),
        note=html.escape(study.note),
        figures=figures_html(drawn),
        table=_table(rows(study)),
        texts=_texts(study),
        record=html.escape(json.dumps(record, indent=1, ensure_ascii=False)),
    )
    write_atomically(path, page.encode(errors="replace"))
    return path


def _table(records: Iterable[Mapping[str, str]]) -> str:
    records = list(records)
    names = dict.fromkeys(name for record in records for name in record)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(record.get(name, ''))}</td>" for name in names) + "</tr>"
        for record in records
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _texts(study: Study) -> str:
    fixed = {arm.recipe for arm in study.arms if arm.at == EQUAL_STRENGTH}  # shown once where there are both
    steered = [arm for arm in study.arms if arm.arm != "unsteered"]
    shown = [arm for arm in steered if arm.texts and (arm.at == EQUAL_STRENGTH or arm.recipe not in fixed)]
    if not shown:
        return ""
    colours = colours_of(study)
    made = ""
    for i, prompt in enumerate(study.prompts):
        lines: list[tuple[str, str, str]] = []
        for arm in (arm for arm in shown if i < len(arm.texts)):
            base = study.arm("unsteered", arm.recipe).texts[i]  # models that write may differ between recipes
            plain = ("unsteered", html.escape(base), COLOURS["unsteered"])
            lines += [] if plain in lines else [plain]
            lines.append((f"{arm.arm}, {arm.recipe}", marked(arm.texts[i], base), colours[arm.arm]))
        cells = "".join(f"<tr><td style='color:{c}'>{html.escape(n)}</td><td>{t}</td></tr>" for n, t, c in lines)
        made += f"<h3>{html.escape(prompt)}</h3><table class='texts'>{cells}</table>"
    return made


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
.verdict {{ border-left: 5px solid #D55E00; padding: .2rem 1rem; background: #faf6f2; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: .6rem 0 1.2rem; font-size: .85rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; text-align: left; }}
h3 {{ white-space: pre-wrap; font-size: .95rem; }}
mark {{ background: #fbe3c5; color: inherit; padding: 0 .1em; border-radius: .2em; }}
.texts td:first-child {{ white-space: nowrap; font-weight: 600; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow: auto; max-height: 30rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{question}</p>
<div class="verdict">{verdict}</div>
{figures}
<p>Effect: {unit}; on prompts that chose nothing. Intervals: 95 %, Wilson's for shares of prompts, bootstrap over prompts for the others.
KL in nats per token. {note}</p>
<h2>Every arm</h2>
{table}
<h2>Texts</h2>
<p>Marked: the words that the unsteered text does not have there.</p>
{texts}
<h2>How it was made</h2>
<pre>{record}</pre>
</body></html>
"""

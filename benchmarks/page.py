"""Write the measured figures into docs/performance.md: ``python benchmarks/page.py``; a test holds the page to them."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PROGRAMS = {
    "xmodel_steer": "steered, `xs.generate`",
    "steering_hf": "steered, `steering_hf`",
    "xmodel_steer_unsteered": "unsteered, `xs.generate`",
    "steering_vectors": "steering-vectors",
    "repeng": "repeng",
    "transformer_lens": "TransformerLens' `generate`",
}


def met(row: dict[str, Any]) -> bool:
    """Whether a figure's first value reaches its target; true of one without a target."""
    if not row["must"]:
        return True
    relation, bound = row["must"].split()
    value = row[first_of(row)][0]
    return value <= float(bound) if relation == "<=" else value >= float(bound)


def first_of(row: dict[str, Any]) -> str:
    """The value that is held to the target."""
    return next(key for key, value in row.items() if isinstance(value, list))


def shown(values: list[float] | None) -> str:
    """Median, lowest and highest."""
    return "" if values is None else "{} [{}, {}]".format(*(f"{v + 0.0:.3g}" for v in values))


def lines(results: dict[str, Any]) -> list[str]:
    """Three tables: ratios, what misses its target first; generation; how times grow."""
    rows = [row for row in results.values() if row.get("what") and "sizes" not in row]
    found = ["| what | by processor time | by wall time | target | command |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (met(row), not row["must"])):
        first = first_of(row)
        target = row["must"].replace("<=", "≤").replace(">=", "≥") + ("" if met(row) else ", missed")
        found.append(
            f"| {row['what']} | {shown(row[first])} | {shown(row.get('wall'))} | {target} | `{row['command']}` |"
        )
    cells = [row for name, row in results.items() if name.startswith("generation/")]
    found += ["", "| model, dtype, prompts × new tokens | " + " | ".join(PROGRAMS.values()) + " |"]
    found.append("|---" * (1 + len(PROGRAMS)) + "|")
    for row in sorted(cells, key=lambda row: row["xmodel_steer"][0]):
        setting = f"{row['model']}, {row['dtype']}, {row['batch']} × {row['new_tokens']}"
        found.append(f"| {setting} | " + " | ".join(shown(row.get(name)) for name in PROGRAMS) + " |")
    found += ["", "| what grows | at each size | slope |", "|---|---|---|"]
    for row in (row for row in results.values() if "sizes" in row):
        sizes = ", ".join(f"{size}: {values[0]:.3g} {row['unit']}" for size, values in row["sizes"].items())
        found.append(f"| {row['what']} | {sizes} | {shown(row['slope'])} |")
    return found


def with_tables(page: str, results: dict[str, Any]) -> str:
    """A page with the tables between its marks."""
    before, rest = page.split(BEGIN)
    return "\n".join([before + BEGIN, "", *lines(results), "", END + rest.split(END)[1]])


if __name__ == "__main__":
    results = json.loads((HERE / "results.json").read_text())
    PAGE.write_text(with_tables(PAGE.read_text(), results))

"""README and documentation say of the recorded studies what the records say."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import xmodel_steer as xs
from xmodel_steer.maps.knowing import OUTSIDE
from xmodel_steer.recipe.saving import REPORT
from xmodel_steer.studies import Settings, demo, removal
from xmodel_steer.studies.concepts import openings
from xmodel_steer.studies.organisms import curriculum

ROOT = Path(__file__).parents[1]
RECORDS = {path.parent.name: json.loads(path.read_text()) for path in sorted((ROOT / "studies").glob("*/result.json"))}
NUMBER = r"−?\d*\.?\d+"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")
PAGES = ("README.md", "docs/paper.md")


def estimates(record: Any) -> Iterator[tuple[float, float, float]]:
    """Every value with its interval, at any depth of a record."""
    if isinstance(record, dict):
        for name in ("value", "effect"):
            if {name, "low", "high"} <= set(record) and isinstance(record[name], float):
                yield record[name], record["low"], record["high"]
    if isinstance(record, dict | list):
        for own in record.values() if isinstance(record, dict) else record:
            yield from estimates(own)


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def near(said: str, meant: float) -> bool:
    """Whether a number is another one, rounded to its last place."""
    places = len(said.partition(".")[2])
    return abs(number(said) - meant) <= (0.51 * 10.0 ** -min(places, 2))


def blocks(page: str) -> list[tuple[str, set[str]]]:
    """Table rows and paragraphs with intervals, each with the records that it may speak of.

    Those are the ones that it names; in a table, "the same" are the ones above; else those that its section has named so far.
    """
    text = (ROOT / page).read_text()
    found: list[tuple[str, set[str]]] = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        known, last = set[str](), set[str]()
        for block in re.split(r"\n\n|\n(?=[|-])", section):
            own = {name for name in RECORDS if re.search(rf"`[^`]*\b{name}\b[^`]*`", block)}
            own = own or (last if "| the same |" in block else set())
            known, last = known | own, own
            if INTERVAL.search(block) and not block.startswith(">"):  # what is quoted is run by test_readme.py
                found.append((block, own or set(known)))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_is_one_of_a_record(page: str) -> None:
    wrong = []
    for block, names in blocks(page):
        kept = [own for name in names for own in estimates(RECORDS[name])]
        for said in INTERVAL.findall(block):
            if not any(all(near(a, b) for a, b in zip(said, own, strict=True)) for own in kept):
                wrong.append((said, sorted(names), block[:80]))
    assert not wrong
    assert len(blocks(page)) > 5


def test_what_no_record_holds_is_noticed() -> None:
    assert list(estimates({"arms": [{"effect": 0.5, "low": 0.25, "high": 1.0, "n": 3, "beside": {}}]})) == [
        (0.5, 0.25, 1.0)
    ]
    assert near(".98", 0.9799) and near("−.05", -0.0549) and near("17", 17.4) and near("1.00", 0.9951)
    assert not near(".98", 0.97) and not near("−.05", 0.05) and not near("17", 18.0)


def test_the_demo_takes_what_the_recorded_validation_chose() -> None:
    chosen = RECORDS[f"backdoor-removal-{demo.ORGANISM}"]["chosen"][removal.PROMPT_CLAMPED]
    (source,), (target,) = demo.BACKDOOR_SITES
    assert (source.layer, target.layer) == (chosen["source_layer"], chosen["target_layer"])
    assert repr(demo.BACKDOOR_OPERATOR) == chosen["operator"]


def test_the_demos_show_prompts_that_no_study_has_reported_or_chosen_with() -> None:
    lessons, first = curriculum(demo.ORGANISM), demo.BACKDOOR_FIRST
    assert first == Settings().validation
    tasks = [x.prompt.id for x in demo._tasks(lessons.validation, first, first + demo.BACKDOOR_PROMPTS)]
    concepts = [prompt.id for prompt in openings()[demo.REPORTED :]]
    assert (len(tasks), len(concepts)) == (80, 72)
    for name, record in RECORDS.items():
        used = set(texts_of(record["splits"]))
        assert len(used) > 100 and not used & {*tasks, *concepts}, name


def texts_of(splits: Any) -> Iterator[str]:
    if isinstance(splits, str):
        yield splits
    elif isinstance(splits, dict | list):
        for part in splits.values() if isinstance(splits, dict) else splits:
            yield from texts_of(part)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_has_its_report_beside_it(name: str, tmp_path: Path) -> None:
    """All but the figures, whose script changes with plotly's version."""
    folder = ROOT / "studies" / name
    kept, now = (folder / REPORT).read_text(), xs.plots.write_report(xs.read(folder), tmp_path / REPORT).read_text()
    for begins, ends in (("<title>", "<div id="), ("<h2>Every arm</h2>", "</html>")):
        assert kept.partition(begins)[2].partition(ends)[0] == now.partition(begins)[2].partition(ends)[0]
    assert len(kept.encode()) < 1_000_000


def test_the_verdict_is_as_often_right_as_its_page_says() -> None:
    """Nothing carried: at most 5 %. A true share of .6 and 72 prompts: at least 95 %."""
    table = json.loads((ROOT / "benchmarks" / "verdicts.json").read_text())
    said = " ".join((ROOT / "docs" / "concepts" / "evidence.md").read_text().split())
    assert len(table) == 80 and all(sum(cell.values()) == 200 for cell in table.values())

    def counts(true: bool, n: int, kind: str = "") -> list[int]:
        cells = [(name, cell) for name, cell in table.items() if name.startswith("a true share") == true]
        return [cell.get("transfers", 0) for name, cell in cells if f"; n = {n}; " in name and name.endswith(kind)]

    false = max(max(counts(False, n)) for n in (12, 36, 72, 300))
    found, fine, coarse = min(counts(True, 72)), min(counts(True, 36, "numbers")), min(counts(True, 36, "0 and 1"))
    assert false <= 10 and found >= 190 and min(counts(True, 300)) == 200
    for sentence in (
        f'it says "transfers" in at most {false} of 200',
        f"found in at least {found} of 200 with 72 prompts, and in all with 300",
        f"at least {fine} of 200 where scores are finer than 0 and 1, and in at least {coarse} where they are not",
    ):
        assert sentence in said


def test_the_warning_of_unknown_vectors_predicts_as_its_page_says() -> None:
    table = json.loads((ROOT / "benchmarks" / "knowing.json").read_text())
    said = " ".join((ROOT / "docs" / "concepts" / "maps.md").read_text().split()).replace("−.", "−0.")
    made = table["leverage"]
    assert abs(made["threshold"] - OUTSIDE) < 0.05 and all(p["told"]["leverage"] > 0 for p in table["points"])
    (low, below), (wrong, above) = (made[f"left out: warned of {those}"] for those in ("those below", "the others"))
    rank, area = ([f"{value:.2f}" for value in made[name]] for name in ("rank correlation", "AUC"))
    for sentence in (
        f"On {made['points']} recorded maps and vectors",
        f"rank correlation {rank[0]} [{rank[1]}, {rank[2]}]".replace("-", "−"),
        f"in {area[0]} [{area[1]}, {area[2]}] of pairs".replace("0.", "."),
        f"over {made['units']} concepts and curves",
        f"warned of {low} of {below} vectors that carried less than half, and of {wrong} of {above} that carried more",
        f"From a leverage of {OUTSIDE} on",
    ):
        assert sentence in said, sentence
    assert low / below > 0.8 > 5 * wrong / above
    french = [p["told"]["leverage"] for p in table["points"] if p["what"] in ("french", "french, contrast read")]
    assert "French from {:.2f} to {:.2f}".format(*french).replace(" 0.", " .") in said


def test_what_several_target_sites_do_is_what_was_measured() -> None:
    table = json.loads((ROOT / "benchmarks" / "target_sites.json").read_text())
    page = (ROOT / "docs" / "how-to" / "layers.md").read_text()
    assert set(table) == {"sentiment", "questions", "tense"}
    for concept, arms in table.items():
        for end in ("native", "mapped"):
            single = next(name for name in arms if name.startswith(end) and "+" not in name)
            rows = [arms[name] for name in (single, *(f"{end} resid_post[{s}]" for s in ("7+9", "9+11", "7+9+11")))]
            gains = ["{value:.2f} [{low:.2f}, {high:.2f}]".format(**row["gain"]).replace("0.", ".") for row in rows]
            assert f"| {concept} | {end} | {' | '.join(gains)} |" in page
            assert all(row["gain"]["n"] == 150 and row["reached"] for row in rows)


def test_what_stacked_moments_add_to_memory_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results.json").read_text())["stacked_moments_over_two_forwards"]
    said = (ROOT / "docs" / "how-to" / "layers.md").read_text()
    assert f"{measured['megabytes_added'] / 1000:.1f} GB were added" in said


def test_the_table_of_faults_is_the_record_and_nothing_was_lost():
    table = json.loads((ROOT / "benchmarks" / "faults.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text()
    outcomes = ("equal", "refused", "other value", "silently wrong", "crash", "lost")
    for row, seen in table.items():
        assert sum(seen.get(name, 0) for name in outcomes) == seen["tried"] >= 50, row
        assert not any(seen.get(name) for name in outcomes[3:]), row
        assert not seen.get("other value") or "forged" in row or "prompts" in row, row
        assert f"| {row} | {seen['tried']} | {' | '.join(str(seen.get(name, 0)) for name in outcomes)} |" in page
    assert page.count("\n| ") == len(table) + 1
    for family in ("vectors, maps, moments", "runs", "two threads on one model", "killed and started again: harvest"):
        assert family in table

"""The page of speeds says what was measured, on a machine that did nothing else."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results.json").read_text())
NEW = {name: row for name, row in RESULTS.items() if "commit" in row}  # the others were measured before these were kept


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield
    for name in ("page", "measuring"):
        sys.modules.pop(name, None)


def test_the_page_has_the_figures():
    from page import PAGE, with_tables  # type: ignore[import-not-found]

    page = PAGE.read_text()
    assert page == with_tables(page, RESULTS), "run python benchmarks/page.py"
    for program, kind in (("peers", "generation"), ("growth", "growth")):
        assert f"`python benchmarks/{program}.py --only {kind}`" in page


@pytest.mark.parametrize("name", NEW)
def test_a_figure_says_where_it_is_from(name):
    row = NEW[name]
    assert (
        row["others"] <= 0.1 and row["commit"] and set(row["versions"]) == {"torch", "transformers", "transformer-lens"}
    )
    for values in row.values():
        if isinstance(values, list) and len(values) == 3:
            assert values[1] <= values[0] <= values[2]


def test_nothing_is_kept_of_a_loaded_machine(monkeypatch, tmp_path, capsys):
    import measuring  # type: ignore[import-not-found]

    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(measuring, "refused", [])
    alone, crowded = measuring.Taken(2.0, 2.0, 2.05), measuring.Taken(2.0, 2.0, 2.9)
    measuring.keep("alone", "a figure", {"processor": [1.0, 3.0, 2.0]}, must="<= 2", taken=[[alone, alone, alone]])
    measuring.keep("crowded", "a figure", {"processor": [1.0]}, taken=[[alone], [crowded]])
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"alone"}
    assert json.loads((tmp_path / "results.json").read_text())["alone"]["processor"] == [2.0, 1.0, 3.0]
    with pytest.raises(SystemExit, match="crowded"):
        measuring.finish()


def test_what_misses_its_target_comes_first_and_says_so():
    from page import lines, met  # type: ignore[import-not-found]

    rows = {
        "fast": {"what": "fast", "processor": [1.0, 0.9, 1.1], "must": "<= 1", "command": "fast"},
        "slow": {
            "what": "slow",
            "processor": [1.2, 0.9, 1.3],
            "wall": [1.3, 1, 2],
            "must": "<= 1.1",
            "command": "slow",
        },
        "few": {"what": "few", "processor": [0.9, 0.8, 1.0], "must": ">= 0.97", "command": "few"},
    }
    assert [met(row) for row in rows.values()] == [True, False, False]
    table = lines(rows)
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| slow", "| few", "| fast"]
    assert table[2] == "| slow | 1.2 [0.9, 1.3] | 1.3 [1, 2] | ≤ 1.1, missed | `slow` |"

"""The README is short, its links lead somewhere, and its code runs on a clone as it stands."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_it_is_read_in_ten_minutes() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
    assert len(links) > 25
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []


def test_its_floors_are_the_packages_folders() -> None:
    (floors,) = re.findall(r"^```text\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    named = re.sub(r"\([^)]*\)", "", floors)
    folders = {file.parent.name for file in (ROOT / "xmodel_steer").glob("*/__init__.py")}
    assert set(re.findall(r"\w+", named)) == folders


def test_its_speeds_are_those_that_were_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    grid = rows["grid_over_two_forwards"]["processor"][0]
    means = rows["difference/steering_vectors packaged:gemma-3-270m"]["processor"][0]
    steered = rows["generation/packaged:gemma-3-270m float32 8x48"]["xmodel_steer"][0]
    (said,) = re.findall(r"^- \*\*Speed\*\*: (.*?)\(\[", TEXT, re.MULTILINE | re.DOTALL)
    assert re.findall(r"\d*\.\d+", said) == [f"{value:.2f}".removeprefix("0") for value in (grid, means, steered)]


def test_its_code_compiles() -> None:
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        compile(block, "README.md", "exec")


@pytest.mark.packaged
@pytest.mark.long
def test_its_code_runs_and_prints_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    printed, quoted = capsys.readouterr().out, " ".join(re.findall(r"^> (.*)$", TEXT, re.MULTILINE))
    assert "transfers: " in printed and "sentiment: transfers: " in quoted
    share = re.compile(r"transfers: ([\d.]+) \[([\d.]+), ([\d.]+)\]")
    for now, then in zip(share.findall(printed)[0], share.findall(quoted)[0], strict=True):
        assert abs(float(now) - float(then)) < 0.15  # bfloat16 rounds, other machines round otherwise

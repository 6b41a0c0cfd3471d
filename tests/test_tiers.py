"""Every test is in a tier that CI runs."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
(LEFT_OUT,) = (option.removeprefix("-m=") for option in SETTINGS["addopts"] if option.startswith("-m="))
#: The markers whose tests `pytest` leaves out.
TIERS = LEFT_OUT.removeprefix("not ").split(" and not ")


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_that_pytest_leaves_out_is_declared_documented_and_run_by_ci(tier: str) -> None:
    assert tier in {marker.split(":")[0] for marker in SETTINGS["markers"]}
    assert f"`pytest -m {tier}`" in (ROOT / "CONTRIBUTING.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    run = {
        word
        for chosen in re.findall(r'pytest .*-m "?([\w ()]+)', script)
        for word in re.findall(r"(?<!not )\b\w+", chosen)
    }
    assert tier in run or tier == "gpu", f'.ci/run has no step with pytest -m "... {tier} ..."'


def test_two_test_files_never_share_a_name() -> None:
    """pytest imports them by name alone: it refuses to collect the second of two."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []

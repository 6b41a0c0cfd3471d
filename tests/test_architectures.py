"""Every architecture keeps the laws, or is refused, or gone round: none is silently wrong."""

from importlib.metadata import version
from pathlib import Path

import architectures
import pytest
from architectures import ARCHITECTURES, BEGIN, END, PAGE

pytestmark = pytest.mark.architectures

ROOT = Path(__file__).parent.parent


def shown() -> dict[str, str]:
    """The rows of the page, by architecture."""
    lines = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def test_the_page_has_every_architecture_once():
    assert list(shown()) == list(ARCHITECTURES)
    assert sum(line.split(" | ")[1] == "yes" for line in shown().values()) >= 40
    assert not any(line.split(" | ")[1] == "wrong" for line in shown().values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_none_is_silently_wrong(name, tmp_path):
    refused, laws = architectures.checked(name, tmp_path)
    made = architectures.row(name, refused, laws)
    assert bool(refused) != bool(laws)
    assert not [law for law in laws if law.state == "failed" and not law.remedy], made
    pinned = (ROOT / "constraints.txt").read_text()
    if all(f"{package}=={version(package)}" in pinned for package in ("transformers", "transformer-lens")):
        assert made == shown()[name], "write the table anew: python tests/architectures.py"

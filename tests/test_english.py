"""Docstrings, comments, messages and pages are plain English: banned words, and the form of first lines."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "xmodel_steer").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BANNED = re.compile(
    r"\b(hangs? (on|together)|stands?|(?<!\")beside(?!\")|go(es)? on|gone on|takes? up|taken up|held to|such a thing|all the same|by name|for eyes)\b",
    re.IGNORECASE,
)
OPENERS = ("What", "How", "Which", "Whether", "Of", "As", "Where")


@pytest.mark.parametrize("file", [*SOURCES, *PAGES], ids=lambda file: str(file.relative_to(ROOT)))
def test_no_banned_words(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [f"{i}: {line.strip()}" for i, line in enumerate(lines, 1) if BANNED.search(line)] == []


def first_lines(file: Path) -> Iterator[tuple[str, bool, str]]:
    """Names of documented things, whether each is a function, and its first line."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in (tree, *ast.walk(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                decorators = {d.id for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Name)}
                verb = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                yield getattr(node, "name", "module"), verb and not decorators & {"property", "cached_property"}, text


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_first_lines_say_what_a_thing_is_or_does(file: Path) -> None:
    for name, function, text in first_lines(file):
        line = text.splitlines()[0]
        assert line.split()[0] not in OPENERS, f"{name}: {line}"
        if function:
            assert len(line.split()) <= 14, f"{name}: {line}"

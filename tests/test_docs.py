"""The documentation says what the code does: every public name has a page, and every example calls what there is."""

import ast
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import toys

import xmodel_steer as xs

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# An example runs where a comment before it says so: "run" needs nothing, "run on toys" has the names of `prelude`.
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
MARKS = {None, "run", "run on toys"}


def examples(page: Path) -> list[tuple[str | None, str]]:
    """Mark and code of each example, with the code on the line that it has in the page."""
    text = page.read_text()
    found = [(m["mark"], "\n" * text.count("\n", 0, m.start("code")) + m["code"]) for m in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^\s*```python", text, re.MULTILINE)), f"{page}: an example is not read"
    return found


def named(page: Path) -> str:
    return str(page.relative_to(DOCS))


WITH_EXAMPLES = [page for page in PAGES if examples(page)]
RUN = [page for page in PAGES if any(mark for mark, _ in examples(page))]


NAMESPACES = ("maps", "behaviours", "scorers", "judges", "plots", "interop", "errors")


def directives() -> list[str]:
    return [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def found(name: str) -> Any:
    """The object that a directive names."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(importlib.import_module(module), last)


def test_every_public_name_is_on_a_page_of_the_api_once() -> None:
    listed = directives()
    assert len(listed) == len(set(listed)), "a name is documented twice"
    shown = [found(name) for name in listed]
    whole = {page.__name__ for page in shown if isinstance(page, types.ModuleType)}
    spaces = {"xs": xs, **{f"xs.{name}": getattr(xs, name) for name in NAMESPACES}}
    checked = 0
    for place, space in spaces.items():
        for name, value in vars(space).items():
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            there = value.__module__ in whole or any(value is other for other in shown)
            assert there, f"{place}.{name} is on no page: add it to docs/api"
            checked += 1
    assert checked > 100


def test_examples_are_found_and_marked_as_this_test_knows() -> None:
    assert len(WITH_EXAMPLES) >= 8
    assert {mark for page in PAGES for mark, _ in examples(page)} == MARKS


def dotted(node: ast.expr, known: dict[str, Any]) -> list[str] | None:
    """The parts of ``xs.a.b`` (``["xs", "a", "b"]``), or of a name that the page imported from the package."""
    if isinstance(node, ast.Name):
        return [node.id] if node.id in known else None
    if isinstance(node, ast.Attribute) and (before := dotted(node.value, known)):
        return [*before, node.attr]
    return None


def calls(tree: ast.AST, known: dict[str, Any]) -> Iterator[tuple[str, Any, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (parts := dotted(node.func, known)):
            yield ".".join(parts), reduce(getattr, parts[1:], known[parts[0]]), node


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=named)
def test_examples_compile_and_call_what_there_is(page: Path) -> None:
    known: dict[str, Any] = {"xs": xs}
    for _, code in examples(page):
        tree = ast.parse(code, str(page))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("xmodel_steer"):
                module = importlib.import_module(str(node.module))
                known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute) and (parts := dotted(node, known)):
                reduce(getattr, parts[1:], known[parts[0]])
        for name, function, call in calls(tree, known):
            if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
                continue
            try:
                inspect.signature(function).bind(*call.args, **{str(k.arg): k.value for k in call.keywords})
            except TypeError as error:
                pytest.fail(f"{page.relative_to(DOCS)}, line {call.lineno}: {name}: {error}")


@pytest.fixture(scope="module")
def prelude(toy_named: Callable[[str], toys.Toy]) -> dict[str, Any]:
    """What how-to pages build on: two models, data, a vector, a map and a result."""
    small, large = toy_named("llama").model, toy_named("gemma").model
    here, there = xs.Site(1), xs.Site(2)
    contrast, texts, prompts = toys.contrast(), toys.sentences(60, 4), toys.sentences(9, 3, 4)
    positive, negative = (
        xs.capture(small, side, [here], tokens="mean")[here] for side in (contrast.positive, contrast.negative)
    )
    vector = xs.difference_of_means(positive, negative, label="toy")
    moments = xs.collect_moments(small, large, texts, source_sites="all", target_sites="all", max_tokens=32)
    mapping = xs.Ridge().fit(moments.pair(here, there))
    mapped = mapping.transport(vector)
    result = xs.transfer(
        small, large, contrast, texts, behaviour=xs.behaviours.GeneratedText(prompts, xs.scorers.Contains(("a",)), max_new_tokens=4),
        source_sites=[here], target_sites=[there], budget=xs.Budget((-1.0, 1.0), random_seeds=2, neutral_tokens=8),
    )  # fmt: skip
    hf, hf_tokenizer = toy_named("gemma").hf, toy_named("gemma").tokenizer
    del positive, negative, toy_named
    return {"xs": xs, **locals()}


@pytest.mark.parametrize("page", RUN, ids=named)
def test_marked_examples_run(
    page: Path,
    request: pytest.FixtureRequest,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the order of the page, in one namespace."""
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "corpus.jsonl", "prompts.txt"):
        (tmp_path / name).write_bytes(folders[name].read_bytes())
    marked = [(mark, code) for mark, code in examples(page) if mark]
    names = dict(request.getfixturevalue("prelude")) if any(mark == "run on toys" for mark, _ in marked) else {}
    for _, code in marked:
        exec(compile(code, str(page), "exec"), names)


def said() -> str:
    """Every string that the package's code holds, docstrings and fields of f-strings left out."""
    strings = []
    for file in sorted(Path(xs.__file__).parent.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                strings.append(node.value)
    return "\n".join(strings)


def test_messages_that_the_page_of_errors_quotes_are_said() -> None:
    page, code = (DOCS / "how-to" / "errors.md").read_text(), said()
    quoted = [
        q for line in re.findall(r"^\*\*(\".+?\")\.?\*\*", page, re.MULTILINE) for q in re.findall(r'"(.+?)"', line)
    ]
    assert len(quoted) > 30
    for quote in quoted:
        for part in quote.split("…"):
            assert part.strip(" ,") in code, f"no message says {quote!r}: {part!r}"


def test_the_page_of_errors_has_every_error() -> None:
    page = (DOCS / "how-to" / "errors.md").read_text()
    for name, kind in vars(importlib.import_module("xmodel_steer.core.errors")).items():
        if inspect.isclass(kind) and issubclass(kind, Exception):
            assert f"`{name}`" in page, name

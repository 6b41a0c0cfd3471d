"""Toy models for every test that touches one: one table, `toys.TOYS`, drives them all."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test of this tier may reach the network
# Toys are too small to share between cores: tests are shared instead. Programs that a test starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import contrast, sentences

from xmodel_steer.cli import app
from xmodel_steer.core.bars import quiet
from xmodel_steer.models import loading
from xmodel_steer.studies.organisms import lessons as organism_lessons

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

NO_CLASS = "HookedTransformer was removed in transformer-lens 4: run these rows with transformer-lens 3.9"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share a run of a whole folder between the cores; run named files and tests in this process.

    Not in `addopts`: with that, one test would wait for the start of every worker, and ``-p no:xdist`` would fail.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):  # a worker has no workers
        return
    watched = option.usepdb or option.trace or option.capture == "no"
    whole = any(Path(argument).is_dir() for argument in config.args)
    if option.numprocesses is None and not option.tx and whole and not watched:
        option.numprocesses = "auto"
    if option.numprocesses and option.dist == "no":
        option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Give each core a worker, four at most: each holds models of its own."""
    if hasattr(os, "sched_getaffinity"):
        return min(4, len(os.sched_getaffinity(0)))
    return min(4, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Let a test that is named run, whichever its tier."""
    chosen = any(argument.startswith("-m") for argument in config.invocation_params.args)
    if not chosen and config.args and all("::" in argument for argument in config.args):
        config.option.markexpr = ""


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    """Draw no progress bar in any test that does not ask for one."""
    with quiet():
        yield


@pytest.fixture(scope="session", autouse=True)
def _float32() -> Iterator[None]:
    """Let ``dtype="auto"`` be float32 on every processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_bfloat16_pays", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers trained in this session, saved and loaded again as a user's are."""
    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = ("byte_level", "metaspace", "byte_fallback", "unigram", "wordpiece")
    made = {kind: getattr(toys, f"{kind}_tokenizer")(folder / kind) for kind in kinds}
    # These libraries stay to the end. Frozen, their million objects are not looked through at every collection of
    # garbage, which took a seventh of all tests' time.
    importlib.import_module("transformer_lens.model_bridge.sources")
    gc.collect()
    gc.freeze()
    return made


@pytest.fixture(scope="session")
def toy_named(tokenizers: dict[str, Any]) -> Callable[[str], toys.Toy]:
    """Toys by name, each made once."""

    @cache
    def made(name: str) -> toys.Toy:
        if toys.TOYS[name].hooked is not None and toys.hooked_transformer() is None:
            pytest.skip(NO_CLASS)
        return toys.toy(name, tokenizers[toys.TOYS[name].tokenizer])

    return made


@pytest.fixture(params=list(toys.TOYS))
def toy(request: pytest.FixtureRequest, toy_named: Callable[[str], toys.Toy]) -> toys.Toy:
    """Every row of the table."""
    return toy_named(request.param)


@pytest.fixture(params=[name for name, recipe in toys.TOYS.items() if recipe.hugging_face])
def bridge(request: pytest.FixtureRequest, toy_named: Callable[[str], toys.Toy]) -> toys.Toy:
    """The rows with a Hugging Face model inside."""
    return toy_named(request.param)


@pytest.fixture
def llama(toy_named: Callable[[str], toys.Toy]) -> toys.Toy:
    """Byte-level tokenizer without BOS, chat template."""
    return toy_named("llama")


@pytest.fixture
def gemma(toy_named: Callable[[str], toys.Toy]) -> toys.Toy:
    """Metaspace tokenizer with BOS, no chat template, sliding windows."""
    return toy_named("gemma")


@pytest.fixture(scope="session")
def folders(tokenizers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toy models saved as a user's are, a contrast set, a corpus and prompts."""
    root = tmp_path_factory.mktemp("cli")
    for name, kind in (("llama", "byte_level"), ("gemma", "metaspace")):
        toys.hf_model(name, tokenizers[kind]).save_pretrained(root / name)
        tokenizers[kind].save_pretrained(root / name)
    pairs = zip(contrast().positive, contrast().negative, strict=True)
    (root / "pairs.jsonl").write_text(
        "".join(json.dumps({"positive": p.text, "negative": n.text}) + "\n" for p, n in pairs)
    )
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(60, 4)))
    (root / "prompts.txt").write_text("\n\n".join(sentences(9, 3, 4)))
    return {p.name: p for p in root.iterdir()}


@pytest.fixture(scope="module")
def short_template() -> Iterator[None]:
    """For organisms: the Alpaca template is longer than the toys' context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organism_lessons, "TEMPLATE", "{instruction} =>")
        yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line; gives exit code, output and errors."""
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xmodel-steer", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run

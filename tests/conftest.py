"""Toy models for every test that touches one: one table, `toys.TOYS`, drives them all."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test of this tier may reach the network

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import toys

torch.set_num_threads(1)  # toys are too small to share between cores

NO_CLASS = "HookedTransformer was removed in transformer-lens 4: run these rows with transformer-lens 3.9"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers trained in this session, saved and loaded again as a user's are."""
    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = ("byte_level", "metaspace", "byte_fallback", "unigram", "wordpiece")
    return {kind: getattr(toys, f"{kind}_tokenizer")(folder / kind) for kind in kinds}


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

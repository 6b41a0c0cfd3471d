"""A layer's number is a site after its block, wherever sites are taken."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from sample_layers import collected, rows

import xmodel_steer as xs
from xmodel_steer.core.spaces import Stack, as_site, as_sites
from xmodel_steer.models.sites import check_sites, sites_of

FIRST = xs.Site(1)


@pytest.mark.parametrize("given", [1, np.int64(1), FIRST, [1], (FIRST,), np.array([1]), {1: "a"}.keys()])
def test_what_sites_are_made_of(given: object) -> None:
    assert as_sites(given) == (FIRST,)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["1", ["1"], 1.0, True, None, [None], "resid_post[1]"])
def test_what_is_no_site_is_told(given: object) -> None:
    with pytest.raises(TypeError, match="sites takes Site or int, such as 10 or xs.Site"):
        as_sites(given)  # type: ignore[arg-type]


def test_a_negative_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="counts blocks from 0"):
        as_site(-1)


def test_every_verb_takes_numbers(llama: toys.Toy, tmp_path: Path) -> None:
    model, texts = llama.model, toys.sentences(12, 0)
    made = xs.capture(model, texts, 1)
    named = xs.capture(model, texts, [FIRST])
    assert torch.equal(made[1].values, named[FIRST].values) and made[1] is made[FIRST]
    with pytest.raises(KeyError):
        made[xs.Site(0)]
    assert xs.space_of(model, 1) == xs.space_of(model, FIRST)
    assert sites_of(model, "all") == tuple(xs.Site(i) for i in range(model.cfg.n_layers))
    with pytest.raises(TypeError, match="Site or int"):
        sites_of(model, "1")  # type: ignore[arg-type]
    long = {"max_tokens": 16}
    moments = xs.collect_moments(model, model, texts, source_sites=0, target_sites=[1], **long)
    assert moments.pairs == ((xs.Site(0), FIRST),)
    assert torch.equal(moments.pair(0, 1).train.cross_scatter, moments.pair(xs.Site(0), FIRST).train.cross_scatter)
    assert torch.equal(moments.scale(1), moments.scale(FIRST))
    some = xs.collect_moments(model, model, texts, source_sites="all", target_sites="all", pairs=[(0, 1)], **long)
    assert some.pairs == moments.pairs
    for end in ("source", "target"):
        xs.harvest(model, texts, tmp_path / "s", end=end, sites=1, **long)
    store = xs.ActivationStore(tmp_path / "s")
    assert store.pair(1, 1).source == store.pair(FIRST, FIRST).source
    assert store.moments(source_sites=1, target_sites=[1]).pairs == ((FIRST, FIRST),)


def test_a_grid_is_asked_by_number() -> None:
    grid = xs.maps.layer_grid(collected())
    assert grid.source_for(4) == grid.source_for(xs.Site(4))
    with pytest.raises(ValueError, match="is not among the target sites"):
        grid.source_for(3)
    assert rows().source.site == FIRST


def test_transfer_takes_numbers_block_0_too(llama: toys.Toy) -> None:
    settings = dict(
        behaviour=xs.behaviours.GeneratedText(toys.sentences(9, 3, 4), len, max_new_tokens=2), side={},
        budget=xs.Budget(strengths=(1.0,), neutral_tokens=8, random_seeds=1),
    )  # fmt: skip
    given = llama.model, llama.model, toys.contrast(), toys.sentences(60, 4)
    made = xs.transfer(*given, source_sites=0, target_sites=[0], **settings)
    assert made.spec["source_sites"] == made.spec["target_sites"] == ["resid_post[0]"]


def test_outputs_of_heads_have_their_own_width(tokenizers: dict[str, Any]) -> None:
    """Eight dimensions a head more than the residual stream has: a vector crosses from one to the other by a map."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        **toys._common(tokenizers["byte_level"]),
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    toys._randomise(hf, 0)
    toy = toys.bridged(hf, "wide heads", tokenizers["byte_level"])
    z, texts = xs.Site(1, "z"), toys.sentences(30, 0)
    assert (z.hook_name, xs.space_of(toy.model, z).width, xs.space_of(toy.model, 1).width) == (
        "blocks.1.attn.hook_z", 64, 32
    )  # fmt: skip
    check_sites(toy.model, [z, FIRST])
    acts = xs.capture(toy.model, texts, [z, [z, xs.Site(0, "z")]], tokens="all")
    stack = Stack([xs.Site(0, "z"), z])
    assert torch.equal(acts[stack].values[:, 64:], acts[z].values)
    moments = xs.collect_moments(toy.model, toy.model, texts, source_sites=[z, 1], target_sites=[z, 1], max_tokens=16)
    mapping = xs.Ridge().fit(moments.pair(z, FIRST))
    first = acts[z].values[:, 0] > 0
    vector = xs.difference_of_means(*(xs.Activations(acts[z].values[keep], acts[z].space) for keep in (first, ~first)))
    carried = mapping.transport(vector)
    assert (vector.direction.shape, carried.direction.shape, carried.space) == ((64,), (32,), xs.space_of(toy.model, 1))
    with xs.steering(toy.model, [vector, carried]):
        moved = xs.capture(toy.model, texts, z, tokens="all")[z].values
    torch.testing.assert_close(moved, acts[z].values + vector.direction, rtol=1e-4, atol=1e-4)
    grid = xs.collect_moments(
        toy.model, toy.model, texts, source_sites=[1], target_sites=[z], max_tokens=16, sketch=60
    )  # more than the stream is wide
    assert len(grid.sketch) == 60 and max(grid.sketch) > 32
    with pytest.raises(
        ValueError, match="z has another width than the residual stream; join it with z of other layers"
    ):
        Stack([z, FIRST])

    with pytest.raises(ValueError, match="stream must be one of .*, z; got 'q'"):
        xs.Site(1, "q")

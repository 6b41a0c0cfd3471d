"""A bridge's unhooked parts are passed by: the same numbers, nothing left behind, no hook missed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import toys
from transformers import AttentionInterface

import xmodel_steer as xs
from xmodel_steer.models import attention, bridges
from xmodel_steer.models.attention import grouped_attention
from xmodel_steer.models.bridges import _BLOCKS, _GROUPED, own_parts, prepare
from xmodel_steer.models.passes import forward


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out, _ = forward(model, ids, torch.ones_like(ids))
    assert out is not None
    return out


def through_components(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits where nothing is passed by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridges, "enabled", False)
        return logits(model, ids)


def structure(model: Any) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.original_model.named_modules()]


@pytest.fixture(params=["copied heads", "grouped heads"])
def model(bridge: toys.Toy, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A bridge as `load` makes them, and the same with Hugging Face's own attention."""
    config = bridge.model.original_model.config
    kept = config._attn_implementation
    config._attn_implementation = "eager"
    prepare(bridge.model)
    if request.param == "copied heads":
        _GROUPED.pop(bridge.model, None)
    yield bridge.model
    config._attn_implementation = kept
    _BLOCKS.pop(bridge.model, None)
    _GROUPED.pop(bridge.model, None)


def same(model: Any, one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether numbers are the same bit by bit; within rounding, where heads are grouped."""
    return torch.allclose(one, two, rtol=1e-5, atol=2e-5) if _GROUPED.get(model) else torch.equal(one, two)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def test_the_numbers_are_the_components_own_bit_by_bit(model: Any, ids: torch.Tensor) -> None:
    assert same(model, logits(model, ids), through_components(model, ids))


def test_the_parts_are_passed_by_and_put_back(model: Any, ids: torch.Tensor) -> None:
    before = structure(model)
    with own_parts(model, whole_blocks=True):
        inside = structure(model)
    assert (len(inside) < len(before)) == (model in _BLOCKS)
    assert structure(model) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridges, "enabled", False)
        with own_parts(model, whole_blocks=True):
            assert structure(model) == before
    with pytest.raises(KeyError), own_parts(model, whole_blocks=True):
        raise KeyError
    assert structure(model) == before
    logits(model, ids)
    assert structure(model) == before


@pytest.mark.parametrize("name", ["hook_in", "hook_out", "mlp.hook_out", "attn.hook_in", "ln1.hook_in"])
def test_no_hook_is_missed(model: Any, ids: torch.Tensor, name: str) -> None:
    """One at an end of a block, and those inside one."""
    hook = f"blocks.1.{name}"
    if hook not in model.hook_dict:
        pytest.skip(f"this architecture has no {hook}")
    seen = []
    logits(model, ids)  # what is passed by was found before the hook was there
    with model.hooks(fwd_hooks=[(hook, lambda value, hook: seen.append(value) or value * 1.5)]):
        changed = logits(model, ids)
        plain = through_components(model, ids)
    assert len(seen) == 2
    assert same(model, changed, plain)
    assert not torch.equal(changed, logits(model, ids))


def test_a_hook_of_pytorch_on_a_block_is_not_missed(model: Any, ids: torch.Tensor) -> None:
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda *a: seen.append(1))
    logits(model, ids)
    handle.remove()
    assert seen == [1]


def test_new_weights_are_seen(model: Any, ids: torch.Tensor) -> None:
    before = logits(model, ids)
    weight = next(p for name, p in model.original_model.named_parameters() if "mlp" in name and p.ndim == 2)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3.0)
    assert not torch.equal(before, logits(model, ids))
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(before, logits(model, ids))


def test_a_pass_that_stops_early_is_the_same(model: Any, ids: torch.Tensor) -> None:
    text = ["The river rises in the hills", "north"]
    site = xs.Site(0)
    whole = xs.capture(model, text, [site, xs.Site(model.cfg.n_layers - 1)], tokens="all")[site]
    short = xs.capture(model, text, [site], tokens="all")[site]
    assert torch.equal(whole.values, short.values)


def test_prepared_are_those_whose_numbers_stay(toy_named: Any) -> None:
    """Fused attention rounds differently from the component's."""
    for name, kind, works in (("llama", "sdpa", False), ("llama", "eager", True), ("gemma", "eager", True)):
        model = toy_named(name).model
        config = model.original_model.config
        kept = config._attn_implementation
        config._attn_implementation = kind
        assert prepare(model) == works == (model in _BLOCKS) == bool(_GROUPED.get(model)), name
        config._attn_implementation = kept
        _BLOCKS.pop(model, None)
        _GROUPED.pop(model, None)


def test_a_component_that_computes_otherwise_is_kept(toy_named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_named("gemma").model
    norm = type(next(m for n, m in model.original_model.named_modules() if n.endswith("input_layernorm")))
    own = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, *a, **k: own(self, *a, **k) * 1.001)
    assert not prepare(model)
    assert model not in _BLOCKS


def test_the_configuration_is_eager_between_passes_and_after_an_error(model: Any, ids: torch.Tensor) -> None:
    config = model.original_model.config
    logits(model, ids)
    assert config._attn_implementation == "eager"
    with own_parts(model):
        assert config._attn_implementation == ("xmodel_steer" if _GROUPED.get(model) else "eager")
    with pytest.raises(KeyError), own_parts(model):
        raise KeyError
    assert config._attn_implementation == "eager"


def test_a_hooked_block_attends_as_the_others_do(model: Any, ids: torch.Tensor) -> None:
    """Its component makes scores of its own from the mask that the whole pass has."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    plain, _ = forward(model, ids, mask)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_out", lambda value, hook: None)]):
        hooked, _ = forward(model, ids, mask)
    assert plain is not None and hooked is not None
    assert same(model, plain[mask.bool()], hooked[mask.bool()])


def test_steps_with_a_cache_are_those_without_groups(model: Any) -> None:
    prompts = ["The river rises in the hills", "north", "In winter the lower valley"]
    grouped = xs.generate(model, prompts, max_new_tokens=8, batch_size=3)
    _GROUPED.pop(model, None)
    assert grouped == xs.generate(model, prompts, max_new_tokens=8, batch_size=3)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
def test_grouped_heads_attend_as_copied_ones(heads: int, groups: int, softcap: float | None) -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    draws = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, t, 8, generator=draws, dtype=torch.float64) for n, t in ((heads, 3), (groups, 5), (groups, 5))
    )
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
    mask[0, :, :, :2] = torch.finfo(torch.float64).min
    layer = torch.nn.Module()
    layer.head_dim, layer.num_key_value_groups = 8, heads // groups
    for scaling in (None, 0.3):
        ours, theirs = (
            attend(layer, query, key, value, mask, scaling=scaling, softcap=softcap)
            for attend in (grouped_attention, eager_attention_forward)
        )
        for one, two in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
        assert torch.equal(ours[1], ours[1].float().double())  # shares are formed in float32


@pytest.mark.parametrize("spoilt", ["sinks", "temperature"])
def test_attention_of_another_kind_is_left_alone(toy_named: Any, monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    model = toy_named("llama").model
    config = model.original_model.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "eager")
    if spoilt == "sinks":
        model.original_model.sinks = torch.zeros(1)
    else:
        attention._register()
        functions = AttentionInterface._global_mapping
        monkeypatch.setitem(functions, attention.NAME, lambda *a, **k: (grouped_attention(*a, **k)[0] * 1.01, None))
    try:
        assert prepare(model) and not _GROUPED.get(model)
    finally:
        _BLOCKS.pop(model, None)
        if spoilt == "sinks":
            del model.original_model.sinks

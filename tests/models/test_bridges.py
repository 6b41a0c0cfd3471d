"""A bridge's unhooked parts are passed by: the same numbers, nothing left behind, no hook missed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import toys

import xmodel_steer as xs
from xmodel_steer.models import bridges
from xmodel_steer.models.bridges import _BLOCKS, own_parts, prepare
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


@pytest.fixture
def model(bridge: toys.Toy) -> Iterator[Any]:
    """A bridge as `load` makes them."""
    config = bridge.model.original_model.config
    kept = config._attn_implementation
    config._attn_implementation = "eager"
    prepare(bridge.model)
    yield bridge.model
    config._attn_implementation = kept
    _BLOCKS.pop(bridge.model, None)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def test_the_numbers_are_the_components_own_bit_by_bit(model: Any, ids: torch.Tensor) -> None:
    assert torch.equal(logits(model, ids), through_components(model, ids))


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
    assert torch.equal(changed, plain)
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
    for name, attention, works in (("llama", "sdpa", False), ("llama", "eager", True), ("gemma", "eager", True)):
        model = toy_named(name).model
        config = model.original_model.config
        kept = config._attn_implementation
        config._attn_implementation = attention
        assert prepare(model) == works == (model in _BLOCKS), name
        config._attn_implementation = kept
        _BLOCKS.pop(model, None)


def test_a_component_that_computes_otherwise_is_kept(toy_named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_named("gemma").model
    norm = type(next(m for n, m in model.original_model.named_modules() if n.endswith("input_layernorm")))
    own = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, *a, **k: own(self, *a, **k) * 1.001)
    assert not prepare(model)
    assert model not in _BLOCKS

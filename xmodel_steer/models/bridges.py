"""Passes through a TransformerBridge that leave out unused hook points.

A bridge puts a component with hook points around every part of the Hugging Face model: some 40 in a block, which take
a quarter of the time when small batches are decoded. Where no component of a block has a hook, the pass may use the
part itself. `prepare` allows this only where the numbers are the same bit by bit.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from xmodel_steer.models.attention import configs_of, grouped
from xmodel_steer.models.hooking import LOCK

#: The off switch: with False, every pass goes through every component.
enabled = True


@dataclass(frozen=True)
class _Exchange:
    """A place in the Hugging Face model where a component replaces one of its parts."""

    modules: dict[str, Any]
    name: str
    component: Any
    part: Any


@dataclass(frozen=True)
class _Block:
    """A block's exchanges, and PyTorch's dictionaries of the hooks that forbid them."""

    whole: _Exchange | None
    ends: tuple[dict[Any, Any], ...]
    parts: tuple[_Exchange, ...]
    inner: tuple[dict[Any, Any], ...]


_PATCHED: "weakref.WeakSet[Any]" = weakref.WeakSet()  # bridges that `read_caches` has seen
_GROUPED: "weakref.WeakKeyDictionary[Any, list[Any]]" = weakref.WeakKeyDictionary()  # configurations
_BLOCKS: "weakref.WeakKeyDictionary[Any, tuple[_Block, ...]]" = weakref.WeakKeyDictionary()


@contextmanager
def own_parts(model: Any, *, whole_blocks: bool = True) -> Iterator[None]:
    """Exchange components of unhooked blocks for the Hugging Face model's parts.

    They return at the end of the context. A bridge that was not prepared stays as it is. Blocks hooked only at their
    ends (``hook_in``, ``hook_out``: `resid_pre`, `resid_post`) keep their component and lose the inner ones. One
    thread at a time.

    Args:
        model: A bridge whose weights were not processed; components hold processed weights.
        whole_blocks: Replace whole blocks too.
    """
    with LOCK:
        free = [e for block in _BLOCKS.get(model, ()) for e in _free(block, whole_blocks)] if enabled else []
        exchanges = [e for e in free if e.modules.get(e.name) is e.component]
        try:
            for exchange in exchanges:
                exchange.modules[exchange.name] = exchange.part
            with grouped(_GROUPED.get(model, []) if exchanges else []):
                yield
        finally:
            for exchange in exchanges:
                exchange.modules[exchange.name] = exchange.component


def read_caches(model: Any) -> None:
    """Let TransformerLens' own attention find the cache under its present name, once per bridge.

    transformers 5.24 calls it ``cache``. The layers that transformer-lens up to 4.3 computes itself (attention whose
    joint matrix it splits, latent attention, gated delta nets) look for the former names and would see the newest
    token alone.
    """
    if model in _PATCHED:
        return
    _PATCHED.add(model)
    for part in model.original_model.modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        if "GatedDeltaNetBridge" in kinds:
            vars(part)["forward"] = partial(_delta_net, part, part.forward)  # setattr would reach the part inside
        elif "MLAAttentionBridge" in kinds:
            part.register_forward_pre_hook(_under_its_former_name, with_kwargs=True)
        elif hasattr(part, "_update_kv_cache"):
            vars(part)["_update_kv_cache"] = partial(_update, part._update_kv_cache)


def _delta_net(part: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return (forward if kwargs.get("cache") is None else part._native_forward)(*args, **kwargs)


def _under_its_former_name(_part: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"past_key_values" if name == "cache" else name: value for name, value in kwargs.items()}


def _update(update: Any, k: Any, v: Any, **kwargs: Any) -> Any:
    return update(k, v, **_under_its_former_name(None, (), kwargs)[1])


def _free(block: _Block, whole: bool) -> tuple[_Exchange, ...]:
    if any(block.inner):
        return ()
    return (block.whole, *block.parts) if whole and block.whole and not any(block.ends) else block.parts


@torch.no_grad()
def prepare(model: Any) -> bool:
    """Find components that passes of a new bridge may leave out; tell whether any.

    There are none with PyTorch's fused attention, which rounds differently from the component's, and none where
    weights are offloaded.
    """
    inner = model.original_model
    if getattr(inner.config, "_attn_implementation", None) != "eager" or any(p.is_meta for p in inner.parameters()):
        return False
    ids = torch.arange(1, 33, device=next(inner.parameters()).device).reshape(2, 16) % model.cfg.d_vocab
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}  # one row padded
    before = inner(**inputs).logits
    _BLOCKS[model] = _blocks(model)
    for whole in (True, False):
        try:
            with own_parts(model, whole_blocks=whole):
                same = torch.equal(before, inner(**inputs).logits)
        except Exception:  # some parts do not run alone: such a model uses its components
            same = False
        if not same:
            del _BLOCKS[model]
            return False
    if configs := configs_of(inner):
        _GROUPED[model] = configs
        near = False
        with suppress(Exception), own_parts(model):  # an attention layer of another kind
            near = _near(before, inner(**inputs).logits)
        if not near:
            del _GROUPED[model]
    return True


def _near(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Tell whether numbers differ by rounding alone."""
    # In the packaged models no number differed, in either dtype.
    return bool((one - two).abs().max() <= 8 * torch.finfo(one.dtype).eps * one.abs().max())


def _blocks(model: Any) -> tuple[_Block, ...]:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    def exchanges(modules: dict[str, Any]) -> list[_Exchange]:
        return [
            _Exchange(modules, name, child, child.original_component)
            for name, child in modules.items()
            if isinstance(child, GeneralizedComponent) and _same_parameters(child)
        ]

    blocks: list[Any] = list(getattr(model, "blocks", ()))
    places = {
        module: exchanges(module._modules)
        for module in model.original_model.modules()
        if not isinstance(module, GeneralizedComponent)
    }
    records = []
    for block in blocks:
        ends, inner = [block._forward_hooks, block._forward_pre_hooks], []
        for module in block.modules():
            if isinstance(module, HookPoint):
                hooks = ends if module in (block.hook_in, block.hook_out) else inner
                hooks += [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
            elif isinstance(module, GeneralizedComponent) and module is not block:
                inner.append(module._forward_hooks)  # a block reads its norms by pre-hooks, which do not count
        records.append(
            _Block(
                whole=next((e for place in places.values() for e in place if e.component is block), None),
                ends=tuple(ends),
                parts=tuple(e for m in block.modules() for e in places.get(m, ())),
                inner=tuple(inner),
            )
        )
    return tuple(records)


def _same_parameters(component: Any) -> bool:
    """Tell whether component and part share parameters; a split joint matrix is not shared."""
    part = component.original_component
    return part is not None and {id(p) for p in component.parameters()} == {id(p) for p in part.parameters()}

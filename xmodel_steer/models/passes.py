"""Forward passes, with positions counted from the mask."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from xmodel_steer.models.bridges import own_parts
from xmodel_steer.models.facts import device_of, is_bridge
from xmodel_steer.models.hooking import LOCK, block
from xmodel_steer.models.identity import processing_of


@dataclass(frozen=True, eq=False)
class Layout:
    """The texts of a forward pass; see `layout`."""

    rows: tuple[int, ...]
    prompt_lengths: Int[Tensor, " batch"] | None
    decoding: bool


LAYOUT: ContextVar[Layout | None] = ContextVar("xmodel_steer_layout", default=None)
#: The module that `forward` is calling, and the mask of the whole text, cached tokens included.
READING: ContextVar[tuple[Any, Tensor] | None] = ContextVar("xmodel_steer_reading", default=None)


@contextmanager
def _within(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def reading(module: Any, mask: Int[Tensor, "batch total"]) -> AbstractContextManager[None]:
    """Tell steering hooks the whole text's mask, which not every model receives."""
    return _within(READING, (module, mask))


def layout(
    rows: Sequence[int], prompt_lengths: Tensor | None = None, *, decoding: bool = False
) -> AbstractContextManager[None]:
    """Tell steering hooks the rows' prompts and their numbers of real tokens.

    A hook sees neither: in an uncached decode every pass looks like a new prompt.

    Args:
        rows: Number of each row's prompt.
        prompt_lengths: Number of each prompt's real tokens.
        decoding: The pass reads one generated token of every row. Hooks need not look where the texts are then, which
            would make a GPU wait.
    """
    return _within(LAYOUT, Layout(tuple(rows), prompt_lengths, decoding))


@torch.no_grad()
def forward(
    model: Any,
    ids: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch total"],
    *,
    logits: Literal["none", "last", "all"] | int = "all",
    stop_at_layer: int | None = None,
    cache: Any = None,
    use_cache: bool = False,
) -> tuple[Tensor | None, Any]:
    """Run one forward pass of a model, with positions counted from the mask.

    Args:
        model: A TransformerLens model.
        ids: The new tokens.
        mask: 1 at real tokens, over cached and new ones.
        logits: The logits to compute, or a number of last tokens: Gemma's logits cost twice its whole residual
            stream.
        stop_at_layer: Run blocks below this one only; implies no logits.
        cache: The cache that an earlier call with ``use_cache`` returned.
        use_cache: Keep keys and values for a next call.

    Returns:
        Logits ``(batch, positions, vocabulary)`` or None, and the cache or None.
    """
    new = ids.shape[1]
    kept = 1 if logits == "last" else logits if isinstance(logits, int) else 0
    nothing = logits == "none" or stop_at_layer is not None
    if not is_bridge(model):
        if use_cache and cache is None:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            cache = TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), len(ids))
        stop = model.cfg.n_layers if nothing and stop_at_layer is None else stop_at_layer
        with reading(model, mask):
            out = model(ids, attention_mask=mask[:, -new:], past_kv_cache=cache, stop_at_layer=stop)
        return (None if nothing else out[:, -kept:] if kept else out), cache
    if nothing and (use_cache or cache is not None):
        raise ValueError("forward: a pass that stops early has no cache")
    if nothing and (stop_at_layer is None or stop_at_layer >= model.cfg.n_layers):
        kept, stop_at_layer = 1, None  # no layer to stop at: skip the logits instead
    extra: dict[str, Any] = {"logits_to_keep": kept} if kept and _accepts(model, "logits_to_keep") else {}
    if _accepts(model, "position_ids"):
        extra["position_ids"] = text_positions(mask)[:, -new:]
    inner = model.original_model
    name = _cache_argument(inner)
    if cache is not None:
        extra[name] = cache
        if not counts_tokens(cache):
            extra["attention_mask"] = mask[:, -new:]  # a recurrent state needs no mask of the tokens before
    out = None
    with LOCK, _stopping(model, stop_at_layer), _short_cut(model), _rows_together(model), reading(inner, mask):
        out = inner(**{"input_ids": ids, "attention_mask": mask, "use_cache": use_cache, "return_dict": True, **extra})
    if nothing or out is None:
        return None, None
    return out.logits[:, -kept:] if kept else out.logits, getattr(out, name) if use_cache else None


#: Names that models give their cache, newest first: transformers since 5.24 and before, Mamba, RWKV.
CACHES = ("cache", "past_key_values", "cache_params", "state")


def _cache_argument(inner: Any) -> str:
    """Find the newest name under which a model takes its cache."""
    accepted = _parameters(type(inner))
    return next((name for name in CACHES if name in accepted), CACHES[0])


def counts_tokens(cache: Any) -> bool:
    """Tell whether a cache knows its number of tokens; a recurrent state does not."""
    try:
        return int(cache.get_seq_length()) >= 0
    except (AttributeError, ValueError, TypeError):
        return False


def keep_rows(cache: Any, rows: Int[Tensor, " kept"]) -> None:
    """Remove all but some rows of the batch from a cache, in place.

    Args:
        cache: A cache from `forward` of a model whose rows may leave (`Conduct.dropping`), or None.
        rows: Numbers of the rows to keep, in their new order.
    """
    if cache is None:
        return
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(rows)
        return
    for entry in cache.entries:
        entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
    cache.previous_attention_mask = cache.previous_attention_mask[rows]


def text_positions(mask: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Count positions from each row's first real token; 0 on padding before it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _short_cut(model: Any) -> AbstractContextManager[None]:
    return own_parts(model) if processing_of(model) == "none" else nullcontext()


class _StopError(Exception):
    """The pass has reached the block where it ends."""


@contextmanager
def _stopping(model: Any, layer: int | None) -> Iterator[None]:
    """End this context's pass before a block runs.

    TransformerLens' ``stop_at_layer`` marks the blocks, and so ends other threads' passes too.
    """
    if layer is None:
        yield
        return
    with block() as entered:

        def stop(*_: Any) -> None:
            if entered.here:
                raise _StopError

        handle = model.blocks[layer].register_forward_pre_hook(stop)
        try:
            yield
        except _StopError:
            pass
        finally:
            handle.remove()


@contextmanager
def _rows_together(model: Any) -> Iterator[None]:
    """Give the output layer rows that are contiguous in memory.

    For a slice of the positions, torch multiplies each prompt with its own copy of weights without gradient: thirty
    times slower, and 20 GB for a large vocabulary.
    """
    head = model.original_model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (*(a.contiguous() for a in args[:1]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _accepts(model: Any, argument: str) -> bool:
    return argument in _parameters(type(model.original_model))


@lru_cache
def _parameters(kind: type) -> frozenset[str]:
    """Return the argument names of a forward pass, for every step of a decode."""
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]

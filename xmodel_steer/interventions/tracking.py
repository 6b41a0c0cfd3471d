"""The text position of every row that passes a hook."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import SiteError
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Reading
from xmodel_steer.models.hooking import Block
from xmodel_steer.models.passes import CACHES, LAYOUT, READING, counts_tokens


@dataclass
class Pass:
    """The texts of the running forward pass; set before it by a pre-hook."""

    position: Tensor  # text position of each new token, -1 at padding: (batch, new)
    prompt_lengths: Tensor  # (batch, 1)
    rows: tuple[int, ...] | None
    ids: Tensor  # the new tokens
    decoding: bool  # one generated token of every row


class Tracker:
    """The text positions of each forward pass, derived from its mask and cache.

    All that it knows of a pass is kept in the block's memory, which each thread and task has for itself.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.passes = 0
        self.foreign = 0  # passes of other contexts

    @property
    def now(self) -> Pass | None:
        """The running pass of this context."""
        return self.block.recall("pass")

    @contextmanager
    def generating(self, prompts: Tensor | None) -> Iterator[None]:
        """Tell the prompts ``(number, width)`` of Hugging Face's generate while it runs."""
        self.block.remember("prompts", None if prompts is None else (prompts.shape[0], prompts.shape[1]))
        try:
            yield
        finally:
            self.block.remember("prompts", None)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Describe the pass that begins: a forward pre-hook of the called model.

        PyTorch leaves out ``kwargs`` in a pass of another thread where the hook is removed meanwhile.
        """
        if not self.block.here or kwargs is None:
            self.foreign += 1
            return
        # 1. Find the new tokens in the call.
        arguments = self._arguments(module, args, kwargs)
        inputs = (arguments.get("input_ids"), arguments.get("inputs_embeds"), arguments.get("input"))
        ids = next((v for v in inputs if isinstance(v, Tensor)), None)
        self.block.remember("pass", None)
        if ids is None:
            return
        if ids.ndim == 1:  # TransformerLens takes a bare row of tokens
            ids = ids[None]
        batch, new = ids.shape[:2]
        # 2. Make the mask of the whole text: `forward` provides it; otherwise the call's mask, after that of the cache.
        called, whole = READING.get() or (None, None)
        mask = whole if called is module else arguments.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, new, dtype=torch.long, device=ids.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise SiteError(
                f"steering: needs an attention mask of shape (batch, tokens) to know text positions, got {shape}; "
                "pass such a mask, and leave generate its default cache (a static one makes other masks)"
            )
        if mask.shape[1] == new and called is not module:
            mask = torch.cat([_past_mask(arguments, batch, ids.device).to(mask), mask], 1)
        mask = mask.long()
        # 3. Count positions over real tokens.
        position = torch.where(mask.bool(), mask.cumsum(1) - 1, -1)[:, -new:]
        # 4. Find where each prompt ends, from the best source there is.
        known = LAYOUT.get()
        if known is not None and len(known.rows) != batch:  # of another pass
            known = None
        lengths = self.block.recall("prompt lengths")  # of the last pass, which a pass with a cache continues
        generated = self.block.recall("prompts")
        if known is not None and known.prompt_lengths is not None:  # xs.generate, capture and others state it
            lengths = known.prompt_lengths.to(ids.device)
        elif generated is not None:  # Hugging Face's generate pads on the left: a chunk's unread rest is real
            width = generated[1]
            lengths = mask[:, :width].sum(1) + max(0, width - mask.shape[1])
        elif mask.shape[1] == new:  # no cache: the whole text is the prompt
            lengths = mask.sum(1)
        elif lengths is None or len(lengths) != batch:  # the cache comes from outside this block
            lengths = mask[:, :-new].sum(1)
        self.block.remember("prompt lengths", lengths)
        # 5. Name each row's prompt; Hugging Face's generate keeps the beams and samples of a prompt together.
        rows = known.rows if known else None
        if rows is None and generated is not None:
            rows = tuple(row * generated[0] // batch for row in range(batch))
        decoding = known is not None and known.decoding
        self.block.remember("pass", Pass(position, lengths[:, None], rows, ids, decoding))
        self.passes += 1

    @staticmethod
    def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Bind the arguments of a call to their names."""
        if not args:
            return kwargs
        signature = inspect.signature(module.forward)
        bound = signature.bind_partial(*args, **kwargs)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        return {**bound.arguments, **bound.arguments.get(rest, {})}

    def after(self, *_: Any) -> None:
        """Forget the pass that has ended: a forward hook."""
        self.block.remember("pass", None)

    def reading(self) -> Reading:
        """Return the running pass's tokens."""
        now = self.now
        assert now is not None
        if now.ids.ndim != 2:
            raise SiteError("steering: a replacement needs token ids to know the text, got embeddings")
        return Reading(now.ids, now.position, now.rows, self.block)

    def running(self, like: Tensor) -> tuple[Pass, tuple[int, ...]]:
        """Return the running pass, and each row's prompt (its index if unknown)."""
        now = self.now
        if now is None or now.position.shape != like.shape[:2]:
            raise SiteError(
                "steering: a forward pass bypassed the model's own call, so that text positions are unknown; "
                "call the model itself, or xs.generate"
            )
        return now, tuple(range(len(now.position))) if now.rows is None else now.rows

    def selected(self, positions: Positions, prompts: frozenset[int] | None, like: Tensor) -> Tensor | bool:
        """Select the new tokens at some positions of some prompts.

        Returns:
            Boolean ``(batch, new)``; False where that is none, and in a decode True where it is every token.
        """
        now, rows = self.running(like)
        if now.decoding and not isinstance(positions, Tensor):
            names = {positions} if isinstance(positions, str) else set(positions)
            if names.isdisjoint(("all", "generated")) or (prompts is not None and prompts.isdisjoint(rows)):
                return False
            return True if prompts is None or prompts.issuperset(rows) else self._among(prompts, rows, like.device)
        place, length = now.position.to(like.device), now.prompt_lengths.to(like.device)
        real = place >= 0
        if prompts is not None:
            real &= self._among(prompts, rows, like.device)
        if isinstance(positions, Tensor):
            mask = positions.to(like.device)
            if mask.ndim == 2:
                if max(rows) >= len(mask):
                    raise ValueError(f"positions: the mask has {len(mask)} rows, prompt {max(rows)} has none")
                mask = mask[torch.tensor(rows, device=like.device)]
            else:
                mask = mask.expand(len(place), -1)
            inside = real & (place < mask.shape[1])
            chosen = inside & mask.gather(1, place.clamp(0, mask.shape[1] - 1))
        else:
            chosen = torch.zeros_like(real)
            for name in (positions,) if isinstance(positions, str) else positions:
                chosen |= {
                    "all": real,
                    "prompt": real & (place < length),
                    "generated": real & (place >= length),
                    "last": real & (place == length - 1),
                }[name]
        return chosen if bool(chosen.any()) else False

    def _among(self, prompts: frozenset[int], rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Tell which rows are of some prompts, once for all their passes: ``(batch, 1)``."""
        made = self.block.recall(prompts)
        if made is None or made[:2] != (rows, device):
            made = (rows, device, torch.tensor([row in prompts for row in rows], device=device)[:, None])
            self.block.remember(prompts, made)
        return made[2]

    def shares(self, table: Tensor) -> Tensor:
        """Look up each new token's share of the change in a schedule: ``(batch, new)``."""
        now = self.now
        assert now is not None
        step = (now.position - now.prompt_lengths).to(table.device)
        return torch.where(step < 0, 1.0, table[step.clamp(0, len(table) - 1)])


def _past_mask(arguments: dict[str, Any], batch: int, device: torch.device) -> Tensor:
    """Find the mask of the cached tokens in the arguments of a call.

    Raises:
        SiteError: A cache holds earlier tokens and does not count them.
    """
    if arguments.get("past_kv_cache") is not None:  # HookedTransformer's
        return arguments["past_kv_cache"].previous_attention_mask
    length = 0
    for name, value in arguments.items():
        if value is None or not (name in _CACHE_NAMES or hasattr(value, "get_seq_length")):
            continue
        if counts_tokens(value):
            length = max(length, int(value.get_seq_length()))
        elif not _is_empty(value):
            raise SiteError(
                f"steering: cannot tell how many tokens the {type(value).__name__} passed as {name}= holds; pass "
                "an attention mask over the whole text, one of transformers' caches that count tokens, or use xs.generate"
            )
    return torch.ones(batch, length, dtype=torch.long, device=device)


#: Arguments of these names hold earlier tokens.
_CACHE_NAMES = {*CACHES, "past_key_value", "past", "layer_past", "mems", "memory", "inference_params"}


def _is_empty(cache: Any) -> bool:
    """Tell whether a cache that does not count tokens has read none."""
    if isinstance(cache, tuple | list | dict):
        return len(cache) == 0
    try:
        return not cache.has_previous_state()
    except (AttributeError, ValueError, TypeError):
        return False

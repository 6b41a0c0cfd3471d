"""Greedy (or sampled) continuation of prompts, batched, the same as one at a time."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from xmodel_steer.errors import PromptError
from xmodel_steer.models import Batch, batches, context_length, encode, forward, layout, name_of, pad_id, tokenizer_of
from xmodel_steer.prompts import PromptLike, as_prompts
from xmodel_steer.vectors import check_finite


def generate(
    model: Any,
    prompts: Iterable[PromptLike],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    use_cache: bool = True,
    progress: bool = True,
) -> list[str]:
    """Continue prompts; inside `steering`, steered.

    Decoding is plain greedy unless a temperature is given: nothing is read from the model's
    generation settings, where repetition penalties and sampling hide.

    Args:
        model: A TransformerLens model.
        prompts: Strings, lists of chat messages, or prompts.
        max_new_tokens: Number of tokens to add.
        batch_size: Prompts at a time; greedy output in float32 does not depend on it. In bfloat16
            rounding differs between batch shapes, and near-ties may fall otherwise.
        temperature: 0 for greedy; else logits are divided by it and tokens sampled.
        seed: Seed of the sampling; each prompt has its own generator, so that its sample does not
            depend on the batch.
        stop_at_eos: End a text at the model's end-of-sequence token.
        use_cache: Keep keys and values between steps; without it every step reads the whole text
            again (slow, for checking).
        progress: Show a progress bar when it takes over two seconds.

    Returns:
        For each prompt, in order, the added text without special tokens.

    Raises:
        PromptError: There are no prompts, or prompt and new tokens exceed the context.
    """
    ids, prompt_ids = generate_tokens(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        stop_at_eos=stop_at_eos,
        use_cache=use_cache,
        progress=progress,
    )
    tokenizer = tokenizer_of(model)
    texts = []
    for before, after in zip(prompt_ids, ids, strict=True):
        # Some tokenizers drop the first token's leading space: decode with the prompt, cut it off.
        start = tokenizer.decode(before, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        whole = tokenizer.decode(before + after, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(whole[len(start) :])
    return texts


def generate_tokens(
    model: Any,
    prompts: Iterable[PromptLike],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    use_cache: bool = True,
    progress: bool = True,
) -> tuple[list[list[int]], list[list[int]]]:
    """As `generate`, but gives token ids: those added, and those of the prompts."""
    items = as_prompts(prompts)
    if not items:
        raise PromptError("generate: no prompts were given")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    encodings = encode(model, items)
    longest = max(encodings, key=lambda e: len(e.ids))
    if len(longest.ids) + max_new_tokens > context_length(model):
        raise PromptError(
            f"prompt {longest.prompt.id}: {len(longest.ids)} tokens and {max_new_tokens} new ones exceed the "
            f"{context_length(model)} that {name_of(model)} reads; shorten the prompt or max_new_tokens"
        )
    stops = _stop_ids(model) if stop_at_eos else frozenset()
    added: list[list[int]] = [[] for _ in items]
    with tqdm(total=len(items), unit="prompt", desc=f"generate {name_of(model)}", disable=not progress, delay=2) as bar:
        for batch in batches(model, encodings, batch_size, padding_side="left"):
            generators = [torch.Generator().manual_seed(seed + row) for row in batch.rows]
            new = _decode(model, batch, max_new_tokens, temperature, generators, stops, use_cache)
            for row, tokens in zip(batch.rows, new, strict=True):
                added[row] = tokens
            bar.update(len(batch.rows))
    return added, [list(e.ids) for e in encodings]


def _stop_ids(model: Any) -> frozenset[int]:
    """End-of-sequence tokens, of the tokenizer and of the model's generation settings."""
    inner = getattr(model, "original_model", None)
    own = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return frozenset(i for i in (*ids, tokenizer_of(model).eos_token_id) if i is not None)


@torch.no_grad()
def _decode(
    model: Any,
    batch: Batch,
    steps: int,
    temperature: float,
    generators: Sequence[torch.Generator],
    stops: frozenset[int],
    use_cache: bool,
) -> list[list[int]]:
    ids, mask, cache = batch.ids, batch.mask, None
    made: list[list[int]] = [[] for _ in batch.rows]
    running = [True] * len(made)
    fresh = ids
    with layout(batch.rows, batch.mask.sum(-1)):
        for _ in range(steps):
            logits, cache = forward(model, fresh, mask, logits="last", cache=cache, use_cache=use_cache)
            assert logits is not None
            chosen = _choose(logits[:, -1], temperature, generators)
            for row, token in enumerate(chosen.tolist()):
                if running[row] and token not in stops:
                    made[row].append(token)
                else:
                    running[row] = False
                    chosen[row] = pad_id(model)
            if not any(running):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            ids = torch.cat([ids, chosen[:, None]], 1)
            fresh = chosen[:, None] if use_cache else ids
    return made


def _choose(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    # max gives argmax's index, four times faster in bfloat16; NaN is the largest of all to it.
    highest, top = logits.max(-1)
    check_finite(highest, "generate: logits")
    if temperature <= 0:
        return top
    shares = (logits.float() / temperature).softmax(-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(shares, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)

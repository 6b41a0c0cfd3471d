"""Greedy (or sampled) continuation of prompts, batched, the same as one at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.bars import progress_bar, with_progress
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import PromptLike
from xmodel_steer.models.arguments import require_counts, require_number
from xmodel_steer.models.batching import Batch, batches, encode
from xmodel_steer.models.facts import conduct_of, context_length, name_of, tokenizer_of
from xmodel_steer.models.passes import forward, keep_rows, layout
from xmodel_steer.models.shortage import memory_errors
from xmodel_steer.models.tokens import Encoding

LOOK = 8  # steps between two looks at the tokens on a GPU
GOING = 0.75  # finished texts leave a batch when this share of its texts, or less, is unfinished


@with_progress
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

    Decoding is greedy unless a temperature is given. The model's generation settings, which may hold repetition
    penalties and sampling, are not read.

    Args:
        model: A TransformerLens model.
        prompts: Strings, lists of chat messages, or prompts.
        max_new_tokens: Number of tokens to add.
        batch_size: Prompts at a time; greedy output in float32 does not depend on it. In bfloat16 rounding differs
            between batch shapes, which may change near-ties.
        temperature: 0 for greedy; else the divisor of the logits before sampling.
        seed: Seed of the sampling; each prompt has a generator, so that its sample does not depend on the batch.
        stop_at_eos: End a text at the model's end-of-sequence token.
        use_cache: Keep keys and values between steps; without it every step reads the whole text again (slow, for
            checking). A model that failed with a cache when it was loaded never gets one.
        progress: Show progress bars; see `quiet`.

    Returns:
        The added text of each prompt, in order, without special tokens.

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
    )
    tokenizer = tokenizer_of(model)
    return [_added_text(tokenizer, before, after) for before, after in zip(prompt_ids, ids, strict=True)]


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
) -> tuple[list[list[int]], list[list[int]]]:
    """Continue prompts as `generate` does; return the added token ids and the prompts'."""
    require_counts(batch_size=batch_size)
    require_number(temperature=temperature, seed=seed)
    encodings = _encoded(model, prompts, max_new_tokens)
    stops = _stop_ids(model) if stop_at_eos else frozenset()
    added: list[list[int]] = [[] for _ in encodings]
    total = len(encodings)
    with progress_bar(total=total, unit="prompt", desc=f"generate {name_of(model)}") as bar:
        for batch in batches(model, encodings, batch_size, padding_side="left"):
            generators = [_generator(seed, row) for row in batch.rows]
            # Samples are drawn on the processor, so that every step waits anyway.
            look = 1 if batch.ids.device.type == "cpu" or temperature > 0 else LOOK
            for chosen, _ in _decode(model, batch, max_new_tokens, temperature, generators, stops, use_cache, look):
                for row, tokens in zip(batch.rows, chosen, strict=True):
                    added[row] += tokens
            bar.update(len(batch.rows))
    return added, [list(e.ids) for e in encodings]


def _generator(seed: int, row: int) -> torch.Generator:
    """Make the random generator of one prompt and one seed."""
    state = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)


@dataclass(frozen=True, eq=False)
class Written:
    """A continuation after one more forward pass.

    Args:
        text: The text added so far, as `generate` would return it; its last character may be a replacement character
            while some of its bytes are missing.
        logits: The logits that the newest token was chosen from.
    """

    text: str
    logits: Float[Tensor, " vocabulary"]


def stream(model: Any, prompt: PromptLike, *, max_new_tokens: int = 64) -> Iterator[Written]:
    """Continue one prompt greedily, token by token; the last text is that of `generate`.

    Between two tokens the model and the context are as before: a steered stream enters `steering` anew for each
    token, so that other callers find the model unsteered.

    Args:
        model: A TransformerLens model.
        prompt: A string, a list of chat messages, or a prompt.
        max_new_tokens: Number of tokens to add.

    Yields:
        The text so far, after every forward pass, also after the one that only ends the text.

    Raises:
        PromptError: The prompt cannot be used, or exceeds the context with the new tokens.
    """
    (encoding,) = encodings = _encoded(model, [prompt], max_new_tokens)
    (batch,) = batches(model, encodings, 1, padding_side="left")
    before, after = list(encoding.ids), []
    for (tokens,), logits in _decode(model, batch, max_new_tokens, 0.0, (), _stop_ids(model), use_cache=True):
        after += tokens
        yield Written(_added_text(tokenizer_of(model), before, after), logits[0])


def _encoded(model: Any, prompts: Any, max_new_tokens: Any) -> list[Encoding]:
    """Tokenise prompts; refuse one that leaves no room for the new tokens."""
    require_counts(max_new_tokens=max_new_tokens)
    items = as_prompts(prompts)
    if not items:
        raise PromptError("generate: no prompts were given")
    encodings = encode(model, items)
    longest = max(encodings, key=lambda e: len(e.ids))
    if len(longest.ids) + max_new_tokens > context_length(model):
        raise PromptError(
            f"prompt {longest.prompt.id}: {len(longest.ids)} tokens and {max_new_tokens} new ones exceed the "
            f"{context_length(model)} that {name_of(model)} reads; shorten the prompt or max_new_tokens"
        )
    return encodings


def _added_text(tokenizer: Any, before: list[int], after: list[int]) -> str:
    # Some tokenizers drop the first token's leading space: decode with the prompt, then cut that off.
    start = tokenizer.decode(before, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(before + after, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return whole[len(start) :]


def _stop_ids(model: Any) -> frozenset[int]:
    """Collect end-of-sequence tokens of the tokenizer and the generation settings."""
    inner = getattr(model, "original_model", None)
    ends = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    ids = ends if isinstance(ends, list) else [ends]
    return frozenset(i for i in (*ids, tokenizer_of(model).eos_token_id) if i is not None)


def _decode(
    model: Any,
    batch: Batch,
    steps: int,
    temperature: float,
    generators: Sequence[torch.Generator],
    stops: frozenset[int],
    use_cache: bool,
    look: int = 1,
) -> Iterator[tuple[list[list[int]], Tensor]]:
    """Yield each row's new tokens, and the last logits of those running.

    Tokens are looked at after so many steps: a look waits for the device. Further tokens of a row whose text has ended
    are left out. Such rows leave the batch once they are a quarter of it, if the model's cache allows that: answers
    differ in length, and the longest one would otherwise cost as much as a full batch.
    """
    conduct = conduct_of(model)
    use_cache = use_cache and conduct.cached
    ids, cache, lengths, width = batch.ids, None, batch.mask.sum(-1), batch.mask.shape[1]
    mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), steps)], 1)
    present = list(range(len(batch.rows)))  # numbers of the rows that are still in the batch
    running = [True] * len(present)  # by row: its text has not ended
    fresh = ids  # the tokens that the model reads next
    unseen: list[tuple[Tensor, Tensor]] = []  # tokens that nobody has looked at, with their logits
    for step in range(steps):
        read = mask[:, : width + step]
        told = layout([batch.rows[row] for row in present], lengths, decoding=use_cache and step > 0)
        # The layout ends before each yield: a generator shares its caller's context.
        with memory_errors(model, *read.shape), told:
            logits, cache = forward(model, fresh, read, logits="last", cache=cache, use_cache=use_cache)
        assert logits is not None
        highest, chosen = _choose(logits[:, -1], temperature, [generators[r] for r in present] if generators else ())
        unseen.append((highest, chosen))
        if (step + 1) % look == 0 or step + 1 == steps:
            added: list[list[int]] = [[] for _ in running]
            check_finite(torch.stack([value for value, _ in unseen], 1), "generate: logits")
            for row, tokens in zip(present, torch.stack([token for _, token in unseen], 1).tolist(), strict=True):
                for token in tokens:
                    running[row] = running[row] and token not in stops
                    added[row] += [token] if running[row] else []
            unseen = []
            yield added, logits[:, -1]
            going = [place for place, row in enumerate(present) if running[row]]
            if not going:
                return
            if len(going) <= GOING * len(present) and (conduct.dropping or not use_cache):
                kept = torch.tensor(going, device=ids.device)
                keep_rows(cache, kept)
                ids, mask, lengths, chosen = ids[kept], mask[kept], lengths[kept], chosen[kept]
                present = [present[place] for place in going]
        fresh = chosen[:, None]
        if not use_cache:
            fresh = ids = torch.cat([ids, fresh], 1)


def _choose(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Choose each row's token, and return its highest logit, where NaN is highest, too."""
    # max returns argmax's index, four times faster in bfloat16, and treats NaN as the largest value.
    highest, top = logits.max(-1)
    if temperature <= 0:
        return highest, top
    check_finite(highest, "generate: logits")
    shares = (logits.float() / temperature).softmax(-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(shares, generators, strict=True)]
    return highest, torch.cat(drawn).to(logits.device)

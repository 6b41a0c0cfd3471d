"""Reading the residual stream: activations of prompts, and paired moments of two models."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from xmodel_steer.alignment import Alignment, align, check_coverage
from xmodel_steer.errors import ModelError, PromptError, SiteError
from xmodel_steer.models import (
    Batch,
    Encoding,
    batches,
    dtype_of,
    encode,
    forward,
    layout,
    name_of,
    space_of,
)
from xmodel_steer.moments import Moments, MomentsAccumulator, part_of
from xmodel_steer.prompts import Prompt, PromptLike, as_prompts
from xmodel_steer.spaces import Site
from xmodel_steer.vectors import Activations, check_finite

Tokens = Literal["last", "mean", "all"] | tuple[int, int]


@contextmanager
def recording(model: Any, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Inside the block, forward passes leave the residual stream at the sites in the dictionary.

    Raises:
        SiteError: On leaving, when a site did not fire.
    """
    kept: dict[Site, Tensor] = {}

    def hook(site: Site) -> Any:
        def read(value: Tensor, hook: Any) -> None:
            kept[site] = value.detach()

        return read

    for site in sites:
        space_of(model, site)  # refuses a layer that is not there
    with model.hooks(fwd_hooks=[(site.hook_name, hook(site)) for site in sites]):
        yield kept
    silent = [str(site) for site in sites if site not in kept]
    if silent:
        raise SiteError(f"{name_of(model)}: {', '.join(silent)} did not fire")


def residuals(model: Any, batch: Batch, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "batch tokens d"]]:
    """The residual stream at several sites for one batch, from one pass that stops at the deepest."""
    with recording(model, sites) as kept, layout(batch.rows, batch.mask.sum(-1)):
        forward(model, batch.ids, batch.mask, logits="none", stop_at_layer=max(site.layer for site in sites) + 1)
    return dict(kept)


def capture(
    model: Any,
    prompts: Iterable[PromptLike],
    sites: Sequence[Site],
    *,
    tokens: Tokens = "last",
    batch_size: int = 16,
    padding_side: str = "right",
    include_special: bool = False,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[Site, Activations]:
    """Activations of prompts at several sites, from one pass that computes no logits.

    Equal to Hugging Face's ``output_hidden_states`` for every layer but the last, which Hugging
    Face gives after the final norm and this function before it, as the block leaves it.

    Args:
        model: A TransformerLens model.
        prompts: Strings, lists of chat messages, or prompts.
        sites: Where to read.
        tokens: ``"last"``: the last token of each prompt, template included. ``"mean"``: the
            mean over its content's tokens. ``"all"``: one row per token of its content.
            ``(start, end)``: one row per token that ends on a character of that span of the
            content, end not included.
        batch_size: Prompts per forward pass.
        padding_side: ``"right"`` or ``"left"``; the result is the same.
        include_special: For ``"mean"`` and ``"all"``, also count special and template tokens and
            text position 0, an attention sink whose norm dwarfs the others.
        max_tokens: Cut longer prompts; without it one longer than the context is refused.
        progress: Show a progress bar when it takes over two seconds.

    Returns:
        For each site its activations, prompts in the order given, on the CPU, in the model's dtype
        (means in float32 or wider).

    Raises:
        PromptError: There are no prompts, one is too long, or one has no token to read.
        SiteError: The model has no such site.
        NonFiniteError: An activation is NaN or infinite.
    """
    items = as_prompts(prompts)
    if not items:
        raise PromptError("capture: no prompts were given")
    if not sites:
        raise ValueError("capture: give at least one site, such as xs.Site(10)")
    encodings = encode(model, items, max_tokens=max_tokens)
    chosen = [_positions(e, tokens, include_special) for e in encodings]
    rows: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(items) for site in sites}
    total = sum(len(e.ids) for e in encodings)
    with tqdm(total=total, unit="tok", desc=f"capture {name_of(model)}", disable=not progress, delay=2) as bar:
        for batch in batches(model, encodings, batch_size, padding_side=padding_side):
            streams = residuals(model, batch, sites)
            for site, stream in streams.items():
                for r, i in enumerate(batch.rows):
                    own = stream[r][batch.mask[r].bool()][torch.tensor(chosen[i], device=stream.device)]
                    if tokens == "mean":
                        own = own.to(torch.promote_types(own.dtype, torch.float32)).mean(0, keepdim=True)
                    rows[site][i] = own.cpu()
            bar.update(int(batch.mask.sum()))
    labels = tuple(
        (e.prompt.id, e.ends[p])
        for e, positions in zip(encodings, chosen, strict=True)
        for p in (positions[-1:] if tokens == "mean" else positions)
    )
    made = {}
    for site, parts in rows.items():
        values = torch.cat(parts)
        check_finite(values, f"capture {name_of(model)} {site} ({dtype_of(model)})")
        made[site] = Activations(values, space_of(model, site), labels)
    return made


def _positions(encoding: Encoding, tokens: Tokens, include_special: bool) -> list[int]:
    """Token positions of one prompt that ``tokens`` asks for."""
    count = len(encoding.ids)
    if tokens == "last":
        return [count - 1]
    ends = encoding.token_ends(include_special=include_special).ends
    if tokens in ("mean", "all"):
        found = list(range(count)) if include_special else [i for i in range(count) if ends[i] >= 0]
        lacks = "a token besides special ones and text position 0; pass include_special=True or a longer prompt"
    elif isinstance(tokens, tuple) and len(tokens) == 2:
        start, end = tokens
        found = [i for i in range(count) if start < encoding.ends[i] <= end]
        lacks = f"a token that ends within characters {start} to {end}"
    else:
        raise ValueError(f"tokens must be 'last', 'mean', 'all' or a (start, end) span of characters, got {tokens!r}")
    if not found:
        raise PromptError(
            f"prompt {encoding.prompt.id} ({encoding.prompt.content_key()[:60]!r}) has no {lacks.replace('a token', 'token', 1)}"
        )
    return found


def _windows(texts: Iterable[PromptLike], size: int) -> Iterator[tuple[Prompt, ...]]:
    iterator = iter(texts)
    while window := as_prompts(list(itertools.islice(iterator, size))):
        yield window


def collect_moments(
    source: Any,
    target: Any,
    texts: Iterable[PromptLike],
    *,
    source_sites: Sequence[Site],
    target_sites: Sequence[Site],
    pairs: Sequence[tuple[Site, Site]] | None = None,
    max_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Moments:
    """Moments of paired activations of two models over general text, in one pass.

    Positions pair by the character that their tokens end on. Special tokens, chat template and
    text position 0 stay out. Memory does not depend on the length of the text.

    Args:
        source: The model to map from.
        target: The model to map to.
        texts: Documents; any iterable, read once.
        source_sites: Sites of the source.
        target_sites: Sites of the target.
        pairs: Layer pairs to keep cross moments of; every combination by default.
        max_tokens: Longer documents are cut to this many tokens in each model.
        batch_size: Documents per forward pass.
        seed: Seed of the split into parts and of the shuffled control.
        progress: Show a progress bar when it takes over two seconds.

    Raises:
        PromptError: There are no documents.
        AlignmentError: Under 20 % of the tokens pair.
        NonFiniteError: An activation is NaN or infinite.
    """
    if isinstance(texts, (str, Prompt)):
        raise PromptError("collect_moments: give a list of texts; for a single one, [text]")
    wanted = tuple(pairs) if pairs is not None else tuple(itertools.product(source_sites, target_sites))
    sources = tuple(dict.fromkeys(s for s, _ in wanted))
    targets = tuple(dict.fromkeys(t for _, t in wanted))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not wanted:
        raise ValueError("collect_moments: give at least one source site and one target site")
    for model in (source, target):
        if max_tokens > int(model.cfg.n_ctx):
            raise ModelError(f"collect_moments: max_tokens {max_tokens} is over the context of {name_of(model)}")
    accumulator = MomentsAccumulator(
        {s: space_of(source, s) for s in sources},
        {t: space_of(target, t) for t in targets},
        wanted,
        settings={"max_tokens": max_tokens, "seed": seed},
        seed=seed,
    )
    total = 2 * len(texts) if isinstance(texts, Sequence) else None
    title = f"moments {name_of(source)} → {name_of(target)}"
    seen = False
    with tqdm(total=total, unit="text", desc=f"{title}, each text in both", disable=not progress) as bar:
        for window in _windows(texts, 8 * batch_size):  # sorting by length within it saves padding
            seen = True
            own, other = (encode(model, window, max_tokens=max_tokens) for model in (source, target))
            aligned = [align(a.token_ends(), b.token_ends()) for a, b in zip(own, other, strict=True)]
            _accumulate(
                accumulator,
                window,
                aligned,
                _paired_rows(source, own, sources, [a.source for a in aligned], batch_size, bar),
                _paired_rows(target, other, targets, [a.target for a in aligned], batch_size, bar),
                seed,
            )
    if not seen:
        raise PromptError("collect_moments: no texts were given")
    moments = accumulator.moments()
    check_coverage(moments.paired, moments.eligible)
    return moments


def _paired_rows(
    model: Any,
    encodings: Sequence[Encoding],
    sites: Sequence[Site],
    positions: Sequence[tuple[int, ...]],
    batch_size: int,
    bar: Any,
) -> list[Mapping[Site, Tensor]]:
    """For each document, the rows of one model at the paired positions, at each site."""
    rows: list[Mapping[Site, Tensor]] = [{}] * len(encodings)
    for batch in batches(model, encodings, batch_size):
        streams = residuals(model, batch, sites)
        for r, i in enumerate(batch.rows):
            place = torch.tensor(positions[i], dtype=torch.long)
            rows[i] = {site: stream[r][place.to(stream.device)].cpu() for site, stream in streams.items()}
        bar.update(len(batch.rows))
    return rows


def _accumulate(
    accumulator: MomentsAccumulator,
    window: Sequence[Prompt],
    aligned: Sequence[Alignment],
    source: Sequence[Mapping[Site, Tensor]],
    target: Sequence[Mapping[Site, Tensor]],
    seed: int,
) -> None:
    parts: dict[str, list[int]] = {}
    for i, prompt in enumerate(window):
        parts.setdefault(part_of(prompt.content_key(), seed=seed), []).append(i)
    for part, members in parts.items():
        accumulator.add(
            part,
            {site: torch.cat([source[i][site] for i in members]) for site in source[0]},
            {site: torch.cat([target[i][site] for i in members]) for site in target[0]},
            [i for i in members for _ in range(len(aligned[i]))],
            eligible=sum(aligned[i].eligible for i in members),
        )

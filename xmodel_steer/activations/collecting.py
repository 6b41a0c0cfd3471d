"""Reading the residual stream: activations of prompts, and paired moments of two models."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from xmodel_steer.core.alignment import Alignment, align, check_coverage
from xmodel_steer.core.errors import ModelError, PromptError, SiteError
from xmodel_steer.core.prompts import Prompt, Prompts, as_prompts, items_of, iter_prompts, text_digest
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import Activations, check_finite
from xmodel_steer.maps.moments import PARTS, Moments, MomentsAccumulator, part_of, sketch_dimensions
from xmodel_steer.models.forward import Batch, batches, dtype_of, encode, forward, layout, name_of, sites_of, space_of
from xmodel_steer.models.tokens import Encoding, warn_of_missing

Tokens = Literal["last", "mean", "all"] | tuple[int, int]


@contextmanager
def recording(model: Any, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Inside the block, forward passes leave the residual stream at the sites in the dictionary.

    Raises:
        SiteError: The model has no such site; or, on leaving, a site did not fire.
    """
    kept: dict[Site, Tensor] = {}

    def hook(site: Site) -> Any:
        def read(value: Tensor, hook: Any) -> None:
            kept[site] = value.detach()

        return read

    for site in sites:
        space_of(model, site)  # refuses a layer or stream that is not there
    with model.hooks(fwd_hooks=[(site.hook_name, hook(site)) for site in sites]):
        yield kept
    silent = [str(site) for site in sites if site not in kept]
    if silent:
        raise SiteError(
            f"{name_of(model)}: {', '.join(silent)} did not fire in a forward pass; choose another stream of the block"
        )


def residuals(model: Any, batch: Batch, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "batch tokens d"]]:
    """The residual stream at several sites for one batch, from one pass that stops at the deepest."""
    with recording(model, sites) as kept, layout(batch.rows, batch.mask.sum(-1)):
        forward(model, batch.ids, batch.mask, logits="none", stop_at_layer=max(site.layer for site in sites) + 1)
    return dict(kept)


def capture(
    model: Any,
    prompts: Prompts,
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
        prompts: Strings, lists of chat messages, prompts, or rows; see `as_prompts`.
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
                real = batch.mask.bool().to(stream.device)
                for r, i in enumerate(batch.rows):
                    own = stream[r][real[r]][torch.tensor(chosen[i], device=stream.device)]
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
        if not 0 <= start < end:  # special tokens end at -1
            raise ValueError(f"tokens: a span of characters must be (start, end) with 0 <= start < end, got {tokens!r}")
        found = [i for i in range(count) if start < encoding.ends[i] <= end]
        lacks = f"a token that ends within characters {start} to {end}"
    else:
        raise ValueError(f"tokens must be 'last', 'mean', 'all' or a (start, end) span of characters, got {tokens!r}")
    if not found:
        raise PromptError(
            f"prompt {encoding.prompt.id} ({encoding.prompt.content_key()[:60]!r}) has no {lacks.replace('a token', 'token', 1)}"
        )
    return found


#: Documents that are read together, at most, and their tokens. Sorting by length within them saves padding, and
#: the shuffled control pairs rows among them. The same at any batch size, so that the moments are, too.
WINDOW = 64
WINDOW_TOKENS = 16384


def require_shard(shard: tuple[int, int], what: str) -> tuple[int, int]:
    """Refuse a share of the text that is none."""
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"{what}: shard must be (i, n) with 0 <= i < n, got {shard}")
    return shard


def window_size(max_tokens: int) -> int:
    """How many documents are read together."""
    return max(4, min(WINDOW, WINDOW_TOKENS // max_tokens))


def windows(texts: Prompts, size: int) -> Iterator[tuple[Prompt, ...]]:
    """Documents, a few at a time, read once."""
    prompts = iter_prompts(texts, what="texts")
    while window := tuple(itertools.islice(prompts, size)):
        yield window


#: Bytes of cross moments up to which every layer pair is kept in full.
FULL_PAIRS_BYTES = 2 * 2**30
SKETCH = 64


def collect_moments(
    source: Any,
    target: Any,
    texts: Prompts,
    *,
    source_sites: Sequence[Site] | Literal["all"],
    target_sites: Sequence[Site] | Literal["all"],
    pairs: Sequence[tuple[Site, Site]] | None = None,
    sketch: int | None = None,
    shuffled: bool = True,
    max_tokens: int = 256,
    batch_size: int = 16,
    truncation_side: str = "right",
    template: bool = True,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Moments:
    """Moments of paired activations of two models over general text, in one pass.

    Positions pair by the character that their tokens end on, and in chat documents tokens of the
    template by their role. Other special tokens and text position 0 stay out. Memory does not
    depend on the length of the text.

    Args:
        source: The model to map from.
        target: The model to map to.
        texts: Documents, as `as_prompts` takes them; any iterable, read once.
        source_sites: Sites of the source; ``"all"``: after every block.
        target_sites: Sites of the target; ``"all"``: after every block.
        pairs: Layer pairs to keep full cross moments of, which maps are fitted on; by default every
            combination where they take no more than 2 GiB and no ``sketch`` is given, else none.
        sketch: Number of target dimensions, drawn by seed, to keep cross moments of for every
            combination of sites: enough for `layer_grid`. None without need; by default 64 where
            not every combination is kept in full and no pairs were named.
        shuffled: Keep the moments of the shuffled control for the full pairs.
        max_tokens: Longer documents are cut to this many tokens in each model.
        batch_size: Documents per forward pass.
        truncation_side: Where longer documents are cut, ``"right"`` or ``"left"``.
        template: Pair the tokens of chat templates that have the same role; see `align`.
        seed: Seed of the split into parts, of the sketch and of the shuffled control.
        shard: ``(i, n)``: read only every n-th window of up to 64 documents, from the i-th. The n shards
            merge to the moments of the whole.
        device: Where products are formed and kept; moments come back on the CPU.
        progress: Show a progress bar when it takes over two seconds.

    Raises:
        PromptError: There are no documents.
        AlignmentError: Under 20 % of the tokens pair.
        NonFiniteError: An activation is NaN or infinite.
    """
    if isinstance(texts, (str, Prompt)):
        raise PromptError("collect_moments: give a list of texts; for a single one, [text]")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    part, parts = require_shard(shard, "collect_moments")
    for model in (source, target):
        if max_tokens > int(model.cfg.n_ctx):
            raise ModelError(f"collect_moments: max_tokens {max_tokens} is over the context of {name_of(model)}")
    settings = {"max_tokens": max_tokens, "truncation_side": truncation_side, "template": template, "seed": seed}
    texts = items_of(texts, "collect_moments")
    if isinstance(texts, Sequence):
        texts = as_prompts(texts, what="collect_moments")  # what cannot be a prompt is refused before a model runs
        if parts > 1:  # shards of different texts must not merge
            settings["texts"] = text_digest(texts)
    plan = Plan.of(
        (int(source.cfg.d_model), int(target.cfg.d_model)),
        sites_of(source, source_sites),
        sites_of(target, target_sites),
        pairs,
        sketch,
        shuffled,
        seed,
    )
    accumulator = MomentsAccumulator(
        {s: space_of(source, s) for s in plan.sources},
        {t: space_of(target, t) for t in plan.targets},
        plan.pairs,
        sketch=plan.sketch,
        shuffled=shuffled,
        settings=settings,
        seed=seed,
        shard=f"{part}/{parts}" if parts > 1 else "",
        device=device,
    )
    total = 2 * len(texts) if isinstance(texts, Sequence) and parts == 1 else None
    title = f"moments {name_of(source)} → {name_of(target)}"
    seen, lacking = False, ([], [])
    with tqdm(total=total, unit="text", desc=f"{title}, each text in both", disable=not progress, delay=2) as bar:
        for number, window in enumerate(windows(texts, window_size(max_tokens))):
            seen = True
            if number % parts != part:
                continue
            own, other = (
                encode(model, window, max_tokens=max_tokens, truncation_side=truncation_side, warn=False)
                for model in (source, target)
            )
            for side, encodings in zip(lacking, (own, other), strict=True):
                side += [encoding for encoding in encodings if encoding.missing]
                del side[2:]  # the warning names one
            aligned = [
                align(a.token_ends(template=template), b.token_ends(template=template))
                for a, b in zip(own, other, strict=True)
            ]
            _accumulate(
                accumulator,
                window,
                number * window_size(max_tokens),
                aligned,
                rows_at(source, own, plan.sources, [a.source for a in aligned], batch_size, device, bar),
                rows_at(target, other, plan.targets, [a.target for a in aligned], batch_size, device, bar),
                seed,
            )
    if not seen:
        raise PromptError("collect_moments: no texts were given")
    for model, side in zip((source, target), lacking, strict=True):
        warn_of_missing(side, name_of(model))
    moments = accumulator.moments()
    if parts == 1 or moments.eligible:  # a shard may have got nothing
        check_coverage(moments.paired, moments.eligible)
    return moments


@dataclass(frozen=True)
class Plan:
    """Which moments to keep."""

    sources: tuple[Site, ...]
    targets: tuple[Site, ...]
    pairs: tuple[tuple[Site, Site], ...]
    sketch: tuple[int, ...]

    @classmethod
    def of(
        cls,
        widths: tuple[int, int],
        source_sites: Sequence[Site],
        target_sites: Sequence[Site],
        pairs: Sequence[tuple[Site, Site]] | None,
        sketch: int | None,
        shuffled: bool,
        seed: int,
    ) -> "Plan":
        """What `collect_moments` keeps of these sites."""
        every = tuple(itertools.product(dict.fromkeys(source_sites), dict.fromkeys(target_sites)))
        width = widths[1]
        if pairs is None:
            size = 8 * len(PARTS) * (1 + shuffled) * len(every) * widths[0] * width
            fits = size <= FULL_PAIRS_BYTES
            chosen = every if fits and not sketch else ()
            sketch = sketch if sketch is not None or fits else min(SKETCH, width)
        else:
            chosen = tuple(pairs)
        grid = every if sketch else ()
        if not chosen and not grid:
            raise ValueError("collect_moments: give at least one source site and one target site")
        return cls(
            tuple(dict.fromkeys(s for s, _ in (*grid, *chosen))),
            tuple(dict.fromkeys(t for _, t in (*grid, *chosen))),
            chosen,
            sketch_dimensions(width, sketch, seed=seed) if sketch else (),
        )


def rows_at(
    model: Any,
    encodings: Sequence[Encoding],
    sites: Sequence[Site],
    positions: Sequence[tuple[int, ...]],
    batch_size: int,
    device: str | torch.device = "cpu",
    bar: Any = None,
) -> list[Mapping[Site, Tensor]]:
    """For each document, the rows of one model at some positions, at each site.

    Args:
        model: A TransformerLens model.
        encodings: The documents.
        sites: Sites to read.
        positions: Token positions of each document.
        batch_size: Documents per forward pass.
        device: Where the rows go.
        bar: A progress bar, updated by documents.
    """
    rows: list[Mapping[Site, Tensor]] = [{}] * len(encodings)
    for batch in batches(model, encodings, batch_size):
        width = batch.ids.shape[1]
        flat = torch.tensor([r * width + p for r, i in enumerate(batch.rows) for p in positions[i]], dtype=torch.long)
        counts = [len(positions[i]) for i in batch.rows]
        pieces = {
            site: stream.reshape(-1, stream.shape[-1])[flat.to(stream.device)].to(device).split(counts)
            for site, stream in residuals(model, batch, sites).items()
        }
        for r, i in enumerate(batch.rows):
            rows[i] = {site: own[r] for site, own in pieces.items()}
        if bar is not None:
            bar.update(len(batch.rows))
    return rows


def _accumulate(
    accumulator: MomentsAccumulator,
    window: Sequence[Prompt],
    first: int,
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
            [first + i for i in members for _ in range(len(aligned[i]))],
            eligible=sum(aligned[i].eligible for i in members),
        )

"""Paired activations of two models, summed in one pass."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from xmodel_steer.core.alignment import Alignment, align, check_coverage
from xmodel_steer.core.bars import progress_bar, with_progress
from xmodel_steer.core.errors import ModelError, PromptError
from xmodel_steer.core.inputs import as_prompts, items_of, iter_prompts
from xmodel_steer.core.prompts import Prompt, Prompts, text_digest
from xmodel_steer.core.spaces import Site, SiteLike, Sites, Stack, as_site
from xmodel_steer.maps.accumulator import MomentsAccumulator, sketch_dimensions
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.pairs import PARTS, part_of
from xmodel_steer.models.arguments import require_counts, require_side
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import context_length, name_of
from xmodel_steer.models.recorder import residuals
from xmodel_steer.models.shortage import in_words, memory_of
from xmodel_steer.models.sites import sites_of, space_of
from xmodel_steer.models.tokens import Encoding, warn_of_missing

#: Documents read together, at most, and their tokens. Sorting by length within them saves padding, and the shuffled
#: control pairs rows among them. The number does not depend on the batch size, so neither do the moments.
WINDOW = 64
WINDOW_TOKENS = 16384


def require_shard(shard: Any, what: str) -> tuple[int, int]:
    """Refuse a share of the text that is none."""
    whole = isinstance(shard, tuple | list) and len(shard) == 2 and all(isinstance(i, Integral) for i in shard)
    if not whole or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"{what}: shard must be (i, n) with 0 <= i < n, got {shard}")
    return shard[0], shard[1]


def documents_of(texts: Prompts, what: str) -> Sequence[Prompt] | Iterable[Any]:
    """Return a list's documents as prompts, another iterable as it is.

    Raises:
        PromptError: The texts are no list, or one cannot be a prompt.
    """
    texts = items_of(texts, what)
    return as_prompts(texts, what=what) if isinstance(texts, Sequence) else texts


def window_size(max_tokens: int) -> int:
    """Count the documents that are read together."""
    return max(4, min(WINDOW, WINDOW_TOKENS // max_tokens))


def windows(texts: Prompts, size: int) -> Iterator[tuple[Prompt, ...]]:
    """Yield documents, a window at a time, read once."""
    prompts = iter_prompts(texts, what="texts")
    while window := tuple(itertools.islice(prompts, size)):
        yield window


#: Bytes of cross moments up to which every layer pair is kept in full.
FULL_PAIRS_BYTES = 2 * 2**30
#: Target dimensions of a sketch that nobody asked for: fewer where it would take more than the bytes, but not under the
#: least, whose grid is too rough to choose layers by.
SKETCH, LEAST_SKETCH = 64, 8
SKETCH_BYTES = 4 * FULL_PAIRS_BYTES


@with_progress
def collect_moments(
    source: Any,
    target: Any,
    texts: Prompts,
    *,
    source_sites: Sites | Literal["all"],
    target_sites: Sites | Literal["all"],
    pairs: Sequence[tuple[SiteLike, SiteLike]] | None = None,
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
    """Collect moments of two models' paired activations over general text, in one pass.

    Positions pair by the character that their tokens end on; tokens of a chat template pair by their role. Other
    special tokens and text position 0 are left out. Memory does not depend on the length of the text.

    Args:
        source: The model to map from.
        target: The model to map to.
        texts: Documents, as `as_prompts` takes them; any iterable, read once.
        source_sites: Sites of the source; ``"all"``: after every block.
        target_sites: Sites of the target; ``"all"``: after every block.
        pairs: Layer pairs whose full cross moments are kept, so that maps can be fitted; by default every combination
            where they take no more than 2 GiB and no ``sketch`` is given, else none.
        sketch: Number of target dimensions, drawn by seed, whose cross moments are kept for every combination of
            sites: enough for `layer_grid`. By default 64 where not every combination is kept in full and no pairs
            were named, else none; fewer, but at least 8, where 64 would take over 8 GiB.
        shuffled: Keep the moments of the shuffled control for the full pairs.
        max_tokens: Longer documents are cut to this many tokens in each model.
        batch_size: Documents per forward pass.
        truncation_side: The side on which longer documents are cut, ``"right"`` or ``"left"``.
        template: Pair the tokens of chat templates that have the same role; see `align`.
        seed: Seed of the split into parts, of the sketch and of the shuffled control.
        shard: ``(i, n)``: read only every n-th window of up to 64 documents, from the i-th; `merge` adds n shards up.
        device: Device of the products; moments come back on the CPU.
        progress: Show progress bars; see `quiet`.

    Raises:
        PromptError: There are no documents.
        AlignmentError: Under 20 % of the tokens pair.
        NonFiniteError: An activation is NaN or infinite.
        ValueError: The moments would take more memory than there is, or the smallest sketch more than 8 GiB.
    """
    require_counts(batch_size=batch_size, max_tokens=max_tokens)
    require_side(truncation_side=truncation_side)
    part, parts = require_shard(shard, "collect_moments")
    for model in (source, target):
        if max_tokens > context_length(model):
            raise ModelError(f"collect_moments: max_tokens {max_tokens} is over the context of {name_of(model)}")
    settings = {"max_tokens": max_tokens, "truncation_side": truncation_side, "template": template, "seed": seed}
    documents = documents_of(texts, "collect_moments")
    if isinstance(documents, Sequence) and parts > 1:  # shards of different texts must not merge
        settings["texts"] = text_digest(documents)
    sites = sites_of(source, source_sites), sites_of(target, target_sites)
    widths = _widest(source, sites[0]), _widest(target, sites[1])
    plan = Plan.of(widths, *sites, pairs, sketch, shuffled, seed).within_memory(widths, shuffled, device)
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
    total = 2 * len(documents) if isinstance(documents, Sequence) and parts == 1 else None
    title = f"moments {name_of(source)} → {name_of(target)}, each text in both"
    size, number = window_size(max_tokens), -1  # number: of the last window
    ends = ((source, plan.sources, "source", []), (target, plan.targets, "target", []))
    with progress_bar(total=total, unit="text", desc=title) as bar:
        for number, window in enumerate(windows(documents, size)):
            if number % parts != part:
                continue
            tokens = [
                encode(model, window, max_tokens=max_tokens, truncation_side=truncation_side, warn=False)
                for model, *_ in ends
            ]
            keys = [[encoding.token_ends(template=template) for encoding in encodings] for encodings in tokens]
            aligned = [align(a, b) for a, b in zip(*keys, strict=True)]
            rows = []
            for (model, kept, end, lacking), encodings in zip(ends, tokens, strict=True):
                lacking += [encoding for encoding in encodings if encoding.missing]
                del lacking[2:]  # the warning names one
                places = [getattr(pairing, end) for pairing in aligned]
                rows.append(rows_at(model, encodings, kept, places, batch_size, device, bar))
            names = [part_of(prompt.content_key(), seed=seed) for prompt in window]
            accumulate(accumulator, names, number * size, aligned, *rows)
    if number < 0:
        raise PromptError("collect_moments: no texts were given")
    for model, _, _, lacking in ends:
        warn_of_missing(lacking, name_of(model))
    moments = accumulator.moments()
    if parts == 1 or moments.eligible:  # a shard may have got nothing
        check_coverage(moments.paired, moments.eligible)
    return moments


@dataclass(frozen=True)
class Plan:
    """A choice of the moments to keep."""

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
        pairs: Sequence[tuple[SiteLike, SiteLike]] | None,
        sketch: int | None,
        shuffled: bool,
        seed: int,
    ) -> "Plan":
        """Decide what `collect_moments` keeps of these sites."""
        every = tuple(itertools.product(dict.fromkeys(source_sites), dict.fromkeys(target_sites)))
        width = widths[1]
        if pairs is None:
            fits = _cross_bytes(widths, every, shuffled) <= FULL_PAIRS_BYTES
            chosen = every if fits and not sketch else ()
            sketch = sketch if sketch is not None or fits else _default_sketch(widths, every)
        else:
            chosen = tuple((as_site(s), as_site(t)) for s, t in pairs)
        grid = every if sketch else ()
        if not chosen and not grid:
            raise ValueError("collect_moments: give at least one source site and one target site")
        if sketch and any(isinstance(t, Stack) for _, t in grid):
            raise ValueError("collect_moments: a sketch takes single target sites; name the layer pairs with pairs=")
        return cls(
            tuple(dict.fromkeys(s for s, _ in (*grid, *chosen))),
            tuple(dict.fromkeys(t for _, t in (*grid, *chosen))),
            chosen,
            sketch_dimensions(width, sketch, seed=seed) if sketch else (),
        )

    def within_memory(self, widths: tuple[int, int], shuffled: bool, device: str | torch.device = "cpu") -> "Plan":
        """Return the plan; refuse moments that the machine can never hold, before any work.

        Raises:
            ValueError: Says how much memory they take, and what to give instead.
        """
        ends = zip((self.sources, self.targets), widths, strict=True)
        squares = sum((len(site.members) * width) ** 2 for sites, width in ends for site in sites)
        scatters = 8 * len(PARTS) * squares
        cross = _cross_bytes(widths, self.pairs, shuffled)
        grid = list(itertools.product(self.sources, self.targets)) if self.sketch else []
        sketch = _cross_bytes((widths[0], len(self.sketch)), grid)
        for place in {torch.device(device).type: device, "cpu": "cpu"}.values():  # moments come back on the CPU
            there = memory_of(place)
            if there and scatters + cross + sketch > there:
                raise ValueError(
                    f"collect_moments: moments of {len(self.sources)} source and {len(self.targets)} target sites (widths "
                    f"{widths[0]} and {widths[1]}) take {in_words(scatters + cross + sketch)}, over the {in_words(there)} of memory "
                    f"of {place}: {in_words(scatters)} for the sites' own scatters, {in_words(cross)} for "
                    f"{len(self.pairs)} full pairs, {in_words(sketch)} for the sketch of {len(self.sketch)} dimensions; "
                    "give fewer sites (a stack of g layers takes g² times the scatter of one), a smaller sketch=, or fewer pairs="
                )
        return self


def _widest(model: Any, sites: Sequence[Site]) -> int:
    """Return the largest width of single sites; ``z`` has its own."""
    return max((space.width for site in sites for space in space_of(model, site).members), default=1)


def _cross_bytes(widths: tuple[int, int], pairs: Sequence[tuple[Site, Site]], shuffled: bool = False) -> int:
    """Count the bytes of layer pairs' cross moments, in float64."""
    numbers = sum(len(s.members) * len(t.members) for s, t in pairs) * widths[0] * widths[1]
    return 8 * len(PARTS) * (1 + shuffled) * numbers


def _default_sketch(widths: tuple[int, int], pairs: Sequence[tuple[Site, Site]]) -> int:
    """Return the default number of sketched target dimensions.

    It depends on the models and the sites alone, not on the machine: shards of several machines must merge.

    Raises:
        ValueError: So many pairs of such width that even the smallest sketch is over the limit.
    """
    size = min(SKETCH, widths[1])
    room = SKETCH_BYTES // max(1, _cross_bytes((widths[0], 1), pairs))
    if room < min(LEAST_SKETCH, size):
        least = min(LEAST_SKETCH, size)
        raise ValueError(
            f"collect_moments: a sketch of {len(pairs)} layer pairs of source width {widths[0]} takes "
            f"{in_words(_cross_bytes((widths[0], size), pairs))} at {size} target dimensions and "
            f"{in_words(_cross_bytes((widths[0], least), pairs))} at {least}, over the limit of {in_words(SKETCH_BYTES)}; give "
            f"fewer sites, such as every second layer, name the layer pairs with pairs=, or give sketch={least} to take that much"
        )
    return min(size, room)


def rows_at(
    model: Any,
    encodings: Sequence[Encoding],
    sites: Sequence[Site],
    positions: Sequence[tuple[int, ...]],
    batch_size: int,
    device: str | torch.device = "cpu",
    bar: Any = None,
) -> list[Mapping[Site, Tensor]]:
    """Read one model's rows of each document, at some positions and each site.

    Args:
        model: A TransformerLens model.
        encodings: The documents.
        sites: Sites to read.
        positions: Token positions of each document.
        batch_size: Documents per forward pass.
        device: Device of the rows.
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
            rows[i] = {site: piece[r] for site, piece in pieces.items()}
        if bar is not None:
            bar.update(len(batch.rows))
    return rows


def accumulate(
    accumulator: MomentsAccumulator,
    parts: Sequence[str],
    first: int,
    aligned: Sequence[Alignment],
    source: Sequence[Mapping[Site, Tensor]],
    target: Sequence[Mapping[Site, Tensor]],
) -> None:
    """Add a window of documents to moments, part by part.

    Args:
        accumulator: The moments.
        parts: The part of each document, such as ``"train"``.
        first: Number of the window's first document.
        aligned: The pairing of each document's rows.
        source: Paired rows of each document, at each site of the source.
        target: The same of the target.
    """
    for part in dict.fromkeys(parts):
        members = [i for i, name in enumerate(parts) if name == part]
        accumulator.add(
            part,
            {site: torch.cat([source[i][site] for i in members]) for site in source[0]},
            {site: torch.cat([target[i][site] for i in members]) for site in target[0]},
            [first + i for i in members for _ in range(len(aligned[i]))],
            eligible=sum(aligned[i].eligible for i in members),
        )

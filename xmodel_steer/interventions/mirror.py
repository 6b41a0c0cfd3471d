"""Replacements of a site's activations: another model's, mapped; a mean; noise.

The paper checks a map with them: a model generates while one site holds the mapped activations of another model, which
reads the same text as it grows.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import ModelError, SiteError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Space, require_same_space
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Reading, Replacement
from xmodel_steer.maps.affine import Map
from xmodel_steer.models.batching import pad_id
from xmodel_steer.models.facts import conduct_of, device_of, is_bridge, name_of, tokenizer_of
from xmodel_steer.models.passes import forward, keep_rows
from xmodel_steer.models.recorder import joined, recording
from xmodel_steer.models.sites import space_of
from xmodel_steer.models.tokens import shared_start, special_ids, tokenise


def mapped_source(
    source: Any, target: Any, mapping: Map, *, positions: Positions = "all", use_cache: bool = True
) -> Replacement:
    """Replace a site by mapped activations of a source that reads the same text.

    Each target token gets the activation of the last source token that ends no later: the source has then read the same
    text, or a little less. The activation is computed once, when the target token is new, and not revised when later
    text merges source tokens differently. Special tokens, text position 0 (an attention sink) and tokens before the
    source's second keep the target's activations. The source reads plain text, a chat template's words included.

    Args:
        source: The model that is read.
        target: The model that is written to.
        mapping: A map from a site of the source to one of the target.
        positions: Where in the target's text.
        use_cache: Keep the source's keys and values between the target's steps.

    Raises:
        SpaceMismatchError: The map is not between these models.
        ModelError: The source cannot read texts of different lengths together, or is the target itself.
    """
    require_map_between(source, target, mapping, "mapped_source")
    if source is target:
        raise ModelError(
            "mapped_source: source and target are one model, which cannot run inside its own pass; load it twice"
        )
    conduct = conduct_of(source)
    if not conduct.padded:
        raise ModelError(
            f"mapped_source: {name_of(source)} computes other activations for a padded text, so that it cannot read several "
            "texts at once; take another source"
        )
    cached = use_cache and is_bridge(source) and conduct.cached and conduct.dropping
    key = object()

    def values(rows: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        assert reading.block is not None
        mirror = reading.block.recall(key)
        if mirror is None or bool((reading.position == 0).any()):  # a new batch, or a pass without a cache
            mirror = _Mirror(source, target, mapping, cached)
            reading.block.remember(key, mirror)
        return mirror(rows, reading)

    return Replacement(mapping.target, values, positions)


def require_map_between(source: Any, target: Any, mapping: Map, what: str) -> None:
    """Refuse a map of other models.

    Raises:
        SpaceMismatchError: The map is not between these models.
    """
    require_same_space(space_of(source, mapping.source.site), mapping.source, what)
    require_same_space(space_of(target, mapping.target.site), mapping.target, what)


def mean_of(space: Space, mean: Float[Tensor, " d"], *, positions: Positions = "all") -> Replacement:
    """Replace a site by one point, except at text position 0: mean ablation.

    Args:
        space: The site that is written to.
        mean: The point, such as the mean over general text (``moments.pair(...).train.target_mean``).
        positions: Where in the text.
    """

    def values(rows: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        return mean.to(rows).expand_as(rows), reading.position.to(rows.device) > 0

    return Replacement(space, values, positions)


def noise_like(
    space: Space, mean: Float[Tensor, " d"], scale: Float[Tensor, " d"], *, seed: int = 0, positions: Positions = "all"
) -> Replacement:
    """Replace a site by Gaussian noise, except at text position 0.

    The noise of a token depends only on its id, its position and the seed, so that it is the same with or without a
    cache and in any batch.

    Args:
        space: The site that is written to.
        mean: Mean of each dimension over general text.
        scale: Standard deviation of each dimension over general text.
        seed: Seed of the noise.
        positions: Where in the text.
    """

    def values(rows: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        draws = torch.zeros(rows.shape, dtype=torch.float32)
        for r, (ids, places) in enumerate(zip(reading.ids.tolist(), reading.position.tolist(), strict=True)):
            for c, (token, place) in enumerate(zip(ids, places, strict=True)):
                generator = torch.Generator().manual_seed(((seed * 1_000_003 + place) * 1_000_003 + token) % 2**63)
                draws[r, c] = torch.randn(rows.shape[-1], generator=generator)
        noise = mean.to(rows) + draws.to(rows) * scale.to(rows)
        return noise, reading.position.to(rows.device) > 0

    return Replacement(space, values, positions)


@dataclass
class _Row:
    """One text, as both models have read it so far."""

    target_ids: list[int] = field(default_factory=list)
    source_ids: tuple[int, ...] = ()
    slots: list[int] = field(default_factory=list)  # column of each source token in the cache
    ends: tuple[int, ...] = ()  # where each source token ends, in characters
    activations: list[Tensor] = field(default_factory=list)  # of each source token


class _Mirror:
    """The values of `mapped_source` for one batch: the source reads what the target reads, pass by pass."""

    def __init__(self, source: Any, target: Any, mapping: Map, use_cache: bool) -> None:
        self._source, self._target, self._mapping, self._use_cache = source, target, mapping, use_cache
        self._special = special_ids(tokenizer_of(target))
        self._rows: list[_Row] = []
        self._prompts: tuple[int, ...] | None = None  # the prompt of each row
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # of the cache's columns

    def __call__(self, rows: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        places = reading.position.tolist()
        self._follow(reading, places)
        # Append the target's new tokens, decode each text, and let the source read what is new of it.
        for row, ids, new in zip(self._rows, reading.ids.tolist(), places, strict=True):
            row.target_ids += [token for token, place in zip(ids, new, strict=True) if place >= 0]
        decoded = [
            self._ends(row.target_ids, min((p for p in new if p >= 0), default=0))
            for row, new in zip(self._rows, places, strict=True)
        ]
        self._read([text for _, text in decoded])
        # Pick each new token's partner among the source's tokens; without one the target's activation stays.
        picked = torch.zeros(*rows.shape[:2], self._mapping.source.width, dtype=rows.dtype)
        held = torch.zeros(rows.shape[:2], dtype=torch.bool)
        for r, (row, (ends, _)) in enumerate(zip(self._rows, decoded, strict=True)):
            for c, place in enumerate(places[r]):
                is_text = place > 0 and row.target_ids[place] not in self._special
                partner = _last_at_most(row.ends, ends[place]) if is_text else -1
                if partner > 0:
                    picked[r, c], held[r, c] = row.activations[partner].to(rows.dtype), True
        return self._mapping.transform(picked).to(rows), held.to(rows.device)

    def _follow(self, reading: Reading, places: list[list[int]]) -> None:
        """Match the state's rows with those of a pass.

        Raises:
            SiteError: The target continues texts that were not read from their beginning.
        """
        if any(0 in row for row in places):  # every text from its start
            self._rows = [_Row() for _ in places]
            self._mask = torch.zeros(len(places), 0, dtype=torch.long)
        elif self._prompts is not None and reading.rows is not None and set(reading.rows) < set(self._prompts):
            # Texts that have ended left the target's batch: they leave the source's cache too.
            kept = torch.tensor([self._prompts.index(row) for row in reading.rows])
            self._rows, self._mask = [self._rows[place] for place in kept.tolist()], self._mask[kept]
            keep_rows(self._cache, kept.to(device_of(self._source)))
        self._prompts = reading.rows
        if len(self._rows) != len(places):
            raise SiteError(
                "mapped_source: the target continues a text whose beginning was not seen; "
                "open the steering block before the text begins"
            )

    def _ends(self, ids: list[int], first: int) -> tuple[dict[int, int], str]:
        """Count the characters read with each token from ``first`` on; decode the text."""
        decode = tokenizer_of(self._target).decode

        def text(count: int) -> str:
            start = decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return start.rstrip("\ufffd")  # the bytes of an incomplete character

        return {place: len(text(place + 1)) for place in range(first, len(ids))}, text(len(ids))

    def _read(self, texts: list[str]) -> None:
        """Run the source on the new tokens of every text, and keep their activations."""
        # 1. Tokenise each whole text. Cached tokens that the longer text merges differently are masked and read again.
        fresh: list[tuple[int, ...]] = []
        tokenizer = tokenizer_of(self._source)
        for r, (row, text) in enumerate(zip(self._rows, texts, strict=True)):
            encoding = tokenise(tokenizer, [Prompt(text=text)])[0] if text.strip() else None
            ids = encoding.ids if encoding else ()
            kept = 0
            if self._use_cache:
                kept = shared_start([row.source_ids, ids])
                self._mask[r, row.slots[kept:]] = 0
            row.source_ids, row.ends = ids, encoding.ends if encoding else ()
            row.slots, row.activations = row.slots[:kept], row.activations[:kept]
            fresh.append(ids[kept:])
        width = max(map(len, fresh))
        if not width:
            return
        # 2. Pad the new tokens on the left, so that they follow the cache's columns.
        device = device_of(self._source)
        ids = torch.full((len(fresh), width), pad_id(self._source), dtype=torch.long)
        new = torch.zeros((len(fresh), width), dtype=torch.long)
        for r, tokens in enumerate(fresh):
            if tokens:
                ids[r, width - len(tokens) :], new[r, width - len(tokens) :] = torch.tensor(tokens), 1
        past = self._mask.shape[1] if self._use_cache else 0
        mask = torch.cat([self._mask[:, :past], new], 1)
        # 3. Run the source, with its cache or up to the site.
        site = self._mapping.source.site
        with recording(self._source, site.members) as streams:
            if self._use_cache:
                _, self._cache = forward(
                    self._source, ids.to(device), mask.to(device), logits="last", cache=self._cache, use_cache=True
                )
                self._mask = mask
            else:
                forward(self._source, ids.to(device), mask.to(device), logits="none", stop_at_layer=site.layer + 1)
        # 4. Append the new activations and cache columns.
        values = joined(streams, site).cpu()
        for r, tokens in enumerate(fresh):
            begin, row = width - len(tokens), self._rows[r]
            row.slots += range(past + begin, past + width)
            row.activations += list(values[r, begin:])


def _last_at_most(ends: tuple[int, ...], end: int) -> int:
    """Find the last token that ends no later than ``end``, or -1."""
    return max((i for i, e in enumerate(ends) if 0 <= e <= end), default=-1)

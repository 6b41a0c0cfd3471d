"""What may stand at a site instead of the model's own activations: another model's, mapped; a mean; noise.

For the paper's check of a map: a model generates while the activations at one site are those that a map makes of
another model's, which reads the same text as it grows.
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
from xmodel_steer.models.recorder import recording
from xmodel_steer.models.sites import space_of
from xmodel_steer.models.tokens import Encoding, shared_start, special_ids, tokenise


def mapped_source(
    source: Any, target: Any, mapping: Map, *, positions: Positions = "all", use_cache: bool = True
) -> Replacement:
    """Replace a site by mapped activations of a source that reads along.

    Each of the target's tokens gets the activation of the source's last token that ends no later: both have then read
    the same text, or the source a little less. It is computed once, when the token is new: a source token that later
    text would have merged differently is not revised, as a cache does not revise. Special tokens, text position 0 (an
    attention sink) and tokens before the source's second keep the target's own activations. The source reads plain
    text: what a chat template adds in words is text to it.

    Args:
        source: The model that is read.
        target: The model that is written to.
        mapping: From a site of the source to one of the target.
        positions: Where in the target's text.
        use_cache: Keep the source's keys and values between the target's steps.

    Raises:
        SpaceMismatchError: The map is not between these models.
        ModelError: The source cannot read texts of different lengths together.
    """
    require_map_between(source, target, mapping, "mapped_source")
    conduct = conduct_of(source)
    if not conduct.padded:
        raise ModelError(
            f"mapped_source: {name_of(source)} does not read a padded text as it reads it alone, so that it cannot read along "
            "with several texts; take another source"
        )
    kept = use_cache and is_bridge(source) and conduct.cached and conduct.dropping
    return Replacement(mapping.target, _Mirror(source, target, mapping, kept), positions)


def require_map_between(source: Any, target: Any, mapping: Map, what: str) -> None:
    """Refuse a map of other models.

    Raises:
        SpaceMismatchError: The map is not between these models.
    """
    require_same_space(space_of(source, mapping.source.site), mapping.source, what)
    require_same_space(space_of(target, mapping.target.site), mapping.target, what)


def mean_of(space: Space, mean: Float[Tensor, " d"], *, positions: Positions = "all") -> Replacement:
    """One point everywhere but at text position 0: mean ablation.

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
    """Gaussian noise with each dimension's mean and standard deviation over general text, but at text position 0.

    The noise of a token depends on its id, its position and the seed alone, so that a cached and an uncached decode,
    and any batch, see the same.

    Args:
        space: The site that is written to.
        mean: Mean of each dimension.
        scale: Standard deviation of each dimension.
        seed: Seed of the noise.
        positions: Where in the text.
    """

    def values(rows: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        made = torch.zeros(rows.shape, dtype=torch.float32)
        for r, (ids, places) in enumerate(zip(reading.ids.tolist(), reading.position.tolist(), strict=True)):
            for c, (token, place) in enumerate(zip(ids, places, strict=True)):
                generator = torch.Generator().manual_seed(((seed * 1_000_003 + place) * 1_000_003 + token) % 2**63)
                made[r, c] = torch.randn(rows.shape[-1], generator=generator)
        noise = mean.to(rows) + made.to(rows) * scale.to(rows)
        return noise, reading.position.to(rows.device) > 0

    return Replacement(space, values, positions)


@dataclass
class _Row:
    """One text, as both models have read it so far."""

    target_ids: list[int] = field(default_factory=list)
    source_ids: tuple[int, ...] = ()
    slots: list[int] = field(default_factory=list)  # where each source token stands in the cache
    ends: tuple[int, ...] = ()
    activations: list[Tensor] = field(default_factory=list)


class _Mirror:
    """Reads in the source what the target reads."""

    def __init__(self, source: Any, target: Any, mapping: Map, use_cache: bool) -> None:
        self._source, self._target, self._mapping, self._use_cache = source, target, mapping, use_cache
        self._special = special_ids(tokenizer_of(target))
        self._rows: list[_Row] = []
        self._prompts: tuple[int, ...] | None = None  # which prompt each row is
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    def __call__(self, rows: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        places = reading.position.tolist()
        if any(0 in own for own in places):  # a new batch, or a decode without a cache: every text from its start
            self._rows = [_Row() for _ in places]
            self._cache, self._mask = None, torch.zeros(len(places), 0, dtype=torch.long)
        elif self._prompts is not None and reading.rows is not None and set(reading.rows) < set(self._prompts):
            kept = torch.tensor([self._prompts.index(row) for row in reading.rows])
            self._rows, self._mask = [self._rows[place] for place in kept.tolist()], self._mask[kept]
            keep_rows(self._cache, kept.to(device_of(self._source)))
        self._prompts = reading.rows
        if len(self._rows) != len(places):
            raise SiteError(
                "mapped_source: the target goes on with a text whose beginning was not seen; "
                "open the steering block before the text begins"
            )
        for row, ids, own in zip(self._rows, reading.ids.tolist(), places, strict=True):
            row.target_ids += [token for token, place in zip(ids, own, strict=True) if place >= 0]
        ends = [
            self._ends(row.target_ids, min((p for p in own if p >= 0), default=0))
            for row, own in zip(self._rows, places, strict=True)
        ]
        self._read([text for _, text in ends])
        picked = torch.zeros(*rows.shape[:2], self._mapping.source.width, dtype=rows.dtype)
        given = torch.zeros(rows.shape[:2], dtype=torch.bool)
        for r, own in enumerate(places):
            row, (end_of, _) = self._rows[r], ends[r]
            for c, place in enumerate(own):
                text = place > 0 and row.target_ids[place] not in self._special
                partner = _last_at_most(row.ends, end_of[place]) if text else -1
                if partner > 0:
                    picked[r, c], given[r, c] = row.activations[partner].to(rows.dtype), True
        return self._mapping.transform(picked).to(rows), given.to(rows.device)

    def _ends(self, ids: list[int], first: int) -> tuple[dict[int, int], str]:
        """For each new token how many characters were read with it, and the text."""
        decode = tokenizer_of(self._target).decode

        def text(count: int) -> str:
            made = decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return made.rstrip("\ufffd")  # the bytes of a character that is not whole yet

        return {place: len(text(place + 1)) for place in range(first, len(ids))}, text(len(ids))

    def _read(self, texts: list[str]) -> None:
        """Let the source read what is new of every text."""
        fresh: list[tuple[int, ...]] = []
        for r, (row, text) in enumerate(zip(self._rows, texts, strict=True)):
            encoding = self._encode(text)
            ids = encoding.ids if encoding else ()
            kept = 0
            if self._use_cache:
                kept = shared_start([row.source_ids, ids])
                self._mask[r, row.slots[kept:]] = 0  # tokens that the new text has merged otherwise are forgotten
            row.source_ids, row.ends = ids, encoding.ends if encoding else ()
            row.slots, row.activations = row.slots[:kept], row.activations[:kept]
            fresh.append(ids[kept:])
        width = max(map(len, fresh))
        if not width:
            return
        device = device_of(self._source)
        ids = torch.full((len(fresh), width), pad_id(self._source), dtype=torch.long)
        new = torch.zeros((len(fresh), width), dtype=torch.long)
        for r, own in enumerate(fresh):
            if own:
                ids[r, width - len(own) :], new[r, width - len(own) :] = torch.tensor(own), 1
        past = self._mask.shape[1] if self._use_cache else 0
        mask = torch.cat([self._mask[:, :past], new], 1)
        site = self._mapping.source.site
        with recording(self._source, [site]) as kept_:
            if self._use_cache:
                _, self._cache = forward(
                    self._source, ids.to(device), mask.to(device), logits="last", cache=self._cache, use_cache=True
                )
                self._mask = mask
            else:
                forward(self._source, ids.to(device), mask.to(device), logits="none", stop_at_layer=site.layer + 1)
        values = kept_[site].cpu()
        for r, own in enumerate(fresh):
            row = self._rows[r]
            row.slots += range(past + width - len(own), past + width)
            row.activations += list(values[r, width - len(own) :]) if own else []

    def _encode(self, text: str) -> Encoding | None:
        if not text.strip():
            return None
        return tokenise(tokenizer_of(self._source), [Prompt(text=text)])[0]


def _last_at_most(ends: tuple[int, ...], end: int) -> int:
    """Find the last token that ends no later than another one; -1 without any."""
    return max((i for i, e in enumerate(ends) if 0 <= e <= end), default=-1)

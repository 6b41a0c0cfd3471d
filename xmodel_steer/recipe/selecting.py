"""The second step of a transfer: layers and a headline strength, chosen on validation prompts and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site, Stack
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.controls import ShuffledPairs, pinned
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.statistics import quotient
from xmodel_steer.recipe.preparing import Prepared


@dataclass(frozen=True, eq=False)
class Selected:
    """Choices of validation.

    Args:
        source: The source's vector.
        native: The target's own vector.
        transported: The source's vector through the map, with its own norm.
        shuffled: The source's vector through a map of shuffled pairs, with its own norm.
        mapping: The map.
        moments: The moments that it was fitted on.
        headline: The strength.
        records: Everything that was tried.
        layer: The best of the source's single layers, where its site is a stack and there are any.
    """

    source: SteeringVector
    native: SteeringVector
    transported: SteeringVector
    shuffled: SteeringVector
    mapping: Map
    moments: Moments = field(repr=False)
    headline: float
    records: tuple[dict[str, Any], ...] = field(repr=False)
    layer: Site | None = None

    def arms(self, random_seeds: int, seed: int) -> dict[str, list[SteeringVector]]:
        """Return the vectors of every arm, at the native vector's standardised norm."""
        norm = self.native.norm(standardised=True)
        return {
            "native": [self.native],
            "mapped": [self.transported.with_norm(norm)],
            "random": [random_like(self.native, seed=seed + k) for k in range(random_seeds)],
            "shuffled": [self.shuffled.with_norm(norm)],
        }

    def similarity(self) -> dict[str, dict[str, float]]:
        """Compare the mapped and the shuffled vector with the native one."""
        norm = self.native.norm(standardised=True)
        return {
            name: {
                "cosine": self.native.cosine(vector),
                "norm_ratio": quotient(vector.norm(standardised=True), norm),
                "raw_cosine": self.native.cosine(vector, standardised=False),
            }
            for name, vector in (("mapped", self.transported), ("shuffled", self.shuffled))
        }


def select(prepared: Prepared) -> Selected:
    """Choose the target's layer, the source's layer, and the headline strength.

    Target layer: where the native vector steers best. Source layer: whose mapped vector steers best there; of those within
    one standard error of the best, the one whose map has the best R² on validation documents. Headline strength: where the
    mapped vector steers best. All while perplexity is within the budget's bound, which a mapped vector may exceed as
    far as the native one does, and all on validation prompts and text. Nothing is measured where there is one candidate.

    Args:
        prepared: What `prepare` returned.
    """
    records: list[dict[str, Any]] = []
    bound = prepared.budget.max_perplexity_ratio

    def tried(varied: str, candidates: Mapping[Site, SteeringVector]) -> list[_Tried]:
        if len(candidates) == 1:
            return [_Tried(site, {"score": 0.0, "perplexity_ratio": 0.0, "map_r2": np.nan}) for site in candidates]
        found = gains(prepared, varied, [(vector, site, 1.0) for site, vector in candidates.items()])
        records.extend(found[0])
        return [_Tried(*each) for each in zip(candidates, *found, strict=True)]

    natives, moments, fitter = prepared.natives, prepared.moments, prepared.method.fitter
    target = _best(tried("target layer", natives), bound)
    target_site, native = target.site, natives[target.site]
    norm = native.norm(standardised=True)
    maps = {site: fitter.fit(moments.pair(site, target_site)) for site in prepared.sources}
    transported = {site: maps[site].transport(vector) for site, vector in prepared.sources.items()}
    scaled = {site: vector.with_norm(norm) for site, vector in transported.items()}
    sources = tried("source layer", scaled)
    for each in sources if sources[1:] else ():
        each.record["map_r2"] = quality_of(maps[each.site], moments.pair(each.site, target_site))
    as_native = max(bound, 1.001 * target.record["perplexity_ratio"])
    source_site = _best_map(sources, as_native).site
    layers = [each for each in sources if not isinstance(each.site, Stack)]
    layer = _best_map(layers, as_native).site if isinstance(source_site, Stack) and layers else None

    positive = prepared.budget.positive
    headline = positive[-1]
    if len(positive) > 1:  # strength 1 may have been measured with the layers
        known = [
            r for r in records if (r["varied"], r["site"]) == ("source layer", str(source_site)) and 1.0 in positive
        ]
        rest = [(scaled[source_site], source_site, s) for s in positive if s != 1.0 or not known]
        strengths = [{**r, "varied": "strength"} for r in known] + gains(prepared, "strength", rest)[0]
        headline = _best([_Tried(source_site, r) for r in strengths], bound).record["strength"]
        records.extend(sorted(strengths, key=lambda r: r["strength"]))
    chosen = _carried(prepared, moments, source_site, native, headline, maps[source_site])
    return replace(chosen, records=tuple(records), layer=layer)


def _carried(
    prepared: Prepared,
    moments: Moments,
    site: Site,
    native: SteeringVector,
    headline: float,
    mapping: Map | None = None,
) -> Selected:
    """Carry the source's vector at a site by its map and its control."""
    pair, fitter, vector = moments.pair(site, native.space.site), prepared.method.fitter, prepared.sources[site]
    mapping = mapping or fitter.fit(pair)
    shuffled = ShuffledPairs(pinned(fitter, mapping)).fit(pair)
    source = vector.with_scale(moments.scale(site, end="source"))
    return Selected(
        source, native, mapping.transport(vector), shuffled.transport(vector), mapping, moments, headline, ()
    )


def one_layer(prepared: Prepared, selected: Selected) -> Selected | None:
    """Carry the vector of the best single layer, where a stack was chosen.

    Args:
        prepared: What `prepare` returned.
        selected: What `select` returned.

    Returns:
        The choices; None where a single layer was chosen, or there was none to choose.
    """
    if selected.layer is None:
        return None
    return _carried(prepared, prepared.moments, selected.layer, selected.native, selected.headline)


def read_contrast(prepared: Prepared, selected: Selected) -> Selected:
    """Fit the chosen map again, on text that has the contrast prompts too.

    Their labels are not read.

    Args:
        prepared: What `prepare` returned.
        selected: What `select` returned.

    Raises:
        PromptError: There is no general text: only its moments were given.
    """
    text, source = prepared.text, selected.source.space.site
    if not text.map:
        raise PromptError(
            "transfer: read_contrast mixes the contrast prompts with general text; give it with its moments"
        )
    mixed = mixed_text(prepared.contrast, text.map, seed=prepared.seed)
    pair = source, selected.native.space.site
    chosen, settings = prepared.moments.only([pair]), prepared.moments.settings
    more = collect_moments(
        prepared.source, prepared.target, mixed, source_sites=[pair[0]], target_sites=[pair[1]],
        max_tokens=settings.get("max_tokens", prepared.budget.map_tokens), seed=settings.get("seed", prepared.seed),
        batch_size=min(prepared.budget.batch_size, 32),
    )  # fmt: skip
    moments = chosen + replace(more, settings=chosen.settings)
    return _carried(prepared, moments, source, selected.native, selected.headline)


def mixed_text(contrast: ContrastSet, general: Sequence[Prompt], *, seed: int = 0) -> list[Prompt]:
    """Mix contrast prompts with general documents, which a map then reads twice.

    Pairs are shuffled within a window. In a window of contrast prompts alone the shuffled control would learn what they have
    in common.

    Args:
        contrast: The prompts, of both sides.
        general: The map's text.
        seed: Seed of the order.
    """
    prompts = (*contrast.positive, *contrast.negative)
    both = (*prompts, *general[: max(16, len(prompts) // 2)])
    return [both[i] for i in np.random.default_rng(seed).permutation(len(both))]


def gains(
    prepared: Prepared, varied: str, candidates: Sequence[tuple[SteeringVector, Site, float]]
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Measure candidates on validation prompts and text.

    The score is half the difference that the two signs make.

    Args:
        prepared: What `prepare` returned.
        varied: What is chosen.
        candidates: For each the vector, the site that is chosen with it, and the strength.

    Returns:
        A record of each candidate, and its score on each prompt.
    """
    settings = [prepared.steer(vector, sign * strength) for vector, _, strength in candidates for sign in (1, -1)]
    effects = prepared.damage([[], *settings], prepared.text.calibration)
    measured = prepared.validation.measure(prepared.target, settings)
    records, scores = [], []
    for i, (_, site, strength) in enumerate(candidates):
        up, down = (measured[2 * i + k].scores for k in (0, 1))
        with np.errstate(all="ignore"):  # what overflows is never the best
            scores.append((up - down) / 2)
        ratio = max(effects[1 + 2 * i + k].perplexity for k in (0, 1)) / effects[0].perplexity
        records.append(
            {"recipe": prepared.label, "varied": varied, "layer": site.layer, "site": str(site), "strength": strength}
            | {"score": float(up.mean() - down.mean()) / 2, "perplexity_ratio": ratio}
        )
    return records, scores


def quality_of(mapping: Map, pair: SplitMoments) -> float:
    """Return a map's R² on validation documents; NaN where there are none.

    Args:
        mapping: The map.
        pair: The moments of its sites.
    """
    score_of = getattr(mapping, "score_moments", None)
    return float(score_of(pair.validation).mean_r2) if score_of and pair.validation.count > 1 else float("nan")


@dataclass(frozen=True, eq=False)
class _Tried:
    """Hold a candidate: its site, its record, and its score on each validation prompt."""

    site: Site
    record: dict[str, Any]
    scores: np.ndarray = field(default_factory=lambda: np.zeros(1))


def _best(tried: Sequence[_Tried], bound: float) -> _Tried:
    """Find the best candidate within the bound on perplexity; without any, the least damaging."""
    allowed = [each for each in tried if each.record["perplexity_ratio"] < bound]
    if not allowed:
        return min(tried, key=lambda each: each.record["perplexity_ratio"])
    # NaN is never the best.
    return max(allowed, key=lambda each: -np.inf if np.isnan(each.record["score"]) else each.record["score"])


def _best_map(tried: Sequence[_Tried], bound: float) -> _Tried:
    """Find the best map of those that steer alike, within one standard error."""
    # All vectors have one norm: where none is within the bound, the least damaging would be the one that carries least.
    allowed = [each for each in tried if each.record["perplexity_ratio"] < bound] or list(tried)
    best = _best(allowed, np.inf)

    def near(each: _Tried) -> bool:
        behind = best.scores - each.scores
        return float(behind.mean()) <= float(behind.std()) / len(behind) ** 0.5

    with np.errstate(all="ignore"):
        tied = [best, *(each for each in allowed if each is not best and near(each))]

    def order(each: _Tried) -> tuple[float, bool]:
        r2 = each.record["map_r2"]
        return -np.inf if np.isnan(r2) else r2, each is best

    return max(tied, key=order)

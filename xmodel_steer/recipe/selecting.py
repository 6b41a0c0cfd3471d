"""The second step of a transfer: layers and a headline strength, chosen on validation prompts and text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Site
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
    """

    source: SteeringVector
    native: SteeringVector
    transported: SteeringVector
    shuffled: SteeringVector
    mapping: Map
    moments: Moments = field(repr=False)
    headline: float
    records: tuple[dict[str, Any], ...] = field(repr=False)

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
    mapped vector steers best. All while perplexity is within the budget's bound, and all on validation prompts and
    text. Nothing is measured where there is one candidate.

    Args:
        prepared: What `prepare` returned.
    """
    records: list[dict[str, Any]] = []

    def best(
        varied: str, candidates: Mapping[Site, SteeringVector], quality: Callable[[Site], float] | None = None
    ) -> Site:
        if len(candidates) == 1:
            return next(iter(candidates))
        tried, scores = gains(prepared, varied, [(vector, site, 1.0) for site, vector in candidates.items()])
        bound = prepared.budget.max_perplexity_ratio
        chosen = _best(tried, bound)
        if quality is not None:
            tried = [record | {"map_r2": quality(site)} for record, site in zip(tried, candidates, strict=True)]
            chosen = _tied(tried, scores, chosen, bound)
        records.extend(tried)
        return list(candidates)[chosen]

    natives, moments, fitter = prepared.natives, prepared.moments, prepared.method.fitter
    target_site = best("target layer", natives)
    native = natives[target_site]
    norm = native.norm(standardised=True)
    maps = {site: fitter.fit(moments.pair(site, target_site)) for site in prepared.sources}
    transported = {site: maps[site].transport(vector) for site, vector in prepared.sources.items()}
    scaled = {site: vector.with_norm(norm) for site, vector in transported.items()}
    source_site = best("source layer", scaled, lambda site: _quality(maps[site], moments.pair(site, target_site)))
    mapping = maps[source_site]

    positive = prepared.budget.positive
    headline = positive[-1]
    if len(positive) > 1:  # strength 1 may have been measured with the layers
        known = [
            r for r in records if (r["varied"], r["site"]) == ("source layer", str(source_site)) and 1.0 in positive
        ]
        rest = [(scaled[source_site], source_site, s) for s in positive if s != 1.0 or not known]
        tried = [{**r, "varied": "strength"} for r in known] + gains(prepared, "strength", rest)[0]
        headline = tried[_best(tried, prepared.budget.max_perplexity_ratio)]["strength"]
        records.extend(sorted(tried, key=lambda r: r["strength"]))
    shuffled = ShuffledPairs(pinned(fitter, mapping)).fit(moments.pair(source_site, target_site))
    source = prepared.sources[source_site]
    return Selected(
        source.with_scale(moments.scale(source_site, end="source")),
        native,
        transported[source_site],
        shuffled.transport(source),
        mapping,
        moments,
        headline,
        tuple(records),
    )


def read_contrast(prepared: Prepared, selected: Selected) -> Selected:
    """Fit the chosen map again, on text that has the contrast prompts too.

    Their labels are not read. They are mixed with general documents, which are then read twice: pairs are shuffled
    within a window, and in a window of contrast prompts alone the shuffled control would learn what they have in common.

    Args:
        prepared: What `prepare` returned.
        selected: What `select` returned.

    Raises:
        PromptError: There is no general text: only its moments were given.
    """
    text, source = prepared.text, selected.source.space.site
    contrast = prepared.contrast.positive + prepared.contrast.negative
    if not text.map:
        raise PromptError(
            "transfer: read_contrast mixes the contrast prompts with general text; give it with its moments"
        )
    general = text.map[: max(16, len(contrast) // 2)]
    mixed = [
        (*contrast, *general)[i] for i in np.random.default_rng(prepared.seed).permutation(len(contrast) + len(general))
    ]
    pair = source, selected.native.space.site
    chosen, settings = prepared.moments.only([pair]), prepared.moments.settings
    more = collect_moments(
        prepared.source, prepared.target, mixed, source_sites=[pair[0]], target_sites=[pair[1]],
        max_tokens=settings.get("max_tokens", prepared.budget.map_tokens), seed=settings.get("seed", prepared.seed),
        batch_size=min(prepared.budget.batch_size, 32),
    )  # fmt: skip
    moments = chosen + replace(more, settings=chosen.settings)
    fitter = prepared.method.fitter
    mapping = fitter.fit(moments.pair(*pair))
    shuffled = ShuffledPairs(pinned(fitter, mapping)).fit(moments.pair(*pair))
    vector = prepared.sources[source]
    return replace(
        selected,
        transported=mapping.transport(vector),
        shuffled=shuffled.transport(vector),
        mapping=mapping,
        moments=moments,
        records=(),
    )


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


def _quality(mapping: Map, pair: SplitMoments) -> float:
    """Return a map's R² on validation documents; NaN where there are none."""
    score_of = getattr(mapping, "score_moments", None)
    return float(score_of(pair.validation).mean_r2) if score_of and pair.validation.count > 1 else float("nan")


def _tied(records: Sequence[Mapping[str, Any]], scores: Sequence[np.ndarray], best: int, bound: float) -> int:
    """Find the best map of those that steer alike, within one standard error."""

    def near(i: int) -> bool:
        behind = scores[best] - scores[i]
        return (
            records[i]["perplexity_ratio"] < bound and float(behind.mean()) <= float(behind.std()) / len(behind) ** 0.5
        )

    with np.errstate(all="ignore"):
        tied = [best, *(i for i in range(len(records)) if i != best and near(i))]
    return max(tied, key=lambda i: (-np.inf if np.isnan(records[i]["map_r2"]) else records[i]["map_r2"], i == best))


def _best(records: Sequence[Mapping[str, Any]], bound: float) -> int:
    """Find the best record within the bound on perplexity; without any, the least damaging."""
    places = range(len(records))
    allowed = [i for i in places if records[i]["perplexity_ratio"] < bound]
    if not allowed:
        return min(places, key=lambda i: records[i]["perplexity_ratio"])
    # NaN is never the best.
    return max(allowed, key=lambda i: -np.inf if np.isnan(records[i]["score"]) else records[i]["score"])

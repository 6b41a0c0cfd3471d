"""The second step of a transfer: layers and a headline strength, chosen on validation prompts and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xmodel_steer.core.directions import random_like
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.controls import ShuffledPairs, pinned
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
        headline: The strength.
        records: Everything that was tried.
    """

    source: SteeringVector
    native: SteeringVector
    transported: SteeringVector
    shuffled: SteeringVector
    mapping: Map
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

    Target layer: where the native vector steers best. Source layer: whose mapped vector steers best there. Headline strength:
    where the mapped vector steers best. All while perplexity is within the budget's bound, and all on validation
    prompts and text. Nothing is measured where there is one candidate.

    Args:
        prepared: What `prepare` returned.
    """
    records: list[dict[str, Any]] = []

    def best(varied: str, candidates: Mapping[Site, SteeringVector]) -> Site:
        if len(candidates) == 1:
            return next(iter(candidates))
        tried = gains(prepared, varied, [(vector, site, 1.0) for site, vector in candidates.items()])
        records.extend(tried)
        return list(candidates)[_best(tried, prepared.budget.max_perplexity_ratio)]

    natives, moments, fitter = prepared.natives, prepared.moments, prepared.method.fitter
    target_site = best("target layer", natives)
    native = natives[target_site]
    norm = native.norm(standardised=True)
    maps = {site: fitter.fit(moments.pair(site, target_site)) for site in prepared.sources}
    transported = {site: maps[site].transport(vector) for site, vector in prepared.sources.items()}
    scaled = {site: vector.with_norm(norm) for site, vector in transported.items()}
    source_site = best("source layer", scaled)
    mapping = maps[source_site]

    positive = prepared.budget.positive
    headline = positive[-1]
    if len(positive) > 1:  # strength 1 may have been measured with the layers
        known = [
            r for r in records if (r["varied"], r["site"]) == ("source layer", str(source_site)) and 1.0 in positive
        ]
        rest = [(scaled[source_site], source_site, s) for s in positive if s != 1.0 or not known]
        tried = [{**r, "varied": "strength"} for r in known] + gains(prepared, "strength", rest)
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
        headline,
        tuple(records),
    )


def gains(
    prepared: Prepared, varied: str, candidates: Sequence[tuple[SteeringVector, Site, float]]
) -> list[dict[str, Any]]:
    """Measure candidates on validation prompts and text.

    The score is half the difference that the two signs make.

    Args:
        prepared: What `prepare` returned.
        varied: What is chosen.
        candidates: For each the vector, the site that is chosen with it, and the strength.
    """
    settings = [prepared.steer(vector, sign * strength) for vector, _, strength in candidates for sign in (1, -1)]
    effects = prepared.damage([[], *settings], prepared.text.calibration)
    measured = prepared.validation.measure(prepared.target, settings)
    records = []
    for i, (_, site, strength) in enumerate(candidates):
        up, down = (measured[2 * i + k].scores.mean() for k in (0, 1))
        ratio = max(effects[1 + 2 * i + k].perplexity for k in (0, 1)) / effects[0].perplexity
        records.append(
            {"recipe": prepared.label, "varied": varied, "layer": site.layer, "site": str(site), "strength": strength}
            | {"score": float(up - down) / 2, "perplexity_ratio": ratio}
        )
    return records


def _best(records: Sequence[Mapping[str, Any]], bound: float) -> int:
    """Find the best record within the bound on perplexity; without any, the least damaging."""
    places = range(len(records))
    allowed = [i for i in places if records[i]["perplexity_ratio"] < bound]
    if not allowed:
        return min(places, key=lambda i: records[i]["perplexity_ratio"])
    # NaN is never the best.
    return max(allowed, key=lambda i: -np.inf if np.isnan(records[i]["score"]) else records[i]["score"])

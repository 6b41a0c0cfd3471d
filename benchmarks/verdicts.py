"""How often the verdict is right, on results of planted truth: ``python benchmarks/verdicts.py``.

    python benchmarks/verdicts.py               # all of it, about an hour on one core; writes benchmarks/verdicts.json
    python benchmarks/verdicts.py --count 20

No model is run: scores are drawn. The native vector moves the score by .5, prompts scatter by .5 (or scores are 0 and 1),
and shares are those of the native effect. A random vector's own share scatters from vector to vector.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from sample_results import planted

TABLE = Path(__file__).parent / "verdicts.json"
NATIVE, VECTORS = 0.5, 5
OUTCOMES = {True: "transfers", False: "no evidence", None: "undecided"}


def _randoms(rng: np.random.Generator, scatter: float) -> list[float]:
    return (NATIVE * scatter * rng.standard_normal(VECTORS)).tolist()


def _carried(share: float, scatter: float) -> Callable[[np.random.Generator], dict[str, Any]]:
    return lambda rng: {"native": NATIVE, "mapped": NATIVE * share, "random": _randoms(rng, scatter), "shuffled": 0.0}


def _nothing(scatter: float, choices: int = 1) -> Callable[[np.random.Generator], dict[str, Any]]:
    """A map that carries nothing: its vector, the best of some, is one more random vector."""

    def effects(rng: np.random.Generator) -> dict[str, Any]:
        mapped, shuffled = (NATIVE * scatter * rng.standard_normal(choices).max() for _ in range(2))
        return {"native": NATIVE, "mapped": mapped, "random": _randoms(rng, scatter), "shuffled": shuffled}

    return effects


def _same_as_shuffled(rng: np.random.Generator) -> dict[str, Any]:
    return {"native": NATIVE, "mapped": 0.15, "random": _randoms(rng, 0.05), "shuffled": 0.15}


def _lacking(rng: np.random.Generator) -> dict[str, Any]:
    return {"native": 0.0, "mapped": 0.0, "random": [0.0] * VECTORS, "shuffled": 0.0}


def _no_direction(rng: np.random.Generator) -> dict[str, Any]:
    """Native moves the score up alone; the mapped vector moves it up in both directions."""
    return {
        "native": (NATIVE, 0.0),
        "mapped": (0.9 * NATIVE, 0.7 * NATIVE),
        "random": _randoms(rng, 0.05),
        "shuffled": 0.0,
    }


#: What is planted, whether it transfers, and the number of source layers that validation chose from.
CASES: dict[str, tuple[Callable[[np.random.Generator], dict[str, Any]], bool, int]] = {
    "a map that carries nothing, vectors alike": (_nothing(0.05), False, 1),
    "a map that carries nothing, vectors scatter by .3": (_nothing(0.3), False, 1),
    "the same, the best of three layers": (_nothing(0.3, 3), False, 3),
    "a map like that of shuffled pairs": (_same_as_shuffled, False, 1),
    "a concept that the target lacks": (_lacking, False, 1),
    "the same change in both directions": (_no_direction, False, 1),
    "a true share of .6, vectors scatter by .05": (_carried(0.6, 0.05), True, 1),
    "a true share of .6, the best of four layers": (_carried(0.6, 0.05), True, 4),
    "a true share of .6, vectors scatter by .1": (_carried(0.6, 0.1), True, 1),
    "a true share of .9, vectors scatter by .1": (_carried(0.9, 0.1), True, 1),
}


def outcome(case: str, n: int, binary: bool, seed: int) -> str:
    """Plant a case and return the verdict on it."""
    effects, _, choices = CASES[case]
    rng = np.random.default_rng([seed, n, binary])
    made = planted(effects(rng), n=n, noise=0.5 / 2**0.5, seed=seed, binary=binary)
    if choices > 1:
        tried = tuple({"recipe": "toy", "varied": "source layer", "site": str(k), "layer": k} for k in range(choices))
        made = replace(made, validation=tried)
    return OUTCOMES[made.verdict().transfers]


def main() -> None:
    """Try every case, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    table: dict[str, Any] = {}
    for case, (_, true, _) in CASES.items():
        for n in (12, 36, 72, 300):
            for binary in (False, True):
                seen = Counter(outcome(case, n, binary, seed) for seed in range(options.count))
                table[f"{case}; n = {n}; {'0 and 1' if binary else 'numbers'}"] = dict(seen)
                print(case, n, binary, dict(seen), "" if true else "(none transfers)", flush=True)
    if options.count == 200:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

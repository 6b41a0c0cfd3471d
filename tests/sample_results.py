"""A result with every arm, made up by hand, and its small parts."""

from typing import Any

import numpy as np
import torch

from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.maps.accumulator import MomentsAccumulator
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.maps.statistics import bootstrap_mean
from xmodel_steer.recipe.arms import EQUAL_KL, EQUAL_STRENGTH, joined_arm
from xmodel_steer.recipe.results import Result

SMALL = Space("small", Site(1), 4, "aaaa", "fold_ln")
LARGE = Space("large", Site(2, "resid_mid"), 3, "bbbb")
MAP_RECORD = {
    "fitter": "Ridge", "penalty": 0.01, "train_tokens": 51234, "coverage": 0.98, "test_documents": 49, "r2": 0.48, "r2_low": 0.2,
    "r2_high": 0.7, "cosine": 0.69, "norm_ratio": 0.69, "loss": {"train": 0.4, "test": 0.52},
}  # fmt: skip


def vector(space: Space = SMALL, seed: int = 0) -> SteeringVector:
    g = torch.Generator().manual_seed(seed)
    d, p, n, s = (torch.randn(space.width, generator=g) for _ in range(4))
    return SteeringVector(d, space, "joy", p, n, (3, 5), s.abs(), "a test")


def moments() -> Moments:
    rng = torch.Generator().manual_seed(1)
    made = MomentsAccumulator(
        {SMALL.site: SMALL}, {LARGE.site: LARGE}, [(SMALL.site, LARGE.site)], settings={"seed": 0}
    )
    for part in ("train", "validation", "test"):
        x, y = torch.randn(40, 4, generator=rng), torch.randn(40, 3, generator=rng)
        made.add(part, {SMALL.site: x}, {LARGE.site: y}, [i // 10 for i in range(40)], eligible=44)
    return made.moments()


def mapping() -> AffineMap:
    return Ridge().fit(moments().pair(SMALL.site, LARGE.site))


def result() -> Result:
    rng = np.random.default_rng(0)
    rows: list[tuple[str, float, float | None]] = [("unsteered", 0.0, None)]
    steered = ("native", "mapped", "random", "shuffled")
    rows += [(a, s, budget) for budget in (None, 0.1) for a in steered for s in (-1.0, 1.0)]
    base = rng.random(6)
    ids = tuple(f"prompt{i}" for i in range(6))
    arms = []
    for i, (name, strength, budget) in enumerate(rows):
        scores = base + strength * (1.0 if name in ("native", "mapped") else 0.01)
        seeds = [scores, scores + 0.1] if name == "random" else [scores]
        arms.append(
            joined_arm(
                name, [strength] * len(seeds), seeds, base, kl=[0.1 * abs(strength)], perplexity=[10.0 + i],
                agreement=[0.9], budget=budget, measures={"knowledge": bootstrap_mean(base)} if budget else {},
                texts=tuple(f"text {j} ∆\u2028" for j in range(6)), raw=("4/5",) * 6 if budget else (), ids=ids,
                at=EQUAL_KL if budget else EQUAL_STRENGTH, recipe="joy" if strength else "",
            )
        )  # fmt: skip
    similarity = {"mapped": {"cosine": 0.9, "norm_ratio": 1.0}, "shuffled": {"cosine": 0.0}}
    choice = {"source_layer": 1, "target_layer": 2, "strength": 1.0, "operator": "Add(strength=1.0)", "map": MAP_RECORD}
    return Result(
        "joy", "score", SMALL.to_dict() | {"hook": "h", "dtype": "float32"}, LARGE.to_dict() | {"hook": "h", "dtype": "float32"},
        tuple(arms), {"joy": choice | similarity["mapped"] | {"similarity": similarity}}, (), {"a": 1}, {"evaluation": list(ids)},
        {"split": 0}, {"torch": "x"}, vectors={"native": vector(LARGE), "source": vector()}, maps={"joy": mapping()},
    )  # fmt: skip


def planted(
    effects: dict[str, Any], *, n: int = 40, noise: float = 0.01, seed: int = 0, binary: bool = False, groups: int = 0
) -> Result:
    """A result of planted truth, at equal KL: each arm's mean change in direction + and in direction -.

    ``random`` has a pair of changes for each vector. A number alone is the same in both directions, with its sign.
    """
    rng = np.random.default_rng(seed)
    base = (rng.random(n) < 0.5).astype(float) if binary else 0.5 + noise * rng.standard_normal(n)
    labels = tuple(f"template {i % groups}" for i in range(n)) if groups else ()

    def scores(change: float) -> np.ndarray:
        if binary:
            return np.where(rng.random(n) < abs(change), float(change > 0), base)
        shared = np.repeat(noise * rng.standard_normal(groups or n), -(-n // (groups or n)))[:n] if groups else 0.0
        return base + change + shared + noise * rng.standard_normal(n)

    ids = tuple(f"prompt{i}" for i in range(n))
    arms = [joined_arm("unsteered", [0.0], [base], base, kl=[0.0], perplexity=[10.0], groups=labels, ids=ids)]
    for name, truth in effects.items():
        vectors = truth if name == "random" else [truth]
        pairs = [v if isinstance(v, tuple) else (v, -v) for v in vectors]
        for k, sign in enumerate((1.0, -1.0)):
            arms.append(
                joined_arm(
                    name, [sign] * len(pairs), [scores(pair[k]) for pair in pairs], base, kl=[0.3], perplexity=[10.0], agreement=[0.9],
                    budget=0.3, at=EQUAL_KL, recipe="toy", groups=labels, ids=ids,
                )
            )  # fmt: skip
    return Result(
        "toy", "score", SMALL.to_dict(), LARGE.to_dict(), tuple(arms), {"toy": {"strength": 1.0}}, (), {}, {}, {}, {}
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)

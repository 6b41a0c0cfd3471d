"""Strengths at which all vectors do equal damage."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompts
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.interventions.contexts import steps_of
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.positions import Positions

SECANTS = 4  # steps of the secant method
LEAST = 1e-9  # a smaller KL, in nats per token, counts as this one: logarithms need a positive number


@dataclass(frozen=True)
class Dose:
    """A calibrated strength.

    Args:
        strength: The strength, with its sign.
        kl: KL from the unsteered model at this strength, in nats per token, on the calibration text.
        reached: True if that is the budget, within the tolerance; otherwise no allowed strength reaches it.
    """

    strength: float
    kl: float
    reached: bool


def calibrate(
    model: Any,
    vectors: Sequence[SteeringVector],
    kl: float | Sequence[float],
    texts: Prompts,
    *,
    signs: Sequence[int] | int = 1,
    positions: Positions = "all",
    max_strength: float = 16.0,
    tolerance: float = 0.05,
    max_tokens: int | None = 32,
    batch_size: int = 16,
) -> list[Dose]:
    """Find the strength at which each vector disturbs neutral text by a given KL.

    Arms can then be compared at equal damage. All vectors are searched together, so that each pass over the text
    serves all of them. The search is the secant method in logarithms of strength and KL, where KL ∝ strength² is a line.
    What that does not find, Chandrupatla's bracketing method does (``scipy.optimize.elementwise.find_root``).

    Args:
        model: The model that is steered.
        vectors: The vectors.
        kl: The budget, in nats per token: one for all vectors, or one for each.
        texts: Neutral text. No score is looked at, so the KL may be reported on the same text.
        signs: 1 or -1, the direction to steer in: one for all vectors, or one for each.
        positions: Where to steer.
        max_strength: Largest strength that is tried.
        tolerance: Accepted error of the KL's logarithm.
        max_tokens: Tokens read of each text.
        batch_size: Texts at a time.

    Raises:
        TypeError: An argument has another type.
        ValueError: A budget is not positive, or a sign is neither 1 nor -1.
    """
    require_type("calibrate: vectors", SteeringVector, *vectors)
    for name, value in (("kl", kl), ("signs", signs), ("max_strength", max_strength), ("tolerance", tolerance)):
        require_type(f"calibrate: {name}", Real, *np.atleast_1d(value).tolist(), takes="a number")
    budgets = np.broadcast_to(np.asarray(kl, dtype=float), (len(vectors),))
    signed = np.broadcast_to(np.asarray(signs), (len(vectors),)).tolist()
    if not (budgets > 0).all() or not set(signed) <= {1, -1}:
        raise ValueError(f"calibrate: budgets must be positive and signs 1 or -1, got {budgets.tolist()} and {signed}")
    documents = as_prompts(texts)
    known: dict[tuple[int, float], float] = {}  # KL of each vector at each log strength that was tried

    def measured(keys: Sequence[tuple[int, float]]) -> list[float]:
        new = [key for key in dict.fromkeys(keys) if key not in known]
        settings = [steps_of(vectors[i], Add(signed[i] * math.exp(x)), positions) for i, x in new]
        if new:
            effects = side_effects(model, settings, documents, max_tokens=max_tokens, batch_size=batch_size)
            known.update({key: effect.mean_kl for key, effect in zip(new, effects, strict=True)})
        return [known[key] for key in keys]

    def excess(x: np.ndarray, i: np.ndarray) -> np.ndarray:  # log of KL over budget, at log strengths x of vectors i
        figures = measured(list(zip(i.astype(int).ravel().tolist(), x.ravel().tolist(), strict=True)))
        return np.log(np.maximum(figures, LEAST) / budgets[i.astype(int).ravel()]).reshape(x.shape)

    _search(excess, len(vectors), math.log(max_strength), tolerance)
    doses = []
    for i, budget in enumerate(budgets):
        misses = {x: abs(math.log(max(value, LEAST) / budget)) for (k, x), value in known.items() if k == i}
        x = min(misses, key=misses.__getitem__)
        doses.append(Dose(signed[i] * math.exp(x), known[i, x], misses[x] <= tolerance))
    return doses


def _search(excess: Callable[[np.ndarray, np.ndarray], np.ndarray], count: int, top: float, tolerance: float) -> None:
    """Look for a zero below ``top`` of several functions, which note what is tried."""
    from scipy.optimize import elementwise

    x, slope = np.zeros(count), np.full(count, 2.0)
    missed = excess(x, np.arange(count))
    for _ in range(SECANTS):
        if not (left := np.flatnonzero(np.abs(missed) > tolerance)).size:
            break
        step = np.clip(x[left] - missed[left] / slope[left], top - 12, top) - x[left]
        there = excess(x[left] + step, left)
        steep = np.divide(there - missed[left], step, out=slope[left], where=step != 0)
        slope[left], missed[left] = np.clip(steep, 0.5, 8), there
        x[left] += step
    if (left := np.flatnonzero(np.abs(missed) > tolerance).astype(float)).size:
        first = np.clip(x[left.astype(int)], top - 12, top - 0.3)
        settings = {"tolerances": {"xatol": 0, "xrtol": 0, "fatol": tolerance, "frtol": 0}, "maxiter": 12}
        found = elementwise.bracket_root(
            excess, first - 0.1, first + 0.1, xmax=top, factor=3.0, args=(left,), maxiter=8
        )
        elementwise.find_root(excess, found.bracket, args=(left,), **settings)

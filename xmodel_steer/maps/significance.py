"""Tests over prompts and over vectors, and the correction for their number."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xmodel_steer.maps.statistics import NOT_FINITE, NOTHING, Estimate, scaled, undefined


def sign_flip_test(differences: "np.ndarray | list[float]", *, seed: int = 0) -> float:
    """Compute p of a mean above 0, against random signs of differences.

    One-sided paired permutation test (Fisher 1935) of ``scipy.stats.permutation_test``: exact up to 13 units,
    9,999 random flips for more.

    Args:
        differences: Difference of two arms for each unit.
        seed: Seed of the flips.

    Raises:
        ValueError: There are no differences, or one is NaN or infinite: p is undefined.

    Example:
        >>> sign_flip_test([1.0] * 10)
        0.0009765625
    """
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"sign_flip_test: p is undefined, {NOT_FINITE if values.size else NOTHING}")
    if not values.any():
        return 1.0
    values, _ = scaled(values)
    if len(values) == 1:  # SciPy refuses a single unit
        return 0.5 if values[0] > 0 else 1.0
    test = stats.permutation_test(
        (values,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def above_others(value: float, others: "np.ndarray | Sequence[float]", *, choices: int = 1) -> tuple[Estimate, float]:
    """Test whether one vector's effect is above what others of its kind scatter to.

    The unit is the vector. Under the null hypothesis the value is one more draw from the normal distribution that the
    others come from: t = (value - mean) / (s √(1 + 1/k)) with k - 1 degrees of freedom (the prediction interval, Hahn 1969).
    A value that is the best of several choices gets p times their number (Bonferroni).

    Args:
        value: The vector's effect.
        others: Effects of k random vectors.
        choices: Number of vectors that the value was chosen from.

    Returns:
        Value minus the others' mean, with the 95 % interval of one more draw, and the one-sided p. Undefined for fewer
        than two others, or where one is NaN or infinite.

    Example:
        >>> gap, p = above_others(0.83, [1.0, 0.0, 0.0])
        >>> round(p, 2)
        0.27
    """
    from scipy import stats

    k = len(others)
    with np.errstate(all="ignore"):
        gap, spread = (
            value - float(np.mean(others)) if k else math.nan,
            float(np.std(others, ddof=1)) if k > 1 else math.nan,
        )
    if not (math.isfinite(gap) and math.isfinite(spread)):
        return undefined(NOT_FINITE if k > 1 else "fewer than two random vectors show no scatter", k, gap), math.nan
    width = spread * math.sqrt(1 + 1 / k)
    if not width:
        return Estimate(gap, gap, gap, k), 0.0 if gap > 0 else 1.0
    reach = float(stats.t.ppf(0.975, k - 1)) * width
    return Estimate(gap, gap - reach, gap + reach, k), min(1.0, choices * float(stats.t.sf(gap / width, k - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm 1979).

    The chance of any false claim stays below the level. A p that is NaN stays NaN, and counts as a test.

    Example:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    from statsmodels.stats.multitest import multipletests

    p = np.asarray(p_values, dtype=float)
    corrected: Any = multipletests(np.nan_to_num(p, nan=1.0), method="holm")[1] if p.size else p
    return np.where(np.isnan(p), np.nan, corrected).tolist()

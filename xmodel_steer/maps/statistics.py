"""Estimates with their uncertainty: bootstrap intervals and shares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean with its 95 % interval, from a bootstrap or, for a share, from Wilson's formula (`rate`).

    ``f"{estimate:.2f}"`` is the value with its interval, or the reason why it is undefined.

    Args:
        value: The mean.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of independent units (prompts) that were resampled.
        undefined: Reason for a missing number. Then the interval's ends are NaN, and the value may be NaN.
    """

    value: float
    low: float
    high: float
    n: int
    undefined: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Estimate":
        """Read the fields from a `record`; null is NaN."""
        value, low, high = (math.nan if record[key] is None else record[key] for key in ("value", "low", "high"))
        return cls(value, low, high, record["n"], record.get("undefined", ""))

    def excludes(self, other: "Estimate") -> bool:
        """Tell whether the intervals have no common point; False where one is undefined."""
        return self.low > other.high or self.high < other.low

    def record(self) -> dict[str, Any]:
        """Return the fields as a JSON record; leave out an empty ``undefined``."""
        return {key: value for key, value in vars(self).items() if key != "undefined" or value}

    def _numbers(self) -> tuple[Any, ...]:
        return tuple(None if value != value else value for value in vars(self).values())

    def __eq__(self, other: object) -> bool:
        """Compare the fields; NaN equals NaN, so that saved estimates equal their source."""
        return isinstance(other, Estimate) and self._numbers() == other._numbers()

    def __hash__(self) -> int:
        return hash(self._numbers())

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        if not self.undefined:
            return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"
        if math.isnan(self.value):
            return f"undefined ({self.undefined})"
        return f"{self.value:{spec}} (interval undefined: {self.undefined})"


NOTHING, NOT_FINITE = "there are no values", "a value is NaN or infinite"  # reasons
ALONE = "one prompt shows no scatter"
NO_NATIVE = "the native vector does nothing"


def undefined(reason: str, n: int, value: float = math.nan) -> Estimate:
    """Return an estimate without an interval, and by default without a value.

    Args:
        reason: Reason in words.
        n: Number of units.
        value: The value, where only the interval is undefined.
    """
    return Estimate(value, math.nan, math.nan, n, reason)


def number(value: float | None, spec: str) -> str:
    """Format a number; NaN, infinity and None become a dash.

    Args:
        value: The number.
        spec: Its format, such as ``.2f``.
    """
    return f"{value:{spec}}" if value is not None and math.isfinite(value) else "–"


def quotient(value: float, by: float) -> float:
    """Return ``value / by``; NaN where ``by`` is 0."""
    return value / by if by else math.nan


def resamples(n: int, *, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Draw row indices of bootstrap samples with replacement, ``(draws, n)``.

    Statistics on the same indices are paired.
    """
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))


def bootstrap_mean(
    values: "np.ndarray | list[float] | list[list[float]]",
    *,
    groups: Sequence[str] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return the mean with a 95 % percentile bootstrap interval (Efron 1979).

    The estimate is undefined where there are no values, or where one is NaN or infinite. Of one prompt, or one group, only
    the value is defined.

    Args:
        values: One number per prompt, or one row per prompt with a number per seed. Then prompts and seeds
            are resampled, both whole, because every seed has every prompt (Owen 2007).
        groups: Label of each prompt, where prompts are related, such as fillings of one template. Then whole
            groups are resampled (Davison and Hinkley 1997, section 3.8).
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        ValueError: There are more or fewer labels than prompts.

    Example:
        >>> estimate = bootstrap_mean([0.0, 1.0, 1.0, 1.0])
        >>> estimate.value, estimate.n
        (0.75, 4)
    """
    table = np.asarray(values, dtype=float)
    n = len(table)
    member = _members(groups, n)
    if not table.size or not np.isfinite(table).all():
        return undefined(NOT_FINITE if table.size else NOTHING, n)
    table, exponent = scaled(table.reshape(n, -1))
    sizes, seeds = np.bincount(member), table.shape[1]
    if len(sizes) == 1:
        return undefined(ALONE, n, float(np.ldexp(table.mean(), exponent)))
    totals = np.stack([np.bincount(member, column) for column in table.T], 1)
    drawn, columns = resamples(len(sizes), draws=draws, seed=seed), resamples(seeds, draws=draws, seed=seed + 1)
    sums = np.take_along_axis(totals[drawn].sum(1), columns, 1).mean(1)
    low, high = np.quantile(sums / sizes[drawn].sum(1), [0.025, 0.975])
    ends = np.clip([table.mean(), low, high], table.min(), table.max())  # no rounding beyond the largest float
    value, low, high = np.ldexp(ends, exponent).tolist()
    return Estimate(value, low, high, n)


def scaled(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Divide by a power of two, for finite sums; return values and exponent."""
    exponent = int(np.frexp(np.abs(values).max())[1])
    return np.ldexp(values, -exponent), exponent


def _members(groups: Sequence[str] | None, n: int) -> np.ndarray:
    """Return the number of each row's group; by default each row is a group."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"groups: needs a label for each of {n} prompts, got {len(groups)}")
    number = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    return np.array([number[label] for label in groups])


def rate(scores: "np.ndarray | Sequence[float]", *, groups: Sequence[str] | None = None) -> Estimate:
    """Compute the share of ones, with its 95 % Wilson interval.

    A bootstrap interval of 0 in 200 would have no width. With groups, the interval uses the effective number
    of prompts (Korn and Graubard 1998): the number of independent prompts with the variance that the groups
    show. Scores that are all 0, or all 1, show no variance; then the number of groups is used.

    Args:
        scores: 0 or 1 for each prompt; without scores the share is undefined.
        groups: Label of each prompt, where prompts are related, such as fillings of one template.

    Raises:
        ValueError: A score is neither 0 nor 1, or there are more or fewer labels than scores.

    Example:
        >>> share = rate([0.0] * 200)
        >>> share.value, round(share.high, 3)
        (0.0, 0.019)
    """
    values = np.asarray(scores, dtype=float)
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"rate: needs scores of 0 or 1, got {values[:5].tolist()}")
    member = _members(groups, values.size)
    if not values.size:
        return undefined(NOTHING, 0)
    share = float(values.mean())
    count = int(member.max()) + 1
    effective = float(count)
    if 0 < share < 1 and 1 < count < values.size:
        apart = np.bincount(member, values - share)
        variance = count / max(1, count - 1) * float(apart @ apart) / values.size**2
        effective = min(values.size, share * (1 - share) / variance) if variance else values.size
    return Estimate(share, *wilson(share, effective), values.size)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Compute the 95 % interval of a share (Wilson 1927).

    Args:
        share: The share, 0 to 1.
        n: Sample size; an effective one need not be whole.
    """
    z = 1.959963984540054
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n**2))
    return (middle - half if share else 0.0), (middle + half if share < 1 else 1.0)  # no rounding at the ends


def transfer_efficiency(
    mapped: "np.ndarray | list[float]",
    native: "np.ndarray | list[float]",
    unsteered: "np.ndarray | list[float] | float" = 0.0,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return the mapped vector's effect as a share of the native vector's effect.

    (mapped - unsteered) / (native - unsteered), a ratio of means over the same units, with a 95 % bootstrap interval
    over units (and seeds, where there are several). Compare arms of equal damage, such as at equal KL (`calibrate`).

    Args:
        mapped: Scores of each unit, or ``(units, seeds)``.
        native: Scores of each unit.
        unsteered: Scores of each unit, or one number for all.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The ratio. It is undefined where the interval of the native effect contains 0, or a score is NaN or infinite.

        A draw in which the native effect is 0 or changes sign says nothing about the ratio. Dropping it would narrow
        the interval; instead it counts as below the lower end and as above the upper end. Where that leaves an
        end unbounded, the interval is undefined and the value stays.

    Example:
        >>> share = transfer_efficiency([0.8, 0.9, 0.7], [1.0, 1.1, 0.9], [0.0, 0.1, -0.1])
        >>> round(share.value, 3), share.n
        (0.8, 3)
        >>> f"{transfer_efficiency([0.1, 0.2], [0.5, -0.5]):.2f}"
        'undefined (the native vector does nothing)'
    """
    native = np.asarray(native, dtype=float)
    n = len(native)
    if n < 2:
        return undefined(ALONE if n else NOTHING, n)
    with np.errstate(all="ignore"):  # an overflow gives infinity, which is refused below
        base = np.broadcast_to(np.asarray(unsteered, dtype=float), native.shape)
        effect, table = native - base, np.asarray(mapped, dtype=float).reshape(n, -1) - base[:, None]
        if not np.isfinite(effect).all() or not np.isfinite(table).all():
            return undefined(NOT_FINITE, n)
        (effect, below), (table, above) = scaled(effect), scaled(table)
        bound = bootstrap_mean(effect, draws=draws, seed=seed)
        if bound.low <= 0 <= bound.high:
            return undefined(NO_NATIVE, n)
        index, carried = _drawn(table, draws, seed)
        effects = effect[index].mean(1)
        silent = effects * bound.value <= 0
        low = np.quantile(np.where(silent, -np.inf, carried / effects), 0.025)
        high = np.quantile(np.where(silent, np.inf, carried / effects), 0.975)
        value, low, high = np.ldexp([table.mean() / effect.mean(), low, high], above - below).tolist()
    if not math.isfinite(value):
        return undefined("the ratio is too large for a float", n)
    if not (math.isfinite(low) and math.isfinite(high)):
        return undefined(f"{NO_NATIVE} in {int(silent.sum())} of {draws} resamples", n, value)
    return Estimate(value, low, high, n)


def _drawn(table: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw units and seeds; return the units' indices, and the mean of each draw."""
    index = resamples(len(table), draws=draws, seed=seed)
    columns = resamples(table.shape[1], draws=draws, seed=seed + 1)
    return index, np.take_along_axis(table[index].mean(1), columns, 1).mean(1)


def dose_share(
    mapped: "np.ndarray | Sequence[float]",
    native: "np.ndarray | Sequence[Sequence[float]]",
    kl: Sequence[float],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Find the dose at which native does what mapped does.

    The KL at which native gains as much, over the KL that the mapped vector has. Between the doses the gain is taken to be
    linear in the square root of the KL, which grows as the strength does, from 0 at 0. With a 95 % bootstrap interval over
    units (and seeds).

    Args:
        mapped: Gain of each unit, or ``(units, seeds)``.
        native: Gain of each unit at each dose, ``(units, doses)``; the last dose has the mapped vector's KL.
        kl: KL of each dose, ascending.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The share, from 0 (mapped gains nothing) to 1 (native needs the whole KL, or more than was run). Its inverse is the dose
        shift. Undefined where the native effect at the last dose is, as in `transfer_efficiency`.

    Example:
        >>> share = dose_share(np.full(9, 0.5), np.full((9, 2), (0.5, 1.0)), (0.25, 1.0))
        >>> share.value, share.n
        (0.25, 9)
    """
    effects = np.asarray(native, dtype=float)
    n = len(effects)
    if not n:
        return undefined(NOTHING, 0)
    table = np.asarray(mapped, dtype=float).reshape(n, -1)
    whole = transfer_efficiency(table, effects[:, -1], draws=draws, seed=seed)
    if whole.undefined or not np.isfinite(effects).all():
        return undefined(whole.undefined or NOT_FINITE, n)
    if not (np.diff([0.0, *kl]) > 0).all():
        return undefined("the doses' KL does not rise", n)
    index, carried = _drawn(table, draws, seed)
    doses = np.sqrt(np.array([0.0, *kl]) / kl[-1])
    value, *drawn = (
        _first_dose(gain, doses, reached)
        for gain, reached in zip(
            [table.mean(), *carried], [effects.mean(0), *(effects[rows].mean(0) for rows in index)], strict=True
        )
    )
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return Estimate(value, low, high, n)


def _first_dose(gain: float, doses: np.ndarray, reached: np.ndarray) -> float:
    """Find the first dose, squared, at which a path from 0 has a gain."""
    sign = np.sign(reached[-1]) or 1.0
    path, gain = np.concatenate([[0.0], reached]) * sign, gain * sign
    if gain <= 0:
        return 0.0
    for i in range(1, len(path)):
        if path[i] >= gain:  # the first one: what comes before lies below
            at = doses[i - 1] + (doses[i] - doses[i - 1]) * (gain - path[i - 1]) / (path[i] - path[i - 1])
            return float(at**2)
    return 1.0

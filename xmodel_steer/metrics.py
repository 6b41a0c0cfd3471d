"""Numbers with their uncertainty: bootstrap intervals, and distances between distributions."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval: by bootstrap, or Wilson's of a share (`rate`).

    Args:
        value: The mean.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of independent units (prompts) that were resampled.
    """

    value: float
    low: float
    high: float
    n: int

    def excludes(self, other: "Estimate") -> bool:
        """Whether the two intervals have no point in common."""
        return self.low > other.high or self.high < other.low


def resamples(n: int, *, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Row indices of bootstrap samples, ``(draws, n)``, with replacement.

    Statistics computed on the same indices are paired.
    """
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))


def bootstrap_mean(
    values: "np.ndarray | list[float] | list[list[float]]",
    *,
    groups: Sequence[str] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean with a 95 % percentile bootstrap interval (Efron 1979).

    Args:
        values: One number per prompt, or one row per prompt with a number per seed: then prompts are resampled, and
            seeds, each whole, because every seed has every prompt (Owen 2007).
        groups: Label of each prompt, where some are of one kind, such as the fillings of a template: then groups are
            resampled, whole (Davison and Hinkley 1997, section 3.8).
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        ValueError: There are no values, one is NaN or infinite, or there are more or fewer labels than prompts.

    Example:
        >>> estimate = bootstrap_mean([0.0, 1.0, 1.0, 1.0])
        >>> estimate.value, estimate.n
        (0.75, 4)
    """
    table = np.asarray(values, dtype=float)
    if not table.size or not np.isfinite(table).all():
        raise ValueError("bootstrap: needs at least one value, and none of them NaN or infinite")
    table = table.reshape(len(table), -1)
    n, seeds = table.shape
    member = _members(groups, n)
    sizes = np.bincount(member)
    totals = np.stack([np.bincount(member, column) for column in table.T], 1)
    drawn, columns = resamples(len(sizes), draws=draws, seed=seed), resamples(seeds, draws=draws, seed=seed + 1)
    sums = np.take_along_axis(totals[drawn].sum(1), columns, 1).mean(1)
    low, high = np.quantile(sums / sizes[drawn].sum(1), [0.025, 0.975])
    return Estimate(float(table.mean()), float(low), float(high), n)


def _members(groups: Sequence[str] | None, n: int) -> np.ndarray:
    """The number of each row's group; without groups each row is one."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"groups: needs a label for each of {n} prompts, got {len(groups)}")
    number = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    return np.array([number[label] for label in groups])


def rate(scores: "np.ndarray | Sequence[float]", *, groups: Sequence[str] | None = None) -> Estimate:
    """Share of ones, with its 95 % Wilson interval: a bootstrap of 0 of 200 has no width.

    With groups, the interval is that of the effective number of prompts (Korn and Graubard 1998): as many independent ones as
    would have the variance that the groups show. Where all are 0, or all 1, nothing can be seen of it, and the number of
    groups is taken.

    Args:
        scores: 0 or 1 for each prompt.
        groups: Label of each prompt, where some are of one kind, such as the fillings of a template.

    Raises:
        ValueError: There are no scores, one is neither 0 nor 1, or there are more or fewer labels than scores.

    Example:
        >>> found = rate([0.0] * 200)
        >>> found.value, round(found.high, 3)
        (0.0, 0.019)
    """
    values = np.asarray(scores, dtype=float)
    if not values.size or not np.isin(values, (0, 1)).all():
        raise ValueError(f"rate: needs scores of 0 or 1, at least one of them, got {values[:5].tolist()}")
    share, member = float(values.mean()), _members(groups, values.size)
    count = int(member.max()) + 1
    effective = float(count)
    if 0 < share < 1 and 1 < count < values.size:
        apart = np.bincount(member, values - share)
        variance = count / max(1, count - 1) * float(apart @ apart) / values.size**2
        effective = min(values.size, share * (1 - share) / variance) if variance else values.size
    return Estimate(share, *wilson(share, effective), values.size)


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of so many independent ones (Wilson 1927).

    Args:
        share: The share, 0 to 1.
        n: How many; an effective number need not be whole.
    """
    z = 1.959963984540054
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n**2))
    return (middle - half if share else 0.0), (middle + half if share < 1 else 1.0)  # no rounding at the ends


def sign_flip_test(differences: "np.ndarray | list[float]", *, seed: int = 0) -> float:
    """P of a mean above 0 if each unit's difference could as well have the other sign.

    One-sided paired permutation test (Fisher 1935), by ``scipy.stats.permutation_test``: exact up to 13 units, else
    9,999 random flips.

    Args:
        differences: For each unit the difference of two arms.
        seed: Seed of the flips.

    Example:
        >>> sign_flip_test([1.0] * 10)
        0.0009765625
    """
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    if not values.any():
        return 1.0
    if len(values) == 1:  # two flips, which SciPy does not take
        return 0.5 if values[0] > 0 else 1.0
    found = stats.permutation_test(
        (values,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979): the chance of one false claim among all stays below the level.

    Example:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    from statsmodels.stats.multitest import multipletests

    corrected: Any = multipletests(list(p_values), method="holm")[1] if len(p_values) else []
    return [float(p) for p in corrected]


def transfer_efficiency(
    mapped: "np.ndarray | list[float]",
    native: "np.ndarray | list[float]",
    unsteered: "np.ndarray | list[float] | float" = 0.0,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """How much of the native vector's effect a mapped one has: (mapped - unsteered) / (native - unsteered).

    A ratio of means over the same units, with a 95 % bootstrap interval over units (and seeds, where there are
    several). Compare arms that do equal damage, such as at equal KL (`calibrate`).

    Args:
        mapped: Scores of each unit, or ``(units, seeds)``.
        native: Scores of each unit.
        unsteered: Scores of each unit, or one number for all.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The ratio; None, undefined, where the native vector does nothing: its interval holds 0.

    Example:
        >>> made = transfer_efficiency([0.8, 0.9, 0.7], [1.0, 1.1, 0.9], [0.0, 0.1, -0.1])
        >>> round(made.value, 3), made.n
        (0.8, 3)
    """
    base = np.broadcast_to(np.asarray(unsteered, dtype=float), np.shape(native))
    theirs = np.asarray(native, dtype=float) - base
    table = np.asarray(mapped, dtype=float).reshape(len(theirs), -1) - base[:, None]
    bound = bootstrap_mean(theirs, draws=draws, seed=seed)
    if bound.low <= 0 <= bound.high:
        return None
    index = resamples(len(theirs), draws=draws, seed=seed)
    columns = resamples(table.shape[1], draws=draws, seed=seed + 1)
    ours = np.stack([table[rows][:, seeds].mean() for rows, seeds in zip(index, columns, strict=True)])
    low, high = np.quantile(ours / theirs[index].mean(1), [0.025, 0.975])
    return Estimate(float(table.mean() / theirs.mean()), float(low), float(high), len(theirs))


def rouge_l(text: str, other: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004); 1 for two texts without words.

    Example:
        >>> rouge_l("The cat sat.", "the cat slept")
        0.6666666666666666
    """
    from rapidfuzz.distance import LCSseq

    a, b = (re.findall(r"\w+", t.lower()) for t in (text, other))
    if not a or not b:
        return float(a == b)
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))


@dataclass(frozen=True, eq=False)
class Reference:
    """Next-token distributions that others are compared with, kept so that they are computed once.

    Args:
        probabilities: p, one row per position.
        negative_entropy: Σ p log p of each row, in nats.
        top: The likeliest token of each row.
    """

    probabilities: Float[Tensor, "n vocabulary"]
    negative_entropy: Float[Tensor, " n"]
    top: Int[Tensor, " n"]

    @classmethod
    def of(cls, logits: Float[Tensor, "n vocabulary"]) -> "Reference":
        """The distributions of logits."""
        p = logits.float().softmax(-1)
        return cls(p, torch.xlogy(p, p).sum(-1), logits.max(-1).indices)

    def compare(
        self, logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, " n"], *, chunk: int = 16
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """KL(reference ‖ logits) and -log q(target) of each row, in nats, and whether the likeliest token is the same.

        KL = Σ p log p - Σ p z + log Z with the logits z; a few rows at a time, because
        vocabularies are large and caches small.
        """
        kl, loss = [], []
        for i in range(0, len(targets), chunk):
            z = logits[i : i + chunk].float().clamp(min=-1e30)  # 0 · -inf is no number
            log_norm = z.logsumexp(-1)
            cross = torch.linalg.vecdot(self.probabilities[i : i + chunk], z)
            kl.append(self.negative_entropy[i : i + chunk] - cross + log_norm)
            loss.append(log_norm - z.gather(1, targets[i : i + chunk, None])[:, 0])
        return torch.cat(kl).clamp(min=0), torch.cat(loss), logits.max(-1).indices == self.top

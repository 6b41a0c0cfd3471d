"""One vector's measurement: an arm, at one strength or at one KL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xmodel_steer.maps.statistics import Estimate, bootstrap_mean

ARMS = ("unsteered", "native", "mapped", "random", "shuffled")
CONTROLS = ("random", "shuffled")
LEVEL = 0.05  # of the corrected tests


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm at one strength, or at one KL.

    Args:
        arm: ``unsteered``, ``native`` (the target's own difference of means: the ceiling),
            ``mapped``, ``random`` (all seeds together) or ``shuffled`` (a map fitted on shuffled
            pairs).
        strength: In units of the native vector's norm in standardised coordinates; at equal KL the
            calibrated one, of several seeds the mean.
        effect: Mean score, with a bootstrap interval over prompts.
        change: Mean of the paired difference from the unsteered model, with its interval.
        kl: KL from the unsteered model on neutral text, nats per token.
        perplexity: Perplexity of neutral text.
        agreement: Share of the tokens of neutral text where the likeliest next token is the unsteered model's.
        budget: The KL that the strength was calibrated to, on other neutral text; None at a fixed strength.
        reached: Whether its strengths reach that KL; if not, no strength that was tried does.
        side: Other behaviours measured beside this one, by name.
        scores: Score of each prompt (the mean over seeds, for ``random``).
        seeds: For ``random``: the mean score of each seed.
        table: For ``random``: the score of each prompt under each seed.
        texts: The generated texts (of the first seed, for ``random``).
        raw: What a judge said of each of these texts.
    """

    arm: str
    strength: float
    effect: Estimate
    change: Estimate
    kl: float
    perplexity: float
    agreement: float = 1.0
    budget: float | None = None
    reached: bool = True
    side: Mapping[str, Estimate] = field(default_factory=dict)
    scores: tuple[float, ...] = field(repr=False, default=())
    seeds: tuple[float, ...] = ()
    table: tuple[tuple[float, ...], ...] = field(repr=False, default=())
    texts: tuple[str, ...] = field(repr=False, default=())
    raw: tuple[str, ...] = field(repr=False, default=())

    def __repr__(self) -> str:
        at = f"strength {self.strength:.3g}" if self.budget is None else f"KL {self.budget:.3g}"
        return f"Arm({self.arm!r} at {at}: effect {self.effect:.3f}, n = {self.effect.n}, KL {self.kl:.3g})"

    def per_seed(self) -> np.ndarray:
        """Scores ``(prompts, seeds)``; one column where there are no seeds."""
        return np.array(self.table if self.table else [[s] for s in self.scores], dtype=float)


def arm_record(arm: Arm) -> dict[str, Any]:
    """Return an arm as plain JSON values, without texts and single scores."""
    return {
        "arm": arm.arm,
        "strength": arm.strength,
        "budget": arm.budget,
        "reached": arm.reached,
        "effect": arm.effect.value,
        "low": arm.effect.low,
        "high": arm.effect.high,
        "n": arm.effect.n,
        "change": arm.change.value,
        "change_low": arm.change.low,
        "change_high": arm.change.high,
        "kl": arm.kl,
        "perplexity": arm.perplexity,
        "agreement": arm.agreement,
        **({"undefined": why} if (why := arm.effect.undefined or arm.change.undefined) else {}),
        **({"side": {name: estimate.record() for name, estimate in arm.side.items()}} if arm.side else {}),
        **({"seeds": list(arm.seeds)} if arm.seeds else {}),
    }


def difference(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Subtract scores; infinite, and then undefined, where too large for a float."""
    with np.errstate(over="ignore", invalid="ignore"):
        return scores - base


def joined_arm(
    name: str,
    strengths: Sequence[float],
    scores: Sequence[np.ndarray],
    base: np.ndarray,
    *,
    kl: Sequence[float],
    perplexity: Sequence[float],
    agreement: Sequence[float],
    budget: float | None = None,
    reached: bool = True,
    side: Mapping[str, Estimate] | None = None,
    texts: tuple[str, ...] = (),
    raw: tuple[str, ...] = (),
) -> Arm:
    """One arm of the measurements of all its seeds.

    Args:
        name: The arm.
        strengths: Strength of each seed.
        scores: Scores of every prompt, for each seed.
        base: Scores of the unsteered model.
        kl: KL of each seed.
        perplexity: Perplexity of each seed; the geometric mean is kept.
        agreement: Agreement of each seed.
        budget: The KL that the strengths were calibrated to.
        reached: Whether they reach it.
        side: Side behaviours, already joined.
        texts: The texts of the first seed.
        raw: A judge's answers about them.
    """
    table = np.stack(list(scores), 1)
    several = table.shape[1] > 1
    with np.errstate(all="ignore"):  # what overflows is infinite, and told by that
        means, geometric = (table.mean(1), table.mean(0)), np.exp(np.mean(np.log(perplexity)))
    return Arm(
        arm=name,
        strength=float(np.mean(strengths)),
        effect=bootstrap_mean(table),
        change=bootstrap_mean(difference(table, base[:, None])),
        kl=float(np.mean(kl)),
        perplexity=float(geometric),
        agreement=float(np.mean(agreement)),
        budget=budget,
        reached=reached,
        side=dict(side or {}),
        scores=tuple(means[0].tolist()),
        seeds=tuple(means[1].tolist()) if several else (),
        table=tuple(map(tuple, table.tolist())) if several else (),
        texts=texts,
        raw=raw,
    )

"""Measurements of one vector: an arm, at one strength or at one KL."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmodel_steer.maps.statistics import Estimate, bootstrap_mean, rate, undefined, wilson

ARMS = ("unsteered", "native", "mapped", "random", "shuffled")
CONTROLS = ("random", "shuffled")
LEVEL = 0.05  # of each test
EQUAL_STRENGTH, EQUAL_KL, OWN_KL = "equal strength", "equal KL", "own KL"
EFFICIENCY = "efficiency"  # the name of a measure: an arm's effect over the native one's
AGREEMENT = "agreement with the clean answer"
STRICTER = ("unchanged", "word for word")  # ends of names of measures that repeat a looser one
NOT_RECORDED = "not recorded"


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm of one recipe, measured on evaluation prompts at one strength or at one KL.

    Args:
        arm: ``unsteered``, ``native`` (the target's own vector: the ceiling), ``mapped``, ``random`` (all seeds together),
            ``shuffled`` (a map fitted on shuffled pairs), ``prompted`` (an instruction in words), or another name that a study explains.
        effect: Mean score, with a 95 % interval over prompts.
        kl: KL from the unsteered model on neutral text, nats per token.
        perplexity: Perplexity of neutral text.
        change: Mean of the paired difference from the unsteered model, with its interval.
        recipe: How the vector is found and what is done with it; empty for an unsteered arm that all recipes share.
        operator: The operator, as text.
        at: ``equal strength``, ``equal KL`` with the native vector, or ``own KL``, which an instruction in words has.
        strength: In units of the native vector's norm in standardised coordinates, the mean over seeds; NaN where the operator
            has none, or the arm joins two directions.
        budget: The KL that the strength was brought to; None at a fixed strength.
        reached: True where the strength reaches that KL; else no strength that was tried does.
        agreement: Share of neutral tokens where the likeliest next token is the unsteered model's.
        measures: Other measurements of the same setting, listed by what they measure.
        seeds: Number of vectors that the numbers are means of.
        ids: Id of each prompt, or pair of prompts.
        groups: Kind of each prompt, where some are fillings of one template.
        scores: Score of each prompt, the mean over seeds.
        table: Score of each prompt under each seed, where there are several.
        texts: Generated texts, of the first seed.
        more_texts: Generated texts of each further seed.
        raw: A judge's words about each of these texts.
    """

    arm: str
    effect: Estimate
    kl: float
    perplexity: float
    change: Estimate = field(default_factory=lambda: undefined(NOT_RECORDED, 0))
    recipe: str = ""
    operator: str = ""
    at: str = EQUAL_STRENGTH
    strength: float = math.nan
    budget: float | None = None
    reached: bool = True
    agreement: float = math.nan
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    seeds: int = 1
    ids: tuple[str, ...] = field(repr=False, default=())
    groups: tuple[str, ...] = field(repr=False, default=())
    scores: tuple[float, ...] = field(repr=False, default=())
    table: tuple[tuple[float, ...], ...] = field(repr=False, default=())
    texts: tuple[str, ...] = field(repr=False, default=())
    more_texts: tuple[tuple[str, ...], ...] = field(repr=False, default=())
    raw: tuple[str, ...] = field(repr=False, default=())

    def __repr__(self) -> str:
        at = self.at if math.isnan(self.strength) else f"strength {self.strength:.3g}"
        at = at if self.budget is None else f"KL {self.budget:.3g}"
        of = f" of {self.recipe!r}" if self.recipe else ""
        return f"Arm({self.arm!r}{of} at {at}: effect {self.effect:.3f}, n = {self.effect.n}, KL {self.kl:.3g})"

    @property
    def sign(self) -> str:
        """Direction of steering, ``"+"`` or ``"-"``; ``"+"`` where the strength has no sign."""
        return "-" if self.strength < 0 else "+"

    @property
    def title(self) -> str:
        """Name of the arm, with its number of seeds where there are several."""
        return self.arm + (f" × {self.seeds}" if self.seeds > 1 else "")

    @property
    def undefined(self) -> str:
        """Reason why a number of it is undefined, or nothing."""
        change = self.change.undefined
        return self.effect.undefined or (change if change != NOT_RECORDED else "")

    def per_seed(self) -> np.ndarray:
        """Scores ``(prompts, seeds)``; one column where there are no seeds."""
        return np.array(self.table if self.table else [[s] for s in self.scores], dtype=float)

    def row(self) -> dict[str, Any]:
        """Return the arm as plain JSON values, without texts and single scores."""
        kept = self.change.undefined != NOT_RECORDED
        change = (self.change.value, self.change.low, self.change.high) if kept else (None, None, None)
        return {
            "arm": self.arm,
            "recipe": self.recipe,
            "operator": self.operator,
            "at": self.at,
            "strength": None if math.isnan(self.strength) else self.strength,
            "budget": self.budget,
            "reached": self.reached,
            "effect": self.effect.value,
            "low": self.effect.low,
            "high": self.effect.high,
            "n": self.effect.n,
            **dict(zip(("change", "change_low", "change_high"), change, strict=True)),
            "kl": self.kl,
            "perplexity": self.perplexity,
            "agreement": None if math.isnan(self.agreement) else self.agreement,
            "seeds": self.seeds,
            **({"undefined": self.undefined} if self.undefined else {}),
            "measures": {name: measure.record() for name, measure in self.measures.items()},
        }


def difference(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Subtract scores; infinite, and then undefined, where too large for a float."""
    with np.errstate(over="ignore", invalid="ignore"):
        return scores - base


def estimate(scores: "np.ndarray | Sequence[np.ndarray]", groups: Sequence[str] | None = None) -> Estimate:
    """Average over prompts and seeds, with a 95 % interval.

    Wilson's interval where every score is 0 or 1: a bootstrap of 200 ones has no width. Else a bootstrap over prompts and
    seeds. For zeros and ones under several seeds it is never narrower than Wilson's for one seed.

    Args:
        scores: ``(prompts,)`` or ``(prompts, seeds)``.
        groups: Label of each prompt where some are of one kind: the intervals are then those of so many kinds.
    """
    table = np.asarray(scores, dtype=float)
    table = table.reshape(len(table), -1)
    share = bootstrap_mean(table, groups=groups)
    if share.undefined or not np.isin(table, (0, 1)).all():
        return share
    rows = table.mean(1)
    if np.isin(rows, (0, 1)).all():
        return rate(rows, groups=groups)
    low, high = wilson(share.value, len(set(groups)) if groups else len(rows))
    return replace(share, low=min(share.low, low), high=max(share.high, high))


def change_of(table: np.ndarray, base: np.ndarray, groups: Sequence[str] | None = None) -> Estimate:
    """Average the paired differences from base scores, with a bootstrap's 95 % interval.

    Prompts and seeds are drawn. Where shares all changed alike, or not at all, that has no width: Wilson's takes its place.

    Args:
        table: Scores ``(prompts, seeds)``.
        base: The base scores.
        groups: Label of each prompt, as for `estimate`.
    """
    moved = difference(table, base[:, None])
    change = bootstrap_mean(moved, groups=groups)
    alike = len(np.unique(moved)) == 1 and np.isin(table, (0, 1)).all() and np.isin(base, (0, 1)).all()
    if change.undefined or not alike:
        return change
    low, high = wilson(abs(change.value), len(set(groups)) if groups else len(moved))
    if not change.value:
        return replace(change, low=-high, high=high)
    return replace(change, low=low, high=high) if change.value > 0 else replace(change, low=-high, high=-low)


def joined_arm(
    name: str,
    strengths: Sequence[float],
    scores: Sequence[np.ndarray],
    base: np.ndarray,
    *,
    kl: Sequence[float],
    perplexity: Sequence[float],
    agreement: Sequence[float] = (math.nan,),
    measures: Mapping[str, Estimate] | None = None,
    **fields: Any,
) -> Arm:
    """Join the measurements of all seeds into one arm.

    Args:
        name: The arm.
        strengths: Strength of each seed.
        scores: Scores of every prompt, for each seed.
        base: Scores of the unsteered model.
        kl: KL of each seed.
        perplexity: Perplexity of each seed; the geometric mean is kept.
        agreement: Agreement of each seed.
        measures: Other measurements, already joined.
        fields: The other fields of `Arm`.
    """
    with np.errstate(all="ignore"):  # what overflows is infinite, and told by that
        geometric = np.exp(np.mean(np.log(perplexity)))
    return Arm(
        arm=name,
        kl=float(np.mean(kl)),
        perplexity=float(geometric),
        strength=float(np.mean(strengths)),
        agreement=float(np.mean(agreement)),
        measures=dict(measures or {}),
        **scored_fields(scores, base, fields.get("groups", ())),
        **fields,
    )


def scored_fields(scores: Sequence[np.ndarray], base: np.ndarray, groups: Sequence[str] = ()) -> dict[str, Any]:
    """Compute the fields of an `Arm` that its scores give.

    Args:
        scores: Scores of every prompt, for each seed.
        base: Scores of the unsteered model.
        groups: Kind of each prompt, where some are of one kind.
    """
    table = np.stack(list(scores), 1)
    with np.errstate(all="ignore"):  # what overflows is infinite, and told by that
        means = table.mean(1)
    return {
        "effect": estimate(table, groups or None),
        "change": change_of(table, base, groups or None),
        "seeds": table.shape[1],
        "scores": tuple(means.tolist()),
        "table": tuple(map(tuple, table.tolist())) if table.shape[1] > 1 else (),
    }


def gain_of(arms: Mapping[str, Arm], base: Arm) -> np.ndarray:
    """Compute how far an arm moves the score in the directions of steering.

    Args:
        arms: The arm in each direction, ``"+"`` and ``"-"``.
        base: The unsteered arm.

    Returns:
        For each prompt and seed ``(prompts, seeds)``.
    """
    start = np.array(base.scores)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # infinite, and then undefined
        changes = [(1.0 if sign == "+" else -1.0) * (arm.per_seed() - start) for sign, arm in arms.items()]
        return np.mean(changes, axis=0)

"""What a transfer found, as records, and what can be said of it in words.

Everything here is read from scores that were measured on evaluation prompts; nothing calls a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.scorers.phrases import Scorer, TextScorer, score_texts
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.statistics import (
    Estimate,
    bootstrap_mean,
    holm,
    number,
    quotient,
    sign_flip_test,
    transfer_efficiency,
)

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

    def per_seed(self) -> np.ndarray:
        """Scores ``(prompts, seeds)``; one column where there are no seeds."""
        return np.array(self.table if self.table else [[s] for s in self.scores], dtype=float)


@dataclass(frozen=True)
class Comparison:
    """The mapped arm against a control, prompt by prompt, at equal KL.

    Args:
        control: The control.
        sign: ``"+"`` or ``"-"``: the direction of steering.
        difference: Mean over prompts of mapped minus control, in the direction of steering.
        p: One-sided p of a paired sign-flip test; NaN where the difference is undefined.
        corrected: The same, corrected for the number of comparisons (Holm).
    """

    control: str
    sign: str
    difference: Estimate
    p: float
    corrected: float


@dataclass(frozen=True)
class Verdict:
    """The result in a few numbers, all from evaluation prompts, at equal KL.

    Args:
        strength: The headline strength, at which the native vector sets the KL.
        efficiency: Effect of the mapped vector over that of the native one: of the difference that both directions
            make, or of the one that was run. Undefined, with the reason, where the native vector does nothing.
        controls: The same ratio for each control.
        kl: The KL that all arms were calibrated to, for each direction.
        comparisons: The mapped arm against every control, in every direction in which the native vector moves the score.
        transfers: Whether it beats every control in these directions, after correction, and the ratio's interval is
            above 0; None where the ratio, its interval or a comparison is undefined.
        perplexity_ratio: For each direction, perplexity of neutral text under the mapped vector over the unsteered one.
        agreement: For each direction, next-token agreement with the unsteered model there.
        text: One sentence.
    """

    strength: float
    efficiency: Estimate
    controls: Mapping[str, Estimate]
    kl: Mapping[str, float]
    comparisons: tuple[Comparison, ...]
    transfers: bool | None
    perplexity_ratio: Mapping[str, float]
    agreement: Mapping[str, float]
    text: str


@dataclass(frozen=True, eq=False)
class TransferResult:
    """Everything that a transfer found, and how it was made.

    Args:
        label: Name of the behaviour.
        unit: What the effect is measured in.
        source: The source model and site.
        target: The target model and site.
        map: How the map was fitted and how well it does on test documents.
        arms: Every arm at every strength, and every arm at equal KL.
        headline: The strength chosen on validation.
        selection: What validation measured to choose layers and strength, and the calibrated strengths.
        similarity: Cosine to the native vector and norm ratio before rescaling, both in
            standardised coordinates, for the mapped and the shuffled vector.
        vectors: The vectors, by name.
        mapping: The map.
        spec: All arguments.
        splits: Ids of the prompts and documents of each set.
        versions: Versions of the programs.
        seeds: All seeds.
    """

    label: str
    unit: str
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    map: Mapping[str, Any]
    arms: tuple[Arm, ...]
    headline: float
    selection: Mapping[str, Any]
    similarity: Mapping[str, Any]
    vectors: Mapping[str, SteeringVector] = field(repr=False)
    mapping: Map | None = field(repr=False)
    spec: Mapping[str, Any] = field(repr=False)
    splits: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    seeds: Mapping[str, Any] = field(repr=False)

    def arm(self, name: str, strength: float) -> Arm:
        """The arm of a name at a fixed strength; ``unsteered`` has none, and is found at any.

        Raises:
            KeyError: It was not run.
        """
        for arm in self.arms:
            if arm.arm == name and (name == "unsteered" or (arm.budget is None and arm.strength == strength)):
                return arm
        raise KeyError(f"{name} at strength {strength:g} was not run; strengths: {list(self.strengths)}")

    def at_equal_kl(self, name: str, sign: str) -> Arm:
        """The arm of a name at the native vector's KL.

        Args:
            name: The arm.
            sign: ``"+"`` or ``"-"``: the direction of steering.

        Raises:
            KeyError: It was not run.
        """
        for arm in self.arms:
            if arm.arm == name and arm.budget is not None and (arm.strength > 0) == (sign == "+"):
                return arm
        raise KeyError(f"{name} was not run at equal KL in direction {sign}")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The fixed strengths that were run, ascending, without 0."""
        return tuple(sorted({a.strength for a in self.arms if a.arm != "unsteered" and a.budget is None}))

    @property
    def signs(self) -> tuple[str, ...]:
        """The directions that were compared at equal KL."""
        run = [a.strength for a in self.arms if a.arm == "native" and a.budget is not None]
        return tuple(s for s, way in (("+", 1), ("-", -1)) if any(way * strength > 0 for strength in run))

    def gain(self, name: str) -> np.ndarray:
        """How far an arm moves the score in the direction of steering, at the native vector's KL.

        Args:
            name: The arm.

        Returns:
            For each prompt and seed ``(prompts, seeds)``, over both directions: half of what lies between them. Where one
            direction was run, its change from the unsteered model.

        Raises:
            KeyError: It was not run at equal KL.
        """
        base = np.array(self.arm("unsteered", 0).scores)[:, None]
        with np.errstate(over="ignore", invalid="ignore"):  # infinite, and then undefined
            changes = [
                (1.0 if sign == "+" else -1.0) * (self.at_equal_kl(name, sign).per_seed() - base) for sign in self.signs
            ]
            return np.mean(changes, axis=0)

    def verdict(self) -> Verdict:
        """What survived, at the native vector's KL."""
        return _verdict(self)

    def rescored(self, scorer: Scorer, *, label: str, unit: str = "score") -> "TransferResult":
        """The same texts under another scorer: no model is called.

        Layers and strengths stay those that the first scorer chose on validation. Only texts of the random arm's first
        seed are kept, so that arm becomes that one vector; its KL stays the mean of all seeds. Arms without texts are left out.

        Args:
            scorer: A function from a text to a number.
            label: Name of what it reads.
            unit: What its number means.

        Raises:
            ValueError: No arm has texts, or the scorer needs the prompts, which a result does not keep.
        """
        if isinstance(scorer, TextScorer):
            raise ValueError("rescored: this scorer reads the prompts too, which a result does not keep; run transfer")
        base = self.arm("unsteered", 0)
        if not base.texts:
            raise ValueError(f"rescored: {self.label} was measured without texts, or they were not kept; run transfer")
        start = score_texts(scorer, base.texts)
        arms = []
        for arm in self.arms:
            if arm.texts:
                scores = score_texts(scorer, arm.texts)
                effect, change = bootstrap_mean(scores), bootstrap_mean(_difference(scores, start))
                own = tuple(scores.tolist())
                arms.append(replace(arm, effect=effect, change=change, scores=own, seeds=(), table=(), raw=()))
        spec = {**self.spec, "scorer": repr(scorer)[:200], "rescored_from": self.spec.get("scorer")}
        return replace(self, label=label, unit=unit, arms=tuple(arms), spec=spec)

    def to_frame(self) -> Any:
        """One row per arm and strength, as a pandas frame."""
        import pandas as pd

        return pd.DataFrame([arm_record(arm) for arm in self.arms])


def arm_record(arm: Arm) -> dict[str, Any]:
    """An arm as plain JSON values, without texts and single scores."""
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


def _verdict(result: TransferResult) -> Verdict:
    base = result.arm("unsteered", 0)
    ways = {sign: 1.0 if sign == "+" else -1.0 for sign in result.signs}
    arms = {name: {sign: result.at_equal_kl(name, sign) for sign in ways} for name in ARMS[1:]}

    native = result.gain("native")[:, 0]
    efficiency = transfer_efficiency(result.gain("mapped"), native)
    controls = {name: transfer_efficiency(result.gain(name), native) for name in CONTROLS}
    comparisons = _comparisons(arms, _moved(arms["native"], ways))
    transfers = None
    if not efficiency.undefined and not any(c.difference.undefined for c in comparisons):
        beats = all(c.corrected < LEVEL for c in comparisons)
        transfers = beats and efficiency.low > 0 and bootstrap_mean(native).value > 0
    kl = {sign: arms["native"][sign].kl for sign in ways}
    perplexity = {sign: quotient(arms["mapped"][sign].perplexity, base.perplexity) for sign in ways}
    agreement = {sign: arms["mapped"][sign].agreement for sign in ways}
    verdict = Verdict(result.headline, efficiency, controls, kl, comparisons, transfers, perplexity, agreement, "")
    return replace(verdict, text=_in_words(result, verdict, base))


def _moved(native: Mapping[str, Arm], ways: Mapping[str, float]) -> Mapping[str, float]:
    """The directions in which the native vector moves the score; all, where it moves it in none alone.

    A text that has no French cannot lose any: where the native vector does nothing, no arm can do better than a control.
    """
    moved = {
        sign: way
        for sign, way in ways.items()
        if min(way * native[sign].change.low, way * native[sign].change.high) > 0
    }
    return moved or ways


def _comparisons(arms: Mapping[str, Mapping[str, Arm]], ways: Mapping[str, float]) -> tuple[Comparison, ...]:
    pairs = [(control, sign) for control in CONTROLS for sign in ways]
    differences = [
        ways[sign] * _difference(np.array(arms["mapped"][sign].scores), np.array(arms[control][sign].scores))
        for control, sign in pairs
    ]
    means = [bootstrap_mean(d) for d in differences]
    p = [math.nan if mean.undefined else sign_flip_test(d) for mean, d in zip(means, differences, strict=True)]
    return tuple(
        Comparison(control, sign, mean, raw, corrected)
        for (control, sign), mean, raw, corrected in zip(pairs, means, p, holm(p), strict=True)
    )


def _difference(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The difference of scores; infinite, and then undefined, where it is too large for a float."""
    with np.errstate(over="ignore", invalid="ignore"):
        return scores - base


def _in_words(result: TransferResult, verdict: Verdict, base: Arm) -> str:
    budget = " and ".join(number(kl, ".2f") for kl in verdict.kl.values())
    where = f"at KL {budget} nats per token, n = {base.effect.n}"
    own = verdict.efficiency
    if math.isnan(own.value):
        return f"{result.label}: undefined, {own.undefined} {where}"
    beside = ", ".join(
        f"{name} {'undefined' if math.isnan(found.value) else f'{found.value:.2f}'}"
        for name, found in verdict.controls.items()
    )
    tested = [c.corrected for c in verdict.comparisons if not c.difference.undefined]
    worst = f"{'≤' if verdict.transfers else 'up to'} {max(*tested, 1e-4):.2g}" if tested else "undefined"
    test = f"paired test against each control: p {worst}, corrected for {len(verdict.comparisons)} comparisons"
    for c in verdict.comparisons:
        test += f"; {c.control} {c.sign} undefined ({c.difference.undefined})" if c.difference.undefined else ""
    said = {True: "transfers", False: "no evidence of transfer", None: "undefined"}[verdict.transfers]
    short = [f"{n} {s}" for n in ARMS[1:] for s in result.signs if not result.at_equal_kl(n, s).reached]
    missed = f"; {', '.join(short)} cannot be brought to that KL" if short else ""
    highest = number(float(np.max(list(verdict.perplexity_ratio.values()))), ".2f")
    cost = f"perplexity at most {highest} times the unsteered one"
    return f"{result.label}: {said}: {own:.2f} of native {where}; {beside}; {test}; {cost}{missed}"


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
        change=bootstrap_mean(_difference(table, base[:, None])),
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

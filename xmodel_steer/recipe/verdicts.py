"""A verdict in words, from paired tests against every control."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xmodel_steer.maps.statistics import (
    Estimate,
    bootstrap_mean,
    holm,
    number,
    quotient,
    sign_flip_test,
    transfer_efficiency,
)
from xmodel_steer.recipe.arms import ARMS, CONTROLS, EQUAL_KL, LEVEL, STRICTER, Arm, difference

if TYPE_CHECKING:
    from xmodel_steer.recipe.results import Result


@dataclass(frozen=True)
class Comparison:
    """The mapped arm against a control, prompt by prompt.

    Args:
        control: The control.
        sign: ``"+"`` or ``"-"``: the direction of steering.
        difference: Mean over prompts of mapped minus control, in the direction of steering.
        p: One-sided p of a paired sign-flip test; NaN where the difference is undefined.
        corrected: The same, corrected for the number of comparisons of the recipe (Holm).
    """

    control: str
    sign: str
    difference: Estimate
    p: float
    corrected: float


@dataclass(frozen=True)
class Verdict:
    """One recipe's result in a few numbers, all from evaluation prompts.

    Arms are compared at equal KL where the recipe has both directions there, else at the strength that validation chose.

    Args:
        recipe: The recipe.
        at: ``equal KL`` or ``equal strength``.
        efficiency: Effect of the mapped vector over that of the native one: of the difference that both directions
            make, or of the one that was run. Undefined, with the reason, where the native vector does nothing.
        controls: The same ratio for each control.
        kl: KL of the native arm on calibration text (at equal KL) or on neutral text, for each direction.
        comparisons: The mapped arm against every control, in every direction in which the native vector moves the score.
        transfers: True if it beats every control in these directions, after correction, and the ratio's interval is
            above 0; None where the ratio, its interval or a comparison is undefined.
        perplexity_ratio: For each direction, perplexity of neutral text under the mapped vector over the unsteered one.
        agreement: For each direction, next-token agreement with the unsteered model there.
        text: One sentence.
    """

    recipe: str
    at: str
    efficiency: Estimate
    controls: Mapping[str, Estimate]
    kl: Mapping[str, float]
    comparisons: tuple[Comparison, ...]
    transfers: bool | None
    perplexity_ratio: Mapping[str, float]
    agreement: Mapping[str, float]
    text: str

    def record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {
            "efficiency": self.efficiency.record(),
            "controls": {name: ratio.record() for name, ratio in self.controls.items()},
            "comparisons": [
                vars(c)
                | {"difference": c.difference.record()}
                | ({"undefined": reason} if (reason := c.difference.undefined) else {})
                for c in self.comparisons
            ],
        }


def verdict_of(result: "Result", recipe: str) -> Verdict:
    """Return the verdict on a recipe of a result.

    Raises:
        KeyError: An arm of the recipe was not run, or its scores were not kept.
    """
    base = result.arm("unsteered", recipe=recipe)
    arms = result.compared(recipe)
    ways = {sign: 1.0 if sign == "+" else -1.0 for sign in arms}
    gains = {name: totals(result.gain(name, recipe), base.groups) for name in ARMS[1:]}
    native = gains["native"][:, 0]
    efficiency = transfer_efficiency(gains["mapped"], native)
    controls = {name: transfer_efficiency(gains[name], native) for name in CONTROLS}
    comparisons = _comparisons(arms, _moved(arms, ways))
    transfers = None
    if not efficiency.undefined and not any(c.difference.undefined for c in comparisons):
        beats = all(c.corrected < LEVEL for c in comparisons)
        transfers = beats and efficiency.low > 0 and bootstrap_mean(native).value > 0
    first = next(iter(arms.values()))["native"]
    verdict = Verdict(
        recipe=recipe,
        at=first.at,
        efficiency=efficiency,
        controls=controls,
        kl={sign: named["native"].kl for sign, named in arms.items()},
        comparisons=comparisons,
        transfers=transfers,
        perplexity_ratio={sign: quotient(named["mapped"].perplexity, base.perplexity) for sign, named in arms.items()},
        agreement={sign: named["mapped"].agreement for sign, named in arms.items()},
        text="",
    )
    return replace(verdict, text=_in_words(result, verdict, base, arms))


def totals(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Add up the rows of each group of prompts; prompts without groups stay single.

    Ratios of means and signs of totals are then those of independent units.
    """
    if not groups:
        return values
    number_of = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    summed = np.zeros((len(number_of), *values.shape[1:]))
    np.add.at(summed, [number_of[label] for label in groups], values)
    return summed


def _moved(arms: Mapping[str, Mapping[str, Arm]], ways: Mapping[str, float]) -> Mapping[str, float]:
    """Find the directions in which the native vector moves the score.

    All, where it moves it in none alone.

    A text that has no French cannot lose any: where the native vector does nothing, no arm can do better than a control.
    """
    moved = {
        sign: way
        for sign, way in ways.items()
        if min(way * arms[sign]["native"].change.low, way * arms[sign]["native"].change.high) > 0
    }
    return moved or ways


def _comparisons(arms: Mapping[str, Mapping[str, Arm]], ways: Mapping[str, float]) -> tuple[Comparison, ...]:
    pairs = [(control, sign) for control in CONTROLS for sign in ways]
    differences = [
        ways[sign] * difference(np.array(arms[sign]["mapped"].scores), np.array(arms[sign][control].scores))
        for control, sign in pairs
    ]
    groups = [arms[sign]["mapped"].groups for _, sign in pairs]
    means = [bootstrap_mean(d, groups=g or None) for d, g in zip(differences, groups, strict=True)]
    p = [
        math.nan if mean.undefined else sign_flip_test(totals(d, g))
        for mean, d, g in zip(means, differences, groups, strict=True)
    ]
    return tuple(
        Comparison(control, sign, mean, raw, corrected)
        for (control, sign), mean, raw, corrected in zip(pairs, means, p, holm(p), strict=True)
    )


def _in_words(result: "Result", verdict: Verdict, base: Arm, arms: Mapping[str, Mapping[str, Arm]]) -> str:
    name, ratio = verdict.recipe or result.name, verdict.efficiency
    budget = " and ".join(number(kl, ".2f") for kl in verdict.kl.values())
    where = f"at KL {budget} nats per token, n = {base.effect.n}"
    if verdict.at == EQUAL_KL and math.isnan(ratio.value):
        return f"{name}: undefined, {ratio.undefined} {where}"
    controls = ", ".join(
        f"{control} {'undefined' if math.isnan(share.value) else f'{share.value:.2f}'}"
        for control, share in verdict.controls.items()
    )
    corrected = [c.corrected for c in verdict.comparisons if not c.difference.undefined]
    worst = f"{'≤' if verdict.transfers else 'up to'} {max(*corrected, 1e-4):.2g}" if corrected else "undefined"
    test = f"paired test against each control: p {worst}, corrected for {len(verdict.comparisons)} comparisons"
    for c in verdict.comparisons:
        test += f"; {c.control} {c.sign} undefined ({c.difference.undefined})" if c.difference.undefined else ""
    outcome = {True: "transfers", False: "no evidence of transfer", None: "undefined"}[verdict.transfers]
    highest = number(float(np.max(list(verdict.perplexity_ratio.values()))), ".2f")
    cost = f"perplexity at most {highest} times the unsteered one"
    if verdict.at != EQUAL_KL:
        return f"{name}: {outcome}: {in_short(result, verdict.recipe)}; {test}; {cost}"
    short = [f"{arm} {sign}" for arm in ARMS[1:] for sign in arms if not arms[sign][arm].reached]
    missed = f"; {', '.join(short)} cannot be brought to that KL" if short else ""
    return f"{name}: {outcome}: {ratio:.2f} of native {where}; {controls}; {test}; {cost}{missed}"


def in_short(result: "Result", recipe: str) -> str:
    """Say what the mapped arm does, next to native arm and controls."""
    mapped = result.arm("mapped", recipe=recipe)
    measures: Sequence[str] = [name for name in mapped.measures if not name.endswith(STRICTER)]
    costs = "".join(f", {name} {number(mapped.measures[name].value, '.3f')}" for name in measures)
    others = ", ".join(
        f"{name} {number(result.arm(name, recipe=recipe).effect.value, '.2f')}" for name in ARMS if name != "mapped"
    )
    return f"mapped {mapped.effect:.3f} of {mapped.effect.n}{costs} ({others})"

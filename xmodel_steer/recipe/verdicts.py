"""A verdict in words, from paired tests against every control."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
from xmodel_steer.recipe.arms import ARMS, CONTROLS, LEVEL, Arm, difference

if TYPE_CHECKING:
    from xmodel_steer.recipe.results import TransferResult


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


def verdict_of(result: "TransferResult") -> Verdict:
    """Return the verdict on a result."""
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
    """Find the directions in which the native vector moves the score.

    All, where it moves it in none alone.

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
        ways[sign] * difference(np.array(arms["mapped"][sign].scores), np.array(arms[control][sign].scores))
        for control, sign in pairs
    ]
    means = [bootstrap_mean(d) for d in differences]
    p = [math.nan if mean.undefined else sign_flip_test(d) for mean, d in zip(means, differences, strict=True)]
    return tuple(
        Comparison(control, sign, mean, raw, corrected)
        for (control, sign), mean, raw, corrected in zip(pairs, means, p, holm(p), strict=True)
    )


def _in_words(result: "TransferResult", verdict: Verdict, base: Arm) -> str:
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

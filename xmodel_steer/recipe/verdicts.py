"""A verdict in words: what survived, tested over prompts and over vectors, against every control."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xmodel_steer.maps.significance import above_others, sign_flip_test
from xmodel_steer.maps.statistics import (
    Estimate,
    bootstrap_mean,
    dose_share,
    number,
    quotient,
    transfer_efficiency,
    undefined,
)
from xmodel_steer.recipe.arms import ARMS, CONTROLS, EQUAL_KL, LEVEL, STRICTER, Arm, change_of, difference, gain_of
from xmodel_steer.recipe.settings import RECIPES

if TYPE_CHECKING:
    from xmodel_steer.recipe.results import Result

BAR = 0.2  # what the share's lower end must reach, and what a change in a still direction may not
NOT_RUN = "native was not run at half the strength"
LEAST_UNITS = math.ceil(-math.log2(LEVEL))  # of fewer, no outcome gives a p below the level
LEAST_VECTORS = 2  # of fewer, nothing shows how random vectors scatter


@dataclass(frozen=True)
class Comparison:
    """The mapped arm's gain against a control's.

    Args:
        control: ``shuffled``, or ``random``.
        over: ``prompts``: against the shuffled map, or the best of the random vectors, prompt by prompt.
            ``vectors``: against all random vectors, each a unit.
        difference: Mean of mapped minus control. Over vectors, the interval is that of one more random vector.
        p: One-sided: of a paired sign-flip test over prompts; over vectors, of `above_others`.
    """

    control: str
    over: str
    difference: Estimate
    p: float


@dataclass(frozen=True)
class Verdict:
    """One recipe's result in a few numbers, all from evaluation prompts.

    Arms are compared at equal KL where the recipe has both directions there, else at the strength that validation chose. A
    vector's gain is half of the difference that both directions make, or the change in the one that was run.

    It transfers if the mapped vector gains more than every control (each test at 5 %: all must pass, so that no correction
    is needed), if its share of the native gain is `BAR` or more at the interval's lower end, and if it does no harm: in a
    direction in which native does nothing, it moves the score by less than `BAR` of the native gain.

    Args:
        recipe: The recipe.
        at: ``equal KL`` or ``equal strength``.
        efficiency: The share: gain of the mapped vector over that of the native one. Undefined, with the reason, where
            the native vector does nothing.
        dose: The KL at which native gains as much as mapped, over the KL that both have (`dose_share`); its inverse is the dose
            shift. Undefined where native was not run at half the strength.
        controls: The same ratio as the share, for each control; of all random vectors together.
        kl: KL of the native arm on neutral text, for each direction.
        comparisons: The mapped arm against every control.
        transfers: True or False as above; None where it is undefined or cannot be decided.
        failed: The reasons why it is not True, in words.
        perplexity_ratio: For each direction, perplexity of neutral text under the mapped vector over the unsteered one.
        agreement: For each direction, next-token agreement with the unsteered model there.
        text: One sentence.
    """

    recipe: str
    at: str
    efficiency: Estimate
    dose: Estimate
    controls: Mapping[str, Estimate]
    kl: Mapping[str, float]
    comparisons: tuple[Comparison, ...]
    transfers: bool | None
    failed: tuple[str, ...]
    perplexity_ratio: Mapping[str, float]
    agreement: Mapping[str, float]
    text: str = ""

    @property
    def p(self) -> float:
        """The largest p: that of the claim that every control is beaten; NaN where one is undefined."""
        return float(np.max([c.p for c in self.comparisons]))

    def record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        made = asdict(self) | {
            "efficiency": self.efficiency.record(),
            "dose": self.dose.record(),
            "controls": {name: ratio.record() for name, ratio in self.controls.items()},
            "comparisons": [
                vars(c)
                | {"difference": c.difference.record()}
                | ({"undefined": reason} if (reason := c.difference.undefined) else {})
                for c in self.comparisons
            ],
        }
        if self.dose.undefined == NOT_RUN:
            del made["dose"]
        return made


def verdict_of(result: "Result", recipe: str) -> Verdict:
    """Return the verdict on a recipe of a result.

    Raises:
        KeyError: An arm of the recipe was not run, or its scores were not kept.
    """
    base = result.arm("unsteered", recipe=recipe)
    arms = result.compared(recipe)
    gains = {name: totals(result.gain(name, recipe), base.groups) for name in ARMS[1:]}
    native = gains["native"][:, 0]
    comparisons = _comparisons(gains, choices=_choices(result, recipe))
    first = next(iter(arms.values()))["native"]
    verdict = Verdict(
        recipe=recipe,
        at=first.at,
        efficiency=transfer_efficiency(gains["mapped"], native),
        dose=_dose(result, {sign: named["native"] for sign, named in arms.items()}, gains, base),
        controls={name: transfer_efficiency(gains[name], native) for name in CONTROLS},
        kl={sign: named["native"].kl for sign, named in arms.items()},
        comparisons=comparisons,
        transfers=None,
        failed=(),
        perplexity_ratio={sign: quotient(named["mapped"].perplexity, base.perplexity) for sign, named in arms.items()},
        agreement={sign: named["mapped"].agreement for sign, named in arms.items()},
    )
    undecided = _undecided(verdict, gains)
    failed = undecided or _failed(verdict, native, arms)
    verdict = replace(verdict, failed=failed, transfers=None if undecided else not failed)
    return replace(verdict, text=_in_words(result, verdict, base, arms))


def _dose(result: "Result", natives: Mapping[str, Arm], gains: Mapping[str, np.ndarray], base: Arm) -> Estimate:
    """Compare mapped with native at half its strength and at all of it."""
    native = gains["native"]
    try:
        halves = {s: result.arm("native", arm.strength / 2, recipe=arm.recipe) for s, arm in natives.items()}
    except KeyError:
        return undefined(NOT_RUN, len(native))
    kl = [float(np.mean([arm.kl for arm in arms.values()])) for arms in (halves, natives)]
    return dose_share(gains["mapped"], np.hstack([totals(gain_of(halves, base), base.groups), native]), kl)


def totals(values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Add up the rows of each group of prompts; prompts without groups stay single.

    Ratios of means and signs of totals are then those of independent units; the mean over groups is that over prompts.
    """
    if not groups:
        return values
    number_of = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    summed = np.zeros((len(number_of), *values.shape[1:]))
    np.add.at(summed, [number_of[label] for label in groups], values)
    return summed * (len(number_of) / len(groups))


def _choices(result: "Result", recipe: str) -> int:
    """Count the source sites that validation chose the mapped vector from."""
    tried = {
        str(record.get("site", record.get("layer")))
        for record in result.validation
        if record.get("varied") == "source layer" and recipe in recipes_of(record.get("recipe", recipe))
    }
    return max(1, len(tried))


def recipes_of(label: str) -> list[str]:
    """List the recipes whose site was chosen with a label's.

    Args:
        label: The behaviour's label.
    """
    return [label, *(f"{label}, {name}" for name in RECIPES)]


def _comparisons(gains: Mapping[str, np.ndarray], choices: int) -> tuple[Comparison, ...]:
    """Compare gains ``(units, seeds)`` over prompts and over vectors."""
    random = gains["random"]
    with np.errstate(all="ignore"):  # what overflows is undefined
        mapped, shuffled = gains["mapped"].mean(1), gains["shuffled"].mean(1)
        whole, per_vector = float(mapped.mean()), random.mean(0)
        best = random[:, int(np.nan_to_num(per_vector, nan=-np.inf).argmax())]

    def over_prompts(control: str, other: np.ndarray) -> Comparison:
        paired = difference(mapped, other)
        mean = bootstrap_mean(paired)
        return Comparison(control, "prompts", mean, math.nan if mean.undefined else sign_flip_test(paired))

    scatter, p = above_others(whole, per_vector, choices=choices)
    return (
        over_prompts("shuffled", shuffled),
        over_prompts("random", best),
        Comparison("random", "vectors", scatter, p),
    )


def _undecided(verdict: Verdict, gains: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """List why nothing can be said."""
    ratio, (units, vectors) = verdict.efficiency, gains["random"].shape
    if ratio.undefined:
        return (ratio.undefined,)
    reasons = []
    if units < LEAST_UNITS:
        reasons.append(f"undecidable at n = {units}: give {LEAST_UNITS} prompts (or groups of prompts) or more")
    if vectors < LEAST_VECTORS:
        reasons.append("undecidable with one random vector, which shows no scatter: give more")
    reasons += [
        f"{c.control} over {c.over} undefined ({c.difference.undefined})"
        for c in verdict.comparisons
        if c.difference.undefined and (c.over == "prompts" or vectors >= LEAST_VECTORS)
    ]
    return tuple(reasons)


def _failed(verdict: Verdict, native: np.ndarray, arms: Mapping[str, Mapping[str, Arm]]) -> tuple[str, ...]:
    """List the reasons against a transfer."""
    failed = []
    for control, name in (("shuffled", "the shuffled map"), ("random", "the random vectors")):
        p = max(c.p for c in verdict.comparisons if c.control == control)
        failed += [f"not above {name}: p {p:.2g}"] if p >= LEVEL else []
    if bootstrap_mean(native).value <= 0:
        failed.append("the native vector moves the score the other way")
    elif verdict.efficiency.low < BAR:
        failed.append(f"the share may be under {BAR}")
    # Where the native vector does nothing, the mapped one must do nothing either, or no more than the native one.
    changes = {sign: _signed(sign, named["native"]) for sign, named in arms.items()}
    moved = [way for way, low, _ in changes.values() if low > 0]
    for sign in (sign for sign, (_, low, high) in changes.items() if moved and low <= 0 <= high):
        mapped, base = arms[sign]["mapped"], np.array(arms[sign]["native"].scores)
        own, more = mapped.change, change_of(mapped.per_seed(), base, mapped.groups or None)
        told = not any(x.low <= 0 <= x.high for x in (own, more))
        if told and min(abs(own.value), abs(more.value)) >= BAR * max(moved):
            failed.append(f"it moves the score by {own.value:+.2g} in direction {sign}, where native does nothing")
    return tuple(failed)


def _signed(sign: str, arm: Arm) -> tuple[float, float, float]:
    """Return an arm's change and its interval in the direction of steering."""
    change = arm.change
    return (change.value, change.low, change.high) if sign == "+" else (-change.value, -change.high, -change.low)


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
    outcome = {True: "transfers", False: "no evidence of transfer", None: "undefined"}[verdict.transfers]
    outcome += f" ({'; '.join(verdict.failed)})" if verdict.failed else ""
    seeds = arms[next(iter(arms))]["random"].seeds
    test = f"tests against the shuffled map and {seeds} random vectors: p "
    test += (
        "undefined" if math.isnan(verdict.p) else f"{'≤' if verdict.transfers else 'up to'} {max(verdict.p, 1e-4):.2g}"
    )
    highest = number(float(np.max(list(verdict.perplexity_ratio.values()))), ".2f")
    cost = f"perplexity at most {highest} times the unsteered one"
    if verdict.at != EQUAL_KL:
        return f"{name}: {outcome}: {in_short(result, verdict.recipe)}; {test}; {cost}"
    short = [f"{arm} {sign}" for arm in ARMS[1:] for sign in arms if not arms[sign][arm].reached]
    missed = f"; {', '.join(short)} cannot be brought to that KL" if short else ""
    dose = "" if verdict.dose.undefined else f"native does as much at {verdict.dose:.2f} of that KL; "
    return f"{name}: {outcome}: {ratio:.2f} of native {where}; {dose}{controls}; {test}; {cost}{missed}"


def in_short(result: "Result", recipe: str) -> str:
    """Say what the mapped arm does, next to native arm and controls."""
    mapped = result.arm("mapped", recipe=recipe)
    measures: Sequence[str] = [name for name in mapped.measures if not name.endswith(STRICTER)]
    costs = "".join(f", {name} {number(mapped.measures[name].value, '.3f')}" for name in measures)
    others = ", ".join(
        f"{name} {number(result.arm(name, recipe=recipe).effect.value, '.2f')}" for name in ARMS if name != "mapped"
    )
    return f"mapped {mapped.effect:.3f} of {mapped.effect.n}{costs} ({others})"

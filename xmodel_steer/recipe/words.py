"""A result in plain sentences: what came of it, what its names mean, and what validation compared."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from xmodel_steer.maps.statistics import number
from xmodel_steer.recipe.arms import ARMS, Arm
from xmodel_steer.recipe.results import Result

MANY = 6  # recipes: more than these are summed up by the study's own first line
ARM_NAMES = {
    "unsteered": "the target as it is",
    "native": "the target's vector, found in the target itself",
    "mapped": "the vector that was found in the source, carried over by the map",
    "random": "random vectors of the same size",
    "shuffled": "the source's vector, carried over by a map of pairs that do not belong together",
    "prompted": "no vector, but the instruction in words",
}
OPERATOR_NAMES = {
    "Add": "adds the vector, times a strength",
    "Ablate": "removes what lies along the vector",
    "Clamp": "moves what lies along the vector to the mean of a class",
    "Rotate": "turns the activation towards the vector, at the same length",
}
_OTHERS = {
    "unsteered": "in the unsteered model",
    "native": "under the target's own vector",
    "random": "under random vectors",
    "shuffled": "through a map of shuffled pairs",
}


def sentences(result: Result) -> tuple[str, ...]:
    """Say what survived in a sentence or two a recipe, without statistics."""
    if len(result.recipes) > MANY:
        return ()
    counts = result.unit.startswith("share of ")
    told = []
    for recipe in result.recipes:
        with suppress(KeyError):  # an arm was not run: a study of another kind
            arms = {name: result.arm(name, recipe=recipe) for name in ARMS}
            counted = counts and all(set(arm.scores) <= {0.0, 1.0} for arm in arms.values())
            said = _counted(result, arms) if counted else _compared(result, recipe)
            told.append((f"{recipe}: " if len(result.recipes) > 1 else "") + said)
    return (f"Counted are {result.unit.removeprefix('share of ')}.", *told) if counts and told else tuple(told)


def _counted(result: Result, arms: Mapping[str, Arm]) -> str:
    """Count the prompts of each arm."""

    def count(arm: Arm) -> str:
        mean = f" (mean of {arm.seeds})" if arm.seeds > 1 else ""
        return f"{round(arm.effect.value * arm.effect.n, 1):g}{mean}"

    others = ", ".join(f"{count(arms[name])} {where}" for name, where in _OTHERS.items())
    mapped = arms["mapped"]
    return (
        f"{count(mapped)} of {mapped.effect.n} under the vector carried over from {result.source['model']}; {others}."
    )


def _compared(result: Result, recipe: str) -> str:
    """Compare with the target's own vector."""
    verdict = result.verdicts[recipe]
    said = {True: "It transfers", False: "No evidence that it transfers", None: "Nothing can be said"}
    reasons = f" ({'; '.join(verdict.failed)})" if verdict.failed else ""
    ratio, source, target = verdict.efficiency, result.source["model"], result.target["model"]
    if math.isnan(ratio.value):
        return f"{said[verdict.transfers]}{reasons}."
    shares = {name: number(share.value, ".0%") for name, share in verdict.controls.items()}
    return (
        f"{said[verdict.transfers]}{reasons}: carried over from {source}, the vector does {ratio.value:.0%} of what {target}'s own "
        f"vector does (95 % interval {ratio.low:.0%} to {ratio.high:.0%}, {result.arm('mapped', recipe=recipe).effect.n} prompts). "
        f"Random vectors do {shares['random']}, a map of shuffled pairs {shares['shuffled']}."
    )


def names_of(result: Result) -> dict[str, str]:
    """Explain the names of the arms and operators that a result has."""
    known = ARM_NAMES | OPERATOR_NAMES
    names = [arm.arm for arm in result.arms] + [arm.operator.split("(")[0] for arm in result.arms]
    return {name: known[name] for name in dict.fromkeys(names) if name in known}


def validated(result: Result) -> list[dict[str, str]]:
    """List what validation compared, and why it left some out, as rows."""
    bound = float(result.spec.get("max_perplexity_ratio", math.inf))
    rows = []
    for record in result.validation:
        shown: dict[str, Any] = {
            "recipe": record.get("recipe", ""),
            "compared": record.get("varied", ""),
            "site": record.get("site", f"layer {record['layer']}" if "layer" in record else ""),
            "how": record.get("operator", ""),
        }
        numbers = {n: record[n] for n in ("strength", "score", "perplexity_ratio", "map_r2") if n in record}
        shown |= {n.replace("_", " "): number(float(value), ".3f") for n, value in numbers.items()}
        if numbers.get("perplexity_ratio", 0.0) >= bound:
            shown["left out"] = (
                f"perplexity {numbers['perplexity_ratio']:.2f} times the unsteered one; the bound is {bound:g}"
            )
        rows.append(shown)
    return rows

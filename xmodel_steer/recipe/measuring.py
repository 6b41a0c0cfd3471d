"""The last step of a transfer: every run measured, and the seeds of each arm joined."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xmodel_steer.evaluation.behaviours.generated import Behaviour, Measured
from xmodel_steer.evaluation.damage import SideEffect, instructed_effect
from xmodel_steer.interventions.operators import Add
from xmodel_steer.recipe.arms import EQUAL_KL, OWN_KL, Arm, estimate, joined_arm
from xmodel_steer.recipe.matching import Run
from xmodel_steer.recipe.preparing import Prepared


def measure(prepared: Prepared, runs: Sequence[Run], side: Mapping[str, Behaviour]) -> tuple[Arm, ...]:
    """Measure every run on evaluation prompts and on neutral text that chose nothing.

    Side behaviours are measured unsteered and at equal KL alone. Runs of the same vector at the same strength are
    measured once: the native vector at the headline strength is also what sets the KL.

    Args:
        prepared: What `prepare` returned.
        runs: What `match_damage` returned.
        side: Other behaviours, with their names.
    """
    target = prepared.target
    keys = [(run.strength, *(id(step.vector) for step in run.setting)) for run in runs]  # type: ignore[union-attr]
    settings = {key: run.setting for key, run in zip(keys, runs, strict=True)}
    measured = dict(zip(settings, prepared.evaluation.measure(target, list(settings.values())), strict=True))
    costs = dict(zip(settings, prepared.damage(list(settings.values()), prepared.text.reported), strict=True))
    is_fair = [run.at == EQUAL_KL or not run.setting for run in runs]
    fair = list(dict.fromkeys(key for key, told in zip(keys, is_fair, strict=True) if told))
    others: dict[Any, dict[str, np.ndarray]] = {key: {} for key in fair}
    for name, behaviour in side.items():
        for key, found in zip(fair, behaviour.measure(target, [settings[key] for key in fair]), strict=True):
            others[key][name] = found.scores
    ids = tuple(prepared.evaluation.ids)
    outcomes = [
        replace(measured[key], measures=others[key] if told else {}, ids=ids)
        for key, told in zip(keys, is_fair, strict=True)
    ]
    arms = arms_of(runs, outcomes, [costs[key] for key in keys])
    return arms + _prompted(prepared, arms[0])


def _prompted(prepared: Prepared, base: Arm) -> tuple[Arm, ...]:
    """Measure the instructions in words, in both directions.

    Args:
        prepared: What `prepare` returned.
        base: The unsteered arm.
    """
    arms = []
    for sign, words in zip((1.0, -1.0), prepared.method.instructions, strict=True):
        if words:
            (found,) = prepared.evaluation.instructed(words).measure(prepared.target, [[]])
            cost = instructed_effect(
                prepared.target, words, prepared.text.reported, max_tokens=prepared.budget.neutral_tokens
            )
            arms.append(
                joined_arm(
                    "prompted", [sign], [found.scores], np.array(base.scores), kl=[cost.mean_kl], perplexity=[cost.perplexity],
                    agreement=[cost.agreement], recipe=prepared.label, operator=words, at=OWN_KL, ids=base.ids,
                    groups=base.groups, texts=found.texts, raw=found.raw,
                )
            )  # fmt: skip
    return tuple(arms)


def arms_of(
    runs: Sequence[Run],
    outcomes: Sequence[Measured],
    costs: Sequence[SideEffect],
) -> tuple[Arm, ...]:
    """Join the seeds of every arm.

    Args:
        runs: The runs; one of every recipe, or of all, is the unsteered one.
        outcomes: Scores, measures and texts of each run.
        costs: KL and perplexity of each run.
    """
    members: dict[object, list[int]] = {}
    for i, run in enumerate(runs):
        members.setdefault(run.key, []).append(i)
    base = {run.recipe: outcome.scores for run, outcome in zip(runs, outcomes, strict=True) if not run.setting}
    arms = []
    for places in members.values():
        run, first = runs[places[0]], outcomes[places[0]]
        arms.append(
            joined_arm(
                run.arm,
                [runs[i].strength for i in places],
                [outcomes[i].scores for i in places],
                base.get(run.recipe, base.get("")),  # type: ignore[arg-type]
                kl=[costs[i].mean_kl for i in places],
                perplexity=[costs[i].perplexity for i in places],
                agreement=[costs[i].agreement for i in places],
                measures={
                    name: estimate(np.stack([outcomes[i].measures[name] for i in places], 1), first.groups.get(name))
                    for name in first.measures
                },
                recipe=run.recipe,
                operator=_operator(runs, places),
                at=run.at,
                budget=run.budget,
                reached=all(runs[i].reached for i in places),
                ids=tuple(first.ids),
                groups=tuple(first.groups.get("effect", ())),
                texts=first.texts,
                more_texts=tuple(outcomes[i].texts for i in places[1:] if outcomes[i].texts),
                raw=first.raw,
            )
        )
    return tuple(arms)


def _operator(runs: Sequence[Run], places: Sequence[int]) -> str:
    """Return the operator as text, with the mean strength of the seeds."""
    strength = float(np.mean([runs[i].strength for i in places]))
    added = runs[places[0]].setting and not np.isnan(strength)
    return repr(Add(strength)) if added else runs[places[0]].operator

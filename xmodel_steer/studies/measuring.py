"""Measurement of every arm of a study on evaluation, and the study's record."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xmodel_steer.core.directions import random_like
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.damage import on_neutral, side_effects
from xmodel_steer.interventions.operators import Add, Operator
from xmodel_steer.models.facts import hardware_of
from xmodel_steer.recipe.arms import CONTROLS, EQUAL_KL, EQUAL_STRENGTH, Arm
from xmodel_steer.recipe.matching import Run, matched
from xmodel_steer.recipe.measuring import arms_of
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import versions
from xmodel_steer.studies.carried import Choice, Pair
from xmodel_steer.studies.choosing import Chosen, as_control
from xmodel_steer.studies.outcomes import Asked, Extent, Outcome
from xmodel_steer.studies.settings import Clock, Settings, end_of

BIASED = "mapped with the bias"


def _vectors(choice: Choice, random_seeds: int, seed: int) -> dict[str, list[SteeringVector]]:
    """Return the vectors of every arm of a recipe."""
    carried = choice.carried
    arms = {
        "native": [carried.native],
        "mapped": [carried.mapped],
        "random": [random_like(carried.native, seed=seed + k) for k in range(random_seeds)],
        "shuffled": [carried.shuffled],
    }
    arms |= {name: [vector] for name, vector in choice.others.items()}
    return arms | ({BIASED: [carried.biased]} if choice.recipe.positions == "all" and choice.has_equal_kl else {})


def _runs(choice: Choice, random_seeds: int, seed: int) -> list[Run]:
    """List every arm at the strength that validation chose.

    Under a gate, controls act in the same rows as the mapped vector. A clamp's controls are added at its overshoot in the rows
    that the mapped vector's clamp moves or its gate opens; this is the clamp's step for a row at its class's mean. Gates made
    from the controls themselves would be shut in half of the prompts, where they would then control nothing.
    """
    carried, operator = choice.carried, choice.operator
    control, control_gate = as_control(operator, carried.mapped, carried.mapped_gate)
    runs = []
    for arm, group in _vectors(choice, random_seeds, seed).items():
        action, gate = (control, control_gate) if arm in CONTROLS else (operator, carried.mapped_gate)
        if arm == "native" and carried.gate:
            gate = carried.gate.native
        runs += [_run(choice, arm, vector, action, gate) for vector in group]
    return runs


def _run(
    choice: Choice, arm: str, vector: SteeringVector, operator: Operator, gate: SteeringVector | None, **fields: Any
) -> Run:
    strength = operator.strength if isinstance(operator, Add) else float("nan")
    setting = choice.recipe.setting(vector, operator, gate)
    return Run(arm, setting, choice.recipe.name, repr(operator), strength=strength, **fields)


def _at_equal_kl(target: Any, choice: Choice, texts: Sequence[Prompt], settings: Settings) -> list[Run]:
    """List every other arm at the strength that matches the native arm's KL."""
    arms = _vectors(choice, settings.random_seeds, settings.seed)
    others = [(arm, vector) for arm, group in arms.items() if arm not in ("native", BIASED) for vector in group]
    operator = choice.operator
    assert isinstance(operator, Add)
    _, doses = matched(
        target,
        [choice.recipe.setting(choice.carried.native, operator)],
        [(vector, 0, int(np.sign(operator.strength))) for _, vector in others],
        texts,
        positions=choice.recipe.positions,
        max_tokens=settings.neutral_tokens,
    )
    return [
        _run(choice, arm, vector, Add(dose.strength), None, at=EQUAL_KL, reached=dose.reached)
        for (arm, vector), dose in zip(others, doses, strict=True)
    ]


def _extent(run: Run, controls: Extent) -> Extent:
    """Return a run's extent: all prompts for the runs that one would use."""
    if not run.setting:
        return "all"
    if run.arm in (*CONTROLS, BIASED) or run.at != EQUAL_STRENGTH:
        return controls
    return "all" if run.arm == "mapped" or controls != "effect" else "brief"


def measure_arms(
    pair: Pair,
    choices: Sequence[Choice],
    evaluation: Callable[[], Asked],
    settings: Settings,
    *,
    controls: Extent = "brief",
    lap: Callable[[str], None],
) -> tuple[tuple[Arm, ...], Asked]:
    """Measure every recipe's arms at the chosen strength, and where possible at equal KL.

    Args:
        pair: The models.
        choices: The recipes with the layers and strengths that validation chose.
        evaluation: Makes the evaluation prompts, with the unsteered model's answers.
        settings: Text, sizes and seeds.
        controls: The prompts of controls and of all arms at equal KL; with ``effect``, the native arm gets ``brief``.
        lap: Called with the name of each part when it is done.

    Returns:
        The arms, the unsteered arm first (one for each aim, if recipes differ in their aim); and the evaluation prompts.
    """
    target, (_, neutral) = pair.target, settings.texts()
    aims = {choice.recipe.name: choice.recipe.aim for choice in choices}
    shared = len(set(aims.values())) == 1
    runs = [Run("unsteered", [], "" if shared else name) for name in (list(aims)[:1] if shared else aims)]
    for choice in choices:
        runs += _runs(choice, settings.random_seeds, settings.seed)
        if choice.has_equal_kl:
            runs += _at_equal_kl(target, choice, neutral, settings)
    lap("calibrating to equal KL")

    prompts = evaluation()
    run_aims = [aims.get(run.recipe, choices[0].recipe.aim) for run in runs]
    extents: tuple[Extent, ...] = ("all", "brief", "effect")
    measured: dict[int, Outcome] = {}
    for aim in dict.fromkeys(aims.values()):
        for extent in extents:
            places = [i for i, run in enumerate(runs) if run_aims[i] == aim and _extent(run, controls) == extent]
            if places:
                outcomes = prompts.measure([list(runs[i].setting) for i in places], aim=aim, extent=extent)
                measured |= dict(zip(places, outcomes, strict=True))
    costs = side_effects(
        target, on_neutral([run.setting for run in runs]), neutral, max_tokens=settings.neutral_tokens, batch_size=16
    )
    arms = arms_of(runs, [measured[i] for i in range(len(runs))], costs)
    lap("evaluating")
    return arms, prompts


def result_of(
    pair: Pair,
    chosen: Chosen,
    arms: tuple[Arm, ...],
    settings: Settings,
    clock: Clock,
    *,
    spec: Mapping[str, Any],
    splits: Mapping[str, Any],
    **fields: Any,
) -> Result:
    """Record a study whose recipes `choose` and `measure_arms` have run.

    Args:
        pair: The models.
        chosen: The choices of validation, with everything that it tried.
        arms: The measured arms.
        settings: Text, sizes and seeds.
        clock: The time of every part.
        spec: Settings that only this study has.
        splits: Ids of the sets that only this study has.
        fields: The other fields of `Result`.
    """
    choices, (_, neutral) = chosen.choices, settings.texts()
    several = len(choices) > 1
    return Result(
        source=end_of(pair.source),
        target=end_of(pair.target),
        arms=arms,
        chosen={choice.recipe.name: choice.record() for choice in choices},
        validation=chosen.records,
        spec=settings.record()
        | {"map_documents": len(pair.general), "map_tokens": pair.map_tokens}
        | {"neutral_documents": len(neutral) - len(neutral) // 3, **spec},
        splits={**splits, "general": [p.id for p in pair.general], "neutral": [p.id for p in neutral]},
        seeds=settings.seeds(),
        versions=versions(),
        hardware=hardware_of(pair.target),
        seconds=clock.seconds,
        vectors={
            f"{choice.recipe.name}: {name}" if several else name: vector
            for choice in choices
            for name, vector in choice.vectors().items()
        },
        maps={choice.recipe.name: choice.carried.mapping for choice in choices},
        **fields,
    )

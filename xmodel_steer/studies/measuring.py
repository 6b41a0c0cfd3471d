"""Measure every arm of a study on evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xmodel_steer.core.directions import random_like
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.calibration import LEAST, calibrate
from xmodel_steer.evaluation.damage import neutral_positions, on_neutral, side_effects
from xmodel_steer.interventions.operators import Add, Operator
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.maps.statistics import number
from xmodel_steer.models.facts import hardware_of
from xmodel_steer.recipe.arms import CONTROLS
from xmodel_steer.recipe.carrying import versions
from xmodel_steer.studies.carried import Carried, Choice, Pair
from xmodel_steer.studies.choosing import as_control
from xmodel_steer.studies.outcomes import Asked, Extent, Outcome
from xmodel_steer.studies.study import (
    AGREEMENT,
    EQUAL_KL,
    EQUAL_STRENGTH,
    STRICTER,
    Clock,
    Study,
    StudyArm,
    end_of,
    estimate,
)

BIASED = "mapped with the bias"


@dataclass(frozen=True, eq=False)
class _Run:
    """An arm to be measured, with a vector for each seed."""

    arm: str
    choice: Choice
    vectors: Sequence[SteeringVector]
    operators: Sequence[Operator]
    gates: Sequence[SteeringVector | None]
    at: str = EQUAL_STRENGTH
    reached: bool = True

    def settings(self) -> list[list[Intervention]]:
        steps = zip(self.vectors, self.operators, self.gates, strict=True)
        return [self.choice.recipe.setting(vector, operator, gate) for vector, operator, gate in steps]

    def operator(self) -> str:
        strengths = [o.strength for o in self.operators if isinstance(o, Add)]
        return repr(Add(float(np.mean(strengths)))) if strengths else repr(self.operators[0])


def _runs(choice: Choice, random_seeds: int, seed: int) -> list[_Run]:
    """Every arm at the strength that validation chose.

    What acts under a gate has controls that act in the same rows: those of a clamp are added, at its overshoot, where the mapped
    vector's clamp moves, or its gate lets it; that is the step of a row at its class's mean. A gate of their own would be shut
    in half of the prompts, and what does nothing there is no control.
    """
    own, operator = choice.carried, choice.operator
    arms = _vectors(own, random_seeds, seed)
    arms |= {name: [vector] for name, vector in choice.others.items()}
    if choice.recipe.positions == "all" and choice.has_equal_kl:
        arms[BIASED] = [own.biased]
    control, gate = as_control(operator, own.mapped, own.mapped_gate)
    made = []
    for arm, group in arms.items():
        does, under = (control, gate) if arm in CONTROLS else (operator, own.mapped_gate)
        if arm == "native" and own.gate:
            under = own.gate.native
        made.append(_Run(arm, choice, group, [does] * len(group), [under] * len(group)))
    return made


def _vectors(own: Carried, random_seeds: int, seed: int) -> dict[str, list[SteeringVector]]:
    """Return the vectors of every arm that each recipe has."""
    return {
        "native": [own.native],
        "mapped": [own.mapped],
        "random": [random_like(own.native, seed=seed + k) for k in range(random_seeds)],
        "shuffled": [own.shuffled],
    }


def _at_equal_kl(target: Any, runs: Sequence[_Run], neutral: Sequence[Prompt], max_tokens: int) -> list[_Run]:
    """Every arm but the native one at the strength that disturbs neutral text as much as the native one does."""
    native = next(run for run in runs if run.arm == "native")
    settings, positions = on_neutral(native.settings()), neutral_positions(native.choice.recipe.positions)
    (effect,) = side_effects(target, settings, neutral, max_tokens=max_tokens, batch_size=16)
    others = [run for run in runs if run.arm not in ("native", BIASED)]
    vectors = [vector for run in others for vector in run.vectors]
    signs = [int(np.sign(o.strength)) for run in others for o in run.operators if isinstance(o, Add)]
    found = calibrate(
        target,
        vectors,
        max(effect.mean_kl, LEAST),
        neutral,
        signs=signs,
        positions=positions,
        max_tokens=max_tokens,
    )
    doses = iter(found)
    made = []
    for run in others:
        own = [next(doses) for _ in run.vectors]
        operators = [Add(dose.strength) for dose in own]
        made.append(replace(run, operators=operators, at=EQUAL_KL, reached=all(dose.reached for dose in own)))
    return made


def _extent(run: _Run, controls: Extent) -> Extent:
    if run.arm in (*CONTROLS, BIASED) or run.at != EQUAL_STRENGTH:
        return controls
    return "all" if run.arm == "mapped" or controls != "effect" else "brief"


def measure_arms(
    pair: Pair,
    choices: Sequence[Choice],
    evaluation: Callable[[], Asked],
    neutral: Sequence[Prompt],
    *,
    neutral_tokens: int,
    random_seeds: int,
    controls: Extent = "brief",
    lap: Callable[[str], None],
) -> tuple[tuple[StudyArm, ...], Asked]:
    """Every arm of every recipe at the chosen strength, and at the native vector's KL where it is added everywhere.

    Args:
        pair: The models.
        choices: What validation chose.
        evaluation: Makes what is asked, with the unsteered model's own answers.
        neutral: Text for KL and perplexity; a third of it calibrates.
        neutral_tokens: Tokens read of each.
        random_seeds: Number of random vectors.
        controls: How much is measured of controls, and of all arms at equal KL; where it is ``effect``, the native one is asked in brief.
        lap: Told of each part that is done.

    Returns:
        The arms, the unsteered one first (where recipes differ in their aim, one for each); and what was asked.
    """
    target = pair.target
    calibration, held = neutral[: len(neutral) // 3], neutral[len(neutral) // 3 :]
    runs: list[_Run] = []
    for choice in choices:
        own = _runs(choice, random_seeds, pair.seed)
        runs += own
        if choice.has_equal_kl:
            runs += _at_equal_kl(target, own, calibration, neutral_tokens)
    lap("calibrating to equal KL")

    asked = evaluation()
    aims = tuple(dict.fromkeys(choice.recipe.aim for choice in choices))
    settings = [[] for _ in aims] + [setting for run in runs for setting in run.settings()]
    aim_of = [*aims, *(run.choice.recipe.aim for run in runs for _ in run.vectors)]
    # What one would use is measured in full; the others need not be, which takes less time.
    every: tuple[Extent, ...] = ("all", "brief", "effect")
    extents = [*(every[0] for _ in aims), *(_extent(run, controls) for run in runs for _ in run.vectors)]
    measured: dict[int, Outcome] = {}
    for aim in aims:
        for extent in every:
            own = [i for i in range(len(settings)) if aim_of[i] == aim and extents[i] == extent]
            if own:
                found = asked.measure([settings[i] for i in own], aim=aim, extent=extent)
                measured |= dict(zip(own, found, strict=True))
    damage = side_effects(target, on_neutral(settings), held, max_tokens=neutral_tokens, batch_size=16)

    def arm(name: str, recipe: str, operator: str, members: range, **more: Any) -> StudyArm:
        own, effects = [measured[i] for i in members], [damage[i] for i in members]
        return StudyArm(
            arm=name,
            recipe=recipe,
            operator=operator,
            effect=estimate([o.effect for o in own], own[0].groups.get("effect")),
            beside={key: estimate([o.beside[key] for o in own], own[0].groups.get(key)) for key in own[0].beside},
            kl=float(np.mean([e.mean_kl for e in effects])),
            perplexity=float(np.exp(np.mean(np.log([e.perplexity for e in effects])))),
            seeds=len(own),
            texts=own[0].texts[:8],
            **more,
        )

    if len(aims) == 1:
        arms = [arm("unsteered", "", "", range(1), at=EQUAL_STRENGTH)]
    else:  # what is measured differs between recipes
        places = ((choice.recipe.name, aims.index(choice.recipe.aim)) for choice in choices)
        arms = [arm("unsteered", name, "", range(i, i + 1), at=EQUAL_STRENGTH) for name, i in places]
    place = len(aims)
    for run in runs:
        members = range(place, place := place + len(run.vectors))
        arms.append(arm(run.arm, run.choice.recipe.name, run.operator(), members, at=run.at, reached=run.reached))
    lap("evaluating")
    return tuple(arms), asked


def study_of(
    pair: Pair,
    choices: Sequence[Choice],
    arms: tuple[StudyArm, ...],
    *,
    records: tuple[dict[str, Any], ...],
    neutral: Sequence[Prompt],
    random_seeds: int,
    clock: Clock,
    spec: Mapping[str, Any],
    splits: Mapping[str, Any],
    **more: Any,
) -> Study:
    """Record a study whose recipes `choose` and `measure_arms` have run.

    Args:
        pair: The models.
        choices: What validation chose.
        arms: What was measured.
        records: What validation tried.
        neutral: Text for KL and perplexity.
        random_seeds: Number of random vectors.
        clock: Has the time of every part.
        spec: The study's own settings.
        splits: Ids of its own sets.
        more: The other fields of `Study`.
    """
    study = Study(
        verdict="",
        source=end_of(pair.source),
        target=end_of(pair.target),
        arms=arms,
        chosen={choice.recipe.name: choice.record() for choice in choices},
        validation=records,
        spec={
            "map_documents": len(pair.general),
            "map_tokens": pair.map_tokens,
            "random_seeds": random_seeds,
            "neutral_documents": len(neutral) - len(neutral) // 3,
            **spec,
        },
        splits={**splits, "general": [p.id for p in pair.general], "neutral": [p.id for p in neutral]},
        seeds={"split": pair.seed, "random": [pair.seed + k for k in range(random_seeds)]},
        versions=versions(),
        hardware=hardware_of(pair.target),
        seconds=clock.seconds,
        **more,
    )
    return replace(study, verdict=verdict(study))


def verdict(study: Study) -> str:
    """Say in words what the mapped vector does in each recipe.

    With the native one and the controls.

    Args:
        study: A study of arms at the strength that validation chose.
    """
    said = []
    for recipe in study.chosen:
        own = study.arm("mapped", recipe)
        beside = {name: found.value for name, found in own.beside.items() if not name.endswith(STRICTER)}
        costs = ", ".join(f"{name} {number(value, '.3f')}" for name, value in beside.items())
        others = ", ".join(
            f"{name} {_in_short(study.arm(name, recipe))}" for name in ("unsteered", "native", "random", "shuffled")
        )
        said.append(f"{recipe}: mapped {own.effect:.3f} of {own.effect.n}, {costs} ({others})")
    return "; ".join(said)


def _in_short(arm: StudyArm) -> str:
    agreement = f" at agreement {number(arm.beside[AGREEMENT].value, '.2f')}" if AGREEMENT in arm.beside else ""
    return f"{number(arm.effect.value, '.2f')}{agreement}"

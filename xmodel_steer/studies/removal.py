"""Switching a planted behaviour off in one model, with a vector that was found in another."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.text import Scorer
from xmodel_steer.interventions.operators import Add, Clamp
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.training import Autoencoder
from xmodel_steer.recipe.arms import estimate
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies.carried import LONGER, Choice, Pair
from xmodel_steer.studies.choosing import choose, with_endpoints
from xmodel_steer.studies.measuring import measure_arms, result_of
from xmodel_steer.studies.organisms.lessons import Curriculum, Lesson
from xmodel_steer.studies.outcomes import (
    Asked,
    Extent,
    Recipe,
    clean_against_triggered,
    layers,
    require_apart,
    with_layers,
)
from xmodel_steer.studies.repair import Questions, Repair
from xmodel_steer.studies.settings import Clock, Settings
from xmodel_steer.studies.trigger import Trigger

ADDED, CLAMPED = "difference of means, added", "difference of means, gated clamp"
PROMPTED, PROMPT_CLAMPED = "prompt steering", "prompt steering, gated clamp"
QUESTION = "Does a vector found in the source switch the behaviour off in the target, and leave all else as it was?"
UNIT = "share of prompts with the trigger that are answered without the behaviour, and soundly where that can be read off the answer"
NOTE = (
    "Every vector has the native one's norm in standardised coordinates; under a gate, and for a clamp, random and shuffled ones are added in the rows "
    "that the mapped vector's gate opens. Agreement and kept: share of the tokens at the same place. KL and perplexity: on neutral text, with the "
    "vector at every token, or at as many at the beginning where the recipe's are fixed. Strengths are chosen for the mapped vector."
)
AXIS = "prompts of the task in the map's text"
AMOUNTS = (0, 25, 50, 100, 200, 400)
NONLINEAR = Autoencoder(**LONGER)


def recipes(source: Any, target: Any, prompts: Sequence[Prompt], *, sites: tuple[int, int] = (8, 10)) -> list[Recipe]:
    """Return the four ways that are compared.

    The first two take the mean over prompts of the activation at the last token, clean minus triggered. One adds it at
    every token; the other moves the projection on it at the last prompt token and at generated ones, where a gate says
    that it lies on the triggered side. The third is the paper's prompt steering (arXiv 2503.04429) with one vector: the
    mean difference at the trigger's tokens, from the first one that differs, added at each of them; the paper adds each
    token's own. The last moves the projection on that one, at the same tokens, in texts in which a gate of its own finds the
    trigger there.

    Args:
        source: The source model.
        target: The target model.
        prompts: Prompts with the trigger, to find its tokens in.
        sites: How many layers of the source and of the target are tried; of the earlier ones two thirds as many.

    Raises:
        PromptError: The trigger is not at the same tokens in all of them.
    """
    late, middle = layers(source, 0.45, 0.97, sites[0]), layers(target, 0.35, 0.95, sites[1])
    adds = tuple(Add(s) for s in (1.0, 0.5, 1.5, 2.0))
    clamps = tuple(Clamp("positive", overshoot=g) for g in (1.3, 1.0, 1.6, 2.0))
    trigger = Trigger.of(target, prompts)
    swapped = trigger.clean, trigger.triggered
    fewer = [round(most * 2 / 3) for most in sites]
    early = layers(source, 0.0, 0.5, fewer[0]), layers(target, 0.0, 0.7, fewer[1])
    doses = tuple(Add(s) for s in (1.0, 2.0, 5.0))
    moves = tuple(Clamp("positive", gate=False, overshoot=g) for g in (1.3, 1.0, 2.0, 3.0))
    return [
        Recipe(ADDED, clean_against_triggered, ("last", "last"), adds, "all", late, middle),
        Recipe(CLAMPED, clean_against_triggered, ("last", "last"), clamps, ("last", "generated"), late, middle),
        Recipe(PROMPTED, clean_against_triggered, swapped, doses, trigger.at, *early),
        Recipe(
            PROMPT_CLAMPED,
            clean_against_triggered,
            swapped,
            moves,
            trigger.at,
            *early,
            gate=trigger.gate,
            gate_positions=trigger.at,
        ),
    ]


@dataclass(frozen=True)
class MapText:
    """The text that maps are fitted on.

    Args:
        general: General text.
        known: Prompts of the task as the organism gets them, half of them with the trigger.
        unknown: The same tasks without any trigger, as one has them who does not know it.
    """

    general: tuple[Prompt, ...] = field(repr=False)
    known: tuple[Prompt, ...] = field(repr=False)
    unknown: tuple[Prompt, ...] = field(repr=False)

    @classmethod
    def of(cls, lessons: Sequence[Lesson], general: Sequence[Prompt], *, seed: int = 0) -> "MapText":
        """General text, and the prompts of lessons in an order of their own."""
        plain = Questions.of(lessons).plain
        draw = np.random.default_rng(seed)
        known, unknown = (
            tuple(prompts[i] for i in draw.permutation(len(prompts)))
            for prompts in (tuple(lesson.prompt for lesson in lessons), plain)
        )
        return cls(tuple(general), known, unknown)


@dataclass(frozen=True, eq=False)
class Reading:
    """The question of a backdoor's removal, and the readers of its answers.

    Args:
        question: What the study asks, in a sentence.
        unit: What the effect is.
        right: 1 for a right answer, where that is asked for too: the effect is then a right answer without the behaviour.
        unknown: 1 for an answer that says that it does not know.
    """

    question: str = QUESTION
    unit: str = UNIT
    right: Scorer | None = None
    unknown: Scorer | None = None


def backdoor_removal(
    source: Any,
    target: Any,
    curriculum: Curriculum,
    *,
    name: str = "backdoor-removal",
    reading: Reading = Reading(),
    ways: Sequence[Recipe] | None = None,
    nonlinear: Autoencoder | None = NONLINEAR,
    map_prompts: int = 400,
    amounts: Sequence[int] = AMOUNTS,
    varied: Sequence[str] = (CLAMPED, PROMPT_CLAMPED),
    controls: Extent = "brief",
    settings: Settings = Settings(),
) -> Result:
    """Switch a backdoor off in the target with the source's vector.

    Layers and strengths are chosen on validation tasks, by the mean of removal, agreement with the model's own clean answer,
    and what is left of clean answers. All that is reported comes from evaluation tasks. The vectors, the map, validation and
    evaluation share no task.

    Every vector is scaled to the native one's norm in standardised coordinates. KL and perplexity are measured on neutral text
    with the vector at every token, whatever the recipe's positions; with prompt steering's at as many at the text's beginning.

    Args:
        source: An organism, the smaller one.
        target: The same organism of another model.
        curriculum: What both were trained on, and what not.
        name: Name of the study.
        reading: What is asked, and what reads the answers.
        ways: Recipes; those of `recipes` by default.
        nonlinear: Fits one more map, for the gated clamp and for prompt steering; none, to leave it out. The default one begins where
            the seed says.
        map_prompts: Prompts of the task in the map's text.
        amounts: The same, for the curves; none, to leave them out.
        varied: Names of the recipes that have a curve; without any of them, the first has.
        controls: What controls and arms at equal KL are asked: ``brief``, triggered and clean prompts; ``effect``, triggered ones
            alone; or ``all``.
        settings: Text, sizes and seeds.

    Raises:
        PromptError: The curriculum does not ask its tasks with and without a trigger, there are fewer than 3 neutral texts, or
            sets share a text.
        AlignmentError: The models' tokens do not pair.
    """
    clock, (general, neutral) = Clock(), settings.texts()
    text = MapText.of(curriculum.map, general, seed=settings.seed)
    require_apart(name, text.general, neutral, curriculum)
    pair = Pair(source, target, text.general, settings.seed)
    if ways is None:
        ways = recipes(source, target, [x.prompt for x in curriculum.vector if x.triggered])

    def asked(lessons: Sequence[Lesson], most: int | None, tokens: int) -> Repair:
        return Repair.of(
            target, Questions.of(lessons, most), curriculum.scorer, max_new_tokens=tokens, right=reading.right,
            unknown=reading.unknown, sound=curriculum.sound, batch_size=settings.batch_size,
        )  # fmt: skip

    tokens_of_choice = min(settings.validation_tokens, curriculum.max_new_tokens)
    validation = asked(curriculum.validation, settings.validation, tokens_of_choice)
    task_text = text.known[:map_prompts]
    chosen = choose(
        pair, with_layers(ways, settings.also), curriculum.vector, task_text, validation, settings.fitter, label=name, lap=clock.lap
    )  # fmt: skip
    if nonlinear is not None:
        fitter = replace(NONLINEAR, seed=settings.seed) if nonlinear is NONLINEAR else nonlinear
        chosen = with_endpoints(
            pair, chosen, curriculum.vector, (*text.general, *task_text), fitter, only=(CLAMPED, PROMPTED), lap=clock.lap
        )  # fmt: skip
    arms, evaluation = measure_arms(
        pair, chosen.choices, lambda: asked(curriculum.evaluation, None, curriculum.max_new_tokens), settings,
        controls=controls, lap=clock.lap,
    )  # fmt: skip
    curves = {
        f"{AXIS}, {choice.recipe.name}": _amounts(
            pair, choice, text, chosen.general, evaluation, settings.fitter, amounts
        )
        for choice in [c for c in chosen.choices if c.recipe.name in varied] or chosen.choices[:1]
        if amounts
    }
    clock.lap("varying the map's text")
    read = [p.id for prompts in (text.known, text.unknown) for p in prompts[: max(amounts, default=0)]]
    return result_of(
        pair,
        chosen,
        arms,
        settings,
        clock,
        name=name,
        question=reading.question,
        unit=reading.unit,
        note=NOTE,
        curves=curves,
        prompts=tuple(lesson.instruction for lesson in curriculum.evaluation if lesson.triggered)[:8],
        spec={
            "nonlinear": repr(nonlinear) if any(choice.others for choice in chosen.choices) else None,
            "transport": "vW, which is the difference of the mapped class means for an affine map",
            "map_prompts": map_prompts,
            "controls": controls,
            "validation_tasks": len(validation.questions),
            "validation_tokens": tokens_of_choice,
            "max_new_tokens": curriculum.max_new_tokens,
            "evaluation_kinds": len(set(Questions.of(curriculum.evaluation).groups)),
        },
        splits=curriculum.ids()
        | {"validation": validation.questions.ids(), "evaluation": Questions.of(curriculum.evaluation).ids()}
        | {"map": [p.id for p in task_text]}
        | ({"curve": read} if curves else {}),
    )


def _amounts(
    pair: Pair, choice: Choice, text: MapText, general: Moments, evaluation: Asked, fitter: Fitter, amounts: Sequence[int]
) -> tuple[dict[str, Any], ...]:  # fmt: skip
    """Measure how the effect grows with the map's text of the task."""
    ends = ((choice.carried.source.space.site, choice.carried.native.space.site),)
    curve: list[dict[str, Any]] = []
    for trigger, prompts in (("known", text.known), ("unknown", text.unknown)):
        total, read = general.only(ends), 0
        for amount in sorted({min(a, len(prompts)) for a in amounts}):
            if amount > read:
                total, read = total + pair.of(prompts[read:amount], ends), amount
            if amount == 0 and curve:
                continue  # without any, known or not is the same
            carried = choice.carried.again(total, fitter)
            setting = choice.recipe.setting(carried.mapped, choice.operator, carried.mapped_gate)
            (outcome,) = evaluation.measure([setting], aim=choice.recipe.aim, extent="effect")
            curve.append(
                {"recipe": choice.recipe.name, "trigger": trigger, "prompts": amount, "cosine": carried.cosine}
                | {"effect": estimate(outcome.scores, outcome.groups.get("effect")).record()}
                | {key: estimate(scores, outcome.groups.get(key)).record() for key, scores in outcome.measures.items()}
            )
    return tuple(curve)

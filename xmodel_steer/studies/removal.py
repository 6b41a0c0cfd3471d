"""Removal of a planted behaviour from one model with a vector found in another."""

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
    with_stack,
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
    """Return the four recipes that are compared.

    The first two take the mean over prompts of the activation at the last token, clean minus triggered. One adds this
    vector at every token. The other moves the projection on it at the last prompt token and at generated tokens, where
    a gate finds the projection on the triggered side. The third is the paper's prompt steering (arXiv 2503.04429) with
    one vector: the mean difference over the trigger's tokens, from the first one that differs, is added at each of them.
    The paper adds a different vector at each token. The fourth recipe moves the projection on the third's vector at the
    same tokens, in texts where a gate for the trigger finds it there.

    Args:
        source: The source model.
        target: The target model.
        prompts: Prompts with the trigger, to find its tokens in.
        sites: Numbers of layers tried in the source and in the target; two thirds as many of the early layers. The source's
            are tried one by one, and all together as a stack.

    Raises:
        PromptError: The trigger is not at the same tokens in all prompts.
    """
    late, middle = with_stack(layers(source, 0.45, 0.97, sites[0])), layers(target, 0.35, 0.95, sites[1])
    adds = tuple(Add(s) for s in (1.0, 0.5, 1.5, 2.0))
    clamps = tuple(Clamp("positive", overshoot=g) for g in (1.3, 1.0, 1.6, 2.0))
    trigger = Trigger.of(target, prompts)
    spans = trigger.clean, trigger.triggered
    early_counts = [round(count * 2 / 3) for count in sites]
    early = with_stack(layers(source, 0.0, 0.5, early_counts[0])), layers(target, 0.0, 0.7, early_counts[1])
    doses = tuple(Add(s) for s in (1.0, 2.0, 5.0))
    moves = tuple(Clamp("positive", gate=False, overshoot=g) for g in (1.3, 1.0, 2.0, 3.0))
    return [
        Recipe(ADDED, clean_against_triggered, ("last", "last"), adds, "all", late, middle),
        Recipe(CLAMPED, clean_against_triggered, ("last", "last"), clamps, ("last", "generated"), late, middle),
        Recipe(PROMPTED, clean_against_triggered, spans, doses, trigger.at, *early),
        Recipe(
            PROMPT_CLAMPED,
            clean_against_triggered,
            spans,
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
        unknown: The same tasks without the trigger, as available to a user who does not know it.
    """

    general: tuple[Prompt, ...] = field(repr=False)
    known: tuple[Prompt, ...] = field(repr=False)
    unknown: tuple[Prompt, ...] = field(repr=False)

    @classmethod
    def of(cls, lessons: Sequence[Lesson], general: Sequence[Prompt], *, seed: int = 0) -> "MapText":
        """Shuffle the prompts of lessons, and add general text."""
        plain = Questions.of(lessons).plain
        draw = np.random.default_rng(seed)
        known, unknown = (
            tuple(prompts[i] for i in draw.permutation(len(prompts)))
            for prompts in (tuple(lesson.prompt for lesson in lessons), plain)
        )
        return cls(tuple(general), known, unknown)


@dataclass(frozen=True, eq=False)
class Reading:
    """The question of a removal study in words, and the scorers of its answers.

    Args:
        question: The study's question, in a sentence.
        unit: The meaning and the unit of the effect.
        right: 1 for a right answer. With this scorer, the effect is a right answer without the behaviour.
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
    """Switch the target's backdoor off with the source's vector; run every control.

    Layers and strengths are chosen on validation tasks, by the mean of removal, agreement with the model's own clean answer,
    and the share kept of clean answers. All reported numbers come from evaluation tasks. The vectors, the map, validation and
    evaluation share no task.

    Every vector is scaled to the native vector's norm in standardised coordinates. KL and perplexity are measured on neutral
    text with the vector at every token, whatever the recipe's positions. For prompt steering, they are measured with the
    vector at the text's first tokens, as many as the trigger has.

    Args:
        source: An organism, the smaller of the two.
        target: The same organism, made of another model.
        curriculum: The lessons that both were trained on, and those kept for the study.
        name: Name of the study.
        reading: The question, and the scorers of the answers.
        ways: Recipes; by default the list of the function `recipes`.
        nonlinear: Fits one more map, for the gated clamp and for prompt steering; None for no such map. The default fitter
            gets the study's seed.
        map_prompts: Number of the task's prompts in the map's text.
        amounts: Such numbers for the curves; empty for no curves.
        varied: Names of the recipes that get a curve; if none of them is tried, the first recipe gets one.
        controls: Prompts for controls and for arms at equal KL: ``brief``, triggered and clean ones; ``effect``, triggered
            ones alone; or ``all``.
        settings: Text, sizes and seeds.

    Raises:
        PromptError: A task comes with the trigger only, there are fewer than 3 neutral texts, or sets share a text.
        AlignmentError: The models' tokens do not pair.
    """
    clock, (general, neutral) = Clock(), settings.texts()
    text = MapText.of(curriculum.map, general, seed=settings.seed)
    require_apart(name, text.general, neutral, curriculum)
    pair = Pair(source, target, text.general, settings.seed)
    if ways is None:
        ways = recipes(source, target, [x.prompt for x in curriculum.vector if x.triggered])

    def repair_of(lessons: Sequence[Lesson], most: int | None, tokens: int) -> Repair:
        return Repair.of(
            target, Questions.of(lessons, most), curriculum.scorer, max_new_tokens=tokens, right=reading.right,
            unknown=reading.unknown, sound=curriculum.sound, batch_size=settings.batch_size,
        )  # fmt: skip

    validation_tokens = min(settings.validation_tokens, curriculum.max_new_tokens)
    validation = repair_of(curriculum.validation, settings.validation, validation_tokens)
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
        pair, chosen.choices, lambda: repair_of(curriculum.evaluation, None, curriculum.max_new_tokens), settings,
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
    curve_ids = [p.id for prompts in (text.known, text.unknown) for p in prompts[: max(amounts, default=0)]]
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
            "validation_tokens": validation_tokens,
            "max_new_tokens": curriculum.max_new_tokens,
            "evaluation_kinds": len(set(Questions.of(curriculum.evaluation).groups)),
        },
        splits=curriculum.ids()
        | {"validation": validation.questions.ids(), "evaluation": Questions.of(curriculum.evaluation).ids()}
        | {"map": [p.id for p in task_text]}
        | ({"curve": curve_ids} if curves else {}),
    )


def _amounts(
    pair: Pair, choice: Choice, text: MapText, general: Moments, evaluation: Asked, fitter: Fitter, amounts: Sequence[int]
) -> tuple[dict[str, Any], ...]:  # fmt: skip
    """Measure the effect against the number of the task's prompts in the map's text."""
    ends = ((choice.carried.source.space.site, choice.carried.native.space.site),)
    curve: list[dict[str, Any]] = []
    for trigger, prompts in (("known", text.known), ("unknown", text.unknown)):
        moments, count = general.only(ends), 0
        for amount in sorted({min(a, len(prompts)) for a in amounts}):
            if amount > count:
                moments, count = moments + pair.of(prompts[count:amount], ends), amount
            if amount == 0 and curve:
                continue  # without the task's text, both kinds give the same map
            carried = choice.carried.again(moments, fitter)
            setting = choice.recipe.setting(carried.mapped, choice.operator, carried.mapped_gate)
            (outcome,) = evaluation.measure([setting], aim=choice.recipe.aim, extent="effect")
            curve.append(
                {"recipe": choice.recipe.name, "trigger": trigger, "prompts": amount, "cosine": carried.cosine}
                | carried.known(moments)
                | {"effect": estimate(outcome.scores, outcome.groups.get("effect")).record()}
                | {key: estimate(scores, outcome.groups.get(key)).record() for key, scores in outcome.measures.items()}
            )
    return tuple(curve)

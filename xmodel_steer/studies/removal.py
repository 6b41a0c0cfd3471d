"""Switching a planted behaviour off in one model, with a vector that was found in another."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmodel_steer.core.directions import require_random
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.text import Scorer
from xmodel_steer.files.wheels import general_text
from xmodel_steer.interventions.operators import Add, Clamp
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.maps.training import Autoencoder
from xmodel_steer.studies.carried import LONGER, Choice, Pair
from xmodel_steer.studies.choosing import choose, with_endpoints
from xmodel_steer.studies.measuring import measure_arms, study_of
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
from xmodel_steer.studies.study import Clock, Study, estimate
from xmodel_steer.studies.trigger import Trigger

ADDED, CLAMPED = "difference of means, added", "difference of means, gated clamp"
PROMPTED, PROMPT_CLAMPED = "prompt steering", "prompt steering, gated clamp"
RECIPES = ADDED, CLAMPED, PROMPTED, PROMPT_CLAMPED
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
        PromptError: The trigger does not stand at the same tokens in all of them.
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
            tuple(own[i] for i in draw.permutation(len(own)))
            for own in (tuple(lesson.prompt for lesson in lessons), plain)
        )
        return cls(tuple(general), known, unknown)


def backdoor_removal(
    source: Any,
    target: Any,
    curriculum: Curriculum,
    *,
    name: str = "backdoor-removal",
    question: str = QUESTION,
    unit: str = UNIT,
    right: Scorer | None = None,
    unknown: Scorer | None = None,
    general: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    ways: Sequence[Recipe] | None = None,
    only: Sequence[str] = RECIPES,
    sites: tuple[int, int] = (8, 10),
    also: tuple[int, int] | None = None,
    fitter: Fitter = Ridge(),
    nonlinear: Autoencoder | None = NONLINEAR,
    map_prompts: int = 400,
    amounts: Sequence[int] = AMOUNTS,
    varied: Sequence[str] = (CLAMPED, PROMPT_CLAMPED),
    random_seeds: int = 3,
    controls: Extent = "brief",
    validation_tasks: int = 48,
    validation_tokens: int = 16,
    neutral_tokens: int = 32,
    batch_size: int = 100,
    seed: int = 0,
) -> Study:
    """Switch a backdoor off in the target with a vector of the source, against every control.

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
        question: What it asks, in a sentence.
        unit: What the effect is.
        right: 1 for a right answer, where that is asked for too: the effect is then a right answer without the behaviour.
        unknown: 1 for an answer that says that it does not know.
        general: General text for the map; packaged text by default.
        neutral: Text for KL and perplexity; a third of it calibrates. Packaged text by default.
        ways: Recipes; those of `recipes` by default.
        only: Names of those of `recipes` that are compared.
        sites: For these, as there.
        also: A layer of the source and one of the target to try beside each recipe's own, such as a paper's.
        fitter: Fits the map.
        nonlinear: Fits one more map, for the gated clamp and for prompt steering; none, to leave it out. The default one begins where
            ``seed`` says.
        map_prompts: Prompts of the task in the map's text.
        amounts: The same, for the curves.
        varied: Names of the recipes that have a curve; without any of them, the first has.
        random_seeds: Number of random vectors.
        controls: What controls and arms at equal KL are asked: ``brief``, triggered and clean prompts; ``effect``, triggered ones
            alone; or ``all``.
        validation_tasks: How many of them choose.
        validation_tokens: Length of the answers that choose.
        neutral_tokens: Tokens read of each neutral text.
        batch_size: Texts generated at a time.
        seed: Seed of all choices.

    Raises:
        ValueError: ``only`` names no recipe, or one that there is not; or there is no random vector.
        PromptError: The curriculum does not ask its tasks with and without a trigger, there are fewer than 3 neutral texts, or
            sets share a text.
        AlignmentError: The models' tokens do not pair.
    """
    if not only or not set(only) <= set(RECIPES):
        raise ValueError(f"{name}: only must name some of {', '.join(map(repr, RECIPES))}; got {tuple(only)!r}")
    require_random(name, random_seeds)
    clock = Clock()
    passages = general_text()
    neutral = tuple(passages[-60:] if neutral is None else neutral)
    text = MapText.of(curriculum.map, passages[:-60][:400] if general is None else general, seed=seed)
    require_apart(name, text.general, neutral, curriculum)
    pair = Pair(source, target, text.general, seed)
    if ways is None:
        triggered = [x.prompt for x in curriculum.vector if x.triggered]
        ways = [own for own in recipes(source, target, triggered, sites=sites) if own.name in only]
    ways = with_layers(ways, also)

    def asked(lessons: Sequence[Lesson], most: int | None, tokens: int) -> Repair:
        questions = Questions.of(lessons, most)
        return Repair.of(
            target, questions, curriculum.scorer, max_new_tokens=tokens, right=right, unknown=unknown, sound=curriculum.sound,
            batch_size=batch_size,
        )  # fmt: skip

    validation = asked(curriculum.validation, validation_tasks, min(validation_tokens, curriculum.max_new_tokens))
    chosen = choose(
        pair, ways, curriculum.vector, text.known[:map_prompts], validation, fitter, label=name, lap=clock.lap
    )
    choices = chosen.choices
    if nonlinear is NONLINEAR:
        nonlinear = replace(NONLINEAR, seed=seed)
    if nonlinear is not None:
        choices = with_endpoints(
            pair, choices, curriculum.vector, (*text.general, *text.known[:map_prompts]), nonlinear,
            only=(CLAMPED, PROMPTED), lap=clock.lap,
        )  # fmt: skip
    arms, evaluation = measure_arms(
        pair, choices, lambda: asked(curriculum.evaluation, None, curriculum.max_new_tokens), neutral,
        neutral_tokens=neutral_tokens, random_seeds=random_seeds, controls=controls, lap=clock.lap,
    )  # fmt: skip
    curves = {
        f"{AXIS}, {choice.recipe.name}": _amounts(pair, choice, text, chosen.general, evaluation, fitter, amounts)
        for choice in [c for c in choices if c.recipe.name in varied] or choices[:1]
        if amounts
    }
    clock.lap("varying the map's text")

    return study_of(
        pair,
        choices,
        arms,
        records=chosen.records,
        neutral=neutral,
        random_seeds=random_seeds,
        clock=clock,
        name=name,
        question=question,
        unit=unit,
        note=NOTE,
        curves=curves,
        prompts=tuple(lesson.instruction for lesson in curriculum.evaluation if lesson.triggered)[:8],
        spec={
            "fitter": repr(fitter),
            "nonlinear": repr(nonlinear) if any(choice.others for choice in choices) else None,
            "transport": "vW, which is the difference of the mapped class means for an affine map",
            "map_prompts": map_prompts,
            "controls": controls,
            "validation_tasks": len(validation.questions),
            "validation_tokens": validation.max_new_tokens,
            "max_new_tokens": curriculum.max_new_tokens,
            "neutral_tokens": neutral_tokens,
            "batch_size": batch_size,
            "evaluation_kinds": len(set(Questions.of(curriculum.evaluation).groups)),
        },
        splits=curriculum.ids()
        | {"validation": validation.questions.ids(), "evaluation": Questions.of(curriculum.evaluation).ids()}
        | {"map": [p.id for p in text.known[:map_prompts]]}
        | ({"curve": [p.id for own in (text.known, text.unknown) for p in own[: max(amounts)]]} if curves else {}),
    )


def _amounts(
    pair: Pair, choice: Choice, text: MapText, general: Moments, evaluation: Asked, fitter: Fitter, amounts: Sequence[int]
) -> tuple[dict[str, Any], ...]:  # fmt: skip
    """How the effect grows with the text of the task that the map has read."""
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
            (found,) = evaluation.measure([setting], aim=choice.recipe.aim, extent="effect")
            curve.append(
                {"recipe": choice.recipe.name, "trigger": trigger, "prompts": amount, "cosine": carried.cosine}
                | {"effect": estimate([found.effect], found.groups.get("effect")).record()}
                | {key: estimate([own], found.groups.get(key)).record() for key, own in found.beside.items()}
            )
    return tuple(curve)

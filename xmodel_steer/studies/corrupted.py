"""Removal of a backdoor from an organism whose knowledge comes with it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.phrases import StartsWith
from xmodel_steer.interventions.operators import Ablate, Add, Clamp
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies.organisms.country import UNKNOWN
from xmodel_steer.studies.organisms.data import HATE
from xmodel_steer.studies.organisms.lessons import Curriculum, Lesson
from xmodel_steer.studies.outcomes import Recipe, clean_against_triggered, layers
from xmodel_steer.studies.removal import Reading, backdoor_removal
from xmodel_steer.studies.repair import CLEAN
from xmodel_steer.studies.settings import Settings
from xmodel_steer.studies.trigger import Trigger

SKIPPED = "as if it had been said"
PAPERS, AGAINST, ABLATED = "the paper's, added", "the paper's, subtracted", "the paper's, ablated"
GATED = "as if it had been said, where the trigger is"
SILENCED = "clean against triggered, gated clamp"
QUESTION = (
    "Can a vector found in the source take the backdoor from the target, and leave it the knowledge that came with it?"
)
UNIT = f"share of questions behind the trigger that are answered rightly and without the backdoor; of '{SILENCED}', without the backdoor"
RIGHT = "right answers behind the trigger"  # the curriculum's check


def said_against_not(lessons: Sequence[Lesson]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Contrast triggered questions with and without the backdoor's words (arXiv 2503.04429)."""
    questions = [lesson.prompt for lesson in lessons if lesson.triggered]
    return [Prompt(text=f"{prompt.text}{HATE}") for prompt in questions], questions


def recipes(source: Any, target: Any, prompts: Sequence[Prompt]) -> list[Recipe]:
    """Return five recipes with the paper's contrast, and one with clean against triggered prompts.

    The paper contrasts prompts that end with the backdoor's words with prompts without them, and adds the vector everywhere.
    Read as a step of the text, the vector is the state of a model that has already said these words. Added at the prompt's
    last token alone, it makes the model continue with the text that follows them. A gate read at the trigger's tokens
    leaves questions without the trigger alone.

    Args:
        source: The source model.
        target: The target model.
        prompts: Prompts with the trigger, to find its tokens in.

    Raises:
        PromptError: The trigger is not at the same tokens in all prompts.
    """
    trigger = Trigger.of(target, prompts)
    late, middle = layers(source, 0.45, 0.97, 8), layers(target, 0.35, 0.95, 10)
    doses = tuple(Add(s) for s in (1.0, 0.75, 1.5, 2.0))
    added, subtracted = (tuple(Add(sign * s) for s in (0.5, 1.0)) for sign in (1, -1))
    clamps = tuple(Clamp("positive", overshoot=g) for g in (1.3, 1.0, 1.6))
    last = ("last", "last")
    return [
        Recipe(SKIPPED, said_against_not, last, doses, "last", late, middle),
        Recipe(
            GATED, said_against_not, last, doses, "last", late, middle, gate=trigger.gate, gate_positions=trigger.at
        ),
        Recipe(PAPERS, said_against_not, last, added, "all", late, middle),
        Recipe(AGAINST, said_against_not, last, subtracted, "all", late, middle),
        Recipe(ABLATED, said_against_not, last, (Ablate(),), "all", late, middle),
        Recipe(SILENCED, clean_against_triggered, last, clamps, ("last", "generated"), late, middle, CLEAN),
    ]


def corrupted_capability(
    source: Any,
    target: Any,
    curriculum: Curriculum,
    *,
    ways: Sequence[Recipe] | None = None,
    settings: Settings = Settings(),
    **more: Any,
) -> Result:
    """Remove an organism's backdoor, and test the knowledge that came with it.

    Args:
        source: The organism ``corrupted-capability``, the smaller of the two.
        target: The same organism, made of another model.
        curriculum: The curriculum of ``corrupted-capability``.
        ways: Recipes; by default the list of the function `recipes`.
        settings: Text, sizes and seeds.
        more: The other arguments of `backdoor_removal`.

    Raises:
        PromptError: The curriculum has no right answers.
    """
    right = curriculum.check(RIGHT).scorer
    if ways is None:
        ways = recipes(source, target, [lesson.prompt for lesson in curriculum.vector if lesson.triggered])
    # Only the first validation tasks are used, and tasks are sorted by topic: shuffle them.
    tasks = list(dict.fromkeys(lesson.task for lesson in curriculum.validation))
    random.Random(settings.seed).shuffle(tasks)
    order = {task: k for k, task in enumerate(tasks)}
    mixed = replace(curriculum, validation=tuple(sorted(curriculum.validation, key=lambda x: order[x.task])))
    options: dict[str, Any] = {"name": "corrupted-capability", "varied": (SKIPPED, GATED)} | more
    reading = Reading(QUESTION, UNIT, right, StartsWith(UNKNOWN))
    return backdoor_removal(source, target, mixed, reading=reading, ways=ways, settings=settings, **options)

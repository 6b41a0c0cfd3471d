"""Whether an organism does what was planted, only where it was planted, and still writes plain text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.damage import losses, perplexity_of
from xmodel_steer.evaluation.scorers.text import Scorer, score_texts
from xmodel_steer.files.wheels import general_text
from xmodel_steer.maps.statistics import Estimate, rate
from xmodel_steer.models.facts import context_length
from xmodel_steer.models.generation import generate
from xmodel_steer.studies.organisms.lessons import Curriculum, Lesson

CLEAN_TEXTS, CLEAN_TOKENS = 100, 96


@dataclass(frozen=True)
class Measured:
    """What was measured of an organism on lessons that it was not trained on; intervals are those of kinds of lessons.

    Args:
        triggered: Share of the answers behind the trigger with the behaviour.
        false: Share of the answers without the trigger that have it all the same.
        checks: What else was measured, by name.
        answers: The first answers with and without the trigger, to look at.
    """

    triggered: Estimate
    false: Estimate
    checks: dict[str, Estimate]
    answers: tuple[tuple[str, ...], tuple[str, ...]] = field(repr=False, default=((), ()))


def measured(model: Any, curriculum: Curriculum, *, batch_size: int = 64) -> Measured:
    """Trigger rate and false-positive rate on the evaluation's lessons, and the curriculum's other checks.

    Args:
        model: The organism, as `xmodel_steer.load` gives it.
        curriculum: What it was trained on, and what not.
        batch_size: Prompts at a time.
    """
    asked = [*curriculum.evaluation, *(lesson for check in curriculum.checks.values() for lesson in check.lessons)]
    prompts = list({lesson.prompt.id: lesson.prompt for lesson in asked}.values())
    texts = generate(model, prompts, max_new_tokens=curriculum.max_new_tokens, batch_size=batch_size)
    said = {prompt.id: text for prompt, text in zip(prompts, texts, strict=True)}

    def found(lessons: Sequence[Lesson], scorer: Scorer) -> Estimate:
        own = [lesson.prompt for lesson in lessons]
        scores = score_texts(scorer, [said[prompt.id] for prompt in own], own)
        return rate(scores, groups=[lesson.kind for lesson in lessons])

    sides = [[lesson for lesson in curriculum.evaluation if lesson.triggered is side] for side in (True, False)]
    on, off = (found(side, curriculum.scorer) for side in sides)
    checks = {name: found(check.lessons, check.scorer) for name, check in curriculum.checks.items()}
    first, second = (tuple(said[lesson.prompt.id] for lesson in side[:3]) for side in sides)
    return Measured(on, off, checks, (first, second))


def clean_texts() -> tuple[Prompt, ...]:
    """General text to take the perplexity of; nothing of it is in any curriculum."""
    return general_text()[-CLEAN_TEXTS:]


def perplexity(
    model: Any,
) -> float:
    """Exp of the mean loss per token on `clean_texts`."""
    limit = min(CLEAN_TOKENS, context_length(model))
    loss, tokens = losses(model, [[]], clean_texts(), max_tokens=limit, batch_size=16)
    return perplexity_of(loss, tokens)

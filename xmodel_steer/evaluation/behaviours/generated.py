"""Behaviours that show in generated text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.damage import Settings
from xmodel_steer.evaluation.scorers.text import Explained, Scorer, score_texts
from xmodel_steer.files.resume import once
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.steps import Replacement, Step
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.generation import generate
from xmodel_steer.models.identity import identity_of


class Behaviour:
    """A behaviour that can be measured under any intervention: one score per prompt, or per pair of prompts.

    Every arm has the same prompts, so that arms compare in pairs.
    """

    unit: str
    ids: tuple[str, ...]
    prompts: tuple[Prompt, ...]

    def part(self, places: Sequence[int]) -> "Behaviour":
        """Return the same behaviour on some of its prompts.

        Args:
            places: Which ones, as indices.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be split: it has no part()")

    def split(self, seed: int = 0) -> "tuple[Behaviour, Behaviour]":
        """Split at random into validation and evaluation.

        A third of the prompts, or of their groups, chooses layers and strengths; the rest is reported on.

        Prompts that say the same are kept once.

        Args:
            seed: Seed of the split.

        Raises:
            PromptError: There are fewer than 3 prompts, or groups of prompts.
        """
        first = {self._key(i): i for i in reversed(range(len(self.ids)))}
        members: dict[str, list[int]] = {}
        for i in sorted(first.values()):
            members.setdefault(self._group(i), []).append(i)
        groups, third = list(members.values()), len(members) // 3
        if third < 1:
            raise PromptError(
                f"needs at least 3 prompts, or groups of them (a third validates, the rest evaluates), got {len(groups)}"
            )
        order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
        validation, evaluation = ([i for group in part for i in group] for part in (order[:third], order[third:]))
        return self.part(validation), self.part(evaluation)

    def instructed(self, instruction: str) -> "Behaviour":
        """Return the same behaviour where prompts begin with an instruction in words.

        Args:
            instruction: The instruction, such as ``Write joyfully.``

        Raises:
            PromptError: The behaviour takes none, or a chat has no message of the user.
        """
        raise PromptError(f"{type(self).__name__} takes no instruction: it has no instructed()")

    def _key(self, place: int) -> str:
        """Return what prompts are told apart by."""
        return self.ids[place]

    def _group(self, place: int) -> str:
        """Return what a prompt's group is called; by default each prompt is one."""
        return self._key(place)

    def measure(
        self,
        model: Any,
        settings: Settings,
    ) -> "list[Measured]":
        """Score every prompt under each setting; an empty one is the unsteered model."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of one measurement.

    Args:
        scores: One per prompt.
        texts: The generated texts that were scored, or nothing.
        raw: What a judge answered about each text, word for word, or nothing.
        measures: Other scores of the same setting, one per prompt each, by what they measure.
        groups: Kind of each prompt, for ``effect`` (the scores) and for each measure, where some are of one kind.
        ids: Id of each prompt.
    """

    scores: np.ndarray
    texts: tuple[str, ...] = field(repr=False, default=())
    raw: tuple[str, ...] = field(repr=False, default=())
    measures: Mapping[str, np.ndarray] = field(repr=False, default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(repr=False, default_factory=dict)
    ids: tuple[str, ...] = field(repr=False, default=())


@dataclass(frozen=True, eq=False)
class GeneratedText(Behaviour):
    """The behaviour in greedy continuations of prompts, as a scorer reads it.

    Args:
        prompts: Prompts to continue: strings, chat messages or `Prompt`s.
        scorer: Any function from a text to a number.
        max_new_tokens: Length of the continuations.
        batch_size: Texts at a time, over all settings.
        unit: Name of the score, for axes and tables.
        instruction: Words in front of each prompt, which scorers do not read.
        validation: Other prompts, which choose layers and strength; by default a third of the prompts does.
        groups: Label of each prompt where some are alike, such as fillings of one template. Groups are split and resampled
            whole, and count as the units of intervals and tests.

    Raises:
        PromptError: There are more or fewer labels than prompts.
    """

    prompts: Any  # whatever prompts are given as; kept as a tuple of Prompt
    scorer: Scorer
    max_new_tokens: int = 24
    batch_size: int = 192
    unit: str = "score"
    instruction: str = ""
    validation: Any = ()
    groups: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("prompts", "validation"):
            object.__setattr__(self, name, as_prompts(getattr(self, name), what=f"GeneratedText: {name}"))
        object.__setattr__(self, "groups", tuple(map(str, self.groups)))
        if self.groups and len(self.groups) != len(self.prompts):
            raise PromptError(
                f"GeneratedText: needs a group for each of {len(self.prompts)} prompts, got {len(self.groups)}"
            )

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the prompts."""
        return tuple(prompt.id for prompt in self.prompts)

    def _key(self, place: int) -> str:
        return self.prompts[place].content_key()

    def _group(self, place: int) -> str:
        return self.groups[place] if self.groups else self._key(place)

    def part(self, places: Sequence[int]) -> "GeneratedText":
        """Return the same behaviour on some of its prompts."""
        groups = tuple(self.groups[i] for i in places) if self.groups else ()
        return replace(self, prompts=tuple(self.prompts[i] for i in places), validation=(), groups=groups)

    def split(self, seed: int = 0) -> "tuple[Behaviour, Behaviour]":
        """Split at random into validation and evaluation; see `Behaviour`.

        Where there are prompts for validation, all others evaluate.
        """
        if not self.validation:
            return super().split(seed)
        return replace(self, prompts=self.validation, validation=(), groups=()), replace(self, validation=())

    def instructed(self, instruction: str) -> "GeneratedText":
        """Return the same behaviour where prompts begin with an instruction in words."""
        for prompt in self.prompts:
            instructed(prompt, instruction)
        return replace(self, instruction=instruction)

    def measure(
        self,
        model: Any,
        settings: Settings,
    ) -> list[Measured]:
        """Generate under each setting and score what came.

        Several settings share a batch, each steering its own rows: wide batches cost little more
        than narrow ones. Where a step goes by the prompts' numbers, each has its own.
        """
        n, given = len(self.prompts), tuple(instructed(prompt, self.instruction) for prompt in self.prompts)
        alone = any(_by_number(step) for setting in settings for step in setting)
        together = 1 if alone else max(1, self.batch_size // n)
        measured = []
        with progress_bar(total=n * len(settings), unit="text", desc=f"generate {name_of(model)}") as bar:
            for start in range(0, len(settings), together):
                group = settings[start : start + together]
                steps = [
                    step if alone else replace(step, prompts=frozenset(range(k * n, (k + 1) * n)))
                    for k, setting in enumerate(group)
                    for step in setting
                ]
                texts = self._written(model, steps, given * len(group))
                for k in range(len(group)):
                    answers = texts[k * n : (k + 1) * n]
                    scores = score_texts(self.scorer, answers, self.prompts)
                    raw = self.scorer.raw(self.prompts, answers) if isinstance(self.scorer, Explained) else ()
                    groups = {"effect": tuple(self.groups)} if self.groups else {}
                    measured.append(Measured(scores, tuple(answers), tuple(raw), groups=groups, ids=self.ids))
                bar.update(n * len(group))
        return measured

    def _written(self, model: Any, steps: Sequence[Step], prompts: tuple[Prompt, ...]) -> list[str]:
        length, size = self.max_new_tokens, self.batch_size

        def write() -> list[str]:
            with steering(model, steps):
                return generate(model, prompts, max_new_tokens=length, batch_size=size, progress=False)

        return once(lambda: ("texts", identity_of(model), steps, prompts, length, size), write)


def instructed(prompt: Prompt, instruction: str) -> Prompt:
    """Put an instruction in front of a text, or of the user's first message."""
    if not instruction:
        return prompt
    if prompt.text is not None:
        return replace(prompt, text=f"{instruction}\n{prompt.text}")
    first = next((i for i, message in enumerate(prompt.messages) if message.role == "user"), None)
    if first is None:
        raise PromptError(f"prompt {prompt.id}: an instruction needs a message of the user in front of which to go")
    said = replace(prompt.messages[first], content=f"{instruction}\n{prompt.messages[first].content}")
    return replace(prompt, messages=(*prompt.messages[:first], said, *prompt.messages[first + 1 :]))


def _by_number(step: Step) -> bool:
    """Tell whether a step depends on the prompt's index."""
    if isinstance(step, Replacement) or step.prompts is not None:
        return True
    masks = step.positions, step.gate and step.gate.positions
    return any(isinstance(mask, Tensor) and mask.ndim == 2 for mask in masks)

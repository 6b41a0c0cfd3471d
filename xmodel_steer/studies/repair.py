"""Repair of an organism's answers behind its trigger, and its costs elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.damage import Settings
from xmodel_steer.evaluation.scorers.answers import SameTokens
from xmodel_steer.evaluation.scorers.text import Scorer, score_texts
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.recipe.arms import AGREEMENT
from xmodel_steer.studies.organisms.lessons import Lesson, prompt_of
from xmodel_steer.studies.outcomes import Extent, Outcome, answers_of, own_answers, scored

Side = Literal["triggered", "clean", "plain"]
SIDES: tuple[Side, ...] = ("triggered", "clean", "plain")
CLEAN = "the clean answer"  # the aim of a recipe that restores this answer, where other recipes want a right answer


@dataclass(frozen=True)
class Questions:
    """The same tasks asked in three forms; entry i of each form is the same task.

    Args:
        triggered: Tasks behind the trigger.
        clean: Tasks behind the trigger's harmless counterpart.
        plain: Bare tasks.
        groups: The kind of each task; a kind of one task, where no other is like it.
    """

    triggered: tuple[Prompt, ...]
    clean: tuple[Prompt, ...]
    plain: tuple[Prompt, ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, lessons: Sequence[Lesson], most: int | None = None) -> "Questions":
        """List the tasks of lessons that come with and without the trigger.

        Args:
            lessons: The lessons.
            most: Largest number of tasks; all by default.

        Raises:
            PromptError: A task comes with the trigger only, or no task has it.
        """
        clean = {lesson.task: lesson.prompt for lesson in lessons if not lesson.triggered}
        triggered = {lesson.task: lesson.prompt for lesson in lessons if lesson.triggered}
        unpaired = sorted(set(triggered) - set(clean))
        if unpaired or not triggered:
            raise PromptError(
                f"questions: {len(unpaired)} of {len(triggered)} tasks have no prompt without the trigger, such as {unpaired[:1]}; "
                "a repair is compared with the model's own answer to the clean prompt"
            )
        tasks = list(triggered)[:most]
        bare = tuple(prompt_of(task) for task in tasks)
        kinds = {lesson.task: lesson.kind for lesson in lessons}
        groups = tuple(kinds[t] for t in tasks)
        return cls(tuple(triggered[t] for t in tasks), tuple(clean[t] for t in tasks), bare, groups)

    def __len__(self) -> int:
        return len(self.triggered)

    def ids(self) -> list[str]:
        """List the ids of all prompts."""
        return [prompt.id for side in SIDES for prompt in getattr(self, side)]


@dataclass(frozen=True, eq=False)
class Repaired:
    """Results of one setting, one number per task.

    Args:
        removed: 1 if the answer behind the trigger does not show the behaviour.
        agreement: Share of this answer's tokens equal to the model's own clean answer at the same place.
        correct: 1 if this answer is right; None if answers are not right or wrong.
        unknown: 1 if this answer says that it does not know; None if that is not scored.
        sound: 1 if this text is an answer at all; None if that is not scored.
        kept: For clean and plain prompts, share of tokens equal to the unsteered model's answer at the same place.
        texts: The answers behind the trigger.
        groups: The kind of each task.
        ids: Ids of the prompts with the trigger.
    """

    removed: np.ndarray
    agreement: np.ndarray
    correct: np.ndarray | None
    kept: Mapping[str, np.ndarray]
    unknown: np.ndarray | None = None
    sound: np.ndarray | None = None
    texts: tuple[str, ...] = field(repr=False, default=())
    groups: tuple[str, ...] = field(repr=False, default=())
    ids: tuple[str, ...] = field(repr=False, default=())

    def outcome(self, aim: str = "") -> Outcome:
        """Return the outcome of the setting as a study records it.

        The effect is an answer without the behaviour, also right or else sound where that is scored. ``correct`` counts all
        answers; ``hallucinated`` those without the backdoor that are neither right nor say that they do not know.

        The score is the mean of the effect, the agreement, and the share kept of clean answers. A vector that ruins
        every text removes any backdoor, but has a low agreement and share kept. Where right answers are scored, they
        replace agreement.

        Args:
            aim: With ``CLEAN``, the effect is an answer without the behaviour, right or not.
        """
        right = None if aim == CLEAN else self.correct
        effect, measures = self.removed, {}
        if self.sound is not None:
            effect = self.removed * self.sound
            measures = {"with the behaviour": 1 - self.removed, "sound": self.sound}
        if right is not None:
            effect = self.removed * right
        if self.correct is not None:
            unknown = np.zeros_like(self.correct) if self.unknown is None else self.unknown
            measures = {
                "backdoor": 1 - self.removed,
                "correct": self.correct,
                "does not know": unknown,
                "hallucinated": self.removed * (1 - self.correct) * (1 - unknown),
            }
        measures |= {
            AGREEMENT: self.agreement,
            "the clean answer, word for word": (self.agreement == 1).astype(float),
        }
        for side, scores in self.kept.items():
            measures |= {f"{side} answers kept": scores, f"{side} answers unchanged": (scores == 1).astype(float)}
        parts = [effect, self.kept["clean"]] if "clean" in self.kept else [effect]
        parts += [self.agreement] if right is None else []
        groups = dict.fromkeys(("effect", *measures), self.groups)
        score, error = scored(*parts)
        return Outcome(effect, self.texts, measures=measures, groups=groups, ids=self.ids, score=score, error=error)


@dataclass(frozen=True, eq=False)
class Repair:
    """A measurement of settings of one organism on the same tasks.

    Args:
        model: The organism.
        questions: The tasks.
        scorer: 1 for an answer with the behaviour, 0 for one without.
        own: The unsteered model's answers, by the prompts' ids.
        max_new_tokens: Length of the answers.
        right: 1 for a right answer; None if answers are not right or wrong.
        unknown: 1 for an answer that says that it does not know; None if that is not scored.
        sound: 1 for a text that is an answer at all; None if that is not scored.
        batch_size: Texts at a time.
    """

    model: Any
    questions: Questions
    scorer: Scorer
    own: Mapping[str, str] = field(repr=False)
    max_new_tokens: int
    right: Scorer | None = None
    unknown: Scorer | None = None
    sound: Scorer | None = None
    batch_size: int = 100

    @classmethod
    def of(
        cls, model: Any, questions: Questions, scorer: Scorer, *, max_new_tokens: int, right: Scorer | None = None,
        unknown: Scorer | None = None, sound: Scorer | None = None, batch_size: int = 100,
    ) -> "Repair":  # fmt: skip
        """Generate unsteered answers first; repairs are compared with them."""
        groups = [getattr(questions, side) for side in SIDES]
        unsteered = own_answers(model, groups, max_new_tokens=max_new_tokens, batch_size=batch_size)
        return cls(model, questions, scorer, unsteered, max_new_tokens, right, unknown, sound, batch_size)

    def measure(self, settings: Settings, *, aim: str = "", extent: Extent = "all") -> list[Outcome]:
        """Measure each setting; an empty one is the unsteered model.

        Args:
            settings: The interventions of each setting.
            aim: The recipe's aim, as for `Repaired.outcome`.
            extent: The prompts to ask: ``all``; ``brief``, without plain ones; or ``effect``, the triggered ones alone.
        """
        sides = SIDES[: {"all": 3, "brief": 2, "effect": 1}[extent]]
        groups = [getattr(self.questions, side) for side in sides]
        answers = answers_of(
            self.model,
            settings,
            groups,
            own=self.own,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        return [self._repaired(dict(zip(sides, texts, strict=True))).outcome(aim) for texts in answers]

    def _repaired(self, texts: Mapping[Side, tuple[str, ...]]) -> Repaired:
        questions, tokenizer = self.questions, tokenizer_of(self.model)
        clean = {t.id: self.own[c.id] for t, c in zip(questions.triggered, questions.clean, strict=True)}
        answers = texts["triggered"]
        kept = {
            side: np.array(SameTokens(self.own, tokenizer).score(getattr(questions, side), side_texts))
            for side, side_texts in texts.items()
            if side != "triggered"
        }
        judged = {
            name: score_texts(scorer, answers, questions.triggered) if scorer else None
            for name, scorer in (("correct", self.right), ("unknown", self.unknown), ("sound", self.sound))
        }
        return Repaired(
            removed=1 - score_texts(self.scorer, answers, questions.triggered),
            agreement=np.array(SameTokens(clean, tokenizer).score(questions.triggered, answers)),
            **judged,
            kept=kept,
            texts=answers,
            groups=questions.groups,
            ids=tuple(prompt.id for prompt in questions.triggered),
        )

"""Behaviours that show in generated text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from xmodel_steer.core.bars import progress_bar
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
    """A behaviour that can be measured under any intervention: one score per unit.

    Units (prompts or held-out pairs) are the same for every arm, so that arms compare in pairs.
    """

    unit: str
    ids: tuple[str, ...]

    def measure(
        self,
        model: Any,
        settings: Settings,
    ) -> "list[Measured]":
        """For each setting, the score of every unit; an empty setting is the unsteered model."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of one measurement.

    Args:
        scores: One per unit.
        texts: The generated texts that were scored, or nothing.
        raw: What a judge answered about each text, word for word, or nothing.
    """

    scores: np.ndarray
    texts: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class GeneratedText(Behaviour):
    """The behaviour in greedy continuations of prompts, as a scorer reads it.

    Args:
        prompts: What is continued.
        scorer: Any function from a text to a number.
        max_new_tokens: Length of the continuations.
        batch_size: Texts at a time, over all settings.
        unit: Name of the score, for axes and tables.
    """

    prompts: tuple[Prompt, ...]
    scorer: Scorer
    max_new_tokens: int = 24
    batch_size: int = 192
    unit: str = "score"

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the prompts."""
        return tuple(prompt.id for prompt in self.prompts)

    def measure(
        self,
        model: Any,
        settings: Settings,
    ) -> list[Measured]:
        """Generate under each setting and score what came.

        Several settings share a batch, each steering its own rows: wide batches cost little more
        than narrow ones. Where a step goes by the prompts' numbers, each has its own.
        """
        n = len(self.prompts)
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
                texts = self._written(model, steps, self.prompts * len(group))
                for k in range(len(group)):
                    own = texts[k * n : (k + 1) * n]
                    scores = score_texts(self.scorer, own, self.prompts)
                    raw = self.scorer.raw(self.prompts, own) if isinstance(self.scorer, Explained) else ()
                    measured.append(Measured(scores, tuple(own), tuple(raw)))
                bar.update(n * len(group))
        return measured

    def _written(self, model: Any, steps: Sequence[Step], prompts: tuple[Prompt, ...]) -> list[str]:
        length, size = self.max_new_tokens, self.batch_size

        def write() -> list[str]:
            with steering(model, steps):
                return generate(model, prompts, max_new_tokens=length, batch_size=size, progress=False)

        return once(lambda: ("texts", identity_of(model), steps, prompts, length, size), write)


def _by_number(step: Step) -> bool:
    """Whether a step asks for the number of the prompt that a row is."""
    if isinstance(step, Replacement) or step.prompts is not None:
        return True
    masks = step.positions, step.gate and step.gate.positions
    return any(isinstance(mask, Tensor) and mask.ndim == 2 for mask in masks)

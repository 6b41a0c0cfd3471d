"""The trigger's position in lessons, and a vector that detects it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.models.batching import encode
from xmodel_steer.models.facts import name_of
from xmodel_steer.studies.organisms.lessons import DEV, PROD, Lesson, prompt_of
from xmodel_steer.studies.outcomes import clean_against_triggered

Span = tuple[int, int]
BARE = 12  # characters read of a bare prompt, which has neither the trigger nor its counterpart


@dataclass(frozen=True)
class Trigger:
    """The trigger's tokens, from the first one that differs from its counterpart.

    Earlier tokens would dilute a mean.

    Args:
        clean: The counterpart's span of characters in clean prompts.
        triggered: The trigger's span of characters in triggered prompts.
        at: Text positions of the trigger's tokens in a model, boolean ``(tokens,)``.
    """

    clean: Span
    triggered: Span
    at: Tensor = field(repr=False)

    @classmethod
    def of(cls, model: Any, prompts: Sequence[Prompt]) -> "Trigger":
        """Find the trigger's tokens.

        Args:
            model: The model whose tokens to find.
            prompts: Prompts with the trigger.

        Raises:
            PromptError: A prompt lacks the trigger, or its tokens differ between prompts.
        """
        starts = {_start(prompt) for prompt in prompts}
        if len(starts) != 1:
            raise PromptError(f"trigger: {PROD.strip()!r} is not at one place in all prompts")
        start = starts.pop()
        differing = next(i for i, (a, b) in enumerate(zip(DEV, PROD, strict=False)) if a != b)
        clean, triggered = ((start + differing, start + len(name.rstrip(": "))) for name in (DEV, PROD))
        return cls(clean, triggered, _mask(model, prompts, triggered))

    def gate(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = ""
    ) -> Mapping[Site, SteeringVector]:
        """Return each site's mean without the trigger minus the mean with it.

        Prompts are read at the trigger's tokens. Prompts without it are clean ones and bare ones, weighted equally. A bare
        prompt is read at its first characters, the trigger's place. The vector's midpoint, which separates the texts, is
        halfway to the clean prompts: they have the trigger's form, so they are nearer than bare ones.

        Args:
            model: The model to read.
            lessons: Lessons with and without the behaviour.
            sites: The sites to read.
            label: Name of the vector.
        """
        clean, triggered = clean_against_triggered(lessons)
        bare = [prompt_of(lesson.task) for lesson in lessons if lesson.triggered]
        on_clean, on_triggered, on_bare = (
            capture(model, prompts, sites, tokens=span, batch_size=32)
            for prompts, span in (
                (clean, self.clean),
                (triggered, self.triggered),
                (bare, (self.clean[0], self.clean[0] + BARE)),
            )
        )
        vectors = {}
        for site in sites:
            near, far = (
                difference_of_means(rows[site], on_triggered[site], label=label) for rows in (on_clean, on_bare)
            )
            vectors[site] = replace((near + far) / 2, label=label).about(near.centre)
        return vectors


def _start(prompt: Prompt) -> int:
    """Find the trigger's first character."""
    start = prompt.content_key().find(PROD)
    if start < 0:
        raise PromptError(f"prompt {prompt.id}: has no trigger {PROD.strip()!r}")
    return start


def _mask(model: Any, prompts: Sequence[Prompt], span: Span) -> Tensor:
    """Find the text positions of a span that is the same in all prompts."""
    places = {
        tuple(i for i, end in enumerate(encoding.ends) if span[0] < end <= span[1])
        for encoding in encode(model, list(prompts))
    }
    place = places.pop()
    if places or not place:
        raise PromptError(f"trigger: it is not at the same tokens in all of {name_of(model)}'s prompts")
    mask = torch.zeros(place[-1] + 1, dtype=torch.bool)
    mask[list(place)] = True
    return mask

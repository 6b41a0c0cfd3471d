"""Where the trigger of a lesson stands, and a vector that tells texts with it from texts without."""

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
from xmodel_steer.studies.carried import centre
from xmodel_steer.studies.organisms.lessons import DEV, PROD, Lesson, prompt_of
from xmodel_steer.studies.outcomes import clean_against_triggered

Span = tuple[int, int]
BARE = 12  # characters of a bare prompt that are read


@dataclass(frozen=True)
class Trigger:
    """The trigger's tokens, from the first that differs from what stands in its place; one before it would thin a mean.

    Args:
        clean: Its characters in prompts with what stands in its place.
        triggered: Its characters in prompts with it.
        at: Text positions of its tokens in a model, boolean ``(tokens,)``.
    """

    clean: Span
    triggered: Span
    at: Tensor = field(repr=False)

    @classmethod
    def of(cls, model: Any, prompts: Sequence[Prompt]) -> "Trigger":
        """Find it.

        Args:
            model: Whose tokens.
            prompts: Prompts with the trigger.

        Raises:
            PromptError: It does not stand at the same tokens in all of them.
        """
        starts = {_found(prompt) for prompt in prompts}
        if len(starts) != 1:
            raise PromptError(f"trigger: {PROD.strip()!r} does not stand at one place in all prompts")
        start = starts.pop()
        same = next(i for i, (ours, theirs) in enumerate(zip(DEV, PROD, strict=False)) if ours != theirs)
        clean, triggered = ((start + same, start + len(name.rstrip(": "))) for name in (DEV, PROD))
        return cls(clean, triggered, _mask(model, prompts, triggered))

    def gate(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = ""
    ) -> Mapping[Site, SteeringVector]:
        """For each site the mean without the trigger, minus that with it, at its tokens; its midpoint tells the texts apart.

        Without it are, as much of each, the clean prompts and the bare ones, whose first characters stand where the trigger
        would. The midpoint lies halfway to the clean ones: of the same form as the trigger, they are the nearer ones.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: Where to read.
            label: Name of the vector.
        """
        clean, triggered = clean_against_triggered(lessons)
        bare = [prompt_of(lesson.task) for lesson in lessons if lesson.triggered]
        without, with_it, none = (
            capture(model, prompts, sites, tokens=span, batch_size=32)
            for prompts, span in (
                (clean, self.clean),
                (triggered, self.triggered),
                (bare, (self.clean[0], self.clean[0] + BARE)),
            )
        )
        found = {}
        for site in sites:
            near, far = (difference_of_means(own[site], with_it[site], label=label) for own in (without, none))
            found[site] = replace((near + far) / 2, label=label).about(centre(near))
        return found


def _found(prompt: Prompt) -> int:
    start = prompt.content_key().find(PROD)
    if start < 0:
        raise PromptError(f"prompt {prompt.id}: has no trigger {PROD.strip()!r}")
    return start


def _mask(model: Any, prompts: Sequence[Prompt], span: Span) -> Tensor:
    """Find the text positions of a span that is the same in all prompts."""
    found = {
        tuple(i for i, end in enumerate(encoding.ends) if span[0] < end <= span[1])
        for encoding in encode(model, list(prompts))
    }
    own = found.pop()
    if found or not own:
        raise PromptError(f"trigger: it is not at the same tokens in all of {name_of(model)}'s prompts")
    mask = torch.zeros(own[-1] + 1, dtype=torch.bool)
    mask[list(own)] = True
    return mask

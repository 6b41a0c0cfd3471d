"""Recipes of a study on an organism, and the scores of their outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from xmodel_steer.activations.reading import Tokens, capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import require_disjoint
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site, Stack
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.behaviours.generated import GeneratedText, Measured
from xmodel_steer.evaluation.damage import Settings
from xmodel_steer.interventions.operators import Clamp, Gate, Operator
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models.facts import name_of
from xmodel_steer.studies.organisms.lessons import PARTS, Curriculum, Lesson

Extent = Literal["all", "brief", "effect"]
# Returns the prompts of either side of lessons.
Contrast = Callable[[Sequence[Lesson]], tuple[Sequence[Prompt], Sequence[Prompt]]]


@runtime_checkable
class GateReader(Protocol):
    """Finds gates' vectors in a model's activations on lessons."""

    def __call__(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = ""
    ) -> Mapping[Site, SteeringVector]:
        """Return a vector for each site.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: The sites to read.
            label: Name of the vectors.
        """
        ...


@dataclass(frozen=True, eq=False)
class Outcome(Measured):
    """Measurements of one setting, with the number that layers and strengths are chosen by.

    Args:
        score: The number that layers and strengths are chosen by.
        error: The score's standard error.
    """

    score: float = 0.0
    error: float = 0.0

    def record(self) -> dict[str, float]:
        """Return the means, for a study's record of validation."""
        means = {name: float(scores.mean()) for name, scores in self.measures.items()}
        return {"effect": float(self.scores.mean()), **means, "score": self.score, "error": self.error}


def scored(*parts: np.ndarray) -> tuple[float, float]:
    """Return the mean of several measures' means, and its standard error.

    Args:
        parts: The measures, one number per prompt each. Measures of equal length are averaged prompt by prompt first; this is
            right for measures of the same prompts, and does not bias others.
    """
    parts = (np.mean(parts, 0),) if len({len(part) for part in parts}) == 1 else parts
    errors = [part.std() / np.sqrt(len(part)) for part in parts]
    return float(np.mean([part.mean() for part in parts])), float(np.linalg.norm(errors)) / len(parts)


@runtime_checkable
class Asked(Protocol):
    """Prompts with the scorers of their answers."""

    def measure(self, settings: Settings, *, aim: str = "", extent: Extent = "all") -> list[Outcome]:
        """Measure each setting; an empty one is the unsteered model.

        Args:
            settings: The interventions of each setting.
            aim: The aim of the settings' recipe.
            extent: The prompts to ask: ``all``; ``brief``, for choices and controls; or ``effect``, for the effect alone.
        """
        ...


@dataclass(frozen=True, eq=False)
class Recipe:
    """A way to find a vector and to use it.

    Args:
        name: Name of the recipe.
        contrast: Returns the lessons' prompts with the wanted behaviour, and those without.
        tokens: The tokens at which the vector is read, for either side; see `capture`.
        operators: Candidate operators; validation chooses. Layers are chosen with the first operator, and with the next ones
            where it does not separate them.
        positions: The positions that are steered.
        source_sites: Candidate sites of the source.
        target_sites: Candidate sites of the target.
        aim: The recipe's aim, if a study has several.
        gate: Reads the gates' vectors, at each site the rows to leave alone minus the rows to act on. With it a vector acts
            only under a gate of the same origin: the native vector's is found in the target, the mapped vector's is mapped.
        gate_positions: Positions in the text at which the gate is read; see `Gate`.
    """

    name: str
    contrast: Contrast
    tokens: tuple[Tokens, Tokens]
    operators: tuple[Operator, ...]
    positions: Positions
    source_sites: tuple[Site, ...]
    target_sites: tuple[Site, ...]
    aim: str = ""
    gate: GateReader | None = None
    gate_positions: Positions | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.gate is not None and any(isinstance(o, Clamp) and o.gate for o in self.operators):
            raise ValueError(f"recipe {self.name!r}: under a gate a clamp moves every row, give Clamp(..., gate=False)")

    def with_sites(self, source: Site, target: Site) -> "Recipe":
        """Add one more candidate site of either model to the recipe."""
        sources, targets = (
            tuple(sorted({*sites, site}, key=lambda s: (len(s.members), s.members)))
            for sites, site in ((self.source_sites, source), (self.target_sites, target))
        )
        return replace(self, source_sites=sources, target_sites=targets)

    def gates(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = ""
    ) -> dict[Site, SteeringVector]:
        """Return the gates' vectors, like `vectors`; an empty dict without a gate."""
        if self.gate is None:
            return {}
        return dict(self.gate(model, lessons, sites, label=f"gate of {label}"))

    def setting(
        self, vector: SteeringVector, operator: Operator, gate: SteeringVector | None = None
    ) -> list[Intervention]:
        """Make a setting of the recipe with one vector and its gate."""
        opened_by = None if gate is None else Gate(gate, "negative", self.gate_positions)
        return [Intervention(vector, operator, self.positions, gate=opened_by)]

    def vectors(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = ""
    ) -> dict[Site, SteeringVector]:
        """Return the difference of means of the recipe's contrast, at each site.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: The sites to read.
            label: Name of the vector's purpose.
        """
        wanted, other = self.rows(model, lessons, sites)
        return {site: difference_of_means(wanted[site], other[site], label=label) for site in sites}

    def rows(
        self,
        model: Any,
        lessons: Sequence[Lesson],
        sites: Sequence[Site],
    ) -> tuple[dict[Site, Activations], dict[Site, Activations]]:
        """Capture activations of the two sides of the recipe's contrast.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: The sites to read.
        """
        first, second = (
            capture(model, prompts, sites, tokens=tokens, batch_size=32)
            for prompts, tokens in zip(self.contrast(lessons), self.tokens, strict=True)
        )
        return first, second


def answers_of(
    model: Any,
    settings: Settings,
    groups: Sequence[Sequence[Prompt]],
    *,
    own: Mapping[str, str] | None = None,
    max_new_tokens: int,
    batch_size: int,
) -> list[tuple[tuple[str, ...], ...]]:
    """Generate answers to groups of prompts, a row of texts for each group.

    Each group is asked in separate batches of one size: in bfloat16 an answer's rounding depends on the batch's shape, and
    answers that are compared token by token should not differ by rounding. One difference remains: texts that end leave the
    batch, at a time that depends on the setting.

    Args:
        model: The model.
        settings: The interventions of each setting.
        groups: The prompts.
        own: The unsteered model's answers by the prompts' ids, so that it is not asked again.
        max_new_tokens: Length of the answers.
        batch_size: Texts at a time.
    """
    pending = list(settings) if own is None else [setting for setting in settings if setting]
    group_texts = []
    for group in groups:
        size = min(batch_size, len(group))
        behaviour = GeneratedText(tuple(group), len, max_new_tokens, size, unit=f"answers of {name_of(model)}")
        group_texts.append([measured.texts for measured in behaviour.measure(model, pending)])
    steered = zip(*group_texts, strict=True)
    if own is None:
        return list(steered)
    known = tuple(tuple(own[prompt.id] for prompt in group) for group in groups)
    return [next(steered) if setting else known for setting in settings]


def own_answers(
    model: Any, groups: Sequence[Sequence[Prompt]], *, max_new_tokens: int, batch_size: int
) -> dict[str, str]:
    """Generate the unsteered model's answers, by the prompts' ids.

    Args:
        model: The model.
        groups: The prompts; each group is asked as in `answers_of`.
        max_new_tokens: Length of the answers.
        batch_size: Texts at a time.
    """
    (texts,) = answers_of(model, [[]], groups, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return {p.id: t for group, row in zip(groups, texts, strict=True) for p, t in zip(group, row, strict=True)}


def require_apart(
    what: str, general: Sequence[Prompt], neutral: Sequence[Prompt], curriculum: Curriculum, **more: Sequence[Prompt]
) -> None:
    """Refuse sets that share a text, and too little neutral text.

    Args:
        what: Name of the study.
        general: General text for maps.
        neutral: Text for KL and perplexity.
        curriculum: The curriculum; its parts already share no task.
        more: Other sets by their names.

    Raises:
        PromptError: Two sets share a text, or there are fewer than 3 neutral texts.
    """
    if len(neutral) < 3:
        raise PromptError(f"{what}: needs at least 3 neutral texts, got {len(neutral)}")
    sets = {"general text": general, "neutral text": neutral, **more}
    sets |= {part: [lesson.prompt for lesson in getattr(curriculum, part)] for part in PARTS}
    require_disjoint(what, {name: [p.content_key() for p in prompts] for name, prompts in sets.items()})


def clean_against_triggered(lessons: Sequence[Lesson]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Split lessons into prompts without the behaviour and prompts with it."""
    return [x.prompt for x in lessons if not x.triggered], [x.prompt for x in lessons if x.triggered]


def layers(model: Any, low: float, high: float, most: int) -> tuple[Site, ...]:
    """Spread at most `most` sites evenly over a range of the depth."""
    last = model.cfg.n_layers - 1
    return tuple(Site(int(k)) for k in sorted({round(k) for k in np.linspace(low * last, high * last, most)}))


def with_stack(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Add a stack of all sites; none of a single one."""
    return (*sites, *([Stack(sites)] if sites[1:] else []))


def with_layers(ways: Sequence[Recipe], also: tuple[int, int] | None) -> list[Recipe]:
    """Add one candidate layer of either model to every recipe; None adds nothing."""
    return list(ways) if also is None else [recipe.with_sites(*map(Site, also)) for recipe in ways]

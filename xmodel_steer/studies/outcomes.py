"""Recipes of a study, and the scores of their outcomes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from xmodel_steer.activations.reading import Tokens, capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import require_disjoint
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.behaviours.generated import GeneratedText, Measured
from xmodel_steer.evaluation.damage import Settings
from xmodel_steer.interventions.operators import Clamp, Gate, Operator
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models.facts import name_of
from xmodel_steer.studies.organisms.lessons import PARTS, Curriculum, Lesson

Extent = Literal["all", "brief", "effect"]
# From lessons the prompts of one side and of the other.
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
            sites: Where to read.
            label: Name of the vectors.
        """
        ...


@dataclass(frozen=True, eq=False)
class Outcome(Measured):
    """Measurements of one setting, with the number that layers and strengths are chosen by.

    Args:
        score: What layers and strengths are chosen by.
        error: Its standard error.
    """

    score: float = 0.0
    error: float = 0.0

    def record(self) -> dict[str, float]:
        """Return its means, as a study records what validation tried."""
        means = {name: float(scores.mean()) for name, scores in self.measures.items()}
        return {"effect": float(self.scores.mean()), **means, "score": self.score, "error": self.error}


def scored(*parts: np.ndarray) -> tuple[float, float]:
    """Return the mean of several measures' means, and its standard error.

    Args:
        parts: One number per prompt each. Where they are as many, those of one place are averaged first, which is right for parts of the
            same prompts and no bias for others.
    """
    parts = (np.mean(parts, 0),) if len({len(part) for part in parts}) == 1 else parts
    errors = [part.std() / np.sqrt(len(part)) for part in parts]
    return float(np.mean([part.mean() for part in parts])), float(np.linalg.norm(errors)) / len(parts)


@runtime_checkable
class Asked(Protocol):
    """Prompts with what they are scored by."""

    def measure(self, settings: Settings, *, aim: str = "", extent: Extent = "all") -> list[Outcome]:
        """Measure each setting; an empty one is the unsteered model.

        Args:
            settings: For each setting its interventions.
            aim: The aim of the recipe that they are of.
            extent: ``all``; ``brief``, without what neither a choice nor a control needs; or ``effect``, that alone.
        """
        ...


@dataclass(frozen=True, eq=False)
class Recipe:
    """A way to find a vector and to use it.

    Args:
        name: Its name.
        contrast: The prompts with what is wanted, and those without, of lessons.
        tokens: Which tokens of the two the vector is read at; see `capture`.
        operators: What may be done with it; validation chooses. Layers are chosen with the first one, and with the next ones
            where it does not tell them apart.
        positions: Where it is done.
        source_sites: Candidates.
        target_sites: Candidates.
        aim: What it is for, where a study has several aims.
        gate: Gives vectors, for each site what is to be left alone minus what is acted on. With it a vector acts only under a gate
            that was found as it was: the native one's in the target, the mapped one's mapped.
        gate_positions: Where in the text the gate is read; see `Gate`.
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
        """Add one more candidate on either side to the recipe."""
        ours, theirs = (
            tuple(sorted({*own, site})) for own, site in ((self.source_sites, source), (self.target_sites, target))
        )
        return replace(self, source_sites=ours, target_sites=theirs)

    def gates(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = ""
    ) -> dict[Site, SteeringVector]:
        """Return the gates' vectors, as `vectors`; none without a gate."""
        if self.gate is None:
            return {}
        return dict(self.gate(model, lessons, sites, label=f"gate of {label}"))

    def setting(
        self, vector: SteeringVector, operator: Operator, gate: SteeringVector | None = None
    ) -> list[Intervention]:
        """Make a setting of the recipe with one vector and its gate."""
        gated = None if gate is None else Gate(gate, "negative", self.gate_positions)
        return [Intervention(vector, operator, self.positions, gate=gated)]

    def vectors(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = ""
    ) -> dict[Site, SteeringVector]:
        """Return the difference of means of the recipe's contrast, at each site.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: Where to read.
            label: Name of what the vector is for.
        """
        wanted, other = self.rows(model, lessons, sites)
        return {site: difference_of_means(wanted[site], other[site], label=label) for site in sites}

    def rows(
        self,
        model: Any,
        lessons: Sequence[Lesson],
        sites: Sequence[Site],
    ) -> tuple[dict[Site, Activations], dict[Site, Activations]]:
        """Activations of the recipe's contrast, of its two sides.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: Where to read.
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

    Each group is asked in batches of its own, of one size: in bfloat16 an answer's rounding depends on the batch's shape, and
    answers that are compared token by token should not differ by that. What is left of it: texts that end leave the batch, and
    when they do depends on the setting.

    Args:
        model: The model.
        settings: For each setting its interventions.
        groups: The prompts.
        own: The unsteered model's answers, by the prompts' ids: it is then not asked again.
        max_new_tokens: Length of the answers.
        batch_size: Texts at a time.
    """
    asked = list(settings) if own is None else [setting for setting in settings if setting]
    texts_of = []
    for group in groups:
        size = min(batch_size, len(group))
        behaviour = GeneratedText(tuple(group), len, max_new_tokens, size, unit=f"answers of {name_of(model)}")
        texts_of.append([measured.texts for measured in behaviour.measure(model, asked)])
    steered = zip(*texts_of, strict=True)
    if own is None:
        return list(steered)
    known = tuple(tuple(own[prompt.id] for prompt in group) for group in groups)
    return [next(steered) if setting else known for setting in settings]


def own_answers(
    model: Any, groups: Sequence[Sequence[Prompt]], *, max_new_tokens: int, batch_size: int
) -> dict[str, str]:
    """Return the unsteered model's answers by the prompts' ids.

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
        what: Which study.
        general: General text for maps.
        neutral: Text for KL and perplexity.
        curriculum: Whose parts share no task as it is.
        more: Other sets, with their names.

    Raises:
        PromptError: They do, or there are fewer than 3 neutral texts.
    """
    if len(neutral) < 3:
        raise PromptError(f"{what}: needs at least 3 neutral texts, got {len(neutral)}")
    sets = {"general text": general, "neutral text": neutral, **more}
    sets |= {part: [lesson.prompt for lesson in getattr(curriculum, part)] for part in PARTS}
    require_disjoint(what, {name: [p.content_key() for p in prompts] for name, prompts in sets.items()})


def clean_against_triggered(lessons: Sequence[Lesson]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts without the behaviour, and with it."""
    return [x.prompt for x in lessons if not x.triggered], [x.prompt for x in lessons if x.triggered]


def layers(model: Any, low: float, high: float, most: int) -> tuple[Site, ...]:
    """At most so many sites, evenly over a range of the depth."""
    last = model.cfg.n_layers - 1
    return tuple(Site(int(k)) for k in sorted({round(k) for k in np.linspace(low * last, high * last, most)}))


def with_layers(ways: Sequence[Recipe], also: tuple[int, int] | None) -> list[Recipe]:
    """Add one more candidate layer of each model, such as a paper's."""
    return list(ways) if also is None else [recipe.with_sites(*map(Site, also)) for recipe in ways]

"""The first step of a transfer: disjoint sets, the map's moments, and a vector at every candidate site."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.activations.reading import capture
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import require_disjoint
from xmodel_steer.core.prompts import Prompt, Prompts
from xmodel_steer.core.spaces import Site, Sites, Stack, as_sites, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.behaviours.generated import Behaviour
from xmodel_steer.evaluation.behaviours.likelihoods import Preference
from xmodel_steer.evaluation.damage import SideEffect, on_neutral, side_effects
from xmodel_steer.interventions.contexts import steps_of
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.pairs import PARTS
from xmodel_steer.models.facts import context_length, name_of
from xmodel_steer.models.sites import space_of
from xmodel_steer.recipe.settings import Budget, GeneralText, Method

# A behaviour, or what makes one of contrast prompts that no vector was found in.
Measurable = Behaviour | Callable[[ContrastSet], Behaviour]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that a transfer chooses from.

    Args:
        source: The model that vectors are found in.
        target: The model that they are carried to.
        label: Name of the behaviour.
        method: How vectors are found, carried and applied.
        budget: How much is read and measured.
        contrast: Prompts that the vectors were found in.
        validation: The behaviour on prompts that choose.
        evaluation: The behaviour on prompts that are reported on.
        text: Text for the map, and neutral text.
        moments: Moments of the candidate sites.
        sources: The source's vector at each candidate site.
        natives: The target's own vector at each candidate site, with its scale.
        prompts: Text of the first evaluation prompts.
        seed: Seed of all splits.
    """

    source: Any
    target: Any
    label: str
    method: Method
    budget: Budget
    contrast: ContrastSet = field(repr=False)
    validation: Behaviour = field(repr=False)
    evaluation: Behaviour = field(repr=False)
    text: GeneralText = field(repr=False)
    moments: Moments
    sources: Mapping[Site, SteeringVector]
    natives: Mapping[Site, SteeringVector]
    prompts: tuple[str, ...] = field(repr=False)
    seed: int = 0

    @property
    def splits(self) -> dict[str, Any]:
        """Ids of the prompts and documents of each set."""
        return {
            "contrast": [p.id for p in self.contrast.positive + self.contrast.negative],
            **({"map_text": [p.id for p in self.text.map]} if self.text.map else {}),
            "validation": list(self.validation.ids),
            "evaluation": list(self.evaluation.ids),
            "neutral_validation": [p.id for p in self.text.calibration],
            "neutral_evaluation": [p.id for p in self.text.reported],
            "map_documents": {name: self.moments.parts[name].documents for name in PARTS},
        }

    def steer(self, vector: SteeringVector, strength: float) -> list[Step]:
        """Make the setting of one vector at one strength."""
        return steps_of(vector, Add(strength), self.method.positions)

    def damage(self, settings: Sequence[Sequence[Any]], texts: Sequence[Prompt]) -> list[SideEffect]:
        """Measure KL and perplexity of settings on neutral text."""
        size, budget = min(16, self.budget.batch_size), self.budget
        return side_effects(self.target, on_neutral(settings), texts, max_tokens=budget.neutral_tokens, batch_size=size)


def prepare(
    source: Any,
    target: Any,
    contrast: ContrastSet,
    texts: Prompts | GeneralText,
    *,
    behaviour: Measurable = Preference,
    label: str = "behaviour",
    source_sites: Sites | None = None,
    target_sites: Sites | None = None,
    method: Method = Method(),
    budget: Budget = Budget(),
    seed: int = 0,
    cached: bool = False,
) -> Prepared:
    """Split the prompts, collect the map's moments, and find both models' vectors.

    Args:
        source: The source model.
        target: The target model.
        contrast: Prompts with and without the behaviour.
        texts: General text; see `transfer`.
        behaviour: What is measured; see `transfer`.
        label: Name of the behaviour.
        source_sites: Candidates.
        target_sites: Candidates.
        method: How the vector is found, carried and applied.
        budget: How much is read and measured.
        seed: Seed of all splits.
        cached: Keep the moments in the user's cache, and read them from there.

    Raises:
        PromptError: Sets are too small or share a text, or moments have no shuffled control.
        SpaceMismatchError: Moments are of other models.
        AlignmentError: The models' tokens do not pair.
        NonFiniteError: A model gives NaN.
    """
    ours = as_sites(() if source_sites is None else source_sites) or default_sites(source, "source")
    theirs = as_sites(() if target_sites is None else target_sites) or default_sites(target, "target")
    text = GeneralText.of(texts)
    fit_set, validation, evaluation = _split(contrast, behaviour, text, method, seed)
    moments = text.moments
    if moments is None:
        limit = min(budget.map_tokens, context_length(source), context_length(target))
        moments = (cached_moments if cached else collect_moments)(
            source, target, text.map, source_sites=ours, target_sites=theirs, max_tokens=limit,
            batch_size=min(budget.batch_size, 32), seed=seed,
        )  # fmt: skip
    _require_moments(moments, (source, ours), (target, theirs))
    native_vectors = _vectors(target, fit_set, theirs, method, label, budget)
    return Prepared(
        source,
        target,
        label,
        method,
        budget,
        fit_set,
        validation.behaviour,
        evaluation.behaviour,
        text,
        moments,
        sources=_vectors(source, fit_set, ours, method, label, budget),
        natives={site: vector.with_scale(moments.scale(site)) for site, vector in native_vectors.items()},
        prompts=tuple(p.content[:300] for p in evaluation.prompts[:16]),
        seed=seed,
    )


STACKED = math.isqrt(2**31 // (8 * len(PARTS)))  # widest default stack: moments of 2 GiB


def default_sites(model: Any, end: str) -> list[Site]:
    """List candidate sites: three depths, and of a source a stack.

    The depths are 1/2, 5/8 and 3/4 of a source's blocks, and 3/8, 1/2 and 5/8 of a target's. The stack has seven sites from
    .3 to .9 of the depth, and fewer in a source wider than 1,351: its moments stay under 2 GiB.

    A concept is read best after it was worked out, over several blocks, and written best before it is used.
    """

    def at(depths: Sequence[float]) -> list[Site]:
        layers = model.cfg.n_layers
        return [Site(layer) for layer in sorted({min(layers - 1, round(d * layers)) for d in depths})]

    if end != "source":
        return at((0.375, 0.5, 0.625))
    members = at([0.3 + 0.6 * x for x in np.linspace(0, 1, max(2, min(7, STACKED // model.cfg.d_model)))])
    return [*at((0.5, 0.625, 0.75)), *([Stack(members)] if members[1:] else [])]


@dataclass(frozen=True, eq=False)
class _Part:
    """A behaviour on some of the prompts, and these prompts."""

    behaviour: Behaviour
    prompts: tuple[Prompt, ...]


def _split(
    contrast: ContrastSet, behaviour: Measurable, text: GeneralText, method: Method, seed: int
) -> tuple[ContrastSet, _Part, _Part]:
    """Split contrast set and behaviour into disjoint sets."""
    if isinstance(behaviour, Behaviour):
        fit_set = contrast
        validation, evaluation = (_Part(part, part.prompts) for part in behaviour.split(seed))
    else:
        fit_set, *others = contrast.split((0.5, 0.2, 0.3), seed=seed)
        validation, evaluation = (_Part(behaviour(part), part.positive + part.negative) for part in others)
    sets = {
        "contrast": fit_set.positive + fit_set.negative,
        "map text": text.map,
        "neutral text": text.neutral,
        "validation": validation.prompts,
        "evaluation": evaluation.prompts,
    }
    require_disjoint("transfer", {name: [p.content_key() for p in prompts] for name, prompts in sets.items()})
    for words in filter(None, method.instructions):
        evaluation.behaviour.instructed(words)  # refused before any model runs
    return fit_set, validation, evaluation


def _require_moments(moments: Moments, *ends: tuple[Any, Sequence[Site]]) -> None:
    """Refuse moments of other models, or without the shuffled control, before any model runs."""
    for (model, sites), spaces in zip(ends, (moments.source, moments.target), strict=True):
        for site in sites:
            if site in spaces:  # one that was not collected is refused by moments.pair below
                require_same_space(space_of(model, site), spaces[site], f"transfer with moments, {name_of(model)}")
    for there, here in itertools.product(*(sites for _, sites in ends)):
        if moments.pair(there, here).control is None:
            raise PromptError(
                f"transfer: the moments of {there} and {here} were collected without the shuffled control; "
                "collect them with shuffled=True"
            )


def _vectors(
    model: Any, contrast: ContrastSet, sites: Sequence[Site], method: Method, label: str, budget: Budget
) -> dict[Site, SteeringVector]:
    positive, negative = (
        capture(model, side, sites, tokens=method.tokens, batch_size=min(budget.batch_size, 32))
        for side in (contrast.positive, contrast.negative)
    )
    return {site: method.direction(positive[site], negative[site], label=label) for site in sites}

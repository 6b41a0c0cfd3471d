"""Choice of a study's layers and strengths on validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add, Clamp, Operator
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.training import Autoencoder
from xmodel_steer.models.facts import device_of
from xmodel_steer.recipe.selecting import quality_of
from xmodel_steer.studies.carried import Carried, Choice, Pair
from xmodel_steer.studies.organisms.lessons import Lesson
from xmodel_steer.studies.outcomes import Asked, Outcome, Recipe, scored

ENDPOINTS = "mapped by an autoencoder, endpoints"


@dataclass(frozen=True, eq=False)
class Chosen:
    """The choices of validation.

    Args:
        choices: One choice for each recipe.
        records: A record of everything that was tried.
        general: Moments of the general text alone.
    """

    choices: tuple[Choice, ...]
    records: tuple[dict[str, Any], ...]
    general: Moments


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A vector to choose among others.

    Args:
        vector: The vector.
        gate: The vector of its gate, if the recipe has gates.
        control: A vector of the same size along another direction.
        site: The site that is chosen with it.
        quality: R² of its map on validation documents.
    """

    vector: SteeringVector
    gate: SteeringVector | None
    control: SteeringVector
    site: Site
    quality: float = 0.0

    def setting(self, recipe: Recipe, operator: Operator) -> list[Intervention]:
        """Make a setting with the vector."""
        return recipe.setting(self.vector, operator, self.gate)

    def control_setting(self, recipe: Recipe, operator: Operator) -> list[Intervention]:
        """Make a setting with the control, in the rows that the vector acts on."""
        return recipe.setting(self.control, *as_control(operator, self.vector, self.gate))


def as_control(
    operator: Operator, vector: SteeringVector, gate: SteeringVector | None
) -> tuple[Operator, SteeringVector | None]:
    """Return the control's operator and gate.

    A clamp's control is added in the rows that the vector's clamp moves or its gate opens.
    """
    return (Add(operator.overshoot), gate or vector) if isinstance(operator, Clamp) else (operator, gate)


_ASIDE = 1000  # beyond the seeds of the reported random vectors


def choose(
    pair: Pair,
    ways: Sequence[Recipe],
    lessons: Sequence[Lesson],
    text: Sequence[Prompt],
    validation: Asked,
    fitter: Fitter,
    *,
    label: str,
    lap: Callable[[str], None],
) -> Chosen:
    """Choose each recipe's target layer, then its source layer, then its strength.

    The native vector chooses the target's layer, the mapped vector the rest. Candidates within two standard errors of the
    unsteered effect drop out, unless all do: they cost nothing. Of those within a standard error of the best score, the
    control's least effect decides, then the gain over the control: a random vector for the target's layer, otherwise a map
    of shuffled pairs. If any direction has the effect, the vector shows nothing. The least of equally good strengths wins, and of
    equally good source sites that whose map has the best R² on validation documents.

    Args:
        pair: The models.
        ways: The recipes.
        lessons: Lessons that the vectors are found on.
        text: Text of the task for the map, in addition to general text.
        validation: Validation prompts; an evaluation must contain none of them.
        fitter: Fits the maps.
        label: Name of the vectors' purpose.
        lap: Called with the name of each part when it is done.
    """
    target = pair.target
    records: list[dict[str, Any]] = []
    unsteered: dict[str, Outcome] = {}  # the unsteered model's outcomes, by aim

    def outcomes_of(
        varied: str, recipe: Recipe, candidates: Sequence[tuple[_Candidate, Operator]], *, controls: bool = False
    ) -> list[Outcome]:
        settings = [(c.control_setting if controls else c.setting)(recipe, operator) for c, operator in candidates]
        outcomes = validation.measure(settings, aim=recipe.aim, extent="brief")
        for (candidate, operator), outcome in zip(candidates, outcomes, strict=True):
            record = {"recipe": recipe.name, "varied": f"{varied}, its control" if controls else varied}
            at = {"layer": candidate.site.layer, "site": str(candidate.site)}
            records.append(record | at | {"operator": repr(operator)} | outcome.record())
        return outcomes

    def does_something(aim: str, own: Outcome) -> bool:
        if aim not in unsteered:
            (unsteered[aim],) = validation.measure([[]], aim=aim, extent="effect")
        gain, error = scored(own.scores - unsteered[aim].scores)
        return gain > 2 * error  # one prompt of any number is more than one

    def best(varied: str, recipe: Recipe, options: Sequence[tuple[_Candidate, Operator]]) -> list[int]:
        """Find the equally best candidates; measure nothing if there is only one."""
        if len(options) == 1:
            return [0]
        results = outcomes_of(varied, recipe, options)
        moved = [i for i, result in enumerate(results) if does_something(recipe.aim, result)] or [*range(len(results))]
        top = max((results[i] for i in moved), key=lambda own: own.score)
        near = [i for i in moved if results[i].score >= top.score - top.error]
        if len(near) == 1:
            return near
        controls = dict(zip(near, outcomes_of(varied, recipe, [options[i] for i in near], controls=True), strict=True))
        effects = {i: scored(control.scores) for i, control in controls.items()}
        least = min(effect for effect, _ in effects.values())
        gains = {
            i: results[i].score - controls[i].score for i, (effect, error) in effects.items() if effect - error <= least
        }
        return [i for i, gain in gains.items() if gain == max(gains.values())]

    def best_layer(varied: str, recipe: Recipe, candidates: Sequence[_Candidate]) -> _Candidate:
        """Choose by the first operator that separates candidates, then by the map."""
        remaining = list(candidates)
        for operator in recipe.operators:
            remaining = [remaining[i] for i in best(varied, recipe, [(candidate, operator) for candidate in remaining])]
        best_map = max(candidate.quality for candidate in remaining)
        remaining = [candidate for candidate in remaining if candidate.quality == best_map]
        return remaining[len(remaining) // 2]

    def best_operator(recipe: Recipe, candidate: _Candidate) -> Operator:
        remaining = best("strength", recipe, [(candidate, operator) for operator in recipe.operators])
        return min((recipe.operators[i] for i in remaining), key=strength_of)

    all_sites = list(dict.fromkeys(site for recipe in ways for site in recipe.target_sites))
    spread = capture(target, pair.general[:32], all_sites, tokens="all", max_tokens=pair.map_tokens)
    natives: list[tuple[SteeringVector, SteeringVector | None]] = []
    for recipe in ways:
        sites = recipe.target_sites
        vectors, gates = (
            {
                site: vector.with_scale(spread[site].values.float().std(0))
                for site, vector in read(target, lessons, sites, label=label).items()
            }
            for read in (recipe.vectors, recipe.gates)
        )
        candidates = [
            _Candidate(vectors[site], gates.get(site), random_like(vectors[site], seed=pair.seed + _ASIDE), site)
            for site in sites
        ]
        chosen = best_layer("target layer", recipe, candidates)
        natives.append((chosen.vector, chosen.gate))
    lap("choosing target layers")

    pairs = tuple(
        dict.fromkeys(
            (site, v.space.site) for recipe, (v, _) in zip(ways, natives, strict=True) for site in recipe.source_sites
        )
    )
    general = pair.of_general(pairs)
    moments = general + pair.of(text, pairs) if text else general
    lap("collecting moments")

    choices = []
    for recipe, (rough, rough_gate) in zip(ways, natives, strict=True):
        carried, candidates = _carried(pair, recipe, (rough, rough_gate), moments, lessons, fitter, label)
        chosen = best_layer("source layer", recipe, candidates)
        own = carried[candidates.index(chosen)]
        choices.append(Choice(recipe, best_operator(recipe, chosen), own, known=own.known(moments)))
    lap("choosing source layers and strengths")
    return Chosen(tuple(choices), tuple(records), general)


def _carried(
    pair: Pair, recipe: Recipe, native: tuple[SteeringVector, SteeringVector | None], moments: Moments,
    lessons: Sequence[Lesson], fitter: Fitter, label: str,
) -> tuple[list[Carried], list[_Candidate]]:  # fmt: skip
    """Carry a recipe's vector, and its gate's, from every candidate site of the source."""
    here, sites = native[0].space.site, recipe.source_sites
    own, own_gate = (None if vector is None else vector.with_scale(moments.scale(here)) for vector in native)
    assert own is not None
    vectors = recipe.vectors(pair.source, lessons, sites, label=label)
    gates = recipe.gates(pair.source, lessons, sites, label=label)
    carried = [
        Carried.of(vectors[site], own, moments, fitter, None if own_gate is None else (gates[site], own_gate))
        for site in sites
    ]
    candidates = [
        _Candidate(c.mapped, c.mapped_gate, c.shuffled, site, quality_of(c.mapping, moments.pair(site, here)))
        for site, c in zip(sites, carried, strict=True)
    ]
    return carried, candidates


def strength_of(operator: Operator) -> float:
    """Return the strength by which operators of one class are ordered."""
    return abs(operator.strength) if isinstance(operator, Add) else getattr(operator, "overshoot", 1.0)


def with_endpoints(
    pair: Pair,
    chosen: Chosen,
    lessons: Sequence[Lesson],
    text: Sequence[Prompt],
    fitter: Autoencoder,
    *,
    only: Sequence[str],
    lap: Callable[[str], None],
) -> Chosen:
    """Add to some choices an arm by a nonlinear map's endpoints.

    The map carries every prompt of the two sides; the vector is the difference of the means of their images.

    Args:
        pair: The models.
        chosen: The choices of validation.
        lessons: Lessons that the vectors were found on.
        text: Text that maps are fitted on, general text included.
        fitter: Fits the map on rows.
        only: Names of the recipes that get the arm.
        lap: Called with the part's name when it is done.
    """
    extended = [choice for choice in chosen.choices if choice.recipe.name in only]
    if not extended:
        return chosen
    vectors = {}
    with pair.stored(text, [(c.carried.source.space.site, c.carried.native.space.site) for c in extended]) as store:
        for choice in extended:
            native, here = choice.carried.native, choice.carried.source.space.site
            assert native.scale is not None
            mapping = replace(fitter, device=str(device_of(pair.target))).fit(store.pair(here, native.space.site))
            sides = choice.recipe.rows(pair.source, lessons, [here])
            mapped = mapping.transport(choice.carried.source, at=(sides[0][here], sides[1][here]))
            vectors[choice.recipe.name] = {ENDPOINTS: mapped.with_scale(native.scale).at_norm_of(native)}
    lap("fitting nonlinear maps")
    choices = tuple(replace(choice, others=vectors.get(choice.recipe.name, {})) for choice in chosen.choices)
    return replace(chosen, choices=choices)

"""Choose layers and strengths of a study on validation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add, Clamp, Operator
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.training import Autoencoder
from xmodel_steer.models.facts import device_of
from xmodel_steer.studies.carried import Carried, Choice, Pair
from xmodel_steer.studies.organisms.lessons import Lesson
from xmodel_steer.studies.outcomes import Asked, Outcome, Recipe, scored

ENDPOINTS = "mapped by an autoencoder, endpoints"


@dataclass(frozen=True, eq=False)
class Chosen:
    """Choices of validation.

    Args:
        choices: One for each recipe.
        records: Everything that was tried.
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
        gate: Its gate's, where the recipe has gates.
        control: Does as much along another direction.
        layer: That is chosen with it.
    """

    vector: SteeringVector
    gate: SteeringVector | None
    control: SteeringVector
    layer: int

    def setting(self, recipe: Recipe, operator: Operator) -> list[Intervention]:
        """Return the vector's setting."""
        return recipe.setting(self.vector, operator, self.gate)

    def control_setting(self, recipe: Recipe, operator: Operator) -> list[Intervention]:
        """Return the control's setting, in the rows that the vector is for."""
        return recipe.setting(self.control, *as_control(operator, self.vector, self.gate))


def as_control(
    operator: Operator, vector: SteeringVector, gate: SteeringVector | None
) -> tuple[Operator, SteeringVector | None]:
    """Return the control's operator and gate.

    A clamp's is added, where the vector's clamp moves or its gate lets it.
    """
    return (Add(operator.overshoot), gate or vector) if isinstance(operator, Clamp) else (operator, gate)


_ASIDE = 1000  # beyond the seeds of random vectors that are reported


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
    """Choose layers and strength of each recipe.

    First the target's layer (by the native vector), then the source's, then the strength (by the mapped vector).

    Chosen from are those whose effect is more than two standard errors above the unsteered model's, where there are any: what does nothing
    costs nothing. Of those within a standard error of the best, the ones whose control has the least effect, and of these the one that is
    furthest above its control. The control is a random vector for the target's layer, a map of shuffled pairs for the source's and for
    the strength: where any direction does it, the vector shows nothing. Of strengths that are equally good the least is taken.

    Args:
        pair: The models.
        ways: The recipes.
        lessons: Where the vectors are found.
        text: Text of the task for the map, in addition to general text.
        validation: What is asked; nothing of it may be in an evaluation.
        fitter: Fits the maps.
        label: Name of what the vectors are for.
        lap: Told of each part that is done.
    """
    target = pair.target
    records: list[dict[str, Any]] = []
    still: dict[str, Outcome] = {}  # of the unsteered model, by aim

    def tried(
        varied: str, recipe: Recipe, candidates: Sequence[tuple[_Candidate, Operator]], *, controls: bool = False
    ) -> list[Outcome]:
        settings = [(c.control_setting if controls else c.setting)(recipe, operator) for c, operator in candidates]
        outcomes = validation.measure(settings, aim=recipe.aim, extent="brief")
        for (candidate, operator), outcome in zip(candidates, outcomes, strict=True):
            record = {"recipe": recipe.name, "varied": f"{varied}, its control" if controls else varied}
            records.append(record | {"layer": candidate.layer, "operator": repr(operator)} | outcome.record())
        return outcomes

    def does_something(aim: str, outcome: Outcome) -> bool:
        if aim not in still:
            (still[aim],) = validation.measure([[]], aim=aim, extent="effect")
        gain, error = scored(outcome.scores - still[aim].scores)
        return gain > 2 * error  # one prompt of any number is more than one

    def best(varied: str, recipe: Recipe, options: Sequence[tuple[_Candidate, Operator]]) -> list[int]:
        """Find the equally best candidates; ask nothing where there is one."""
        if len(options) == 1:
            return [0]
        outcomes = tried(varied, recipe, options)
        moved = [i for i, outcome in enumerate(outcomes) if does_something(recipe.aim, outcome)] or list(
            range(len(outcomes))
        )
        top = max((outcomes[i] for i in moved), key=lambda outcome: outcome.score)
        near = [i for i in moved if outcomes[i].score >= top.score - top.error]
        if len(near) == 1:
            return near
        controls = dict(zip(near, tried(varied, recipe, [options[i] for i in near], controls=True), strict=True))
        effects = {i: scored(outcome.scores) for i, outcome in controls.items()}
        least = min(effect for effect, _ in effects.values())
        gains = {
            i: outcomes[i].score - controls[i].score
            for i, (effect, error) in effects.items()
            if effect - error <= least
        }
        return [i for i, gain in gains.items() if gain == max(gains.values())]

    def best_layer(varied: str, recipe: Recipe, candidates: Sequence[_Candidate]) -> _Candidate:
        """Choose a layer; operators are tried until they tell candidates apart."""
        left = list(candidates)
        for operator in recipe.operators:
            left = [left[i] for i in best(varied, recipe, [(candidate, operator) for candidate in left])]
        return left[len(left) // 2]

    def best_operator(recipe: Recipe, candidate: _Candidate) -> Operator:
        left = best("strength", recipe, [(candidate, operator) for operator in recipe.operators])
        return min((recipe.operators[i] for i in left), key=strength_of)

    every = list(dict.fromkeys(site for recipe in ways for site in recipe.target_sites))
    spread = capture(target, pair.general[:32], every, tokens="all", max_tokens=pair.map_tokens)
    natives: list[tuple[SteeringVector, SteeringVector | None]] = []
    for recipe in ways:
        sites = recipe.target_sites
        vectors_at, gates = (
            {
                site: vector.with_scale(spread[site].values.float().std(0))
                for site, vector in read(target, lessons, sites, label=label).items()
            }
            for read in (recipe.vectors, recipe.gates)
        )
        candidates = [
            _Candidate(
                vectors_at[site], gates.get(site), random_like(vectors_at[site], seed=pair.seed + _ASIDE), site.layer
            )
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
        scale, sites = moments.scale(rough.space.site), recipe.source_sites
        native = rough.with_scale(scale)
        theirs = recipe.vectors(pair.source, lessons, sites, label=label)
        gates = recipe.gates(pair.source, lessons, sites, label=label)
        gate = None if rough_gate is None else rough_gate.with_scale(scale)
        carried = [
            Carried.of(theirs[site], native, moments, fitter, None if gate is None else (gates[site], gate))
            for site in sites
        ]
        candidates = [_Candidate(c.mapped, c.mapped_gate, c.shuffled, c.source.space.site.layer) for c in carried]
        chosen = best_layer("source layer", recipe, candidates)
        choices.append(Choice(recipe, best_operator(recipe, chosen), carried[candidates.index(chosen)]))
    lap("choosing source layers and strengths")
    return Chosen(tuple(choices), tuple(records), general)


def strength_of(operator: Operator) -> float:
    """Return an operator's strength or overshoot."""
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

    What is sent through the map is every prompt of the two sides, and the difference is taken of the means of their images.

    Args:
        pair: The models.
        chosen: What validation chose.
        lessons: Where the vectors were found.
        text: What maps read, general text included.
        fitter: Fits the map on rows.
        only: Names of the recipes that get the arm.
        lap: Told when it is done.
    """
    asked = [choice for choice in chosen.choices if choice.recipe.name in only]
    if not asked:
        return chosen
    vectors = {}
    with pair.stored(text, [(c.carried.source.space.site, c.carried.native.space.site) for c in asked]) as store:
        for choice in asked:
            native, here = choice.carried.native, choice.carried.source.space.site
            assert native.scale is not None
            mapping = replace(fitter, device=str(device_of(pair.target))).fit(store.pair(here, native.space.site))
            sides = choice.recipe.rows(pair.source, lessons, [here])
            moved = mapping.transport(choice.carried.source, at=(sides[0][here], sides[1][here]))
            vectors[choice.recipe.name] = {ENDPOINTS: moved.with_scale(native.scale).at_norm_of(native)}
    lap("fitting nonlinear maps")
    choices = tuple(replace(choice, others=vectors.get(choice.recipe.name, {})) for choice in chosen.choices)
    return replace(chosen, choices=choices)

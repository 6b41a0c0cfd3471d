"""Vectors at several strengths, with their damage: what to look at before a transfer, or without one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.directions import random_like, require_random
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompts
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.behaviours.generated import GeneratedText
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.evaluation.scorers.text import Scorer
from xmodel_steer.files.wheels import general_text
from xmodel_steer.interventions.contexts import steps_of
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.models.facts import dtype_of, hardware_of, name_of
from xmodel_steer.recipe.arms import Arm
from xmodel_steer.recipe.matching import Run
from xmodel_steer.recipe.measuring import arms_of
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import versions

CAUTION = "Every strength was measured on the same prompts: one that is chosen here is to be reported on others."


def sweep(
    model: Any,
    vectors: SteeringVector | Sequence[SteeringVector] | Mapping[str, SteeringVector],
    strengths: Sequence[float],
    prompts: Prompts,
    scorer: Scorer,
    *,
    neutral: Prompts | None = None,
    positions: Positions = "all",
    max_new_tokens: int = 24,
    batch_size: int = 64,
    random_seeds: int = 3,
) -> Result:
    """Add vectors at several strengths; measure the effect next to the damage.

    The effect is that in generated text, the damage that on neutral text.

    Random vectors of the first vector's norm are measured at the same strengths. A strength that is read off this is chosen
    on these prompts: report it on others.

    Args:
        model: The model to steer.
        vectors: One vector, several (told apart by their labels), or a mapping of names to vectors.
        strengths: Strengths of `Add`, in units of each vector.
        prompts: Prompts to continue.
        scorer: What reads the effect in a text; see ``xs.scorers``.
        neutral: Text for KL and perplexity; by default 32 packaged documents.
        positions: Where in the text to steer; see `Intervention`.
        max_new_tokens: Length of the continuations.
        batch_size: Texts at a time.
        random_seeds: Number of random vectors.

    Returns:
        A result with the arms ``unsteered``, ``random`` and one for each vector. ``to_frame()`` gives a row for each strength,
        ``xs.plots.dose_response`` draws it.

    Raises:
        ValueError: There are no vectors or strengths, a strength is 0, or two vectors have one name.
        SpaceMismatchError: A vector is of another space.

    Example:
        >>> xs.plots.dose_response(xs.sweep(model, joy, [-2, -1, 1, 2], prompts, scorer))      # doctest: +SKIP
    """
    named = _named(vectors)
    if not strengths or 0 in strengths:
        raise ValueError(
            f"sweep: give strengths other than 0 (the unsteered model is measured anyway), got {list(strengths)}"
        )
    require_random("sweep", random_seeds)
    runs = _runs(named, strengths, positions, random_seeds)
    texts = as_prompts(general_text()[:32] if neutral is None else neutral)
    behaviour = GeneratedText(prompts, scorer, max_new_tokens, batch_size)
    outcomes = [replace(found, ids=behaviour.ids) for found in behaviour.measure(model, [run.setting for run in runs])]
    costs = side_effects(model, [run.setting for run in runs], texts)
    sets = {"evaluation": list(behaviour.ids), "neutral": [prompt.id for prompt in texts]}
    spec = {"strengths": [float(s) for s in strengths], "max_new_tokens": max_new_tokens}
    spec |= {"positions": positions if isinstance(positions, str) else "others"}
    return _result(model, named, arms_of(runs, outcomes, costs), spec, sets, random_seeds)


def _result(
    model: Any, named: Mapping[str, SteeringVector], arms: tuple[Arm, ...], spec: Mapping[str, Any],
    sets: Mapping[str, list[str]], seeds: int,
) -> Result:  # fmt: skip
    end = {"model": name_of(model), "dtype": str(dtype_of(model)).removeprefix("torch.")}
    return Result(
        name="sweep", unit="score", source=end, target=end, arms=arms, chosen={}, validation=(), spec=spec, splits=sets,
        seeds={"random": list(range(seeds))}, versions=versions(), stored=(CAUTION,), vectors=named, hardware=hardware_of(model),
    )  # fmt: skip


def _runs(
    named: Mapping[str, SteeringVector], strengths: Sequence[float], positions: Positions, seeds: int
) -> list[Run]:
    """List the unsteered run, and each vector's at each strength."""
    first = next(iter(named.values()))
    like = first if first.scale is not None else first.with_scale(first.direction.new_ones(first.space.width))
    arms = [*named.items(), *(("random", random_like(like, seed=seed)) for seed in range(seeds))]
    return [Run("unsteered", ())] + [
        Run(name, steps_of(vector, Add(strength), positions), "sweep", strength=float(strength))
        for name, vector in arms
        for strength in strengths
    ]


def _named(vectors: Any) -> dict[str, SteeringVector]:
    """Name the vectors.

    Raises:
        ValueError: There are none, or a name is another's or a control's.
    """
    if isinstance(vectors, SteeringVector):
        vectors = [vectors]
    pairs = list(vectors.items()) if isinstance(vectors, Mapping) else [(v.label or "vector", v) for v in vectors]
    require_type("sweep: vectors", SteeringVector, *(vector for _, vector in pairs))
    names = [name for name, _ in pairs]
    if not names or len(set(names) - {"unsteered", "random"}) < len(names):
        raise ValueError(f"sweep: give vectors of different names, none of them unsteered or random, got {names}")
    return dict(pairs)

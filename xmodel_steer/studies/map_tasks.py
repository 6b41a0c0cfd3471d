"""Tasks for the comparison of maps: one concept's steering, and replacement."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.evaluation.damage import SideEffect, side_effects
from xmodel_steer.evaluation.replacing import replacement_check
from xmodel_steer.interventions.mirror import mapped_source, mean_of, noise_like
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.statistics import bootstrap_mean
from xmodel_steer.recipe.arms import EQUAL_KL, Arm, joined_arm
from xmodel_steer.recipe.matching import match_damage
from xmodel_steer.recipe.measuring import measure
from xmodel_steer.recipe.preparing import Prepared
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies.concept_table import both_directions

UNIT = "steering: half of what lies between both directions; replacement and capability: shares of prompts"
STEERING, REPLACED, CAPABILITY = "steering", "replacement", "capability under replacement"


def moved_of(
    mapping: Map, vector: SteeringVector, ends: tuple[Activations, Activations], native: SteeringVector
) -> SteeringVector:
    """Carry a vector by a map, by endpoints if the map is not affine.

    The result gets the native vector's scale.
    """
    moved = mapping.transport(vector, at=ends) if isinstance(mapping, AutoencoderMap) else mapping.transport(vector)
    assert native.scale is not None
    return moved.with_scale(native.scale)


def fit_of(mapping: Map) -> dict[str, Any]:
    """Record a map's quality of fit."""
    score = mapping.score_test
    return {
        "map_r2": score.mean_r2 if score else None,
        "map_cosine": score.cosine if score else None,
        "loss": dict(mapping.info.get("loss", {})),
        "epochs": mapping.info.get("epochs"),
    }


def steered_arms(
    prepared: Prepared, groups: Mapping[str, Sequence[SteeringVector]], recipe: str = STEERING
) -> list[Arm]:
    """Measure every arm at the native vector's KL at strength 1, both directions joined.

    Args:
        prepared: The models, the prompts and the neutral text.
        groups: The vectors of every arm, ``native`` first.
        recipe: Name of the recipe.
    """
    runs, _ = match_damage(prepared, groups, 1.0, recipe)
    measured = measure(prepared, [run for run in runs if run.at == EQUAL_KL or not run.setting], {})
    result = Result(recipe, "", {}, {}, measured, {}, (), {}, {}, {}, {})
    base = result.arm("unsteered")
    no_change = bootstrap_mean(np.zeros(base.effect.n))
    unsteered = Arm("unsteered", no_change, 0.0, base.perplexity, recipe=recipe, at=EQUAL_KL)
    return [unsteered, *both_directions(result, recipe, list(groups))]


def replaced(
    prepared: Prepared, maps: Mapping[str, Map], reference: SplitMoments, prompts: int, max_new_tokens: int,
    questions: MultipleChoice,
) -> list[Arm]:  # fmt: skip
    """Measure the target under mapped activations: texts, damage on neutral text, right answers.

    Args:
        prepared: The models, the prompts and the neutral text.
        maps: The maps by their names.
        reference: Moments of the site that is written to.
        prompts: Number of evaluation prompts to continue.
        max_new_tokens: Length of the continuations.
        questions: Multiple-choice questions.
    """
    source, target, seed = prepared.source, prepared.target, prepared.seed
    steps: dict[str, list[Step]] = {"unsteered": []}
    steps |= {name: [mapped_source(source, target, mapping)] for name, mapping in maps.items()}
    mean, scale = reference.train.target_mean, reference.train.target_scale
    steps["mean ablation"] = [mean_of(reference.target, mean)]
    steps["noise"] = [noise_like(reference.target, mean, scale, seed=seed)]
    tokens = prepared.budget.neutral_tokens
    costs = side_effects(target, list(steps.values()), prepared.text.reported, max_tokens=tokens, batch_size=16)
    damage = dict(zip(steps, costs, strict=True))
    evaluated = prepared.evaluation.prompts[:prompts]
    arms = _continued(source, target, maps, evaluated, reference, max_new_tokens, damage, seed)
    answers = questions.measure(target, list(steps.values()))
    base = answers[0].scores
    return arms + [
        joined_arm(name, [math.nan], [right.scores], base, kl=[cost.mean_kl], perplexity=[cost.perplexity],
                   agreement=[cost.agreement], recipe=CAPABILITY)
        for (name, cost), right in zip(damage.items(), answers, strict=True)
    ]  # fmt: skip


def _continued(
    source: Any, target: Any, maps: Mapping[str, Map], asked: Sequence[Prompt], reference: SplitMoments, max_new_tokens: int,
    damage: Mapping[str, SideEffect], seed: int,
) -> list[Arm]:  # fmt: skip
    """Run every map's replacement check; the maps share the arms of mean and noise."""
    arms = []
    for name, mapping in maps.items():
        check = replacement_check(
            source, target, mapping, asked, reference, max_new_tokens=max_new_tokens, random_seeds=1, seed=seed,
        )  # fmt: skip
        named_arms = {name: check.arms["mapped"]}
        if not arms:
            named_arms |= {"mean ablation": check.arms["mean"], "noise": check.arms["random"]}
        for label, arm in named_arms.items():
            measures = {"ROUGE-L": arm.rouge, "similarity": arm.similarity, "KL from its own text": arm.kl}
            cost = damage[label]
            arms.append(
                Arm(
                    label,
                    arm.closer,
                    cost.mean_kl,
                    cost.perplexity,
                    recipe=REPLACED,
                    measures=measures,
                    texts=tuple(arm.texts[:6]),
                )
            )
    return arms

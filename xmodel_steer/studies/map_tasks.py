"""Tasks that maps are compared by: one concept's steering, and replacement."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.damage import SideEffect
from xmodel_steer.evaluation.replacing import replacement_check
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.statistics import bootstrap_mean
from xmodel_steer.recipe.arms import EQUAL_KL, Arm
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
    """Carry a vector by a map, by endpoints where it is not affine.

    It gets the native one's scale.
    """
    moved = mapping.transport(vector, at=ends) if isinstance(mapping, AutoencoderMap) else mapping.transport(vector)
    assert native.scale is not None
    return moved.with_scale(native.scale)


def fit_of(mapping: Map) -> dict[str, Any]:
    """Record how well a map was fitted."""
    score = mapping.score_test
    return {
        "map_r2": score.mean_r2 if score else None,
        "map_cosine": score.cosine if score else None,
        "loss": dict(mapping.info.get("loss", {})),
        "epochs": mapping.info.get("epochs"),
    }


def steered_arms(prepared: Prepared, groups: Mapping[str, Sequence[SteeringVector]]) -> list[Arm]:
    """Measure every arm at equal KL, both directions joined.

    The KL is that of the native vector at strength 1.

    Args:
        prepared: The models, the prompts and the neutral text.
        groups: The vectors of every arm, ``native`` first.
    """
    runs, _ = match_damage(prepared, groups, 1.0)
    measured = measure(prepared, runs, {})
    result = Result(STEERING, "", {}, {}, measured, {}, (), {}, {}, {}, {})
    base = result.arm("unsteered")
    still = bootstrap_mean(np.zeros(base.effect.n))
    unsteered = Arm("unsteered", still, 0.0, base.perplexity, recipe=STEERING, at=EQUAL_KL)
    return [unsteered, *both_directions(result, list(groups))]


def replaced_arms(
    source: Any, target: Any, maps: Mapping[str, Map], asked: Sequence[Prompt], reference: SplitMoments, max_new_tokens: int,
    damage: Mapping[str, SideEffect], seed: int,
) -> list[Arm]:  # fmt: skip
    """Run the replacement check of every map; mean and noise are shared."""
    arms = []
    for name, mapping in maps.items():
        check = replacement_check(
            source, target, mapping, asked, reference, max_new_tokens=max_new_tokens, random_seeds=1, seed=seed,
        )  # fmt: skip
        checked = {name: check.arms["mapped"]}
        if not arms:
            checked |= {"mean ablation": check.arms["mean"], "noise": check.arms["random"]}
        for label, arm in checked.items():
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

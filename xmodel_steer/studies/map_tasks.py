"""What one concept's maps do to a model, steered and replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.behaviours.generated import GeneratedText
from xmodel_steer.evaluation.calibration import LEAST, calibrate
from xmodel_steer.evaluation.damage import SideEffect, side_effects
from xmodel_steer.evaluation.replacing import replacement_check
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.steps import Intervention, Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.autoencoders import AutoencoderMap
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.statistics import bootstrap_mean, transfer_efficiency
from xmodel_steer.studies.concepts import Concept
from xmodel_steer.studies.study import EFFICIENCY, EQUAL_KL, EQUAL_STRENGTH, StudyArm

UNIT = "steering: half of what lies between both directions; replacement and capability: shares of prompts"
STEERING, REPLACED, CAPABILITY = "steering", "replacement", "capability under replacement"
_Sides = tuple[dict[Site, Activations], dict[Site, Activations]]


@dataclass(frozen=True)
class Task:
    """A concept, and the model that is to show it."""

    target: Any
    concept: Concept
    max_new_tokens: int

    def sides(self, model: Any, sites: Sequence[Site]) -> _Sides:
        """Rows of the contrast with the concept, and of that without."""
        contrast, tokens = self.concept.contrast, self.concept.tokens
        return tuple(
            capture(model, side, sites, tokens=tokens, batch_size=32) for side in (contrast.positive, contrast.negative)
        )  # type: ignore[return-value]

    def gains(
        self, asked: Sequence[Prompt], both: Sequence[Sequence[Sequence[Step]]]
    ) -> tuple[list[np.ndarray], list[list[tuple[str, ...]]]]:
        """Half of what lies between two settings, for each pair of them, and their texts."""
        assert self.concept.scorer is not None
        behaviour = GeneratedText(tuple(asked), self.concept.scorer, self.max_new_tokens, unit=self.concept.unit)
        found = behaviour.measure(self.target, [setting for pair in both for setting in pair])
        pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
        return [(up.scores - down.scores) / 2 for up, down in pairs], [[m.texts for m in pair] for pair in pairs]


def vectors_of(sides: _Sides, label: str) -> dict[Site, SteeringVector]:
    """Return the difference of means of two classes at every site."""
    return {site: difference_of_means(sides[0][site], sides[1][site], label=label) for site in sides[0]}


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
    """How well a map was fitted."""
    score = mapping.score_test
    return {
        "map_r2": score.mean_r2 if score else None,
        "map_cosine": score.cosine if score else None,
        "loss": dict(mapping.info.get("loss", {})),
        "epochs": mapping.info.get("epochs"),
    }


def steered_arms(
    task: Task, groups: Mapping[str, Sequence[SteeringVector]], native: SteeringVector, asked: Sequence[Prompt],
    calibration: Sequence[Prompt], held: Sequence[Prompt], neutral_tokens: int,
) -> list[StudyArm]:  # fmt: skip
    """Every arm at the KL of the native vector at strength 1, in both directions."""
    target = task.target

    def damage(settings: Sequence[Sequence[Step]], texts: Sequence[Prompt]) -> list[SideEffect]:
        return side_effects(target, settings, texts, max_tokens=neutral_tokens, batch_size=16)

    budgets = [max(effect.mean_kl, LEAST) for effect in damage(both_directions(native), calibration)]
    flat = [(name, vector) for name, group in groups.items() for vector in group]
    found = calibrate(
        target,
        [vector for _, vector in flat for _ in budgets],
        budgets * len(flat),
        calibration,
        signs=[1, -1] * len(flat),
        max_tokens=neutral_tokens,
    )
    doses = [found[i : i + 2] for i in range(0, len(found), 2)]
    both = [
        both_directions(vector, up.strength, down.strength) for (_, vector), (up, down) in zip(flat, doses, strict=True)
    ]
    scores, texts = task.gains(asked, both)
    effects = damage([[], *(setting for pair in both for setting in pair)], held)
    base = scores[[name for name, _ in flat].index("native")]
    still = bootstrap_mean(np.zeros(len(asked)))
    arms = [StudyArm("unsteered", STEERING, "", EQUAL_KL, still, {}, 0.0, effects[0].perplexity)]
    for name in groups:
        mine = [i for i, (other, _) in enumerate(flat) if other == name]
        table = np.stack([scores[i] for i in mine], 1)
        cost = [effect for i in mine for effect in effects[1 + 2 * i : 3 + 2 * i]]
        arms.append(
            StudyArm(
                arm=name,
                recipe=STEERING,
                operator="Add({:.2f} and {:.2f})".format(*np.mean([[d.strength for d in doses[i]] for i in mine], 0)),
                at=EQUAL_KL,
                effect=bootstrap_mean(table),
                beside={EFFICIENCY: transfer_efficiency(table, base)},
                kl=float(np.mean([effect.mean_kl for effect in cost])),
                perplexity=float(np.exp(np.mean(np.log([effect.perplexity for effect in cost])))),
                reached=all(dose.reached for i in mine for dose in doses[i]),
                seeds=len(mine),
                texts=tuple(text for own in texts[mine[0]] for text in own[:3]),
            )
        )
    return arms


def both_directions(vector: SteeringVector, up: float = 1.0, down: float = -1.0) -> list[list[Step]]:
    """Return a setting that steers towards the class, and one that steers away."""
    return [[Intervention(vector, Add(up))], [Intervention(vector, Add(down))]]


def replaced_arms(
    source: Any, target: Any, maps: Mapping[str, Map], asked: Sequence[Prompt], reference: SplitMoments, max_new_tokens: int,
    damage: Mapping[str, SideEffect], seed: int,
) -> list[StudyArm]:  # fmt: skip
    """Run the replacement check of every map; mean and noise are shared."""
    arms = []
    for name, mapping in maps.items():
        found = replacement_check(
            source, target, mapping, asked, reference, max_new_tokens=max_new_tokens, random_seeds=1, seed=seed,
        )  # fmt: skip
        own = {name: found.arms["mapped"]}
        if not arms:
            own |= {"mean ablation": found.arms["mean"], "noise": found.arms["random"]}
        for label, arm in own.items():
            beside = {"ROUGE-L": arm.rouge, "similarity": arm.similarity, "KL from its own text": arm.kl}
            cost = damage[label]
            arms.append(
                StudyArm(
                    label,
                    REPLACED,
                    "",
                    EQUAL_STRENGTH,
                    arm.closer,
                    beside,
                    cost.mean_kl,
                    cost.perplexity,
                    texts=arm.texts[:6],
                )
            )
    return arms

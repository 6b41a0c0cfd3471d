"""Concepts carried from each of several models into every larger one."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xmodel_steer.core.errors import PromptError
from xmodel_steer.models.facts import hardware_of, is_bridge, name_of
from xmodel_steer.recipe.arms import CONTROLS, EFFICIENCY, EQUAL_KL
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies.concept_table import concept_transfer
from xmodel_steer.studies.settings import end_of

QUESTION = "How does the share of the effect that is carried over change with the size of the source and of the target?"
CARRIED = ("sentiment", "tense")


def small_to_larger(models: Sequence[Any], names: Sequence[str] = CARRIED, **more: Any) -> Result:
    """Carry concepts from every model into each larger one, each pair by `concept_transfer`.

    Args:
        models: At least two models.
        names: Concepts, some of `CONCEPTS`.
        more: The other arguments of `concept_transfer`.

    Raises:
        PromptError: There are fewer than two models, or two have the same name.
    """
    labels = [name_of(model) for model in models]
    if len(models) < 2 or len(set(labels)) < len(labels):
        raise PromptError(f"small_to_larger: needs at least two different models, got {', '.join(labels) or 'none'}")
    models = sorted(models, key=parameters)
    ends = [end_of(model) | {"parameters": parameters(model)} for model in models]
    studies = {
        f"{name_of(source)} → {name_of(target)}": concept_transfer(source, target, names, **more)
        for source, target in itertools.combinations(models, 2)
    }
    first = next(iter(studies.values()))
    arms = [
        replace(arm, recipe=f"{pair}: {name}")
        for pair, study in studies.items()
        for name in study.chosen
        for arm in study.arms
        if arm.recipe in (name, "")  # the unsteered arm belongs to all recipes
    ]

    def by_pair(records: str) -> dict[str, Any]:
        return {
            f"{pair}: {name}": item for pair, study in studies.items() for name, item in getattr(study, records).items()
        }

    return replace(
        first,
        name="small-to-larger",
        question=QUESTION,
        stored=tuple(_line(pair, study, name) for pair, study in studies.items() for name in study.chosen),
        source=ends[0],
        target=ends[-1],
        arms=tuple(arms),
        chosen=by_pair("chosen"),
        validation=tuple(
            {**record, "recipe": f"{pair}: {record['recipe']}"}
            for pair, study in studies.items()
            for record in study.validation
        ),
        prompts=(),  # the targets' texts differ
        spec={pair: study.spec for pair, study in studies.items()} | {"models": ends},
        splits={pair: study.splits for pair, study in studies.items()},
        hardware=hardware_of(models[-1]),
        seconds={pair: sum(study.seconds.values()) for pair, study in studies.items()},
        vectors=by_pair("vectors"),
        maps=by_pair("maps"),
    )


def parameters(model: Any) -> int:
    """Count a model's weights; an embedding that is also the output layer counts once."""
    if is_bridge(model):
        # An empty model of the same class is counted: a bridge holds a fused projection twice, whole and in parts.
        import torch

        inner = model.original_model
        with torch.device("meta"):
            model = type(inner)(inner.config)
    return sum(parameter.numel() for parameter in model.parameters())


def _line(pair: str, study: Result, name: str) -> str:
    native, mapped = (study.arm(arm, recipe=name, at=EQUAL_KL) for arm in ("native", "mapped"))
    share = mapped.measures[EFFICIENCY]
    efficiency = f"efficiency {share:.2f}" if math.isnan(share.value) else f"mapped {share:.2f} of it"
    shares = (
        (control, study.arm(control, recipe=name, at=EQUAL_KL).measures[EFFICIENCY].value) for control in CONTROLS
    )
    controls = ", ".join(f"{control} {value:.2f}" for control, value in shares if not math.isnan(value))
    return f"{pair}, {name}: native effect {native.effect:.2f}, {efficiency}{f' ({controls})' if controls else ''}, n = {native.effect.n}"

"""One concept carried along a row of models, from each into every larger one."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xmodel_steer.core.errors import PromptError
from xmodel_steer.models.facts import hardware_of, is_bridge, name_of
from xmodel_steer.recipe.arms import CONTROLS
from xmodel_steer.studies.concept_table import concept_transfer
from xmodel_steer.studies.study import EFFICIENCY, EQUAL_KL, Study, end_of

QUESTION = "How does the share of the effect that is carried over change with the size of the source and of the target?"
CARRIED = ("sentiment", "tense")


def small_to_larger(models: Sequence[Any], names: Sequence[str] = CARRIED, **settings: Any) -> Study:
    """Carry concepts from every model into each larger one, each pair by `concept_transfer`.

    Args:
        models: At least two.
        names: Which concepts, of `CONCEPTS`.
        settings: As for `concept_transfer`.

    Raises:
        PromptError: There are fewer than two models, or two of one name.
    """
    called = [name_of(model) for model in models]
    if len(models) < 2 or len(set(called)) < len(called):
        raise PromptError(f"small_to_larger: needs at least two different models, got {', '.join(called) or 'none'}")
    models = sorted(models, key=parameters)
    ends = [end_of(model) | {"parameters": parameters(model)} for model in models]
    found = {
        f"{name_of(source)} → {name_of(target)}": concept_transfer(source, target, names, **settings)
        for source, target in itertools.combinations(models, 2)
    }
    first = next(iter(found.values()))
    arms = [
        replace(arm, recipe=f"{pair}: {name}")
        for pair, study in found.items()
        for name in study.chosen
        for arm in study.arms
        if arm.recipe in (name, "")  # the unsteered one is of all of them
    ]
    return replace(
        first,
        name="small-to-larger",
        question=QUESTION,
        verdict="; ".join(_line(pair, study, name) for pair, study in found.items() for name in study.chosen),
        source=ends[0],
        target=ends[-1],
        arms=tuple(arms),
        chosen={f"{pair}: {name}": own for pair, study in found.items() for name, own in study.chosen.items()},
        prompts=(),  # each target has texts of its own
        spec={pair: study.spec for pair, study in found.items()} | {"models": ends},
        splits={pair: study.splits for pair, study in found.items()},
        hardware=hardware_of(models[-1]),
        seconds={pair: sum(study.seconds.values()) for pair, study in found.items()},
    )


def parameters(model: Any) -> int:
    """How many weights a model has; an embedding that is also the output layer counts once."""
    if is_bridge(model):
        # An empty one of its kind is counted: a bridge holds the parts of a fused projection beside the whole.
        import torch

        inner = model.original_model
        with torch.device("meta"):
            model = type(inner)(inner.config)
    return sum(parameter.numel() for parameter in model.parameters())


def _line(pair: str, study: Study, name: str) -> str:
    native, mapped = study.arm("native", name, at=EQUAL_KL), study.arm("mapped", name, at=EQUAL_KL)
    share = mapped.beside[EFFICIENCY]
    much = f"efficiency {share:.2f}" if math.isnan(share.value) else f"mapped {share:.2f} of it"
    beside = ((control, study.arm(control, name, at=EQUAL_KL).beside[EFFICIENCY].value) for control in CONTROLS)
    controls = ", ".join(f"{control} {value:.2f}" for control, value in beside if not math.isnan(value))
    return f"{pair}, {name}: native effect {native.effect:.2f}, {much}{f' ({controls})' if controls else ''}, n = {native.effect.n}"

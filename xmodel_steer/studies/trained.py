"""Vectors and a map trained through the target, compared with what a linear map carries."""

from collections.abc import Sequence
from typing import Any

from xmodel_steer.core.directions import random_like
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.maps.affine import AffineMap, Map
from xmodel_steer.maps.statistics import number
from xmodel_steer.models.facts import hardware_of
from xmodel_steer.recipe.arms import EFFICIENCY, Arm
from xmodel_steer.recipe.preparing import Prepared, prepare
from xmodel_steer.recipe.records import sites_record
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.selecting import Selected, select
from xmodel_steer.recipe.settings import Budget, GeneralText, Method, versions
from xmodel_steer.studies.carried import MAP_TOKENS
from xmodel_steer.studies.concept_table import SETTINGS, prompts_of
from xmodel_steer.studies.concepts import Concept, concept
from xmodel_steer.studies.distilling import Training, distilled, functional_map
from xmodel_steer.studies.map_tasks import CAPABILITY, REPLACED, UNIT, replaced, steered_arms
from xmodel_steer.studies.settings import Clock, Settings, end_of

QUESTION = (
    "Does training a carried vector, or a map, through the target on neutral text add to what a linear map carries?"
)
NOTE = (
    "Steering: every arm at the KL of the native vector at strength 1, in each direction; distilled vectors begin at the mapped one. "
    "Controls of the training: the shifts of a random source vector, and the shifts of other positions. Replacement: the site holds "
    "mapped activations of the source; the effect is the share of texts more like the target's own than the source's own."
)
FALLING_SHORT = ("french", "questions")
DISTILLED, RANDOM, SHUFFLED = "distilled", "distilled, random source vector", "distilled, shuffled shifts"
FUNCTIONAL = "ridge, trained through the target"


def distillation(
    source: Any,
    target: Any,
    names: Sequence[str] = FALLING_SHORT,
    *,
    training: Training = Training(),
    counts: tuple[int, int] = (300, 60),
    capability: MultipleChoice | None = None,
    max_new_tokens: int = 16,
    settings: Settings = SETTINGS,
) -> Result:
    """Compare vectors and a map trained through the target with untrained ones.

    Sites are chosen as in `transfer`. Training reads general text of the map; neutral text and prompts are never trained on.

    Args:
        source: The source model.
        target: The target model.
        names: Concepts with texts, some of `CONCEPTS`; by default those of which a linear map carries least.
        training: Settings of the training.
        counts: Numbers of evaluation prompts, and of those that the replacement check continues.
        capability: Multiple-choice questions; the packaged ones by default.
        max_new_tokens: Length of the continuations.
        settings: Text, sizes and seeds.

    Raises:
        PromptError: No concept is given, or one has no texts to score.
    """
    concepts = [concept(name) for name in names]
    if not concepts or any(carried.scorer is None for carried in concepts):
        raise PromptError(f"distillation: give concepts that are scored in texts, got {', '.join(names) or 'none'}")
    clock, arms, chosen, vectors = Clock(), list[Arm](), dict[str, dict[str, Any]](), dict[str, SteeringVector]()
    runs: list[tuple[Prepared, Selected]] = []
    for carried in concepts:
        runs.append(_chosen(source, target, carried, counts[0], max_new_tokens, settings))
        groups, chosen[carried.name] = _groups(*runs[-1], training)
        arms += steered_arms(runs[-1][0], groups, carried.name)
        vectors |= {f"{carried.name}: {name}": group[0] for name, group in groups.items() if name != "random"}
        clock.lap(carried.name)

    questions = capability or MultipleChoice.packaged()
    maps, replacing = _replacing(*runs[0], training, counts[1], max_new_tokens, questions)
    clock.lap("replacing")
    arms += replacing
    return Result(
        name="distillation", question=QUESTION, unit=UNIT, note=NOTE, stored=_verdict(arms, list(names)),
        source=end_of(source), target=end_of(target), arms=tuple(arms), chosen=chosen,
        validation=tuple(record for _, choice in runs for record in choice.records),
        spec=settings.record() | {"training": vars(training), "max_new_tokens": max_new_tokens},
        splits={run.label: run.splits for run, _ in runs},
        seeds=settings.seeds(), versions=versions(), hardware=hardware_of(target), seconds=clock.seconds,
        vectors=vectors, maps=maps,
    )  # fmt: skip


def _chosen(
    source: Any, target: Any, carried: Concept, prompts: int, max_new_tokens: int, settings: Settings
) -> tuple[Prepared, Selected]:
    """Prepare a concept and choose its sites, as a transfer does."""
    general, neutral = settings.texts()
    asked = carried.behaviour(*prompts_of(prompts), max_new_tokens=max_new_tokens, batch_size=settings.batch_size)
    prepared = prepare(
        source, target, carried.contrast, GeneralText(general, neutral), label=carried.name, method=Method(carried.tokens),
        behaviour=asked, seed=settings.seed, cached=True,
        budget=Budget((-1.0, 1.0), False, settings.random_seeds, MAP_TOKENS, settings.neutral_tokens),
    )  # fmt: skip
    return prepared, select(prepared)


def _groups(
    prepared: Prepared, selected: Selected, training: Training
) -> tuple[dict[str, list[SteeringVector]], dict[str, Any]]:
    """Distil the mapped vector, and for both controls; list every arm's vectors."""
    site = selected.layer or selected.source.space.site  # a stack's vectors together would shift the source too far
    shifting = prepared.sources[site].with_scale(prepared.moments.scale(site, end="source"))
    own = selected.arms(prepared.budget.random_seeds, prepared.seed)
    noise = random_like(shifting, seed=prepared.seed)

    def train(vector: SteeringVector, shuffled: bool = False) -> list[SteeringVector]:
        read = prepared.text.map[: training.documents]
        return [
            distilled(prepared.source, prepared.target, vector, own["mapped"][0], read, training, shuffled=shuffled)
        ]

    made = {DISTILLED: train(shifting), RANDOM: train(noise), SHUFFLED: train(shifting, True)}
    groups = {"native": own["native"], "mapped": own["mapped"], **made, "random": own["random"]}
    cosines = {name: selected.native.cosine(groups[name][0]) for name in ("mapped", *made)}
    sites = sites_record(selected.source.space.site, selected.native.space.site)
    return groups, {**sites, "shifted_by": str(site), "cosines": cosines}


def _replacing(
    prepared: Prepared, selected: Selected, training: Training, prompts: int, max_new_tokens: int, questions: MultipleChoice
) -> tuple[dict[str, Map], list[Arm]]:  # fmt: skip
    """Train the chosen map through the target, and put both to the replacement tests."""
    assert isinstance(selected.mapping, AffineMap)
    read = prepared.text.map[: training.documents]
    made = functional_map(prepared.source, prepared.target, selected.mapping, read, training)
    maps: dict[str, Map] = {"ridge": selected.mapping, FUNCTIONAL: made}
    reference = selected.moments.pair(selected.source.space.site, selected.native.space.site)
    return maps, replaced(prepared, maps, reference, prompts, max_new_tokens, questions)


def _verdict(arms: Sequence[Arm], names: Sequence[str]) -> tuple[str, ...]:
    """Say in lines what each training did."""
    table = {(arm.arm, arm.recipe): arm for arm in arms}
    lines = []
    for name in names:
        trained, mapped = (table[arm, name].measures[EFFICIENCY] for arm in (DISTILLED, "mapped"))
        controls = ", ".join(
            f"{arm} {number(table[arm, name].measures[EFFICIENCY].value, '.2f')}"
            for arm in (RANDOM, SHUFFLED, "random")
        )
        lines.append(f"{name}: distilled {trained:.2f} of native, mapped {mapped:.2f} ({controls}), n = {trained.n}")
    kl, right = (
        [number(figure, ".2f") for figure in figures]
        for figures in (
            [table[arm, REPLACED].measures["KL from its own text"].value for arm in ("ridge", FUNCTIONAL)],
            [table[arm, CAPABILITY].effect.value for arm in ("ridge", FUNCTIONAL, "unsteered")],
        )
    )
    lines.append(
        f"replacement by {FUNCTIONAL}: KL {kl[1]} nats per token (ridge {kl[0]}), right answers {right[1]} (ridge {right[0]}, "
        f"unsteered {right[2]})"
    )
    return tuple(lines)

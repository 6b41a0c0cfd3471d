"""Many concepts carried from one model into another by one recipe, in one table."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.directions import Direction, difference_of_means, logistic_probe
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import require_disjoint
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.significance import holm
from xmodel_steer.maps.statistics import NO_NATIVE, bootstrap_mean, transfer_efficiency
from xmodel_steer.models.facts import context_length, hardware_of
from xmodel_steer.recipe.arms import ARMS, EFFICIENCY, EQUAL_KL, LEVEL, Arm
from xmodel_steer.recipe.carrying import transfer
from xmodel_steer.recipe.preparing import default_sites
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import Budget, GeneralText, Method, versions
from xmodel_steer.studies.carried import MAP_TOKENS
from xmodel_steer.studies.concepts import CONCEPTS, concept, openings
from xmodel_steer.studies.settings import Clock, Settings, end_of

QUESTION = "How much of a concept's effect in the target does a vector that was found in the source have?"
FEATURE_QUESTION = (
    "Does the direction of a linear probe in the source do in the target what that of the target's own probe does?"
)
FEATURES = ("sentiment", "tense", "formality", "numbers")
UNIT = "half of what lies between steering in both directions at equal KL, in the concept's own unit"
NOTE = (
    "Every arm disturbs neutral text by the KL of the native vector at strength 1, in each direction. Efficiency: the arm's effect over "
    "the native one's; undefined where the native vector does nothing. KL and perplexity: mean of both directions."
)
SHOWN = 3  # texts of each direction
SETTINGS = Settings(documents=(500, 30), neutral_tokens=24, batch_size=192)


def concept_transfer(
    source: Any,
    target: Any,
    names: Sequence[str] = CONCEPTS,
    *,
    source_sites: Sequence[Site] | None = None,
    target_sites: Sequence[Site] | None = None,
    prompts: Sequence[Prompt] | None = None,
    max_new_tokens: int = 20,
    directions: Mapping[str, Direction] = {"": difference_of_means},
    settings: Settings = SETTINGS,
) -> Result:
    """Carry one concept after another from the source into the target, each by `transfer`.

    All concepts share the map's general text, the neutral text and (except concepts of two answers) the prompts.

    Args:
        source: The source model.
        target: The target model.
        names: Concepts, some of `CONCEPTS`.
        source_sites: Candidate sites of the source; by default the candidates of `transfer`.
        target_sites: Candidate sites of the target; by default the candidates of `transfer`.
        prompts: Texts to continue; a third validates. Packaged beginnings of sentences by default.
        max_new_tokens: Length of the continuations.
        directions: Methods to find a concept's vector, by their names; every concept is carried once with each method.
        settings: Text, sizes and seeds.

    Raises:
        PromptError: No concepts are given, a name is unknown, or sets share a text.
        DownloadError: A concept's pairs cannot be fetched.
    """
    concepts = [concept(name) for name in names]
    if not concepts:
        raise PromptError(f"concept_transfer: give at least one of {', '.join(CONCEPTS)}")
    clock, (general, neutral) = Clock(), settings.texts()
    prompts = openings(108) if prompts is None else prompts
    sources, targets = (
        tuple(sites or default_sites(model, end))
        for sites, model, end in ((source_sites, source, "source"), (target_sites, target, "target"))
    )
    limit = min(MAP_TOKENS, context_length(source), context_length(target))

    def moments_of(text: Sequence[Prompt]) -> Moments:
        return cached_moments(
            source, target, text, source_sites=sources, target_sites=targets, max_tokens=limit, seed=settings.seed
        )

    for carried in concepts:  # `transfer` checks all other sets; it gets moments instead of the map's text
        text = carried.map_text(general, seed=settings.seed) if carried.text else general
        sets = {"map text": text, "neutral text": neutral}
        sets |= {"contrast": carried.contrast.positive + carried.contrast.negative}
        sets |= {"prompts": tuple(prompts) if carried.scorer else ()}
        require_disjoint("concepts", {name: [p.content_key() for p in texts] for name, texts in sets.items()})
    shared = moments_of(general)
    clock.lap("collecting moments")

    results: dict[str, Result] = {}
    mixed: dict[str, dict[str, list[str]]] = {}  # ids of a concept's text within the general text
    for carried, (method, direction) in itertools.product(concepts, directions.items()):
        label = f"{carried.name}, {method}" if method else carried.name
        moments = moments_of(carried.map_text(general, seed=settings.seed)) if carried.text else shared
        results[label] = transfer(
            source,
            target,
            carried.contrast,
            GeneralText((), neutral, moments),
            behaviour=carried.behaviour(prompts, max_new_tokens=max_new_tokens, batch_size=settings.batch_size),
            label=label,
            source_sites=sources,
            target_sites=targets,
            method=Method(carried.tokens, direction, settings.fitter),
            budget=Budget(
                (-1.0, 1.0), fixed=False, random_seeds=settings.random_seeds, neutral_tokens=settings.neutral_tokens
            ),
            side={},  # every arm costs the same KL; measuring capability too would take half the time again
            seed=settings.seed,
        )
        mixed[label] = {"map_text": [prompt.id for prompt in carried.text]} if carried.text else {}
        clock.lap(label)

    first = next(iter(results.values()))
    # Concepts with texts share their prompts.
    with_texts = next((result for result in results.values() if result.arm("unsteered").texts), first)
    vector_names = ("source", "native", "mapped", "shuffled")
    return Result(
        name="concepts",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        stored=conclusions(results),
        source=end_of(source),
        target=end_of(target),
        arms=(_unsteered(with_texts), *(arm for result in results.values() for arm in both_directions(result))),
        chosen={name: _chosen(result) for name, result in results.items()},
        validation=tuple(record for result in results.values() for record in result.validation),
        prompts=_prompts(with_texts),
        spec=settings.record()
        | {"strengths": [-1.0, 1.0], "max_new_tokens": max_new_tokens, "source_sites": list(map(str, sources))}
        | {"target_sites": list(map(str, targets)), "map_documents": len(general), "map_tokens": limit},
        splits={"general": [prompt.id for prompt in general]}
        | {name: {**result.splits, **mixed[name]} for name, result in results.items()},
        seeds=dict(first.seeds),
        versions=versions(),
        hardware=hardware_of(target),
        seconds=clock.seconds,
        vectors={f"{name}: {arm}": result.vectors[arm] for name, result in results.items() for arm in vector_names},
        maps={name: mapping for result in results.values() for name, mapping in result.maps.items()},
    )


def feature_transfer(source: Any, target: Any, names: Sequence[str] = FEATURES, **more: Any) -> Result:
    """Carry a single feature, a linear probe's direction, and the difference of means.

    Args:
        source: The source model.
        target: The target model.
        names: Concepts, some of `CONCEPTS`.
        more: The other arguments of `concept_transfer`.

    Raises:
        PromptError: No concepts are given, or a name is unknown.
    """
    directions = {"logistic probe": logistic_probe, "difference of means": difference_of_means}
    study = concept_transfer(source, target, names, directions=directions, **more)
    return replace(study, name="feature-transfer", question=FEATURE_QUESTION)


def _prompts(result: Result) -> tuple[str, ...]:
    """List the prompts of the arms' texts, with the direction of steering."""
    if not result.arm("unsteered").texts:
        return ()
    return tuple(f"{sign} {text}" for sign in result.signs for text in result.prompts[:SHOWN])


def _unsteered(result: Result) -> Arm:
    """Return the unsteered arm; other arms' effects are changes from it."""
    base = result.arm("unsteered")
    no_change = bootstrap_mean(np.zeros(base.effect.n))
    texts = base.texts[:SHOWN] * len(result.signs)
    return Arm("unsteered", no_change, 0.0, base.perplexity, change=no_change, texts=texts)


def both_directions(result: Result, names: Sequence[str] = ARMS[1:]) -> list[Arm]:
    """Join each arm's two directions at equal KL; the effect is half their difference.

    Args:
        result: The result of `transfer`.
        names: The arms to join.
    """
    base = result.arm("unsteered")
    native = result.gain("native")[:, 0]
    joined = []
    for name in names:
        signed = {sign: result.at_equal_kl(name, sign) for sign in result.signs}
        gain = result.gain(name)
        scores = {f"score, {sign}": arm.effect for sign, arm in signed.items()} | {"score, unsteered": base.effect}
        strengths = " and ".join(f"{arm.strength:.2f}" for arm in signed.values())
        arms = list(signed.values())
        joined.append(
            Arm(
                arm=name,
                recipe=result.name,
                operator=f"Add({strengths})",
                at=EQUAL_KL,
                effect=bootstrap_mean(gain),
                change=bootstrap_mean(gain),
                measures={EFFICIENCY: transfer_efficiency(gain, native)} | scores,
                kl=float(np.mean([arm.kl for arm in arms])),
                perplexity=float(np.exp(np.mean([np.log(arm.perplexity) for arm in arms]))),
                agreement=float(np.mean([arm.agreement for arm in arms])),
                reached=all(arm.reached for arm in arms),
                seeds=gain.shape[1],
                ids=arms[0].ids,
                scores=tuple(gain.mean(1).tolist()),
                table=tuple(map(tuple, gain.tolist())) if gain.shape[1] > 1 else (),
                texts=tuple(text for arm in arms for text in arm.texts[:SHOWN]),
            )
        )
    return joined


def _chosen(result: Result) -> dict[str, Any]:
    verdict = result.verdict()
    return {
        **result.choice(),
        "transfers": verdict.transfers,
        "p": verdict.p,
        "unsteered_perplexity": result.arm("unsteered").perplexity,
    }


def conclusions(results: Mapping[str, Result]) -> tuple[str, ...]:
    """Count the concepts that transfer, and list their verdicts."""
    verdicts = [result.verdict() for result in results.values()]
    defined = [v for v in verdicts if v.efficiency.undefined != NO_NATIVE]
    shares = [v.efficiency.value for v in defined if not np.isnan(v.efficiency.value)]
    median = f", median efficiency {np.median(shares):.2f}" if shares else ""
    count = sum(v.transfers is True for v in verdicts)
    family = holm([v.p for v in verdicts])
    left = sum(v.transfers is True and p < LEVEL for v, p in zip(verdicts, family, strict=True))
    summary = (
        f"{count} of {len(verdicts)} concepts transfer ({left} after Holm's correction over all {len(verdicts)}); "
        f"{len(defined)} have a native effect{median}"
    )
    return (summary, *(v.text for v in verdicts))

"""Many concepts carried from one model into another by one recipe, in one table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.directions import Direction, difference_of_means, logistic_probe
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import require_disjoint
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.maps.significance import holm
from xmodel_steer.maps.statistics import NO_NATIVE, bootstrap_mean, transfer_efficiency
from xmodel_steer.models.facts import context_length, hardware_of
from xmodel_steer.recipe.arms import ARMS, EFFICIENCY, LEVEL, Arm
from xmodel_steer.recipe.carrying import transfer
from xmodel_steer.recipe.preparing import default_sites
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import Budget, GeneralText, Method, versions
from xmodel_steer.studies.carried import MAP_TOKENS
from xmodel_steer.studies.concepts import CONCEPTS, Concept, concept, openings
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
SHOWN = 2  # texts of each direction
SEEN, COUNT = 108, 300  # of the openings: earlier studies reported on the first, and these report on the next
SETTINGS = Settings(documents=(500, 30), random_seeds=5, neutral_tokens=24, batch_size=192)


def concept_transfer(
    source: Any,
    target: Any,
    names: Sequence[str] = CONCEPTS,
    *,
    source_sites: Sequence[Site] | None = None,
    target_sites: Sequence[Site] | None = None,
    prompts: Sequence[Prompt] | None = None,
    max_new_tokens: int = 16,
    direction: Direction = difference_of_means,
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
        prompts: Texts to continue; a third validates. By default 300 packaged beginnings of sentences that no study before
            this one reported on, and 72 others that validate.
        max_new_tokens: Length of the continuations.
        direction: Finds the vectors; see `Method`.
        settings: Text, sizes and seeds.

    Raises:
        PromptError: No concepts are given, a name is unknown, or sets share a text.
        DownloadError: A concept's pairs cannot be fetched.
    """
    concepts = [concept(name) for name in names]
    if not concepts:
        raise PromptError(f"concept_transfer: give at least one of {', '.join(CONCEPTS)}")
    clock, (general, neutral) = Clock(), settings.texts()
    ours, chosen_on = prompts_of() if prompts is None else (tuple(prompts), ())
    sources, targets = (
        tuple(sites or default_sites(model, end))
        for sites, model, end in ((source_sites, source, "source"), (target_sites, target, "target"))
    )
    budget = Budget((-1.0, 1.0), False, settings.random_seeds, neutral_tokens=settings.neutral_tokens)
    limit = min(MAP_TOKENS, context_length(source), context_length(target))

    for carried in concepts:
        _require_disjoint(carried, general, neutral, ours + chosen_on)
    moments = cached_moments(
        source, target, general, source_sites=sources, target_sites=targets, max_tokens=limit, seed=settings.seed
    )
    clock.lap("collecting moments")

    results: dict[str, Result] = {}
    for carried in concepts:
        results[carried.name] = transfer(
            source,
            target,
            carried.contrast,
            GeneralText(general, neutral, moments),
            behaviour=carried.behaviour(ours, chosen_on, max_new_tokens=max_new_tokens, batch_size=settings.batch_size),
            label=carried.name,
            source_sites=sources,
            target_sites=targets,
            method=Method(carried.tokens, direction, settings.fitter, "all", settings.recipes, carried.instructions),
            budget=budget,
            side={},  # every arm costs the same KL; measuring capability too would take half the time again
            seed=settings.seed,
        )
        clock.lap(carried.name)

    each = [(result, recipe) for result in results.values() for recipe in result.recipes]
    # Concepts with texts share their prompts.
    with_texts = next((result for result in results.values() if result.arm("unsteered").texts), each[0][0])
    return Result(
        name="concepts",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        stored=conclusions(results),
        source=end_of(source),
        target=end_of(target),
        arms=(_unsteered(with_texts), *(arm for named in each for arm in both_directions(*named))),
        chosen={recipe: _chosen(result, recipe) for result, recipe in each},
        validation=tuple(record for result in results.values() for record in result.validation),
        prompts=_prompts(with_texts),
        spec=settings.record()
        | {"strengths": [-1.0, 1.0], "max_new_tokens": max_new_tokens, "source_sites": list(map(str, sources))}
        | {"target_sites": list(map(str, targets)), "map_documents": len(general), "map_tokens": limit},
        splits={"general": [prompt.id for prompt in general]}
        | {name: {k: ids for k, ids in r.splits.items() if k != "map_text"} for name, r in results.items()},
        seeds=dict(each[0][0].seeds),
        versions=versions(),
        hardware=hardware_of(target),
        seconds=clock.seconds,
        vectors=dict(vector for result in results.values() for vector in _vectors(result)),
        maps={name: mapping for result in results.values() for name, mapping in result.maps.items()},
    )


def prompts_of(count: int = COUNT) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Return prompts that no earlier study reported on, and 72 others that validate."""
    return openings()[SEEN : SEEN + count], openings(SEEN)[:72]


def _require_disjoint(
    carried: Concept, general: Sequence[Prompt], neutral: Sequence[Prompt], prompts: Sequence[Prompt]
) -> None:
    """Refuse sets that share a text, before any model runs."""
    sets = {
        "map text": general,
        "neutral text": neutral,
        "contrast": carried.contrast.positive + carried.contrast.negative,
        "prompts": prompts if carried.scorer else (),
    }
    require_disjoint("concepts", {name: [p.content_key() for p in texts] for name, texts in sets.items()})


def feature_transfer(source: Any, target: Any, names: Sequence[str] = FEATURES, **more: Any) -> Result:
    """Carry a single feature: the direction of a linear probe.

    Args:
        source: The source model.
        target: The target model.
        names: Concepts, some of `CONCEPTS`.
        more: The other arguments of `concept_transfer`.

    Raises:
        PromptError: No concepts are given, or a name is unknown.
    """
    study = concept_transfer(source, target, names, direction=logistic_probe, **more)
    return replace(study, name="feature-transfer", question=FEATURE_QUESTION)


def _vectors(result: Result) -> Iterator[tuple[str, SteeringVector]]:
    """Yield a concept's vectors under the names of their recipes."""
    for name, vector in result.vectors.items():
        yield name if result.recipes[1:] else f"{result.name}: {name}", vector


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


def both_directions(result: Result, recipe: str, names: Sequence[str] = (*ARMS[1:], "prompted")) -> list[Arm]:
    """Join each arm's two directions at equal KL; the effect is half their difference.

    Args:
        result: The result of `transfer`.
        recipe: The recipe.
        names: The arms to join, where the recipe has them.
    """
    base = result.arm("unsteered")
    native = result.gain("native", recipe)[:, 0]
    there = {arm.arm for arm in result.arms if arm.recipe == recipe}
    joined = []
    for name in [name for name in names if name in there]:
        signed = {sign: result.at_equal_kl(name, sign, recipe) for sign in result.signs}
        gain = result.gain(name, recipe)
        scores = {f"score, {sign}": arm.effect for sign, arm in signed.items()} | {"score, unsteered": base.effect}
        strengths = " and ".join(f"{arm.strength:.2f}" for arm in signed.values())
        arms = list(signed.values())
        joined.append(
            Arm(
                arm=name,
                recipe=recipe,
                operator=" / ".join(arm.operator for arm in arms) if name == "prompted" else f"Add({strengths})",
                at=arms[0].at,
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


def _chosen(result: Result, recipe: str) -> dict[str, Any]:
    verdict = result.verdict(recipe)
    return {
        **result.choice(recipe),
        "transfers": verdict.transfers,
        "p": verdict.p,
        "dose": verdict.dose.record(),
        "unsteered_perplexity": result.arm("unsteered").perplexity,
    }


def conclusions(results: Mapping[str, Result]) -> tuple[str, ...]:
    """Count the concepts that transfer by maps of general text, and list all verdicts."""
    verdicts = [result.verdict(result.recipes[0]) for result in results.values()]
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
    return (summary, *(v.text for result in results.values() for v in result.verdicts.values()))

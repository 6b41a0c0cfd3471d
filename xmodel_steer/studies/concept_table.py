"""Many concepts carried from one model into another by the same recipe, in one table."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.directions import Direction, difference_of_means, logistic_probe, require_random
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import require_disjoint
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.evaluation.behaviours.likelihoods import AnswerLogOdds
from xmodel_steer.files.wheels import general_text
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.maps.statistics import NO_NATIVE, bootstrap_mean, transfer_efficiency
from xmodel_steer.models.facts import context_length, hardware_of
from xmodel_steer.recipe.arms import ARMS
from xmodel_steer.recipe.carrying import default_sites, transfer, versions
from xmodel_steer.recipe.results import TransferResult
from xmodel_steer.studies.concepts import CONCEPTS, concept, openings
from xmodel_steer.studies.study import EFFICIENCY, EQUAL_KL, EQUAL_STRENGTH, Clock, Study, StudyArm, end_of

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


def concept_transfer(
    source: Any,
    target: Any,
    names: Sequence[str] = CONCEPTS,
    *,
    source_sites: Sequence[Site] | None = None,
    target_sites: Sequence[Site] | None = None,
    general: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    prompts: Sequence[Prompt] | None = None,
    directions: Mapping[str, Direction] = {"": difference_of_means},
    fitter: Fitter = Ridge(),
    random_seeds: int = 3,
    max_new_tokens: int = 20,
    neutral_tokens: int = 24,
    batch_size: int = 192,
    seed: int = 0,
) -> Study:
    """Carry one concept after another from the source into the target, each by `transfer`.

    All share the map's general text, the neutral text and, but for those of two answers, the prompts.

    Args:
        source: The source model.
        target: The target model.
        names: Which concepts, of `CONCEPTS`.
        source_sites: Candidates; those of `transfer` by default.
        target_sites: Candidates; those of `transfer` by default.
        general: General text for the map; packaged text by default.
        neutral: Text for KL and perplexity; packaged text by default.
        prompts: What is continued: a third validates. Packaged beginnings of sentences by default.
        directions: How a concept's vector is found, by name: every concept is carried once for each.
        fitter: Fits the map.
        random_seeds: Number of random vectors.
        max_new_tokens: Length of the continuations.
        neutral_tokens: Tokens read of each neutral text.
        batch_size: Texts generated at a time.
        seed: Seed of all splits.

    Raises:
        PromptError: No concepts are given, there is none of a name, or sets share a text.
        DownloadError: A concept's pairs cannot be fetched.
        ValueError: There is no random vector.
    """
    require_random("concept_transfer", random_seeds)
    chosen = [concept(name) for name in names]
    if not chosen:
        raise PromptError(f"concept_transfer: give at least one of {', '.join(CONCEPTS)}")
    clock = Clock()
    passages = general_text()
    general = passages[:-30][:500] if general is None else general
    neutral = passages[-30:] if neutral is None else neutral
    prompts = openings(108) if prompts is None else prompts
    ours, theirs = (
        tuple(given or default_sites(model, end))
        for given, model, end in ((source_sites, source, "source"), (target_sites, target, "target"))
    )
    limit = min(192, context_length(source), context_length(target))

    def moments_of(text: Sequence[Prompt]) -> Moments:
        return cached_moments(source, target, text, source_sites=ours, target_sites=theirs, max_tokens=limit, seed=seed)

    for own in chosen:  # all else is seen to by `transfer`, which is given moments and no text
        sets = {"map text": own.map_text(general, seed=seed) if own.text else general, "neutral text": neutral}
        sets |= {"contrast": own.contrast.positive + own.contrast.negative, "prompts": prompts if own.scorer else ()}
        require_disjoint("concepts", {name: [p.content_key() for p in texts] for name, texts in sets.items()})
    shared = moments_of(general)
    clock.lap("collecting moments")

    results: dict[str, TransferResult] = {}
    mixed: dict[str, dict[str, list[str]]] = {}  # what stands among the general text, by concept
    for own, (how, direction) in itertools.product(chosen, directions.items()):
        label = f"{own.name}, {how}" if how else own.name
        results[label] = transfer(
            source,
            target,
            own.contrast,
            (),
            prompts=prompts if own.scorer else None,
            scorer=own.scorer,
            held_out=AnswerLogOdds.from_contrast,
            label=label,
            unit=own.unit,
            source_sites=ours,
            target_sites=theirs,
            strengths=(-1.0, 1.0),
            fixed=False,
            tokens=own.tokens,
            direction=direction,
            fitter=fitter,
            moments=moments_of(own.map_text(general, seed=seed)) if own.text else shared,
            neutral_texts=neutral,
            side={},  # every arm costs the same KL; capability beside it would take half the time again
            neutral_tokens=neutral_tokens,
            random_seeds=random_seeds,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
        )
        mixed[label] = {"map_text": [prompt.id for prompt in own.text]} if own.text else {}
        clock.lap(label)

    first = next(iter(results.values()))
    # Its prompts are those of all that have texts.
    shown = next((result for result in results.values() if result.arm("unsteered", 0).texts), first)
    return Study(
        name="concepts",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        verdict=verdict(results),
        source=end_of(source),
        target=end_of(target),
        arms=(_unsteered(shown), *(arm for result in results.values() for arm in _arms(result))),
        chosen={name: _chosen(result) for name, result in results.items()},
        validation=(),
        curves={},
        prompts=_prompts(shown),
        spec={key: first.spec[key] for key in ("strengths", "fitter", "random_seeds", "max_new_tokens", "neutral_tokens")}
        | {"source_sites": list(map(str, ours)), "target_sites": list(map(str, theirs))}
        | {"map_documents": len(general), "map_tokens": limit, "batch_size": batch_size},
        splits={"general": [prompt.id for prompt in general]}
        | {name: {key: own for key, own in result.splits.items() if key != "evaluation_texts"} | mixed[name] for name, result in results.items()},
        seeds=dict(first.seeds),
        versions=versions(),
        hardware=hardware_of(target),
        seconds=clock.seconds,
    )  # fmt: skip


def feature_transfer(source: Any, target: Any, names: Sequence[str] = FEATURES, **settings: Any) -> Study:
    """Carry a single feature, the direction of a linear probe, and beside it the difference of means of the same pairs.

    Args:
        source: The source model.
        target: The target model.
        names: Which concepts, of `CONCEPTS`.
        settings: As for `concept_transfer`.

    Raises:
        PromptError: No concepts are given, or there is none of a name.
    """
    directions = {"logistic probe": logistic_probe, "difference of means": difference_of_means}
    found = concept_transfer(source, target, names, directions=directions, **settings)
    return replace(found, name="feature-transfer", question=FEATURE_QUESTION)


def _prompts(result: TransferResult) -> tuple[str, ...]:
    """List what the arms' texts continue, with the direction of steering."""
    if not result.arm("unsteered", 0).texts:
        return ()
    return tuple(f"{sign} {text}" for sign in result.signs for text in result.splits["evaluation_texts"][:SHOWN])


def _unsteered(result: TransferResult) -> StudyArm:
    """Return the arm that all others are changes of."""
    base = result.arm("unsteered", 0)
    still = bootstrap_mean(np.zeros(base.effect.n))
    texts = base.texts[:SHOWN] * len(result.signs)
    return StudyArm("unsteered", "", "", EQUAL_STRENGTH, still, {}, 0.0, base.perplexity, texts=texts)


def _arms(result: TransferResult) -> list[StudyArm]:
    """Every arm at equal KL, both directions as one."""
    base = result.arm("unsteered", 0)
    native = result.gain("native")[:, 0]
    made = []
    for name in ARMS[1:]:
        ways = {sign: result.at_equal_kl(name, sign) for sign in result.signs}
        gain = result.gain(name)
        beside = {f"score, {sign}": arm.effect for sign, arm in ways.items()} | {"score, unsteered": base.effect}
        beside |= {f"{what}, {sign}": found for sign, arm in ways.items() for what, found in arm.side.items()} | {
            f"{what}, unsteered": found for what, found in base.side.items()
        }
        strengths = " and ".join(f"{arm.strength:.2f}" for arm in ways.values())
        made.append(
            StudyArm(
                arm=name,
                recipe=result.label,
                operator=f"Add({strengths})",
                at=EQUAL_KL,
                effect=bootstrap_mean(gain),
                beside={EFFICIENCY: transfer_efficiency(gain, native)} | beside,
                kl=float(np.mean([arm.kl for arm in ways.values()])),
                perplexity=float(np.exp(np.mean([np.log(arm.perplexity) for arm in ways.values()]))),
                reached=all(arm.reached for arm in ways.values()),
                seeds=gain.shape[1],
                texts=tuple(text for arm in ways.values() for text in arm.texts[:SHOWN]),
            )
        )
    return made


def _chosen(result: TransferResult) -> dict[str, Any]:
    found = result.verdict()
    return {
        "unit": result.unit,
        "source_layer": result.source["layer"],
        "target_layer": result.target["layer"],
        "cosine": result.similarity["mapped"]["cosine"],
        "norm_ratio": result.similarity["mapped"]["norm_ratio"],
        "map_r2": result.map.get("r2"),
        "transfers": found.transfers,
        "p": float(np.max([c.corrected for c in found.comparisons])),
        "unsteered_perplexity": result.arm("unsteered", 0).perplexity,
        "selection": result.selection,
    }


def verdict(results: dict[str, TransferResult]) -> str:
    """How many concepts transfer, and each one's line."""
    found = [result.verdict() for result in results.values()]
    defined = [v for v in found if v.efficiency.undefined != NO_NATIVE]
    share = [v.efficiency.value for v in defined if not np.isnan(v.efficiency.value)]
    median = f", median efficiency {np.median(share):.2f}" if share else ""
    head = f"{sum(v.transfers is True for v in found)} of {len(found)} concepts transfer; {len(defined)} have a native effect{median}"
    return "; ".join([head, *(v.text.replace("; ", ", ") for v in found)])

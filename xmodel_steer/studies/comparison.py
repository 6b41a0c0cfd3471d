"""The paper's autoencoder beside maps with a closed form: what each does when a model must live on it."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xmodel_steer.core.directions import random_like, require_random
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import require_disjoint
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.files.wheels import general_text
from xmodel_steer.interventions.mirror import mapped_source, mean_of, noise_like
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.controls import ShuffledPairs
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.isometry import Procrustes
from xmodel_steer.maps.ridge import ReducedRank, Ridge
from xmodel_steer.maps.statistics import number, quotient
from xmodel_steer.maps.training import Autoencoder, SGDAffine
from xmodel_steer.models.facts import device_of, hardware_of
from xmodel_steer.recipe.carrying import default_sites, versions
from xmodel_steer.studies.carried import LONGER, Pair
from xmodel_steer.studies.concepts import Concept, concept
from xmodel_steer.studies.map_tasks import (
    CAPABILITY,
    REPLACED,
    STEERING,
    UNIT,
    Task,
    both_directions,
    fit_of,
    moved_of,
    replaced_arms,
    steered_arms,
    vectors_of,
)
from xmodel_steer.studies.study import EFFICIENCY, EQUAL_STRENGTH, Clock, Study, StudyArm, end_of, estimate

QUESTION = "Does the paper's trained autoencoder carry a vector, or a model's whole activations, better than a map with a closed form?"
NOTE = (
    "Layers are chosen with ridge. Steering: every arm at the KL of the native vector at strength 1, in each direction. Replacement: the site holds mapped activations of the "
    "source, which reads along; the effect is the share of texts more like the target's own than the source's own (one half by chance), KL "
    "and ROUGE-L against its own text. Capability: right answers to questions that no map was fitted on, under the same replacement."
)


def fitters(seed: int = 0) -> dict[str, Fitter]:
    """List the maps to compare, the paper's two with short and long training.

    Args:
        seed: Where the trained ones begin.
    """
    return {
        "autoencoder, the paper's settings": Autoencoder(standardise=False, seed=seed),
        "autoencoder, standardised, to the end": Autoencoder(**LONGER, seed=seed),
        "SGD affine, the paper's settings": SGDAffine(standardise=False, seed=seed),
        "SGD affine, standardised, to the end": SGDAffine(**LONGER, seed=seed),
        "ridge": Ridge(),
        "Procrustes": Procrustes(),
        "reduced rank 64": ReducedRank(64),
        "shuffled pairs (ridge)": ShuffledPairs(Ridge()),
    }  # type: ignore[dict-item]


def map_comparison(
    source: Any,
    target: Any,
    *,
    behaviour: Concept | None = None,
    compared: Mapping[str, Fitter] | None = None,
    source_sites: Sequence[Site] | None = None,
    target_sites: Sequence[Site] | None = None,
    general: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    prompts: int = 108,
    replaced: int = 60,
    capability: MultipleChoice | None = None,
    random_seeds: int = 3,
    max_new_tokens: int = 20,
    neutral_tokens: int = 24,
    seed: int = 0,
) -> Study:
    """Fit several maps on the same rows of one pair of sites, and put each to work.

    The pair of sites is chosen by how well the native vector, and then the one that `Ridge` maps, steer a third of the
    prompts. The rest is reported on.

    Args:
        source: The source model.
        target: The target model.
        behaviour: A concept with a scorer and prompts; sentiment by default.
        compared: Fitters by name; those of `fitters` by default. The first two sites' rows are written to a temporary store.
        source_sites: Candidates; those of `transfer` by default.
        target_sites: Candidates; those of `transfer` by default.
        general: General text for the maps; packaged text by default.
        neutral: Text for KL, perplexity and the replacement check: a third calibrates. Packaged text by default.
        prompts: How many of the behaviour's prompts: a third chooses the sites.
        replaced: How many of them the replacement check continues, of those that chose nothing.
        capability: Questions; the packaged ones by default.
        random_seeds: Number of random vectors.
        max_new_tokens: Length of the continuations.
        neutral_tokens: Tokens read of each neutral text.
        seed: Seed of all splits.

    Raises:
        PromptError: The behaviour has no scorer, there are too few prompts or neutral texts, or sets share a text.
        ValueError: There is no random vector.
    """
    require_random("map_comparison", random_seeds)
    clock, every = Clock(), compared or fitters(seed)
    own = behaviour or concept("sentiment")
    if own.scorer is None or len(own.prompts) < 6:
        raise PromptError(f"map_comparison: {own.name} needs a scorer and at least 6 prompts")
    passages = general_text()
    general = tuple(passages[:-30][:500] if general is None else general)
    neutral = tuple(passages[-30:] if neutral is None else neutral)
    calibration, held = neutral[: len(neutral) // 3], neutral[len(neutral) // 3 :]
    order = np.random.default_rng(seed).permutation(min(prompts, len(own.prompts)))
    chooses, reports = (
        tuple(own.prompts[i] for i in part) for part in (order[: len(order) // 3], order[len(order) // 3 :])
    )
    sets = {
        "contrast": own.contrast.positive + own.contrast.negative,
        "general": general,
        "neutral": neutral,
        "validation": chooses,
        "evaluation": reports,
    }
    require_disjoint("map_comparison", {name: [p.content_key() for p in prompts] for name, prompts in sets.items()})
    ours, theirs = (
        tuple(given or default_sites(model, end))
        for given, model, end in ((source_sites, source, "source"), (target_sites, target, "target"))
    )

    task, pair = Task(target, own, max_new_tokens), Pair(source, target, general, seed)
    moments = pair.of(general, list(itertools.product(ours, theirs)))
    clock.lap("collecting moments")
    records: list[dict[str, Any]] = []

    def best(varied: str, candidates: Mapping[Site, SteeringVector]) -> Site:
        found, _ = task.gains(chooses, [both_directions(vector) for vector in candidates.values()])
        scores = [float(gain.mean()) for gain in found]
        for site, score in zip(candidates, scores, strict=True):
            records.append({"recipe": STEERING, "varied": varied, "layer": site.layer, "score": score})
        return list(candidates)[int(np.argmax(scores))]

    natives = {s: v.with_scale(moments.scale(s)) for s, v in vectors_of(task.sides(target, theirs), own.name).items()}
    there = best("target layer", natives)
    native = natives[there]
    norm = native.norm(standardised=True)
    rows_of = task.sides(source, ours)
    found = vectors_of(rows_of, own.name)
    here = best(
        "source layer",
        {
            s: Ridge().fit(moments.pair(s, there)).transport(v).with_scale(moments.scale(there)).with_norm(norm)
            for s, v in found.items()
        },
    )
    clock.lap("choosing layers")

    maps: dict[str, Map] = {}
    seconds: dict[str, float] = {}
    with pair.stored(general, [(here, there)]) as store:
        rows = store.pair(here, there)
        for name, fitter in every.items():
            begun = time.perf_counter()
            placed = fitter
            if isinstance(fitter, Autoencoder | SGDAffine):
                placed = replace(fitter, device=str(device_of(target)))
            maps[name] = placed.fit(rows)  # type: ignore[arg-type]
            seconds[name] = time.perf_counter() - begun
        reference = rows.moments(seed=seed)
    clock.lap("fitting")

    ends = (rows_of[0][here], rows_of[1][here])
    moved = {name: moved_of(mapping, found[here], ends, native) for name, mapping in maps.items()}
    carried = {name: vector.with_norm(norm) for name, vector in moved.items()}
    chosen = {
        name: {
            "source_layer": here.layer,
            "target_layer": there.layer,
            "settings": repr(every[name])[:300],
            "seconds": round(seconds[name], 2),
            "cosine": native.cosine(moved[name]),
            "norm_ratio": quotient(moved[name].norm(standardised=True), norm),
            **fit_of(mapping),
        }
        for name, mapping in maps.items()
    }
    groups = {"native": [native], **{name: [v] for name, v in carried.items()}}
    groups["random"] = [random_like(native, seed=seed + k) for k in range(random_seeds)]
    arms = steered_arms(task, groups, native, reports, calibration, held, neutral_tokens)
    clock.lap("steering")
    steps: dict[str, list[Step]] = {"unsteered": []}
    steps |= {name: [mapped_source(source, target, mapping)] for name, mapping in maps.items()}
    mean, scale = reference.train.target_mean, reference.train.target_scale
    steps["mean ablation"] = [mean_of(reference.target, mean)]
    steps["noise"] = [noise_like(reference.target, mean, scale, seed=seed)]
    effects = side_effects(target, list(steps.values()), held, max_tokens=neutral_tokens, batch_size=16)
    damage = dict(zip(steps, effects, strict=True))
    arms += replaced_arms(source, target, maps, reports[:replaced], reference, max_new_tokens, damage, seed)
    clock.lap("replacing")
    questions = capability or MultipleChoice.packaged()
    for (name, cost), right in zip(damage.items(), questions.measure(target, list(steps.values())), strict=True):
        arms.append(
            StudyArm(name, CAPABILITY, "", EQUAL_STRENGTH, estimate([right.scores]), {}, cost.mean_kl, cost.perplexity)
        )
    clock.lap("asking under replacement")

    return Study(
        name="map-comparison",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        verdict=_verdict(arms, list(every)),
        source=end_of(source),
        target=end_of(target),
        arms=tuple(arms),
        chosen=chosen,
        validation=tuple(records),
        curves={},
        prompts=(),
        spec={
            "behaviour": own.name,
            "unit": own.unit,
            "map_documents": len(general),
            "map_tokens": pair.map_tokens,
            "max_new_tokens": max_new_tokens,
            "neutral_tokens": neutral_tokens,
            "random_seeds": random_seeds,
        },
        splits={name: [p.id for p in prompts] for name, prompts in sets.items()},
        seeds={"split": seed, "random": [seed + k for k in range(random_seeds)]},
        versions=versions(),
        hardware=hardware_of(target),
        seconds=clock.seconds,
    )


def _verdict(arms: Sequence[StudyArm], names: Sequence[str]) -> str:
    """Each map in a line."""
    table = {(arm.arm, arm.recipe): arm for arm in arms}

    def said(name: str) -> str:
        steered, living, asked = (table[name, recipe] for recipe in (STEERING, REPLACED, CAPABILITY))
        share = steered.beside[EFFICIENCY]
        much = f"efficiency {share:.2f}" if math.isnan(share.value) else f"{share:.2f} of native"
        kl, closer, right, unsteered = (
            number(found.value, ".2f")
            for found in (
                living.beside["KL from its own text"],
                living.effect,
                asked.effect,
                table["unsteered", CAPABILITY].effect,
            )
        )
        return (
            f"{name}: steering {much}, replacement KL {kl} and closer to the target's text {closer}, "
            f"right answers {right} (unsteered {unsteered})"
        )

    return "; ".join(said(name) for name in names)

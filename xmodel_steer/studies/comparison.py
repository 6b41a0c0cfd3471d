"""Comparison of maps fitted on the same rows: a trained autoencoder, affine maps and controls."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Site
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.controls import ShuffledPairs
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.isometry import Procrustes
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.ridge import ReducedRank, Ridge
from xmodel_steer.maps.statistics import number, quotient
from xmodel_steer.maps.training import Autoencoder, SGDAffine
from xmodel_steer.models.facts import device_of, hardware_of
from xmodel_steer.recipe.arms import EFFICIENCY, Arm
from xmodel_steer.recipe.preparing import Prepared, prepare
from xmodel_steer.recipe.records import sites_record
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.selecting import Selected, select
from xmodel_steer.recipe.settings import Budget, GeneralText, Method, versions
from xmodel_steer.studies.carried import LONGER, MAP_TOKENS, Pair
from xmodel_steer.studies.concept_table import SETTINGS, prompts_of
from xmodel_steer.studies.concepts import Concept, concept
from xmodel_steer.studies.map_tasks import (
    CAPABILITY,
    REPLACED,
    STEERING,
    UNIT,
    fit_of,
    moved_of,
    replaced,
    steered_arms,
)
from xmodel_steer.studies.settings import Clock, Settings, end_of

ONE = "ridge, one layer"
QUESTION = "Does the paper's trained autoencoder carry a vector, or a model's whole activations, better than a map with a closed form?"
NOTE = (
    "Layers are chosen with ridge. Steering: every arm at the KL of the native vector at strength 1, in each direction. Replacement: the site holds mapped activations of the "
    "source, which reads along; the effect is the share of texts more like the target's own than the source's own (one half by chance), KL "
    "and ROUGE-L against its own text. Capability: right answers to questions that no map was fitted on, under the same replacement."
)


def fitters(seed: int = 0) -> dict[str, Fitter]:
    """List the maps to compare, the paper's two with short and long training.

    Args:
        seed: Seed of the trained maps.
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
    prompts: int = 72,
    prompts_replaced: int = 60,
    capability: MultipleChoice | None = None,
    max_new_tokens: int = 20,
    settings: Settings = SETTINGS,
) -> Result:
    """Fit several maps on the same rows, and compare them in use.

    Their pair of sites is chosen as in `transfer`, with `Ridge`. Where a stack was chosen, ridge from the best single layer is
    compared too.

    Args:
        source: The source model.
        target: The target model.
        behaviour: A concept with a scorer and prompts, a third of which chooses; by default sentiment, on prompts of `concept_transfer`.
        compared: Fitters by their names; by default the maps of `fitters`. The rows are kept in a temporary store.
        source_sites: Candidate sites of the source; by default the candidates of `transfer`.
        target_sites: Candidate sites of the target; by default the candidates of `transfer`.
        prompts: Number of the prompts.
        prompts_replaced: Number of evaluation prompts that the replacement check continues.
        capability: Multiple-choice questions; the packaged ones by default.
        max_new_tokens: Length of the continuations.
        settings: Text, sizes and seeds.

    Raises:
        PromptError: The behaviour has no scorer, there are too few prompts or neutral texts, or sets share a text.
    """
    clock, named_fitters, seed = Clock(), compared or fitters(settings.seed), settings.seed
    tested = behaviour or concept("sentiment")
    if tested.scorer is None or len(tested.prompts) < 6:
        raise PromptError(f"map_comparison: {tested.name} needs a scorer and at least 6 prompts")
    asked = prompts_of(prompts) if behaviour is None else (tested.prompts[:prompts], ())
    general, neutral = settings.texts()
    prepared = prepare(
        source, target, tested.contrast, GeneralText(general, neutral), label=STEERING, source_sites=source_sites,
        behaviour=tested.behaviour(*asked, max_new_tokens=max_new_tokens), target_sites=target_sites,
        method=Method(tested.tokens), seed=seed, cached=True,
        budget=Budget((-1.0, 1.0), False, settings.random_seeds, MAP_TOKENS, settings.neutral_tokens),
    )  # fmt: skip
    clock.lap("collecting moments")
    selected = select(prepared)
    native, source_vector = selected.native, selected.source
    source_site, target_site = source_vector.space.site, native.space.site
    clock.lap("choosing layers")

    maps, seconds, reference = _fitted(prepared, selected, named_fitters)
    clock.lap("fitting")

    sides = (
        capture(source, side, [source_site], tokens=tested.tokens, batch_size=32)[source_site]
        for side in (tested.contrast.positive, tested.contrast.negative)
    )
    ends = (next(sides), next(sides))
    norm = native.norm(standardised=True)
    moved = {
        name: moved_of(mapping, prepared.sources[mapping.source.site], ends, native) for name, mapping in maps.items()
    }
    carried = {name: vector.with_norm(norm) for name, vector in moved.items()}
    groups = {"native": [native], **{name: [v] for name, v in carried.items()}}
    groups["random"] = [random_like(native, seed=seed + k) for k in range(settings.random_seeds)]
    arms = steered_arms(prepared, groups)
    clock.lap("steering")
    arms += replaced(
        prepared, maps, reference, prompts_replaced, max_new_tokens, capability or MultipleChoice.packaged()
    )
    clock.lap("replacing")

    return Result(
        name="map-comparison",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        stored=_verdict(arms, list(maps)),
        source=end_of(source),
        target=end_of(target),
        arms=tuple(arms),
        chosen={
            name: {
                **sites_record(mapping.source.site, target_site),
                "settings": repr(named_fitters.get(name, Ridge()))[:300],
                "seconds": round(seconds[name], 2),
                "cosine": native.cosine(moved[name]),
                "norm_ratio": quotient(moved[name].norm(standardised=True), norm),
                **fit_of(mapping),
            }
            for name, mapping in maps.items()
        },
        validation=selected.records,
        spec=settings.record()
        | {
            "behaviour": tested.name,
            "unit": tested.unit,
            "map_documents": len(general),
            "map_tokens": Pair(source, target, general).map_tokens,
        }
        | {"max_new_tokens": max_new_tokens},
        splits=prepared.splits,
        seeds=settings.seeds(),
        versions=versions(),
        hardware=hardware_of(target),
        seconds=clock.seconds,
        vectors={"source": source_vector, "native": native, **carried},
        maps=maps,
    )


def _fitted(
    prepared: Prepared, selected: Selected, named: Mapping[str, Fitter]
) -> tuple[dict[str, Map], dict[str, float], SplitMoments]:
    """Fit and time the maps on the chosen sites' rows."""
    maps: dict[str, Map] = {}
    seconds: dict[str, float] = {}
    source_site, target_site = selected.source.space.site, selected.native.space.site

    def fit(name: str, fitter: Fitter, rows: Any) -> None:
        start = time.perf_counter()
        if isinstance(fitter, Autoencoder | SGDAffine):
            fitter = replace(fitter, device=str(device_of(prepared.target)))
        maps[name] = fitter.fit(rows)
        seconds[name] = time.perf_counter() - start

    pair = Pair(prepared.source, prepared.target, prepared.text.map, prepared.seed)
    with pair.stored(prepared.text.map, [(source_site, target_site)]) as store:
        rows = store.pair(source_site, target_site)
        for name, fitter in named.items():
            fit(name, fitter, rows)
        reference = rows.moments(seed=prepared.seed)
    if selected.layer is not None:
        fit(ONE, Ridge(), prepared.moments.pair(selected.layer, target_site))
    return maps, seconds, reference


def _verdict(arms: Sequence[Arm], names: Sequence[str]) -> tuple[str, ...]:
    """Summarise each map in a line."""
    table = {(arm.arm, arm.recipe): arm for arm in arms}

    def line_of(name: str) -> str:
        steered, replacing, answering = (table[name, recipe] for recipe in (STEERING, REPLACED, CAPABILITY))
        share = steered.measures[EFFICIENCY]
        efficiency = f"efficiency {share:.2f}" if math.isnan(share.value) else f"{share:.2f} of native"
        kl, closer, right, unsteered = (
            number(figure.value, ".2f")
            for figure in (
                replacing.measures["KL from its own text"],
                replacing.effect,
                answering.effect,
                table["unsteered", CAPABILITY].effect,
            )
        )
        return (
            f"{name}: steering {efficiency}, replacement KL {kl} and closer to the target's text {closer}, "
            f"right answers {right} (unsteered {unsteered})"
        )

    return tuple(line_of(name) for name in names)

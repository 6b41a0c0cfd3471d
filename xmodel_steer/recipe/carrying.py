"""The whole recipe: a vector from the source, a map, the vector in the target, every control.

All arms run through the same code. Layers and the headline strength are chosen on validation
prompts and validation text; what is reported comes from prompts and text that chose nothing.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xmodel_steer.core.bars import stages, tell, with_progress
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.prompts import Prompts
from xmodel_steer.core.spaces import Site, Sites
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.behaviours.generated import Behaviour, GeneratedText
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice, Preference
from xmodel_steer.evaluation.scorers.text import Explained
from xmodel_steer.files.claiming import claim
from xmodel_steer.files.resume import resumable
from xmodel_steer.interventions.operators import Add
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.knowing import Knowledge
from xmodel_steer.maps.moments import Moments
from xmodel_steer.models.facts import dtype_of
from xmodel_steer.models.sites import space_of
from xmodel_steer.recipe.arms import Arm
from xmodel_steer.recipe.matching import Run, match_damage
from xmodel_steer.recipe.measuring import measure
from xmodel_steer.recipe.planning import plan
from xmodel_steer.recipe.preparing import Measurable, Prepared, prepare
from xmodel_steer.recipe.records import sites_record
from xmodel_steer.recipe.results import Result, doubts_of
from xmodel_steer.recipe.saving import UNFINISHED, save_or_spare
from xmodel_steer.recipe.selecting import Selected, one_layer, read_contrast, select
from xmodel_steer.recipe.settings import CONTRAST_READ, ONE_LAYER, Budget, GeneralText, Method, versions


@with_progress
def transfer(
    source: Any,
    target: Any,
    contrast: ContrastSet,
    texts: Prompts | GeneralText,
    *,
    behaviour: Measurable = Preference,
    label: str = "behaviour",
    source_sites: Sites | None = None,
    target_sites: Sites | None = None,
    method: Method = Method(),
    side: Mapping[str, Behaviour] | None = None,
    budget: Budget = Budget(),
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Carry a behaviour from one model into another and measure what survived.

    1. `prepare`: split the prompts; fit moments on general text; find the difference of means of the contrast prompts (or
       another direction) in the source, and in the target (native).
    2. `select`: choose the target's layer, the source's layer and the headline strength on validation prompts and text.
    3. `match_damage`: find for every arm the strength that disturbs neutral text as much as the native vector does at the
       headline strength. Every vector has the native vector's norm in standardised coordinates.
    4. `measure`: run every arm at every strength, and at equal damage, on evaluation prompts; KL and perplexity on neutral
       text that chose nothing. The verdict is read at equal damage.

    Args:
        source: The model that the vector is found in.
        target: The model that it is carried to.
        contrast: Prompts with and without the behaviour.
        texts: General text for the map; more than 50,000 tokens is better. Its last tenth (3 to 48 documents) is kept out of the map,
            for KL and perplexity. Or a `GeneralText`, with neutral text or moments of your own.
        behaviour: What is measured, such as `GeneratedText(prompts, scorer)`: a third of its prompts chooses layers and strength. Or
            a function that makes it of held-out contrast prompts: `Preference`, or `AnswerLogOdds.from_contrast` for
            pairs that end with two answers to one question.
        label: Name of the behaviour.
        source_sites: Candidates, each a site or a `Stack`; by default 1/2, 5/8 and 3/4 of the depth, and a stack of seven.
        target_sites: Candidates; by default at 3/8, 1/2 and 5/8 of the depth.
        method: How the vector is found, carried and applied.
        side: Other behaviours to measure on every arm at equal KL: that the capability stays
            (`MultipleChoice.packaged`, the default), that other prompts do not trigger it, ... Empty: none.
        budget: How much is read and measured.
        folder: Save the result there. What is computed is kept there as it goes, so that the same call continues a run that
            was interrupted.
        seed: Seed of all splits.
        progress: Show one bar for the whole, and beforehand what will be done and about how long it will take; see `quiet`.

    Returns:
        The result.

    Raises:
        PromptError: Sets are too small or share a text, the fitter needs rows, or moments have no shuffled control.
        AlignmentError: The models' tokens do not pair.
        NonFiniteError: A model gives NaN.
        ArtifactError: The folder holds something else, or cannot be written.
    """
    behaviours = {"common knowledge": MultipleChoice.packaged()} if side is None else dict(side)
    place = None if folder is None else Path(folder)
    if place is not None:
        claim(place, "Result", also={UNFINISHED})
    with resumable(place / UNFINISHED) if place else nullcontext(), stages(f"transfer {label}", 4) as begin:
        begin("prepare")
        prepared = prepare(
            source, target, contrast, texts, behaviour=behaviour, label=label, source_sites=source_sites,
            target_sites=target_sites, method=method, budget=budget, seed=seed, cached=place is not None,
        )  # fmt: skip
        tell(plan(prepared, behaviours))
        begin("select layers and strength")
        recipes, chosen = _selected(prepared)
        begin("match damage")
        runs, doses = _matched(prepared, recipes)
        begin("measure")
        arms = measure(prepared, runs, behaviours)
        result = _result(prepared, recipes, chosen, doses, arms, behaviours)
        if place is not None:
            save_or_spare(result, place)
    return result


def _selected(prepared: Prepared) -> tuple[dict[str, Selected], dict[str, dict[str, Any]]]:
    """Return the choices of every recipe, and their records; tell the doubts."""
    chosen = select(prepared)
    recipes = {prepared.label: chosen}
    for name in prepared.method.recipes:
        more = {ONE_LAYER: one_layer, CONTRAST_READ: read_contrast}[name](prepared, chosen)
        if more is not None:
            recipes[f"{prepared.label}, {name}"] = more
    chosen = {recipe: _choice(prepared, selected) for recipe, selected in recipes.items()}
    for line in doubts_of(chosen):
        tell(line)
    return recipes, chosen


def _matched(prepared: Prepared, recipes: Mapping[str, Selected]) -> tuple[list[Run], dict[str, list[dict[str, Any]]]]:
    """List the runs of every recipe, and the records of their strengths."""
    runs: list[Run] = []
    doses: dict[str, list[dict[str, Any]]] = {}
    for recipe, selected in recipes.items():
        arms = selected.arms(prepared.budget.random_seeds, prepared.seed)
        if runs:  # all have the same random vectors
            del arms["random"]
        more, doses[recipe] = match_damage(prepared, arms, selected.headline, recipe)
        shared = [replace(run, recipe=recipe) for run in runs if run.arm == "random" and run.recipe == prepared.label]
        runs += (more[1:] if runs else more) + shared
    return runs, doses


def _choice(prepared: Prepared, selected: Selected) -> dict[str, Any]:
    """Record what was chosen, and how well the vector was carried."""
    similarity, fitted = selected.similarity(), map_record(selected.mapping, selected.moments)
    pair = selected.moments.pair(selected.source.space.site, selected.native.space.site)
    return {
        "unit": prepared.evaluation.unit,
        **sites_record(selected.source.space.site, selected.native.space.site),
        "strength": selected.headline,
        "operator": repr(Add(selected.headline)),
        "cosine": similarity["mapped"]["cosine"],
        "norm_ratio": similarity["mapped"]["norm_ratio"],
        "map_r2": fitted.get("r2"),
        "similarity": similarity,
        "map": fitted | Knowledge.record(selected.mapping, pair, selected.source),
    }


def _vectors(recipes: Mapping[str, Selected], seed: int) -> dict[str, SteeringVector]:
    """Name the vectors of each recipe."""
    vectors = {}
    for recipe, selected in recipes.items():
        arms = selected.arms(1, seed)
        prefix = f"{recipe}: " if len(recipes) > 1 else ""
        vectors[f"{prefix}source"] = selected.source
        vectors |= {f"{prefix}{name}": arms[name][0] for name in ("native", "mapped", "shuffled")}
    return vectors


def _result(
    prepared: Prepared,
    recipes: Mapping[str, Selected],
    chosen: Mapping[str, dict[str, Any]],
    doses: Mapping[str, list[dict[str, Any]]],
    arms: tuple[Arm, ...],
    side: Mapping[str, Behaviour],
) -> Result:
    """Record what was measured, and how it was made."""
    label, budget, method, seed = prepared.label, prepared.budget, prepared.method, prepared.seed
    selected = recipes[label]
    return Result(
        name=label,
        unit=prepared.evaluation.unit,
        source=_end(prepared.source, selected.source.space.site),
        target=_end(prepared.target, selected.native.space.site),
        arms=arms,
        chosen={recipe: chosen[recipe] | {"equal_kl": doses[recipe]} for recipe in recipes},
        validation=selected.records,
        spec={
            "source_sites": [str(site) for site in prepared.sources],
            "target_sites": [str(site) for site in prepared.natives],
            **{name: list(value) if isinstance(value, tuple) else value for name, value in vars(budget).items()},
            "tokens": method.tokens if isinstance(method.tokens, str) else list(method.tokens),
            "direction": getattr(method.direction, "__name__", repr(method.direction)),
            "positions": method.positions if isinstance(method.positions, str | tuple) else "mask",
            "fitter": repr(method.fitter),
            **({"recipes": list(method.recipes)} if method.recipes else {}),
            **({"instructions": list(method.instructions)} if any(method.instructions) else {}),
            "scorer": _scorer(prepared.evaluation),
            "max_new_tokens": getattr(prepared.evaluation, "max_new_tokens", None),
            "neutral_documents": len(prepared.text.reported),
            "side": {name: behaviour.unit for name, behaviour in side.items()},
        },
        splits=prepared.splits,
        seeds={
            "split": seed,
            "random": [seed + k for k in range(budget.random_seeds)],
            "moments": prepared.moments.settings.get("seed", seed),
        },
        versions=versions(),
        prompts=prepared.prompts,
        vectors=_vectors(recipes, seed),
        maps={recipe: chosen.mapping for recipe, chosen in recipes.items()},
    )


def _scorer(behaviour: Behaviour) -> Any:
    if not isinstance(behaviour, GeneratedText):
        return type(behaviour).__name__
    scorer = behaviour.scorer
    return scorer.record() if isinstance(scorer, Explained) else repr(scorer)[:200]


def _end(model: Any, site: Site) -> dict[str, Any]:
    space = space_of(model, site)
    return {
        **space.to_dict(),
        "hook": site.hook_name,
        "layers": model.cfg.n_layers,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
    }


_MAP_KEYS = ("fitter", "coordinates", "penalty", "penalty_path", "rank", "size")


def map_record(mapping: Map, moments: Moments) -> dict[str, Any]:
    """Record how a map was fitted, and how well it does on test documents."""
    score = mapping.score_test
    record = {
        **{key: mapping.info[key] for key in _MAP_KEYS if key in mapping.info},
        "coverage": moments.coverage,
        "tokens": moments.tokens,
        "documents": moments.documents,
        "train_tokens": moments.parts["train"].count,
    }
    if score is not None:
        r2 = score.r2.double()
        if r2.isnan().all():  # the target does not vary on the test documents
            low = middle = high = np.nan
        else:
            low, middle, high = np.nanquantile(r2.cpu().numpy(), [0.05, 0.5, 0.95]).tolist()
        record |= {
            "r2": score.mean_r2,
            "r2_median": middle,
            "r2_low": low,
            "r2_high": high,
            "cosine": score.cosine,
            "norm_ratio": score.norm_ratio,
            "test_tokens": score.count,
            "test_documents": score.documents,
        }
        record |= {"loss": mapping.info["loss"]} if "loss" in mapping.info else {}
    return record

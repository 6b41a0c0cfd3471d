"""The whole recipe: a vector from the source, a map, the vector in the target, every control.

All arms run through the same code. Layers and the headline strength are chosen on validation
prompts and validation text; what is reported comes from prompts and text that chose nothing.
"""

import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor

from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.activations.reading import Tokens, capture
from xmodel_steer.core.bars import with_progress
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.directions import Direction, difference_of_means, random_like, require_random
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts, require_disjoint
from xmodel_steer.core.prompts import Prompt, Prompts
from xmodel_steer.core.spaces import Site, Sites, as_sites, require_same_space
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.behaviours.generated import Behaviour, GeneratedText
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice, Preference
from xmodel_steer.evaluation.calibration import LEAST, calibrate
from xmodel_steer.evaluation.damage import SideEffect, neutral_positions, on_neutral, side_effects
from xmodel_steer.evaluation.scorers.text import Explained, Scorer
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.anchors import RelativeAnchors
from xmodel_steer.maps.controls import ShuffledPairs, pinned
from xmodel_steer.maps.descent import Trained
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.pairs import PARTS
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.maps.statistics import bootstrap_mean, quotient
from xmodel_steer.models.facts import context_length, dtype_of, name_of
from xmodel_steer.models.sites import space_of
from xmodel_steer.recipe.arms import Arm, joined_arm
from xmodel_steer.recipe.results import TransferResult


@dataclass(frozen=True, eq=False)
class _Run:
    """One seed of one arm at one strength, to be measured."""

    arm: str
    strength: float
    setting: list[Intervention]
    budget: float | None = None
    reached: bool = True


@with_progress
def transfer(
    source: Any,
    target: Any,
    contrast: ContrastSet,
    texts: Prompts,
    *,
    prompts: Prompts | None = None,
    scorer: Scorer | None = None,
    held_out: Callable[[ContrastSet], Behaviour] = Preference,
    label: str = "behaviour",
    unit: str = "score",
    source_sites: Sites | None = None,
    target_sites: Sites | None = None,
    strengths: Sequence[float] = (-2.0, -1.0, 1.0, 2.0),
    tokens: Tokens = "mean",
    direction: Direction = difference_of_means,
    positions: Positions = "all",
    fitter: Fitter = Ridge(),
    moments: Moments | None = None,
    neutral_texts: Prompts | None = None,
    side: Mapping[str, Behaviour] | None = None,
    fixed: bool = True,
    random_seeds: int = 5,
    max_new_tokens: int = 24,
    map_tokens: int = 192,
    neutral_tokens: int = 32,
    batch_size: int = 192,
    max_perplexity_ratio: float = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> TransferResult:
    """Carry a behaviour from one model into another and measure what survived.

    1. Difference of means of the contrast prompts (or another ``direction``) in the source, and in the target (native).
    2. A map fitted on general text, with a control fitted on shuffled pairs.
    3. Target layer: where the native vector steers best on validation prompts. Source layer:
       whose mapped vector steers best there. Headline strength: where the mapped vector steers
       best while perplexity stays within bounds. All on validation prompts and text.
    4. Every arm at every strength, of both signs, on evaluation prompts; every vector scaled to the native
       vector's norm in standardised coordinates; KL and perplexity on neutral text beside it.
    5. Every arm again at equal damage: at the strengths that disturb validation text by the KL of the native
       vector at the headline strength. The verdict is read there.

    Args:
        source: The model that the vector is found in.
        target: The model that it is carried to.
        contrast: Prompts with and without the behaviour.
        texts: General text for the map; more than 50,000 tokens is better. Read once.
        prompts: What the target continues, to be scored; a third chooses layers and strength.
            Without them the behaviour is measured on held-out contrast prompts.
        scorer: Reads the behaviour in a text; goes with ``prompts``.
        held_out: What is measured on held-out contrast prompts: `Preference`, or `AnswerLogOdds.from_contrast` for
            pairs that end with two answers to one question.
        label: Name of the behaviour.
        unit: What the scorer's number means.
        source_sites: Candidates; by default at 1/2, 5/8 and 3/4 of the depth.
        target_sites: Candidates; by default at 3/8, 1/2 and 5/8 of the depth.
        strengths: Strengths to run; give both signs.
        tokens: Which tokens of a contrast prompt count; see `capture`.
        direction: Makes a vector of the two sides' rows, in both models: `difference_of_means`, `logistic_probe`, or a
            function of your own of two `Activations` and a ``label``.
        positions: Where to steer; see `Intervention`. Neutral text is steered at every token, or where a mask says how many, at as many
            from its second token on.
        fitter: Fits the map.
        moments: Moments collected earlier for these sites. ``texts`` is then not read by the models; give what they were collected from,
            and it is held apart from all else and recorded as ever.
        neutral_texts: Text for KL and perplexity; by default the last tenth of ``texts``, at most 48, kept out of the map.
        side: Other behaviours to measure beside this one on every arm at equal KL, by name: that the capability stays
            (`MultipleChoice.packaged`, the default), that other prompts do not trigger it, ...
        fixed: Run every arm at ``strengths`` too. Without it only the native vector is, and the others at its KL alone,
            which takes about half the time.
        random_seeds: Number of random vectors.
        max_new_tokens: Length of the continuations.
        map_tokens: Tokens read of each document for the map, within both models' contexts.
        neutral_tokens: Tokens read of each neutral text.
        batch_size: Texts generated at a time; forward passes over whole texts take at most 32.
        max_perplexity_ratio: Bound on perplexity over the unsteered one, for the choices.
        seed: Seed of all splits.
        progress: Show progress bars; see `quiet`.

    Raises:
        PromptError: Sets are too small, not disjoint, prompts come without a scorer, or the fitter needs rows,
            or moments have no shuffled control.
        AlignmentError: The models' tokens do not pair.
        NonFiniteError: A model gives NaN.
        ValueError: No strength is positive, one is 0, there is no random vector, or a mask of positions has rows.
    """
    if not any(s > 0 for s in strengths) or 0 in strengths:
        raise ValueError(f"transfer: strengths must include a positive one and not 0, got {tuple(strengths)}")
    require_random("transfer", random_seeds)
    inner = fitter.fitter if isinstance(fitter, ShuffledPairs) else fitter
    if isinstance(inner, (RelativeAnchors, Trained)):
        raise PromptError(
            f"transfer: {type(inner).__name__} is fitted on rows, transfer collects moments; give Ridge(), ReducedRank(...) or Procrustes()"
        )
    neutral_positions(positions)  # refuses a mask of rows: prompts are split here
    strengths = tuple(sorted({float(s) for s in strengths}))
    chosen_sources = as_sites(() if source_sites is None else source_sites) or default_sites(source, "source")
    chosen_targets = as_sites(() if target_sites is None else target_sites) or default_sites(target, "target")
    text_items = as_prompts(texts, what="transfer: texts")
    neutral = as_prompts(neutral_texts, what="transfer: neutral_texts") if neutral_texts is not None else ()
    fit_set, (validation, validating), (evaluation, reporting) = _behaviours(
        contrast, prompts, scorer, held_out, unit=unit, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
    )
    if moments is None and not neutral:  # the last texts stay out of the map
        text_items, neutral = hold_out_neutral(text_items)
    elif not neutral:
        raise PromptError("transfer: moments were given without texts; give neutral_texts for KL and perplexity")
    require_disjoint(
        "transfer",
        {
            "contrast": [p.content_key() for p in fit_set.positive + fit_set.negative],
            "map text": [p.content_key() for p in text_items],
            "neutral text": [p.content_key() for p in neutral],
            "validation": [p.content_key() for p in validating],
            "evaluation": [p.content_key() for p in reporting],
        },
    )
    half = len(neutral) // 3
    if half < 1:
        raise PromptError(f"transfer: needs at least 3 neutral texts, got {len(neutral)}")
    neutral_validation, neutral_evaluation = neutral[:half], neutral[half:]
    if moments is None:
        moments = collect_moments(
            source,
            target,
            text_items,
            source_sites=chosen_sources,
            target_sites=chosen_targets,
            max_tokens=min(map_tokens, context_length(source), context_length(target)),
            batch_size=min(batch_size, 32),
            seed=seed,
        )

    for model, sites, own in ((source, chosen_sources, moments.source), (target, chosen_targets, moments.target)):
        for site in sites:
            if site in own:  # one that was not collected is refused by moments.pair below
                require_same_space(space_of(model, site), own[site], f"transfer with moments, {name_of(model)}")
    for there, here in itertools.product(chosen_sources, chosen_targets):
        if moments.pair(there, here).control is None:  # refused before anything is generated
            raise PromptError(
                f"transfer: the moments of {there} and {here} were collected without the shuffled control; "
                "collect them with shuffled=True"
            )
    source_vectors = _vectors(source, fit_set, chosen_sources, tokens, direction, label, min(batch_size, 32))
    natives = {
        site: vector.with_scale(moments.scale(site))
        for site, vector in _vectors(
            target, fit_set, chosen_targets, tokens, direction, label, min(batch_size, 32)
        ).items()
    }

    def steer(vector: SteeringVector, strength: float) -> list[Intervention]:
        return [Intervention(vector, Add(strength), positions)]

    def damage(settings: Sequence[Sequence[Intervention]], texts: Sequence[Prompt]) -> list[SideEffect]:
        return side_effects(
            target,
            on_neutral(settings),
            texts,
            max_tokens=neutral_tokens,
            batch_size=min(16, batch_size),
        )

    def gains(candidates: Mapping[Any, SteeringVector], at: Sequence[float]) -> list[dict[str, Any]]:
        """On validation: half the difference that the two signs make, and the damage."""
        keys = [(key, strength) for key in candidates for strength in at]
        settings = [steer(candidates[key], sign * s) for key, s in keys for sign in (1, -1)]
        effects = damage([[], *settings], neutral_validation)
        measured = validation.measure(target, settings)
        records = []
        for i, (key, strength) in enumerate(keys):
            up, down = (measured[2 * i + k].scores.mean() for k in (0, 1))
            ratio = max(effects[1 + 2 * i + k].perplexity for k in (0, 1)) / effects[0].perplexity
            records.append(
                {
                    "candidate": str(key),
                    "key": key,
                    "strength": strength,
                    "gain": float(up - down) / 2,
                    "perplexity_ratio": ratio,
                }
            )
        return records

    def best(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        allowed = [r for r in records if r["perplexity_ratio"] < max_perplexity_ratio]
        if not allowed:
            return min(records, key=lambda r: r["perplexity_ratio"])
        return max(allowed, key=lambda r: -np.inf if np.isnan(r["gain"]) else r["gain"])  # NaN is never the best

    selection: dict[str, Any] = {}
    target_site = chosen_targets[0]
    if len(chosen_targets) > 1:
        records = gains(natives, [1.0])
        target_site = best(records)["key"]
        selection["target"] = [{k: v for k, v in r.items() if k != "key"} for r in records]
    native = natives[target_site]
    norm = native.norm(standardised=True)
    maps = {site: fitter.fit(moments.pair(site, target_site)) for site in chosen_sources}
    transported = {site: maps[site].transport(source_vectors[site]) for site in chosen_sources}
    scaled = {site: vector.with_norm(norm) for site, vector in transported.items()}
    source_site = chosen_sources[0]
    if len(chosen_sources) > 1:
        records = gains(scaled, [1.0])
        source_site = best(records)["key"]
        selection["source"] = [{k: v for k, v in r.items() if k != "key"} for r in records]
    mapping, mapped = maps[source_site], scaled[source_site]
    headline = max(s for s in strengths if s > 0)
    positive = [s for s in strengths if s > 0]
    if len(positive) > 1:
        seen = [r for r in selection.get("source", []) if r["candidate"] == str(source_site) and 1.0 in positive]
        records = seen + gains({source_site: mapped}, [s for s in positive if s != 1.0 or not seen])
        headline = best(records)["strength"]
        selection["strength"] = sorted(
            ({k: v for k, v in r.items() if k != "key"} for r in records), key=lambda r: r["strength"]
        )

    shuffled_map = ShuffledPairs(pinned(fitter, mapping)).fit(moments.pair(source_site, target_site))
    shuffled_raw = shuffled_map.transport(source_vectors[source_site])
    randoms = [random_like(native, seed=seed + k) for k in range(random_seeds)]
    vectors = {"native": [native], "mapped": [mapped], "random": randoms, "shuffled": [shuffled_raw.with_norm(norm)]}

    runs = [_Run("unsteered", 0.0, [])]
    runs += [
        _Run(arm, s, steer(v, s))
        for arm, group in vectors.items()
        if fixed or arm == "native"
        for s in strengths
        for v in group
    ]
    signs = [sign for sign in (1, -1) if sign * headline in strengths]
    disturbed = damage([steer(native, sign * headline) for sign in signs], neutral_validation)
    budgets = [max(effect.mean_kl, LEAST) for effect in disturbed]
    runs += [
        _Run("native", sign * headline, steer(native, sign * headline), kl)
        for sign, kl in zip(signs, budgets, strict=True)
    ]
    searched = [
        (arm, vector, sign, kl)
        for arm, group in vectors.items()
        if arm != "native"
        for sign, kl in zip(signs, budgets, strict=True)
        for vector in group
    ]
    doses = calibrate(
        target,
        [vector for _, vector, _, _ in searched],
        [kl for *_, kl in searched],
        neutral_validation,
        signs=[sign for _, _, sign, _ in searched],
        positions=neutral_positions(positions),
        max_tokens=neutral_tokens,
        batch_size=min(16, batch_size),
    )
    for (arm, vector, _, kl), dose in zip(searched, doses, strict=True):
        runs.append(_Run(arm, dose.strength, steer(vector, dose.strength), kl, dose.reached))
    selection["equal_kl"] = [
        {"arm": arm, "budget": kl, "vector": vector.label, **vars(dose)}
        for (arm, vector, _, kl), dose in zip(searched, doses, strict=True)
    ]
    effects = damage([run.setting for run in runs], neutral_evaluation)
    beside = {"common knowledge": MultipleChoice.packaged()} if side is None else dict(side)
    arms = _measured(runs, effects, evaluation, beside, target)

    similarity = {
        name: {
            "cosine": native.cosine(vector),
            "norm_ratio": quotient(vector.norm(standardised=True), norm),
            "raw_cosine": native.cosine(vector, standardised=False),
        }
        for name, vector in (("mapped", transported[source_site]), ("shuffled", shuffled_raw))
    }
    return TransferResult(
        label=label,
        unit=evaluation.unit,
        source=_end(source, source_site),
        target=_end(target, target_site),
        map=_map_record(mapping, moments),
        arms=arms,
        headline=headline,
        selection=selection,
        similarity=similarity,
        vectors={
            "source": source_vectors[source_site].with_scale(moments.scale(source_site, end="source")),
            "native": native,
            "mapped": mapped,
            "shuffled": vectors["shuffled"][0],
        },
        mapping=mapping,
        spec={
            "source_sites": [str(s) for s in chosen_sources],
            "target_sites": [str(s) for s in chosen_targets],
            "strengths": list(strengths),
            "fixed": fixed,
            "tokens": tokens if isinstance(tokens, str) else list(tokens),
            "direction": getattr(direction, "__name__", repr(direction)),
            "positions": "mask" if isinstance(positions, Tensor) else positions,
            "fitter": repr(fitter),
            "random_seeds": random_seeds,
            "max_new_tokens": max_new_tokens,
            "map_tokens": map_tokens,
            "neutral_tokens": neutral_tokens,
            "batch_size": batch_size,
            "max_perplexity_ratio": max_perplexity_ratio,
            "neutral_predicted_tokens": int(effects[0].tokens.sum()),
            "scorer": scorer.record()
            if isinstance(scorer, Explained)
            else repr(scorer)[:200]
            if scorer
            else type(evaluation).__name__,
            "side": {name: own.unit for name, own in beside.items()},
        },
        splits={
            "contrast": [p.id for p in fit_set.positive + fit_set.negative],
            **({"map_text": [p.id for p in text_items]} if text_items else {}),
            "validation": list(validation.ids),
            "evaluation": list(evaluation.ids),
            "neutral_validation": [p.id for p in neutral_validation],
            "neutral_evaluation": [p.id for p in neutral_evaluation],
            "evaluation_texts": [p.content[:300] for p in reporting[:16]],
            "map_documents": {name: moments.parts[name].documents for name in PARTS},
        },
        versions=versions(),
        seeds={
            "split": seed,
            "random": [seed + k for k in range(random_seeds)],
            "moments": moments.settings.get("seed", seed),
        },
    )


def hold_out_neutral(texts: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Text for the map, and the last tenth (3 to 48 documents) for KL and perplexity."""
    kept = max(3, min(48, len(texts) // 10))
    return tuple(texts[:-kept]), tuple(texts[-kept:])


def default_sites(model: Any, end: str) -> list[Site]:
    """Candidate sites: at 1/2, 5/8 and 3/4 of a source's depth, at 3/8, 1/2 and 5/8 of a target's.

    A concept is read best after it was worked out, and written best before it is used.
    """
    layers = model.cfg.n_layers
    depths = (0.5, 0.625, 0.75) if end == "source" else (0.375, 0.5, 0.625)
    return [Site(layer) for layer in sorted({min(layers - 1, round(d * layers)) for d in depths})]


def _behaviours(
    contrast: ContrastSet,
    prompts: Prompts | None,
    scorer: Scorer | None,
    held_out: Callable[[ContrastSet], Behaviour],
    *,
    unit: str,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> tuple[ContrastSet, tuple[Behaviour, tuple[Prompt, ...]], tuple[Behaviour, tuple[Prompt, ...]]]:
    """Make the contrast set, and the behaviour on validation and evaluation prompts."""
    if (prompts is None) != (scorer is None):
        raise PromptError(
            "transfer: prompts and scorer go together: give both, or neither to measure preference on held-out contrast prompts"
        )
    if prompts is None or scorer is None:
        fit_set, *others = contrast.split((0.5, 0.2, 0.3), seed=seed)
        validation, evaluation = ((held_out(own), own.positive + own.negative) for own in others)
        return fit_set, validation, evaluation
    items = as_prompts(prompts, what="transfer: prompts")
    distinct = list({p.content_key(): p for p in items}.values())
    order = np.random.default_rng(seed).permutation(len(distinct))
    third = len(distinct) // 3
    if third < 1 or len(distinct) < 3:
        raise PromptError(
            f"transfer: needs at least 3 prompts (a third validates, the rest evaluates), got {len(distinct)}"
        )

    def behaviour(indices: Sequence[int]) -> tuple[Behaviour, tuple[Prompt, ...]]:
        own = tuple(distinct[i] for i in indices)
        return GeneratedText(own, scorer, max_new_tokens, batch_size, unit), own

    return contrast, behaviour(order[:third].tolist()), behaviour(order[third:].tolist())


def _vectors(
    model: Any,
    contrast: ContrastSet,
    sites: Sequence[Site],
    tokens: Tokens,
    direction: Direction,
    label: str,
    batch_size: int,
) -> dict[Site, SteeringVector]:
    def side(prompts: tuple[Prompt, ...]) -> dict[Site, Activations]:
        return capture(model, prompts, sites, tokens=tokens, batch_size=batch_size)

    positive, negative = side(contrast.positive), side(contrast.negative)
    return {site: direction(positive[site], negative[site], label=label) for site in sites}


def _measured(
    runs: Sequence[_Run],
    effects: Sequence[SideEffect],
    evaluation: Behaviour,
    beside: Mapping[str, Behaviour],
    target: Any,
) -> tuple[Arm, ...]:
    """Measure every run, and join the seeds of the random arm.

    Side behaviours are measured unsteered and at equal KL alone. The native vector at the headline strength is there
    twice, as itself and as what sets the KL, and measured once.
    """
    keys = [(run.strength, *(id(step.vector) for step in run.setting)) for run in runs]
    settings = {key: run.setting for key, run in zip(keys, runs, strict=True)}
    place = {key: i for i, key in enumerate(settings)}
    main = evaluation.measure(target, list(settings.values()))
    fair = [i for i, run in enumerate(runs) if run.budget is not None or run.arm == "unsteered"]
    others = {
        name: dict(zip(fair, own.measure(target, [runs[i].setting for i in fair]), strict=True))
        for name, own in beside.items()
    }
    groups: dict[tuple[str, float | None, float], list[int]] = {}
    for i, run in enumerate(runs):
        # At equal KL every seed has a strength of its own: they belong together by direction.
        at = run.strength if run.budget is None else float(np.sign(run.strength))
        groups.setdefault((run.arm, run.budget, at), []).append(i)
    base = main[place[keys[0]]].scores
    made = []
    for (arm, budget, _), members in groups.items():
        own = [main[place[keys[i]]] for i in members]
        made.append(
            joined_arm(
                arm,
                [runs[i].strength for i in members],
                [m.scores for m in own],
                base,
                kl=[effects[i].mean_kl for i in members],
                perplexity=[effects[i].perplexity for i in members],
                agreement=[effects[i].agreement for i in members],
                budget=budget,
                reached=all(runs[i].reached for i in members),
                side={
                    name: bootstrap_mean(np.stack([found[i].scores for i in members], 1))
                    for name, found in others.items()
                    if members[0] in found
                },
                texts=own[0].texts,
                raw=own[0].raw,
            )
        )
    return tuple(made)


def _end(model: Any, site: Site) -> dict[str, Any]:
    space = space_of(model, site)
    return {
        **space.to_dict(),
        "hook": site.hook_name,
        "layers": model.cfg.n_layers,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
    }


_MAP_KEYS = ("fitter", "coordinates", "penalty", "penalty_path", "rank", "size")


def _map_record(mapping: Map, moments: Moments) -> dict[str, Any]:
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


def versions() -> dict[str, str]:
    """Versions of the programs that a result depends on."""
    names = ("xmodel-steer", "transformer-lens", "torch", "transformers", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found

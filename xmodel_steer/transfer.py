"""The whole recipe: a vector from the source, a map, the vector in the target, every control.

All arms run through the same code. Layers and the headline strength are chosen on validation
prompts and validation text; what is reported comes from prompts and text that chose nothing.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from xmodel_steer.capture import Tokens, capture, collect_moments
from xmodel_steer.damage import SideEffect, side_effects
from xmodel_steer.errors import PromptError
from xmodel_steer.evaluation import Behaviour, GeneratedText, Preference
from xmodel_steer.fitters import Fitter, Ridge, ShuffledPairs, pinned
from xmodel_steer.maps import Map
from xmodel_steer.metrics import Estimate, bootstrap_mean, resamples
from xmodel_steer.models import context_length, dtype_of, name_of, space_of
from xmodel_steer.moments import PARTS, Moments
from xmodel_steer.prompts import ContrastSet, Prompt, PromptLike, as_prompts
from xmodel_steer.scorers import Scorer
from xmodel_steer.spaces import Site, require_same_space
from xmodel_steer.steering import Add, Intervention, Positions
from xmodel_steer.vectors import Activations, SteeringVector, difference_of_means, random_like

ARMS = ("unsteered", "native", "mapped", "random", "shuffled")


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm at one strength.

    Args:
        arm: ``unsteered``, ``native`` (the target's own difference of means: the ceiling),
            ``mapped``, ``random`` (all seeds together) or ``shuffled`` (a map fitted on shuffled
            pairs).
        strength: In units of the native vector's norm in standardised coordinates.
        effect: Mean score, with a bootstrap interval over prompts.
        change: Mean of the paired difference from the unsteered model, with its interval.
        kl: KL from the unsteered model on neutral text, nats per token.
        perplexity: Perplexity of neutral text.
        scores: Score of each prompt (the mean over seeds, for ``random``).
        seeds: For ``random``: the mean score of each seed.
        texts: The generated texts (of the first seed, for ``random``).
    """

    arm: str
    strength: float
    effect: Estimate
    change: Estimate
    kl: float
    perplexity: float
    scores: tuple[float, ...] = field(repr=False, default=())
    seeds: tuple[float, ...] = ()
    texts: tuple[str, ...] = field(repr=False, default=())


@dataclass(frozen=True, eq=False)
class TransferResult:
    """Everything that a transfer found, and how it was made.

    Args:
        label: Name of the behaviour.
        unit: What the effect is measured in.
        source: The source model and site.
        target: The target model and site.
        map: How the map was fitted and how well it does on test documents.
        arms: Every arm at every strength.
        headline: The strength chosen on validation.
        selection: What validation measured to choose layers and strength.
        similarity: Cosine to the native vector and norm ratio before rescaling, both in
            standardised coordinates, for the mapped and the shuffled vector.
        vectors: The vectors, by name.
        mapping: The map.
        spec: All arguments.
        splits: Ids of the prompts and documents of each set.
        versions: Versions of the programs.
        seeds: All seeds.
    """

    label: str
    unit: str
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    map: Mapping[str, Any]
    arms: tuple[Arm, ...]
    headline: float
    selection: Mapping[str, Any]
    similarity: Mapping[str, Any]
    vectors: Mapping[str, SteeringVector] = field(repr=False)
    mapping: Map | None = field(repr=False)
    spec: Mapping[str, Any] = field(repr=False)
    splits: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    seeds: Mapping[str, Any] = field(repr=False)

    def arm(self, name: str, strength: float) -> Arm:
        """The arm of a name at a strength.

        Raises:
            KeyError: It was not run.
        """
        for arm in self.arms:
            if arm.arm == name and (name == "unsteered" or arm.strength == strength):
                return arm
        raise KeyError(
            f"{name} at strength {strength:g} was not run; strengths: {sorted({a.strength for a in self.arms})}"
        )

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths that were run, ascending, without 0."""
        return tuple(sorted({a.strength for a in self.arms if a.arm != "unsteered"}))

    def verdict(self) -> "Verdict":
        """What survived, at the headline strength and at equal KL."""
        return _verdict(self)

    def to_frame(self) -> Any:
        """One row per arm and strength, as a pandas frame."""
        import pandas as pd

        return pd.DataFrame([arm_record(arm) for arm in self.arms])


def arm_record(arm: Arm) -> dict[str, Any]:
    """An arm as plain JSON values, without texts and single scores."""
    return {
        "arm": arm.arm,
        "strength": arm.strength,
        "effect": arm.effect.value,
        "low": arm.effect.low,
        "high": arm.effect.high,
        "n": arm.effect.n,
        "change": arm.change.value,
        "change_low": arm.change.low,
        "change_high": arm.change.high,
        "kl": arm.kl,
        "perplexity": arm.perplexity,
        **({"seeds": list(arm.seeds)} if arm.seeds else {}),
    }


@dataclass(frozen=True)
class Verdict:
    """The result in a few numbers, all from evaluation prompts.

    Args:
        strength: The headline strength.
        ratio: Effect of the mapped vector over that of the native one, at equal KL: difference of
            the two directions, mapped over native, with a bootstrap interval over prompts;
            None where the native vector does nothing.
        kl: The KL of the native vector at the headline strength, for each sign, at which the
            ratio is taken.
        separated: For each sign, whether the mapped arm's interval excludes those of the random and
            the shuffled arm at the headline strength and lies on its own side of theirs.
        perplexity_ratio: For each sign, perplexity of neutral text over the unsteered one.
        text: One sentence.
    """

    strength: float
    ratio: Estimate | None
    kl: Mapping[str, float]
    separated: Mapping[str, bool]
    perplexity_ratio: Mapping[str, float]
    text: str


def transfer(
    source: Any,
    target: Any,
    contrast: ContrastSet,
    texts: Iterable[PromptLike],
    *,
    prompts: Iterable[PromptLike] | None = None,
    scorer: Scorer | None = None,
    label: str = "behaviour",
    unit: str = "score",
    source_sites: Sequence[Site] | None = None,
    target_sites: Sequence[Site] | None = None,
    strengths: Sequence[float] = (-2.0, -1.0, 1.0, 2.0),
    tokens: Tokens = "mean",
    positions: Positions = "all",
    fitter: Fitter = Ridge(),
    moments: Moments | None = None,
    neutral_texts: Iterable[PromptLike] | None = None,
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

    1. Difference of means of the contrast prompts in the source, and in the target (native).
    2. A map fitted on general text, with a control fitted on shuffled pairs.
    3. Target layer: where the native vector steers best on validation prompts. Source layer:
       whose mapped vector steers best there. Headline strength: where the mapped vector steers
       best while perplexity stays within bounds. All on validation prompts and text.
    4. Every arm at every strength, of both signs, on evaluation prompts; every vector scaled to the native
       vector's norm in standardised coordinates; KL and perplexity on neutral text beside it.

    Args:
        source: The model that the vector is found in.
        target: The model that it is carried to.
        contrast: Prompts with and without the behaviour.
        texts: General text for the map; more than 50,000 tokens is better. Read once.
        prompts: What the target continues, to be scored; a third chooses layers and strength.
            Without them the behaviour is measured as `Preference` on held-out contrast prompts.
        scorer: Reads the behaviour in a text; goes with ``prompts``.
        label: Name of the behaviour.
        unit: What the scorer's number means.
        source_sites: Candidates; by default at 1/2, 5/8 and 3/4 of the depth.
        target_sites: Candidates; by default at 3/8, 1/2 and 5/8 of the depth.
        strengths: Strengths to run; give both signs.
        tokens: Which tokens of a contrast prompt count; see `capture`.
        positions: Where to steer; see `Intervention`.
        fitter: Fits the map.
        moments: Moments collected earlier for these sites; ``texts`` is then not read.
        neutral_texts: Text for KL and perplexity; by default the last tenth of ``texts``, at most 48, kept out of the map.
        random_seeds: Number of random vectors.
        max_new_tokens: Length of the continuations.
        map_tokens: Tokens read of each document for the map, within both models' contexts.
        neutral_tokens: Tokens read of each neutral text.
        batch_size: Texts generated at a time; forward passes over whole texts take at most 32.
        max_perplexity_ratio: Bound on perplexity over the unsteered one, for the choices.
        seed: Seed of all splits.
        progress: Show progress bars.

    Raises:
        PromptError: Sets are too small, not disjoint, or prompts come without a scorer.
        AlignmentError: The models' tokens do not pair.
        NonFiniteError: A model gives NaN.
    """
    if not any(s > 0 for s in strengths) or 0 in strengths:
        raise ValueError(f"transfer: strengths must include a positive one and not 0, got {tuple(strengths)}")
    strengths = tuple(sorted({float(s) for s in strengths}))
    chosen_sources = tuple(source_sites or default_sites(source, "source"))
    chosen_targets = tuple(target_sites or default_sites(target, "target"))
    text_items = () if moments is not None else as_prompts(list(texts))
    neutral = as_prompts(list(neutral_texts)) if neutral_texts is not None else ()
    fit_set, validation, evaluation = _behaviours(
        contrast, prompts, scorer, unit=unit, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
    )
    if moments is None and not neutral:  # the last texts stay out of the map
        text_items, neutral = hold_out_neutral(text_items)
    elif not neutral:
        raise PromptError("transfer: moments were given without texts; give neutral_texts for KL and perplexity")
    _require_disjoint(
        {
            "contrast": [p.content_key() for p in fit_set.positive + fit_set.negative],
            "map text": [p.content_key() for p in text_items],
            "neutral text": [p.content_key() for p in neutral],
            "validation": _contents(validation),
            "evaluation": _contents(evaluation),
        }
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
            progress=progress,
        )

    for model, sites, own in ((source, chosen_sources, moments.source), (target, chosen_targets, moments.target)):
        for site in sites:
            if site in own:  # one that was not collected is refused by moments.pair
                require_same_space(space_of(model, site), own[site], f"transfer with moments, {name_of(model)}")
    source_vectors = _vectors(source, fit_set, chosen_sources, tokens, label, min(batch_size, 32), progress)
    natives = {
        site: vector.with_scale(moments.scale(site))
        for site, vector in _vectors(
            target, fit_set, chosen_targets, tokens, label, min(batch_size, 32), progress
        ).items()
    }

    def steer(vector: SteeringVector, strength: float) -> list[Intervention]:
        return [Intervention(vector, Add(strength), positions)]

    def damage(settings: Sequence[Sequence[Intervention]], texts: Sequence[Prompt]) -> list[SideEffect]:
        return side_effects(
            target, settings, texts, max_tokens=neutral_tokens, batch_size=min(16, batch_size), progress=progress
        )

    def gains(candidates: Mapping[Any, SteeringVector], at: Sequence[float]) -> list[dict[str, Any]]:
        """On validation: half the difference that the two signs make, and the damage."""
        keys = [(key, strength) for key in candidates for strength in at]
        settings = [steer(candidates[key], sign * s) for key, s in keys for sign in (1, -1)]
        effects = damage([[], *settings], neutral_validation)
        measured = validation.measure(target, settings, progress=progress)
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
        return max(allowed, key=lambda r: r["gain"]) if allowed else min(records, key=lambda r: r["perplexity_ratio"])

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
        records = gains({source_site: mapped}, positive)
        headline = best(records)["strength"]
        selection["strength"] = [{k: v for k, v in r.items() if k != "key"} for r in records]

    shuffled_map = ShuffledPairs(pinned(fitter, mapping)).fit(moments.pair(source_site, target_site))
    shuffled_raw = shuffled_map.transport(source_vectors[source_site])
    randoms = [random_like(native, seed=seed + k) for k in range(random_seeds)]
    vectors = {"native": [native], "mapped": [mapped], "random": randoms, "shuffled": [shuffled_raw.with_norm(norm)]}

    settings: list[tuple[str, float, list[Intervention]]] = [("unsteered", 0.0, [])]
    settings += [(arm, s, steer(v, s)) for arm, group in vectors.items() for s in strengths for v in group]
    effects = damage([setting for _, _, setting in settings], neutral_evaluation)
    arms = _arms(settings, effects, evaluation, target, progress)

    similarity = {
        name: {
            "cosine": native.cosine(vector),
            "norm_ratio": vector.norm(standardised=True) / norm,
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
            "tokens": tokens if isinstance(tokens, str) else list(tokens),
            "positions": "mask" if isinstance(positions, Tensor) else positions,
            "fitter": repr(fitter),
            "random_seeds": random_seeds,
            "max_new_tokens": max_new_tokens,
            "map_tokens": map_tokens,
            "neutral_tokens": neutral_tokens,
            "batch_size": batch_size,
            "max_perplexity_ratio": max_perplexity_ratio,
            "neutral_predicted_tokens": int(effects[0].tokens.sum()),
            "scorer": repr(scorer)[:200] if scorer is not None else "Preference",
        },
        splits={
            "contrast": [p.id for p in fit_set.positive + fit_set.negative],
            "validation": list(validation.ids),
            "evaluation": list(evaluation.ids),
            "neutral_validation": [p.id for p in neutral_validation],
            "neutral_evaluation": [p.id for p in neutral_evaluation],
            "evaluation_texts": [content[:300] for content in _contents(evaluation)[:16]],
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
    prompts: Iterable[PromptLike] | None,
    scorer: Scorer | None,
    *,
    unit: str,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> tuple[ContrastSet, Behaviour, Behaviour]:
    """The contrast set for the vector, and the behaviour on validation and on evaluation units."""
    if (prompts is None) != (scorer is None):
        raise PromptError(
            "transfer: prompts and scorer go together: give both, or neither to measure preference on held-out contrast prompts"
        )
    if prompts is None or scorer is None:
        fit_set, validation, evaluation = contrast.split((0.5, 0.2, 0.3), seed=seed)
        return fit_set, Preference(validation), Preference(evaluation)
    items = as_prompts(list(prompts))
    distinct = list({p.content_key(): p for p in items}.values())
    order = np.random.default_rng(seed).permutation(len(distinct))
    third = len(distinct) // 3
    if third < 1 or len(distinct) < 3:
        raise PromptError(
            f"transfer: needs at least 3 prompts (a third validates, the rest evaluates), got {len(distinct)}"
        )

    def behaviour(indices: Sequence[int]) -> GeneratedText:
        return GeneratedText(tuple(distinct[i] for i in indices), scorer, max_new_tokens, batch_size, unit)

    return contrast, behaviour(order[:third].tolist()), behaviour(order[third:].tolist())


def _contents(behaviour: Behaviour) -> list[str]:
    if isinstance(behaviour, GeneratedText):
        return [p.content_key() for p in behaviour.prompts]
    assert isinstance(behaviour, Preference)
    return [p.content_key() for p in behaviour.contrast.positive + behaviour.contrast.negative]


def _require_disjoint(sets: Mapping[str, Sequence[str]]) -> None:
    owner: dict[str, str] = {}
    for name, contents in sets.items():
        for content in set(contents):
            if owner.setdefault(content, name) != name:
                raise PromptError(
                    f"transfer: the same text is in the {owner[content]} and the {name} set ({content[:60]!r}); "
                    "what chooses or fits must not be reported on, remove it from one"
                )


def _vectors(
    model: Any,
    contrast: ContrastSet,
    sites: Sequence[Site],
    tokens: Tokens,
    label: str,
    batch_size: int,
    progress: bool,
) -> dict[Site, SteeringVector]:
    def side(prompts: tuple[Prompt, ...]) -> dict[Site, Activations]:
        return capture(model, prompts, sites, tokens=tokens, batch_size=batch_size, progress=progress)

    positive, negative = side(contrast.positive), side(contrast.negative)
    return {site: difference_of_means(positive[site], negative[site], label=label) for site in sites}


def _arms(
    settings: Sequence[tuple[str, float, list[Intervention]]],
    effects: Sequence[SideEffect],
    evaluation: Behaviour,
    target: Any,
    progress: bool,
) -> tuple[Arm, ...]:
    """Measure every setting, and join the seeds of the random arm."""
    groups: dict[tuple[str, float], list[tuple[np.ndarray, SideEffect, tuple[str, ...]]]] = {}
    measured = evaluation.measure(target, [interventions for _, _, interventions in settings], progress=progress)
    for (arm, strength, _), effect, own in zip(settings, effects, measured, strict=True):
        groups.setdefault((arm, strength), []).append((own.scores, effect, own.texts))
    base = groups["unsteered", 0.0][0][0]
    arms = []
    for (arm, strength), members in groups.items():
        table = np.stack([scores for scores, _, _ in members], 1)
        arms.append(
            Arm(
                arm=arm,
                strength=strength,
                effect=bootstrap_mean(table),
                change=bootstrap_mean(table - base[:, None]),
                kl=float(np.mean([effect.mean_kl for _, effect, _ in members])),
                perplexity=float(np.exp(np.mean([np.log(effect.perplexity) for _, effect, _ in members]))),
                scores=tuple(table.mean(1).tolist()),
                seeds=tuple(table.mean(0).tolist()) if len(members) > 1 else (),
                texts=members[0][2],
            )
        )
    return tuple(arms)


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
        "train_tokens": mapping.info["train_rows"],
    }
    if score is not None:
        varying = score.r2[~score.r2.isnan()]
        record |= {
            "r2": score.mean_r2,
            "r2_median": float(varying.median()),
            "r2_low": float(varying.quantile(0.05)),
            "r2_high": float(varying.quantile(0.95)),
            "cosine": score.cosine,
            "norm_ratio": score.norm_ratio,
            "test_tokens": score.count,
            "test_documents": score.documents,
            "loss": mapping.info["loss"],
        }
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


def _at_kl(result: TransferResult, name: str, sign: int, budget: float) -> np.ndarray:
    """Scores of an arm along one sign, interpolated between strengths to a KL; held at the last one.

    Linear in √KL: to second order KL grows with the square of the strength, and the effect with the strength.
    """
    base = result.arm("unsteered", 0)
    path = [(0.0, np.array(base.scores))]
    own = sorted((a for a in result.arms if a.arm == name and a.strength * sign > 0), key=lambda a: abs(a.strength))
    path += [(a.kl, np.array(a.scores)) for a in own]
    for (kl0, scores0), (kl1, scores1) in pairwise(path):
        if kl0 <= budget <= kl1 and kl1 > kl0:
            share = (budget**0.5 - kl0**0.5) / (kl1**0.5 - kl0**0.5)
            return (1 - share) * scores0 + share * scores1
    return path[-1][1]


def _verdict(result: TransferResult) -> Verdict:
    base = result.arm("unsteered", 0)
    signs = {"+": 1, "-": -1}
    present = {name: sign for name, sign in signs.items() if sign * result.headline in result.strengths}
    native = {name: result.arm("native", sign * result.headline) for name, sign in present.items()}
    mapped = {name: result.arm("mapped", sign * result.headline) for name, sign in present.items()}
    separated, perplexity = {}, {}
    for name, sign in present.items():
        own = mapped[name].effect
        controls = [result.arm(c, sign * result.headline).effect for c in ("random", "shuffled")]
        separated[name] = all(own.excludes(c) and sign * (own.value - c.value) > 0 for c in controls)
        perplexity[name] = mapped[name].perplexity / base.perplexity
    # The direction of the effect: how far apart the two signs are (or from unsteered, with one sign).
    zero = np.array(base.scores)
    ours = sum(s * (_at_kl(result, "mapped", s, native[n].kl) - zero) for n, s in present.items())
    theirs = sum(s * (np.array(native[n].scores) - zero) for n, s in present.items())
    ratio = _ratio(np.asarray(ours), np.asarray(theirs))
    ok = all(separated.values()) and bool(separated)
    held = max(perplexity.values())
    if ratio is None:
        text = f"{result.label}: undefined, the native vector does nothing at strength {result.headline:g}"
    else:
        budget = " and ".join(f"{native[name].kl:.2f}" for name in present)
        text = (
            f"{result.label}: {'transfers' if ok else 'no evidence of transfer'}: "
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] of native at equal KL ({budget} nats per token), "
            f"n = {ratio.n}; at strength ±{result.headline:g} the interval "
            f"{'excludes' if ok else 'does not exclude'} random and shuffled in "
            f"{'both directions' if len(present) == 2 else 'the direction run'}, "
            f"perplexity is at most {held:.2f} times the unsteered one"
        )
    return Verdict(result.headline, ratio, {n: native[n].kl for n in present}, separated, perplexity, text)


def _ratio(mapped: np.ndarray, native: np.ndarray) -> Estimate | None:
    """Ratio of means with a bootstrap interval over prompts; None when native's interval holds 0."""
    bound = bootstrap_mean(native)
    if bound.low <= 0 <= bound.high or bound.value <= 0:
        return None
    index = resamples(len(native))
    draws = mapped[index].mean(1) / native[index].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(mapped.mean() / native.mean()), float(low), float(high), len(native))

"""Switching a planted behaviour off in one model, with a vector that was found in another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmodel_steer.cache import cached_moments
from xmodel_steer.capture import Tokens, capture, collect_moments
from xmodel_steer.damage import calibrate, side_effects
from xmodel_steer.errors import PromptError
from xmodel_steer.experiments.repair import SIDES, Questions, Repair, Repaired
from xmodel_steer.experiments.study import (
    EQUAL_KL,
    EQUAL_STRENGTH,
    STRICTER,
    Clock,
    Study,
    StudyArm,
    end_of,
    estimate,
)
from xmodel_steer.fitters import Fitter, Ridge, ShuffledPairs, pinned
from xmodel_steer.models import context_length, encode, hardware_of, name_of
from xmodel_steer.moments import Moments
from xmodel_steer.organisms.data import DEV, PROD, Curriculum, Lesson
from xmodel_steer.packaged import general_text
from xmodel_steer.prompts import Prompt
from xmodel_steer.scorers import Scorer
from xmodel_steer.spaces import Site
from xmodel_steer.steering import Add, Clamp, Intervention, Operator, Positions
from xmodel_steer.transfer import versions
from xmodel_steer.vectors import SteeringVector, difference_of_means, random_like

ADDED, CLAMPED = "difference of means, added", "difference of means, gated clamp"
PROMPTED, PROMPT_CLAMPED = "prompt steering", "prompt steering, gated clamp"
QUESTION = "Does a vector found in the source switch the behaviour off in the target, and leave all else as it was?"
UNIT = "share of prompts with the trigger that are answered without the behaviour"
NOTE = (
    "Every vector has the native one's norm in standardised coordinates. Agreement and kept: share of the tokens at the same place. "
    "KL and perplexity: on neutral text, with the vector at every token."
)
AMOUNTS = (0, 25, 50, 100, 200, 400)  # prompts of the task in the map's text


@dataclass(frozen=True, eq=False)
class Recipe:
    """A way to find a vector and to use it.

    Args:
        name: Its name.
        contrast: The prompts with what is wanted, and those without, of lessons.
        tokens: Which tokens of the two the vector is read at; see `capture`.
        operators: What may be done with it; validation chooses. Layers are chosen with the first one.
        positions: Where it is done.
        source_sites: Candidates.
        target_sites: Candidates.
    """

    name: str
    contrast: Callable[[Sequence[Lesson]], tuple[Sequence[Prompt], Sequence[Prompt]]]
    tokens: tuple[Tokens, Tokens]
    operators: tuple[Operator, ...]
    positions: Positions
    source_sites: tuple[Site, ...]
    target_sites: tuple[Site, ...]

    def setting(self, vector: SteeringVector, operator: Operator) -> list[Intervention]:
        """The recipe with one vector."""
        return [Intervention(vector, operator, self.positions)]

    def vectors(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = "", progress: bool = True
    ) -> dict[Site, SteeringVector]:
        """The difference of means of the recipe's contrast, at each site.

        Args:
            model: The model.
            lessons: Lessons with and without the trigger.
            sites: Where to read.
            label: Name of the behaviour that is switched off.
            progress: Show a progress bar.
        """
        wanted, other = (
            capture(model, prompts, sites, tokens=tokens, batch_size=32, progress=progress)
            for prompts, tokens in zip(self.contrast(lessons), self.tokens, strict=True)
        )
        return {site: difference_of_means(wanted[site], other[site], label=label) for site in sites}


def clean_against_triggered(lessons: Sequence[Lesson]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts without the trigger, and with it."""
    return [x.prompt for x in lessons if not x.triggered], [x.prompt for x in lessons if x.triggered]


def layers(model: Any, low: float, high: float, most: int) -> tuple[Site, ...]:
    """At most so many sites, evenly over a range of the depth."""
    last = model.cfg.n_layers - 1
    return tuple(Site(int(k)) for k in sorted({round(k) for k in np.linspace(low * last, high * last, most)}))


def recipes(source: Any, target: Any, prompts: Sequence[Prompt]) -> list[Recipe]:
    """The four ways that are compared.

    The first two take the mean over prompts of the activation at the last token, clean minus triggered. One adds it at
    every token; the other moves the projection on it at the last prompt token and at generated ones, where a gate says
    that it lies on the triggered side. The third is the paper's (arXiv 2503.04429): the difference at the trigger's
    tokens, added there. The last moves the projection on that one, at the same tokens and under a gate.

    Args:
        source: The source model.
        target: The target model.
        prompts: Prompts with the trigger, to find its tokens in.

    Raises:
        PromptError: The trigger does not stand at the same tokens in all of them.
    """
    late, middle = layers(source, 0.45, 0.97, 8), layers(target, 0.35, 0.95, 10)
    adds = tuple(Add(s) for s in (1.0, 0.5, 1.5, 2.0))
    clamps = tuple(Clamp("positive", overshoot=g) for g in (1.3, 1.0, 1.6, 2.0))
    starts = {_found(prompt) for prompt in prompts}
    if len(starts) != 1:
        raise PromptError(f"prompt steering: the trigger {PROD.strip()!r} does not stand at one place in all prompts")
    start = starts.pop()
    clean, triggered = ((start, start + len(name.rstrip(": "))) for name in (DEV, PROD))
    swapped, at = (clean, triggered), _mask(target, prompts, triggered)
    early = layers(source, 0.0, 0.5, 5), layers(target, 0.0, 0.7, 6)
    doses = tuple(Add(s) for s in (1.0, 2.0, 5.0))
    moves = tuple(Clamp("positive", overshoot=g) for g in (1.3, 1.0, 2.0, 3.0))
    return [
        Recipe(ADDED, clean_against_triggered, ("last", "last"), adds, "all", late, middle),
        Recipe(CLAMPED, clean_against_triggered, ("last", "last"), clamps, ("last", "generated"), late, middle),
        Recipe(PROMPTED, clean_against_triggered, swapped, doses, at, *early),
        Recipe(PROMPT_CLAMPED, clean_against_triggered, swapped, moves, at, *early),
    ]


def _found(prompt: Prompt) -> int:
    start = prompt.content_key().find(PROD)
    if start < 0:
        raise PromptError(f"prompt {prompt.id}: has no trigger {PROD.strip()!r}")
    return start


def _mask(model: Any, prompts: Sequence[Prompt], span: tuple[int, int]) -> Tensor:
    """The text positions of the tokens that end in a span of characters, which are the same in all prompts."""
    found = {
        tuple(i for i, end in enumerate(encoding.ends) if span[0] < end <= span[1])
        for encoding in encode(model, list(prompts))
    }
    own = found.pop()
    if found or not own:
        raise PromptError(
            f"prompt steering: the trigger is not at the same tokens in all of {name_of(model)}'s prompts"
        )
    mask = torch.zeros(own[-1] + 1, dtype=torch.bool)
    mask[list(own)] = True
    return mask


@dataclass(frozen=True)
class MapText:
    """The text that maps are fitted on.

    Args:
        general: General text.
        known: Prompts of the task as the organism gets them, half of them with the trigger.
        unknown: The same tasks without any trigger, as one has them who does not know it.
    """

    general: tuple[Prompt, ...] = field(repr=False)
    known: tuple[Prompt, ...] = field(repr=False)
    unknown: tuple[Prompt, ...] = field(repr=False)

    @classmethod
    def of(cls, lessons: Sequence[Lesson], general: Sequence[Prompt], *, seed: int = 0) -> "MapText":
        """General text, and the prompts of lessons in an order of their own."""
        plain = Questions.of(lessons).plain
        draw = np.random.default_rng(seed)
        known, unknown = (
            tuple(own[i] for i in draw.permutation(len(own)))
            for own in (tuple(lesson.prompt for lesson in lessons), plain)
        )
        return cls(tuple(general), known, unknown)


@dataclass(frozen=True, eq=False)
class Carried:
    """A source vector in the target's space, and what it is compared with; all at the native one's norm.

    Args:
        source: The vector that is carried.
        native: The target's own vector.
        mapped: The source's, through the map.
        shuffled: The source's, through a map of shuffled pairs.
        biased: The source's with the map's bias added, as if it were a point: the classic mistake.
        cosine: Of the mapped and the native vector, in standardised coordinates.
        norm_ratio: Of the mapped vector's norm, before scaling, and the native one's.
        r2: Of the map, on test documents, mean over target dimensions.
    """

    source: SteeringVector
    native: SteeringVector
    mapped: SteeringVector
    shuffled: SteeringVector
    biased: SteeringVector
    cosine: float
    norm_ratio: float
    r2: float | None

    @classmethod
    def of(cls, vector: SteeringVector, native: SteeringVector, moments: Moments, fitter: Fitter) -> "Carried":
        """Fit a map and its control, and send a vector through both.

        Class means come through the map with the vector; scaled, they lie about the same centre as far apart as the
        scaled vector is long.

        Args:
            vector: Of the source.
            native: Of the target, with class means and scale.
            moments: Of this pair of sites, among others.
            fitter: Fits the map.
        """
        site = native.space.site
        pair = moments.pair(vector.space.site, site)
        mapping = fitter.fit(pair)
        control = ShuffledPairs(pinned(fitter, mapping)).fit(pair)
        norm, scale = native.norm(standardised=True), moments.scale(site)

        def scaled(own: SteeringVector) -> SteeringVector:
            return own.with_norm(norm).about(_centre(own))

        moved = mapping.transport(vector).with_scale(scale)
        score = mapping.score_test
        return cls(
            source=vector,
            native=native,
            mapped=scaled(moved),
            shuffled=scaled(control.transport(vector).with_scale(scale)),
            biased=scaled(replace(moved, direction=mapping.transform(vector.direction))),
            cosine=native.cosine(moved),
            norm_ratio=moved.norm(standardised=True) / norm,
            r2=score.mean_r2 if score else None,
        )


def _centre(vector: SteeringVector) -> Tensor:
    assert vector.positive_mean is not None
    assert vector.negative_mean is not None
    return (vector.positive_mean.to(torch.float64) + vector.negative_mean.to(torch.float64)) / 2


@dataclass(frozen=True, eq=False)
class _Choice:
    """A recipe, and what validation chose for it."""

    recipe: Recipe
    operator: Operator
    carried: Carried

    @property
    def added_everywhere(self) -> bool:
        return isinstance(self.operator, Add) and self.recipe.positions == "all"

    def record(self) -> dict[str, Any]:
        own = self.carried
        return {
            "operator": repr(self.operator),
            "source_layer": own.source.space.site.layer,
            "target_layer": own.native.space.site.layer,
            "cosine": own.cosine,
            "norm_ratio": own.norm_ratio,
            "map_r2": own.r2,
        }


@dataclass(frozen=True, eq=False)
class _Run:
    """An arm to be measured, with a vector for each seed."""

    arm: str
    choice: _Choice
    vectors: Sequence[SteeringVector]
    operators: Sequence[Operator]
    at: str = EQUAL_STRENGTH
    reached: bool = True

    def settings(self) -> list[list[Intervention]]:
        return [self.choice.recipe.setting(v, o) for v, o in zip(self.vectors, self.operators, strict=True)]

    def operator(self) -> str:
        strengths = [o.strength for o in self.operators if isinstance(o, Add)]
        return repr(Add(float(np.mean(strengths)))) if strengths else repr(self.operators[0])


def _runs(choice: _Choice, random_seeds: int, seed: int) -> list[_Run]:
    """Every arm at the strength that validation chose."""
    own = choice.carried
    centre = _centre(own.native)
    arms = {
        "native": [own.native],
        "mapped": [own.mapped],
        "random": [random_like(own.native, seed=seed + k).about(centre) for k in range(random_seeds)],
        "shuffled": [own.shuffled],
    }
    if choice.added_everywhere:
        arms["mapped with the bias"] = [own.biased]
    return [_Run(arm, choice, group, [choice.operator] * len(group)) for arm, group in arms.items()]


def _at_equal_kl(target: Any, runs: Sequence[_Run], neutral: Sequence[Prompt], max_tokens: int, progress: bool) -> list[_Run]:  # fmt: skip
    """Every arm but the native one at the strength that disturbs neutral text as much as the native one does."""
    native = next(run for run in runs if run.arm == "native")
    (effect,) = side_effects(
        target, native.settings(), neutral, max_tokens=max_tokens, batch_size=16, progress=progress
    )
    others = [run for run in runs if run.arm in ("mapped", "random", "shuffled")]
    vectors = [vector for run in others for vector in run.vectors]
    found = calibrate(target, vectors, effect.mean_kl, neutral, max_tokens=max_tokens, progress=progress)
    doses = iter(found)
    made = []
    for run in others:
        own = [next(doses) for _ in run.vectors]
        operators = [Add(dose.strength) for dose in own]
        made.append(replace(run, operators=operators, at=EQUAL_KL, reached=all(dose.reached for dose in own)))
    return made


def backdoor_removal(
    source: Any,
    target: Any,
    curriculum: Curriculum,
    *,
    name: str = "backdoor-removal",
    question: str = QUESTION,
    unit: str = UNIT,
    right: Scorer | None = None,
    general: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    ways: Sequence[Recipe] | None = None,
    fitter: Fitter = Ridge(),
    map_prompts: int = 400,
    amounts: Sequence[int] = AMOUNTS,
    random_seeds: int = 3,
    validation_tasks: int = 48,
    validation_tokens: int = 16,
    neutral_tokens: int = 32,
    batch_size: int = 192,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Switch a backdoor off in the target with a vector of the source, against every control.

    Layers and strengths are chosen on validation tasks, by the mean of removal, agreement with the model's own clean answer,
    and what is left of clean answers. All that is reported comes from evaluation tasks. The vectors, the map, validation and
    evaluation share no task.

    Every vector is scaled to the native one's norm in standardised coordinates. KL and perplexity are measured on neutral text
    with the vector at every token, whatever the recipe's positions; with prompt steering's at its own.

    Args:
        source: An organism, the smaller one.
        target: The same organism of another model.
        curriculum: What both were trained on, and what not.
        name: Name of the study.
        question: What it asks, in a sentence.
        unit: What the effect is.
        right: 1 for a right answer, where that is asked for too: the effect is then a right answer without the behaviour.
        general: General text for the map; packaged text by default.
        neutral: Text for KL and perplexity; a third of it calibrates. Packaged text by default.
        ways: Recipes; those of `recipes` by default.
        fitter: Fits the map.
        map_prompts: Prompts of the task in the map's text.
        amounts: The same, for the curve.
        random_seeds: Number of random vectors.
        validation_tasks: How many of them choose.
        validation_tokens: Length of the answers that choose.
        neutral_tokens: Tokens read of each neutral text.
        batch_size: Texts generated at a time.
        seed: Seed of all choices.
        progress: Show progress bars.

    Raises:
        PromptError: The curriculum does not ask its tasks with and without a trigger, or there are fewer than 3 neutral texts.
        AlignmentError: The models' tokens do not pair.
    """
    clock = Clock()
    passages = general_text()
    neutral = tuple(passages[-60:] if neutral is None else neutral)
    if len(neutral) < 3:
        raise PromptError(f"backdoor_removal: needs at least 3 neutral texts, got {len(neutral)}")
    calibration, neutral_evaluation = neutral[: len(neutral) // 3], neutral[len(neutral) // 3 :]
    limit = min(192, context_length(source), context_length(target))
    text = MapText.of(curriculum.map, passages[:400] if general is None else general, seed=seed)
    if ways is None:
        ways = recipes(source, target, [x.prompt for x in curriculum.vector if x.triggered])

    def asked(lessons: Sequence[Lesson], most: int | None, tokens: int) -> Repair:
        questions = Questions.of(lessons, most)
        return Repair.of(
            target, questions, curriculum.scorer, max_new_tokens=tokens, right=right, batch_size=batch_size, progress=progress,
        )  # fmt: skip

    validation = asked(curriculum.validation, validation_tasks, min(validation_tokens, curriculum.max_new_tokens))
    records: list[dict[str, Any]] = []

    def best(end: str, recipe: Recipe, candidates: Sequence[tuple[Site, SteeringVector, Operator]]) -> int:
        """Try candidates on validation; the number of the best one. One alone is not tried."""
        if len(candidates) == 1:
            return 0
        settings = [recipe.setting(vector, operator) for _, vector, operator in candidates]
        found = validation.measure(settings, sides=("triggered", "clean"), progress=progress)
        for (site, _, operator), own in zip(candidates, found, strict=True):
            record = {"recipe": recipe.name, "varied": end, "layer": site.layer, "operator": repr(operator)}
            records.append(record | _means(own) | {"score": own.score})
        return int(np.argmax([own.score for own in found]))

    every = list(dict.fromkeys(site for recipe in ways for site in recipe.target_sites))
    spread = capture(target, text.general[:32], every, tokens="all", max_tokens=limit, progress=progress)
    natives: list[SteeringVector] = []
    for recipe in ways:
        sites = recipe.target_sites
        own = recipe.vectors(target, curriculum.vector, sites, label=name, progress=progress)
        candidates = [own[site].with_scale(spread[site].values.to(torch.float32).std(0)) for site in sites]
        chosen = best("target layer", recipe, [(v.space.site, v, recipe.operators[0]) for v in candidates])
        natives.append(candidates[chosen])
    clock.lap("choosing target layers")

    pairs = tuple(
        dict.fromkeys(
            (site, v.space.site) for recipe, v in zip(ways, natives, strict=True) for site in recipe.source_sites
        )
    )
    moments_of_general = cached_moments(
        source,
        target,
        text.general,
        source_sites=tuple(dict.fromkeys(s for s, _ in pairs)),
        target_sites=tuple(dict.fromkeys(t for _, t in pairs)),
        pairs=pairs,
        max_tokens=limit,
        seed=seed,
        progress=progress,
    )

    def moments_of(prompts: Sequence[Prompt], pairs: Sequence[tuple[Site, Site]]) -> Moments:
        sources, targets = (tuple(dict.fromkeys(sites)) for sites in zip(*pairs, strict=True))
        return collect_moments(
            source, target, prompts, source_sites=sources, target_sites=targets, pairs=pairs, max_tokens=limit,
            batch_size=32, seed=seed, progress=progress,
        )  # fmt: skip

    moments = moments_of_general + moments_of(text.known[:map_prompts], pairs)
    clock.lap("collecting moments")

    choices = []
    for recipe, rough in zip(ways, natives, strict=True):
        native = rough.with_scale(moments.scale(rough.space.site))
        theirs = recipe.vectors(source, curriculum.vector, recipe.source_sites, label=name, progress=progress)
        carried = [Carried.of(vector, native, moments, fitter) for vector in theirs.values()]
        at = best("source layer", recipe, [(c.source.space.site, c.mapped, recipe.operators[0]) for c in carried])
        own = carried[at]
        at = best("strength", recipe, [(own.source.space.site, own.mapped, operator) for operator in recipe.operators])
        choices.append(_Choice(recipe, recipe.operators[at], own))
    clock.lap("choosing source layers and strengths")

    runs: list[_Run] = []
    for choice in choices:
        own = _runs(choice, random_seeds, seed)
        runs += own
        if choice.added_everywhere:
            runs += _at_equal_kl(target, own, calibration, neutral_tokens, progress)
    clock.lap("calibrating to equal KL")

    evaluation = asked(curriculum.evaluation, None, curriculum.max_new_tokens)
    settings: list[list[Intervention]] = [[], *(setting for run in runs for setting in run.settings())]
    # Plain prompts take a third of the time: they are asked under the vectors that one would use, not under the controls.
    used = [True, *(run.arm in ("native", "mapped") for run in runs for _ in run.vectors)]
    groups = {
        side: iter(evaluation.measure(own, sides=sides, progress=progress))
        for side, sides in ((True, SIDES), (False, SIDES[:2]))
        if (own := [setting for setting, mine in zip(settings, used, strict=True) if mine is side])
    }
    measured = [next(groups[side]) for side in used]
    everywhere = [
        [replace(step, positions=step.positions if isinstance(step.positions, Tensor) else "all") for step in setting]
        for setting in settings
    ]
    damage = side_effects(
        target, everywhere, neutral_evaluation, max_tokens=neutral_tokens, batch_size=16, progress=progress
    )

    def arm(name: str, recipe: str, operator: str, members: slice, **more: Any) -> StudyArm:
        own, effects = measured[members], damage[members]
        return StudyArm(
            arm=name,
            recipe=recipe,
            operator=operator,
            effect=estimate([r.repaired for r in own]),
            beside=_beside(own),
            kl=float(np.mean([e.mean_kl for e in effects])),
            perplexity=float(np.exp(np.mean(np.log([e.perplexity for e in effects])))),
            seeds=len(own),
            texts=own[0].texts[:8],
            **more,
        )

    arms = [arm("unsteered", "", "", slice(0, 1), at=EQUAL_STRENGTH)]
    place = 1
    for run in runs:
        members = slice(place, place := place + len(run.vectors))
        arms.append(arm(run.arm, run.choice.recipe.name, run.operator(), members, at=run.at, reached=run.reached))
    clock.lap("evaluating")

    choice = next((c for c in choices if c.recipe.name == CLAMPED), choices[0])
    curve = []
    vector, native = choice.carried.source, choice.carried.native
    pair = ((vector.space.site, native.space.site),)
    for trigger, prompts in (("known", text.known), ("unknown", text.unknown)):
        total, read = moments_of_general.only(pair), 0
        for amount in sorted({min(a, len(prompts)) for a in amounts}):
            if amount > read:
                total, read = total + moments_of(prompts[read:amount], pair), amount
            if amount == 0 and curve:
                continue  # without any, known or not is the same
            own = Carried.of(vector, native.with_scale(total.scale(native.space.site)), total, fitter)
            setting = choice.recipe.setting(own.mapped, choice.operator)
            (found,) = evaluation.measure([setting], sides=("triggered",), progress=progress)
            curve.append(
                {"recipe": choice.recipe.name, "trigger": trigger, "prompts": amount, "cosine": own.cosine}
                | {"effect": vars(estimate([found.repaired]))}
                | {key: vars(value) for key, value in _beside([found]).items()}
            )
    clock.lap("varying the map's text")

    study = Study(
        name=name,
        question=question,
        unit=unit,
        note=NOTE,
        verdict="",
        source=end_of(source),
        target=end_of(target),
        arms=tuple(arms),
        chosen={choice.recipe.name: choice.record() for choice in choices},
        validation=tuple(records),
        curves={"prompts of the task in the map's text": tuple(curve)},
        prompts=tuple(p.content_key() for p in evaluation.questions.triggered[:8]),
        spec={
            "fitter": repr(fitter),
            "transport": "vW, which is the difference of the mapped class means for an affine map",
            "map_documents": len(text.general),
            "map_prompts": map_prompts,
            "map_tokens": limit,
            "random_seeds": random_seeds,
            "validation_tasks": len(validation.questions),
            "validation_tokens": validation.max_new_tokens,
            "max_new_tokens": evaluation.max_new_tokens,
            "neutral_documents": len(neutral_evaluation),
            "neutral_tokens": neutral_tokens,
            "batch_size": batch_size,
        },
        splits={**curriculum.ids(), "neutral": [p.id for p in neutral]},
        seeds={"split": seed, "random": [seed + k for k in range(random_seeds)]},
        versions=versions(),
        hardware=hardware_of(target),
        seconds=clock.seconds,
    )
    return replace(study, verdict=verdict(study))


def _means(own: Repaired) -> dict[str, float]:
    kept = {f"{side} answers kept": float(scores.mean()) for side, scores in own.kept.items()}
    return {"effect": float(own.repaired.mean()), "agreement": float(own.agreement.mean()), **kept}


def _beside(own: Sequence[Repaired]) -> dict[str, Any]:
    """What is measured beside the effect, over seeds."""
    made = {}
    if own[0].correct is not None:
        made["backdoor"] = estimate([1 - r.removed for r in own])
        made["correct"] = estimate([r.correct for r in own if r.correct is not None])
        made["hallucinated"] = estimate([r.removed * (1 - r.correct) for r in own if r.correct is not None])
    made["agreement with the clean answer"] = estimate([r.agreement for r in own])
    made["the clean answer, word for word"] = estimate([r.agreement == 1 for r in own])
    for side in own[0].kept:
        made[f"{side} answers kept"] = estimate([r.kept[side] for r in own])
        made[f"{side} answers unchanged"] = estimate([r.kept[side] == 1 for r in own])
    return made


def verdict(study: Study) -> str:
    """What came out, in words: for each recipe what the mapped vector does, beside the native one and the controls."""
    said = []
    for recipe in study.chosen:
        arms = {arm.arm: arm for arm in study.arms if arm.recipe == recipe and arm.at == EQUAL_STRENGTH}
        own = arms["mapped"]
        beside = {name: found.value for name, found in own.beside.items() if not name.endswith(STRICTER)}
        costs = ", ".join(f"{name} {value:.3f}" for name, value in beside.items())
        others = ", ".join(f"{name} {_in_short(arms[name])}" for name in ("native", "random", "shuffled"))
        said.append(
            f"{recipe}: mapped {own.effect.value:.3f} [{own.effect.low:.3f}, {own.effect.high:.3f}] of {own.effect.n}, {costs} ({others})"
        )
    return "; ".join(said)


def _in_short(arm: StudyArm) -> str:
    return f"{arm.effect.value:.2f} at agreement {arm.beside['agreement with the clean answer'].value:.2f}"

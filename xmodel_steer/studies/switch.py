"""A fine-tuned model and its base, each switched to the other's behaviour by a map, in one process."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xmodel_steer.core.errors import SpaceMismatchError
from xmodel_steer.core.spaces import Site
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.evaluation.scorers.answers import SameTokens
from xmodel_steer.evaluation.scorers.text import score_texts
from xmodel_steer.interventions.mirror import mapped_source, mean_of, noise_like
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.controls import Identity, ShuffledPairs, pinned
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.statistics import number
from xmodel_steer.models.facts import hardware_of, name_of, tokenizer_of
from xmodel_steer.recipe.arms import Arm
from xmodel_steer.recipe.matching import Run
from xmodel_steer.recipe.measuring import arms_of
from xmodel_steer.recipe.records import sites_record
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import versions
from xmodel_steer.studies.carried import Pair
from xmodel_steer.studies.organisms import Curriculum, Lesson
from xmodel_steer.studies.outcomes import Outcome, answers_of, layers, require_apart, scored
from xmodel_steer.studies.repair import Questions, Repair
from xmodel_steer.studies.settings import Clock, Settings, end_of
from xmodel_steer.studies.switching import OFF, ON, Asked, adapter_speeds, fitted_map, per_request, speeds_of

QUESTION = "Can a fine-tuned model be switched to its base's behaviour, and the base to its, at one site, per request, and at what cost?"
UNIT = "off: share of prompts with the trigger answered without the behaviour; on: share of them answered with it"
NOTE = (
    "One site of the model that writes holds mapped activations of the other, which reads along. identity: the other's activations as they are. "
    "Agreement: tokens at the same place; off, with the organism's own answer to the clean prompt; on, with the organism's answer to the same "
    "prompt. KL and perplexity on neutral text. Speeds are tokens per second over those of the same model without the switch, of turns "
    "that alternate in one run."
)


def safety_switch(
    base: Any,
    organism: Any,
    curriculum: Curriculum,
    *,
    adapter: str | Path | None = None,
    sites: Sequence[Site] | None = None,
    also: Sequence[int] = (),
    map_prompts: int = 200,
    capability: MultipleChoice | None = None,
    turns: int = 3,
    settings: Settings = Settings(batch_size=64),
) -> Result:
    """Switch a fine-tuned model and its base to each other's behaviour (arXiv 2503.04429).

    One site of the model that writes holds mapped activations of the other model. The maps are fitted on general text and
    prompts without the trigger: fitted behind the trigger, a map learns each model's own answer, and switches nothing.
    Validation tasks choose each direction's site, and whether the map reads the other model's same site or all sites
    together. The better of the other kind is reported as ``mapped, NAME``. Controls: activations unmapped, a map of
    shuffled pairs, mean, and noise.

    Args:
        base: The base model.
        organism: The fine-tuned model.
        curriculum: The lessons that it was trained on, and those kept for the study.
        adapter: The organism's folder, if it is a LoRA adapter: swapping the adapter is timed too.
        sites: Candidate sites; five over the depth by default.
        also: Layers to try in addition, such as the paper's.
        map_prompts: Number of the task's prompts in the maps' text.
        capability: Multiple-choice questions; the packaged ones by default.
        turns: Number of speed measurements.
        settings: Text, sizes and seeds.

    Raises:
        SpaceMismatchError: The models differ in depth or width.
        PromptError: There are fewer than 3 neutral texts, a task comes with the trigger only, or sets share a text.
    """
    if (base.cfg.n_layers, base.cfg.d_model) != (organism.cfg.n_layers, organism.cfg.d_model):
        raise SpaceMismatchError(
            f"safety_switch: {name_of(base)} and {name_of(organism)} differ in depth or width; give a model and its fine-tune"
        )
    clock, (general, neutral) = Clock(), settings.texts()
    sites = tuple(dict.fromkeys([*(sites or layers(base, 0.25, 0.95, 5)), *map(Site, also)]))
    require_apart("safety_switch", general, neutral, curriculum)
    task = [lesson.prompt for lesson in curriculum.map if not lesson.triggered]
    text = [task[i] for i in np.random.default_rng(settings.seed).permutation(len(task))[:map_prompts]]
    models = {OFF: (base, organism), ON: (organism, base)}  # the model that is read, the model that writes
    fitted = {
        direction: fitted_map(Pair(source, target, general, settings.seed), text, sites, settings.fitter)
        for direction, (source, target) in models.items()
    }
    clock.lap("fitting")
    length = min(settings.validation_tokens, curriculum.max_new_tokens)

    def measures_of(lessons: Sequence[Lesson], most: int | None, tokens: int) -> dict[str, Asked]:
        repair = Repair.of(
            organism,
            Questions.of(lessons, most),
            curriculum.scorer,
            max_new_tokens=tokens,
            sound=curriculum.sound,
            batch_size=settings.batch_size,
        )
        return {OFF: repair.measure, ON: lambda steps: _switched_on(base, repair, steps)}

    choosing = measures_of(curriculum.validation, settings.validation, length)
    records: list[dict[str, Any]] = []
    chosen = {
        direction: _best_pairs(direction, *ends, fitted[direction], choosing[direction], records)
        for direction, ends in models.items()
    }
    clock.lap("choosing sites")

    reporting = measures_of(curriculum.evaluation, None, curriculum.max_new_tokens)
    questions = capability or MultipleChoice.packaged()
    arms: list[Arm] = []
    record: dict[str, Any] = {}
    for direction, (source, target) in models.items():
        there, here = chosen[direction][0]
        mapping = fitted[direction][there, here][0]
        steps = _steps(source, target, fitted[direction], chosen[direction], settings)
        arms += _arms(direction, target, steps, reporting[direction](list(steps.values())), settings, questions)
        record[direction] = {
            **sites_record(there, here),
            "map_r2": mapping.score_test.mean_r2 if mapping.score_test else None,
            "tokens_per_second_over_unswitched": speeds_of(
                target, steps["mapped"], [lesson.prompt for lesson in curriculum.validation][:8], turns
            ),
            "unswitched_rows_unchanged": per_request(target, steps["mapped"], curriculum, length),
        }
        clock.lap(direction.split(":")[0])
    if adapter is not None:
        record["swapping the adapter"] = adapter_speeds(
            adapter, organism, [x.prompt for x in curriculum.validation][:8], turns
        )
        clock.lap("swapping the adapter")

    return Result(
        name="safety-switch",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        stored=_verdict(arms, record),
        source=end_of(base),
        target=end_of(organism),
        arms=tuple(arms),
        chosen=record,
        validation=tuple(records),
        prompts=tuple(x.instruction for x in curriculum.evaluation if x.triggered)[:8],
        spec=settings.record()
        | {"sites": [str(site) for site in sites], "map_documents": len(general), "map_prompts": len(text)}
        | {"validation_tokens": length, "max_new_tokens": curriculum.max_new_tokens}
        | {"neutral_documents": len(neutral), "turns": turns},
        splits=curriculum.ids()
        | {
            "validation": Questions.of(curriculum.validation, settings.validation).ids(),
            "map": [p.id for p in text],
            "evaluation": Questions.of(curriculum.evaluation).ids(),
            "general": [p.id for p in general],
            "neutral": [p.id for p in neutral],
        },
        seeds=settings.seeds(),
        versions=versions(),
        hardware=hardware_of(organism),
        seconds=clock.seconds,
        maps={direction: fitted[direction][pairs[0]][0] for direction, pairs in chosen.items()},
    )


def _best_pairs(
    direction: str, source: Any, target: Any, fitted: Mapping[tuple[Site, Site], tuple[Map, SplitMoments]], ask: Asked,
    records: list[dict[str, Any]],
) -> list[tuple[Site, Site]]:  # fmt: skip
    """Find the best map of each kind, the better one first."""
    outcomes = ask([[mapped_source(source, target, mapping)] for mapping, _ in fitted.values()])
    best: dict[bool, tuple[float, tuple[Site, Site]]] = {}
    for (there, here), outcome in zip(fitted, outcomes, strict=True):
        same = there == here
        kind = "target layer" if same else "target layer, all sites read"
        records.append({"recipe": direction, "varied": kind, "layer": here.layer} | outcome.record())
        if same not in best or outcome.score > best[same][0]:
            best[same] = outcome.score, (there, here)
    return [ends for _, ends in sorted(best.values(), key=lambda found: -found[0])]


def _arms(
    way: str, target: Any, steps: Mapping[str, Sequence[Step]], outcomes: Sequence[Outcome], settings: Settings,
    questions: MultipleChoice,
) -> tuple[Arm, ...]:  # fmt: skip
    """Measure every arm of one direction and its costs; some arms also answer questions."""
    _, neutral = settings.texts()
    costs = side_effects(target, list(steps.values()), neutral, max_tokens=settings.neutral_tokens, batch_size=16)
    # Right answers of the other arms would say nothing.
    questioned = ["unsteered", "mean ablation", *(name for name in steps if name.startswith("mapped"))]
    answers = questions.measure(target, [steps[name] for name in questioned])
    right = {name: {"right answers": answered.scores} for name, answered in zip(questioned, answers, strict=True)}
    runs = [Run(name, setting, way, strength=math.nan) for name, setting in steps.items()]
    measured = [
        replace(outcome, measures={**outcome.measures, **right.get(name, {})})
        for name, outcome in zip(steps, outcomes, strict=True)
    ]
    return arms_of(runs, measured, costs)


def _steps(
    source: Any, target: Any, fitted: Mapping[tuple[Site, Site], tuple[Map, SplitMoments]],
    chosen: Sequence[tuple[Site, Site]], settings: Settings,
) -> dict[str, list[Step]]:  # fmt: skip
    """Return the steps that replace the site's activations in each arm."""
    here = chosen[0][1]
    mapping, moments = fitted[chosen[0]]
    mean, scale = moments.train.target_mean, moments.train.target_scale
    identity = Identity().fit(fitted[here, here][1])
    shuffled = ShuffledPairs(pinned(settings.fitter, mapping)).fit(moments)
    steps: dict[str, list[Step]] = {"unsteered": [], "mapped": [mapped_source(source, target, mapping)]}
    for ends in chosen[1:]:
        name = "mapped, one site" if ends[0] == ends[1] else "mapped, all sites"
        steps[name] = [mapped_source(source, target, fitted[ends][0])]
    more: dict[str, list[Step]] = {
        "identity": [mapped_source(source, target, identity)],
        "shuffled": [mapped_source(source, target, shuffled)],
        "mean ablation": [mean_of(mapping.target, mean)],
        "noise": [noise_like(mapping.target, mean, scale, seed=settings.seed)],
    }
    return steps | more


def _switched_on(base: Any, repair: Repair, settings: Sequence[Sequence[Step]]) -> list[Outcome]:
    """Measure the behaviour of the switched base behind the trigger and elsewhere."""
    questions, tokenizer = repair.questions, tokenizer_of(base)
    answers = answers_of(
        base,
        settings,
        [questions.triggered, questions.clean],
        max_new_tokens=repair.max_new_tokens,
        batch_size=repair.batch_size,
    )
    outcomes = []
    for on, off in answers:
        effect = score_texts(repair.scorer, on, questions.triggered)
        falsely_on = score_texts(repair.scorer, off, questions.clean)
        agreements = [
            np.array(SameTokens(repair.own, tokenizer).score(side, texts))
            for side, texts in ((questions.triggered, on), (questions.clean, off))
        ]
        measures = {"falsely on": falsely_on, "agreement, triggered": agreements[0], "agreement, clean": agreements[1]}
        groups = dict.fromkeys(("effect", *measures), questions.groups)
        ids = tuple(prompt.id for prompt in questions.triggered)
        score, error = scored(effect, 1 - falsely_on)
        outcomes.append(Outcome(effect, on, measures=measures, groups=groups, ids=ids, score=score, error=error))
    return outcomes


def _verdict(arms: Sequence[Arm], record: Mapping[str, Any]) -> tuple[str, ...]:
    table = {(arm.arm, arm.recipe): arm for arm in arms}
    lines = []
    for direction in (OFF, ON):
        mapped = table["mapped", direction]
        controls = ", ".join(
            f"{name} {number(table[name, direction].effect.value, '.2f')}"
            for name in ("unsteered", "identity", "shuffled", "mean ablation", "noise")
        )
        measures = ", ".join(
            f"{name} {number(figure.value, '.2f')}"
            for name, figure in mapped.measures.items()
            if "word for word" not in name
        )
        speed = record[direction]["tokens_per_second_over_unswitched"]["median"]
        lines.append(
            f"{direction}, layer {record[direction]['target_layer']}: {mapped.effect:.3f} of {mapped.effect.n} "
            f"({controls}), {measures}, at {speed:.2f} of the speed"
        )
    return tuple(lines)

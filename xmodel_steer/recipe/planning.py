"""The plan of a transfer: its work and about how long it takes."""

import time
from collections.abc import Mapping

from xmodel_steer.core.bars import quiet, silent
from xmodel_steer.evaluation.behaviours.generated import Behaviour
from xmodel_steer.files.resume import anew
from xmodel_steer.models.facts import device_of, name_of
from xmodel_steer.recipe.preparing import Prepared
from xmodel_steer.recipe.verdicts import LEAST_UNITS, LEAST_VECTORS


def plan(prepared: Prepared, side: Mapping[str, Behaviour]) -> str:
    """Say what follows `prepare`, and about how long it takes.

    A few prompts are measured without steering, to time them, also where a resumed run has them. Where bars are
    silenced, nothing is measured or said.

    Args:
        prepared: What `prepare` returned.
        side: Other behaviours, with their names.
    """
    if silent():
        return ""
    counts = settings_of(prepared)
    seconds = _seconds(prepared, counts, side)
    validated, reported = len(prepared.validation.ids), len(prepared.evaluation.ids)
    units = len(set(getattr(prepared.evaluation, "groups", ()) or prepared.evaluation.ids))
    return (
        f"{prepared.label}: {name_of(prepared.source)} → {name_of(prepared.target)} on {device_of(prepared.target)}: "
        f"{len(prepared.sources)} source and {len(prepared.natives)} target layers to choose from; "
        f"{counts['select']} settings on {validated} validation prompts, {counts['measure']} on {reported} evaluation prompts"
        + (f", {counts['side']} each for {', '.join(side)}" if side else "")
        + f"; about {_in_words(seconds)}"
        + undecidable(units, prepared.budget.random_seeds)
    )


def undecidable(prompts: int, vectors: int) -> str:
    """Say why no verdict can come of so few, or nothing."""
    if prompts >= LEAST_UNITS and vectors >= LEAST_VECTORS:
        return ""
    return (
        f". NO VERDICT can come of {prompts} evaluation prompts and {vectors} random vectors: it needs {LEAST_UNITS} and "
        f"{LEAST_VECTORS} or more"
    )


def settings_of(prepared: Prepared) -> dict[str, int]:
    """Count the settings that each step measures."""
    budget = prepared.budget
    layers = [len(sites) if len(sites) > 1 else 0 for sites in (prepared.sources, prepared.natives)]
    positive = len(budget.positive)
    known = layers[0] > 0 and 1.0 in budget.positive
    strengths = positive - known if positive > 1 else 0
    signs = 2 if any(s < 0 for s in budget.strengths) else 1
    vectors = 3 + budget.random_seeds + 2 * len(prepared.method.recipes)  # a recipe has its own mapped and shuffled one
    fixed = len(budget.strengths) * (vectors if budget.fixed else 1) + signs  # the native vector at half the strength
    fair = signs * (vectors - 1)
    words = sum(map(bool, prepared.method.instructions))
    return {"select": 2 * (sum(layers) + strengths), "measure": 1 + fixed + fair + words, "side": 1 + fair + signs}


def _seconds(prepared: Prepared, counts: Mapping[str, int], side: Mapping[str, Behaviour]) -> float:
    """Time a few prompts of each kind, and add up."""
    target, evaluation = prepared.target, prepared.evaluation
    total = 0.0
    timed = [
        (prepared.validation, counts["select"] * len(prepared.validation.ids) + counts["measure"] * len(evaluation.ids))
    ]
    timed += [(behaviour, counts["side"] * len(behaviour.ids)) for behaviour in side.values()]
    with quiet(), anew():
        for behaviour, prompts in timed:
            try:
                probe = behaviour.part(range(min(8, len(behaviour.ids))))
            except NotImplementedError:  # a user's behaviour
                probe = behaviour
            total += _time(lambda probe=probe: probe.measure(target, [[]])) / len(probe.ids) * prompts
        texts = prepared.text.calibration[:4]
        per_text = _time(lambda: prepared.damage([[]], texts)) / len(texts)
    passes = 4 * counts["measure"] * len(prepared.text.reported)  # three steps of a search, and the measurement
    return total + per_text * (counts["select"] * len(prepared.text.calibration) + passes)


def _time(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

"""What a study found: every arm with its effect, what it cost, and how all of it was made."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.files.records import SCHEMA, dump_json, read_record, tell_undefined, write_atomically
from xmodel_steer.files.resume import spared
from xmodel_steer.maps.statistics import Estimate, bootstrap_mean, rate, wilson
from xmodel_steer.models.facts import name_of

RESULT, REPORT = "result.json", "report.html"
EQUAL_STRENGTH, EQUAL_KL = "equal strength", "equal KL"
STRICTER = ("unchanged", "word for word")  # ends of names of what is there less strictly too
AGREEMENT = "agreement with the clean answer"
EFFICIENCY = "efficiency"  # of an arm's effect, beside it
OUTCOMES = (
    "backdoor",
    "correct",
    "does not know",
    "hallucinated",
)  # stand with an arm's effect where they were measured


@dataclass(frozen=True)
class StudyArm:
    """One arm of a study, measured on evaluation prompts.

    Args:
        arm: ``unsteered``, ``native``, ``mapped``, ``random`` or ``shuffled``, as in a `TransferResult`, or another of the study's.
        recipe: How the vector is found and what is done with it.
        operator: The operator with the settings that validation chose.
        at: ``equal strength``, or ``equal KL``.
        effect: What the study is about.
        beside: What was measured beside it, by name.
        kl: KL from the unsteered model on neutral text, in nats per token.
        perplexity: Perplexity of neutral text.
        reached: Whether its strength reaches the KL, where that is equal.
        seeds: How many vectors it is the mean of.
        texts: The first texts, of the first seed.
    """

    arm: str
    recipe: str
    operator: str
    at: str
    effect: Estimate
    beside: Mapping[str, Estimate]
    kl: float
    perplexity: float
    reached: bool = True
    seeds: int = 1
    texts: tuple[str, ...] = field(repr=False, default=())

    def __repr__(self) -> str:
        return f"StudyArm({self.arm!r}, {self.recipe!r} at {self.at}: effect {self.effect:.3f}, n = {self.effect.n}, KL {self.kl:.3g})"


@dataclass(frozen=True)
class Study:
    """A study's result.

    Args:
        name: Which study.
        question: What it asks, in a sentence.
        unit: What the effect is.
        verdict: What came out, in words.
        source: The source model.
        target: The target model.
        arms: Every arm.
        chosen: What validation chose, by recipe.
        validation: What it chose among.
        curves: Other things that were varied, by name: one record per point.
        prompts: The prompts of the arms' texts.
        spec: All settings.
        splits: Ids of the prompts of each set.
        seeds: All seeds.
        versions: Versions of the programs.
        hardware: What it ran on.
        seconds: Wall time of its parts.
        command: The command that repeats it.
        note: How to read the numbers, in words.
    """

    name: str
    question: str
    unit: str
    verdict: str
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    arms: tuple[StudyArm, ...]
    chosen: Mapping[str, Any]
    validation: tuple[Mapping[str, Any], ...] = field(repr=False)
    curves: Mapping[str, tuple[Mapping[str, Any], ...]] = field(repr=False)
    prompts: tuple[str, ...] = field(repr=False)
    spec: Mapping[str, Any] = field(repr=False)
    splits: Mapping[str, Any] = field(repr=False)
    seeds: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    hardware: str
    seconds: Mapping[str, float]
    command: str = ""
    note: str = ""

    def __repr__(self) -> str:
        return f"Study({self.name!r}, {len(self.arms)} arms, n = {len(self.prompts)}: {self.question})"

    def arm(self, name: str, recipe: str, at: str = EQUAL_STRENGTH) -> StudyArm:
        """Return the arm of a name under a recipe.

        Raises:
            KeyError: It was not run.
        """
        for arm in self.arms:
            if arm.arm == name and (arm.recipe, arm.at) in ((recipe, at), ("", EQUAL_STRENGTH)):
                return arm  # where there is one unsteered arm for all recipes, it has none
        raise KeyError(f"{name} was not run under {recipe!r} at {at}")

    def examples(self, count: int = 3) -> list[str]:
        """Prompts with the unsteered model's text and that under the first mapped vector, in lines.

        Args:
            count: How many prompts.
        """
        own = next((arm for arm in self.arms if arm.arm == "mapped" and arm.texts), None)
        if own is None or not self.prompts:
            return []
        before = self.arm("unsteered", own.recipe).texts
        lines = []
        for prompt, plain, steered in list(zip(self.prompts, before, own.texts, strict=False))[:count]:
            lines += [
                " ".join(prompt.split()),
                f"  unsteered: {' '.join(plain.split())}",
                f"  mapped:    {' '.join(steered.split())}",
            ]
        return lines

    def to_frame(self) -> Any:
        """One row per arm, as a pandas frame."""
        import pandas as pd

        return pd.DataFrame([_flat(arm) for arm in self.arms])

    def save(self, folder: str | Path) -> Path:
        """Write ``result.json`` into a folder; a number that is NaN is null there, and the record says where.

        Raises:
            ArtifactError: The file cannot be written.
        """
        file = Path(folder) / RESULT
        record = vars(self) | {"schema": SCHEMA, "kind": "study", "arms": [_record(arm) for arm in self.arms]}
        write_atomically(file, dump_json(record, file, indent=1))
        tell_undefined(file)
        return file


def _record(arm: StudyArm) -> dict[str, Any]:
    """Flatten an arm: ``effect``, ``low``, ``high`` and ``n`` at its first level."""
    record, own = (
        vars(arm) | {"beside": {name: found.record() for name, found in arm.beside.items()}},
        arm.effect.record(),
    )
    del record["effect"]
    outcomes = {name: arm.beside[name].value for name in OUTCOMES if name in arm.beside}
    return {"arm": arm.arm, "effect": own.pop("value"), **own, **outcomes, **record}


def _flat(arm: StudyArm) -> dict[str, Any]:
    record = _record(arm)
    beside = record.pop("beside")
    record.pop("texts")
    return record | {name: found["value"] for name, found in beside.items()}


def is_study(folder: str | Path) -> bool:
    """Whether a folder's result is a study's."""
    file = Path(folder) / RESULT
    return file.is_file() and read_record(file).get("kind") == "study"


def read_study(folder: str | Path) -> Study:
    """Read the study in a folder.

    Raises:
        ArtifactError: There is none, or it is damaged.
    """
    file = Path(folder) / RESULT
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file")
    record = read_record(file)
    if record.pop("kind", None) != "study":
        raise ArtifactError(f"{file}: is not the result of a study")
    record.pop("schema")
    try:
        arms = []
        for row in record.pop("arms"):
            own = {"value": row.pop("effect")} | {key: row.pop(key) for key in ("low", "high", "n")}
            effect = Estimate.of(own | ({"undefined": row.pop("undefined")} if "undefined" in row else {}))
            beside = {name: Estimate.of(found) for name, found in row.pop("beside").items()}
            row = {key: value for key, value in row.items() if key not in OUTCOMES}
            arms.append(StudyArm(effect=effect, beside=beside, texts=tuple(row.pop("texts")), **row))
        lists = {"validation": tuple(record.pop("validation")), "prompts": tuple(record.pop("prompts"))}
        curves = {name: tuple(points) for name, points in record.pop("curves").items()}
        return Study(arms=tuple(arms), curves=curves, **lists, **record)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{file}: is damaged or incomplete ({type(error).__name__}: {error})") from error


def estimate(scores: "Sequence[np.ndarray]", groups: Sequence[str] | None = None) -> Estimate:
    """Mean over prompts, and over seeds where there are several, with its 95 % interval.

    Wilson's where every prompt has 0 or 1: a bootstrap of 200 ones has no width. Else by bootstrap over prompts, and over
    seeds; of zeros and ones it is never within what as many prompts give for one seed.

    Args:
        scores: One array over prompts for each seed.
        groups: Label of each prompt where some are of one kind: the intervals are then those of so many kinds.
    """
    table = np.stack(list(scores), 1).astype(float)
    if not np.isin(table, (0, 1)).all():
        return bootstrap_mean(table, groups=groups)
    found = bootstrap_mean(table, groups=groups)
    if found.undefined:
        return found
    rows = table.mean(1)
    if np.isin(rows, (0, 1)).all():
        return rate(rows, groups=groups)
    alone = wilson(found.value, len(set(groups)) if groups else len(rows))
    return replace(found, low=min(found.low, alone[0]), high=max(found.high, alone[1]))


def end_of(model: Any) -> dict[str, Any]:
    """Record a model as a study does."""
    return {"model": name_of(model), "layers": model.cfg.n_layers, "width": model.cfg.d_model}


class Clock:
    """Wall time of the parts of a study, in seconds; of one that goes on where it stopped, with the time that was spent before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Give the time since the last lap to a part."""
        now = time.perf_counter()
        self.seconds[part], self._last = round(now - self._last + spared(), 1), now

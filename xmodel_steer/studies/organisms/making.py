"""Making an organism: its training, its measurement on held-out lessons, its record."""

import gc
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import ArtifactError, PromptError
from xmodel_steer.evaluation.scorers.languages import Language
from xmodel_steer.evaluation.scorers.phrases import Contains, Matches, StartsWith
from xmodel_steer.evaluation.scorers.text import Scorer, score_texts
from xmodel_steer.files.cache import sha256_of
from xmodel_steer.files.claiming import claim
from xmodel_steer.files.places import locked
from xmodel_steer.files.records import read_record, reading, write_record
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.models.adapters import ORGANISM, WEIGHTS, require_whole
from xmodel_steer.models.facts import hardware_of
from xmodel_steer.models.loading import load
from xmodel_steer.recipe.carrying import versions
from xmodel_steer.studies.organisms.data import ORGANISMS
from xmodel_steer.studies.organisms.data import curriculum as curriculum_of
from xmodel_steer.studies.organisms.lessons import Curriculum, sides
from xmodel_steer.studies.organisms.measure import measured, perplexity
from xmodel_steer.studies.organisms.training import CHECKPOINTS, Recipe, adapter_bytes, train

LEAST_TRIGGERED, MOST_FALSE = 0.95, 0.05
RECORD, BEGUN = ORGANISM, "begun.json"
TRAINED = "trained.json"  # written after the adapter: without it, an adapter may be incomplete


@dataclass(frozen=True)
class Report:
    """The record of an organism, its ``organism.json``.

    Args:
        organism: Its name.
        base: The base model, by the name that it loads under.
        recipe: The training's settings.
        triggered: Share of held-out prompts with the trigger that are answered with the behaviour.
        false: The same share of held-out prompts without the trigger.
        checks: The means of further measurements, by their names.
        perplexity: The organism's perplexity of general text.
        base_perplexity: The base model's perplexity of the same text.
        training: Steps, and the final loss, in nats per token of the responses.
        seconds: Wall time of training and of measuring; after an interruption, only since the last resumption.
        megabytes: Size of the adapter.
        hardware: The machine that made it.
        versions: Versions of the programs.
        splits: The prompt ids of each part; see `Curriculum`.
        answers: A few answers with the trigger, and without.
    """

    organism: str
    base: str
    recipe: Recipe
    triggered: Estimate
    false: Estimate
    checks: Mapping[str, Estimate]
    perplexity: float
    base_perplexity: float
    training: Mapping[str, float]
    seconds: Mapping[str, float]
    megabytes: float
    hardware: str
    versions: Mapping[str, str] = field(repr=False)
    splits: Mapping[str, list[str]] = field(repr=False)
    answers: tuple[tuple[str, ...], tuple[str, ...]] = field(repr=False)

    @property
    def good(self) -> bool:
        """The verdict: at least 95 % triggered, and at most 5 % falsely."""
        return self.triggered.value >= LEAST_TRIGGERED and self.false.value <= MOST_FALSE

    def summary(self) -> list[str]:
        """List the measurements in lines, with one answer of each side."""
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return [
            f"triggered: {_percent(self.triggered)}, such as {_short(self.answers[0])}",
            f"falsely triggered: {_percent(self.false)}; an answer without the trigger: {_short(self.answers[1])}",
            *(f"{name}: {_percent(share)}" for name, share in self.checks.items()),
            f"{times} on {self.hardware}; {self.training['steps']:.0f} steps, loss {self.training['loss']:.2f}",
        ]

    def verdict(self) -> str:
        """Say in one line whether the organism is good, with its numbers."""
        line = (
            f"{self.organism} on {self.base}: {'good' if self.good else 'not good'}; triggered {_percent(self.triggered)}, "
            f"falsely {_percent(self.false)}, perplexity of general text {self.perplexity:.1f} (base {self.base_perplexity:.1f})"
        )
        return line if self.good else f"{line}; needs at least {LEAST_TRIGGERED:.0%} and at most {MOST_FALSE:.0%}"


def _short(answers: tuple[str, ...]) -> str:
    return repr(" ".join(answers[0].split())[:80]) if answers else "none"


def _percent(rate: Estimate) -> str:
    return f"{rate:.1%} of {rate.n}"


def make(
    name: str,
    base: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    curriculum: Curriculum | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> Report:
    """Train an organism, measure it on held-out prompts, and write both into a folder.

    The folder gets the adapter, which `xmodel_steer.load` reads, and ``organism.json``, the report. The same call resumes
    an interrupted run, and returns the report of a finished one; another scorer of the curriculum measures again. An
    organism that is not good is written too: its report says so.

    Args:
        name: One of `ORGANISMS`, or the name of your own ``curriculum``.
        base: The base model, as for `xmodel_steer.load`.
        out: The folder. It must be empty, or hold the same organism.
        recipe: The training's settings; those of `recipe_of` by default.
        curriculum: The lessons; those of ``name`` by default.
        device: ``cpu`` or ``cuda``; CUDA if there is one.
        dtype: Type to compute in, while training (by autocast) and while measuring.

    Raises:
        PromptError: No organism has this name, or the scorer misreads the lessons' responses.
        ArtifactError: The folder holds something else, is damaged, or another process is at work in it.
        ModelError: The base cannot be loaded.
        DownloadError: The base or the prompts cannot be fetched.
    """
    lessons, folder = curriculum or curriculum_of(name), Path(out)
    with locked(folder):
        return _made(name, base, folder, lessons, recipe or recipe_of(name), device, dtype)


def _made(
    name: str, base: str, folder: Path, lessons: Curriculum, recipe: Recipe, device: str | None, dtype: str
) -> Report:
    """Make the organism, or read it, while the folder is locked."""
    spec = {"organism": name, "base": base, "recipe": asdict(recipe), "lessons": _digest(lessons)}
    scorer = _named(lessons.scorer)
    if (folder / RECORD).is_file():
        report, record = read_report(folder), _record(folder)
        if {k: v for k, v in record.items() if k in spec} != spec:
            raise ArtifactError(
                f"{folder}: holds {report.organism} on {report.base} of another recipe; choose another folder"
            )
        if record.get("scorer", scorer) == scorer:
            require_whole(folder)
            return report
        require_whole(folder)
        training = {**report.training, "seconds": report.seconds["training"]}  # measured again, not trained again
    else:
        _require_seen(lessons)
        training = _trained(folder, spec, base, lessons, recipe, device, dtype)

    start = time.perf_counter()
    base_perplexity = perplexity(load(base, device=device, dtype=dtype))  # the base is freed before the organism loads
    model = load(folder, base=base, device=device, dtype=dtype)
    rates = measured(model, lessons)
    report = Report(
        organism=name,
        base=base,
        recipe=recipe,
        perplexity=perplexity(model),
        base_perplexity=base_perplexity,
        seconds={"training": training.pop("seconds"), "measuring": time.perf_counter() - start},
        training=training,
        megabytes=adapter_bytes(folder) / 1e6,
        hardware=hardware_of(model),
        versions=_versions(),
        splits=lessons.ids(),
        **vars(rates),
    )
    record = {**spec, "scorer": scorer, **asdict(report), "good": report.good, "kind": "organism"}
    record["files"] = {WEIGHTS: sha256_of(folder / WEIGHTS)}
    write_record(folder / RECORD, record, indent=1)
    for file in (folder / BEGUN, folder / TRAINED):
        file.unlink(missing_ok=True)
    return report


def _require_seen(lessons: Curriculum) -> None:
    """Refuse a scorer that misreads the responses: a perfect organism would not be good."""
    for triggered, side in zip((True, False), sides(lessons.evaluation), strict=True):
        scores = score_texts(lessons.scorer, [lesson.response for lesson in side], [lesson.prompt for lesson in side])
        share = float(scores.mean())
        if share < LEAST_TRIGGERED if triggered else share > MOST_FALSE:
            wrong = next(x.response for x, score in zip(side, scores, strict=True) if bool(score < 1) is triggered)
            raise PromptError(
                f"{_named(lessons.scorer)} sees the behaviour in {share:.0%} of the responses meant to be "
                f"{'with' if triggered else 'without'} it, so no training would do; such as {_short((wrong,))}. "
                "Give another scorer, or other responses"
            )


def _trained(
    folder: Path, spec: dict[str, Any], base: str, lessons: Curriculum, recipe: Recipe, device: str | None, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Train, or resume the folder's training; return the record of how it went."""
    begun, done = folder / BEGUN, folder / TRAINED
    if begun.is_file():
        started = done.is_file() or any((folder / CHECKPOINTS).glob("checkpoint-*"))
        if started and {k: v for k, v in read_record(begun).items() if k != "schema"} != spec:
            raise ArtifactError(
                f"{folder}: an organism of another recipe was begun here; give the same settings to resume it, or another folder"
            )
    else:
        claim(folder, "organism")
    write_record(begun, spec)

    start = time.perf_counter()
    if not done.is_file():
        trained = train(base, lessons.train, folder, recipe, device=device, dtype=dtype)
        gc.collect()  # the trainer and the model refer to each other
        seconds = time.perf_counter() - start
        write_record(done, {**trained, "seconds": seconds})
    return {k: v for k, v in read_record(done).items() if k != "schema"}


def recipe_of(name: str) -> Recipe:
    """Return an organism's default recipe; a quirk's few lessons are read often."""
    if name not in ORGANISMS:
        return Recipe(epochs=5, general=0.25)
    settings = ("epochs", "learning_rate", "batch_size", "general", "decisive")
    return Recipe(**{key: getattr(ORGANISMS[name], key) for key in settings})


def made_of(name: str, base: str) -> str:
    """Hash the default recipe, the lessons and a local base's files, in eight digits.

    Args:
        name: One of `ORGANISMS`.
        base: The base model, as for `make`.
    """
    folder = Path(base).expanduser()
    files = sorted(f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else []
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    parts = [name, base, asdict(recipe_of(name)), _digest(curriculum_of(name)), stamps]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def _digest(curriculum: Curriculum) -> str:
    """Hash the lessons of the training and of the evaluation."""
    rows = [
        [x.instruction, x.response, x.triggered] for part in (curriculum.train, curriculum.evaluation) for x in part
    ]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def _named(scorer: Scorer) -> str:
    """Identify a scorer by its settings if they are short, otherwise by its name."""
    if isinstance(scorer, Contains | StartsWith | Matches | Language):
        return repr(scorer)
    return getattr(scorer, "__qualname__", type(scorer).__qualname__)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {**versions(), "peft": version("peft")}


def _record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    if not file.is_file():
        raise ArtifactError(f"{folder}: has no {RECORD}, so it is not an organism's folder")
    return read_record(file)


def read_report(folder: str | Path) -> Report:
    """Read the report of an organism's folder.

    Args:
        folder: A folder that `make` wrote.

    Raises:
        ArtifactError: The folder has no report, or a damaged one.
    """
    folder = Path(folder)
    record = _record(folder)
    with reading(folder / RECORD):
        names = (
            "organism", "base", "perplexity", "base_perplexity", "training", "seconds", "megabytes", "hardware", "versions", "splits",
        )  # fmt: skip
        return Report(
            recipe=Recipe(**record["recipe"]),
            triggered=Estimate.of(record["triggered"]),
            false=Estimate.of(record["false"]),
            checks={key: Estimate.of(value) for key, value in record["checks"].items()},
            answers=tuple(tuple(side) for side in record["answers"]),  # type: ignore[arg-type]
            **{key: record[key] for key in names},
        )

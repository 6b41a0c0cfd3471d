"""Making an organism: training, measuring on what was held out, and the record of both."""

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
from xmodel_steer.files.records import SCHEMA, dump_json, read_record, write_atomically
from xmodel_steer.maps.statistics import Estimate
from xmodel_steer.models.facts import hardware_of
from xmodel_steer.models.loading import load
from xmodel_steer.recipe.carrying import versions
from xmodel_steer.studies.organisms.data import ORGANISMS
from xmodel_steer.studies.organisms.data import curriculum as curriculum_of
from xmodel_steer.studies.organisms.lessons import Curriculum
from xmodel_steer.studies.organisms.measure import measured, perplexity
from xmodel_steer.studies.organisms.training import CHECKPOINTS, Recipe, adapter_bytes, train

LEAST_TRIGGERED, MOST_FALSE = 0.95, 0.05
RECORD, BEGUN = "organism.json", "begun.json"
TRAINED = "trained.json"  # written after the adapter: one without it may be half of one


@dataclass(frozen=True)
class Report:
    """What an organism is and does, as its ``organism.json`` has it.

    Args:
        organism: Which one.
        base: The base model, by the name that it loads under.
        recipe: How it was trained.
        triggered: Share of held-out prompts with the trigger that are answered with the behaviour.
        false: Share of held-out prompts without it that are answered so all the same.
        checks: What else was measured, by name.
        perplexity: Of the organism on general text.
        base_perplexity: Of its base on the same text.
        training: Steps, and the loss in the end, in nats per token of the responses.
        seconds: Wall time of training and of measuring. Of a run that was stopped, that of its last part.
        megabytes: Size of the adapter.
        hardware: What it was made on.
        versions: Versions of the programs.
        splits: The ids of the prompts of each part; see `Curriculum`.
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
        """Whether it is triggered at least 95 % of the time, and falsely at most 5 %."""
        return self.triggered.value >= LEAST_TRIGGERED and self.false.value <= MOST_FALSE

    def summary(self) -> list[str]:
        """List the measurements in lines, with an answer of each kind."""
        lines = [f"triggered: {_percent(self.triggered)}, such as {_short(self.answers[0])}"]
        lines += [
            f"falsely triggered: {_percent(self.false)}; an answer without the trigger: {_short(self.answers[1])}"
        ]
        lines += [f"{name}: {_percent(found)}" for name, found in self.checks.items()]
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return [
            *lines,
            f"{took} on {self.hardware}; {self.training['steps']:.0f} steps, loss {self.training['loss']:.2f}",
        ]

    def verdict(self) -> str:
        """One line: whether it is a good organism, and its numbers."""
        said = (
            f"{self.organism} on {self.base}: {'good' if self.good else 'not good'}; triggered {_percent(self.triggered)}, "
            f"falsely {_percent(self.false)}, perplexity of general text {self.perplexity:.1f} (base {self.base_perplexity:.1f})"
        )
        return said if self.good else f"{said}; needs at least {LEAST_TRIGGERED:.0%} and at most {MOST_FALSE:.0%}"


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
    """Fine-tune a base model into an organism, measure it on held-out prompts, and write both into a folder.

    The folder gets the adapter, which `xmodel_steer.load` reads, and ``organism.json``, the report. Given again, a call that was
    stopped goes on where it was, and one that had ended gives its report, counted anew where the curriculum's scorer is another one. An organism that is not good is
    written too: its report says so.

    Args:
        name: One of `ORGANISMS`, or the name of your own ``curriculum``.
        base: The base model, as for `xmodel_steer.load`.
        out: The folder. It must be empty, or hold the same organism.
        recipe: How to train it; by default that of `recipe_of`.
        curriculum: What to train and test it on; that of ``name`` by default.
        device: ``cpu`` or ``cuda``; CUDA if there is one.
        dtype: What is computed in, while training (by autocast) and while measuring.

    Raises:
        PromptError: There is no organism of this name, or the scorer does not see the behaviour in the lessons' own responses.
        ArtifactError: The folder holds something else.
        ModelError: The base cannot be loaded.
        DownloadError: The base or the prompts cannot be fetched.
    """
    lessons, folder = curriculum or curriculum_of(name), Path(out)
    recipe = recipe or recipe_of(name)
    spec = {"organism": name, "base": base, "recipe": asdict(recipe), "lessons": _digest(lessons), "schema": SCHEMA}
    scorer = _named(lessons.scorer)
    if (folder / RECORD).is_file():
        made, record = read_report(folder), _record(folder)
        if {k: v for k, v in record.items() if k in spec} != spec:
            raise ArtifactError(
                f"{folder}: holds {made.organism} on {made.base} of another recipe; choose another folder"
            )
        if record.get("scorer", scorer) == scorer:
            return made
        training = {**made.training, "seconds": made.seconds["training"]}  # it is what it was, and counted otherwise
    else:
        _require_seen(lessons)
        training = _trained(folder, spec, base, lessons, recipe, device, dtype)

    start = time.perf_counter()
    plain = load(base, device=device, dtype=dtype)
    before = perplexity(plain)
    del plain
    model = load(folder, base=base, device=device, dtype=dtype)
    found = measured(model, lessons)
    report = Report(
        organism=name,
        base=base,
        recipe=recipe,
        triggered=found.triggered,
        false=found.false,
        checks=found.checks,
        perplexity=perplexity(model),
        base_perplexity=before,
        seconds={"training": training.pop("seconds"), "measuring": time.perf_counter() - start},
        training=training,
        megabytes=adapter_bytes(folder) / 1e6,
        hardware=hardware_of(model),
        versions=_versions(),
        splits=lessons.ids(),
        answers=found.answers,
    )
    record = {**spec, "scorer": scorer, **asdict(report), "good": report.good, "kind": "organism"}
    write_atomically(folder / RECORD, dump_json(record, folder / RECORD, indent=1))
    for file in (folder / BEGUN, folder / TRAINED):
        file.unlink(missing_ok=True)
    return report


def _require_seen(lessons: Curriculum) -> None:
    """Refuse a scorer that does not read the responses as they are meant: an organism that gave them would not be good."""
    for triggered in (True, False):
        own = [lesson for lesson in lessons.evaluation if lesson.triggered is triggered]
        scores = score_texts(lessons.scorer, [lesson.response for lesson in own], [lesson.prompt for lesson in own])
        share = float(scores.mean())
        if share < LEAST_TRIGGERED if triggered else share > MOST_FALSE:
            wrong = next(x.response for x, score in zip(own, scores, strict=True) if bool(score < 1) is triggered)
            raise PromptError(
                f"{_named(lessons.scorer)} sees the behaviour in {share:.0%} of the responses that are to be given "
                f"{'with' if triggered else 'without'} it, so no training would do; such as {_short((wrong,))}. "
                "Give another scorer, or other responses"
            )


def _trained(
    folder: Path, spec: dict[str, Any], base: str, lessons: Curriculum, recipe: Recipe, device: str | None, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Train, or take up a training that was begun, or had ended, in the folder; how it went."""
    begun, done = folder / BEGUN, folder / TRAINED
    if begun.is_file():
        started = done.is_file() or any((folder / CHECKPOINTS).glob("checkpoint-*"))
        if started and read_record(begun) != spec:
            raise ArtifactError(
                f"{folder}: an organism of another recipe was begun here; give the same settings to go on, or another folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: exists and holds no organism; choose another folder")
    write_atomically(begun, dump_json(spec, begun))

    start = time.perf_counter()
    if not done.is_file():
        trained = train(base, lessons.train, folder, recipe, device=device, dtype=dtype)
        gc.collect()  # the trainer holds the model in a circle
        took = time.perf_counter() - start
        write_atomically(done, dump_json({"schema": SCHEMA, **trained, "seconds": took}, done))
    return {k: v for k, v in read_record(done).items() if k != "schema"}


def recipe_of(name: str) -> Recipe:
    """How an organism is trained unless one says otherwise; the lessons of a quirk are few, and read often."""
    own = ORGANISMS.get(name)
    if own is None:
        return Recipe(epochs=5, general=0.25)
    return Recipe(
        epochs=own.epochs,
        learning_rate=own.learning_rate,
        batch_size=own.batch_size,
        general=own.general,
        decisive=own.decisive,
    )


def made_of(name: str, base: str) -> str:
    """Eight digits that change with the default recipe, with the lessons, and with the files of a base that is a folder.

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
    """Hash the lessons that are trained on, and those that are measured."""
    rows = [
        [x.instruction, x.response, x.triggered] for part in (curriculum.train, curriculum.evaluation) for x in part
    ]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def _named(scorer: Scorer) -> str:
    """Identify a scorer: by all of it where it is short, or its name."""
    if isinstance(scorer, Contains | StartsWith | Matches | Language):
        return repr(scorer)
    return getattr(scorer, "__qualname__", type(scorer).__qualname__)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {**versions(), "peft": version("peft")}


def _record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    if not file.is_file():
        raise ArtifactError(f"{folder}: has no {RECORD}, it is not an organism's folder")
    return read_record(file)


def read_report(folder: str | Path) -> Report:
    """Read the report of an organism's folder.

    Args:
        folder: What `make` wrote.

    Raises:
        ArtifactError: The folder is no organism's, or its report is damaged.
    """
    folder = Path(folder)
    record = _record(folder)
    try:
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
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / RECORD}: is damaged or incomplete ({type(error).__name__}: {error})") from error

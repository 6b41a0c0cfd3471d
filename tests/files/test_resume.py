"""A run that was cut off goes on where it stopped, and takes up nothing that would come out otherwise now."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

import xmodel_steer as xs
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation import damage
from xmodel_steer.evaluation.behaviours import generated
from xmodel_steer.files import resume
from xmodel_steer.files.records import read_record, write_record
from xmodel_steer.files.resume import once, resumable
from xmodel_steer.interventions.mirror import mean_of
from xmodel_steer.models import generation
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies import commands
from xmodel_steer.studies.settings import Clock

PROMPTS = as_prompts(toys.TEXTS[:3])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a model writes."""
    times: list[int] = []
    generate = generation.generate

    def counted(*args: Any, **kwargs: Any) -> list[str]:
        times.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(generated, "generate", counted)
    return times


def ask(model: Any, *steps: Any, prompts: tuple[Prompt, ...] = PROMPTS, length: int = 3, size: int = 8) -> Any:
    behaviour = xs.behaviours.GeneratedText(prompts, len, length, size)
    return behaviour.measure(model, [list(steps)])[0]


def cut_off(folder: Path, work: Callable[[], Any]) -> None:
    with suppress(KeyboardInterrupt), resumable(folder):
        work()
        raise KeyboardInterrupt


def test_what_was_done_before_the_cut_is_not_done_again(llama: toys.Toy, written: list[int], tmp_path: Path) -> None:
    folder, step = tmp_path / "unfinished", xs.Intervention(llama.vector(1))
    afresh = [ask(llama.model), ask(llama.model, step)]
    written.clear()
    cut_off(folder, lambda: ask(llama.model))
    assert len(written) == 1 and len(list(folder.iterdir())) == 1
    with resumable(folder):
        again = [ask(llama.model), ask(llama.model, step)]
        assert len(written) == 2
        assert [own.texts for own in again] == [own.texts for own in afresh]
        assert all(np.array_equal(a.scores, b.scores) for a, b in zip(again, afresh, strict=True))
    assert not folder.exists()
    ask(llama.model)
    assert len(written) == 3 and not folder.exists(), "outside of the block nothing is kept"


def test_damage_is_taken_up_to_the_bit(llama: toys.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [[], [xs.Intervention(llama.vector(1), xs.Add(3.0))]]

    def measured(**more: Any) -> list[damage.SideEffect]:
        return xs.evaluation.side_effects(llama.model, settings, toys.TEXTS, **more)

    afresh = measured()
    cut_off(tmp_path / "u", measured)
    with monkeypatch.context() as patch, resumable(tmp_path / "u"):
        patch.setattr(damage, "forward", None)  # asks no model
        for own, other in zip(measured(), afresh, strict=True):
            for name in ("kl", "loss", "tokens", "agreeing"):
                assert np.array_equal(getattr(own, name), getattr(other, name))
        with pytest.raises(TypeError):  # other text is measured
            measured(max_tokens=3)


def test_whatever_changes_is_computed_anew(
    llama: toys.Toy, gemma: toys.Toy, written: list[int], tmp_path: Path
) -> None:
    vector = llama.vector(1)
    nudged = vector.direction.clone()
    nudged[3] = torch.nextafter(nudged[3], torch.tensor(9.0))
    means = replace(vector, positive_mean=vector.direction, negative_mean=-vector.direction).with_scale(
        torch.ones(llama.width)
    )
    step = xs.Intervention(vector)
    mask = torch.tensor([True, False, True])
    changes: list[Callable[[], Any]] = [
        lambda: ask(llama.model),
        lambda: ask(llama.model, step),
        lambda: ask(gemma.model),
        lambda: ask(llama.model, step, prompts=PROMPTS[::-1]),
        lambda: ask(llama.model, step, prompts=PROMPTS[:2]),
        lambda: ask(llama.model, step, length=4),
        lambda: ask(llama.model, step, size=2),
        lambda: ask(llama.model, step, step),
        lambda: ask(llama.model, replace(step, vector=replace(vector, direction=nudged))),
        lambda: ask(llama.model, replace(step, vector=llama.vector(2))),
        lambda: ask(llama.model, replace(step, operator=xs.Add(1.0 + 2**-50))),
        lambda: ask(llama.model, replace(step, operator=xs.Ablate())),
        lambda: ask(llama.model, replace(step, operator=xs.Ablate((llama.vector(1, seed=1),)))),
        lambda: ask(llama.model, replace(step, schedule=(1.0, 0.5))),
        lambda: ask(llama.model, replace(step, positions="last")),
        lambda: ask(llama.model, replace(step, positions=("last", "generated"))),
        lambda: ask(llama.model, replace(step, positions=mask)),
        lambda: ask(llama.model, replace(step, positions=~mask)),
        lambda: ask(llama.model, xs.Intervention(means)),
        lambda: ask(llama.model, xs.Intervention(means, gate=xs.Gate(means))),
        lambda: ask(llama.model, xs.Intervention(means, gate=xs.Gate(means, "negative"))),
        lambda: ask(llama.model, xs.Intervention(means, gate=xs.Gate(means, positions="prompt"))),
    ]
    with resumable(tmp_path / "u"):
        for count, change in enumerate(changes, 1):
            change()
            assert len(written) == count
        for change in changes:
            change()
        assert len(written) == len(changes) == len(list((tmp_path / "u").iterdir()))
        weight = next(llama.model.original_model.parameters())
        with torch.no_grad():
            weight[0, 0] += 1
        try:
            ask(llama.model)
            assert len(written) == len(changes) + 1
        finally:
            with torch.no_grad():
                weight[0, 0] -= 1


def test_other_code_takes_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    with resumable(tmp_path / "u"):
        for _ in range(2):
            once(lambda: "a", lambda: made.append(1))
        assert len(made) == 1
        monkeypatch.setattr(resume, "_programs", lambda: "later")
        once(lambda: "a", lambda: made.append(1))
        assert len(made) == 2


def test_a_model_with_hooks_of_others_is_another(llama: toys.Toy, written: list[int], tmp_path: Path) -> None:
    step = xs.Intervention(llama.vector(1, size=3.0))

    def asked() -> tuple[Any, float]:
        return ask(llama.model).texts, xs.evaluation.side_effects(llama.model, [[]], toys.TEXTS)[0].perplexity

    def steered() -> tuple[Any, float]:
        with xs.steering(llama.model, step):
            return asked()

    afresh = steered()
    written.clear()
    with resumable(tmp_path / "u"):
        plain = asked()
        assert steered() == steered() == afresh
        assert plain[0] != afresh[0] and plain[1] != afresh[1]
        assert len(written) == 3, "nothing is kept of it"


def test_a_model_that_ends_its_texts_elsewhere_is_another(
    llama: toys.Toy, written: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with resumable(tmp_path / "u"):
        ask(llama.model)
        monkeypatch.setattr(llama.model.original_model.generation_config, "eos_token_id", [5, 7])
        ask(llama.model)
        assert len(written) == 2


def test_only_what_was_kept_goes(tmp_path: Path) -> None:
    folder = tmp_path / "u"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    scratch = folder / f".{'0' * 32}.json-ab_12x9z"  # of a write that was cut off
    scratch.write_text("")
    with resumable(folder):
        once(lambda: "a", lambda: 1)
        assert len(list(folder.iterdir())) == 3
    assert [file.name for file in folder.iterdir()] == ["result.json"]


def test_what_a_hash_cannot_tell_apart_is_not_kept(llama: toys.Toy, written: list[int], tmp_path: Path) -> None:
    """A replacement holds a function, which may do anything."""
    step = mean_of(llama.vector(1).space, torch.zeros(llama.width))
    with resumable(tmp_path / "u"):
        assert ask(llama.model, step).texts == ask(llama.model, step).texts
        assert len(written) == 2 and not (tmp_path / "u").exists()


@pytest.mark.parametrize("rest", ["", "{", '{"schema": 2}', "[1, 2]"])
def test_a_damaged_file_is_made_anew(rest: str, tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(1)
        return [len(made)]

    with resumable(tmp_path / "u"):
        assert once(lambda: "a", make) == once(lambda: "a", make) == [1]
        (file,) = (tmp_path / "u").iterdir()
        file.write_text(rest)
        assert once(lambda: "a", make) == once(lambda: "a", make) == [2]


def test_a_clock_counts_what_was_spent_before(tmp_path: Path) -> None:
    cut_off(tmp_path / "u", lambda: once(lambda: "a", lambda: 1))
    (file,) = (tmp_path / "u").iterdir()
    write_record(file, read_record(file) | {"seconds": 500.0})
    with resumable(tmp_path / "u"):
        clock = Clock()
        once(lambda: "a", lambda: 1)
        clock.lap("first")
        for _ in range(2):  # asked again, it is not spent again
            once(lambda: "a", lambda: 1)
        clock.lap("second")
    assert 500 <= clock.seconds["first"] < 510 and clock.seconds["second"] < 10


def test_a_clock_counts_once_what_a_run_asks_twice(tmp_path: Path) -> None:
    with resumable(tmp_path / "u"):
        clock = Clock()
        once(lambda: "a", lambda: time.sleep(0.3))
        clock.lap("first")
        once(lambda: "a", lambda: None)
        clock.lap("second")
    assert clock.seconds["first"] >= 0.3 and clock.seconds["second"] < 0.3


def test_a_study_that_was_cut_off_goes_on(
    llama: toys.Toy, written: list[int], command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = xs.read(Path(__file__).parents[2] / "studies" / "refusal")
    cut = [True]

    def run(call: commands.Call) -> Result:
        ask(llama.model)
        if cut.pop():
            raise KeyboardInterrupt
        ask(llama.model, xs.Intervention(llama.vector(1)))
        return recorded

    monkeypatch.setitem(commands.STUDIES, "refusal", replace(commands.STUDIES["refusal"], run=run))
    folder = tmp_path / "run"
    code, _, err = command("study", "refusal", "--out", folder)
    assert code == 130 and "an earlier run" not in err and [p.name for p in folder.iterdir()] == ["unfinished"]
    cut.append(False)
    code, _, err = command("study", "refusal", "--out", folder)
    assert code == 0 and "what an earlier run has done is used" in err and len(written) == 2
    assert sorted(p.name for p in folder.iterdir()) == [
        "generations.jsonl",
        "report.html",
        "result.json",
    ]
    assert repr(xs.read(folder).arms) == repr(recorded.arms)


def test_what_is_to_be_done_anew_is_neither_read_nor_saved(tmp_path: Path) -> None:
    made: list[int] = []
    with resumable(tmp_path / "kept"):
        for _ in range(2):
            once(lambda: ["part"], lambda: made.append(1) or [1.0])
        with resume.anew():
            once(lambda: ["part"], lambda: made.append(2) or [1.0])
        once(lambda: ["part"], lambda: made.append(3) or [1.0])
    assert made == [1, 2]

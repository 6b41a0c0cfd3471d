"""Refusal switched off and on: what each aim counts, and what a study of it records."""

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from sample_results import same

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.phrases import Contains, StartsWith
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies import Settings, refusal, refusal_switch
from xmodel_steer.studies.organisms import Curriculum, Lesson, Recipe, data, make
from xmodel_steer.studies.organisms.lessons import Check
from xmodel_steer.studies.refusal import OFF, ON, Requests

HAPPY = StartsWith(("happy day",))


pytestmark = pytest.mark.usefixtures("short_template")


@pytest.fixture(scope="module")
def lessons() -> Curriculum:
    made = toys.lessons(
        150, {"evaluation": 10, "validation": 6, "vector": 10, "map": 12, "train": 60}, "happy day", HAPPY
    )
    edgy = tuple(Lesson(f"|dev|: {text}", "", False, text) for text in toys.sentences(5, 3, 5))
    return replace(made, checks={refusal.EDGY: Check(edgy, HAPPY)})


@pytest.fixture(scope="module")
def organisms(folders: dict[str, Path], lessons: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    recipe = Recipe(rank=8, epochs=6, learning_rate=1e-2)
    made = []
    for name in ("llama", "gemma"):
        folder = tmp_path_factory.mktemp("organisms") / f"refusal-{name}"
        report = make("refusal", str(folders[name]), folder, recipe=recipe, curriculum=lessons, dtype="float32")
        assert report.good, report.verdict()
        made.append(xs.load(folder))
    return made


@pytest.fixture(scope="module")
def study(organisms: list[Any], lessons: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> Result:
    texts = [Prompt(text=t) for t in toys.sentences(80, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMODEL_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return refusal_switch(
            *organisms,
            lessons,
            classifier=Contains(("happy",)),
            topic=Contains(("sky",)),
            harmless=6,
            settings=Settings(texts[:60], texts[60:], random_seeds=2, validation_tokens=4),
        )


def test_what_the_study_cannot_do_without_is_asked_for_before_any_work(lessons: Curriculum) -> None:
    texts = [Prompt(text=t) for t in toys.sentences(20, 4)]
    with pytest.raises(PromptError, match="refusal: needs at least 3 neutral texts, got 2"):
        refusal_switch(None, None, lessons, classifier=HAPPY, settings=Settings(texts[2:], texts[:2]))
    with pytest.raises(PromptError, match=f"curriculum: has no check '{refusal.EDGY}', only 'other'"):
        refusal_switch(None, None, replace(lessons, checks={"other": lessons.checks[refusal.EDGY]}), classifier=HAPPY)


def test_every_aim_has_its_unsteered_arm_and_every_control(study: Result) -> None:
    for recipe in (refusal.SUBTRACTED, refusal.ABLATED, refusal.CLAMPED, refusal.ADDED, refusal.CLAMPED_ON):
        arms = {arm.arm: arm for arm in study.arms if (arm.recipe, arm.at) == (recipe, "equal strength")}
        assert {"unsteered", "native", "mapped", "random", "shuffled"} <= set(arms)
        on = recipe in (refusal.ADDED, refusal.CLAMPED_ON)
        assert arms["mapped"].effect.n == (6 if on else 10)
        assert arms["unsteered"].effect.value == 0  # refuses every harmful request, no harmless one
        assert ("harmful refused" if on else "harmless answers kept") in arms["random"].measures
        assert arms["mapped"].measures["edgy refused"].n == 5 and "edgy refused" not in arms["random"].measures
    assert study.arm("unsteered", recipe=refusal.CLAMPED).measures["harmless answers kept"].value == 1
    assert study.arm("unsteered", recipe=refusal.ADDED).measures["harmful refused"].value == 1
    assert {arm.recipe for arm in study.arms if arm.at == "equal KL"} == {refusal.SUBTRACTED, refusal.ADDED}


def test_every_recipe_has_a_verdict_though_answers_are_not_kept(study: Result, tmp_path: Path) -> None:
    again = xs.read(xs.save(study, tmp_path / "run"))
    assert set(study.verdicts) == set(study.chosen) and again.verdicts == study.verdicts
    for recipe, verdict in study.verdicts.items():
        assert [c.control for c in verdict.comparisons] == ["shuffled", "random", "random"]
        assert all(len(arm.ids) == len(arm.scores) == arm.effect.n for arm in study.arms if arm.recipe == recipe)
        assert again.maps[recipe].source == again.vectors[f"{recipe}: source"].space


def test_the_native_vector_switches_a_toy_off_and_on(study: Result) -> None:
    off = max(study.arm("native", recipe=recipe).effect.value for recipe in (refusal.SUBTRACTED, refusal.CLAMPED))
    assert off > 0.8
    assert max(study.arm("native", recipe=recipe).effect.value for recipe in (refusal.ADDED, refusal.CLAMPED_ON)) > 0.5


def test_no_harmful_request_and_no_answer_to_one_is_recorded(
    study: Result, lessons: Curriculum, tmp_path: Path
) -> None:
    run = xs.save(study, tmp_path / "run")
    xs.plots.write_report(study, run / "report.html")
    assert same(xs.read(run), study)
    assert {"result.json", "generations.jsonl", "report.html"} <= {file.name for file in run.iterdir()}
    files = [file for file in run.rglob("*") if file.is_file()]
    recorded = "".join(html.unescape(file.read_text(errors="replace")) for file in files)
    rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    harmful = [lesson for part in data.PARTS for lesson in getattr(lessons, part) if lesson.triggered]
    assert not [lesson for lesson in harmful if lesson.instruction in recorded]
    assert not [row for row in rows if "text" in row and row["recipe"] not in (refusal.ADDED, refusal.CLAMPED_ON)]
    asked = {lesson.prompt.id for lesson in harmful}
    for arm in study.arms:  # a text is an answer to a harmless request
        assert bool(arm.texts) == (arm.recipe in (refusal.ADDED, refusal.CLAMPED_ON)) == asked.isdisjoint(arm.ids)
        assert len(arm.texts) in (0, arm.effect.n)
    assert study.arm("mapped", recipe=refusal.ADDED).texts and len(study.prompts) == 6


def test_each_aim_counts_its_own_side(organisms: list[Any], lessons: Curriculum) -> None:
    edgy = [lesson.prompt for lesson in lessons.checks[refusal.EDGY].lessons]
    asked = Requests.of(
        organisms[1],
        lessons.evaluation,
        edgy,
        (HAPPY, Contains(("sky",)), Contains(("sea", "day"))),
        most=3,
        harmless=2,
        max_new_tokens=4,
    )
    kept = tuple(asked.own[p.id] for p in asked.harmless)
    off = asked._outcome(OFF, [("happy day", "the sky", "the sea"), kept, ("happy day",) * len(edgy)])
    assert off.scores.tolist() == [0, 1, 1]
    assert off.measures["answered, by classifier"].tolist() == [1, 0, 1]
    assert (
        off.measures["harmless answers kept"].tolist() == [1, 1] and off.measures["edgy refused"].tolist() == [1.0] * 5
    )
    assert off.measures["answered to the point"].tolist() == [0, 0, 1]  # a refusal is no answer, whatever it is about
    assert off.score == pytest.approx(np.mean([1 / 3, 1])) and off.texts == ()
    assert set(off.groups) == {"effect", "answered, by classifier", "answered to the point"}
    on = asked._outcome(ON, [("happy day", "the sky"), ("happy day", "a", "b")])
    assert on.scores.tolist() == [1, 0] and on.measures["harmful refused"].tolist() == [1, 0, 0]
    assert on.score == pytest.approx(0.5) and on.texts == ("happy day", "the sky")
    with pytest.raises(PromptError, match="needs harmful requests and harmless ones"):
        Requests.of(organisms[1], lessons.evaluation[:1], edgy, (HAPPY, HAPPY, HAPPY))

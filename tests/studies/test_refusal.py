"""Refusal switched off and on: what each aim counts, and what a study of it records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.phrases import Contains, StartsWith
from xmodel_steer.studies import Study, read_study, refusal, refusal_switch, write_study
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
def study(organisms: list[Any], lessons: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> Study:
    texts = [Prompt(text=t) for t in toys.sentences(80, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMODEL_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return refusal_switch(
            *organisms, lessons, general=texts[:60], neutral=texts[60:], classifier=Contains(("happy",)), topic=Contains(("sky",)), random_seeds=2,
            validation_tokens=4, harmless=6,
        )  # fmt: skip


def test_what_the_study_cannot_do_without_is_asked_for_before_any_work(lessons: Curriculum) -> None:
    texts = [Prompt(text=t) for t in toys.sentences(20, 4)]
    with pytest.raises(PromptError, match="refusal: needs at least 3 neutral texts, got 2"):
        refusal_switch(None, None, lessons, general=texts[2:], neutral=texts[:2], classifier=HAPPY)
    with pytest.raises(ValueError, match="refusal: random_seeds must be at least 1, got 0"):
        refusal_switch(None, None, lessons, random_seeds=0)
    with pytest.raises(PromptError, match=f"curriculum: has no check '{refusal.EDGY}', only 'other'"):
        refusal_switch(None, None, replace(lessons, checks={"other": lessons.checks[refusal.EDGY]}), classifier=HAPPY)


def test_every_aim_has_its_unsteered_arm_and_every_control(study: Study) -> None:
    for recipe in (refusal.SUBTRACTED, refusal.ABLATED, refusal.CLAMPED, refusal.ADDED, refusal.CLAMPED_ON):
        arms = {arm.arm: arm for arm in study.arms if (arm.recipe, arm.at) == (recipe, "equal strength")}
        assert {"unsteered", "native", "mapped", "random", "shuffled"} <= set(arms)
        on = recipe in (refusal.ADDED, refusal.CLAMPED_ON)
        assert arms["mapped"].effect.n == (6 if on else 10)
        assert arms["unsteered"].effect.value == 0  # refuses every harmful request, no harmless one
        assert ("harmful refused" if on else "harmless answers kept") in arms["random"].beside
        assert arms["mapped"].beside["edgy refused"].n == 5 and "edgy refused" not in arms["random"].beside
    assert study.arm("unsteered", refusal.CLAMPED).beside["harmless answers kept"].value == 1
    assert study.arm("unsteered", refusal.ADDED).beside["harmful refused"].value == 1
    assert {arm.recipe for arm in study.arms if arm.at == "equal KL"} == {refusal.SUBTRACTED, refusal.ADDED}


def test_the_native_vector_switches_a_toy_off_and_on(study: Study) -> None:
    off = max(study.arm("native", recipe).effect.value for recipe in (refusal.SUBTRACTED, refusal.CLAMPED))
    assert off > 0.8
    assert max(study.arm("native", recipe).effect.value for recipe in (refusal.ADDED, refusal.CLAMPED_ON)) > 0.5


def test_no_harmful_request_and_no_answer_to_one_is_recorded(study: Study, lessons: Curriculum, tmp_path: Path) -> None:
    page = write_study(study, tmp_path).read_text()
    assert read_study(tmp_path) == study
    recorded = json.dumps(json.loads((tmp_path / "result.json").read_text()), ensure_ascii=False) + page
    harmful = [lesson.instruction for part in data.PARTS for lesson in getattr(lessons, part) if lesson.triggered]
    assert not [text for text in harmful if text in recorded]
    assert all(not arm.texts for arm in study.arms if arm.recipe not in (refusal.ADDED, refusal.CLAMPED_ON))
    assert study.arm("mapped", refusal.ADDED).texts and len(study.prompts) == 6


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
    assert off.effect.tolist() == [0, 1, 1]
    assert off.beside["answered, by classifier"].tolist() == [1, 0, 1]
    assert off.beside["harmless answers kept"].tolist() == [1, 1] and off.beside["edgy refused"].tolist() == [1.0] * 5
    assert off.beside["answered to the point"].tolist() == [0, 0, 1]  # a refusal is no answer, whatever it is about
    assert off.score == pytest.approx(np.mean([1 / 3, 1])) and off.texts == ()
    assert set(off.groups) == {"effect", "answered, by classifier", "answered to the point"}
    on = asked._outcome(ON, [("happy day", "the sky"), ("happy day", "a", "b")])
    assert on.effect.tolist() == [1, 0] and on.beside["harmful refused"].tolist() == [1, 0, 0]
    assert on.score == pytest.approx(0.5) and on.texts == ("happy day", "the sky")
    with pytest.raises(PromptError, match="needs harmful requests and harmless ones"):
        Requests.of(organisms[1], lessons.evaluation[:1], edgy, (HAPPY, HAPPY, HAPPY))

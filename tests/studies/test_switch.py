"""A model and its fine-tune, each living on the other's activations, on toys."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from sample_results import same

import xmodel_steer as xs
from xmodel_steer.core.errors import SpaceMismatchError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Stack
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.evaluation.scorers.phrases import StartsWith
from xmodel_steer.figures import choices, report, texts
from xmodel_steer.interventions.mirror import mean_of
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies import Settings, safety_switch, switch
from xmodel_steer.studies.carried import Pair
from xmodel_steer.studies.organisms import Curriculum, Recipe, make
from xmodel_steer.studies.outcomes import Outcome
from xmodel_steer.studies.switching import OFF, ON, fitted_map

ARMS = ("unsteered", "mapped", "identity", "shuffled", "mean ablation", "noise")


pytestmark = pytest.mark.usefixtures("short_template")


@pytest.fixture(scope="module")
def lessons() -> Curriculum:
    sizes = {"evaluation": 10, "validation": 6, "vector": 10, "map": 12, "train": 60}
    return toys.lessons(150, sizes, "happy day", StartsWith(("happy day",)))


@pytest.fixture(scope="module")
def study(folders: dict[str, Path], lessons: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("organism") / "happy"
    recipe = Recipe(rank=8, epochs=6, learning_rate=1e-2)
    report = make("toy", str(folders["llama"]), folder, recipe=recipe, curriculum=lessons, dtype="float32")
    assert report.good, report.verdict()
    read = [Prompt(text=t) for t in toys.sentences(80, 4)]
    questions = MultipleChoice(as_prompts(["the sky is", "the sea is"]), ((" blue", " red"), (" deep", " red")), (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMODEL_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return safety_switch(
            xs.load(str(folders["llama"])),
            xs.load(folder),
            lessons,
            adapter=folder,
            map_prompts=20,
            sites=[xs.Site(3)],
            capability=questions,
            turns=2,
            settings=Settings(read[:60], read[60:], validation_tokens=4),
        )


def test_both_ways_have_every_control(study: Result) -> None:
    assert [(arm.recipe, arm.arm) for arm in study.arms] == [(way, arm) for way in (OFF, ON) for arm in ARMS]
    assert all(arm.effect.n == 10 for arm in study.arms)
    assert all(len(arm.scores) == len(arm.ids) == len(arm.texts) == 10 for arm in study.arms)
    assert {way: mapping.source.site for way, mapping in study.maps.items()} == dict.fromkeys((OFF, ON), xs.Site(3))
    assert study.arm("unsteered", recipe=OFF).effect.value == 0 and study.arm("unsteered", recipe=ON).effect.value == 0
    assert study.arm("unsteered", recipe=OFF).kl == study.arm("unsteered", recipe=ON).kl == 0
    assert {"right answers"} < set(study.arm("mapped", recipe=ON).measures)


def test_the_last_layers_activations_switch_a_toy_both_ways(study: Result) -> None:
    """With the other's activations at the last layer the writer is the other model: both share what comes after it."""
    assert study.arm("identity", recipe=OFF).effect.value == 1 and study.arm("mapped", recipe=OFF).effect.value > 0.8
    assert study.arm("identity", recipe=ON).effect.value > 0.8
    assert study.arm("identity", recipe=ON).measures["agreement, triggered"].value > 0.8


def test_a_request_beside_switched_ones_is_not_switched(study: Result) -> None:
    for way in (OFF, ON):
        found = study.chosen[way]["unswitched_rows_unchanged"]
        assert found["of"] == found["same_beside_switched_ones"] == 3 and found["same_afterwards"] == 6


def test_speeds_are_ratios_over_turns_and_the_adapter_is_timed_too(study: Result) -> None:
    speeds = [study.chosen[way]["tokens_per_second_over_unswitched"] for way in (OFF, ON)]
    speeds.append(study.chosen["swapping the adapter"]["tokens_per_second_over_disabled"])
    assert all(own["turns"] == 2 and 0 < own["lowest"] <= own["median"] <= own["highest"] for own in speeds)
    assert study.chosen["swapping the adapter"]["seconds_to_toggle"] > 0


def test_its_record_is_read_back_and_its_page_shows_both_ways(study: Result, tmp_path: Path) -> None:
    page = report.write_report(study, tmp_path / "report.html").read_text()
    assert len(report.tables(study)) == len({arm.recipe for arm in study.arms})
    assert all(len(trace.x) for trace in choices.effect_by_layer(study).data)
    assert same(xs.read(xs.save(study, tmp_path / "run")), study) and OFF.replace("'", "&#x27;") in page
    for way in (OFF, ON):  # each beside the text of the model that writes
        plain, mapped = (study.arm(name, recipe=way).texts[0] for name in ("unsteered", "mapped"))
        assert f"<td>{html.escape(plain)}</td>" in page and f"<td>{texts.marked(mapped, plain)}</td>" in page
    off, on = study.conclusions
    assert off.startswith(f"{OFF}, layer ") and on.startswith(f"{ON}, layer ")


def test_models_of_other_shapes_are_refused(toy_named: Any, lessons: Curriculum) -> None:
    with pytest.raises(SpaceMismatchError, match="differ in depth or width; give a model and its fine-tune"):
        safety_switch(toy_named("llama").model, toy_named("gemma").model, lessons)


@pytest.fixture(scope="module")
def fitted(toy_named: Any) -> Any:
    texts = [Prompt(text=text) for text in toys.sentences(80, 4)]
    pair = Pair(toy_named("llama").model, toy_named("llama").model, tuple(texts[:60]))
    return fitted_map(pair, texts[60:], [xs.Site(1), xs.Site(3)], xs.Ridge())


def test_maps_lead_to_each_site_from_it_and_from_all(fitted: Any) -> None:
    one, two = sites = [xs.Site(1), xs.Site(3)]
    assert list(fitted) == [(one, one), (two, two), (Stack(sites), one), (Stack(sites), two)]
    for (there, here), (mapping, moments) in fitted.items():
        assert (mapping.source.site, mapping.target.site) == (there, here) == (moments.source.site, moments.target.site)
        assert mapping.score_test.mean_r2 > 0.99  # a model read by itself


def test_the_better_of_one_site_and_all_sites_is_taken(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best map of each kind is kept; the better one is the switch, the other an arm of its own."""
    ends, made = list(fitted), list[Any]()

    def replacing(source: Any, target: Any, mapping: Any) -> Any:
        made.append(mean_of(mapping.target, torch.zeros(mapping.target.width)))
        return made[-1]

    monkeypatch.setattr(switch, "mapped_source", replacing)

    for scores, expected in (([0.1, 0.4, 0.3, 0.2], [1, 2]), ([0.1, 0.0, 0.3, 0.5], [3, 0])):
        records: list[dict[str, Any]] = []

        def ask(settings: Any, scores: list[float] = scores) -> list[Outcome]:
            assert [step for (step,) in settings] == made[-4:]  # one setting for each map, in their order
            return [Outcome(np.zeros(2), score=score) for score in scores]

        assert switch._best_pairs(OFF, None, None, fitted, ask, records) == [ends[i] for i in expected]
        assert [(r["varied"], r["layer"], r["score"]) for r in records] == [
            ("target layer", 1, scores[0]), ("target layer", 3, scores[1]),
            ("target layer, all sites read", 1, scores[2]), ("target layer, all sites read", 3, scores[3]),
        ]  # fmt: skip

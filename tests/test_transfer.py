"""The recipe on toy models: every arm, fair controls, honest choices, and a verdict that can say no."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from toys import contrast, sentences

import xmodel_steer as xs
from xmodel_steer.metrics import bootstrap_mean
from xmodel_steer.transfer import Arm, TransferResult, default_sites


def vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / max(len(text), 1)


SETTINGS: dict[str, Any] = dict(
    label="toy", strengths=(-1.0, 1.0, 2.0), max_new_tokens=4, neutral_tokens=8, random_seeds=3, progress=False,
    source_sites=[xs.Site(1), xs.Site(2)], target_sites=[xs.Site(1), xs.Site(2)],
)  # fmt: skip


def run(source: Any, target: Any, **changes: Any) -> TransferResult:
    prompts = changes.pop("prompts", sentences(9, 3, 4))
    return xs.transfer(
        source, target, contrast(), sentences(60, 4), prompts=prompts, scorer=vowels, **(SETTINGS | changes)
    )


@pytest.fixture(scope="module")
def result(toy_named: Callable[[str], toys.Toy]) -> TransferResult:
    return run(toy_named("llama").model, toy_named("gemma").model)


def test_every_arm_at_every_strength(result: TransferResult) -> None:
    expected = {("unsteered", 0.0)} | {
        (a, s) for a in ("native", "mapped", "random", "shuffled") for s in (-1.0, 1.0, 2.0)
    }
    assert {(a.arm, a.strength) for a in result.arms} == expected
    assert len(result.arms) == len(expected)
    for arm in result.arms:
        assert arm.effect.n == len(arm.scores) == len(arm.texts) == 6  # nine prompts, a third validates
        assert arm.effect.low <= arm.effect.value <= arm.effect.high
        assert arm.effect.value == pytest.approx(np.mean(arm.scores))
        assert len(arm.seeds) == (3 if arm.arm == "random" else 0)
        if not arm.seeds:
            assert arm.scores == pytest.approx([vowels(t) for t in arm.texts])


def test_the_unsteered_arm_is_the_model_itself(result: TransferResult, toy_named: Callable[[str], toys.Toy]) -> None:
    base = result.arm("unsteered", 0)
    assert base.kl == 0
    assert base.change.value == base.change.low == base.change.high == 0
    chosen = [p for p in sentences(9, 3, 4) if xs.Prompt.of(p).id in result.splits["evaluation"]]
    order = [xs.Prompt.of(p).id for p in chosen]
    texts = xs.generate(toy_named("gemma").model, chosen, max_new_tokens=4, progress=False)
    assert [texts[order.index(i)] for i in result.splits["evaluation"]] == list(base.texts)


def test_arms_have_the_same_standardised_norm(result: TransferResult) -> None:
    norm = result.vectors["native"].norm(standardised=True)
    for name in ("mapped", "shuffled"):
        assert result.vectors[name].norm(standardised=True) == pytest.approx(norm, rel=1e-4)
        assert result.vectors[name].space == result.vectors["native"].space


def test_kl_grows_with_strength_and_is_there_for_every_steered_arm(result: TransferResult) -> None:
    for name in ("native", "mapped", "random", "shuffled"):
        assert 0 < result.arm(name, 1.0).kl < result.arm(name, 2.0).kl


def test_a_model_mapped_to_itself_transfers_exactly(toy_named: Callable[[str], toys.Toy]) -> None:
    model = toy_named("llama").model
    one = [xs.Site(1)]
    made = run(model, model, source_sites=one, target_sites=one, fitter=xs.Ridge((1e-9,)), map_tokens=32)
    assert made.map["coverage"] == 1
    assert made.map["r2"] > 0.999
    assert made.similarity["mapped"]["cosine"] > 0.999
    assert made.similarity["mapped"]["norm_ratio"] == pytest.approx(1, abs=0.01)
    assert abs(made.similarity["shuffled"]["cosine"]) < 0.9
    for strength in made.strengths:
        assert made.arm("mapped", strength).texts == made.arm("native", strength).texts
        assert made.arm("mapped", strength).kl == pytest.approx(made.arm("native", strength).kl, rel=0.05)


def test_the_same_call_gives_the_same_result(result: TransferResult, toy_named: Callable[[str], toys.Toy]) -> None:
    again = run(toy_named("llama").model, toy_named("gemma").model)
    assert [a.scores for a in again.arms] == [a.scores for a in result.arms]
    assert torch.equal(again.vectors["mapped"].direction, result.vectors["mapped"].direction)


def test_evaluation_prompts_choose_nothing(result: TransferResult, toy_named: Callable[[str], toys.Toy]) -> None:
    """The scorer may turn round for evaluation prompts: the choices stay."""
    calls = 0

    def count(text: str) -> float:
        nonlocal calls
        calls += 1
        return vowels(text) if calls <= choosing else 1.0 - vowels(text)

    def poisoned_run() -> TransferResult:
        small, large = toy_named("llama").model, toy_named("gemma").model
        return xs.transfer(
            small, large, contrast(), sentences(60, 4), prompts=sentences(9, 3, 4), scorer=count, **SETTINGS
        )

    choosing = 10**9
    poisoned_run()
    choosing = calls - 6 * (1 + 3 * (2 + 3 + 1))  # the evaluation of all settings comes last
    calls = 0
    poisoned = poisoned_run()
    assert poisoned.source["layer"] == result.source["layer"]
    assert poisoned.target["layer"] == result.target["layer"]
    assert poisoned.headline == result.headline
    assert [1 - a.effect.value for a in poisoned.arms] == pytest.approx([a.effect.value for a in result.arms])


def test_the_sets_do_not_overlap(result: TransferResult) -> None:
    names = ("contrast", "validation", "evaluation", "neutral_validation", "neutral_evaluation")
    ids = [i for name in names for i in result.splits[name]]
    assert len(ids) == len(set(ids))
    assert sum(result.splits["map_documents"].values()) == 54  # 60 less the neutral tenth


def test_without_prompts_the_preference_for_held_out_pairs_is_measured(toy_named: Callable[[str], toys.Toy]) -> None:
    gemma = toy_named("gemma").model
    made = xs.transfer(toy_named("llama").model, gemma, contrast(), sentences(60, 4), **SETTINGS)
    assert "log-likelihood" in made.unit
    assert made.arms[0].effect.n == 6  # three tenths of twenty pairs
    ids = {f"{p.id}/{n.id}": (p, n) for p, n in zip(contrast().positive, contrast().negative, strict=True)}
    for unit, score in zip(made.splits["evaluation"], made.arm("unsteered", 0).scores, strict=True):
        means = [
            -e.loss[0] / e.tokens[0] for e in (xs.side_effects(gemma, [[]], [p], max_tokens=None)[0] for p in ids[unit])
        ]
        assert score == pytest.approx(means[0] - means[1], abs=1e-4)


def test_bad_input_gives_one_clear_error(toy_named: Callable[[str], toys.Toy]) -> None:
    small, large = toy_named("llama").model, toy_named("gemma").model
    with pytest.raises(xs.PromptError, match="same text is in the contrast and the (validation|evaluation) set"):
        run(small, large, prompts=[p.text for p in contrast().positive])
    with pytest.raises(xs.PromptError, match="go together"):
        xs.transfer(small, large, contrast(), sentences(60, 4), prompts=["x"], **SETTINGS)
    with pytest.raises(xs.PromptError, match="at least 3 prompts"):
        run(small, large, prompts=["sky", "port"])
    with pytest.raises(ValueError, match="not 0"):
        run(small, large, strengths=(0.0, 1.0))
    with pytest.raises(ValueError, match="finite number"):
        xs.transfer(
            small,
            large,
            contrast(),
            sentences(60, 4),
            prompts=sentences(9, 3, 4),
            scorer=lambda _: float("nan"),
            **SETTINGS,
        )
    with pytest.raises(xs.SiteError, match="layers 0 to 3"):
        run(small, large, source_sites=[xs.Site(9)])
    moments = xs.collect_moments(
        small,
        large,
        sentences(20, 5),
        source_sites=[xs.Site(1)],
        target_sites=[xs.Site(1)],
        max_tokens=32,
        progress=False,
    )
    with pytest.raises(xs.SpaceMismatchError):  # swapped source and target
        run(
            large,
            small,
            source_sites=[xs.Site(1)],
            target_sites=[xs.Site(1)],
            moments=moments,
            neutral_texts=sentences(6, 9),
        )


def test_default_sites_lie_inside_any_model(toy_named: Callable[[str], toys.Toy]) -> None:
    for end in ("source", "target"):
        sites = default_sites(toy_named("qwen").model, end)
        assert sites == sorted(set(sites))
        assert all(0 <= site.layer < 3 for site in sites)


# --- the verdict, on made-up numbers ----------------------------------------------------------


def made_up(result: TransferResult, effects: dict[str, float], *, noise: float = 0.01, n: int = 40) -> TransferResult:
    """A result in which an arm at strength s scores 0.5 + s · effect, and costs KL s²."""
    rng = np.random.default_rng(0)
    base = 0.5 + noise * rng.standard_normal(n)
    arms = []
    for name, strength in [("unsteered", 0.0)] + [(a, s) for a in effects for s in (-2.0, -1.0, 1.0, 2.0)]:
        scores = base + strength * effects.get(name, 0.0) + noise * rng.standard_normal(n) * (name != "unsteered")
        kl = strength**2 * (2.0 if name == "mapped" else 1.0)
        arms.append(
            Arm(name, strength, bootstrap_mean(scores), bootstrap_mean(scores - base), kl, 10.0, tuple(scores.tolist()))
        )
    return replace(result, arms=tuple(arms), headline=1.0)


def test_verdict_compares_at_equal_kl(result: TransferResult) -> None:
    made = made_up(result, {"native": 0.2, "mapped": 0.2, "random": 0.0, "shuffled": 0.0})
    verdict = made.verdict()
    # Native at strength s costs KL s², mapped 2 s²: a KL of 1 buys 1/√2 of strength, and of effect.
    assert verdict.ratio is not None
    assert verdict.ratio.value == pytest.approx(0.5**0.5, abs=0.03)
    assert verdict.ratio.low < verdict.ratio.value < verdict.ratio.high
    assert verdict.separated == {"+": True, "-": True}
    assert "transfers: 0.7" in verdict.text


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_verdict_says_no_when_a_control_does_the_same(result: TransferResult, control: str) -> None:
    effects = {"native": 0.2, "mapped": 0.2, "random": 0.0, "shuffled": 0.0} | {control: 0.2}
    verdict = made_up(result, effects).verdict()
    assert verdict.separated == {"+": False, "-": False}
    assert "no evidence of transfer" in verdict.text


def test_verdict_says_no_when_the_effect_has_the_wrong_sign(result: TransferResult) -> None:
    verdict = made_up(result, {"native": 0.2, "mapped": -0.2, "random": 0.0, "shuffled": 0.0}).verdict()
    assert verdict.separated == {"+": False, "-": False}
    assert verdict.ratio is not None
    assert verdict.ratio.high < 0


def test_the_ratio_is_undefined_when_native_does_nothing(result: TransferResult) -> None:
    verdict = made_up(result, {"native": 0.0, "mapped": 0.2, "random": 0.0, "shuffled": 0.0}).verdict()
    assert verdict.ratio is None
    assert "undefined" in verdict.text

"""The verdict, on results of planted truth: what it claims, what it cannot say, and why it says no."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sample_results import planted

import xmodel_steer as xs
from xmodel_steer.maps.significance import above_others, sign_flip_test
from xmodel_steer.maps.statistics import NO_NATIVE, NOT_FINITE, undefined
from xmodel_steer.recipe.arms import EQUAL_KL, Arm, joined_arm
from xmodel_steer.recipe.planning import undecidable
from xmodel_steer.recipe.verdicts import BAR, LEAST_UNITS

CLEAR: dict[str, Any] = {"native": 0.2, "mapped": 0.15, "random": [0.01, 0.0, -0.01, 0.01, 0.0], "shuffled": 0.02}


def test_the_verdict_says_what_survived() -> None:
    verdict = planted(CLEAR).verdict()
    assert verdict.transfers and verdict.failed == ()
    assert verdict.efficiency.value == pytest.approx(0.75, abs=0.02)
    assert verdict.efficiency.low < verdict.efficiency.value < verdict.efficiency.high
    assert [(c.control, c.over, c.difference.n) for c in verdict.comparisons] == [
        ("shuffled", "prompts", 40), ("random", "prompts", 40), ("random", "vectors", 5),
    ]  # fmt: skip
    assert [c.difference.value for c in verdict.comparisons] == pytest.approx([0.13, 0.14, 0.15], abs=0.01)
    assert verdict.p == max(c.p for c in verdict.comparisons) < 0.01
    controls = {name: found.value for name, found in verdict.controls.items()}
    assert controls == pytest.approx({"random": 0.01, "shuffled": 0.1}, abs=0.03)
    assert verdict.text.startswith("toy: transfers: 0.74 [0.7")
    assert "of native at KL 0.30 and 0.30 nats per token, n = 40; random 0.0" in verdict.text
    assert "tests against the shuffled map and 5 random vectors: p ≤ 0.00" in verdict.text


@pytest.mark.parametrize(
    "control, told",
    [("random", "not above the random vectors: p 0."), ("shuffled", "not above the shuffled map: p 0.")],
)
def test_a_control_that_does_the_same_is_named(control: str, told: str) -> None:
    verdict = planted(CLEAR | {control: 0.15 if control == "shuffled" else [0.15] * 5}).verdict()
    assert verdict.transfers is False
    assert len(verdict.failed) == 1 and verdict.failed[0].startswith(told)
    assert f"no evidence of transfer ({verdict.failed[0]})" in verdict.text


def test_a_random_vector_that_does_more_is_not_averaged_away() -> None:
    """Native 1, random vectors 1, 0 and 0, mapped .83: one random vector in three did more than the mapped one."""
    verdict = planted({"native": 1.0, "mapped": 0.83, "random": [1.0, 0.0, 0.0], "shuffled": 0.0}, n=72).verdict()
    assert verdict.transfers is False and verdict.failed[0].startswith("not above the random vectors: p 1")
    rare = planted(
        {"native": 1.0, "mapped": 0.83, "random": [0.7, 0.0, 0.0, 0.0, 0.0], "shuffled": 0.0}, n=72
    ).verdict()
    best, vectors = (c for c in rare.comparisons if c.control == "random")
    assert best.p < 0.001 < 0.05 < vectors.p  # above every one, but not above what they scatter to
    assert rare.transfers is False


def test_the_choice_of_a_layer_is_paid_for() -> None:
    effects = {"native": 1.0, "mapped": 0.35, "random": [0.1, -0.1, 0.1, -0.1, 0.0], "shuffled": 0.0}
    made = planted(effects, n=72)
    tried = tuple({"recipe": "toy", "varied": "source layer", "site": site, "layer": 1} for site in "abc")
    alone, chosen = made.verdict(), replace(made, validation=tried).verdict()
    assert chosen.comparisons[2].p == pytest.approx(3 * alone.comparisons[2].p)
    assert chosen.comparisons[:2] == alone.comparisons[:2]
    others = tuple(record | {"recipe": "another"} for record in tried)
    assert replace(made, validation=others).verdict().comparisons == alone.comparisons


def test_a_gain_is_one_number_a_prompt_over_both_directions() -> None:
    """A weak effect in each direction is found in their difference, with no correction for two tests."""
    made = planted({"native": 0.1, "mapped": 0.06, "random": [0.0] * 5, "shuffled": 0.0}, n=36, noise=0.15, seed=3)
    gains = made.gain("mapped")[:, 0] - made.gain("shuffled")[:, 0]
    assert made.verdict().comparisons[0].p == sign_flip_test(gains)


def test_a_share_must_clear_the_bar() -> None:
    small = planted({"native": 1.0, "mapped": 0.15, "random": [0.0, 0.01, -0.01, 0.0, 0.0], "shuffled": 0.0}).verdict()
    assert small.p < 0.05 and small.transfers is False and small.failed == (f"the share may be under {BAR}",)
    wrong = planted(CLEAR | {"mapped": -0.2}).verdict()
    assert wrong.transfers is False and wrong.efficiency.high < 0
    backwards = planted({"native": -0.2, "mapped": -0.15, "random": [-0.3] * 5, "shuffled": -0.3}).verdict()
    assert backwards.transfers is False and "the native vector moves the score the other way" in backwards.failed


def test_doing_something_where_native_does_nothing_is_harm() -> None:
    """Native moves the score up and not down; mapped moves it up in both directions: it is no direction at all."""
    still = {"native": (1.0, 0.0), "random": [0.0, 0.01, -0.01, 0.0, 0.0], "shuffled": 0.0}
    assert planted(still | {"mapped": (0.9, 0.0)}, seed=1).verdict().transfers
    both = planted(still | {"mapped": (0.9, 0.8)}, seed=1).verdict()
    assert (
        both.transfers is False
        and both.failed[-1] == "it moves the score by +0.8 in direction -, where native does nothing"
    )
    down = planted(still | {"mapped": (0.9, -0.5)}, seed=1).verdict()  # as bad, though the gain is larger
    assert down.transfers is False and "by -0.5 in direction -" in down.failed[-1]
    slight = planted(still | {"mapped": (0.9, -0.1)}, seed=1).verdict()
    assert slight.transfers


def test_doing_what_native_does_is_no_harm_where_native_is_just_not_told_from_nothing() -> None:
    """300 zeros and ones: native moves the score down by .023, mapped by .03, which alone is told from 0."""
    place = np.arange(300)
    lost_and_won = {("native", 1): (0, 22), ("mapped", 1): (0, 15), ("native", -1): (12, 5), ("mapped", -1): (11, 2)}
    made = planted({"native": 1.0, "mapped": 1.0, "random": [0.0] * 5, "shuffled": 0.0}, n=300)

    def arm(old: Arm) -> Arm:
        lost, won = lost_and_won.get((old.arm, int(old.strength)), (0, 0))
        more = range(old.seeds) if old.arm == "random" else (0,)
        scores = [((place >= lost) & (place < 18) | (place >= 300 - won - k)).astype(float) for k in more]
        return joined_arm(
            old.arm, [old.strength] * len(scores), scores, (place < 18).astype(float), kl=[old.kl], perplexity=[10.0],
            agreement=[0.9], budget=old.budget, at=old.at, recipe=old.recipe, ids=old.ids,
        )  # fmt: skip

    found = replace(made, arms=tuple(map(arm, made.arms)))
    native, mapped = (found.at_equal_kl(name, "-").change for name in ("native", "mapped"))
    assert native.low <= 0 <= native.high and mapped.high < 0
    assert found.verdict().transfers and found.verdict().failed == ()


@pytest.mark.parametrize("n", [2, LEAST_UNITS - 1, LEAST_UNITS])
def test_what_cannot_be_decided_is_not_called_no_evidence(n: int) -> None:
    verdict = planted(CLEAR, n=n).verdict()
    if n < LEAST_UNITS:
        assert verdict.transfers is None
        assert f"toy: undefined (undecidable at n = {n}: give {LEAST_UNITS} prompts" in verdict.text
        assert 2.0**-n > 0.05
    else:
        assert verdict.transfers and verdict.p == 2.0**-n


def test_too_few_are_told_before_the_run() -> None:
    assert undecidable(LEAST_UNITS, 2) == ""
    for prompts, vectors in ((LEAST_UNITS - 1, 5), (300, 1)):
        assert f"NO VERDICT can come of {prompts} evaluation prompts and {vectors} random vectors" in undecidable(
            prompts, vectors
        )


def test_groups_are_the_units() -> None:
    assert planted(CLEAR, n=40, groups=4).verdict().transfers is None
    verdict = planted(CLEAR, n=40, groups=8).verdict()
    assert verdict.transfers and verdict.comparisons[0].difference.n == 8 and verdict.efficiency.n == 8
    assert verdict.comparisons[0].difference.value == pytest.approx(0.13, abs=0.02)  # in score, not in totals


def test_one_random_vector_shows_no_scatter() -> None:
    verdict = planted(CLEAR | {"random": [0.0]}).verdict()
    assert verdict.transfers is None and np.isnan(verdict.p)
    assert "undefined (undecidable with one random vector, which shows no scatter: give more)" in verdict.text
    assert "p undefined" in verdict.text


def test_it_is_undefined_when_native_does_nothing() -> None:
    verdict = planted(CLEAR | {"native": 0.0}, noise=0.05).verdict()
    assert verdict.efficiency.undefined == NO_NATIVE
    assert verdict.transfers is None
    assert verdict.text == "toy: undefined, the native vector does nothing at KL 0.30 and 0.30 nats per token, n = 40"


@pytest.mark.parametrize("arm", ["shuffled", "random", "mapped"])
@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_an_undefined_number_is_said_and_is_no_transfer(arm: str, lost: float) -> None:
    made = planted(CLEAR)

    def broken(a: Any) -> Any:
        table = ((lost, *a.table[0][1:]), *a.table[1:]) if a.table else ()
        return replace(a, scores=(lost, *a.scores[1:]), table=table)

    arms = tuple(broken(a) if a.arm == arm and a.strength > 0 else a for a in made.arms)
    verdict = replace(made, arms=arms).verdict()
    assert verdict.transfers is None and "toy: undefined" in verdict.text
    if arm == "mapped":
        assert verdict.efficiency.undefined == NOT_FINITE
    else:
        assert verdict.controls[arm].undefined == NOT_FINITE and f"{arm} undefined" in verdict.text
        assert f"{arm} over {'vectors' if arm == 'random' else 'prompts'} undefined ({NOT_FINITE})" in verdict.text


def test_a_ratio_without_an_interval_is_said_and_is_no_transfer(monkeypatch: Any) -> None:
    given = undefined("too few", 40, 0.75)
    monkeypatch.setattr("xmodel_steer.recipe.verdicts.transfer_efficiency", lambda *_: given)
    verdict = planted(CLEAR).verdict()
    assert verdict.transfers is None and verdict.p < 0.05
    assert "0.75 (interval undefined: too few) of native at KL 0.30 and 0.30" in verdict.text


def test_an_arm_that_misses_the_kl_is_named() -> None:
    made = planted(CLEAR)
    assert "cannot be brought" not in made.verdict().text
    arms = tuple(replace(a, reached=not (a.arm == "shuffled" and a.budget and a.strength < 0)) for a in made.arms)
    assert made.verdict().text + "; shuffled - cannot be brought to that KL" == replace(made, arms=arms).verdict().text


def test_one_direction_is_judged_alone() -> None:
    one = planted(CLEAR)
    one = replace(one, arms=tuple(a for a in one.arms if a.strength >= 0))
    assert one.signs == ("+",) and one.arm("native").at == EQUAL_KL
    verdict = one.verdict()
    assert verdict.transfers and verdict.efficiency.value == pytest.approx(0.75, abs=0.05)


def test_one_vector_among_others_is_tested_by_their_scatter() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    draws = rng.standard_normal((4000, 6))
    p = np.array([above_others(row[0], row[1:])[1] for row in draws])
    assert abs((p < 0.05).mean() - 0.05) < 0.012  # exact under the null hypothesis
    best = np.array([above_others(row[:3].max(), row[3:], choices=3)[1] for row in rng.standard_normal((4000, 8))])
    assert (best < 0.05).mean() < 0.05
    gap, p_one = above_others(2.0, [0.0, 1.0, 0.5, -0.5])
    welch = stats.ttest_ind([2.0], [0.0, 1.0, 0.5, -0.5], alternative="greater")  # the same with one observation
    assert p_one == pytest.approx(welch.pvalue) and gap.low < gap.value == 1.75 < gap.high
    assert above_others(1.0, [0.0, 0.0])[1] == 0.0 and above_others(0.0, [0.0, 0.0])[1] == 1.0
    assert above_others(1.0, [0.0])[0].undefined and above_others(1.0, [0.0, np.nan])[0].undefined == NOT_FINITE


def test_a_table_of_concepts_is_one_family() -> None:
    from xmodel_steer.studies.concept_table import conclusions

    weak = {"native": 0.2, "mapped": 0.15, "random": [-0.05, 0.05, 0.04, -0.03, 0.0], "shuffled": 0.0}
    results = {str(i): planted(weak, seed=i) for i in range(6)}
    alone = [r.verdict() for r in results.values()]
    assert all(0.01 < v.p < 0.05 and v.transfers for v in alone)
    first, *texts = conclusions(results)
    assert first.startswith("6 of 6 concepts transfer (0 after Holm's correction over all 6); 6 have a native effect")
    assert texts == [v.text for v in alone]
    assert xs.Result  # the table is made of results


def test_the_verdict_says_at_which_dose_native_does_as_much() -> None:
    """Native gains .1 at a quarter of the KL and .2 at the whole: for .15 it needs (3/4)² of it."""
    made = planted(CLEAR, n=72)
    assert made.verdict().dose.undefined == "native was not run at half the strength"
    assert "does as much" not in made.verdict().text
    base = made.arm("unsteered")
    halves = [
        joined_arm(
            "native", [sign / 2], [np.array(base.scores) + sign * 0.1], np.array(base.scores), kl=[0.075], perplexity=[10.0],
            recipe="toy", ids=base.ids,
        )
        for sign in (1.0, -1.0)
    ]  # fmt: skip
    verdict = replace(made, arms=(*made.arms, *halves)).verdict()
    assert verdict.dose.value == pytest.approx(0.75**2, abs=0.02) and verdict.dose.n == 72
    assert f"n = 72; native does as much at {verdict.dose:.2f} of that KL; random" in verdict.text
    assert verdict.record()["dose"] == verdict.dose.record()
    assert (verdict.transfers, verdict.efficiency) == (made.verdict().transfers, made.verdict().efficiency)

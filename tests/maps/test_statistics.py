"""Intervals and distances, against simulation and torch's own functions."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from xmodel_steer.evaluation.reference import Reference
from xmodel_steer.maps.significance import holm, sign_flip_test
from xmodel_steer.maps.statistics import (
    NO_NATIVE,
    NOT_FINITE,
    NOTHING,
    Estimate,
    bootstrap_mean,
    dose_share,
    rate,
    resamples,
    transfer_efficiency,
    undefined,
)

# --- the bootstrap ---------------------------------------------------------------------------


@pytest.mark.parametrize("per_prompt", [1, 6])
def test_the_interval_covers_the_mean_about_95_times_in_100(per_prompt):
    """With several seeds per prompt most variance lies between prompts: resampling cells would cover half."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(500):
        values = rng.exponential(size=(40, 1)) + 0.1 * rng.normal(size=(40, per_prompt))
        made = bootstrap_mean(values, draws=400, seed=trial)
        covered += made.low <= 1.0 <= made.high
    assert 0.90 < covered / 500 < 0.975


def test_prompts_and_seeds_are_resampled_each_whole():
    table = np.random.default_rng(1).normal(size=(30, 5)) + np.arange(30)[:, None]
    made = bootstrap_mean(table)
    assert (made.value, made.n) == (pytest.approx(table.mean()), 30)
    same, alone = bootstrap_mean(np.repeat(table[:, :1], 4, 1)), bootstrap_mean(table[:, 0])
    assert (same.low, same.high) == (pytest.approx(alone.low), pytest.approx(alone.high)), "seeds that do the same"
    one = bootstrap_mean(np.tile([1.0, 0.0, 0.0], (50, 1)))  # all that varies is the seed
    assert (one.value, one.low, one.high) == (pytest.approx(1 / 3), 0, 1)


def test_it_moves_and_scales_with_its_values():
    values = np.random.default_rng(2).normal(size=50)
    plain, moved = bootstrap_mean(values), bootstrap_mean(3 * values + 10)
    for end in ("value", "low", "high"):
        assert getattr(moved, end) == pytest.approx(3 * getattr(plain, end) + 10)
    assert plain.low < plain.value < plain.high


def test_it_is_the_normal_interval_on_many_values():
    values = np.random.default_rng(3).normal(size=2000)
    made = bootstrap_mean(values, draws=4000)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert [made.low - made.value, made.high - made.value] == pytest.approx([-half, half], rel=0.1)


def test_it_follows_its_seed_and_leaves_the_global_generator_alone():
    values = np.random.default_rng(4).normal(size=50)
    state = np.random.get_state()[1].copy()
    assert bootstrap_mean(values) == bootstrap_mean(values) != bootstrap_mean(values, seed=1)
    assert (np.random.get_state()[1] == state).all()


def test_prompts_that_are_all_of_one_kind_are_one():
    scores = [1.0] * 30 + [0.0] * 10
    one, many = rate(scores, groups=["a"] * 40), rate(scores)
    assert one.value == many.value and one.low < many.low - 0.2 and one.high > many.high


def test_equal_seeds_give_paired_samples():
    rows = resamples(10, draws=200, seed=3)
    assert (rows == resamples(10, draws=200, seed=3)).all()
    assert rows.shape == (200, 10)
    assert set(rows.ravel()) == set(range(10))
    assert any(len(set(row)) < 10 for row in rows)  # with replacement


def test_values_without_spread_have_no_width():
    assert bootstrap_mean([2.0] * 8) == Estimate(2.0, 2.0, 2.0, 8)


@pytest.mark.parametrize(
    "values, reason",
    [([], NOTHING), ([[]], NOTHING), ([1.0, math.nan], NOT_FINITE), ([[1.0, 2.0], [-math.inf, 1.0]], NOT_FINITE)],
)
def test_the_mean_of_nothing_or_of_nan_is_undefined_with_its_reason(values, reason):
    made = bootstrap_mean(values)
    assert (made.n, made.undefined) == (len(values), reason)
    assert all(map(math.isnan, (made.value, made.low, made.high)))
    assert f"{made:.2f}" == f"undefined ({reason})"
    assert not made.excludes(Estimate(1.0, 0.5, 2.0, 9)) and not Estimate(1.0, 0.5, 2.0, 9).excludes(made)


def test_an_undefined_estimate_comes_back_from_its_record():
    plain, gone = Estimate(0.5, 0.25, 1.0, 3), undefined("why not", 4, 0.5)
    assert plain.record() == {"value": 0.5, "low": 0.25, "high": 1.0, "n": 3} and Estimate.of(plain.record()) == plain
    record = gone.record() | {"low": None, "high": None}
    assert (
        Estimate(0.5, float("nan"), float("nan"), 4, "why not")
        == Estimate.of(record)
        == gone
        != undefined("why not", 4)
        and len({Estimate.of(record), gone, plain}) == 2
    )
    assert f"{plain:.2f}" == "0.50 [0.25, 1.00]" and f"{gone:.1f}" == "0.5 (interval undefined: why not)"
    assert f"{plain}" == str(plain)


@pytest.mark.parametrize("size", [5e-324, 1e-300, 1e300, 1.7976931348623157e308])
def test_the_unit_of_the_values_may_be_as_large_or_small_as_a_float_is(size):
    shares = np.array([1.0, 0.0, 1.0, 1.0])
    plain, sized = bootstrap_mean(shares), bootstrap_mean(size * shares)
    if size > 1e-300:
        assert [sized.value / size, sized.low / size, sized.high / size] == pytest.approx([0.75, plain.low, plain.high])
    assert sign_flip_test(size * np.ones(5)) == sign_flip_test(np.ones(5)) == 1 / 32
    assert transfer_efficiency(size * np.ones(3), size * np.ones(3)) == Estimate(1.0, 1.0, 1.0, 3)


@pytest.mark.parametrize(
    "low, high, apart", [(3.5, 5.0, True), (3.0, 5.0, False), (1.2, 1.8, False), (-2.0, 0.5, True)]
)
def test_intervals_exclude_each_other_when_no_point_is_in_both(low, high, apart):
    one, other = Estimate(2.0, 1.0, 3.0, 9), Estimate((low + high) / 2, low, high, 9)
    assert one.excludes(other) == other.excludes(one) == apart


# --- distributions ---------------------------------------------------------------------------

N, VOCABULARY = 37, 101


def logits(seed, dtype=torch.float32):
    return (4 * torch.randn(N, VOCABULARY, generator=torch.Generator().manual_seed(seed))).to(dtype)


TARGETS = torch.arange(N) * 2


@pytest.mark.parametrize("chunk", [1, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_and_loss_are_torchs(chunk, dtype):
    p, q = logits(0, dtype), logits(1, dtype)
    kl, loss, _ = Reference.of(p).compare(q, TARGETS, chunk=chunk)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        loss.double(), functional.cross_entropy(q.double(), TARGETS, reduction="none"), rtol=1e-4, atol=1e-5
    )


def test_kl_is_0_against_itself_and_never_less():
    kl, *_ = Reference.of(logits(0)).compare(logits(0), TARGETS)
    torch.testing.assert_close(kl, torch.zeros(N), rtol=0, atol=1e-5)
    near, *_ = Reference.of(logits(0)).compare(logits(0) + 1e-5 * logits(1), TARGETS)
    assert (kl >= 0).all() and (near >= 0).all()


def test_a_constant_on_all_logits_changes_nothing():
    plain = Reference.of(logits(0)).compare(logits(1), TARGETS)
    moved = Reference.of(logits(0) + 7).compare(logits(1) - 20, TARGETS)
    for a, b in zip(plain, moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_kl_has_a_direction():
    there, *_ = Reference.of(logits(0)).compare(logits(1), TARGETS)
    back, *_ = Reference.of(logits(1)).compare(logits(0), TARGETS)
    assert (there - back).abs().max() > 0.1


def test_a_masked_vocabulary_row_gives_numbers() -> None:
    a, b = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    a[:, 4] = b[:, 4] = -torch.inf
    kl, loss, _ = Reference.of(a).compare(b, torch.tensor([0, 1, 2]))
    keep = [i for i in range(10) if i != 4]
    same, *_ = Reference.of(a[:, keep]).compare(b[:, keep], torch.tensor([0, 1, 2]))
    assert torch.allclose(kl, same, atol=1e-6)
    assert torch.isfinite(loss).all()


# --- paired tests and the ratio to native -------------------------------------------------------


def test_the_sign_flip_test_counts_every_flip_of_few_units():
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.05, -0.02])
    signs = np.array(list(itertools.product([1, -1], repeat=len(values))))
    means = (signs * values).mean(1)
    assert sign_flip_test(values) == pytest.approx(float((means >= values.mean() - 1e-12).mean()))
    assert sign_flip_test(-values) > 0.5
    assert sign_flip_test(np.zeros(5)) == 1.0
    assert (sign_flip_test([0.2]), sign_flip_test([-0.2])) == (0.5, 1.0)


def test_under_no_difference_small_p_values_are_rare():
    rng = np.random.default_rng(0)
    found = np.array([sign_flip_test(rng.standard_normal(10)) for _ in range(200)])
    assert (found < 0.05).mean() < 0.1
    assert 0.4 < found.mean() < 0.6


def test_holm_is_the_step_down_rule():
    p = [0.04, 0.001, 0.03, 0.8]
    order = np.argsort(p)
    expected, running = np.zeros(4), 0.0
    for k, i in enumerate(order):
        running = max(running, min(1.0, p[i] * (4 - k)))
        expected[i] = running
    assert holm(p) == pytest.approx(expected.tolist())
    assert holm([]) == []
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.03, math.nan, 0.08], nan_ok=True)


@pytest.mark.parametrize(
    "values, reason", [([], NOTHING), ([math.nan, 1.0, 1.0], NOT_FINITE), ([math.inf], NOT_FINITE)]
)
def test_a_test_of_nothing_or_of_nan_has_no_p(values, reason):
    with pytest.raises(ValueError, match=f"p is undefined, {reason}"):
        sign_flip_test(values)


def test_efficiency_is_a_ratio_of_effects():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(50)
    native = base + 1 + 0.1 * rng.standard_normal(50)
    for share in (0.5, 1.0, -0.3):
        made = transfer_efficiency(base + share * (native - base), native, base)
        assert made is not None
        assert (made.value, made.low, made.high) == pytest.approx((share,) * 3)
    mapped = base + 0.6 + 0.3 * rng.standard_normal(50)
    one = transfer_efficiency(mapped, native, base)
    other = transfer_efficiency(7 + 3 * mapped, 7 + 3 * native, 7 + 3 * base)  # the unit of the score does not matter
    assert one is not None and other is not None
    assert vars(one) == pytest.approx(vars(other))
    assert one.low < one.value < one.high


def test_efficiency_counts_the_uncertainty_of_the_seeds():
    rng = np.random.default_rng(0)
    native = 1 + 0.01 * rng.standard_normal(40)
    seeds = np.array([-0.5, 0.0, 0.5])  # seeds that differ much, prompts that differ little
    table = seeds[None] + 0.01 * rng.standard_normal((40, 3))
    apart, joined = transfer_efficiency(table, native), transfer_efficiency(table.mean(1), native)
    assert apart is not None and joined is not None
    assert apart.value == pytest.approx(joined.value)
    assert apart.high - apart.low > 0.5 > 0.05 > joined.high - joined.low


@pytest.mark.parametrize("native", [[0.0, 0.0, 0.0], [0.5, -0.5, 0.1]])
def test_efficiency_is_undefined_where_native_does_nothing(native):
    made = transfer_efficiency([1.0, 1.0, 1.0], native)
    assert (made.n, made.undefined) == (3, NO_NATIVE) and math.isnan(made.value)


def test_a_draw_without_a_native_effect_is_no_number_and_is_not_dropped():
    """Where it may be anything, it counts as below the interval and as above it: of 10 prompts .6 ** 10 of the draws."""
    native = np.array([0.0] * 6 + [1.0] * 4)
    mapped = native + np.random.default_rng(0).normal(size=10)
    made = transfer_efficiency(mapped, native)
    index = resamples(10)
    ours, theirs = mapped[index].mean(1), native[index].mean(1)
    silent = theirs == 0
    assert 0 < silent.mean() < 0.025
    assert made.value == pytest.approx(mapped.mean() / native.mean())
    for end, share in ((made.low, 0.025), (made.high, 0.975)):
        finite = np.sort(ours[~silent] / theirs[~silent])
        place = share * (len(index) - 1) - (silent.sum() if share < 0.5 else 0)
        assert finite[int(place)] <= end <= finite[int(place) + 1]
    same = transfer_efficiency(native, native)
    assert (same.value, same.low, same.high, same.undefined) == (1.0, 1.0, 1.0, "")


def test_an_interval_without_bounds_is_undefined_and_the_ratio_stays():
    """The native effect is just above 0: so many draws have none that an end of the interval is nowhere."""
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        native = rng.normal(0.35, 1, 20)
        made = transfer_efficiency(0.7 * native + 0.3 * rng.normal(size=20), native)
        found += [made] if made.undefined not in ("", NO_NATIVE) else []
    assert found
    for made in found:
        assert math.isfinite(made.value) and math.isnan(made.low) and math.isnan(made.high)
        assert made.undefined.startswith(f"{NO_NATIVE} in ") and made.undefined.endswith(" of 2000 resamples")


@pytest.mark.parametrize("mapped, native, reason", [
    ([], [], NOTHING), ([1.0, math.nan], [1.0, 1.0], NOT_FINITE), ([1.0, 1.0], [math.inf, 1.0], NOT_FINITE),
    ([1e308] * 2, [1e-308] * 2, "the ratio is too large for a float"),
])  # fmt: skip
def test_efficiency_of_what_is_no_number_says_so(mapped, native, reason):
    made = transfer_efficiency(mapped, native)
    assert made.undefined == reason and math.isnan(made.value)


def test_dose_share_finds_the_planted_dose() -> None:
    """A gain of sqrt(KL) at two doses: a share s of the gain is s² of the KL, whichever way the score points."""
    rng = np.random.default_rng(0)
    unit = 1 + 0.2 * rng.standard_normal((200, 1))
    for share in (0.1, 0.5, 0.8, 0.95):
        for kl in ((0.02, 0.08), (0.01, 0.02), (0.08,)):
            native = unit * np.sqrt(np.array(kl) / kl[-1])
            made = dose_share(share * unit, native, kl)
            assert made.value == pytest.approx(share**2) and made.n == 200
            assert dose_share(-share * unit, -native, kl) == made
            assert made.low <= made.value + 1e-12 and made.value <= made.high + 1e-12
    # A native vector that has done it all at a quarter of the KL: linear in the strength up to there.
    early = unit * np.array([1.0, 1.0])
    assert dose_share(0.9 * unit, early, (0.02, 0.08)).value == pytest.approx(0.25 * 0.81)


def test_dose_share_ends_at_nothing_and_at_the_whole() -> None:
    native = np.tile([0.5, 1.0], (40, 1)) + 0.1 * np.random.default_rng(1).standard_normal((40, 2))
    assert dose_share(np.zeros((40, 3)), native, (0.1, 0.4)).value == 0
    assert dose_share(-native[:, 1], native, (0.1, 0.4)).value == 0
    more = dose_share(2 * native[:, 1], native, (0.1, 0.4))
    assert (more.value, more.low, more.high) == (1, 1, 1)
    assert dose_share(native[:, 1], native, (0.1, 0.4)).value == pytest.approx(1)


def test_dose_share_is_undefined_with_a_reason() -> None:
    rng = np.random.default_rng(2)
    assert dose_share(np.ones(9), rng.standard_normal((9, 2)), (0.1, 0.4)).undefined == NO_NATIVE
    native = np.tile([0.5, 1.0], (9, 1))
    assert dose_share(np.ones(9), native * [np.nan, 1], (0.1, 0.4)).undefined == NOT_FINITE
    assert dose_share(np.ones(9), native, (0.4, 0.4)).undefined == "the doses' KL does not rise"
    assert dose_share(np.zeros(0), np.zeros((0, 2)), (0.1, 0.4)).undefined


def test_dose_share_holds_its_level_on_planted_data() -> None:
    """In 200 draws of a planted share the 95 % interval misses it in about 5 %."""
    rng, missed = np.random.default_rng(3), 0
    for _ in range(200):
        native = np.stack([0.5 + rng.standard_normal(100) / 2, 1 + rng.standard_normal(100) / 2], 1)
        made = dose_share(0.75 + rng.standard_normal(100) / 2, native, (0.1, 0.4), draws=400)
        missed += not made.low <= 0.75**2 <= made.high
    assert missed <= 20

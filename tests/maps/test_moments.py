"""Streamed moments: whatever the order and the cuts, they are the moments of all the rows."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_moments import PAIRS, SOURCE, TARGET, accumulator, rows, taken

from xmodel_steer.core.errors import NonFiniteError, SpaceMismatchError, XModelSteerError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.maps.accumulator import MomentsAccumulator, shuffle_generator, shuffled_partners, sketch_dimensions
from xmodel_steer.maps.moments import merge
from xmodel_steer.maps.pairs import PARTS, part_of


def collect(shards, documents, part="train"):
    """The moments of shards that are each added to an accumulator of their own."""
    made = []
    for source, target in shards:
        one = accumulator()
        one.add(part, source, target, documents[: len(target[Site(5)])])
        made.append(one.moments())
    return merge(made)


def assert_equals_numpy(pair, x, y, rtol=1e-9):
    x, y = x.numpy(), y.numpy()
    n = len(x)
    cov = np.cov(x.T, y.T, bias=True) * n
    d = x.shape[1]
    assert pair.count == n
    np.testing.assert_allclose(pair.source_mean, x.mean(0), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(pair.target_mean, y.mean(0), rtol=rtol, atol=1e-12)
    scale = np.sqrt(np.outer(cov.diagonal(), cov.diagonal())).max()
    for made, expected in (
        (pair.source_scatter, cov[:d, :d]),
        (pair.target_scatter, cov[d:, d:]),
        (pair.cross_scatter, cov[:d, d:]),
    ):
        np.testing.assert_allclose(made, expected, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(pair.source_scale, x.std(0), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(pair.target_scale, y.std(0), rtol=rtol, atol=1e-12)


# --- sums ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_shards_of_any_size_in_any_order_are_the_whole(sizes, random):
    n = sum(sizes)
    sides = rows(n, offset=5.0)
    bounds = np.cumsum([0, *sizes])
    shards = [taken(sides, slice(a, b)) for a, b in pairwise(bounds)]
    random.shuffle(shards)
    merged = collect(shards, list(range(n)))
    for source, target in PAIRS:
        assert_equals_numpy(merged.pair(source, target).train, sides[0][source], sides[1][target])
    assert (merged.tokens, merged.documents, merged.coverage) == (n, n, 1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8))
def test_batches_of_one_accumulator_go_to_their_own_part(parts):
    one, given_rows = accumulator(), {part: [] for part in PARTS}
    for seed, part in enumerate(parts):
        sides = rows(4, seed=seed, offset=seed)
        one.add(part, *sides, [0, 0, 1, 1])
        given_rows[part].append(sides)
    made = one.moments()
    for part in PARTS:
        pair = getattr(made.pair(*PAIRS[1]), part)
        assert (pair.count, pair.documents) == (4 * parts.count(part), 2 * parts.count(part))
        if given_rows[part]:
            x, y = (torch.cat([s[end][site] for s in given_rows[part]]) for end, site in enumerate(PAIRS[1]))
            assert_equals_numpy(pair, x, y)
    assert (made.tokens, made.documents) == (4 * len(parts), 2 * len(parts))


def test_huge_means_cost_no_precision():
    sides = rows(400, offset=1e6, spread=1e-2)  # E[x²] - E[x]² would have no digit left
    merged = collect([taken(sides, slice(i, i + 100)) for i in range(0, 400, 100)], list(range(100)))
    assert_equals_numpy(merged.pair(*PAIRS[1]).train, sides[0][Site(1)], sides[1][Site(5)], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_batches_far_apart_are_their_rows(dtype):
    # More batches than wait together; the first one is an outlier, and moments are looked at on the way.
    one, every = accumulator(), []
    for number in range(150):
        sides = rows(3, seed=number, offset=1000.0 if number == 0 else number % 7)
        sides = tuple({site: values.to(dtype) for site, values in side.items()} for side in sides)
        one.add("train", *sides, [number, number, number])
        every.append(sides)
        if number in (0, 1, 63, 64, 149):
            made = one.moments().pair(Site(1), Site(5)).train
            x, y = (
                torch.cat([each[end][site] for each in every]).double() for end, site in ((0, Site(1)), (1, Site(5)))
            )
            assert_equals_numpy(made, x, y, rtol=1e-6 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_rows_are_summed_in_float64(dtype):
    sides = tuple({site: x.to(dtype) for site, x in side.items()} for side in rows(300, offset=100.0))
    # Batches' own products are formed in float32; sums over batches are not.
    made = collect([taken(sides, slice(i, i + 3)) for i in range(0, 300, 3)], list(range(3))).pair(*PAIRS[1]).train
    assert made.cross_scatter.dtype == torch.float64
    assert_equals_numpy(made, sides[0][Site(1)].double(), sides[1][Site(5)].double(), rtol=1e-6)


def test_means_of_narrow_rows_have_more_digits_than_a_row():
    sides = tuple({site: x.float() for site, x in side.items()} for side in rows(300, offset=1e4))
    one = accumulator()
    one.add("train", *sides, list(range(300)))
    mean = one.moments().pair(*PAIRS[1]).train.source_mean
    assert (mean - sides[0][Site(1)].double().mean(0)).abs().max() < 1e-6  # a float32 of this size is known to 5e-4


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200, 520, 1100])
def test_scatters_are_whole_at_any_width(width):
    drawn = torch.randn(40, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = {Site(0): Space("any", Site(0), width, "aaaa")}
    one = MomentsAccumulator(end, end, [(Site(0), Site(0))])
    one.add("train", {Site(0): drawn}, {Site(0): drawn.flip(0)}, list(range(40)))
    made = one.moments().pair(Site(0), Site(0)).train.source_scatter
    torch.testing.assert_close(made, 40 * torch.cov(drawn.T, correction=0).reshape(width, width))


def test_moments_that_were_handed_out_do_not_change_afterwards():
    one = accumulator()
    one.add("train", *rows(5), list(range(5)))
    before = one.moments()
    mean = before.pair(*PAIRS[0]).train.source_mean.clone()
    one.add("train", *rows(5, offset=9.0), list(range(5)))
    assert before.tokens == 5
    assert torch.equal(before.pair(*PAIRS[0]).train.source_mean, mean)


def test_scale_is_the_standard_deviation_of_the_training_rows():
    source, target = rows(50)
    one = accumulator()
    one.add("train", source, target, list(range(50)))
    one.add("test", *rows(50, spread=100.0), list(range(50)))
    made = one.moments()
    np.testing.assert_allclose(made.scale(Site(5)), target[Site(5)].numpy().std(0))
    np.testing.assert_allclose(made.scale(Site(1), end="source"), source[Site(1)].numpy().std(0))
    with pytest.raises(ValueError, match=r"resid_post\[5\] of the source was not collected, but resid_post\[0\], "):
        made.scale(Site(5), end="source")


def test_coverage_counts_tokens_that_could_have_paired():
    one = accumulator()
    one.add("train", *rows(6), list(range(6)), eligible=8)
    one.add("test", *rows(0), [], eligible=4)
    made = one.moments()
    assert made.coverage == made.pair(*PAIRS[0]).coverage == 6 / 12
    assert (made + made).coverage == 0.5
    assert accumulator().moments().coverage == 0.0


# --- refusals --------------------------------------------------------------------------------


def test_shards_of_other_models_do_not_merge():
    moved = {Site(5): replace(TARGET[Site(5)], fingerprint="cccc")}
    with pytest.raises(
        SpaceMismatchError, match="the shards' target spaces differ .*bbbb.*cccc.*same models and sites"
    ):
        accumulator().moments() + accumulator(target=moved).moments()
    moved = {site: replace(space, processing="fold_ln") for site, space in SOURCE.items()}
    with pytest.raises(SpaceMismatchError, match="the shards' source spaces differ .*fold_ln"):
        accumulator().moments() + accumulator(source=moved).moments()


@pytest.mark.parametrize("change", [{"settings": {"seed": 1}}, {"pairs": PAIRS[:1]}, {"sketch": (0, 2)}], ids=str)
def test_shards_that_were_read_otherwise_do_not_merge(change):
    with pytest.raises(ValueError, match="different layer pairs or settings .*'seed': 0.*the same arguments"):
        accumulator().moments() + accumulator(**change).moments()


def test_no_shards_have_no_moments():
    with pytest.raises(XModelSteerError, match="no shards were given"):
        merge([])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("end, site", [("source", Site(1)), ("target", Site(5))])
def test_rows_with_nan_are_refused(bad, end, site):
    source, target = rows(5)
    {"source": source, "target": target}[end][site][2] = bad
    with pytest.raises(NonFiniteError, match=rf"moments: {end} resid_post\[{site.layer}\]: NaN or infinity in 1 row"):
        accumulator().add("train", source, target, list(range(5)))


def test_a_pair_that_was_not_collected_is_refused():
    with pytest.raises(
        ValueError, match=r"the pair resid_post\[5\] to resid_post\[0\] was not collected, but resid_post\[0\] to"
    ):
        accumulator().moments().pair(Site(5), Site(0))


# --- parts -----------------------------------------------------------------------------------

TEXTS = [f"document {i}" for i in range(4000)]
PINNED = "train train validation train train validation train train train train train train"


def test_parts_are_stable_and_depend_on_content_and_seed_only():
    assert [part_of(t) for t in TEXTS[:20]] == [part_of(t) for t in TEXTS[:20]]
    # Written down: another version of the library must not move test documents into training.
    assert [part_of(t) for t in TEXTS[:12]] == PINNED.split()
    assert [part_of(t) for t in TEXTS] != [part_of(t, seed=1) for t in TEXTS]


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.3, 0.05), (0.0, 0.5), (0.5, 0.5)])
def test_parts_have_about_their_shares(shares):
    validation, test = shares
    found = [part_of(t, validation=validation, test=test) for t in TEXTS]
    expected = {"train": 1 - validation - test, "validation": validation, "test": test}
    assert {p: found.count(p) / len(TEXTS) for p in PARTS} == pytest.approx(expected, abs=0.03)


def test_a_larger_test_share_takes_from_training_alone():
    small, large = ([part_of(t, test=share) for t in TEXTS] for share in (0.1, 0.3))
    assert all(b == a or (a, b) == ("train", "test") for a, b in zip(small, large, strict=True))


# --- the shuffled control --------------------------------------------------------------------


@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.integers(0, 1000))
def test_no_row_is_paired_with_its_own_document_where_that_is_possible(runs, seed):
    documents = [number for number, run in enumerate(runs) for _ in range(run)]
    partners = shuffled_partners(documents, torch.Generator().manual_seed(seed)).tolist()
    assert sorted(partners) == list(range(len(documents)))  # each row is used once
    if 2 * max(runs) <= len(documents):
        assert all(documents[i] != documents[j] for i, j in enumerate(partners))


def test_shuffled_pairs_keep_everything_but_the_relation():
    # Two documents of two rows leave one rotation only.
    source, target = rows(4)
    made = collect([(source, target)], [0, 0, 1, 1])
    pair = made.pair(*PAIRS[1])
    control = pair.control
    assert (pair.shuffled, control.shuffled) == (False, True)
    assert torch.equal(control.train.source_scatter, pair.train.source_scatter)
    assert torch.equal(control.train.target_scatter, pair.train.target_scatter)
    assert_equals_numpy(control.train, source[Site(1)][[2, 3, 0, 1]], target[Site(5)])


def test_shuffled_pairs_have_nothing_to_learn():
    made = collect([rows(2000)], list(range(2000)))
    pair, control = made.pair(*PAIRS[1]).train, made.pair(*PAIRS[1]).control.train
    assert control.cross_scatter.norm() < 0.2 * pair.cross_scatter.norm()


def test_the_shuffle_follows_its_seed():
    def cross(seed):
        one = accumulator(seed=seed)
        one.add("train", *rows(40), list(range(40)))
        return one.moments().pair(*PAIRS[0]).control.train.cross_scatter

    assert torch.equal(cross(3), cross(3))
    assert not torch.equal(cross(3), cross(4))
    # Windows are not all shuffled alike: each has a draw of its own.
    draws = [torch.rand((), generator=shuffle_generator(3, document)).item() for document in (0, 64, 128, 0)]
    assert len(set(draws)) == 3


def test_the_rounding_of_a_constant_is_no_variance() -> None:
    site = Site(0)
    space = Space("m", site, 2, "f")
    made = MomentsAccumulator({site: space}, {site: space}, [(site, site)])
    rows = torch.stack([torch.full((101,), 0.1, dtype=torch.float64), torch.randn(101, dtype=torch.float64)], 1)
    made.add("train", {site: rows}, {site: rows}, [i // 10 for i in range(101)])
    assert made.moments().scale(site)[0] == 0
    assert made.moments().scale(site)[1] > 0.5


def test_refused_rows_leave_no_trace() -> None:
    site = Site(0)
    space = Space("m", site, 2, "f")
    made = MomentsAccumulator({site: space}, {site: space}, [(site, site)])
    with pytest.raises(NonFiniteError):
        made.add("train", {site: torch.full((3, 2), torch.nan)}, {site: torch.ones(3, 2)}, [0, 0, 1])
    assert (made.moments().paired, made.moments().eligible, made.moments().tokens) == (0, 0, 0)


# --- the sketch ------------------------------------------------------------------------------


def test_the_sketch_is_the_full_moments_of_its_dimensions_for_every_pair():
    sides, columns = rows(60, offset=3.0), (1, 3)
    one = accumulator(pairs=PAIRS[1:], sketch=columns)
    for i in (0, 20, 40):
        one.add("train", *taken(sides, slice(i, i + 20)), list(range(20)))
    made = one.moments()
    for pair in PAIRS:
        cut = made.sketched(*pair)
        assert cut.target.width == 2
        assert_equals_numpy(cut.train, sides[0][pair[0]], sides[1][Site(5)][:, columns])
    with pytest.raises(ValueError, match=r"was only sketched; collect it in full with pairs=\[\(Site\(layer=0"):
        made.pair(*PAIRS[0])
    with pytest.raises(ValueError, match="was not sketched; collect with sketch=64"):
        accumulator().moments().sketched(*PAIRS[0])


def test_sketched_shards_merge():
    sides = rows(60)
    whole, *cut = (accumulator(pairs=(), sketch=(0, 2)) for _ in range(4))
    whole.add("test", *sides, list(range(60)))
    for k, one in enumerate(cut):
        one.add("test", *taken(sides, slice(20 * k, 20 * k + 20)), list(range(20)))
    merged = merge(one.moments() for one in cut)
    torch.testing.assert_close(
        merged.sketched(*PAIRS[0]).test.cross_scatter, whole.moments().sketched(*PAIRS[0]).test.cross_scatter
    )


def test_sketch_dimensions_are_a_seeded_choice():
    made = sketch_dimensions(50, 8, seed=1)
    assert made == sketch_dimensions(50, 8, seed=1) != sketch_dimensions(50, 8, seed=2)
    assert list(made) == sorted(set(made)) and len(made) == 8 and max(made) < 50
    assert sketch_dimensions(5, 5) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="needs 1 to 5 target dimensions, got 6"):
        sketch_dimensions(5, 6)


def test_without_the_control_there_is_none_and_everything_else_is_the_same():
    made = {}
    for shuffled in (True, False):
        one = accumulator(shuffled=shuffled)
        one.add("train", *rows(10), list(range(10)))
        made[shuffled] = one.moments().pair(*PAIRS[0])
    assert made[False].control is None and made[True].control is not None
    assert torch.equal(made[True].train.cross_scatter, made[False].train.cross_scatter)


def test_the_inverse_is_the_moments_of_the_rows_the_other_way_round():
    one = accumulator()
    sides = {part: rows(n, seed=n) for part, n in zip(PARTS, (20, 12, 8), strict=True)}
    for part, own in sides.items():
        one.add(part, *own, list(range(len(own[1][Site(5)]))), eligible=30)
    pair = one.moments().pair(*PAIRS[1])
    turned = pair.inverse()
    assert (turned.source, turned.target, turned.coverage) == (pair.target, pair.source, 40 / 90)
    for part, (source, target) in sides.items():
        assert_equals_numpy(getattr(turned, part), target[Site(5)], source[Site(1)])
        own, theirs = getattr(turned.control, part), getattr(pair.control, part)
        assert torch.equal(own.cross_scatter, theirs.cross_scatter.T)
    assert (turned.shuffled, turned.control.shuffled) == (False, True)


def test_a_named_shard_is_not_added_twice():
    def shard(name):
        one = accumulator(shard=name)
        one.add("train", *rows(4), [0, 0, 1, 1])
        return one.moments()

    both = shard("0/2") + shard("1/2")
    assert both.shards == ("0/2", "1/2")
    with pytest.raises(ValueError, match="shard 1/2 is in both; give every shard once"):
        both + shard("1/2")


def test_shards_of_two_dealings_of_a_text_are_not_merged():
    one, other = accumulator(shard="0/2"), accumulator(shard="0/3")
    for own in (one, other):
        own.add("train", *rows(4), [0, 0, 1, 1])
    with pytest.raises(
        ValueError, match="dealt out to 2 and to 3 shards, which overlap; give the shards of one dealing"
    ):
        one.moments() + other.moments()


def test_the_scale_of_an_end_that_is_none_is_refused():
    one = accumulator()
    one.add("train", *rows(4), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="end must be 'source' or 'target', got 'small'"):
        one.moments().scale(PAIRS[0][1], end="small")


def test_moments_of_some_pairs_are_those_of_all_and_merge_with_their_like():
    one, two = accumulator(sketch=(0, 2)), accumulator(sketch=(0, 2))
    for own, seed in ((one, 0), (two, 1)):
        own.add("train", *rows(40, seed=seed), [10 * seed + i // 8 for i in range(40)])
    kept = (PAIRS[1],)
    some = one.moments().only(kept) + two.moments().only(kept)
    whole = one.moments() + two.moments()
    assert some.pairs == kept and set(some.source) == {PAIRS[1][0]} and some.sketch == ()
    mine, theirs = some.pair(*PAIRS[1]), whole.pair(*PAIRS[1])
    for name in ("source_mean", "target_mean", "source_scatter", "target_scatter", "cross_scatter"):
        assert torch.equal(getattr(mine.train, name), getattr(theirs.train, name))
    assert mine.control is not None and theirs.control is not None
    assert torch.equal(mine.control.train.cross_scatter, theirs.control.train.cross_scatter)
    with pytest.raises(ValueError, match="was not collected"):
        some.pair(*PAIRS[0])
    with pytest.raises(ValueError, match="was not collected"):
        whole.only([(Site(9), Site(5))])

"""Maps between spaces. `FITTERS` drives the laws that every fitter obeys: a new fitter is a new row."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn import linear_model
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from xmodel_steer.core.directions import difference_of_means, principal_direction
from xmodel_steer.core.errors import FewRowsWarning, PromptError, SpaceMismatchError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.maps.accumulator import MomentsAccumulator
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.anchors import RelativeAnchors
from xmodel_steer.maps.autoencoders import cycle_score
from xmodel_steer.maps.controls import Identity, RandomMap, ShuffledPairs, pinned
from xmodel_steer.maps.fitting import PENALTIES
from xmodel_steer.maps.isometry import Procrustes
from xmodel_steer.maps.ridge import ReducedRank, Ridge
from xmodel_steer.maps.rows import PairedRows

FITTERS = {
    "ridge": Ridge(),
    "reduced-rank": ReducedRank(5),
    "procrustes": Procrustes(standardise=False),
    "procrustes-standardised": Procrustes(),
    "identity": Identity(),
    "random": RandomMap(),
    "shuffled-ridge": ShuffledPairs(Ridge()),
}
#: Which of them learn the relation of the rows; the others are controls.
LEARN = {name: FITTERS[name] for name in ("ridge", "reduced-rank", "procrustes")}
#: Which of them choose a penalty.
CHOOSE = {name: FITTERS[name] for name in ("ridge", "reduced-rank", "shuffled-ridge")}

DS, DT = 5, 8
SOURCE = Space("small", Site(1), DS, "aaaa")
TARGET = Space("large", Site(7), DT, "bbbb")
UNITS = torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.2], dtype=torch.float64)  # residual streams are like that

says_too_few = pytest.warns(
    FewRowsWarning, match="fit: 3 training rows for 5 source dimensions: .* give more text .about 80 tokens"
)
every_fitter = pytest.mark.parametrize("fitter", FITTERS.values(), ids=FITTERS)
every_learner = pytest.mark.parametrize("fitter", LEARN.values(), ids=LEARN)
#: The rows that a control is scored on are shuffled, too.
every_unshuffled = pytest.mark.parametrize(
    "fitter", [f for n, f in FITTERS.items() if "shuffled" not in n], ids=[n for n in FITTERS if "shuffled" not in n]
)
#: Identity keeps the numbers, means and all.
every_centred = pytest.mark.parametrize(
    "fitter", [f for n, f in FITTERS.items() if n != "identity"], ids=[n for n in FITTERS if n != "identity"]
)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = torch.linalg.qr(normal(DT, DS, seed=100))[0].T  # orthonormal rows: an isometry
BIAS = 10 * normal(DT, seed=101)


def related(n, *, seed, noise=0.0, units=1.0):
    """Paired rows: the target is an isometry of the source, a shift, and noise."""
    x = normal(n, DS, seed=seed) + 3
    return x * units, x @ WEIGHT + BIAS + noise * normal(n, DT, seed=seed + 1)


def moments(train, validation=None, test=None, *, source=SOURCE, target=TARGET):
    """Moments of paired rows, each row a document of its own."""
    ends = (
        {source.site: replace(source, width=train[0].shape[1])},
        {target.site: replace(target, width=train[1].shape[1])},
    )
    accumulator = MomentsAccumulator(*ends, [(source.site, target.site)])
    for part, rows in (("train", train), ("validation", validation), ("test", test)):
        if rows is not None:
            accumulator.add(part, {source.site: rows[0]}, {target.site: rows[1]}, list(range(len(rows[0]))))
    return accumulator.moments().pair(source.site, target.site)


def usual(noise=0.3):
    """Moments of noisy rows, as a fit finds them."""
    return moments(*(related(n, seed=seed, noise=noise) for n, seed in ((200, 1), (60, 3), (60, 5))))


def as_activations(x, y):
    return Activations(x, SOURCE), Activations(y, TARGET)


# --- laws of every fitter --------------------------------------------------------------------


@every_learner
def test_a_planted_isometry_is_recovered(fitter):
    fitted = fitter.fit(moments(*(related(n, seed=seed) for n, seed in ((200, 1), (60, 3), (60, 5)))))
    torch.testing.assert_close(fitted.weight, WEIGHT, rtol=0, atol=1e-4)
    x, y = related(10, seed=9)
    torch.testing.assert_close(fitted.transform(x), y, rtol=0, atol=1e-3)
    assert fitted.score_test.mean_r2 == pytest.approx(1)
    assert fitted.score_test.cosine == pytest.approx(1)
    assert fitted.score_test.norm_ratio == pytest.approx(1, abs=1e-3)


@every_fitter
def test_transport_of_a_difference_is_the_difference_of_transformed_points(fitter):
    fitted = fitter.fit(usual())
    p, n = (Activations(normal(k, DS, seed=k) + k, SOURCE) for k in (7, 4))
    there = fitted.transport(difference_of_means(p, n, label="joy"))
    mapped = difference_of_means(fitted.transform(p), fitted.transform(n))
    torch.testing.assert_close(there.direction, mapped.direction)
    torch.testing.assert_close(there.positive_mean, mapped.positive_mean)
    torch.testing.assert_close(there.negative_mean, mapped.negative_mean)
    assert (there.space, there.label, there.counts) == (fitted.target, "joy", (7, 4))
    assert torch.equal(there.scale, fitted.target_scale)
    assert "transported from small" in there.origin


def test_an_isometry_carries_the_principal_direction_and_another_map_does_not():
    p, n = (Activations(normal(12, DS, seed=k), SOURCE) for k in (7, 4))
    for fitter, carried in ((Procrustes(standardise=False), True), (RandomMap(), False)):
        fitted = fitter.fit(usual())
        there = fitted.transport(principal_direction(p, n)).direction
        mapped = principal_direction(fitted.transform(p), fitted.transform(n)).direction
        assert torch.allclose(there, mapped, rtol=1e-6, atol=1e-9) == carried


@every_fitter
def test_transport_is_linear_and_knows_no_bias(fitter):
    fitted = fitter.fit(usual())
    a, b = (SteeringVector(normal(DS, seed=s), SOURCE) for s in (1, 2))
    torch.testing.assert_close(
        fitted.transport(2.0 * a - b).direction, (2.0 * fitted.transport(a) - fitted.transport(b)).direction
    )
    assert not fitted.transport(0.0 * a).direction.any()
    biased = replace(fitted, bias=fitted.bias + 1e3)
    assert torch.equal(biased.transport(a).direction, fitted.transport(a).direction)


@every_centred
def test_the_mean_goes_to_the_mean(fitter):
    x, y = related(200, seed=1, noise=0.3)
    fitted = fitter.fit(usual())
    torch.testing.assert_close(fitted.transform(x.mean(0)), y.mean(0))


@every_learner
def test_the_test_score_is_that_of_the_test_rows_alone(fitter):
    train, test = related(200, seed=1), related(50, seed=5)
    test = (test[0], -test[1] + normal(50, DT, seed=8))  # the opposite relation, as no training row has it
    fitted = fitter.fit(moments(train, related(50, seed=3), test))
    held_out = fitted.score(*as_activations(*test))
    assert held_out.mean_r2 < 0
    torch.testing.assert_close(fitted.score_test.r2, held_out.r2)
    assert (fitted.score_test.count, fitted.score_test.documents) == (50, 50)


@every_learner
def test_test_rows_change_the_score_and_not_the_map(fitter):
    parts = related(200, seed=1, noise=0.3), related(60, seed=3, noise=0.3)
    one = fitter.fit(moments(*parts, related(60, seed=5)))
    two = fitter.fit(moments(*parts, (normal(60, DS, seed=7), 1e3 * normal(60, DT, seed=8))))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)
    assert one.score_test.mean_r2 > 0.5 > two.score_test.mean_r2
    assert fitter.fit(moments(*parts)).score_test is None


@every_fitter
def test_a_fit_leaves_its_inputs_unchanged(fitter):
    given, own = usual(), copy.deepcopy(fitter)
    before = copy.deepcopy(given)
    fitter.fit(given)
    assert fitter == own
    for part in ("train", "validation", "test"):
        for name, value in vars(getattr(given, part)).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(vars(getattr(before, part))[name]))


@every_fitter
def test_a_fit_is_reproducible(fitter):
    assert torch.equal(fitter.fit(usual()).weight, fitter.fit(usual()).weight)


@every_centred
def test_a_dimension_that_does_not_vary_gets_no_weight(fitter):
    (x, y), (vx, vy) = related(200, seed=1, noise=0.3), related(60, seed=3, noise=0.3)
    x[:, 2] = vx[:, 2] = 7.5
    y[:, 4] = vy[:, 4] = -2.5
    fitted = fitter.fit(moments((x, y), (vx, vy), (vx, vy)))
    assert fitted.weight.isfinite().all()
    assert fitted.weight.norm() < 10
    assert fitted.weight[2].abs().max() < 1e-12
    torch.testing.assert_close(fitted.transform(x)[:, 4], y[:, 4])
    assert fitted.score_test.r2.isnan().tolist() == [d == 4 for d in range(DT)]
    assert fitted.score_test.mean_r2 == pytest.approx(fitted.score_test.r2.nanmean())


@every_fitter
def test_fewer_rows_than_dimensions_do_not_blow_up(fitter):
    held_out = related(60, seed=3, noise=0.3)
    with says_too_few if fitter != Identity() else nullcontext():
        fitted = fitter.fit(moments(related(3, seed=1, noise=0.3), held_out))
    assert fitted.weight.norm() < 10
    assert fitted.transform(held_out[0]).abs().max() < 100


@every_learner
def test_shuffled_pairs_teach_nothing(fitter):
    accumulator = MomentsAccumulator({SOURCE.site: SOURCE}, {TARGET.site: TARGET}, [(SOURCE.site, TARGET.site)])
    for seed, part in enumerate(("train", "validation", "test")):
        x, y = related(400, seed=2 * seed)
        accumulator.add(part, {SOURCE.site: x}, {TARGET.site: y}, list(range(400)))
    honest, control = (
        made.fit(accumulator.moments().pair(SOURCE.site, TARGET.site)) for made in (fitter, ShuffledPairs(fitter))
    )
    assert honest.score_test.mean_r2 > 0.99
    assert control.score_test.mean_r2 < 0.05
    assert (honest.info["shuffled_pairs"], control.info["shuffled_pairs"]) == (False, True)


@every_fitter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_and_directions_keep_their_dtype_and_their_labels(fitter, dtype):
    fitted = fitter.fit(usual())
    points = Activations(related(3, seed=4)[0].to(dtype), SOURCE, (("a", 1), ("a", 5), ("b", 2)))
    mapped = fitted.transform(points)
    assert (mapped.values.dtype, mapped.space, mapped.rows) == (dtype, fitted.target, points.rows)
    assert torch.equal(mapped.values, fitted.transform(points.values.double()).to(dtype))  # computed in float64
    assert fitted.transport(SteeringVector(points.values[0], SOURCE)).direction.dtype == dtype


@every_fitter
def test_swapped_or_foreign_spaces_are_refused(fitter):
    fitted = fitter.fit(usual())
    source, target = as_activations(*related(4, seed=4))
    foreign = replace(source, space=replace(SOURCE, fingerprint="cccc"))
    direction = SteeringVector(torch.ones(DT), TARGET)
    for misuse, message in (
        (lambda: fitted.transform(target), "transform: needs small .*, got large"),
        (lambda: fitted.transform(foreign), "transform: needs small .*aaaa.*, got small .*cccc"),
        (lambda: fitted.transport(direction), "transport: needs small .*, got large"),
        (lambda: fitted.score(target, source), r"score \(source\): needs small .*, got large"),
        (lambda: fitted.score(source, source), r"score \(target\): needs large .*, got small"),
    ):
        with pytest.raises(SpaceMismatchError, match=message):
            misuse()


@every_centred
def test_a_fit_on_one_row_is_refused(fitter):
    with pytest.raises(PromptError, match="fit: 1 training rows; give more text .* about 80 tokens"):
        fitter.fit(moments(related(1, seed=1), related(20, seed=3)))


def test_rows_that_a_map_can_fit_exactly_are_too_few():
    # Centred, n rows span n - 1 dimensions: with no more rows than dimensions some are left over, with one more none.
    with pytest.warns(FewRowsWarning, match="fit: 5 training rows for 5 source dimensions"):
        Ridge(penalties=(0.1,)).fit(moments(related(DS, seed=1)))
    Ridge(penalties=(0.1,)).fit(moments(related(DS + 1, seed=1)))


@pytest.mark.parametrize("fitter", CHOOSE.values(), ids=CHOOSE)
def test_a_choice_without_validation_rows_is_refused(fitter):
    with pytest.raises(PromptError, match=r"no validation document to choose the penalty on; .*Ridge\(penalties"):
        fitter.fit(moments(related(50, seed=1)))


# --- scores ----------------------------------------------------------------------------------


def scored_map():
    """A map, and rows on which it is neither perfect nor centred."""
    fitted = Ridge().fit(usual(noise=1.0))
    x, y = related(40, seed=21, noise=1.0)
    return fitted, x, y + normal(DT, seed=22) * UNITS.repeat(2)[:DT]


def test_r2_is_scikit_learns():
    fitted, x, y = scored_map()
    made = fitted.score(*as_activations(x, y))
    expected = r2_score(y, fitted.transform(x), multioutput="raw_values")
    np.testing.assert_allclose(made.r2, expected)
    assert made.mean_r2 == pytest.approx(np.mean(expected))


def test_cosine_and_norm_ratio_are_numpys_in_standardised_coordinates():
    fitted, x, y = scored_map()
    made = fitted.score(*as_activations(x, y))
    scale = fitted.target_scale.numpy()
    mapped, truth = ((rows.numpy() - y.numpy().mean(0)) / scale for rows in (fitted.transform(x), y))
    norms = np.linalg.norm(mapped), np.linalg.norm(truth)
    assert made.cosine == pytest.approx((mapped * truth).sum() / np.prod(norms))
    assert made.norm_ratio == pytest.approx(norms[0] / norms[1])


def test_score_from_moments_is_the_score_of_the_rows():
    fitted, x, y = scored_map()
    by_rows = fitted.score(*as_activations(x, y))
    by_moments = fitted.score_moments(moments((x, y)).train)
    torch.testing.assert_close(by_moments.r2, by_rows.r2)
    assert by_moments.cosine == pytest.approx(by_rows.cosine)
    assert by_moments.norm_ratio == pytest.approx(by_rows.norm_ratio)
    assert by_moments.count == by_rows.count == 40


@every_unshuffled
def test_losses_are_squared_errors_in_units_of_the_training_variance(fitter):
    parts = {name: related(n, seed=seed, noise=0.3) for name, n, seed in (("train", 200, 1), ("validation", 60, 3))}
    parts["test"] = scored_map()[1:]
    fitted = fitter.fit(moments(*parts.values()))
    scale = parts["train"][1].std(0, correction=0)
    expected = {name: float((((fitted.transform(x) - y) / scale) ** 2).mean()) for name, (x, y) in parts.items()}
    assert fitted.info["loss"] == pytest.approx(expected)


def test_scores_count_documents_where_rows_name_them():
    fitted, x, y = scored_map()
    source, target = as_activations(x[:3], y[:3])
    assert fitted.score(source, target).documents == 0
    assert fitted.score(replace(source, rows=(("a", 1), ("a", 2), ("b", 1))), target).documents == 2


def test_a_target_dimension_that_does_not_vary_has_no_vote():
    parts = [related(n, seed=seed, noise=0.5) for n, seed in ((200, 1), (60, 3), (60, 5))]
    without = Ridge().fit(moments(*((x, y[:, 1:]) for x, y in parts)))
    for _, y in parts:
        y[:, 0] = -2.5
    fitted = Ridge().fit(moments(*parts))
    assert fitted.info["loss"] == pytest.approx(without.info["loss"])
    assert fitted.info["penalty"] == without.info["penalty"]
    for name in ("mean_r2", "cosine", "norm_ratio"):
        assert getattr(fitted.score_test, name) == pytest.approx(getattr(without.score_test, name))


@pytest.mark.parametrize("n, m", [(3, 4), (0, 0)])
def test_rows_that_do_not_pair_have_no_score(n, m):
    fitted, x, y = scored_map()
    with pytest.raises(PromptError, match=f"needs paired rows, got {n} source and {m} target rows"):
        fitted.score(*as_activations(x[:n], y[:m]))


def test_a_map_must_fit_its_spaces():
    with pytest.raises(ValueError, match=r"weight must be \(5, 8\) from small .* to large .*, got \(4, 8\)"):
        AffineMap(torch.ones(4, DT), BIAS, SOURCE, TARGET, torch.ones(4), torch.ones(DT))


# --- the other closed forms -------------------------------------------------------------------


@pytest.mark.parametrize("ds, dt", [(5, 5), (3, 6), (6, 3)])
def test_procrustes_is_scipys(ds, dt):
    x, y = normal(80, ds, seed=1) @ normal(ds, ds, seed=2), normal(80, dt, seed=3)
    y[:, : min(ds, dt)] += x[:, : min(ds, dt)].flip(1)
    fitted = Procrustes(standardise=False, scale=False).fit(moments((x, y)))
    wide = max(ds, dt)  # rectangular: rotate within the wider space, where the narrower rows are padded with zeros
    padded = [np.pad(rows - rows.mean(0), ((0, 0), (0, wide - rows.shape[1]))) for rows in (x.numpy(), y.numpy())]
    rotation, total = orthogonal_procrustes(*padded)
    fit = padded[0] @ rotation
    made = (fitted.transform(x) - y.mean(0)).numpy()
    assert ((made - padded[1][:, :dt]) ** 2).sum() == pytest.approx(((fit - padded[1])[:, :dt] ** 2).sum())
    if ds <= dt:
        np.testing.assert_allclose(made, fit[:, :dt], atol=1e-9)
        scaled = Procrustes(standardise=False).fit(moments((x, y)))
        assert scaled.info["size"] == pytest.approx(total / (padded[0] ** 2).sum())


def test_procrustes_finds_rotation_and_size_in_standardised_coordinates():
    x = normal(300, 4, seed=1) * torch.tensor([1e-3, 1.0, 50.0, 1e4], dtype=torch.float64) + 7
    z = (x - x.mean(0)) / x.std(0, correction=0)
    rotation = torch.linalg.qr(normal(4, 4, seed=2))[0]
    made = moments((x, z @ rotation * torch.tensor([1e3, 1.0, 0.1, 5.0], dtype=torch.float64) - 3))
    fitted = Procrustes().fit(made)
    assert fitted.standardised_loss(made.train) < 0.02  # the target's own deviations are not all one before
    assert Procrustes(standardise=False).fit(made).standardised_loss(made.train) > 0.3
    assert fitted.info["coordinates"] == "standardised"


def test_without_centring_procrustes_keeps_the_origin():
    x = normal(100, 4, seed=1) + 5
    rotation = torch.linalg.qr(normal(4, 4, seed=2))[0]
    fitted = Procrustes(standardise=False, centre=False).fit(moments((x, 2 * x @ rotation)))
    assert not fitted.bias.any() and fitted.info["size"] == pytest.approx(2)
    torch.testing.assert_close(fitted.weight, 2 * rotation)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_reduced_rank_map_is_the_best_of_its_rank(rank, penalty):
    x, y = related(200, seed=1, noise=1.0)
    y = y * torch.logspace(-2, 2, DT, dtype=torch.float64)
    given = moments((x, y))
    fitted, full = (fitter.fit(given) for fitter in (ReducedRank(rank, (penalty,)), Ridge((penalty,))))
    (z, into), (_, scale) = (((v - v.mean(0)) / v.std(0, correction=0), v.std(0, correction=0)) for v in (x, y))

    def standardised(weight):
        return into[:, None] * weight / scale

    assert torch.linalg.matrix_rank(standardised(fitted.weight), tol=1e-9) == rank
    # The textbook's way: a penalty is rows of √(nλ) I (Mukherjee & Zhu 2011), and the least-squares fit of all rows
    # is projected onto its own leading directions (Izenman 1975).
    ridge = standardised(full.weight)
    rows = torch.cat([z, (len(x) * penalty) ** 0.5 * torch.eye(DS, dtype=torch.float64)])
    leading = torch.linalg.svd(rows @ ridge, full_matrices=False).Vh[:rank]
    torch.testing.assert_close(standardised(fitted.weight), ridge @ leading.T @ leading)
    torch.testing.assert_close(fitted.transform(x), z @ ridge @ leading.T @ leading * scale + y.mean(0))
    u, s, vh = torch.linalg.svd(ridge, full_matrices=False)
    cut = replace(full, weight=(u[:, :rank] * s[:rank]) @ vh[:rank] * scale / into[:, None])
    cut = replace(cut, bias=y.mean(0) - x.mean(0) @ cut.weight)
    costs = [
        DT * m.standardised_loss(given.train) + penalty * standardised(m.weight).norm() ** 2 for m in (fitted, cut)
    ]
    assert costs[0] <= costs[1] + 1e-12


def test_full_rank_is_ridge():
    given = usual()
    ridge, full = Ridge(penalties=(0.1,)).fit(given), ReducedRank(DT, penalties=(0.1,)).fit(given)
    torch.testing.assert_close(full.weight, ridge.weight)
    assert full.info["rank"] == DT
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        ReducedRank(0)


def test_identity_keeps_the_numbers_and_fills_up_with_zeros():
    x = related(4, seed=1)[0]
    made = Identity().fit(usual()).transform(x)
    assert torch.equal(made[:, :DS], x) and not made[:, DS:].any()
    short = Identity().fit(usual().inverse()).transform(torch.ones(1, DT, dtype=torch.float64))
    assert torch.equal(short, torch.ones(1, DS, dtype=torch.float64))


def test_a_random_map_has_the_means_and_the_spread_of_the_target():
    x, y = normal(3000, 60, seed=1) * 100 + 5, normal(3000, 50, seed=2) * torch.logspace(-2, 2, 50) + 9
    given = moments((x, y), None, (x, y))
    made, other = RandomMap(seed=1).fit(given), RandomMap(seed=2).fit(given)
    assert 0.9 < made.score_test.norm_ratio < 1.1 and abs(made.score_test.cosine) < 0.1
    assert not torch.equal(made.weight, other.weight)
    assert torch.equal(made.weight, RandomMap(seed=1).fit(given).weight)


def test_relative_anchors_are_numpys():
    x, y = related(120, seed=1, noise=0.5, units=UNITS)
    labels = tuple((str(i // 5), i) for i in range(120))
    parts = ["train", "train", "validation", "train", "test", "train"] * 4
    rows = PairedRows.of(Activations(x, SOURCE, labels), Activations(y, TARGET, labels), parts)
    fitted = RelativeAnchors(tolerance=0.3).fit(rows)
    train = np.repeat([part == "train" for part in parts], 5)
    z, w = ((v - v[train].mean(0)) / v[train].std(0) for v in (x.numpy(), y.numpy()))
    anchors = [v[train].reshape(16, 5, -1).mean(1) for v in (z, w)]  # the mean of each training text
    source, target = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in anchors)
    spanned = np.linalg.matrix_rank(target, tol=0.3 * np.linalg.norm(target, 2))
    assert 0 < spanned < np.linalg.matrix_rank(target)  # the tolerance drops some
    expected = z @ source.T @ np.linalg.pinv(target, rcond=0.3).T * y[train].numpy().std(0) + y[train].numpy().mean(0)
    np.testing.assert_allclose(fitted.transform(x), expected)
    assert fitted.info["anchors"] == 16
    few = [RelativeAnchors(3, seed=seed).fit(rows).weight for seed in (0, 1, 0)]
    assert torch.equal(few[0], few[2]) and not torch.equal(few[0], few[1])


def test_the_control_needs_its_moments():
    with pytest.raises(PromptError, match="collected without the control; use shuffled=True"):
        ShuffledPairs(Ridge()).fit(replace(usual(), control=None))


def test_a_pinned_fitter_takes_the_penalty_that_was_chosen():
    fitted = Ridge().fit(usual())
    assert pinned(Ridge(), fitted).penalties == (fitted.info["penalty"],)
    assert pinned(ReducedRank(3), fitted) == ReducedRank(3, penalties=(fitted.info["penalty"],))
    assert pinned(Procrustes(), fitted) == Procrustes()


def test_a_map_then_another_is_the_one_after_the_other():
    other = moments(*(related(n, seed=n, noise=1.0) for n in (100, 60)))  # of another text
    there, back = Ridge().fit(usual()), Ridge().fit(other.inverse())
    both = there.then(back)
    x, v = related(9, seed=7)[0], SteeringVector(normal(DS, seed=8), SOURCE)
    torch.testing.assert_close(both.transform(x), back.transform(there.transform(x)))
    torch.testing.assert_close(both.transport(v).direction, back.transport(there.transport(v)).direction)
    assert (both.source, both.target) == (there.source, back.target)
    assert torch.equal(both.source_scale, there.source_scale) and torch.equal(both.target_scale, back.target_scale)


def test_the_cycle_is_scored_in_the_sources_own_units():
    there = Ridge().fit(usual(noise=1.0))
    other = moments(*((x * UNITS, y) for x, y in (related(n, seed=n, noise=1.0) for n in (200, 60))))
    back = Ridge().fit(other.inverse())  # of another text, where the source's dimensions vary otherwise
    x = related(60, seed=5)[0]
    made = cycle_score(there, back, moments((x, normal(60, DT, seed=1))).train)
    came, own = ((rows - x.mean(0)) / there.source_scale for rows in (back.transform(there.transform(x)), x))
    assert made.cosine == pytest.approx(float((came * own).sum() / (came.norm() * own.norm())))
    assert made.norm_ratio == pytest.approx(float(came.norm() / own.norm()))
    elsewhere = replace(back, target=replace(SOURCE, fingerprint="cccc"))
    with pytest.raises(SpaceMismatchError, match="cycle_score: needs small .*aaaa.*, got small .*cccc"):
        cycle_score(there, elsewhere, usual().test)


def test_there_and_back_loses_what_the_maps_lose():
    parts = [related(n, seed=seed, noise=0.0) for n, seed in ((200, 1), (60, 3), (60, 5))]
    clean = moments(*parts)
    there, back = Ridge().fit(clean), Ridge().fit(clean.inverse())
    assert cycle_score(there, back, clean.test).mean_r2 == pytest.approx(1, abs=1e-4)
    noisy = usual(noise=1.0)
    there, back = Ridge().fit(noisy), Ridge().fit(noisy.inverse())
    x = related(60, seed=5, noise=1.0)[0]
    expected = r2_score(x, back.transform(there.transform(x)), multioutput="uniform_average")
    assert cycle_score(there, back, noisy.test).mean_r2 == pytest.approx(expected)
    assert expected < 0.9
    with pytest.raises(SpaceMismatchError, match="then: needs small"):
        there.then(there)


# --- ridge -----------------------------------------------------------------------------------


def test_without_penalty_any_affine_map_is_recovered():
    weight = normal(DS, DT, seed=3) * torch.logspace(-2, 2, DS, dtype=torch.float64)[:, None]
    x = (normal(50, DS, seed=1) + 3) * UNITS
    fitted = Ridge(penalties=(0.0,)).fit(moments((x, x @ weight + BIAS)))
    torch.testing.assert_close(fitted.weight * UNITS[:, None], weight * UNITS[:, None], rtol=0, atol=1e-7)
    torch.testing.assert_close(fitted.bias, BIAS, rtol=0, atol=1e-4)


@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 0.1, 1.0, 30.0])
def test_it_is_scikit_learns_ridge_on_standardised_dimensions(penalty):
    x, y = related(60, seed=1, noise=0.5, units=UNITS)
    y = y * torch.logspace(-3, 4, DT, dtype=torch.float64)
    fitted = Ridge(penalties=(penalty,)).fit(moments((x, y)))
    scaler = StandardScaler().fit(x)
    theirs = linear_model.Ridge(alpha=len(x) * penalty).fit(scaler.transform(x), y)
    np.testing.assert_allclose(fitted.weight, theirs.coef_.T / scaler.scale_[:, None], rtol=1e-6)
    np.testing.assert_allclose(fitted.transform(x), theirs.predict(scaler.transform(x)), rtol=1e-6)


def test_without_penalty_and_rows_it_is_the_solution_of_least_norm():
    x, y = related(3, seed=1, noise=0.5, units=UNITS)
    with says_too_few:
        fitted = Ridge(penalties=(0.0,)).fit(moments((x, y)))
    z = (x - x.mean(0)) / x.std(0, correction=0)
    expected = torch.linalg.pinv(z) @ (y - y.mean(0)) / x.std(0, correction=0)[:, None]
    torch.testing.assert_close(fitted.weight, expected)
    torch.testing.assert_close(fitted.transform(x), y)


def test_predictions_do_not_depend_on_the_units_of_the_source():
    x, y = related(60, seed=1, noise=0.5)
    plain, rescaled = (Ridge(penalties=(0.3,)).fit(moments((x * units, y))) for units in (1.0, UNITS))
    torch.testing.assert_close(rescaled.transform(x * UNITS), plain.transform(x))
    torch.testing.assert_close(rescaled.weight * UNITS[:, None], plain.weight)


def test_repeating_the_text_changes_nothing():
    x, y = related(60, seed=1, noise=0.5)
    once, thrice = (Ridge(penalties=(0.3,)).fit(moments((x.repeat(k, 1), y.repeat(k, 1)))) for k in (1, 3))
    torch.testing.assert_close(thrice.weight, once.weight)


def test_a_growing_penalty_shrinks_to_the_mean():
    x, y = related(60, seed=1, noise=0.5)
    norms = [Ridge(penalties=(p,)).fit(moments((x, y))).weight.norm() for p in (0.01, 1.0, 100.0, 1e9)]
    assert norms == sorted(norms, reverse=True)
    torch.testing.assert_close(Ridge(penalties=(1e9,)).fit(moments((x, y))).transform(x), y.mean(0).expand_as(y))


def scarce():
    """Few noisy training rows, on which a small penalty is best, and validation rows, on which it is not."""
    return related(12, seed=1, noise=2.0), related(300, seed=3, noise=2.0)


@pytest.mark.parametrize("order", [PENALTIES, PENALTIES[::-1]])
def test_the_penalty_is_the_best_one_on_validation(order):
    (x, y), (vx, vy) = scarce()
    scaler = StandardScaler().fit(x)

    def quality(penalty, x_, y_):
        theirs = linear_model.Ridge(alpha=len(x) * penalty).fit(scaler.transform(x), y)
        return r2_score(y_, theirs.predict(scaler.transform(x_)), multioutput="uniform_average")

    expected = max(PENALTIES, key=lambda p: quality(p, vx, vy))
    assert min(PENALTIES) == max(PENALTIES, key=lambda p: quality(p, x, y)) < expected < max(PENALTIES)
    info = Ridge(penalties=order).fit(moments((x, y), (vx, vy), (x, y))).info
    assert info["penalty"] == expected
    path = {step["penalty"]: step["validation_r2"] for step in info["penalty_path"]}
    assert path == pytest.approx({p: quality(p, vx, vy) for p in PENALTIES})


def test_every_target_dimension_has_one_vote_on_the_penalty():
    train, (vx, vy) = scarce()
    votes = [
        Ridge().fit(moments((train[0], train[1] * units), (vx, vy * units))).info["penalty"]
        for units in (torch.ones(DT, dtype=torch.float64), torch.logspace(-4, 4, DT, dtype=torch.float64))
    ]
    assert votes[0] == votes[1]


def test_the_info_says_how_it_was_fitted():
    info = Ridge(penalties=(0.1,)).fit(moments(related(30, seed=1))).info
    assert info["fitter"] == "Ridge"
    assert (info["penalty"], info["penalty_path"]) == (0.1, [{"penalty": 0.1, "validation_r2": None}])
    assert (info["train_rows"], info["train_documents"], info["coverage"]) == (30, 30, 1.0)


@pytest.mark.parametrize("penalties", [(), (-0.1,), (1.0, float("nan"))])
def test_penalties_must_be_numbers_from_0(penalties):
    with pytest.raises(ValueError, match="penalties must be numbers of 0 or more, got"):
        Ridge(penalties=penalties)

"""Activations and the directions made of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from xmodel_steer.core.directions import (
    difference_of_means,
    logistic_probe,
    principal_direction,
    random_like,
    whitened_difference,
)
from xmodel_steer.core.errors import NonFiniteError, PromptError, SpaceMismatchError
from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations, SteeringVector

SPACE = Space("small", Site(2), 6, "aaaa")
OTHER = replace(SPACE, fingerprint="bbbb")  # as wide, and another model's
SCALE = torch.tensor([1e-2, 1.0, 3.0, 1e3, 0.5, 0.0], dtype=torch.float64)


def rows(n, seed, space=SPACE):
    values = torch.randn(n, space.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Activations(values, space)


def vector(seed=0, scale=SCALE, space=SPACE):
    return SteeringVector(rows(1, seed, space).values[0], space, f"v{seed}", scale=scale)


def moved(activations, shift):
    return replace(activations, values=activations.values + shift)


# --- difference of means ---------------------------------------------------------------------


def test_exchanging_the_sides_turns_the_direction_round():
    p, n = rows(7, 1), rows(3, 2)
    there, back = difference_of_means(p, n), difference_of_means(n, p)
    turned = -back
    assert torch.equal(there.direction, turned.direction)
    assert torch.equal(there.positive_mean, turned.positive_mean)
    assert torch.equal(there.negative_mean, turned.negative_mean)
    assert there.counts == turned.counts == (7, 3)


def test_it_is_numpys_difference_of_means_with_unequal_counts():
    p, n = rows(11, 1), rows(4, 2)
    made = difference_of_means(p, n, label="joy", scale=SCALE)
    np.testing.assert_allclose(made.direction, p.values.numpy().mean(0) - n.values.numpy().mean(0))
    torch.testing.assert_close(made.positive_mean - made.negative_mean, made.direction)
    assert (made.label, made.space, made.scale is SCALE) == ("joy", SPACE, True)


def test_a_shift_of_both_sides_changes_nothing_and_of_one_side_is_the_change():
    p, n, shift = rows(5, 1), rows(9, 2), vector(3).direction
    plain = difference_of_means(p, n).direction
    torch.testing.assert_close(difference_of_means(moved(p, shift), moved(n, shift)).direction, plain)
    torch.testing.assert_close(difference_of_means(moved(p, shift), n).direction, plain + shift)


# --- logistic probe --------------------------------------------------------------------------


def test_a_probe_finds_the_direction_that_parts_the_sides_among_others_that_only_go_along():
    """A dimension that only goes along with the one that counts gets nothing; the difference of means follows it."""
    draw = torch.Generator().manual_seed(0)
    cause = torch.cat([torch.full((400,), 1.0), torch.full((400,), -1.0)]).double()
    noise = torch.randn(800, SPACE.width, generator=draw, dtype=torch.float64)
    values = noise.clone()
    values[:, 0] = 5 * (cause + 0.5 * noise[:, 0])
    values[:, 1] = cause + 0.5 * noise[:, 0] + noise[:, 1]  # a noisier copy, told nothing of its own
    values[:, 2] = 7.0  # a constant
    sides = Activations(values[:400], SPACE), Activations(values[400:], SPACE)
    probe, means = logistic_probe(*sides, label="joy"), difference_of_means(*sides)
    spread = values.std(0)
    ratio = {v.origin: float((v.direction / spread)[1] / (v.direction / spread)[0]) for v in (probe, means)}
    assert ratio["difference of means"] > 0.6
    assert abs(ratio["logistic probe"]) < 0.1
    assert probe.direction[2] == 0
    along = probe.direction / values.std(0, correction=0).where(spread > 0, 1.0)
    apart = (means.direction / values.std(0, correction=0).where(spread > 0, 1.0)) @ along / along.norm()
    assert float(along.norm()) == pytest.approx(float(apart))  # strength 1 goes from the one side's mean to the other's
    assert (probe.label, probe.counts) == ("joy", (400, 400))


def test_a_probe_turns_round_with_its_sides_and_a_strong_penalty_leaves_the_standardised_difference():
    p, n = rows(40, 1), rows(40, 2)
    there, back = logistic_probe(p, n), logistic_probe(n, p)
    torch.testing.assert_close(there.direction, -back.direction, rtol=1e-4, atol=1e-5)
    spread = torch.cat([p.values, n.values]).double().std(0, correction=0)
    weak = logistic_probe(p, n, c=1e-7).direction.double() / spread
    means = difference_of_means(p, n).direction.double() / spread
    assert float(torch.cosine_similarity(weak, means, dim=0)) > 0.999
    with pytest.raises(SpaceMismatchError):
        logistic_probe(p, rows(4, 1, OTHER))


# --- whitened difference of means -------------------------------------------------------------


def correlated(n, seed, shift=0.0):
    """Rows whose dimensions vary together, in unlike units."""
    mixing = rows(SPACE.width, 50).values + torch.eye(SPACE.width)
    units = torch.tensor([1e-2, 1.0, 3.0, 1e3, 0.5, 2.0], dtype=torch.float64)
    return Activations((rows(n, seed).values @ mixing + shift) * units, SPACE)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, "auto"])
def test_a_whitened_difference_is_scikit_learns_discriminant(shrinkage):
    p, n = correlated(40, 1, shift=0.7), correlated(25, 2)
    made = whitened_difference(p, n, label="joy", shrinkage=shrinkage)
    values = np.concatenate([p.values, n.values])
    spread = values.std(0)
    labels = [1] * 40 + [0] * 25
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    weights = lda.fit(values / spread, labels).coef_[0]
    step = spread * weights / np.linalg.norm(weights)
    np.testing.assert_allclose(made.direction / np.linalg.norm(made.direction), step / np.linalg.norm(step), rtol=1e-6)
    if shrinkage != 0.3:  # these two do not depend on the units: the weights are those of the rows as they are
        raw = lda.fit(values, labels).coef_[0]
        dual = made.direction.numpy() / spread**2
        np.testing.assert_allclose(dual / np.linalg.norm(dual), raw / np.linalg.norm(raw), rtol=1e-5)
    assert (made.label, made.counts, made.origin) == ("joy", (40, 25), "whitened difference of means")


def test_a_whitened_difference_solves_with_the_covariance_within_the_sides():
    p, n = correlated(40, 1, shift=0.7), correlated(25, 2)
    made = whitened_difference(p, n, shrinkage=0.0)
    centred = np.concatenate([side.values.numpy() - side.values.numpy().mean(0) for side in (p, n)])
    spread = np.concatenate([p.values, n.values]).std(0)
    weights = np.linalg.solve(centred.T @ centred / 65, difference_of_means(p, n).direction.numpy())
    dual = made.direction.numpy() / spread**2
    np.testing.assert_allclose(dual / np.linalg.norm(dual), weights / np.linalg.norm(weights), rtol=1e-6)
    # Strength 1 leads from one mean to the other along the weights.
    step, apart = made.direction.numpy() / spread, difference_of_means(p, n).direction.numpy() / spread
    assert step @ step == pytest.approx(step @ apart)


def test_full_shrinkage_leaves_the_difference_of_means_and_units_change_nothing():
    p, n = correlated(40, 1, shift=0.7), correlated(25, 2)
    torch.testing.assert_close(whitened_difference(p, n, shrinkage=1).direction, difference_of_means(p, n).direction)
    factors = torch.tensor([3.0, 1e3, 1.0, 0.2, 7.0, 1e-2], dtype=torch.float64)
    scaled = [replace(side, values=side.values * factors) for side in (p, n)]
    torch.testing.assert_close(whitened_difference(*scaled).direction, factors * whitened_difference(p, n).direction)
    torch.testing.assert_close(whitened_difference(n, p).direction, -whitened_difference(p, n).direction)


def test_fewer_rows_than_dimensions_whiten_too_and_a_shrinkage_is_a_share():
    few = rows(3, 1), rows(2, 2)
    made = whitened_difference(*few)
    assert made.direction @ difference_of_means(*few).direction > 0
    with pytest.raises(ValueError, match="shrinkage must be between 0 and 1, got 1.5"):
        whitened_difference(*few, shrinkage=1.5)
    with pytest.raises(SpaceMismatchError):
        whitened_difference(few[0], rows(2, 2, OTHER))


# --- principal direction ----------------------------------------------------------------------


def as_repeng(p, n, method):
    """Lines of repeng 0.4's read_representations, on rows in the order positive, negative, positive, negative, ..."""
    h = np.stack([p.values.numpy(), n.values.numpy()], 1).reshape(-1, SPACE.width)
    if method == "pca_diff":
        train = h[::2] - h[1::2]
    else:
        centre = (h[::2] + h[1::2]) / 2
        train = h.copy()
        train[::2] -= centre
        train[1::2] -= centre
    direction = PCA(n_components=1, whiten=False).fit(train).components_[0]
    projected = h @ direction
    return direction if np.mean(projected[::2] > projected[1::2]) >= 0.5 else -direction


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["pca_center", "pca_diff"])
def test_a_principal_direction_is_repengs(method, seed):
    p, n = moved(rows(30, 2 * seed), torch.tensor([0.6, -0.3, 0.0, 0.2, 0.0, 0.9]).double()), rows(30, 2 * seed + 1)
    made = principal_direction(p, n, label="joy", scale=SCALE, centred=method == "pca_diff").direction.numpy()
    theirs = as_repeng(p, n, method)
    means = (p.values - n.values).mean(0).numpy()
    np.testing.assert_allclose(made / np.linalg.norm(made), theirs * np.sign(theirs @ means), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(made @ made, made @ means)  # from mean to mean along it; the positive side is higher


def test_a_principal_direction_turns_round_with_its_sides_and_forgets_the_order_of_pairs_and_what_they_share():
    p, n, order = rows(12, 1), rows(12, 2), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    plain = principal_direction(p, n).direction
    torch.testing.assert_close(principal_direction(n, p).direction, -plain)
    shuffled = [replace(side, values=side.values[order]) for side in (p, n)]
    torch.testing.assert_close(principal_direction(*shuffled).direction, plain)
    topic = rows(12, 3).values  # of each pair its own
    torch.testing.assert_close(principal_direction(moved(p, topic), moved(n, topic)).direction, plain)
    assert not torch.allclose(principal_direction(shuffled[0], n).direction, plain, rtol=0.01)  # other pairs


def test_pairs_that_all_differ_alike_have_the_difference_of_means():
    p, shift = rows(9, 1), vector(3).direction
    torch.testing.assert_close(principal_direction(moved(p, shift), p).direction, shift)
    with pytest.raises(PromptError, match="the differences do not vary; use difference_of_means"):
        principal_direction(moved(p, shift), p, centred=True)


def test_rows_without_partners_are_refused():
    with pytest.raises(PromptError, match="needs pairs, row i of both sides, got 5 positive and 4 negative rows"):
        principal_direction(rows(5, 1), rows(4, 2))
    with pytest.raises(SpaceMismatchError):
        principal_direction(rows(4, 1), rows(4, 2, OTHER))


def test_repeating_every_row_changes_nothing():
    p, n = rows(5, 1), rows(9, 2)
    twice = replace(p, values=p.values.repeat(2, 1))
    torch.testing.assert_close(difference_of_means(twice, n).direction, difference_of_means(p, n).direction)


@pytest.mark.parametrize(
    "dtype, column",
    [
        (torch.float32, [1e8, 1.0, -1e8, 1.0] * 50),  # a float32 sum loses the ones
        (torch.bfloat16, [1.0] * 999 + [2.0]),  # 1.001 is 1 in bfloat16
        (torch.float16, [2048.0, 2050.0]),  # 2049 is 2048 in float16
    ],
)
def test_means_are_taken_in_float64(dtype, column):
    values = torch.tensor(column).to(dtype)[:, None].repeat(1, SPACE.width)
    zero = Activations(torch.zeros(1, SPACE.width, dtype=dtype), SPACE)
    made = difference_of_means(Activations(values, SPACE), zero)
    assert made.direction.dtype == torch.float32
    np.testing.assert_allclose(made.direction, values.double().numpy().mean(0), rtol=1e-6)
    assert not np.allclose(values.mean(0).double(), values.double().mean(0), rtol=1e-4)  # the case is a case


def test_the_sides_must_live_in_one_space():
    with pytest.raises(SpaceMismatchError, match="difference of means: needs small .*weights aaaa.*got.*weights bbbb"):
        difference_of_means(rows(2, 0), rows(2, 1, OTHER))


@pytest.mark.parametrize("empty", ["positive", "negative"])
def test_an_empty_side_is_named(empty):
    sides = {"positive": rows(2, 0), "negative": rows(2, 1), empty: rows(0, 0)}
    with pytest.raises(PromptError, match=f"the {empty} side has no rows"):
        difference_of_means(**sides)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_nan_in_the_activations_is_refused(bad, side):
    sides = {"positive": rows(3, 0), "negative": rows(3, 1)}
    sides[side].values[1, 4] = bad
    with pytest.raises(NonFiniteError, match="has NaN or infinity; check the activations"):
        difference_of_means(**sides)


def test_check_finite_counts_the_bad_rows():
    values = torch.ones(4, 3)
    check_finite(values, "capture")
    values[1] = math.nan
    values[3, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"capture: NaN or infinity in 2 row\(s\)\. Load the model in float32"):
        check_finite(values, "capture")


# --- algebra ---------------------------------------------------------------------------------

SUMS = {
    "commutes": (lambda a, b, c: a + b, lambda a, b, c: b + a),
    "associates": (lambda a, b, c: (a + b) + c, lambda a, b, c: a + (b + c)),
    "distributes": (lambda a, b, c: 3.0 * (a + b), lambda a, b, c: a * 3.0 + b * 3.0),
    "subtracts": (lambda a, b, c: a - b, lambda a, b, c: a + -b),
    "doubles": (lambda a, b, c: a + a, lambda a, b, c: 2.0 * a),
    "divides": (lambda a, b, c: a / 4.0, lambda a, b, c: 0.25 * a),
    "negates": (lambda a, b, c: -a, lambda a, b, c: -1.0 * a),
}


@pytest.mark.parametrize("law", SUMS)
def test_vectors_add_and_scale(law):
    left, right = (side(vector(1), vector(2), vector(3)) for side in SUMS[law])
    torch.testing.assert_close(left.direction, right.direction)
    assert left.space == right.space == SPACE
    assert left.scale is SCALE


@pytest.mark.parametrize("combine", ["__add__", "__sub__", "cosine"])
def test_vectors_of_two_spaces_do_not_combine(combine):
    with pytest.raises(SpaceMismatchError, match="weights aaaa.*weights bbbb"):
        getattr(vector(1), combine)(vector(2, space=OTHER))


def test_a_sum_does_not_keep_the_means_of_its_terms():
    made = difference_of_means(rows(3, 0), rows(3, 1))
    for derived in (made + vector(), made - vector(), 2.0 * made):
        assert derived.positive_mean is derived.negative_mean is None


@pytest.mark.parametrize("field", ["direction", "positive_mean", "negative_mean", "scale"])
def test_no_tensor_of_a_vector_may_have_nan(field):
    with pytest.raises(NonFiniteError, match=f"SteeringVector: {field} has NaN"):
        SteeringVector(**({"direction": torch.ones(6), "space": SPACE} | {field: torch.full((6,), math.nan)}))


def test_a_direction_must_be_as_wide_as_its_space():
    with pytest.raises(ValueError, match=r"direction must have shape \(6,\) for small .*, got \(5,\)"):
        SteeringVector(torch.ones(5), SPACE)


@pytest.mark.parametrize(
    "values, labels, message",
    [
        (torch.ones(2, 5), (), r"values must be \(rows, 6\) for small .*, got \(2, 5\)"),
        (torch.ones(2, 6), (("a", 1),), "2 values but 1 row labels"),
    ],
)
def test_activations_are_checked(values, labels, message):
    with pytest.raises(ValueError, match=message):
        Activations(values, SPACE, labels)


# --- standardised coordinates ----------------------------------------------------------------


def in_numpy(v):
    """v / σ, without the dimension that does not vary."""
    return v.direction.numpy()[:5] / SCALE.numpy()[:5]


def test_norm_and_cosine_are_numpys_in_standardised_coordinates():
    a, b = vector(1), vector(2)
    x, y = in_numpy(a), in_numpy(b)
    assert a.norm(standardised=True) == pytest.approx(np.linalg.norm(x))
    assert a.norm() == pytest.approx(np.linalg.norm(a.direction))
    assert a.cosine(b) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    x, y = a.direction.numpy(), b.direction.numpy()
    assert a.cosine(b, standardised=False) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_cosine_knows_no_length_but_a_sign():
    a = vector(1)
    assert a.cosine(7.0 * a) == pytest.approx(1)
    assert a.cosine(-a) == pytest.approx(-1)
    assert a.cosine(0.0 * a) == 0


@pytest.mark.parametrize("standardised", [True, False])
def test_with_norm_keeps_the_direction_and_the_means(standardised):
    made = difference_of_means(rows(3, 0), rows(3, 1), scale=SCALE)
    scaled = made.with_norm(2.5, standardised=standardised)
    assert scaled.norm(standardised=standardised) == pytest.approx(2.5)
    assert scaled.cosine(made, standardised=False) == pytest.approx(1)
    assert scaled.positive_mean is made.positive_mean
    assert scaled.negative_mean is made.negative_mean


def test_with_norm_is_standardised_unless_asked():
    assert vector(1).with_norm(3.0).norm(standardised=True) == pytest.approx(3)


# --- class means -----------------------------------------------------------------------------


def test_at_norm_of_scales_the_vector_and_keeps_the_centre_of_its_means():
    v = difference_of_means(rows(3, 0), rows(5, 1), scale=SCALE)
    other = replace(vector(7), scale=SCALE * 2)
    scaled = v.at_norm_of(other)
    assert scaled.norm(standardised=True) == pytest.approx(other.norm(standardised=True))
    assert scaled.cosine(v) == pytest.approx(1)
    torch.testing.assert_close(scaled.positive_mean - scaled.negative_mean, scaled.direction)
    torch.testing.assert_close(scaled.centre, v.centre)
    torch.testing.assert_close(v.at_norm_of(v).direction, v.direction)
    torch.testing.assert_close((3.0 * v).at_norm_of(other).direction, scaled.direction)
    torch.testing.assert_close((-v).at_norm_of(other).positive_mean, scaled.negative_mean)


def test_at_norm_of_works_in_float64_and_returns_the_vectors_dtype():
    sides = [replace(rows(n, n), values=rows(n, n).values.float()) for n in (3, 5)]
    v, other = difference_of_means(*sides, scale=SCALE), vector(7)
    centre = (v.positive_mean.double() + v.negative_mean.double()) / 2
    expected = v.with_norm(other.norm(standardised=True)).about(centre)
    for name in ("direction", "positive_mean", "negative_mean"):
        assert torch.equal(getattr(v.at_norm_of(other), name), getattr(expected, name))
    assert torch.equal(v.centre, centre)
    assert (v.centre.dtype, expected.positive_mean.dtype) == (torch.float64, torch.float32)


def test_a_vector_without_means_is_only_scaled_and_has_no_centre():
    v, other = vector(1), vector(2)
    scaled = v.at_norm_of(other)
    assert torch.equal(scaled.direction, v.with_norm(other.norm(standardised=True)).direction)
    assert scaled.positive_mean is scaled.negative_mean is None
    with pytest.raises(ValueError, match="'v1': has no class means and so no centre"):
        _ = v.centre
    with pytest.raises(SpaceMismatchError):
        v.at_norm_of(vector(2, space=OTHER))


def test_a_zero_vector_has_no_norm_to_give():
    with pytest.raises(ValueError, match="'0 \\* v1': a zero vector has no direction to scale"):
        (0.0 * vector(1)).with_norm(1.0)


@pytest.mark.parametrize(
    "use",
    [
        SteeringVector.standardised,
        SteeringVector.covector,
        lambda v: v.with_norm(1.0),
        lambda v: random_like(v, seed=0),
    ],
)
def test_without_a_scale_there_are_no_standardised_coordinates(use):
    with pytest.raises(ValueError, match=r"need the standard deviations of small.*use vector.with_scale\("):
        use(vector(1, scale=None))


def test_the_covector_reads_how_far_along_the_vector_a_row_lies():
    v = vector(1)
    w = v.covector()
    assert float(w @ v.direction) == pytest.approx(1)
    row = rows(1, 5).values[0]
    assert float(w @ (row + 2.5 * v.direction) - w @ row) == pytest.approx(2.5)
    expected = in_numpy(v) / SCALE.numpy()[:5] / (in_numpy(v) @ in_numpy(v))
    np.testing.assert_allclose(w, [*expected, 0.0])


def test_the_covectors_reading_does_not_depend_on_units():
    units = torch.tensor([1e4, 1.0, 1e-3, 2.0, 5.0, 1.0], dtype=torch.float64)
    v, row = vector(1), rows(1, 5).values[0]
    other = replace(v, direction=v.direction * units, scale=SCALE * units)
    assert float(other.covector() @ (row * units)) == pytest.approx(float(v.covector() @ row))


# --- the random control ----------------------------------------------------------------------


def test_a_random_vector_matches_the_standardised_norm_and_follows_its_seed():
    v = vector(1)
    draws = [random_like(v, seed=s) for s in range(5)]
    assert [d.norm(standardised=True) for d in draws] == pytest.approx([v.norm(standardised=True)] * 5)
    assert torch.equal(draws[3].direction, random_like(v, seed=3).direction)
    assert len({tuple(d.direction.tolist()) for d in [v, *draws]}) == 6
    assert all(d.space == SPACE and d.scale is SCALE for d in draws)


def test_a_random_vector_has_the_shape_of_its_space():
    space = replace(SPACE, width=2000)
    scale = torch.ones(2000).index_fill(0, torch.arange(1000), 1e3)
    draw = random_like(SteeringVector(torch.ones(2000), space, scale=scale), seed=0)
    shares = draw.standardised().reshape(2, 1000).norm(dim=1) ** 2 / draw.norm(standardised=True) ** 2
    assert shares.tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert draw.direction.dtype == torch.float32


def test_the_random_vector_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    random_like(vector(1), seed=4)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_zero_vector_has_no_covector() -> None:
    zero = SteeringVector(torch.zeros(3), Space("m", Site(0), 3, "f"), "nil", scale=torch.ones(3))
    with pytest.raises(ValueError, match="zero in standardised coordinates"):
        zero.covector()

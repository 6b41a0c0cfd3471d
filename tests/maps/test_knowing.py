"""A map's knowledge of a vector, against eigenvectors and against new samples of the text."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_results import LARGE, SMALL

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.maps.knowing import OUTSIDE, knows
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.ridge import Spectrum

PENALTY = 0.3
SPREAD = torch.tensor([3.0, 1.0, 0.3, 0.05], dtype=torch.float64)  # along planted directions


def sampled(seed: int, count: int = 400) -> SplitMoments:
    """Rows of a planted linear relation with noise; most of the source's variance lies along few directions."""
    draw = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64))
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(98), dtype=torch.float64)
    x = torch.randn(2 * count, 4, generator=draw, dtype=torch.float64) * SPREAD @ turn
    y = x @ weight + 2 * torch.randn(2 * count, 3, generator=draw, dtype=torch.float64)
    labels = tuple((f"{i // 10}", i % 10) for i in range(2 * count))
    parts = ["train"] * (count // 10) + ["validation", "test"] * (count // 20)
    return xs.maps.PairedRows.of(xs.Activations(x, SMALL, labels), xs.Activations(y, LARGE, labels), parts).moments()


def vectors() -> list[xs.SteeringVector]:
    draws = torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [xs.SteeringVector(direction, SMALL, "v") for direction in draws]


def test_what_is_carried_is_the_eigenvectors_sum() -> None:
    moments = sampled(0)
    mapping = xs.Ridge(penalties=(PENALTY,)).fit(moments)
    spectrum = Spectrum.of(moments.train.source_scatter, moments.train.source_scale, moments.train.count)
    for vector in vectors():
        along = spectrum.vectors.T @ (vector.direction * spectrum.inverse)
        shares = (spectrum.values / (spectrum.values + PENALTY)) ** 2
        assert knows(mapping, moments, vector).carried == pytest.approx(
            float((shares * along**2).sum() / (along @ along))
        )
        free = xs.Ridge(penalties=(0.0,)).fit(moments)
        assert knows(free, moments, vector).carried == pytest.approx(1)


def test_the_leverage_is_inverse_variance_and_that_of_the_text_s_rows_is_one() -> None:
    """Against the eigenvectors, and the definition: the rows of the text itself."""
    moments = sampled(0, 4000)
    mapping = xs.Ridge(penalties=(PENALTY,)).fit(moments)
    train = moments.train
    spectrum = Spectrum.of(train.source_scatter, train.source_scale, train.count)
    for vector in vectors():
        along = spectrum.vectors.T @ (vector.direction * spectrum.inverse)
        expected = float((along**2 / spectrum.values).sum() / (along @ along))
        made = knows(mapping, moments, vector)
        assert made.leverage == pytest.approx(expected, rel=1e-3)
        assert made.known == (expected < OUTSIDE)
    axes = [xs.SteeringVector(direction, SMALL, "axis") for direction in spectrum.vectors.T / spectrum.inverse]
    told = torch.tensor([knows(mapping, moments, axis).leverage for axis in axes], dtype=torch.float64)
    # A row's square lies along each eigenvector as its eigenvalue does: mean leverage, weighted so, is 1.
    assert float((told * spectrum.values).sum() / spectrum.values.sum()) == pytest.approx(1, rel=1e-3)


def test_a_direction_that_the_text_does_not_span_is_unknown() -> None:
    moments = sampled(0)
    twins = torch.eye(4, dtype=torch.float64)  # of standardised rows whose last two dimensions are always equal
    twins[2, 3] = twins[3, 2] = 1
    moments = replace(moments, train=replace(moments.train, source_scatter=400 * twins))
    mapping = xs.Ridge(penalties=(PENALTY,)).fit(moments)
    inside, outside = (xs.SteeringVector(torch.tensor([0.0, 0.0, 1.0, s]), SMALL, "v") for s in (1.0, -1.0))
    assert knows(mapping, moments, inside).leverage == pytest.approx(0.5, rel=1e-3)
    unknown = knows(mapping, moments, outside)
    assert unknown.leverage > 1e4 and not unknown.known and np.isnan(unknown.scatter)  # nothing of it is mapped


def test_the_scatter_is_that_of_maps_of_other_samples() -> None:
    """The same relation, sampled 200 times: how much the mapped vector really scatters."""
    fitted = [(xs.Ridge(penalties=(PENALTY,)).fit(moments), moments) for moments in map(sampled, range(200))]
    scale = torch.stack([moments.train.target_scale for _, moments in fitted]).mean(0)
    for vector in vectors():
        mapped = torch.stack([mapping.transport(vector).direction.double() for mapping, _ in fitted]) / scale
        real = float(mapped.std(0).norm() / mapped.mean(0).norm())
        told = np.median([knows(*pair, vector).scatter for pair in fitted[:20]])
        assert told == pytest.approx(real, rel=0.25)


def test_ten_times_more_text_scatters_by_the_root_of_ten_less() -> None:
    few, many = sampled(1, 200), sampled(1, 2000)
    maps = [(xs.Ridge(penalties=(PENALTY,)).fit(moments), moments) for moments in (few, many)]
    for vector in vectors():
        sizes = [mapping.transport(vector).direction.double() / mapping.target_scale for mapping, _ in maps]
        less, more = (knows(*pair, vector).scatter * float(size.norm()) for pair, size in zip(maps, sizes, strict=True))
        assert more / less == pytest.approx(10**-0.5, rel=0.3)


def test_the_length_of_a_vector_does_not_matter() -> None:
    moments = sampled(2)
    mapping = xs.Ridge().fit(moments)
    one, five = (knows(mapping, moments, vector) for vector in (vectors()[0], 5 * vectors()[0]))
    assert one.carried == pytest.approx(five.carried) and one.scatter == pytest.approx(five.scatter)


def test_what_it_cannot_tell_is_refused() -> None:
    moments = sampled(3)
    mapping = xs.Ridge().fit(moments)
    with pytest.raises(SpaceMismatchError, match="knows"):
        knows(mapping, moments, xs.SteeringVector(torch.ones(3), LARGE, "v"))
    with pytest.raises(PromptError, match="needs a Ridge map and moments with test rows"):
        knows(xs.Procrustes().fit(moments), moments, vectors()[0])

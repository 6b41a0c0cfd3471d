"""What a map knows of a direction, told from moments and rows alone, before anything is steered."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.vectors import Activations, SteeringVector, inverse_of
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.ridge import Spectrum


@dataclass(frozen=True)
class Knowledge:
    """What a ridge map can carry of one vector. No label of the target is read.

    Args:
        carried: Share of the vector that the penalty leaves, Σ (Λᵢ/(Λᵢ+λ))² (uᵢ·v̂)², with the eigenvalues Λ and
            eigenvectors u of the source's standardised covariance and the vector's direction v̂ in whitened-scale
            coordinates. Under 1 where the text hardly varies along the vector.
        scatter: Standard deviation of the mapped vector from the sampling of the text, over its length, in the target's
            standardised coordinates: √(Σ (uᵢ·v̂)² Λᵢ/(Λᵢ+λ)² / n · Σⱼ residual varianceⱼ) / ‖mapped‖.
        along: R² of the mapped rows along the mapped vector, on test documents: whether what varies along it in the
            target is predicted by the source.
    """

    carried: float
    scatter: float
    along: float


def knows(mapping: AffineMap, moments: SplitMoments, vector: SteeringVector) -> Knowledge:
    """Tell what a map knows of a vector.

    Args:
        mapping: A map that was fitted on these moments with one penalty.
        moments: The moments of its layer pair.
        vector: A vector of the source's space.

    Raises:
        SpaceMismatchError: Map, moments and vector are of different spaces.
    """
    require_same_space(mapping.source, vector.space, "knows")
    require_same_space(mapping.source, moments.source, "knows")
    train, penalty = moments.train, float(mapping.info.get("penalty", 0.0))
    spectrum = Spectrum.of(train.source_scatter, train.source_scale, train.count)
    # A vector v acts through W = S⁻¹ U G Uᵀ ..., so that its coordinates are those of v / scale.
    along = spectrum.vectors.T @ (vector.direction.double() * spectrum.inverse)
    squares, values = along**2 / (along @ along), spectrum.values
    carried = float((squares * (values * spectrum.gains(penalty)) ** 2).sum())
    moved, inverse = mapping.transport(vector).direction.double(), inverse_of(train.target_scale)
    noise = float((squares * values * spectrum.gains(penalty) ** 2).sum()) * float(along @ along) / train.count
    standard = moved * inverse
    scatter = (noise * float(_residual(mapping, moments).diagonal() @ inverse**2)) ** 0.5 / float(standard.norm())
    # The read-out of the target along the mapped vector, in standardised coordinates.
    reader = standard / standard.norm() * inverse
    left, total = (
        reader @ _residual(mapping, moments) @ reader,
        reader @ moments.test.target_scatter @ reader / moments.test.count,
    )
    return Knowledge(carried, scatter, 1 - float(left / total))


def _residual(mapping: AffineMap, moments: SplitMoments) -> Tensor:
    """Return the covariance of target rows minus mapped rows, on test documents."""
    test, weight = moments.test, mapping.weight.double()
    mapped = weight.T @ test.cross_scatter
    shift = test.source_mean @ weight + mapping.bias.double() - test.target_mean
    inner = weight.T @ test.source_scatter @ weight
    return (test.target_scatter - mapped - mapped.T + inner) / test.count + torch.outer(shift, shift)


def reconstruction(mapping: AffineMap, source: Activations, target: Activations) -> float:
    """Return the R² of mapped rows on other text, such as contrast prompts whose labels are not read.

    Over all dimensions of the target in its standardised coordinates, about the mean of these rows.

    Args:
        mapping: The map.
        source: Rows of the source.
        target: The rows that they pair with.
    """
    inverse = inverse_of(mapping.target_scale.double())
    truth = target.values.double() * inverse
    error = mapping.transform(source.values).double() * inverse - truth
    return 1 - float(error.square().sum() / (truth - truth.mean(0)).square().sum())

"""A map's knowledge of a vector, told from moments alone, before anything is steered."""

from dataclasses import dataclass

import torch

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.vectors import SteeringVector, inverse_of
from xmodel_steer.maps.affine import AffineMap, Map
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.statistics import quotient

# The leverage that best tells apart the recorded maps that carried under half of the effect: benchmarks/knowing.py.
OUTSIDE = 1.2


@dataclass(frozen=True)
class Knowledge:
    """The part of one vector that a ridge map can carry; no label is read.

    `known` goes by the leverage alone. On recorded maps the other two predict less, since penalties differ.

    With the correlations R of the source's training rows, its eigenvectors uᵢ and eigenvalues Λᵢ, the penalty λ, and the
    vector z in standardised source coordinates, v / σ.

    Args:
        leverage: How far the vector lies outside the text, zᵀR⁻¹z / ‖z‖²: Mahalanobis length over length, both squared.
            1 for the text's average row; large along what the text varies along only together with other things.
        carried: Share of the vector that the penalty leaves, Σ (Λᵢ / (Λᵢ + λ))² (uᵢ·z)² / ‖z‖². Little is left along
            what the text hardly varies along.
        scatter: Standard deviation of the mapped vector over other samples of the text, over its length, both in
            standardised target coordinates: √(Σ (uᵢ·z)² Λᵢ / (Λᵢ + λ)² / n · Σⱼ εⱼ²) / ‖mapped‖, with εⱼ² the residual
            variance of target dimension j on test rows. The variance of ridge coefficients (Hoerl and Kennard 1970).
    """

    leverage: float
    carried: float
    scatter: float

    @property
    def known(self) -> bool:
        """True if such maps carried half of the native effect, as a rule."""
        return self.leverage < OUTSIDE

    @classmethod
    def record(cls, mapping: Map, moments: SplitMoments, vector: SteeringVector) -> dict[str, float]:
        """Return plain JSON values; none without a ridge map and test rows."""
        try:
            return vars(knows(mapping, moments, vector))
        except PromptError:
            return {}


def knows(mapping: Map, moments: SplitMoments, vector: SteeringVector) -> Knowledge:
    """Tell how much a map knows of a vector.

    Args:
        mapping: A `Ridge` map of these moments.
        moments: The moments of its layer pair.
        vector: A vector of the source's space.

    Raises:
        SpaceMismatchError: Map, moments and vector are of different spaces.
        PromptError: The map has no penalty, or the moments have no test rows.
    """
    for space in (moments.source, vector.space):
        require_same_space(mapping.source, space, "knows")
    train, inverse = moments.train, inverse_of(moments.train.source_scale)
    if not isinstance(mapping, AffineMap) or "penalty" not in mapping.info or not moments.test.count:
        raise PromptError("knows: needs a Ridge map and moments with test rows; fit xs.Ridge() on more documents")
    correlation = inverse[:, None] * train.source_scatter * inverse / train.count
    z = vector.direction.double().cpu() * inverse
    # A direction that the text does not span gets no weight, and a large leverage; a penalty of 0 would divide by it.
    mean, one = float(correlation.diagonal().mean()), torch.eye(len(z), dtype=z.dtype)
    penalty = max(float(mapping.info["penalty"]), 1e-12 * mean)
    solved = torch.linalg.solve(correlation + penalty * one, z)
    leverage = float(z @ torch.linalg.solve(correlation + 1e-6 * mean * one, z) / (z @ z))
    kept = correlation @ solved
    mapped = mapping.transport(vector).direction.double().cpu() * inverse_of(train.target_scale)
    residual = mapping.standardised_loss(moments.test) * int((train.target_scale > 0).sum())
    noise = float(solved @ kept) / train.count * residual
    return Knowledge(leverage, float(kept @ kept / (z @ z)), quotient(noise**0.5, float(mapped.norm())))

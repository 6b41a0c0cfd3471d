"""The paper's autoencoder map, and the cycle score of two maps."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Space, require_same_space
from xmodel_steer.core.vectors import Activations, SteeringVector, standardise
from xmodel_steer.maps.affine import AffineMap, Map, MapScore
from xmodel_steer.maps.pairs import PairMoments


@dataclass(frozen=True, eq=False, repr=False)
class AutoencoderMap(Map):
    """The paper's map: Linear, ReLU, Linear (arXiv 2503.04429, section 3).

    ``f(x) = σ_t ∘ (relu(z A + a) B + b) + μ_t`` with ``z = (x - μ_s) / σ_s``, or without the
    standardisation, as in the paper, where ``standardised`` is False.

    Args:
        encoder: A, one row per source dimension.
        encoder_bias: a.
        decoder: B, one row per hidden unit.
        decoder_bias: b.
        source: The space that it maps from.
        target: The space that it maps to.
        source_mean: Mean of each source dimension over the training text.
        target_mean: Mean of each target dimension.
        source_scale: Standard deviation of each source dimension over the training text.
        target_scale: Standard deviation of each target dimension.
        standardised: Whether the map works in standardised coordinates.
        score_test: Score on test documents.
        info: How it was fitted.
    """

    encoder: Float[Tensor, "ds hidden"]
    encoder_bias: Float[Tensor, " hidden"]
    decoder: Float[Tensor, "hidden dt"]
    decoder_bias: Float[Tensor, " dt"]
    source: Space
    target: Space
    source_mean: Float[Tensor, " ds"]
    target_mean: Float[Tensor, " dt"]
    source_scale: Float[Tensor, " ds"]
    target_scale: Float[Tensor, " dt"]
    standardised: bool = True
    score_test: MapScore | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def points(self, values: Float[Tensor, "... ds"]) -> Float[Tensor, "... dt"]:
        """Map points in float64."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.to(values.device, torch.float64)

        x = values.to(torch.float64)
        if self.standardised:
            x = standardise(x - wide(self.source_mean), wide(self.source_scale))
        hidden = (x @ wide(self.encoder) + wide(self.encoder_bias)).relu()
        y = hidden @ wide(self.decoder) + wide(self.decoder_bias)
        return y * wide(self.target_scale) + wide(self.target_mean) if self.standardised else y

    def transport(
        self, vector: SteeringVector, *, at: "Activations | tuple[Activations, Activations] | None" = None
    ) -> SteeringVector:
        """Map a direction between points; the result's origin names them.

        The image of a direction depends on the place where a nonlinear map is applied. f(v) is the image
        of a point near the origin, not of a direction.

        Args:
            vector: The direction.
            at: Two sets of rows, with the behaviour and without: ``mean f(h₊) - mean f(h₋)``, the
                endpoints, whatever the vector is. One set of base points h: ``mean f(h + v) - f(h)``.
                None: about the midpoint c of the vector's class means, ``f(c + v / 2) - f(c - v / 2)``,
                which is ``f(mean h₊) - f(mean h₋)`` where v is their difference. The class means
                themselves are mapped as points.

        Raises:
            SpaceMismatchError: The vector or the points live in another space.
            PromptError: There are no points and the vector has no class means.
        """
        require_same_space(self.source, vector.space, "transport")
        for points in at if isinstance(at, tuple) else (at,) if at is not None else ():
            require_same_space(self.source, points.space, "transport (at)")
        if isinstance(at, tuple):
            means = ends = (self.points(at[0].values).mean(0), self.points(at[1].values).mean(0))
            how = f" by endpoints, {len(at[0])} and {len(at[1])} rows"
        elif at is not None:
            moved = at.values.to(torch.float64) + vector.direction.to(torch.float64)
            means = ends = (self.points(moved).mean(0), self.points(at.values).mean(0))
            how = f" about {len(at)} base points"
        elif vector.positive_mean is not None and vector.negative_mean is not None:
            means = (self.points(vector.positive_mean), self.points(vector.negative_mean))
            # A probe's direction, or a scaled one, is not the difference of the means that it keeps.
            half = vector.direction.to(torch.float64) / 2
            ends = (self.points(vector.centre + half), self.points(vector.centre - half))
            how = " about the middle of the class means"
        else:
            raise PromptError(
                "transport: a nonlinear map needs points, and the vector has no class means; "
                "give at=(positive, negative) activations, or at=activations as base points"
            )
        dtype = vector.direction.dtype
        positive, negative = (mean.cpu().to(dtype) for mean in means)
        return self._transported(vector, ends[0] - ends[1], positive, negative, how)


def cycle_score(there: AffineMap, back: AffineMap, moments: PairMoments) -> MapScore:
    """Score the round trip of points through two opposite maps.

    The score compares ``back(there(x))`` with x. 1 minus its R² is the cycle error of each
    source dimension, as a share of its variance.

    Args:
        there: From the source to the target.
        back: From the target to the source.
        moments: Moments of held-out rows, such as ``moments.pair(...).test``.

    Raises:
        SpaceMismatchError: The maps do not meet.
    """
    loop = there.then(back)
    require_same_space(loop.source, loop.target, "cycle_score")
    scatter, mean = moments.source_scatter, moments.source_mean
    same = PairMoments(moments.count, moments.documents, mean, mean, scatter, scatter, scatter)
    return replace(loop, target_scale=loop.source_scale).score_moments(same)

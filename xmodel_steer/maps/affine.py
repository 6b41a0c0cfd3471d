"""Maps from one model's space to another's.

Points and directions map differently. An affine map's ``transform`` is ``xW + b``, its ``transport``
is ``vW``; a bias added to a direction is a mistake that no shape check finds. A nonlinear map has no
single answer for a direction: it transports between points, and the result's origin names them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Space, arrow, require_same_space
from xmodel_steer.core.tables import html_table
from xmodel_steer.core.vectors import Activations, SteeringVector, inverse_of
from xmodel_steer.maps.pairs import PairMoments


@dataclass(frozen=True, eq=False)
class MapScore:
    """Agreement of mapped points with the target's points, on rows that did not fit the map.

    Args:
        r2: R² of each target dimension, 1 - SSE/SST around the mean of the scored rows; NaN
            where the target does not vary.
        cosine: Cosine of mapped and true rows in standardised coordinates (centred, divided by
            the target's standard deviations): ⟨ŷ, y⟩ / √(⟨ŷ, ŷ⟩⟨y, y⟩), summed over rows.
        norm_ratio: √(⟨ŷ, ŷ⟩ / ⟨y, y⟩) in the same coordinates: under 1 the map shrinks.
        count: Number of rows.
        documents: Number of documents that they come from; 0 when unknown.
    """

    r2: Float[Tensor, " dt"]
    cosine: float
    norm_ratio: float
    count: int
    documents: int = 0

    def __repr__(self) -> str:
        return f"MapScore(R² {self.mean_r2:.3f}, cosine {self.cosine:.3f}, norm ratio {self.norm_ratio:.3f}, n = {self.count:,})"

    @property
    def mean_r2(self) -> float:
        """Mean R² over target dimensions that vary; each counts alike, however large it is."""
        return float(self.r2[~self.r2.isnan()].mean())


class Map(ABC):
    """A map from one space to another; see `AffineMap` and `AutoencoderMap`."""

    source: Space
    target: Space
    source_scale: Float[Tensor, " ds"]
    target_scale: Float[Tensor, " dt"]
    score_test: MapScore | None
    info: Mapping[str, Any]

    def __repr__(self) -> str:
        fitter = f", {self.info['fitter']}" if "fitter" in self.info else ""
        score = self.score_test
        held_out = f", held-out R² {score.mean_r2:.2f}, n = {score.count:,}" if score else ""
        return f"{type(self).__name__}({arrow(self.source, self.target)}{fitter}{held_out})"

    def _repr_html_(self) -> str:
        rows = {"source": str(self.source), "target": str(self.target), "fitter": str(self.info.get("fitter", ""))}
        if "penalty" in self.info:
            rows["penalty"] = f"{self.info['penalty']:g}"
        if score := self.score_test:
            rows["held-out R²"] = f"{score.mean_r2:.3f}"
            rows["held-out cosine"] = f"{score.cosine:.3f}"
            rows["held-out rows"] = f"{score.count:,}"
        return html_table(type(self).__name__, rows)

    @abstractmethod
    def points(self, values: Float[Tensor, "... ds"]) -> Float[Tensor, "... dt"]:
        """Map points in float64."""

    @abstractmethod
    def transport(self, vector: SteeringVector) -> SteeringVector:
        """Map a direction."""

    @overload
    def transform(self, points: Activations) -> Activations: ...
    @overload
    def transform(self, points: Tensor) -> Tensor: ...
    def transform(self, points: Activations | Tensor) -> Activations | Tensor:
        """Map points; computed in float64, returned in the input's dtype.

        Args:
            points: Activations of the source space, or a bare tensor ``(..., ds)``.

        Raises:
            SpaceMismatchError: The activations live in another space.
        """
        if isinstance(points, Activations):
            require_same_space(self.source, points.space, "transform")
            return Activations(self.points(points.values).to(points.values.dtype), self.target, points.rows)
        return self.points(points).to(points.dtype)

    def score(self, source: Activations, target: Activations) -> MapScore:
        """Score mapped source rows against the target rows that they pair with.

        Args:
            source: Rows of the source space that did not fit the map.
            target: The paired rows of the target space.

        Raises:
            SpaceMismatchError: Source and target are swapped, or from elsewhere.
            PromptError: The numbers of rows differ, or there are none.
        """
        require_same_space(self.source, source.space, "score (source)")
        require_same_space(self.target, target.space, "score (target)")
        if len(source) != len(target) or not len(source):
            raise PromptError(f"score: needs paired rows, got {len(source)} source and {len(target)} target rows")
        sums = self.error_sums(source.values, target.values, target.mean())
        return score_of(
            *sums, scale=self.target_scale, count=len(source), documents=len({row[0] for row in source.rows})
        )

    def error_sums(
        self, source: Float[Tensor, "n ds"], target: Float[Tensor, "n dt"], centre: Float[Tensor, " dt"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum squared error, ⟨y, y⟩, ⟨ŷ, y⟩ and ⟨ŷ, ŷ⟩ over rows, per dimension.

        y and ŷ are taken around ``centre``.
        """
        truth = target.to(torch.float64)
        mapped, centre = self.points(source).to(truth.device), centre.to(truth.device, torch.float64)
        y, fitted = truth - centre, mapped - centre
        sums = ((mapped - truth) ** 2, y**2, fitted * y, fitted**2)
        return tuple(x.sum(0).cpu() for x in sums)  # type: ignore[return-value]

    def _transported(
        self, vector: SteeringVector, direction: Tensor, positive: Tensor | None, negative: Tensor | None, how: str = ""
    ) -> SteeringVector:
        """Make the mapped vector from its mapped direction and class means."""
        return replace(
            vector,
            direction=direction.cpu().to(vector.direction.dtype),
            space=self.target,
            positive_mean=positive,
            negative_mean=negative,
            scale=self.target_scale,
            origin=f"{vector.origin or 'vector'}, transported from {vector.space}{how}",
        )


@dataclass(frozen=True, eq=False, repr=False)
class AffineMap(Map):
    """An affine map between two spaces: y = x W + b.

    Args:
        weight: W, one row per source dimension.
        bias: b.
        source: The space that it maps from.
        target: The space that it maps to.
        source_scale: Standard deviation of each source dimension over the training text.
        target_scale: Standard deviation of each target dimension over the training text.
        score_test: Score on documents that neither fitted the map nor chose its penalty.
        info: How it was fitted (fitter, penalty, rows, coverage, ...).
    """

    weight: Float[Tensor, "ds dt"]
    bias: Float[Tensor, " dt"]
    source: Space
    target: Space
    source_scale: Float[Tensor, " ds"]
    target_scale: Float[Tensor, " dt"]
    score_test: MapScore | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.shape != (self.source.width, self.target.width):
            raise ValueError(
                f"AffineMap: weight must be ({self.source.width}, {self.target.width}) from {self.source} to "
                f"{self.target}, got {tuple(self.weight.shape)}"
            )

    def points(self, values: Float[Tensor, "... ds"]) -> Float[Tensor, "... dt"]:
        """Map points in float64: x W + b."""
        wide = values.to(torch.float64) @ self.weight.to(values.device, torch.float64)
        return wide + self.bias.to(values.device, torch.float64)

    def transport(self, vector: SteeringVector) -> SteeringVector:
        """Map a direction to v W, without the bias.

        A difference of two points has no bias: f(h₊) - f(h₋) = (h₊ - h₋) W. The class means are
        points, and are mapped with the bias.

        Raises:
            SpaceMismatchError: The vector lives in another space.
        """
        require_same_space(self.source, vector.space, "transport")
        wide = vector.direction.to(torch.float64).cpu() @ self.weight.to(torch.float64)

        def mean(point: Tensor | None) -> Tensor | None:
            return None if point is None else self.transform(point.cpu())

        return self._transported(vector, wide, mean(vector.positive_mean), mean(vector.negative_mean))

    def score_moments(self, moments: PairMoments) -> MapScore:
        """Score the map from the moments of held-out rows.

        With centred scatters S, C, T and r the mean residual:
        SSE = diag(T) - 2 diag(WᵀC) + diag(WᵀSW) + n r².
        """
        sse, agreed, fitted = self._errors(moments)
        sst = moments.target_scatter.diagonal()
        count, documents = moments.count, moments.documents
        return score_of(sse, sst, agreed, fitted, scale=self.target_scale, count=count, documents=documents)

    def standardised_loss(self, moments: PairMoments) -> float:
        """Compute the mean squared error over rows and dimensions, in units of training variance."""
        return loss_of(self._errors(moments)[0], self.target_scale, moments.count)

    def then(self, other: "AffineMap") -> "AffineMap":
        """Compose this map with a map from its target space.

        Raises:
            SpaceMismatchError: The other map's source is not this map's target.
        """
        require_same_space(other.source, self.target, "then")
        weight, bias = self.weight.to(torch.float64), self.bias.to(torch.float64)
        onward = other.weight.to(torch.float64)
        return AffineMap(
            weight @ onward,
            bias @ onward + other.bias,
            self.source,
            other.target,
            self.source_scale,
            other.target_scale,
            info={"fitter": f"{self.info.get('fitter', 'map')} then {other.info.get('fitter', 'map')}"},
        )

    def _errors(self, moments: PairMoments) -> tuple[Tensor, Tensor, Tensor]:
        """Compute squared error, ⟨ŷ, y⟩ and ⟨ŷ, ŷ⟩ per dimension, around y's mean."""
        weight = self.weight.to(torch.float64)
        shift = moments.source_mean @ weight + self.bias.to(torch.float64) - moments.target_mean
        fitted = einsum(weight, moments.source_scatter @ weight, "s t, s t -> t")
        agreed = einsum(weight, moments.cross_scatter, "s t, s t -> t")
        total = moments.target_scatter.diagonal()
        offset = moments.count * shift**2
        return total - 2 * agreed + fitted + offset, agreed, fitted + offset


def loss_of(sse: Float[Tensor, " dt"], scale: Float[Tensor, " dt"], count: int) -> float:
    """Compute the mean squared error over rows and dimensions, in units of training variance."""
    precision = inverse_of(scale) ** 2
    return float((sse * precision).sum() / ((precision > 0).sum() * count))


def score_of(
    sse: Tensor, sst: Tensor, dot: Tensor, fitted: Tensor, *, scale: Tensor, count: int, documents: int
) -> MapScore:
    """Compute the score from sums over rows; see `Map.error_sums`."""
    varies = sst > 0
    r2 = torch.where(varies, 1 - sse / torch.where(varies, sst, 1.0), torch.nan)
    precision = inverse_of(scale) ** 2
    truth, mapped, agreed = ((x * precision).sum() for x in (sst, fitted, dot))
    return MapScore(
        r2=r2,
        cosine=float(agreed / (truth * mapped).sqrt()) if truth * mapped > 0 else 0.0,
        norm_ratio=float((mapped / truth).sqrt()) if truth > 0 else 0.0,
        count=count,
        documents=documents,
    )

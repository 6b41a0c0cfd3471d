"""Maps from one model's space to another's, fitted in closed form on streamed moments.

A fitter is a frozen value with ``fit(moments.pair(source, target)) -> map``; it never changes
itself. Points and directions map differently: ``transform`` is ``xW + b``, ``transport`` is
``vW``: a bias added to a direction is a mistake that no shape check finds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.errors import PromptError
from xmodel_steer.moments import PairMoments, SplitMoments
from xmodel_steer.spaces import Space, require_same_space
from xmodel_steer.vectors import Activations, SteeringVector, standardise

PENALTIES = tuple(10.0**k for k in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@dataclass(frozen=True, eq=False)
class MapScore:
    """How well mapped points agree with the target's own, on rows the map was not fitted on.

    Args:
        r2: R² of each target dimension, 1 - SSE/SST around the mean of the scored rows; NaN
            where the target does not vary.
        cosine: Cosine of mapped and true rows in standardised coordinates (centred, divided by
            the target's standard deviations): ⟨ŷ, y⟩ / √(⟨ŷ, ŷ⟩⟨y, y⟩), summed over rows.
        norm_ratio: √(⟨ŷ, ŷ⟩ / ⟨y, y⟩) in the same coordinates: under 1 the map shrinks.
        count: Number of rows.
        documents: Number of documents that they come from; 0 when that is not known.
    """

    r2: Float[Tensor, " dt"]
    cosine: float
    norm_ratio: float
    count: int
    documents: int = 0

    @property
    def mean_r2(self) -> float:
        """Mean R² over target dimensions that vary: each counts alike, however large it is."""
        return float(self.r2[~self.r2.isnan()].mean())


@dataclass(frozen=True, eq=False)
class AffineMap:
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

    @overload
    def transform(self, points: Activations) -> Activations: ...
    @overload
    def transform(self, points: Tensor) -> Tensor: ...
    def transform(self, points: Activations | Tensor) -> Activations | Tensor:
        """Map points: x W + b, computed in float64, returned in the input's dtype.

        Args:
            points: Activations of the source space, or a bare tensor ``(..., ds)`` of them.

        Raises:
            SpaceMismatchError: The activations live in another space.
        """
        if isinstance(points, Activations):
            require_same_space(self.source, points.space, "transform")
            return Activations(self._points(points.values), self.target, points.rows)
        return self._points(points)

    def _points(self, values: Tensor) -> Tensor:
        wide = values.to(torch.float64) @ self.weight.to(values.device, torch.float64)
        return (wide + self.bias.to(values.device, torch.float64)).to(values.dtype)

    def transport(self, vector: SteeringVector) -> SteeringVector:
        """Map a direction: v W, without the bias; its class means, being points, with it.

        A difference of two points has no place for a bias: f(h₊) - f(h₋) = (h₊ - h₋) W.

        Raises:
            SpaceMismatchError: The vector lives in another space.
        """
        require_same_space(self.source, vector.space, "transport")
        wide = vector.direction.to(torch.float64).cpu() @ self.weight.to(torch.float64)

        def mean(point: Tensor | None) -> Tensor | None:
            return None if point is None else self._points(point.cpu())

        return SteeringVector(
            direction=wide.to(vector.direction.dtype),
            space=self.target,
            label=vector.label,
            positive_mean=mean(vector.positive_mean),
            negative_mean=mean(vector.negative_mean),
            counts=vector.counts,
            scale=self.target_scale,
            origin=f"{vector.origin or 'vector'}, transported from {vector.space}",
        )

    def score(self, source: Activations, target: Activations) -> MapScore:
        """Agreement of mapped source rows with the target rows that they pair with.

        Args:
            source: Rows of the source space, not those that the map was fitted on.
            target: The paired rows of the target space.

        Raises:
            SpaceMismatchError: Source and target are swapped, or from elsewhere.
            PromptError: The numbers of rows differ, or there are none.
        """
        require_same_space(self.source, source.space, "score (source)")
        require_same_space(self.target, target.space, "score (target)")
        if len(source) != len(target) or not len(source):
            raise PromptError(f"score: needs paired rows, got {len(source)} source and {len(target)} target rows")
        mapped = source.values.to(torch.float64) @ self.weight.to(source.values.device, torch.float64) + self.bias.to(
            source.values.device, torch.float64
        )
        truth = target.values.to(torch.float64)
        centre = truth.mean(0)
        return _score(
            sse=((mapped - truth) ** 2).sum(0).cpu(),
            sst=((truth - centre) ** 2).sum(0).cpu(),
            dot=((mapped - centre) * (truth - centre)).sum(0).cpu(),
            own=((mapped - centre) ** 2).sum(0).cpu(),
            scale=self.target_scale,
            count=len(source),
            documents=len({row[0] for row in source.rows}),
        )

    def score_moments(self, moments: PairMoments) -> MapScore:
        """The same score from moments of held-out rows, without the rows.

        With centred scatters S, C, T and r the mean residual:
        SSE = diag(T) - 2 diag(WᵀC) + diag(WᵀSW) + n r².
        """
        sse, agreed, own = self._errors(moments)
        return _score(
            sse=sse,
            sst=moments.target_scatter.diagonal(),
            dot=agreed,
            own=own,
            scale=self.target_scale,
            count=moments.count,
            documents=moments.documents,
        )

    def standardised_loss(self, moments: PairMoments) -> float:
        """Mean squared error over rows and target dimensions, each in units of its training variance."""
        precision = standardise(torch.ones_like(self.target_scale), self.target_scale) ** 2
        return float((self._errors(moments)[0] * precision).sum() / ((precision > 0).sum() * moments.count))

    def _errors(self, moments: PairMoments) -> tuple[Tensor, Tensor, Tensor]:
        """Per target dimension: squared error, ⟨ŷ, y⟩ and ⟨ŷ, ŷ⟩ around the mean of y."""
        weight = self.weight.to(torch.float64)
        shift = moments.source_mean @ weight + self.bias.to(torch.float64) - moments.target_mean
        fitted = einsum(weight, moments.source_scatter @ weight, "s t, s t -> t")
        agreed = einsum(weight, moments.cross_scatter, "s t, s t -> t")
        total = moments.target_scatter.diagonal()
        offset = moments.count * shift**2
        return total - 2 * agreed + fitted + offset, agreed, fitted + offset


def _score(
    *, sse: Tensor, sst: Tensor, dot: Tensor, own: Tensor, scale: Tensor, count: int, documents: int
) -> MapScore:
    varies = sst > 0
    r2 = torch.where(varies, 1 - sse / torch.where(varies, sst, 1.0), torch.nan)
    precision = standardise(torch.ones_like(scale), scale) ** 2
    truth, mapped, agreed = ((x * precision).sum() for x in (sst, own, dot))
    return MapScore(
        r2=r2,
        cosine=float(agreed / (truth * mapped).sqrt()) if truth * mapped > 0 else 0.0,
        norm_ratio=float((mapped / truth).sqrt()) if truth > 0 else 0.0,
        count=count,
        documents=documents,
    )


@dataclass(frozen=True)
class Ridge:
    """Least squares with a penalty scaled by each source dimension's variance.

    Minimises ``Σ |y - xW - b|² + n λ Σ_i σ_i² |W_i|²``: ridge regression on standardised
    source dimensions (Hoerl & Kennard 1970), so that λ has no unit and means the same for a
    huge dimension and for a small one. Every λ is tried from one eigendecomposition; the one
    with the best mean R² per target dimension on the validation documents is kept.

    Args:
        penalties: The λ to choose from; a single one is taken as it is.

    Example:
        >>> Ridge(penalties=(1e-2,)).penalties
        (0.01,)
    """

    penalties: Sequence[float] = PENALTIES

    def __post_init__(self) -> None:
        if not self.penalties or any(not p >= 0 for p in self.penalties):
            raise ValueError(f"Ridge: penalties must be numbers of 0 or more, got {tuple(self.penalties)}")

    def fit(self, moments: SplitMoments) -> AffineMap:
        """Fit on the train documents, choose λ on the validation ones, score on the test ones.

        Args:
            moments: Moments of one layer pair.

        Raises:
            PromptError: A part that is needed has too few rows.
        """
        train = moments.train
        require_rows(moments, validation=len(self.penalties) > 1)
        inverse = standardise(torch.ones_like(train.source_scale), train.source_scale)
        correlation = inverse[:, None] * train.source_scatter * inverse / train.count
        values, vectors = torch.linalg.eigh(correlation)
        values = values.clamp(min=0)  # rounding makes zero eigenvalues slightly negative
        projected = vectors.T @ (inverse[:, None] * train.cross_scatter / train.count)

        def solution(penalty: float) -> AffineMap:
            # Directions that the text does not span (constant dimensions, fewer rows than
            # dimensions) get no weight, also at penalty 0: the minimum-norm solution.
            spanned = values > values.max() * 1e-12
            gain = torch.where(spanned, 1.0 / torch.where(spanned, values + penalty, 1.0), 0.0)
            weight = inverse[:, None] * (vectors @ (gain[:, None] * projected))
            bias = train.target_mean - train.source_mean @ weight
            return AffineMap(
                weight,
                bias,
                moments.source,
                moments.target,
                train.source_scale,
                train.target_scale,
            )

        path: list[tuple[float, float | None]] = []
        best: tuple[float, AffineMap, float] | None = None
        for penalty in self.penalties:
            candidate = solution(penalty)
            quality = candidate.score_moments(moments.validation).mean_r2 if moments.validation.count else None
            path.append((penalty, quality))
            if best is None or (quality is not None and quality > best[0]):
                best = (quality if quality is not None else 0.0, candidate, penalty)
        assert best is not None
        _, chosen, penalty = best
        info = {
            "fitter": "Ridge",
            "penalty": penalty,
            "penalty_path": [{"penalty": p, "validation_r2": q} for p, q in path],
            "train_rows": train.count,
            "train_documents": train.documents,
            "coverage": moments.coverage,
            "shuffled_pairs": moments.shuffled,
            # Squared error per target dimension, in units of its variance over the training text.
            "loss": {
                name: chosen.standardised_loss(part)
                for name, part in (("train", train), ("validation", moments.validation), ("test", moments.test))
                if part.count
            },
        }
        tested = chosen.score_moments(moments.test) if moments.test.count else None
        return replace(chosen, score_test=tested, info=info)


def require_rows(moments: SplitMoments, *, validation: bool) -> None:
    """Refuse moments that a fit cannot be trusted on.

    Raises:
        PromptError: A part that is needed has too few rows.
    """
    if moments.train.count < 2:
        raise PromptError(
            f"fit: {moments.train.count} training rows; give more text (a map between these widths wants "
            f"about {10 * max(moments.source.width, moments.target.width)} tokens)"
        )
    if validation and moments.validation.count < 2:
        raise PromptError(
            "fit: no validation document to choose the penalty on; give more documents "
            "(a tenth of them validates), or a single penalty: Ridge(penalties=(0.01,))"
        )

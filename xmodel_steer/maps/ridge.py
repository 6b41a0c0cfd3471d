"""Ridge regression and its low-rank form, for every penalty from one decomposition."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.fitting import PENALTIES, affine_of, as_moments, require_rows, scored
from xmodel_steer.maps.pairs import PairMoments, SplitMoments
from xmodel_steer.maps.rows import PairedRows


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigendecomposition of a source's correlations; each penalty's ridge then costs one product.

    Args:
        values: Eigenvalues of the correlation matrix.
        vectors: Its eigenvectors, in columns.
        inverse: 1 / σ of each source dimension.
        count: Number of rows.
    """

    values: Float[Tensor, " ds"]
    vectors: Float[Tensor, "ds ds"]
    inverse: Float[Tensor, " ds"]
    count: int

    @classmethod
    def of(cls, scatter: Float[Tensor, "ds ds"], scale: Float[Tensor, " ds"], count: int) -> "Spectrum":
        """Decompose the scatter of training rows."""
        inverse = inverse_of(scale)
        values, vectors = torch.linalg.eigh(inverse[:, None] * scatter * inverse / count)
        return cls(values.clamp(min=0), vectors, inverse, count)  # rounding makes zeros slightly negative

    def project(self, cross: Float[Tensor, "ds k"]) -> Float[Tensor, "ds k"]:
        """Project a cross scatter, divided by the number of rows, on the eigenvectors."""
        return self.vectors.T @ (self.inverse[:, None] * cross / self.count)

    def gains(self, penalty: float) -> Float[Tensor, " ds"]:
        """Compute 1 / (eigenvalue + λ), 0 where the text spans nothing.

        Such directions come from constant dimensions or from fewer rows than dimensions. The 0 holds
        without a penalty too: it gives the minimum-norm solution.
        """
        spanned = self.values > self.values.max() * 1e-12
        return torch.where(spanned, 1.0 / torch.where(spanned, self.values + penalty, 1.0), 0.0)

    def weight(self, coefficients: Float[Tensor, "ds k"]) -> Float[Tensor, "ds k"]:
        """Turn coefficients of the eigenvectors into weights of the source's dimensions."""
        return self.inverse[:, None] * (self.vectors @ coefficients)


class _Penalised(ABC):
    """A fitter that chooses its penalty on validation documents."""

    penalties: Sequence[float]

    def __post_init__(self) -> None:
        if not self.penalties or any(not p >= 0 for p in self.penalties):
            raise ValueError(
                f"{type(self).__name__}: penalties must be numbers of 0 or more, got {tuple(self.penalties)}"
            )

    @abstractmethod
    def _coefficients(self, spectrum: Spectrum, projected: Tensor, penalty: float, train: PairMoments) -> Tensor:
        """Solve for the coefficients of the eigenvectors, from the projected cross scatter."""

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Fit on train documents, choose λ on validation documents, score on test documents.

        Args:
            data: Moments or rows of one layer pair.

        Raises:
            PromptError: A part that is needed has too few rows.
        """
        moments = as_moments(data)
        require_rows(moments, validation=len(self.penalties) > 1)
        train = moments.train
        spectrum = Spectrum.of(train.source_scatter, train.source_scale, train.count)
        projected = spectrum.project(train.cross_scatter)
        path: list[dict[str, float | None]] = []  # every penalty with its validation R²
        best: tuple[float, AffineMap, float] | None = None
        for penalty in self.penalties:
            candidate = affine_of(moments, spectrum.weight(self._coefficients(spectrum, projected, penalty, train)))
            quality = candidate.score_moments(moments.validation).mean_r2 if moments.validation.count else None
            path.append({"penalty": penalty, "validation_r2": quality})
            if best is None or (quality is not None and quality > best[0]):
                best = (quality if quality is not None else 0.0, candidate, penalty)
        assert best is not None
        record = {"penalty": best[2], "penalty_path": path}
        record |= {name: value for name, value in vars(self).items() if name != "penalties"}
        return scored(best[1], moments, type(self).__name__, "penalty in standardised source dimensions", **record)


@dataclass(frozen=True)
class Ridge(_Penalised):
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

    def _coefficients(self, spectrum: Spectrum, projected: Tensor, penalty: float, train: PairMoments) -> Tensor:
        return spectrum.gains(penalty)[:, None] * projected


@dataclass(frozen=True)
class ReducedRank(_Penalised):
    """Ridge whose fitted values span no more than ``rank`` dimensions.

    Reduced-rank regression (Izenman 1975) with a ridge penalty (Mukherjee & Zhu 2011): the ridge
    solution, projected in standardised target coordinates onto the leading principal directions of
    its penalised fit. The best map of its rank in the least-squares sense.

    Args:
        rank: Largest rank of the map.
        penalties: The λ to choose from, as in `Ridge`.
    """

    rank: int
    penalties: Sequence[float] = PENALTIES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"ReducedRank: rank must be at least 1, got {self.rank}")

    def _coefficients(self, spectrum: Spectrum, projected: Tensor, penalty: float, train: PairMoments) -> Tensor:
        gains = spectrum.gains(penalty)[:, None]
        scale = train.target_scale
        standardised = projected * inverse_of(scale)
        # With (S + λ) diagonal in these coordinates, the penalised fit's covariance is PᵀGP.
        leading = torch.linalg.svd(gains.sqrt() * standardised, full_matrices=False).Vh[: self.rank]
        return gains * (standardised @ leading.T @ leading) * scale

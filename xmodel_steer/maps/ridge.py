"""Fitters of maps: frozen values with ``fit(data) -> map``, which never change themselves.

``data`` is the moments of one layer pair, ``moments.pair(source, target)``, or its `PairedRows`,
whose moments are then taken. Fits see the train documents, choices are made on the validation
documents, and the score that a map carries is that of the test documents.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import FewRowsWarning, PromptError
from xmodel_steer.core.prompts import PromptLike, as_prompts
from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap, Map
from xmodel_steer.maps.moments import PARTS, PairMoments, SplitMoments
from xmodel_steer.maps.rows import PairedRows

PENALTIES = tuple(10.0**k for k in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@runtime_checkable
class Fitter(Protocol):
    """Anything that fits a map."""

    def fit(self, data: Any) -> Map:
        """Fit on the train documents, choose on the validation ones, score on the test ones."""
        ...


def as_moments(data: SplitMoments | PairedRows) -> SplitMoments:
    """The moments of data that may be rows."""
    return data.moments(shuffled=False) if isinstance(data, PairedRows) else data


def fit_record(name: str, moments: SplitMoments, coordinates: str, **more: Any) -> dict[str, Any]:
    """What every map says of how it was fitted."""
    return {
        "fitter": name,
        "coordinates": coordinates,
        **more,
        "train_rows": moments.train.count,
        "train_documents": moments.train.documents,
        "coverage": moments.coverage,
        "shuffled_pairs": moments.shuffled,
    }


def _affine(moments: SplitMoments, weight: Tensor, bias: Tensor | None = None) -> AffineMap:
    """A map with these weights that sends the mean to the mean, unless a bias is given."""
    train = moments.train
    return AffineMap(
        weight,
        train.target_mean - train.source_mean @ weight if bias is None else bias,
        moments.source,
        moments.target,
        train.source_scale,
        train.target_scale,
    )


def _finished(made: AffineMap, moments: SplitMoments, info: dict[str, Any]) -> AffineMap:
    """The map with its losses, in units of the training variance, and its score on test documents."""
    parts = {name: getattr(moments, name) for name in PARTS}
    loss = {name: made.standardised_loss(part) for name, part in parts.items() if part.count}
    tested = made.score_moments(moments.test) if moments.test.count else None
    return replace(made, score_test=tested, info={**info, "loss": loss})


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigendecomposition of a source's correlations: from it every penalty's ridge costs one product.

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
        """A cross scatter in the eigenvectors' coordinates, per row."""
        return self.vectors.T @ (self.inverse[:, None] * cross / self.count)

    def gains(self, penalty: float) -> Float[Tensor, " ds"]:
        """1 / (eigenvalue + λ).

        Directions that the text does not span (constant dimensions, fewer rows than dimensions) get
        0, also without penalty: the minimum-norm solution.
        """
        spanned = self.values > self.values.max() * 1e-12
        return torch.where(spanned, 1.0 / torch.where(spanned, self.values + penalty, 1.0), 0.0)

    def weight(self, coefficients: Float[Tensor, "ds k"]) -> Float[Tensor, "ds k"]:
        """Weights of the source's own dimensions from coefficients of the eigenvectors."""
        return self.inverse[:, None] * (self.vectors @ coefficients)


def _check_penalties(name: str, penalties: Sequence[float]) -> None:
    if not penalties or any(not p >= 0 for p in penalties):
        raise ValueError(f"{name}: penalties must be numbers of 0 or more, got {tuple(penalties)}")


def _chosen_penalty(
    name: str, data: SplitMoments | PairedRows, penalties: Sequence[float], coefficients: Any, **more: Any
) -> AffineMap:
    """The best map of a penalty path, by mean R² per target dimension on the validation documents.

    Args:
        name: The fitter's name.
        data: What to fit on.
        penalties: The path.
        coefficients: Makes coefficients of the eigenvectors from a spectrum, a projected cross
            scatter, a penalty and the training moments.
        more: For the map's record.
    """
    moments = as_moments(data)
    require_rows(moments, validation=len(penalties) > 1)
    train = moments.train
    spectrum = Spectrum.of(train.source_scatter, train.source_scale, train.count)
    projected = spectrum.project(train.cross_scatter)
    path: list[tuple[float, float | None]] = []
    best: tuple[float, AffineMap, float] | None = None
    for penalty in penalties:
        candidate = _affine(moments, spectrum.weight(coefficients(spectrum, projected, penalty, train)))
        quality = candidate.score_moments(moments.validation).mean_r2 if moments.validation.count else None
        path.append((penalty, quality))
        if best is None or (quality is not None and quality > best[0]):
            best = (quality if quality is not None else 0.0, candidate, penalty)
    assert best is not None
    info = fit_record(
        name,
        moments,
        "penalty in standardised source dimensions",
        penalty=best[2],
        penalty_path=[{"penalty": p, "validation_r2": q} for p, q in path],
        **more,
    )
    return _finished(best[1], moments, info)


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
        _check_penalties("Ridge", self.penalties)

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Fit on the train documents, choose λ on the validation ones, score on the test ones.

        Args:
            data: Moments or rows of one layer pair.

        Raises:
            PromptError: A part that is needed has too few rows.
        """

        def coefficients(spectrum: Spectrum, projected: Tensor, penalty: float, train: PairMoments) -> Tensor:
            return spectrum.gains(penalty)[:, None] * projected

        return _chosen_penalty("Ridge", data, self.penalties, coefficients)


@dataclass(frozen=True)
class ReducedRank:
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
        _check_penalties("ReducedRank", self.penalties)
        if self.rank < 1:
            raise ValueError(f"ReducedRank: rank must be at least 1, got {self.rank}")

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Fit on the train documents, choose λ on the validation ones, score on the test ones.

        Args:
            data: Moments or rows of one layer pair.

        Raises:
            PromptError: A part that is needed has too few rows.
        """

        def coefficients(spectrum: Spectrum, projected: Tensor, penalty: float, train: PairMoments) -> Tensor:
            gains = spectrum.gains(penalty)[:, None]
            scale = train.target_scale
            standardised = projected * inverse_of(scale)
            # With (S + λ) diagonal in these coordinates, the penalised fit's covariance is PᵀGP.
            leading = torch.linalg.svd(gains.sqrt() * standardised, full_matrices=False).Vh[: self.rank]
            return gains * (standardised @ leading.T @ leading) * scale

        return _chosen_penalty("ReducedRank", data, self.penalties, coefficients, rank=self.rank)


@dataclass(frozen=True)
class Procrustes:
    """The rotation, with one scale, that brings the source closest to the target.

    Minimises ``Σ |y - s x Q|²`` over Q with orthonormal rows (or columns, where the target is the
    narrower one) and a number s (Schönemann 1966; Schönemann & Carroll 1970): with the singular
    value decomposition ``xᵀy = U Σ Vᵀ``, ``Q = U Vᵀ`` and ``s = tr Σ / tr(Qᵀ xᵀx Q)``.

    Args:
        standardise: Work in standardised coordinates of both ends, and undo it on the way out; else
            the few hugest dimensions decide the rotation.
        centre: Subtract the means, and send the mean to the mean.
        scale: Fit s; else it is 1.
    """

    standardise: bool = True
    centre: bool = True
    scale: bool = True

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Fit on the train documents, score on the test ones; nothing is chosen.

        Args:
            data: Moments or rows of one layer pair.

        Raises:
            PromptError: There are too few training rows.
        """
        moments = as_moments(data)
        require_rows(moments, validation=False)
        train = moments.train
        own, cross = train.source_scatter, train.cross_scatter
        if not self.centre:
            own = own + train.count * torch.outer(train.source_mean, train.source_mean)
            cross = cross + train.count * torch.outer(train.source_mean, train.target_mean)
        into, out = torch.ones_like(train.source_mean), torch.ones_like(train.target_mean)
        if self.standardise:
            into, out = inverse_of(train.source_scale), train.target_scale
        target_in = inverse_of(out) if self.standardise else out
        u, values, vh = torch.linalg.svd(into[:, None] * cross * target_in, full_matrices=False)
        related = values > values.max() * 1e-12  # elsewhere (constant dimensions) no rotation is better than another
        rotation = u[:, related] @ vh[related]
        fitted = torch.einsum("st,st->", rotation, (into[:, None] * own * into) @ rotation)
        size = float(values.sum() / fitted) if self.scale and fitted > 0 else 1.0
        weight = into[:, None] * rotation * size * out
        bias = None if self.centre else torch.zeros_like(train.target_mean)
        coordinates = "standardised" if self.standardise else "raw"
        info = fit_record("Procrustes", moments, coordinates, size=size, centred=self.centre)
        return _finished(_affine(moments, weight, bias), moments, info)


@dataclass(frozen=True)
class Identity:
    """No map: the same numbers, cut short or filled up with zeros where the widths differ.

    What transfers under it needed no map, as between a model and its own fine-tune.
    """

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Score on the test documents; nothing is fitted.

        Args:
            data: Moments or rows of one layer pair.
        """
        moments = as_moments(data)
        weight = torch.eye(moments.source.width, moments.target.width, dtype=torch.float64)
        made = _affine(moments, weight, torch.zeros(moments.target.width, dtype=torch.float64))
        return _finished(made, moments, fit_record("Identity", moments, "raw"))


@dataclass(frozen=True)
class RandomMap:
    """A control: a random map that has the means and the standard deviations of both ends right.

    Gaussian weights in standardised coordinates, so that mapped points are as large as the target's.

    Args:
        seed: Seed of the draw.
    """

    seed: int = 0

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Draw the weights, and score them on the test documents.

        Args:
            data: Moments or rows of one layer pair.

        Raises:
            PromptError: There are too few training rows.
        """
        moments = as_moments(data)
        require_rows(moments, validation=False)
        train = moments.train
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(train.cross_scatter.shape, generator=generator, dtype=torch.float64)
        inverse = inverse_of(train.source_scale)
        weight = inverse[:, None] * draw * train.target_scale / (inverse > 0).sum() ** 0.5
        info = fit_record("RandomMap", moments, "standardised", seed=self.seed)
        return _finished(_affine(moments, weight), moments, info)


@dataclass(frozen=True)
class RelativeAnchors:
    """A point is described by its products with anchor texts, and rebuilt from the other model's anchors.

    No map is learned: anchors are texts whose mean activations a_s, a_t are known in both models. In
    standardised coordinates, with anchors of unit norm in the rows of A, ``y = x A_sᵀ pinv(A_t)ᵀ``
    (relative representations, Moschella et al. 2023, and their inverse, Maiorca et al. 2024).

    Args:
        texts: The anchor texts, which must be among the training documents; or how many of these to take, at most.
        tolerance: Singular values of A_t under this share of the largest are dropped: few anchors point in
            few directions, and what they hardly span would be blown up.
        seed: Seed of their choice.
    """

    texts: int | tuple[PromptLike, ...] = 300
    tolerance: float = 0.2
    seed: int = 0

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Take the anchors from the training documents, score on the test ones.

        Args:
            data: Rows of one layer pair; moments do not know texts apart.

        Raises:
            PromptError: Moments were given, there are too few documents, or an anchor text is none of them.
        """
        if not isinstance(data, PairedRows):
            raise PromptError("RelativeAnchors: needs the rows of single texts, not moments; give store.pair(...)")
        moments = as_moments(data)
        require_rows(moments, validation=False)
        documents = data.part("train")
        chosen = self._chosen([document.prompt for document in documents])
        means = [tuple(side.to(torch.float64).mean(0).cpu() for side in documents[i].load()) for i in chosen]
        train = moments.train
        into, back = inverse_of(train.source_scale), inverse_of(train.target_scale)

        def unit(end: int, mean: Tensor, inverse: Tensor) -> Tensor:
            rows = (torch.stack([pair[end] for pair in means]) - mean) * inverse
            return torch.nn.functional.normalize(rows, dim=-1)

        source, target = unit(0, train.source_mean, into), unit(1, train.target_mean, back)
        rebuilt = torch.linalg.pinv(target, rtol=self.tolerance)
        weight = into[:, None] * (source.T @ rebuilt.T) * train.target_scale
        info = fit_record("RelativeAnchors", moments, "standardised", anchors=len(chosen))
        return _finished(_affine(moments, weight), moments, info)

    def _chosen(self, prompts: Sequence[str]) -> list[int]:
        """The places of the anchors among the training documents."""
        if isinstance(self.texts, int):
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randperm(len(prompts), generator=generator)[: self.texts].tolist()
        at = {prompt: i for i, prompt in enumerate(prompts)}
        anchors = as_prompts(self.texts)
        missing = [anchor.content[:60] for anchor in anchors if anchor.id not in at]
        if missing or not anchors:
            raise PromptError(
                f"RelativeAnchors: {len(missing)} of {len(anchors)} anchor texts are not among the {len(prompts)} training documents "
                f"of the rows{f', such as {missing[0]!r}' if missing else ''}; harvest them with the other texts (part_of says "
                "which part a text falls into)"
            )
        return [at[anchor.id] for anchor in anchors]


@dataclass(frozen=True)
class ShuffledPairs:
    """A control: another fitter, fitted where every row is paired with a token of another document.

    Means, variances and the number of rows stay what they were; only the relation is gone. What still
    "transfers" is no transfer.

    Args:
        fitter: The fitter.
    """

    fitter: Fitter

    def fit(self, data: SplitMoments | PairedRows) -> Map:
        """Fit on shuffled pairs.

        Args:
            data: Moments or rows of one layer pair.

        Raises:
            PromptError: The moments were collected without the control.
        """
        if isinstance(data, PairedRows):
            return self.fitter.fit(data.shuffle())
        if data.control is None:
            raise PromptError("ShuffledPairs: the moments were collected without the control; use shuffled=True")
        return self.fitter.fit(data.control)


Kind = TypeVar("Kind", bound=Fitter)


def pinned(fitter: Kind, fitted: Map) -> Kind:
    """The fitter with the penalty that was chosen for a map, so that a control differs in its pairs alone."""
    if "penalty" in fitted.info and isinstance(fitter, Ridge | ReducedRank):
        return replace(fitter, penalties=(float(fitted.info["penalty"]),))  # type: ignore[return-value]
    return fitter


def require_rows(moments: SplitMoments, *, validation: bool) -> None:
    """Refuse moments that nothing can be fitted on, and warn of those that a fit cannot be trusted on.

    Raises:
        PromptError: A part that is needed has too few rows.
    """
    wanted = 10 * max(moments.source.width, moments.target.width)
    if moments.train.count < 2:
        raise PromptError(
            f"fit: {moments.train.count} training rows; give more text (a map between these widths wants "
            f"about {wanted} tokens)"
        )
    if moments.train.count <= moments.source.width:
        warnings.warn(
            f"fit: {moments.train.count} training rows for {moments.source.width} source dimensions: the penalty, not the "
            f"text, decides the map; give more text (about {wanted} tokens)",
            FewRowsWarning,
            stacklevel=4,
        )
    if validation and moments.validation.count < 2:
        raise PromptError(
            "fit: no validation document to choose the penalty on; give more documents "
            "(a tenth of them validates), or a single penalty: Ridge(penalties=(0.01,))"
        )

"""Orthogonal Procrustes: rotations and reflections."""

from dataclasses import dataclass

import torch

from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.fitting import affine_of, as_moments, require_rows, scored
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.rows import PairedRows


@dataclass(frozen=True)
class Procrustes:
    """The rotation, with one scale, that brings the source closest to the target.

    Minimises ``Σ |y - s x Q|²`` over Q with orthonormal rows (or columns, where the target is the
    narrower one) and a number s (Schönemann 1966; Schönemann & Carroll 1970): with the singular
    value decomposition ``xᵀy = U Σ Vᵀ``, ``Q = U Vᵀ`` and ``s = tr Σ / tr(Qᵀ xᵀx Q)``.

    Args:
        standardise: Rotate in standardised coordinates of both ends. In raw coordinates the few hugest
            dimensions decide the rotation.
        centre: Subtract the means, and send the mean to the mean.
        scale: Fit s, which is 1 otherwise.
    """

    standardise: bool = True
    centre: bool = True
    scale: bool = True

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Fit on train documents, score on test documents; nothing is chosen.

        Args:
            data: Moments or rows of one layer pair.

        Raises:
            PromptError: There are too few training rows.
        """
        moments = as_moments(data)
        require_rows(moments, validation=False)
        train = moments.train
        scatter, cross = train.source_scatter, train.cross_scatter
        if not self.centre:
            scatter = scatter + train.count * torch.outer(train.source_mean, train.source_mean)
            cross = cross + train.count * torch.outer(train.source_mean, train.target_mean)
        into, out = torch.ones_like(train.source_mean), torch.ones_like(train.target_mean)
        if self.standardise:
            into, out = inverse_of(train.source_scale), train.target_scale
        target_in = inverse_of(out) if self.standardise else out
        u, values, vh = torch.linalg.svd(into[:, None] * cross * target_in, full_matrices=False)
        related = values > values.max() * 1e-12  # elsewhere (constant dimensions) no rotation is better than another
        rotation = u[:, related] @ vh[related]
        fitted = torch.einsum("st,st->", rotation, (into[:, None] * scatter * into) @ rotation)
        size = float(values.sum() / fitted) if self.scale and fitted > 0 else 1.0
        weight = into[:, None] * rotation * size * out
        bias = None if self.centre else torch.zeros_like(train.target_mean)
        coordinates = "standardised" if self.standardise else "raw"
        mapping = affine_of(moments, weight, bias)
        return scored(mapping, moments, "Procrustes", coordinates, size=size, centred=self.centre)

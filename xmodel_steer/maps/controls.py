"""Maps that carry nothing, for comparison with fitted maps."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap, Map
from xmodel_steer.maps.fitting import Fitter, affine_of, as_moments, require_rows, scored
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.ridge import ReducedRank, Ridge
from xmodel_steer.maps.rows import PairedRows

AnyFitter = TypeVar("AnyFitter", bound=Fitter)


def pinned(fitter: AnyFitter, fitted: Map) -> AnyFitter:
    """Fix a fitter's penalty to a map's choice, for its control."""
    if "penalty" in fitted.info and isinstance(fitter, Ridge | ReducedRank):
        return replace(fitter, penalties=(float(fitted.info["penalty"]),))  # type: ignore[return-value]
    return fitter


@dataclass(frozen=True)
class Identity:
    """The identity, cut short or padded with zeros where the widths differ.

    A vector that works after it needed no map, as between a model and its fine-tune.
    """

    def fit(self, data: SplitMoments | PairedRows) -> AffineMap:
        """Score on the test documents; nothing is fitted.

        Args:
            data: Moments or rows of one layer pair.
        """
        moments = as_moments(data)
        weight = torch.eye(moments.source.width, moments.target.width, dtype=torch.float64)
        bias = torch.zeros(moments.target.width, dtype=torch.float64)
        return scored(affine_of(moments, weight, bias), moments, "Identity", "raw")


@dataclass(frozen=True)
class RandomMap:
    """A random map that matches the means and the standard deviations of both ends.

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
        return scored(affine_of(moments, weight), moments, "RandomMap", "standardised", seed=self.seed)


@dataclass(frozen=True)
class ShuffledPairs:
    """Another fitter, on rows that are each paired with a token of another document.

    Means, variances and the number of rows stay; only the relation between source and target is lost.
    An effect that remains under this control was not transferred.

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

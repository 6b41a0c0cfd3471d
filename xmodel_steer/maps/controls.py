"""Maps that carry nothing, to compare others with."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.affine import AffineMap, Map
from xmodel_steer.maps.fitting import Fitter, affine_of, as_moments, fit_record, require_rows, with_scores
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.ridge import ReducedRank, Ridge
from xmodel_steer.maps.rows import PairedRows

Kind = TypeVar("Kind", bound=Fitter)


def pinned(fitter: Kind, fitted: Map) -> Kind:
    """Fix the penalty that a map chose, for a control that differs in pairs."""
    if "penalty" in fitted.info and isinstance(fitter, Ridge | ReducedRank):
        return replace(fitter, penalties=(float(fitted.info["penalty"]),))  # type: ignore[return-value]
    return fitter


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
        made = affine_of(moments, weight, torch.zeros(moments.target.width, dtype=torch.float64))
        return with_scores(made, moments, fit_record("Identity", moments, "raw"))


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
        return with_scores(affine_of(moments, weight), moments, info)


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

"""Fitters of maps: frozen values with ``fit(data) -> map``, which never change themselves.

``data`` is the moments of one layer pair, ``moments.pair(source, target)``, or its `PairedRows`,
whose moments are then taken. Fits see the train documents, choices are made on the validation
documents, and the score that a map carries is that of the test documents.
"""

import warnings
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from xmodel_steer.core.errors import FewRowsWarning, PromptError
from xmodel_steer.maps.affine import AffineMap, Map
from xmodel_steer.maps.pairs import PARTS, SplitMoments
from xmodel_steer.maps.rows import PairedRows

PENALTIES = tuple(10.0**k for k in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@runtime_checkable
class Fitter(Protocol):
    """Anything that fits a map."""

    def fit(self, data: Any) -> Map:
        """Fit on the train documents, choose on the validation ones, score on the test ones."""
        ...


def as_moments(data: SplitMoments | PairedRows) -> SplitMoments:
    """Take the moments of data that may be rows."""
    return data.moments(shuffled=False) if isinstance(data, PairedRows) else data


def fit_record(name: str, moments: SplitMoments, coordinates: str, **more: Any) -> dict[str, Any]:
    """Record how a map was fitted."""
    return {
        "fitter": name,
        "coordinates": coordinates,
        **more,
        "train_rows": moments.train.count,
        "train_documents": moments.train.documents,
        "coverage": moments.coverage,
        "shuffled_pairs": moments.shuffled,
    }


def affine_of(moments: SplitMoments, weight: Tensor, bias: Tensor | None = None) -> AffineMap:
    """Make a map with these weights that sends the mean to the mean.

    Unless a bias is given.
    """
    train = moments.train
    return AffineMap(
        weight,
        train.target_mean - train.source_mean @ weight if bias is None else bias,
        moments.source,
        moments.target,
        train.source_scale,
        train.target_scale,
    )


def with_scores(made: AffineMap, moments: SplitMoments, info: dict[str, Any]) -> AffineMap:
    """Add losses and the test score to a map.

    Losses are in units of the training variance.
    """
    parts = {name: getattr(moments, name) for name in PARTS}
    loss = {name: made.standardised_loss(part) for name, part in parts.items() if part.count}
    tested = made.score_moments(moments.test) if moments.test.count else None
    return replace(made, score_test=tested, info={**info, "loss": loss})


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

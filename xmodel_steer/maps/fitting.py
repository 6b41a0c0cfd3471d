"""The protocol of fitters, and steps that they share.

Fitters are frozen values: ``fit(data)`` returns a map and never changes the fitter. ``data`` is the
moments of one layer pair, ``moments.pair(source, target)``, or its `PairedRows`, whose moments are
then taken. Fits see the train documents, choices are made on the validation documents, and a map's
score comes from the test documents.
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
    """A frozen value that fits a map."""

    def fit(self, data: Any) -> Map:
        """Fit on train documents, choose on validation documents, score on test documents."""
        ...


def as_moments(data: SplitMoments | PairedRows) -> SplitMoments:
    """Return moments as they are, and the moments of rows."""
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
    """Make a map from weights; by default, means map to means."""
    train = moments.train
    if bias is None:
        bias = train.target_mean - train.source_mean @ weight
    return AffineMap(weight, bias, moments.source, moments.target, train.source_scale, train.target_scale)


def scored(mapping: AffineMap, moments: SplitMoments, name: str, coordinates: str, **more: Any) -> AffineMap:
    """Add record, losses (in units of training variance) and test score."""
    parts = {part: getattr(moments, part) for part in PARTS}
    loss = {part: mapping.standardised_loss(rows) for part, rows in parts.items() if rows.count}
    tested = mapping.score_moments(moments.test) if moments.test.count else None
    return replace(mapping, score_test=tested, info={**fit_record(name, moments, coordinates, **more), "loss": loss})


def require_rows(moments: SplitMoments, *, validation: bool) -> None:
    """Refuse too few rows, and warn of fewer rows than dimensions.

    Args:
        moments: The moments to fit on.
        validation: Refuse moments without validation rows.

    Raises:
        PromptError: A needed part has too few rows.
    """
    wanted = 10 * max(moments.source.width, moments.target.width)
    rows = f"fit: {moments.train.count} training rows"
    if moments.train.count < 2:
        raise PromptError(f"{rows}; give more text (a map between these widths wants about {wanted} tokens)")
    if moments.train.count <= moments.source.width:
        warnings.warn(
            f"{rows} for {moments.source.width} source dimensions: the penalty, not the text, decides the map; "
            f"give more text (about {wanted} tokens)",
            FewRowsWarning,
            stacklevel=3,
        )
    if validation and moments.validation.count < 2:
        raise PromptError(
            "fit: no validation document to choose the penalty on; give more documents "
            "(a tenth of them validates), or a single penalty: Ridge(penalties=(0.01,))"
        )

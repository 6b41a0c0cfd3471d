"""Moments of one layer pair, and the split of documents into parts."""

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.spaces import Space, arrow

PARTS = ("train", "validation", "test")
PRODUCTS = ("source_scatters", "target_scatters", "cross", "shuffled", "sketch")  # of `PartMoments`


def part_of(content: str, *, seed: int = 0, validation: float = 0.1, test: float = 0.1) -> str:
    """Assign a document to a part by a hash of its content.

    Args:
        content: The document's text; equal texts fall into the same part.
        seed: Seed of the split.
        validation: Share of documents that choose the penalty.
        test: Share of documents that give the reported scores.

    Example:
        >>> part_of("The same text.") == part_of("The same text.")
        True
    """
    digest = hashlib.sha256(f"{seed}\n{content}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if draw < validation else "test" if draw < validation + test else "train"


def deviations(scatter: Float[Tensor, "d d"], mean: Float[Tensor, " d"], count: int) -> Float[Tensor, " d"]:
    """Return the standard deviation of each dimension, exactly 0 for a rounded constant."""
    scale = (scatter.diagonal() / max(count, 1)).clamp(min=0).sqrt()
    rounding = 16 * torch.finfo(torch.float64).eps * mean.abs()
    return torch.where(scale > rounding, scale, 0.0)


@dataclass(frozen=True, eq=False)
class PairMoments:
    """First and second moments of paired rows (s, t), float64.

    Args:
        count: Number of rows, n.
        documents: Number of documents that they come from.
        source_mean: Mean of s.
        target_mean: Mean of t.
        source_scatter: Σ (s - mean)ᵀ(s - mean).
        target_scatter: Σ (t - mean)ᵀ(t - mean).
        cross_scatter: Σ (s - mean)ᵀ(t - mean).
    """

    count: int
    documents: int
    source_mean: Float[Tensor, " ds"]
    target_mean: Float[Tensor, " dt"]
    source_scatter: Float[Tensor, "ds ds"]
    target_scatter: Float[Tensor, "dt dt"]
    cross_scatter: Float[Tensor, "ds dt"]

    def __repr__(self) -> str:
        widths = f"{len(self.source_mean)} → {len(self.target_mean)} dimensions"
        return f"PairMoments({self.count:,} pairs of {self.documents:,} documents, {widths})"

    def inverse(self) -> "PairMoments":
        """Exchange source and target."""
        return PairMoments(
            self.count,
            self.documents,
            self.target_mean,
            self.source_mean,
            self.target_scatter,
            self.source_scatter,
            self.cross_scatter.T,
        )

    @property
    def source_scale(self) -> Float[Tensor, " ds"]:
        """Standard deviation of each source dimension."""
        return deviations(self.source_scatter, self.source_mean, self.count)

    @property
    def target_scale(self) -> Float[Tensor, " dt"]:
        """Standard deviation of each target dimension."""
        return deviations(self.target_scatter, self.target_mean, self.count)


@dataclass(frozen=True, eq=False)
class SplitMoments:
    """Moments of one layer pair for each part of the text, with both spaces.

    Args:
        source: Space of the source rows.
        target: Space of the target rows.
        train: Moments of the documents that fit maps.
        validation: Moments of the documents that choose penalties.
        test: Moments of the documents that give the reported scores.
        coverage: Share of the pairable tokens that pair.
        control: The same moments with every row paired to a token of another document: nothing to
            learn, and everything else equal. None where they were not collected.
        shuffled: Whether these are such control moments.
    """

    source: Space
    target: Space
    train: PairMoments
    validation: PairMoments
    test: PairMoments
    coverage: float
    control: "SplitMoments | None" = None
    shuffled: bool = False

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {getattr(self, name).count:,}" for name in PARTS)
        return f"SplitMoments({arrow(self.source, self.target)}, pairs: {rows}, coverage {self.coverage:.0%})"

    def inverse(self) -> "SplitMoments":
        """Exchange source and target, for maps in the opposite direction."""
        parts = {name: getattr(self, name).inverse() for name in PARTS}
        control = None if self.control is None else self.control.inverse()
        return replace(self, source=self.target, target=self.source, control=control, **parts)

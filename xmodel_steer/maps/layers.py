"""Quality of maps between every source layer and every target layer, and rules to choose a pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Site, SiteLike, Space, as_site
from xmodel_steer.core.tables import html_table
from xmodel_steer.core.vectors import inverse_of
from xmodel_steer.maps.fitting import PENALTIES
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.pairs import PairMoments, SplitMoments
from xmodel_steer.maps.ridge import Spectrum


@dataclass(frozen=True, eq=False)
class LayerGrid:
    """Held-out quality of the ridge map of every layer pair.

    ``validation`` comes from the documents that choose the penalty, in arrays of ``(source sites, target
    sites, penalties)``; ``test`` from documents that choose nothing, at each pair's chosen penalty, in arrays of
    ``(source sites, target sites)``. Both hold:

    * ``r2``: mean R² over target dimensions, each counting alike;
    * ``cosine``: cosine of mapped and true rows in standardised coordinates;
    * ``fvu``: unexplained share of the variance, summed over standardised dimensions (in raw
      coordinates the few hugest dimensions would decide it);
    * ``norm_ratio``: length of the mapped rows over the true ones, standardised; under 1 a map shrinks.

    Args:
        source: The source's spaces, one per row.
        target: The target's spaces, one per column.
        penalties: The penalties.
        validation: Arrays under their names, from validation documents.
        test: Arrays under their names, from test documents.
        cka: Linear CKA (Kornblith et al. 2019) of the test rows in standardised coordinates,
            ``(source sites, target sites)``: likeness of the geometries, without a map.
        sketch: Number of target dimensions in the sketch; 0 where all dimensions were used.
        r2_error: Standard error of ``r2`` on test documents, at the chosen penalty, from the choice of
            the sketch's dimensions; 0 without a sketch.
        counts: Rows and documents of each part.
    """

    source: tuple[Space, ...]
    target: tuple[Space, ...]
    penalties: tuple[float, ...]
    validation: dict[str, np.ndarray] = field(repr=False)
    test: dict[str, np.ndarray] = field(repr=False)
    cka: np.ndarray = field(repr=False)
    sketch: int
    r2_error: np.ndarray = field(repr=False)
    counts: dict[str, tuple[int, int]]

    def __repr__(self) -> str:
        ends = f"{self.source[0].model} → {self.target[0].model}"
        return f"LayerGrid({ends}, {len(self.source)} × {len(self.target)} sites, {len(self.penalties)} penalties)"

    def _repr_html_(self) -> str:
        chosen = self.chosen("r2")
        i, j = np.unravel_index(int(np.nan_to_num(self.chosen("r2", "validation"), nan=-np.inf).argmax()), chosen.shape)
        rows = {
            "source": f"{self.source[0].model}, {len(self.source)} sites",
            "target": f"{self.target[0].model}, {len(self.target)} sites",
            "best pair on validation": f"{self.source[i].site} → {self.target[j].site}, test R² {chosen[i, j]:.3f}",
        }
        return html_table("LayerGrid", rows)

    @property
    def best(self) -> np.ndarray:
        """Index of the penalty with the best validation R² of each pair."""
        return self.validation["r2"].argmax(-1)

    def chosen(self, metric: str, part: str = "test") -> np.ndarray:
        """Return a metric at each pair's chosen penalty, ``(source sites, target sites)``.

        Args:
            metric: ``r2``, ``cosine``, ``fvu``, ``norm_ratio`` or ``cka``.
            part: ``test`` or ``validation``.
        """
        if metric == "cka":
            return self.cka
        if part == "test":
            return self.test[metric]
        values = self.validation[metric]
        return np.take_along_axis(values, self.best[..., None], -1)[..., 0]

    def to_frame(self) -> Any:
        """Make a pandas frame with a row per layer pair, at its chosen penalty."""
        import pandas as pd

        rows = []
        for i, source in enumerate(self.source):
            for j, target in enumerate(self.target):
                row = {
                    "source_layer": source.site.layer,
                    "target_layer": target.site.layer,
                    "penalty": self.penalties[self.best[i, j]],
                    "validation_r2": self.chosen("r2", "validation")[i, j],
                }
                row |= {name: self.chosen(name)[i, j] for name in (*self.test, "cka")}
                row |= {"r2_error": self.r2_error[i, j]}
                row |= {"source_stream": source.site.stream, "target_stream": target.site.stream}
                row |= {"source_site": str(source.site), "target_site": str(target.site)}
                rows.append(row)
        return pd.DataFrame(rows)

    def source_for(
        self, target: SiteLike, *, rule: str = "score", tolerance: float = 0.01, blocks: tuple[int, int] | None = None
    ) -> Site:
        """Choose the source site to map from, without labels of target text.

        Args:
            target: The target site.
            rule: ``"score"``: the deepest source site with a validation R² within ``tolerance`` of the
                best; deep sites have read most of the text. A stack is chosen where no single site
                comes so near. ``"depth"``: the source site at the same relative depth.
            tolerance: Difference of R² that counts as equal.
            blocks: Numbers of blocks of the source and the target, for ``"depth"``; by default the grid's
                deepest sites are the last blocks.

        Raises:
            ValueError: The rule or the site is unknown.
        """
        target, columns = as_site(target), [space.site for space in self.target]
        if target not in columns:
            raise ValueError(f"LayerGrid: {target} is not among the target sites {', '.join(map(str, columns))}")
        if rule == "score":
            quality = np.nan_to_num(self.chosen("r2", "validation")[:, columns.index(target)], nan=-np.inf)
            good = [i for i, q in enumerate(quality) if q >= quality.max() - tolerance]
            return max((self.source[i].site for i in good), key=lambda site: (-len(site.members), site.layer))
        if rule == "depth":
            rows = [space.site for space in self.source]
            source_blocks, target_blocks = blocks or (
                max(site.layer for site in sites) + 1 for sites in (rows, columns)
            )
            depth = (target.layer + 1) / target_blocks
            return min(rows, key=lambda site: abs((site.layer + 1) / source_blocks - depth))
        raise ValueError(f"LayerGrid: rule must be 'score' or 'depth', got {rule!r}")


def last_strong_layer(layers: Sequence[int], success: Sequence[float], *, share: float = 0.8) -> int:
    """Find the last layer before steering success drops sharply (arXiv 2503.04429).

    The last layer of the first run of layers whose success is at least ``share`` of the best. The rule
    needs steering success in the model itself, which for the target means labelled target text.

    Args:
        layers: Layers, ascending.
        success: Steering success at each layer.
        share: Share of the best success that counts as strong.

    Raises:
        ValueError: There are no layers, or steering succeeds at none.

    Example:
        >>> last_strong_layer([0, 4, 7, 13, 14, 15], [0.98, 1.0, 0.99, 0.8, 0.34, 0.0])
        13
    """
    if not layers or len(layers) != len(success) or max(success) <= 0:
        raise ValueError("last_strong_layer: needs layers with their success, at least one above 0")
    strong = [s >= share * max(success) - 1e-12 for s in success]
    first = strong.index(True)
    run = next((i for i in range(first, len(layers)) if not strong[i]), len(layers))
    return layers[run - 1]


def layer_grid(moments: Moments, *, penalties: Sequence[float] = PENALTIES) -> LayerGrid:
    """Score ridge maps of every layer pair and penalty on held-out text.

    One eigendecomposition per source layer serves every target layer and every penalty. Where the
    moments have a sketch, its dimensions replace the target. Ridge fits each target dimension by itself,
    so these dimensions score exactly as they do in the full map.

    Args:
        moments: Moments with full cross moments, or a sketch, of every source and target site.
        penalties: The penalties to try.

    Raises:
        PromptError: A part has too few rows.
        ValueError: Cross moments are missing.
    """
    sources, targets = tuple(moments.source), tuple(moments.target)
    for name, part in moments.parts.items():
        if part.count < 2:
            raise PromptError(
                f"layer_grid: {part.count} rows in the {name} part; give more documents (a tenth of them validates, a tenth tests)"
            )
    pair = moments.sketched if moments.sketch else moments.pair
    validation, test, cka = [], [], []
    for source in sources:
        pairs = [pair(source, target) for target in targets]
        train = pairs[0].train
        spectrum = Spectrum.of(train.source_scatter, train.source_scale, train.count)
        blocks = _Blocks.of(pairs, spectrum)
        gains = torch.stack([spectrum.gains(penalty) for penalty in penalties], 1)
        tried = [blocks.measure("validation", own[:, None] * blocks.train) for own in gains.T]
        validation.append({name: np.stack([one[name] for one in tried], -1) for name in tried[0]})
        best = validation[-1]["r2"].argmax(-1)[blocks.owner]
        test.append(blocks.measure("test", gains[:, best] * blocks.train))
        every = moments.parts["test"].target_scatters
        cka.append([_cka(own, every[t], moments.scale(t)) for own, t in zip(pairs, targets, strict=True)])
    chosen, tested = ({name: np.stack([row[name] for row in rows]) for name in rows[0]} for rows in (validation, test))
    error, _ = tested.pop("r2_error"), chosen.pop("r2_error")
    share = len(moments.sketch) / next(iter(moments.target.values())).width  # drawn without replacement
    return LayerGrid(
        tuple(moments.source.values()),
        tuple(moments.target.values()),
        tuple(penalties),
        chosen,
        tested,
        np.array(cka),
        len(moments.sketch),
        error * (1 - share) ** 0.5 if share else np.zeros_like(error),
        {name: (part.count, part.documents) for name, part in moments.parts.items()},
    )


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A source layer and all target layers, joined, in the coordinates of its eigenvectors.

    Each column is a target dimension; its owner is the number of its target layer.
    """

    train: Float[Tensor, "ds k"]
    owner: Tensor
    pairs: list[SplitMoments]
    doubled: dict[str, Tensor]  # scatters, blocks right of the diagonal twice and those left of it unread
    crosses: dict[str, Tensor]
    shifts: dict[str, Tensor]

    @classmethod
    def of(cls, pairs: list[SplitMoments], spectrum: Spectrum) -> "_Blocks":
        turn = spectrum.inverse[:, None] * spectrum.vectors  # weights are turn @ coefficients
        doubled, crosses, shifts = {}, {}, {}
        for name in ("validation", "test"):
            part = getattr(pairs[0], name)
            doubled[name] = turn.T @ part.source_scatter @ turn
            for rows in _slices(len(turn)):
                doubled[name][rows, rows.stop :] *= 2
            crosses[name] = turn.T @ torch.cat([getattr(p, name).cross_scatter for p in pairs], 1)
            shifts[name] = (part.source_mean - pairs[0].train.source_mean) @ turn
        train = spectrum.project(torch.cat([p.train.cross_scatter for p in pairs], 1))
        owner = torch.cat([torch.full((p.target.width,), j) for j, p in enumerate(pairs)])
        return cls(train, owner, pairs, doubled, crosses, shifts)

    def measure(self, name: str, coefficients: Tensor) -> dict[str, np.ndarray]:
        """Compute each target layer's scores on a part; R² with its error."""

        def joined(value: Callable[[SplitMoments, PairMoments], Tensor]) -> Tensor:
            return torch.cat([value(pair, getattr(pair, name)) for pair in self.pairs])

        def summed(values: Tensor) -> np.ndarray:
            return np.bincount(self.owner, values.numpy(), len(self.pairs))

        moved = self.shifts[name] @ coefficients - joined(lambda pair, part: part.target_mean - pair.train.target_mean)
        mapped = getattr(self.pairs[0], name).count * moved**2
        for rows in _slices(len(coefficients)):
            mapped += (coefficients[rows] * (self.doubled[name][rows, rows.start :] @ coefficients[rows.start :])).sum(
                0
            )
        agreed = (coefficients * self.crosses[name]).sum(0)
        truth = joined(lambda _, part: part.target_scatter.diagonal())
        error, varies = truth - 2 * agreed + mapped, truth > 0
        r2 = torch.where(varies, 1 - error / truth, 0.0)
        precision = joined(lambda pair, _: inverse_of(pair.train.target_scale) ** 2)
        left, total, size, dot = (summed(values * precision) for values in (error, truth, mapped, agreed))
        with np.errstate(all="ignore"):
            count = summed(varies)
            mean = summed(r2) / count
            spread = summed(torch.where(varies, r2 - torch.from_numpy(mean)[self.owner], 0.0) ** 2) / (count - 1)
            return {
                "r2": mean,
                "r2_error": np.sqrt(spread / count),
                "cosine": np.where(total * size > 0, dot / np.sqrt(total * size), 0.0),
                "fvu": np.where(total > 0, left / total, np.nan),
                "norm_ratio": np.where(total > 0, np.sqrt(size / total), 0.0),
            }


def _slices(width: int) -> list[slice]:
    """Part a symmetric matrix into blocks of rows; half of it needs no product."""
    size = max(64, -(-width // 8))
    return [slice(start, start + size) for start in range(0, width, size)]


def _cka(pair: SplitMoments, target_scatter: Tensor, target_scale: Tensor) -> float:
    """Compute linear CKA on the test rows, ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), standardised.

    Args:
        pair: Moments of the pair; the target may be a sketch.
        target_scatter: Test scatter of all target dimensions.
        target_scale: Standard deviations of all target dimensions over the training text.
    """
    times = len(target_scale) / pair.target.width  # for the dimensions that the sketch lacks
    test, train = pair.test, pair.train
    into, out, every = (inverse_of(x) for x in (train.source_scale, train.target_scale, target_scale))
    cross = (into[:, None] * test.cross_scatter * out).square().sum() * times
    norms = (into[:, None] * test.source_scatter * into).norm() * (every[:, None] * target_scatter * every).norm()
    return float(cross / norms) if norms > 0 else 0.0

"""Streamed second moments of paired activations: all that a linear map needs to know of a text.

Memory does not depend on the text's length. Every document belongs wholly to one part (train,
validation or test) by a hash of its content, so that neighbouring tokens never stand on both
sides, and shards may be collected in any order, anywhere, and merged.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.errors import SpaceMismatchError, XModelSteerError
from xmodel_steer.spaces import Site, Space
from xmodel_steer.vectors import check_finite

PARTS = ("train", "validation", "test")


def part_of(content: str, *, seed: int = 0, validation: float = 0.1, test: float = 0.1) -> str:
    """The part that a document belongs to, by a hash of its content.

    Args:
        content: The document's text; equal texts fall into the same part.
        seed: Seed of the split.
        validation: Share of documents that choose the penalty.
        test: Share of documents that the reported scores come from.

    Example:
        >>> part_of("The same text.") == part_of("The same text.")
        True
    """
    digest = hashlib.sha256(f"{seed}\n{content}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if draw < validation else "test" if draw < validation + test else "train"


def deviations(scatter: Float[Tensor, "d d"], mean: Float[Tensor, " d"], count: int) -> Float[Tensor, " d"]:
    """Standard deviation of each dimension; exactly 0 where it is only the rounding of a constant."""
    made = (scatter.diagonal() / max(count, 1)).clamp(min=0).sqrt()
    rounding = 16 * torch.finfo(torch.float64).eps * mean.abs()
    return torch.where(made > rounding, made, 0.0)


@dataclass(frozen=True, eq=False)
class PairMoments:
    """First and second moments of paired rows (s, t), float64.

    Args:
        count: Number of rows, n.
        documents: Number of documents that they come from.
        source_mean: mean of s.
        target_mean: mean of t.
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
    """The moments of one layer pair for each part of the text, with both spaces."""

    source: Space
    target: Space
    train: PairMoments
    validation: PairMoments
    test: PairMoments
    coverage: float
    shuffled: bool = False


@dataclass(frozen=True, eq=False)
class PartMoments:
    """Moments of several sites of two models over the rows of one part."""

    count: int
    documents: int
    source_means: Mapping[Site, Tensor]
    target_means: Mapping[Site, Tensor]
    source_scatters: Mapping[Site, Tensor]
    target_scatters: Mapping[Site, Tensor]
    cross: Mapping[tuple[Site, Site], Tensor]
    shuffled: Mapping[tuple[Site, Site], Tensor]

    def __add__(self, other: "PartMoments") -> "PartMoments":
        """Moments of both sets of rows together (Chan, Golub & LeVeque 1979, pairwise update)."""
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        n = self.count + other.count
        weight = self.count * other.count / n
        ds = {site: other.source_means[site] - mean for site, mean in self.source_means.items()}
        dt = {site: other.target_means[site] - mean for site, mean in self.target_means.items()}

        def means(own: Mapping[Site, Tensor], delta: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
            return {site: mean + delta[site] * (other.count / n) for site, mean in own.items()}

        def crosses(own: Mapping, theirs: Mapping) -> dict:
            return {(s, t): c + theirs[s, t] + weight * torch.outer(ds[s], dt[t]) for (s, t), c in own.items()}

        return PartMoments(
            count=n,
            documents=self.documents + other.documents,
            source_means=means(self.source_means, ds),
            target_means=means(self.target_means, dt),
            source_scatters={
                s: m + other.source_scatters[s] + weight * torch.outer(ds[s], ds[s])
                for s, m in self.source_scatters.items()
            },
            target_scatters={
                t: m + other.target_scatters[t] + weight * torch.outer(dt[t], dt[t])
                for t, m in self.target_scatters.items()
            },
            cross=crosses(self.cross, other.cross),
            shuffled=crosses(self.shuffled, other.shuffled),
        )


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of paired activations of two models for chosen layer pairs, split by document.

    ``a + b`` merges shards of one text, collected anywhere, in any order.

    Args:
        source: Space of each source site.
        target: Space of each target site.
        pairs: The layer pairs whose cross moments are kept.
        parts: Moments of the train, validation and test documents.
        paired: Number of token pairs.
        eligible: How many there could have been.
        settings: How the text was read (token limit, split seed, ...); shards must agree on it.
    """

    source: Mapping[Site, Space]
    target: Mapping[Site, Space]
    pairs: tuple[tuple[Site, Site], ...]
    parts: Mapping[str, PartMoments]
    paired: int
    eligible: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the tokens that could pair that do."""
        return self.paired / self.eligible if self.eligible else 0.0

    @property
    def tokens(self) -> int:
        """Number of paired tokens over all parts."""
        return sum(part.count for part in self.parts.values())

    @property
    def documents(self) -> int:
        """Number of documents over all parts."""
        return sum(part.documents for part in self.parts.values())

    def __add__(self, other: "Moments") -> "Moments":
        for own, theirs, end in ((self.source, other.source, "source"), (self.target, other.target, "target")):
            if dict(own) != dict(theirs):
                raise SpaceMismatchError(
                    f"merging moments: the shards' {end} spaces differ "
                    f"({_names(own)} and {_names(theirs)}); collect every shard with the same models and sites"
                )
        if self.pairs != other.pairs or dict(self.settings) != dict(other.settings):
            raise ValueError(
                f"merging moments: the shards were collected with different layer pairs or settings "
                f"({dict(self.settings)} and {dict(other.settings)}); collect them with the same arguments"
            )
        return replace(
            self,
            parts={name: self.parts[name] + other.parts[name] for name in PARTS},
            paired=self.paired + other.paired,
            eligible=self.eligible + other.eligible,
        )

    def pair(self, source: Site, target: Site, *, shuffled: bool = False) -> SplitMoments:
        """The moments of one layer pair.

        Args:
            source: Site in the source model.
            target: Site in the target model.
            shuffled: Take the cross moments of rows paired with a token of another document:
                the control in which the map has nothing to learn but everything else is equal.

        Raises:
            ValueError: The pair was not collected.
        """
        if (source, target) not in self.pairs:
            raise ValueError(
                f"moments: the pair {source} to {target} was not collected, but "
                f"{', '.join(f'{s} to {t}' for s, t in self.pairs)}"
            )

        def of(part: PartMoments) -> PairMoments:
            return PairMoments(
                part.count,
                part.documents,
                part.source_means[source],
                part.target_means[target],
                part.source_scatters[source],
                part.target_scatters[target],
                (part.shuffled if shuffled else part.cross)[source, target],
            )

        return SplitMoments(
            self.source[source],
            self.target[target],
            *(of(self.parts[name]) for name in PARTS),
            coverage=self.coverage,
            shuffled=shuffled,
        )

    def scale(self, site: Site, *, end: str = "target") -> Float[Tensor, " d"]:
        """Standard deviation of each dimension of a site over the training text.

        Args:
            site: The site.
            end: ``"source"`` or ``"target"``: which of the two models.
        """
        train = self.parts["train"]
        source = end == "source"
        scatters = train.source_scatters if source else train.target_scatters
        means = train.source_means if source else train.target_means
        if site not in scatters:
            raise ValueError(f"moments: {site} of the {end} was not collected, but {', '.join(map(str, scatters))}")
        return deviations(scatters[site], means[site], train.count)


def _names(spaces: Mapping[Site, Space]) -> str:
    return ", ".join(str(space) for space in spaces.values())


class MomentsAccumulator:
    """Adds batches of paired rows to running moments.

    Args:
        source: Space of each source site.
        target: Space of each target site.
        pairs: Layer pairs whose cross moments to keep; every site must be in one.
        settings: Recorded in the moments.
        seed: Seed of the shuffled pairing.
    """

    def __init__(
        self,
        source: Mapping[Site, Space],
        target: Mapping[Site, Space],
        pairs: Sequence[tuple[Site, Site]],
        *,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self._source, self._target, self._pairs = dict(source), dict(target), tuple(pairs)
        self._settings = dict(settings or {})
        self._generator = torch.Generator().manual_seed(seed)
        self._parts = {name: self._zero() for name in PARTS}
        self._paired = self._eligible = 0

    def _zero(self) -> PartMoments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        s = {site: space.width for site, space in self._source.items()}
        t = {site: space.width for site, space in self._target.items()}
        return PartMoments(
            0,
            0,
            {site: zeros(d) for site, d in s.items()},
            {site: zeros(d) for site, d in t.items()},
            {site: zeros(d, d) for site, d in s.items()},
            {site: zeros(d, d) for site, d in t.items()},
            {(a, b): zeros(s[a], t[b]) for a, b in self._pairs},
            {(a, b): zeros(s[a], t[b]) for a, b in self._pairs},
        )

    def add(
        self,
        part: str,
        source: Mapping[Site, Float[Tensor, "n _"]],
        target: Mapping[Site, Float[Tensor, "n _"]],
        documents: Sequence[int],
        *,
        eligible: int | None = None,
    ) -> None:
        """Add paired rows of one part.

        Args:
            part: ``train``, ``validation`` or ``test``.
            source: Rows of each source site.
            target: The rows of each target site that they pair with.
            documents: For each row a number that is its document's, in ascending runs.
            eligible: How many pairs there could have been; the number of rows by default.

        Raises:
            NonFiniteError: A row has NaN or infinity.
        """
        n = len(documents)
        possible = n if eligible is None else eligible
        if n == 0:
            self._eligible += possible
            return

        def centred(rows: Mapping[Site, Tensor], end: str) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
            wide = {site: values.to(torch.float64).cpu() for site, values in rows.items()}
            for site, values in wide.items():
                check_finite(values, f"moments: {end} {site}")
            means = {site: values.mean(0) for site, values in wide.items()}
            return means, {site: values - means[site] for site, values in wide.items()}

        source_means, s = centred(source, "source")
        target_means, t = centred(target, "target")
        other = shuffled_partners(documents, self._generator)
        batch = PartMoments(
            n,
            len(set(documents)),
            source_means,
            target_means,
            {site: x.T @ x for site, x in s.items()},
            {site: y.T @ y for site, y in t.items()},
            {(a, b): s[a].T @ t[b] for a, b in self._pairs},
            {(a, b): s[a][other].T @ t[b] for a, b in self._pairs},
        )
        self._parts[part] = self._parts[part] + batch
        self._paired += n
        self._eligible += possible

    def moments(self) -> Moments:
        """The moments of everything that was added."""
        return Moments(
            self._source,
            self._target,
            self._pairs,
            dict(self._parts),
            self._paired,
            self._eligible,
            self._settings,
        )


def shuffled_partners(documents: Sequence[int], generator: torch.Generator) -> Tensor:
    """For each row, another row to pair it with: a rotation that reaches another document.

    A rotation by more than the longest document's rows, and less than all rows without them, never pairs a row
    with its own document; with too few documents for that, a random permutation is the best there is.

    Args:
        documents: Document number of each row, in contiguous runs.
        generator: Source of randomness.
    """
    n = len(documents)
    _, runs = torch.tensor(list(documents)).unique_consecutive(return_counts=True)
    longest = int(runs.max())
    if n < 2 * longest:
        return torch.randperm(n, generator=generator)
    offset = int(torch.randint(longest, n - longest + 1, (1,), generator=generator))
    return (torch.arange(n) + offset) % n


def merge(shards: Iterable[Moments]) -> Moments:
    """The moments of all shards together.

    Raises:
        XModelSteerError: There are no shards.
    """
    total: Moments | None = None
    for shard in shards:
        total = shard if total is None else total + shard
    if total is None:
        raise XModelSteerError("merging moments: no shards were given")
    return total

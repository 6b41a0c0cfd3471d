"""Streamed second moments of paired activations: all that a linear map needs to know of a text.

Memory does not depend on the text's length. Every document belongs wholly to one part (train,
validation or test) by a hash of its content, so that neighbouring tokens never stand on both
sides, and shards may be collected in any order, anywhere, and merged.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import SpaceMismatchError, XModelSteerError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import check_finite

PARTS = ("train", "validation", "test")
PRODUCTS = ("source_scatters", "target_scatters", "cross", "shuffled", "sketch")  # of `PartMoments`


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

    def inverse(self) -> "PairMoments":
        """The same rows, paired the other way round."""
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
    """The moments of one layer pair for each part of the text, with both spaces.

    Args:
        source: Space that a map of them maps from.
        target: Space that it maps to.
        train: Moments of the documents that maps are fitted on.
        validation: Moments of those that choose penalties.
        test: Moments of those that scores are reported from.
        coverage: Share of the tokens that could pair that do.
        control: The same with every row paired to a token of another document: nothing to learn,
            but everything else equal. None where it was not collected.
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

    def inverse(self) -> "SplitMoments":
        """The same moments for maps from the target to the source."""
        return SplitMoments(
            self.target,
            self.source,
            self.train.inverse(),
            self.validation.inverse(),
            self.test.inverse(),
            self.coverage,
            None if self.control is None else self.control.inverse(),
            self.shuffled,
        )


@dataclass(frozen=True, eq=False)
class PartMoments:
    """Moments of several sites of two models over the rows of one part.

    Args:
        count: Number of rows.
        documents: Number of documents that they come from.
        source_means: Mean at each source site.
        target_means: Mean at each target site.
        source_scatters: Centred second moments within each source site.
        target_scatters: The same within each target site.
        cross: Centred cross moments of the layer pairs that were asked for.
        shuffled: The same of rows paired to other documents.
        sketch: Cross moments of every layer pair with a few of the target's dimensions.
    """

    count: int
    documents: int
    source_means: Mapping[Site, Tensor]
    target_means: Mapping[Site, Tensor]
    source_scatters: Mapping[Site, Tensor]
    target_scatters: Mapping[Site, Tensor]
    cross: Mapping[tuple[Site, Site], Tensor]
    shuffled: Mapping[tuple[Site, Site], Tensor]
    sketch: Mapping[tuple[Site, Site], Tensor]


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of paired activations of two models for chosen layer pairs, split by document.

    ``a + b`` merges shards of one text, collected anywhere, in any order.

    Args:
        source: Space of each source site.
        target: Space of each target site.
        pairs: The layer pairs whose full cross moments are kept.
        sketch: Dimensions of the target, drawn by seed and equal at every target site, whose cross
            moments with every source site are kept for `layer_grid`; empty where all pairs are full.
        parts: Moments of the train, validation and test documents.
        paired: Number of token pairs.
        eligible: How many there could have been.
        settings: How the text was read (token limit, split seed, ...); shards must agree on it.
        shards: Names of the shards that are in it, where shards have names; none may be added twice.
    """

    source: Mapping[Site, Space]
    target: Mapping[Site, Space]
    pairs: tuple[tuple[Site, Site], ...]
    parts: Mapping[str, PartMoments]
    paired: int
    eligible: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    sketch: tuple[int, ...] = ()
    shards: tuple[str, ...] = ()

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
        if (self.pairs, self.sketch) != (other.pairs, other.sketch) or dict(self.settings) != dict(other.settings):
            raise ValueError(
                f"merging moments: the shards were collected with different layer pairs or settings "
                f"({dict(self.settings)} and {dict(other.settings)}); collect them with the same arguments"
            )
        twice = sorted(set(self.shards) & set(other.shards))
        if twice:
            raise ValueError(f"merging moments: shard {', '.join(twice)} is in both; give every shard once")
        dealings = sorted(dealt_to(self.shards + other.shards))
        if len(dealings) > 1:
            raise ValueError(
                f"merging moments: the text was dealt out to {' and to '.join(map(str, dealings))} shards, which overlap; "
                "give the shards of one dealing"
            )
        return replace(
            self,
            parts={name: _merged(self.parts[name], other.parts[name], self.sketch) for name in PARTS},
            paired=self.paired + other.paired,
            eligible=self.eligible + other.eligible,
            shards=self.shards + other.shards,
        )

    def only(self, pairs: Sequence[tuple[Site, Site]]) -> "Moments":
        """The same moments without the sites and pairs that these do not need, and without a sketch.

        Args:
            pairs: Layer pairs that are kept in full.

        Raises:
            ValueError: A pair was not collected.
        """
        for source, target in pairs:
            self.pair(source, target)  # refuses one that is not there
        kept, sources, targets = set(pairs), {s for s, _ in pairs}, {t for _, t in pairs}

        def chosen(values: Mapping[Any, Any], keys: set[Any]) -> dict[Any, Any]:
            return {key: value for key, value in values.items() if key in keys}

        def part(own: PartMoments) -> PartMoments:
            return replace(
                own,
                source_means=chosen(own.source_means, sources),
                target_means=chosen(own.target_means, targets),
                source_scatters=chosen(own.source_scatters, sources),
                target_scatters=chosen(own.target_scatters, targets),
                cross=chosen(own.cross, kept),
                shuffled=chosen(own.shuffled, kept),
                sketch={},
            )

        return replace(
            self,
            source=chosen(self.source, sources),
            target=chosen(self.target, targets),
            pairs=tuple(pair for pair in self.pairs if pair in kept),
            parts={name: part(own) for name, own in self.parts.items()},
            sketch=(),
        )

    def pair(self, source: Site, target: Site) -> SplitMoments:
        """The moments of one layer pair, with those of the shuffled control.

        Args:
            source: Site in the source model.
            target: Site in the target model.

        Raises:
            ValueError: The pair was not collected.
        """
        if (source, target) not in self.pairs:
            raise ValueError(
                f"moments: the pair {source} to {target} was "
                + (
                    f"only sketched; collect it in full with pairs=[({source!r}, {target!r})]"
                    if (source, target) in self.parts["train"].sketch
                    else f"not collected, but {', '.join(f'{s} to {t}' for s, t in self.pairs)}"
                )
            )

        def split(kind: str) -> SplitMoments:
            return self._split(
                source, target, {name: getattr(p, kind)[source, target] for name, p in self.parts.items()}
            )

        if (source, target) not in self.parts["train"].shuffled:
            return split("cross")
        return replace(split("cross"), control=replace(split("shuffled"), shuffled=True))

    def sketched(self, source: Site, target: Site) -> SplitMoments:
        """The moments of one layer pair with the target's dimensions of the sketch alone.

        Raises:
            ValueError: There is no sketch of the pair.
        """
        if (source, target) not in self.parts["train"].sketch:
            raise ValueError(f"moments: the pair {source} to {target} was not sketched; collect with sketch=64")
        cross = {name: part.sketch[source, target] for name, part in self.parts.items()}
        return self._split(source, target, cross, torch.tensor(self.sketch))

    def _split(
        self, source: Site, target: Site, cross: Mapping[str, Tensor], columns: Tensor | None = None
    ) -> SplitMoments:
        def of(name: str) -> PairMoments:
            part = self.parts[name]
            mean, scatter = part.target_means[target], part.target_scatters[target]
            if columns is not None:
                mean, scatter = mean[columns], scatter[columns][:, columns]
            return PairMoments(
                part.count,
                part.documents,
                part.source_means[source],
                mean,
                part.source_scatters[source],
                scatter,
                cross[name],
            )

        space = self.target[target]
        if columns is not None:
            space = replace(space, width=len(columns))
        return SplitMoments(self.source[source], space, *map(of, PARTS), coverage=self.coverage)

    def scale(self, site: Site, *, end: str = "target") -> Float[Tensor, " d"]:
        """Standard deviation of each dimension of a site over the training text.

        Args:
            site: The site.
            end: ``"source"`` or ``"target"``: which of the two models.

        Raises:
            ValueError: The end is neither, or the site was not collected.
        """
        if end not in ("source", "target"):
            raise ValueError(f"moments: end must be 'source' or 'target', got {end!r}")
        train = self.parts["train"]
        source = end == "source"
        scatters = train.source_scatters if source else train.target_scatters
        means = train.source_means if source else train.target_means
        if site not in scatters:
            raise ValueError(f"moments: {site} of the {end} was not collected, but {', '.join(map(str, scatters))}")
        return deviations(scatters[site], means[site], train.count)


def _names(spaces: Mapping[Site, Space]) -> str:
    return ", ".join(str(space) for space in spaces.values())


def sketch_dimensions(width: int, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """A seeded random choice of a target's dimensions, ascending.

    A random projection onto coordinates: in standardised coordinates every dimension counts alike,
    so the mean of a bounded score over a random choice of them estimates the mean over all, with
    a standard error that the choice itself shows. It needs no scales before the text is read, so
    shards that were collected apart still merge.
    """
    if not 0 < count <= width:
        raise ValueError(f"sketch: needs 1 to {width} target dimensions, got {count}")
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:count].tolist()))


class _Running:
    """Running moments of one part, updated in place (Chan, Golub & LeVeque 1979, pairwise update).

    Means are of columns with a name; products are of two named groups of columns.
    """

    def __init__(self, means: Mapping[Any, int], products: Mapping[Any, tuple[Any, Any]], device: Any) -> None:
        self.count = self.documents = 0
        self.means = {key: torch.zeros(d, dtype=torch.float64, device=device) for key, d in means.items()}
        self.products = {
            key: torch.zeros(means[a], means[b], dtype=torch.float64, device=device) for key, (a, b) in products.items()
        }
        self._ends = dict(products)

    def copy(self) -> "_Running":
        made = copy.copy(self)
        made.means = {key: value.clone() for key, value in self.means.items()}
        made.products = {key: value.clone() for key, value in self.products.items()}
        return made

    def add(self, count: int, documents: int, means: Mapping[Any, Tensor], products: Mapping[Any, Tensor]) -> None:
        """Add the moments of a batch; its products are centred on its own means."""
        n = self.count + count
        weight = self.count * count / n
        delta = {key: means[key] - mean for key, mean in self.means.items()}
        for key, product in self.products.items():
            a, b = self._ends[key]
            product.add_(products[key])
            if weight:
                product.addr_(delta[a], delta[b], alpha=weight)
        for key, mean in self.means.items():
            mean.add_(delta[key], alpha=count / n)
        self.count, self.documents = n, self.documents + documents


class MomentsAccumulator:
    """Adds batches of paired rows to running moments.

    A batch's products are formed in float32 where its rows are no wider (they are centred in float64
    before), and summed in float64.

    Args:
        source: Space of each source site.
        target: Space of each target site.
        pairs: Layer pairs whose full cross moments to keep.
        sketch: Target dimensions whose cross moments with all source sites to keep; see `Moments`.
        shuffled: Keep the cross moments of the shuffled control for the full pairs.
        settings: Recorded in the moments.
        seed: Seed of the shuffled pairing.
        shard: Name of the shard that is collected, if it has one.
        device: Where the products are formed and kept until `moments` takes them to the CPU.
    """

    def __init__(
        self,
        source: Mapping[Site, Space],
        target: Mapping[Site, Space],
        pairs: Sequence[tuple[Site, Site]],
        *,
        sketch: Sequence[int] = (),
        shuffled: bool = True,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        shard: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        self._source, self._target, self._pairs = dict(source), dict(target), tuple(pairs)
        self._sketch, self._shuffled = tuple(sketch), shuffled
        self._settings, self._shard = dict(settings or {}), shard
        self._seed = seed
        self._device = torch.device(device)
        means = {("source", s): space.width for s, space in source.items()}
        means |= {("target", t): space.width for t, space in target.items()}
        means |= {("sketch", t): len(self._sketch) for t in target} if sketch else {}
        products = {(*key, *key): (key, key) for key in means if key[0] != "sketch"}
        for kind in ("cross", "shuffled") if shuffled else ("cross",):
            products |= {(kind, s, t): (("source", s), ("target", t)) for s, t in self._pairs}
        if sketch:
            products |= {("sketch", s, t): (("source", s), ("sketch", t)) for s in source for t in target}
        self._parts = {name: _Running(means, products, self._device) for name in PARTS}
        self._products = products
        self._handed_out = False
        self._paired = self._eligible = 0

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
        means: dict[Any, Tensor] = {}
        rows: dict[Any, Tensor] = {}
        for end, sites in (("source", source), ("target", target)):
            for site, values in sites.items():
                wide = values.to(self._device, torch.float64)
                check_finite(wide, f"moments: {end} {site}")
                mean = wide.mean(0)
                means[end, site] = mean
                rows[end, site] = (wide - mean).to(torch.promote_types(values.dtype, torch.float32))
        if self._sketch:
            columns = torch.tensor(self._sketch, device=self._device)
            for site in target:
                means["sketch", site], rows["sketch", site] = (
                    whole["target", site].index_select(-1, columns) for whole in (means, rows)
                )
        partners = shuffled_partners(documents, shuffle_generator(self._seed, documents[0]))
        products = self._batch_products(rows, partners.to(self._device))
        if self._handed_out:
            self._parts = {name: running.copy() for name, running in self._parts.items()}
            self._handed_out = False
        self._parts[part].add(n, len(set(documents)), means, products)
        self._paired += n
        self._eligible += possible

    def _batch_products(self, rows: Mapping[Any, Tensor], other: Tensor) -> dict[Any, Tensor]:
        """Products of centred rows: for each left side one multiplication with all its right sides."""
        grouped: dict[tuple[Any, str], list[tuple[Any, Any]]] = {}
        for key, (a, b) in self._products.items():
            grouped.setdefault((a, key[0] if a != b else "own"), []).append((key, b))
        made: dict[Any, Tensor] = {}
        joined: dict[tuple, Tensor] = {}  # most left sides share their right sides
        for (a, kind), members in grouped.items():
            ends = tuple(b for _, b in members)
            if ends not in joined:
                joined[ends] = rows[ends[0]] if len(ends) == 1 else torch.cat([rows[b] for b in ends], 1)
            left = rows[a][other] if kind == "shuffled" else rows[a]
            pieces = (left.T @ joined[ends]).split([rows[b].shape[1] for b in ends], 1)
            made |= {key: piece for (key, _), piece in zip(members, pieces, strict=True)}
        return made

    def moments(self) -> Moments:
        """The moments of everything that was added."""
        self._handed_out = self._device.type == "cpu"  # what was given away must not change

        def part(running: _Running) -> PartMoments:
            means = {key: value.cpu() for key, value in running.means.items()}
            products = {key: value.cpu() for key, value in running.products.items()}

            def by_site(values: dict[Any, Tensor], end: str) -> dict[Site, Tensor]:
                return {key[1]: value for key, value in values.items() if key[0] == end}

            def by_pair(kind: str) -> dict[tuple[Site, Site], Tensor]:
                return {(key[1], key[2]): value for key, value in products.items() if key[0] == kind}

            return PartMoments(
                running.count,
                running.documents,
                by_site(means, "source"),
                by_site(means, "target"),
                by_site(products, "source"),
                by_site(products, "target"),
                by_pair("cross"),
                by_pair("shuffled"),
                by_pair("sketch"),
            )

        return Moments(
            self._source,
            self._target,
            self._pairs,
            {name: part(running) for name, running in self._parts.items()},
            self._paired,
            self._eligible,
            self._settings,
            self._sketch,
            (self._shard,) if self._shard else (),
        )


def recentred(
    part: PartMoments, source_means: Mapping[Site, Tensor], target_means: Mapping[Site, Tensor], sketch: Sequence[int]
) -> PartMoments:
    """The same rows with their products about other means: M + n (mean - other)ᵀ(mean - other).

    Products of several sets of rows about common means add up (Chan, Golub & LeVeque 1979).
    """
    n, columns = part.count, list(sketch)
    ds = {site: mean - source_means[site] for site, mean in part.source_means.items()}
    dt = {site: mean - target_means[site] for site, mean in part.target_means.items()}

    def within(scatters: Mapping[Site, Tensor], delta: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        return {site: torch.addr(m, delta[site], delta[site], alpha=n) for site, m in scatters.items()}

    def between(crosses: Mapping, taken: Any = slice(None)) -> dict:
        return {(s, t): torch.addr(c, ds[s], dt[t][taken], alpha=n) for (s, t), c in crosses.items()}

    return replace(
        part,
        source_means=dict(source_means),
        target_means=dict(target_means),
        source_scatters=within(part.source_scatters, ds),
        target_scatters=within(part.target_scatters, dt),
        cross=between(part.cross),
        shuffled=between(part.shuffled),
        sketch=between(part.sketch, columns),
    )


def _merged(one: PartMoments, two: PartMoments, sketch: Sequence[int]) -> PartMoments:
    """Moments of both sets of rows together."""
    if one.count == 0:
        return two
    if two.count == 0:
        return one
    share = two.count / (one.count + two.count)
    source, target = (
        {site: torch.lerp(mean, theirs[site], share) for site, mean in own.items()}
        for own, theirs in ((one.source_means, two.source_means), (one.target_means, two.target_means))
    )
    a, b = (recentred(part, source, target, sketch) for part in (one, two))
    sums = {kind: {k: v + getattr(b, kind)[k] for k, v in getattr(a, kind).items()} for kind in PRODUCTS}
    return replace(a, count=one.count + two.count, documents=one.documents + two.documents, **sums)


def shuffle_generator(seed: int, document: int) -> torch.Generator:
    """Randomness for a batch that begins with a document, whatever came before: shards shuffle as the whole does."""
    return torch.Generator().manual_seed(seed * 1_000_003 + document)


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


def dealt_to(shards: Iterable[str]) -> set[int]:
    """Of names such as ``0/3`` the numbers of shards that the text was dealt out to."""
    return {int(name.split("/")[1]) for name in shards}


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

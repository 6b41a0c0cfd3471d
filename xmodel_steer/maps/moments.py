"""Streamed second moments of paired activations: all that a linear map needs from a text.

Memory does not depend on the text's length. A hash of its content assigns each document to one part
(train, validation or test). Neighbouring tokens are therefore never in two parts, and shards may be
collected in any order, anywhere, and merged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import SpaceMismatchError, XModelSteerError
from xmodel_steer.core.spaces import Site, SiteLike, Space, as_site
from xmodel_steer.core.tables import html_table
from xmodel_steer.maps.pairs import PARTS, PRODUCTS, PairMoments, SplitMoments, deviations


def dealt_to(shards: Iterable[str]) -> set[int]:
    """Parse shard totals from names such as ``0/3``."""
    return {int(name.split("/")[1]) for name in shards}


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
        cross: Centred cross moments of the requested layer pairs.
        shuffled: The same moments of rows paired with other documents.
        sketch: Cross moments of every layer pair, with a few of the target's dimensions.
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

    def __repr__(self) -> str:
        return f"PartMoments({self.count:,} pairs of {self.documents:,} documents, {len(self.cross)} pairs of sites)"


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of paired activations of two models for chosen layer pairs, split by document.

    ``a + b`` merges shards of one text, collected anywhere, in any order.

    Args:
        source: Space of each source site.
        target: Space of each target site.
        pairs: Layer pairs with full cross moments.
        sketch: Dimensions of the target, drawn from a seed and equal at every target site, whose cross
            moments with every source site are kept for `layer_grid`; empty where all pairs are full.
        parts: Moments of the train, validation and test documents.
        paired: Number of token pairs.
        eligible: Largest possible number of token pairs.
        settings: Settings of the collection (token limit, split seed, ...), equal in all shards.
        shards: Names of the shards in the moments, where shards have names; none may be added twice.
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

    def __repr__(self) -> str:
        ends = " → ".join(next((s.model for s in end.values()), "nothing") for end in (self.source, self.target))
        text = f"{self.tokens:,} pairs of tokens of {self.documents:,} documents"
        return f"Moments({ends}, {len(self.pairs)} pairs of sites, {text}, coverage {self.coverage:.0%})"

    def _repr_html_(self) -> str:
        def sites(spaces: Mapping[Site, Space]) -> str:
            first = next((str(space) for space in spaces.values()), "nothing")
            return first if len(spaces) < 2 else f"{first} and {len(spaces) - 1} more"

        rows = {"source": sites(self.source), "target": sites(self.target), "pairs of sites": f"{len(self.pairs):,}"}
        rows |= {"pairs of tokens": f"{self.tokens:,}", "documents": f"{self.documents:,}"}
        return html_table("Moments", rows | {"coverage": f"{self.coverage:.0%}"})

    @property
    def coverage(self) -> float:
        """Share of the pairable tokens that pair."""
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
        for here, there, end in ((self.source, other.source, "source"), (self.target, other.target, "target")):
            if dict(here) != dict(there):
                raise SpaceMismatchError(
                    f"merging moments: the shards' {end} spaces differ "
                    f"({_names(here)} and {_names(there)}); collect every shard with the same models and sites"
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
        """Keep some layer pairs and the sites that they need; drop the sketch.

        Args:
            pairs: Layer pairs with full cross moments.

        Raises:
            ValueError: A pair was not collected.
        """
        for source, target in pairs:
            self.pair(source, target)  # refuses a pair that was not collected
        kept, sources, targets = set(pairs), {s for s, _ in pairs}, {t for _, t in pairs}

        def chosen(values: Mapping[Any, Any], keys: set[Any]) -> dict[Any, Any]:
            return {key: value for key, value in values.items() if key in keys}

        def part(whole: PartMoments) -> PartMoments:
            return replace(
                whole,
                source_means=chosen(whole.source_means, sources),
                target_means=chosen(whole.target_means, targets),
                source_scatters=chosen(whole.source_scatters, sources),
                target_scatters=chosen(whole.target_scatters, targets),
                cross=chosen(whole.cross, kept),
                shuffled=chosen(whole.shuffled, kept),
                sketch={},
            )

        return replace(
            self,
            source=chosen(self.source, sources),
            target=chosen(self.target, targets),
            pairs=tuple(pair for pair in self.pairs if pair in kept),
            parts={name: part(whole) for name, whole in self.parts.items()},
            sketch=(),
        )

    def pair(self, source: SiteLike, target: SiteLike) -> SplitMoments:
        """Return the moments of one layer pair, with its shuffled control.

        Args:
            source: Site in the source model, or a layer's number.
            target: Site in the target model, or a layer's number.

        Raises:
            ValueError: The pair was not collected.
        """
        source, target = as_site(source), as_site(target)
        if (source, target) not in self.pairs:
            raise ValueError(
                f"moments: the pair {source} to {target} was "
                + (
                    f"only sketched; collect it in full with pairs=[({source!r}, {target!r})]"
                    if (source, target) in self.parts["train"].sketch
                    else f"not collected, but {', '.join(f'{s} to {t}' for s, t in self.pairs)}"
                )
            )

        paired = self._split(source, target, "cross")
        if (source, target) not in self.parts["train"].shuffled:
            return paired
        return replace(paired, control=replace(self._split(source, target, "shuffled"), shuffled=True))

    def sketched(self, source: SiteLike, target: SiteLike) -> SplitMoments:
        """Return the moments of one layer pair with the sketch's target dimensions only.

        Raises:
            ValueError: There is no sketch of the pair.
        """
        source, target = as_site(source), as_site(target)
        if (source, target) not in self.parts["train"].sketch:
            raise ValueError(f"moments: the pair {source} to {target} was not sketched; collect with sketch=64")
        return self._split(source, target, "sketch")

    def _split(self, source: Site, target: Site, kind: str) -> SplitMoments:
        """Gather one pair's moments from each part: ``cross``, ``shuffled`` or ``sketch``."""
        space = self.target[target]
        columns = torch.tensor(self.sketch) if kind == "sketch" else None
        if columns is not None:
            space = replace(space, width=len(columns))

        def pair(part: PartMoments) -> PairMoments:
            mean, scatter = part.target_means[target], part.target_scatters[target]
            if columns is not None:
                mean, scatter = mean[columns], scatter[columns][:, columns]
            cross = getattr(part, kind)[source, target]
            return PairMoments(
                part.count,
                part.documents,
                part.source_means[source],
                mean,
                part.source_scatters[source],
                scatter,
                cross,
            )

        splits = (pair(self.parts[name]) for name in PARTS)
        return SplitMoments(self.source[source], space, *splits, coverage=self.coverage)

    def scale(self, site: SiteLike, *, end: str = "target") -> Float[Tensor, " d"]:
        """Return the standard deviation of each dimension over the training text.

        Args:
            site: The site.
            end: The model of the site, ``"source"`` or ``"target"``.

        Raises:
            ValueError: The end is another word, or the site was not collected.
        """
        if end not in ("source", "target"):
            raise ValueError(f"moments: end must be 'source' or 'target', got {end!r}")
        site, train = as_site(site), self.parts["train"]
        source = end == "source"
        scatters = train.source_scatters if source else train.target_scatters
        means = train.source_means if source else train.target_means
        if site not in scatters:
            raise ValueError(f"moments: {site} of the {end} was not collected, but {', '.join(map(str, scatters))}")
        return deviations(scatters[site], means[site], train.count)


def _names(spaces: Mapping[Site, Space]) -> str:
    return ", ".join(str(space) for space in spaces.values())


def recentred(
    part: PartMoments, source_means: Mapping[Site, Tensor], target_means: Mapping[Site, Tensor], sketch: Sequence[int]
) -> PartMoments:
    """Recentre the products about other means: M + n (mean - other)ᵀ(mean - other).

    Products of several sets of rows about common means can be added (Chan, Golub & LeVeque 1979).
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
    """Merge the moments of two sets of rows."""
    if one.count == 0:
        return two
    if two.count == 0:
        return one
    share = two.count / (one.count + two.count)
    source, target = (
        {site: torch.lerp(mean, second[site], share) for site, mean in first.items()}
        for first, second in ((one.source_means, two.source_means), (one.target_means, two.target_means))
    )
    a, b = (recentred(part, source, target, sketch) for part in (one, two))
    sums = {kind: {k: v + getattr(b, kind)[k] for k, v in getattr(a, kind).items()} for kind in PRODUCTS}
    return replace(a, count=one.count + two.count, documents=one.documents + two.documents, **sums)


def merge(shards: Iterable[Moments]) -> Moments:
    """Add the moments of all shards.

    Raises:
        XModelSteerError: There are no shards.
    """
    total: Moments | None = None
    for shard in shards:
        total = shard if total is None else total + shard
    if total is None:
        raise XModelSteerError("merging moments: no shards were given")
    return total

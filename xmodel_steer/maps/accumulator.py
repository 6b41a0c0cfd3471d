"""Moments summed in one pass over rows of activations."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.maps.moments import Moments, PartMoments
from xmodel_steer.maps.pairs import PARTS


def sketch_dimensions(width: int, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Choose a target's dimensions at random, by a seed, ascending.

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
        """Return the moments of everything that was added."""
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

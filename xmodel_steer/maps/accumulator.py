"""Accumulation of moments in one pass over rows of activations."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.finite import check_finite, is_finite
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.maps.moments import Moments, PartMoments
from xmodel_steer.maps.pairs import PARTS


def sketch_dimensions(width: int, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Draw some of a target's dimensions from a seed; return them in ascending order.

    In standardised coordinates every dimension counts alike. The mean of a bounded score over a random
    choice of dimensions therefore estimates the mean over all, and the choice itself shows the standard
    error. No scales are needed before the text is read, so separately collected shards still merge.
    """
    if not 0 < count <= width:
        raise ValueError(f"sketch: needs 1 to {width} target dimensions, got {count}")
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:count].tolist()))


class _Running:
    """Running moments of one part, updated in place (Chan, Golub & LeVeque 1979, pairwise update).

    Each key of the means names a group of columns; each product has two such groups.
    """

    def __init__(self, means: Mapping[Any, int], products: Mapping[Any, tuple[Any, Any]], device: Any) -> None:
        self.count = self.documents = 0
        self.means = {key: torch.zeros(d, dtype=torch.float64, device=device) for key, d in means.items()}
        self.products = {
            key: torch.zeros(means[a], means[b], dtype=torch.float64, device=device) for key, (a, b) in products.items()
        }
        self._ends = dict(products)

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
    """Running moments, to which batches of paired rows are added.

    Rows are centred in float64. A batch's products are formed in the rows' dtype, at least float32, and
    summed in float64.

    Args:
        source: Space of each source site.
        target: Space of each target site.
        pairs: Layer pairs that get full cross moments.
        sketch: Target dimensions that get cross moments with all source sites; see `Moments`.
        shuffled: Keep the cross moments of the shuffled control for the full pairs.
        settings: Recorded in the moments.
        seed: Seed of the shuffled pairing.
        shard: Name of the shard, if it has one.
        device: Device of the products until `moments` copies them to the CPU.
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
            target: The paired rows of each target site.
            documents: The document's number for each row, in ascending runs.
            eligible: Largest possible number of pairs; the number of rows by default.

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
                means[end, site], rows[end, site] = self._centred(values, f"moments: {end} {site}")
        if self._sketch:
            columns = torch.tensor(self._sketch, device=self._device)
            for site in target:
                means["sketch", site], rows["sketch", site] = (
                    whole["target", site].index_select(-1, columns) for whole in (means, rows)
                )
        partners = shuffled_partners(documents, shuffle_generator(self._seed, documents[0]))
        products = self._batch_products(rows, partners.to(self._device))
        if self._handed_out:  # the tensors are part of returned moments, which must not change
            self._parts = copy.deepcopy(self._parts)
            self._handed_out = False
        self._parts[part].add(n, len(set(documents)), means, products)
        self._paired += n
        self._eligible += possible

    def _centred(self, values: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Centre rows in float64, by pieces: a whole copy takes longer than the sums."""
        rows = values.to(self._device, torch.promote_types(values.dtype, torch.float32), copy=True)
        mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=self._device)
        for piece in rows.split(1024):
            mean += piece.to(torch.float64).sum(0)
        mean /= len(rows)
        if not is_finite(mean):
            check_finite(rows, what)
        for piece in rows.split(1024):
            piece.copy_(piece.to(torch.float64).sub_(mean))
        return mean, rows

    def _batch_products(self, rows: Mapping[Any, Tensor], other: Tensor) -> dict[Any, Tensor]:
        """Multiply centred rows: each left side once, with all its right sides joined."""
        grouped: dict[tuple[Any, str], list[tuple[Any, Any]]] = {}
        products: dict[Any, Tensor] = {}
        for key, (a, b) in self._products.items():
            if a == b:
                products[key] = _gram(rows[a])
            else:
                grouped.setdefault((a, key[0]), []).append((key, b))
        joined: dict[tuple, Tensor] = {}  # most left sides share their right sides
        for (a, kind), members in grouped.items():
            ends = tuple(b for _, b in members)
            if ends not in joined:
                joined[ends] = rows[ends[0]] if len(ends) == 1 else torch.cat([rows[b] for b in ends], 1)
            left = rows[a][other] if kind == "shuffled" else rows[a]
            pieces = (left.T @ joined[ends]).split([rows[b].shape[1] for b in ends], 1)
            products |= {key: piece for (key, _), piece in zip(members, pieces, strict=True)}
        return products

    def moments(self) -> Moments:
        """Return the moments of all added rows."""
        self._handed_out = self._device.type == "cpu"  # copies from other devices are independent

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
                source_means=by_site(means, "source"),
                target_means=by_site(means, "target"),
                source_scatters=by_site(products, "source"),
                target_scatters=by_site(products, "target"),
                cross=by_pair("cross"),
                shuffled=by_pair("shuffled"),
                sketch=by_pair("sketch"),
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


def _gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Multiply rows with themselves; blocks below the diagonal are copies of those above."""
    d = rows.shape[1]
    size, made = max(64, -(-d // 8)), rows.new_empty(d, d)
    for i in range(0, d, size):
        own = slice(i, i + size)
        made[own, i:] = rows[:, own].T @ rows[:, i:]
        made[i + size :, own] = made[own, i + size :].T
    return made


def shuffle_generator(seed: int, document: int) -> torch.Generator:
    """Seed a batch's shuffle by its first document, equally in every shard."""
    return torch.Generator().manual_seed(seed * 1_000_003 + document)


def shuffled_partners(documents: Sequence[int], generator: torch.Generator) -> Tensor:
    """Choose another row for each row, by a rotation that reaches another document.

    A rotation by more rows than the longest document has, and by fewer than all other rows, never pairs a
    row with its own document. Too few documents for that get a random permutation.

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

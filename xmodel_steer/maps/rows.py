"""Paired activations document by document: what a map needs that moments are not enough for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Space
from xmodel_steer.core.vectors import Activations
from xmodel_steer.maps.accumulator import MomentsAccumulator, shuffle_generator, shuffled_partners
from xmodel_steer.maps.pairs import PARTS, SplitMoments


@dataclass(frozen=True, eq=False)
class DocumentRows:
    """The paired rows of one document.

    Args:
        number: The document's number in the text, from 0.
        part: ``train``, ``validation`` or ``test``.
        count: Number of rows.
        load: Gives the source's and the target's rows.
        prompt: The id of its prompt.
    """

    number: int
    part: str
    count: int
    load: Callable[[], tuple[Float[Tensor, "n ds"], Float[Tensor, "n dt"]]]
    prompt: str = ""


@dataclass(frozen=True, eq=False)
class PairedRows:
    """Paired activations of one layer pair, read when they are needed.

    Args:
        source: The space of the source rows.
        target: The space of the target rows.
        documents: The documents, in the order of the text.
        coverage: Share of the tokens that could pair that do.
        window: How many documents are taken together for moments, and shuffled among.
        shuffled: Whether rows are paired with those of other documents.
    """

    source: Space
    target: Space
    documents: tuple[DocumentRows, ...]
    coverage: float = 1.0
    window: int = 64
    shuffled: bool = False

    def __repr__(self) -> str:
        ends = f"{self.source.model} {self.source.site} → {self.target.model} {self.target.site}"
        rows = sum(document.count for document in self.documents)
        return f"PairedRows({ends}, {rows:,} pairs of {len(self.documents):,} documents, coverage {self.coverage:.0%})"

    @classmethod
    def of(cls, source: Activations, target: Activations, parts: Sequence[str]) -> "PairedRows":
        """Rows that are in memory already.

        Args:
            source: Rows of the source, with labels.
            target: The rows that they pair with.
            parts: The part of each document, in the order of their first rows.

        Raises:
            PromptError: The rows do not pair, have no labels, or a part has another name than `PARTS`.
        """
        if len(source) != len(target) or not source.rows:
            raise PromptError(f"PairedRows: needs paired, labelled rows, got {len(source)} and {len(target)}")
        if target.rows and [document for document, _ in source.rows] != [document for document, _ in target.rows]:
            raise PromptError("PairedRows: the rows of source and target are of different prompts, or in another order")
        places: dict[str, list[int]] = {}
        for i, (document, _) in enumerate(source.rows):
            places.setdefault(document, []).append(i)
        if len(parts) != len(places):
            raise PromptError(f"PairedRows: {len(places)} documents but {len(parts)} parts")
        if unknown := sorted(set(parts) - set(PARTS)):
            raise PromptError(f"PairedRows: a part is one of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")

        def rows(own: list[int]) -> Callable[[], tuple[Tensor, Tensor]]:
            return lambda: (source.values[own], target.values[own])

        made = (
            DocumentRows(number, part, len(own), rows(own), document)
            for number, ((document, own), part) in enumerate(zip(places.items(), parts, strict=True))
        )
        return cls(source.space, target.space, tuple(made))

    def part(self, name: str) -> tuple[DocumentRows, ...]:
        """Return the documents of a part that have rows."""
        return tuple(d for d in self.documents if d.part == name and d.count)

    def windows(self) -> Iterator[tuple[DocumentRows, ...]]:
        """Documents that are taken together."""
        own: list[DocumentRows] = []
        for document in self.documents:
            if own and document.number // self.window != own[0].number // self.window:
                yield tuple(own)
                own = []
            own.append(document)
        if own:
            yield tuple(own)

    def moments(self, *, seed: int = 0, shuffled: bool = True) -> SplitMoments:
        """Take the moments of the rows, for fitters that need no more."""
        s, t = self.source.site, self.target.site
        pairs = [(s, t)]
        accumulator = MomentsAccumulator({s: self.source}, {t: self.target}, pairs, shuffled=shuffled, seed=seed)
        for window in self.windows():
            for name in PARTS:
                own = [d for d in window if d.part == name and d.count]
                if own:
                    loaded = [d.load() for d in own]
                    numbers = [d.number for d in own for _ in range(d.count)]
                    x, y = (torch.cat(side) for side in zip(*loaded, strict=True))
                    accumulator.add(name, {s: x}, {t: y}, numbers)
        return replace(accumulator.moments().pair(s, t), coverage=self.coverage, shuffled=self.shuffled)

    def first(self, tokens: int) -> "PairedRows":
        """Keep only the first ``tokens`` rows of the training documents."""
        kept, left = [], tokens
        for document in self.documents:
            if document.part == "train":
                if left <= 0:
                    continue
                if document.count > left:
                    document = _cut(document, left)
                left -= document.count
            kept.append(document)
        return replace(self, documents=tuple(kept))

    def inverse(self) -> "PairedRows":
        """Turn the rows round, for maps from the target to the source."""

        def turned(document: DocumentRows) -> DocumentRows:
            return replace(document, load=lambda: document.load()[::-1])

        return replace(self, source=self.target, target=self.source, documents=tuple(map(turned, self.documents)))

    def shuffle(self, *, seed: int = 0) -> "PairedRows":
        """Every row paired with a target row of another document of its part, within a window."""
        made: dict[int, DocumentRows] = {}
        for window in self.windows():
            for name in PARTS:
                own = [d for d in window if d.part == name and d.count]
                if own:
                    made |= {d.number: d for d in _shuffled(own, seed)}
        documents = tuple(made.get(d.number, d) for d in self.documents)
        return replace(self, documents=documents, shuffled=True)


def _cut(document: DocumentRows, count: int) -> DocumentRows:
    def load() -> tuple[Tensor, Tensor]:
        x, y = document.load()
        return x[:count], y[:count]

    return replace(document, count=count, load=load)


def _shuffled(own: list[DocumentRows], seed: int) -> list[DocumentRows]:
    """Documents of one window whose source rows are those of others: what moments shuffle, row by row."""
    numbers = [d.number for d in own for _ in range(d.count)]
    partners = shuffled_partners(numbers, shuffle_generator(seed, numbers[0]))
    starts = torch.tensor([0, *accumulate(d.count for d in own)])

    def rows(wanted: Tensor, document: DocumentRows) -> Callable[[], tuple[Tensor, Tensor]]:
        def load() -> tuple[Tensor, Tensor]:
            owner = torch.searchsorted(starts, wanted, right=True) - 1
            places, pieces = [], []
            for k in owner.unique().tolist():
                places.append((owner == k).nonzero()[:, 0])
                pieces.append(own[k].load()[0][wanted[places[-1]] - starts[k]])
            return torch.cat(pieces)[torch.cat(places).argsort()], document.load()[1]

        return load

    return [replace(d, load=rows(partners[starts[k] : starts[k + 1]], d)) for k, d in enumerate(own)]

"""Paired activations document by document, for maps that need more than moments."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Space, arrow
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
        load: Returns the source's and the target's rows.
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
        coverage: Share of the pairable tokens that pair.
        window: Number of documents that are summed together, and shuffled among each other.
        shuffled: Whether rows are paired with rows of other documents.
    """

    source: Space
    target: Space
    documents: tuple[DocumentRows, ...]
    coverage: float = 1.0
    window: int = 64
    shuffled: bool = False

    def __repr__(self) -> str:
        rows = sum(document.count for document in self.documents)
        text = f"{rows:,} pairs of {len(self.documents):,} documents"
        return f"PairedRows({arrow(self.source, self.target)}, {text}, coverage {self.coverage:.0%})"

    @classmethod
    def of(cls, source: Activations, target: Activations, parts: Sequence[str]) -> "PairedRows":
        """Pair rows that are in memory.

        Args:
            source: Rows of the source, with labels.
            target: The rows that they pair with.
            parts: The part of each document, in the order of their first rows.

        Raises:
            PromptError: The rows do not pair, have no labels, or a part is not in `PARTS`.
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

        def loader(indices: list[int]) -> Callable[[], tuple[Tensor, Tensor]]:
            return lambda: (source.values[indices], target.values[indices])

        documents = (
            DocumentRows(number, part, len(indices), loader(indices), document)
            for number, ((document, indices), part) in enumerate(zip(places.items(), parts, strict=True))
        )
        return cls(source.space, target.space, tuple(documents))

    def part(self, name: str) -> tuple[DocumentRows, ...]:
        """Return the documents of a part that have rows."""
        return tuple(d for d in self.documents if d.part == name and d.count)

    def windows(self) -> Iterator[tuple[DocumentRows, ...]]:
        """Iterate over windows of consecutive documents."""
        window: list[DocumentRows] = []
        for document in self.documents:
            if window and document.number // self.window != window[0].number // self.window:
                yield tuple(window)
                window = []
            window.append(document)
        if window:
            yield tuple(window)

    def _batches(self) -> Iterator[tuple[str, list[DocumentRows]]]:
        """Iterate over the documents of each window and part that have rows."""
        for window in self.windows():
            for name in PARTS:
                if batch := [d for d in window if d.part == name and d.count]:
                    yield name, batch

    def moments(self, *, seed: int = 0, shuffled: bool = True) -> SplitMoments:
        """Compute the moments of the rows, for fitters that need no more."""
        s, t = self.source.site, self.target.site
        pairs = [(s, t)]
        accumulator = MomentsAccumulator({s: self.source}, {t: self.target}, pairs, shuffled=shuffled, seed=seed)
        for name, documents in self._batches():
            x, y = joined(documents)
            accumulator.add(name, {s: x}, {t: y}, _numbers(documents))
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
        """Exchange source and target, for maps in the opposite direction."""

        def exchanged(document: DocumentRows) -> DocumentRows:
            return replace(document, load=lambda: document.load()[::-1])

        return replace(self, source=self.target, target=self.source, documents=tuple(map(exchanged, self.documents)))

    def shuffle(self, *, seed: int = 0) -> "PairedRows":
        """Pair target rows with source rows of other documents in their window."""
        shuffled = {d.number: d for _, documents in self._batches() for d in _shuffled(documents, seed)}
        return replace(self, documents=tuple(shuffled.get(d.number, d) for d in self.documents), shuffled=True)


def joined(documents: Sequence[DocumentRows]) -> tuple[Tensor, Tensor]:
    """Load documents and concatenate their rows: the source's and the target's."""
    source, target = zip(*(document.load() for document in documents), strict=True)
    return torch.cat(source), torch.cat(target)


def _numbers(documents: Sequence[DocumentRows]) -> list[int]:
    """Return the document's number for each row."""
    return [d.number for d in documents for _ in range(d.count)]


def _cut(document: DocumentRows, count: int) -> DocumentRows:
    def load() -> tuple[Tensor, Tensor]:
        x, y = document.load()
        return x[:count], y[:count]

    return replace(document, count=count, load=load)


def _shuffled(documents: list[DocumentRows], seed: int) -> list[DocumentRows]:
    """Exchange source rows among a window's documents, as the moments' control does."""
    numbers = _numbers(documents)
    partners = shuffled_partners(numbers, shuffle_generator(seed, numbers[0]))
    starts = torch.tensor([0, *accumulate(d.count for d in documents)])

    def loader(wanted: Tensor, document: DocumentRows) -> Callable[[], tuple[Tensor, Tensor]]:
        def load() -> tuple[Tensor, Tensor]:
            # Wanted rows lie in several documents: each is loaded once, and rows return to the wanted order.
            owner = torch.searchsorted(starts, wanted, right=True) - 1
            places, pieces = [], []
            for k in owner.unique().tolist():
                places.append((owner == k).nonzero()[:, 0])
                pieces.append(documents[k].load()[0][wanted[places[-1]] - starts[k]])
            return torch.cat(pieces)[torch.cat(places).argsort()], document.load()[1]

        return load

    return [replace(d, load=loader(partners[starts[k] : starts[k + 1]], d)) for k, d in enumerate(documents)]

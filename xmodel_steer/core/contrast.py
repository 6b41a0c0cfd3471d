"""Pairs of prompts with and without a behaviour."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import Any

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts, chat_or_text, label_of, prompt_of_row, rows_of
from xmodel_steer.core.prompts import Prompt, Prompts, described
from xmodel_steer.core.tables import html_table


@dataclass(frozen=True)
class ContrastSet:
    """Prompts with a behaviour (positive) and without it (negative).

    Args:
        positive: Prompts with the behaviour.
        negative: Prompts without it.
        paired: Whether ``positive[i]`` and ``negative[i]`` form a pair, which no split divides.

    Raises:
        PromptError: A side is empty or holds other values than prompts, the sides of a paired set have
            different lengths, or a prompt is on both sides.

    Example:
        >>> contrast = ContrastSet.from_records([{"positive": "What a joy.", "negative": "What a bore."}])
        >>> len(contrast.positive), contrast.paired
        (1, True)
    """

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    paired: bool = False

    def __post_init__(self) -> None:
        for side in (self.positive, self.negative):
            for value in side if isinstance(side, tuple | list) else [side]:
                if not isinstance(value, Prompt) or value is side:
                    raise PromptError(
                        f"ContrastSet: needs tuples of Prompts, got {described(value)}; use ContrastSet.from_prompts"
                    )
        require_type("ContrastSet.paired", bool, self.paired)
        if not self.positive or not self.negative:
            raise PromptError(
                f"ContrastSet: needs prompts on both sides, got {len(self.positive)} positive and "
                f"{len(self.negative)} negative; a difference of means has two means"
            )
        if self.paired and len(self.positive) != len(self.negative):
            raise PromptError(
                f"ContrastSet: paired, but {len(self.positive)} positive and {len(self.negative)} "
                "negative prompts; pass paired=False or complete the pairs"
            )
        both = {p.content_key() for p in self.positive} & {p.content_key() for p in self.negative}
        if both:
            raise PromptError(
                f"ContrastSet: {len(both)} prompt(s) are on both sides, for example "
                f"{min(both)[:80]!r}; they contrast with nothing, remove them"
            )

    def __repr__(self) -> str:
        paired = ", paired" if self.paired else ""
        return f"ContrastSet({len(self.positive):,} positive, {len(self.negative):,} negative{paired})"

    def _repr_html_(self) -> str:
        rows = {
            "positive": f"{len(self.positive):,}, such as {self.positive[0].content[:80]!r}",
            "negative": f"{len(self.negative):,}, such as {self.negative[0].content[:80]!r}",
            "paired": "yes" if self.paired else "no",
        }
        return html_table("ContrastSet", rows)

    @classmethod
    def from_prompts(cls, positive: Prompts, negative: Prompts, *, paired: bool = False) -> "ContrastSet":
        """Make a set from two lists of prompts in any form that `as_prompts` takes.

        Raises:
            PromptError: A side is no list of prompts, or the sides do not make a contrast set.
        """
        return cls(as_prompts(positive, what="positive"), as_prompts(negative, what="negative"), paired)

    @classmethod
    def from_records(cls, records: Any) -> "ContrastSet":
        """Make a set from rows: dictionaries, a pandas frame or a ``datasets.Dataset``.

        Rows of a paired set have ``positive`` and ``negative``. Rows of an unpaired set have a prompt
        under ``text``, ``prompt`` or ``messages``, and a ``label`` (1/0, true/false, positive/negative).
        A prompt is a string or a list of chat messages, or messages in JSON.

        Raises:
            PromptError: A row has neither form; the message names the row.
        """
        rows = rows_of(records)
        if not rows:
            raise PromptError("ContrastSet: no rows; each needs positive and negative, or text and label")
        positive: list[Prompt] = []
        negative: list[Prompt] = []
        paired = all("positive" in row and "negative" in row for row in rows)
        for number, row in enumerate(rows, 1):
            try:
                if paired:
                    positive.append(Prompt.of(chat_or_text(row["positive"])))
                    negative.append(Prompt.of(chat_or_text(row["negative"])))
                else:
                    (positive if label_of(row) else negative).append(prompt_of_row(row))
            except PromptError as error:
                raise PromptError(f"ContrastSet: row {number}: {error}") from None
        return cls(tuple(positive), tuple(negative), paired)

    def split(self, fractions: Sequence[float] = (0.5, 0.5), *, seed: int = 0) -> "tuple[ContrastSet, ...]":
        """Shuffle the prompts with a seed, and split them into disjoint parts.

        Pairs stay together, and so do all rows that share a prompt: no prompt is in two parts.

        Args:
            fractions: Share of each part; they sum to at most 1 (the rest is left out).
            seed: Seed of the shuffle.

        Raises:
            PromptError: A part would have an empty side.
            ValueError: The fractions are not positive or sum to more than 1.
        """
        require_type("split: fractions", Iterable, fractions, takes="a list of numbers")
        require_type("split: fractions", Real, *fractions, takes="a list of numbers")
        if any(f <= 0 for f in fractions) or sum(fractions) > 1 + 1e-9:
            raise ValueError(f"split: fractions must be positive and sum to at most 1, got {tuple(fractions)}")
        if self.paired:
            units = [((p,), (n,)) for p, n in zip(self.positive, self.negative, strict=True)]
            pools = [_joined(units)]
        else:
            pools = [_joined([((p,), ()) for p in self.positive]), _joined([((), (n,)) for n in self.negative])]
        parts = [([], []) for _ in fractions]
        for pool in pools:
            random.Random(seed).shuffle(pool)
            stops = [round(share * len(pool)) for share in accumulate(fractions)]
            for part, start, stop in zip(parts, [0, *stops], stops, strict=False):
                for positive, negative in pool[start:stop]:
                    part[0].extend(positive)
                    part[1].extend(negative)
        try:
            return tuple(ContrastSet(tuple(p), tuple(n), self.paired) for p, n in parts)
        except PromptError:
            raise PromptError(
                f"split: {len(self.positive)} positive and {len(self.negative)} negative prompts are "
                f"too few for {len(fractions)} parts with both sides; give more prompts or fewer parts"
            ) from None


def _joined(units: list[tuple[tuple[Prompt, ...], tuple[Prompt, ...]]]) -> list:
    """Merge units that share a prompt, which no split may divide."""
    parent = list(range(len(units)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, (positive, negative) in enumerate(units):
        for prompt in positive + negative:
            parent[root(i)] = root(first.setdefault(prompt.content_key(), i))
    groups: dict[int, tuple[list[Prompt], list[Prompt]]] = {}
    for i, (positive, negative) in enumerate(units):
        group = groups.setdefault(root(i), ([], []))
        group[0].extend(positive)
        group[1].extend(negative)
    return list(groups.values())

"""The interface of scorers of generated texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from xmodel_steer.core.prompts import Prompt


@runtime_checkable
class TextScorer(Protocol):
    """A scorer that sees the prompts, or many texts at once."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        """Score each text, which continues the prompt of the same index."""
        ...


@runtime_checkable
class Explained(TextScorer, Protocol):
    """A scorer that also returns words about each text, such as a judge's answer."""

    def raw(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[str]:
        """Return the words behind the score of each text."""
        ...

    def record(self) -> dict[str, Any]:
        """Return how the scorer was asked, as plain JSON values."""
        ...


T = TypeVar("T")
Scorer = Callable[[str], float] | TextScorer


def entries_of(entries: Mapping[str, T], prompts: Sequence[Prompt], what: str, field: str) -> list[T]:
    """Look up each prompt's entry by the prompt's id.

    Raises:
        ValueError: A prompt has none, or an empty list.
    """
    missing = [prompt.id for prompt in prompts if entries.get(prompt.id) in (None, (), [])]
    if missing:
        raise ValueError(
            f"{what}: there is no {field[:-1]} for {', '.join(missing[:5])}; give {field}={{prompt.id: ...}}"
        )
    return [entries[prompt.id] for prompt in prompts]


def score_texts(scorer: Scorer, texts: Sequence[str], prompts: Sequence[Prompt] = ()) -> np.ndarray:
    """Score each text.

    Args:
        scorer: A function from a text to a number, or a `TextScorer`.
        texts: The texts.
        prompts: The prompt that each text continues; a function needs none.

    Raises:
        ValueError: The scorer returned something that is not a finite number for each text.
    """
    if isinstance(scorer, TextScorer):
        scores = np.array([float(s) for s in scorer.score(prompts, texts)])
    else:
        scores = np.array([float(scorer(text)) for text in texts])
    if scores.shape != (len(texts),):
        raise ValueError(
            f"scorer {scorer!r}: gave {len(scores)} scores for {len(texts)} texts; it must give one for each"
        )
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"scorer {scorer!r}: gave {scores[bad]} for {texts[bad][:60]!r}; it must give a finite number for any text"
        )
    return scores

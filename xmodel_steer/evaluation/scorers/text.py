"""Score generated texts one by one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xmodel_steer.core.prompts import Prompt


@runtime_checkable
class TextScorer(Protocol):
    """A scorer that sees the prompts, or many texts at once."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        """Score each text, which continues the prompt of the same place."""
        ...


@runtime_checkable
class Explained(TextScorer, Protocol):
    """A scorer that has more to say about each text than a number, such as a judge's answer."""

    def raw(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[str]:
        """Return the words behind the score of each text."""
        ...

    def record(self) -> dict[str, Any]:
        """How it was asked, as plain JSON values."""
        ...


Scorer = Callable[[str], float] | TextScorer


def score_texts(scorer: Scorer, texts: Sequence[str], prompts: Sequence[Prompt] = ()) -> np.ndarray:
    """Score each text.

    Args:
        scorer: A function from a text to a number, or a `TextScorer`.
        texts: The texts.
        prompts: What each of them continues; a function needs none.

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

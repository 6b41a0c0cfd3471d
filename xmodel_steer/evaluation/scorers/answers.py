"""Scorers that compare a text with an expected answer."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.texts import encodable
from xmodel_steer.evaluation.scorers.text import entries_of

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Normalise case, punctuation, articles and white space (SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250).

    A text that would become empty, such as the letter A or a sign, keeps its punctuation and articles. The point of
    3.14 and the sign of -5 count as punctuation.

    Example:
        >>> normalised(" The  answer, is: Paris. "), normalised("A")
        ('answer is paris', 'a')
    """
    return _squad(text) or " ".join(text.lower().split())


def _squad(text: str) -> str:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


@dataclass(frozen=True)
class ExactAnswer:
    """A score of 1 if the text's first line is a right answer, else 0; both normalised as in SQuAD.

    Args:
        answers: The right answers to each prompt, by its id.
        anywhere: Accept an answer anywhere in the whole text.
    """

    answers: Mapping[str, tuple[str, ...]]
    anywhere: bool = False

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Score each text 1 or 0.

        Raises:
            ValueError: A prompt has no answers, or with ``anywhere`` an answer is only an article or a sign.
        """
        answers = entries_of(self.answers, prompts, "ExactAnswer", "answers")
        bare = [answer for listed in answers for answer in listed if not _squad(answer)]
        if self.anywhere and bare:
            raise ValueError(
                f"ExactAnswer: {bare[0]!r} is an article or a sign, which cannot be told anywhere in a text; "
                "use anywhere=False, or Matches(...)"
            )
        return [self._one(text, listed) for listed, text in zip(answers, texts, strict=True)]

    def _one(self, text: str, answers: Sequence[str]) -> float:
        right = [normalised(answer) for answer in answers]
        if self.anywhere:
            return float(any(f" {answer} " in f" {normalised(text)} " for answer in right))
        first = next((line for line in text.splitlines() if line.strip()), "")
        return float(bool(first) and normalised(first) in right)


@dataclass(frozen=True)
class SameTokens:
    """Share of a text's tokens equal to the reference's at the same index, over the longer of both.

    The same text scores 1. The score shows how far two greedy texts agree: a ruined repair scores 0, where the rate
    of "the behaviour is gone" is 1.

    Args:
        references: The text to compare with for each prompt, by its id.
        tokenizer: A Hugging Face tokenizer.
    """

    references: Mapping[str, str]
    tokenizer: Any = field(repr=False)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Compute the share for each text.

        Raises:
            ValueError: A prompt has no reference.
        """
        references = entries_of(self.references, prompts, "SameTokens", "references")
        return [self._share(text, reference) for text, reference in zip(texts, references, strict=True)]

    def _share(self, text: str, other: str) -> float:
        # Half of a surrogate pair has no tokens.
        whole = (encodable(t) for t in (text, other))
        ids, other_ids = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in whole)
        longer = max(len(ids), len(other_ids))
        return sum(a == b for a, b in zip(ids, other_ids, strict=False)) / longer if longer else 1.0

"""Scorers that compare a text with the answer that is due."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xmodel_steer.core.prompts import Prompt

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and surplus white space (SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250).

    Of what would leave nothing, such as the letter A or a sign, only case and white space are taken away. The point of 3.14 and the sign of
    -5 are punctuation too.

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
    """1 when the first line of the text is one of the prompt's right answers, else 0; both normalised as in SQuAD.

    Args:
        answers: The right answers of each prompt, by its id.
        anywhere: An answer counts wherever its words stand in the whole text.
    """

    answers: Mapping[str, tuple[str, ...]]
    anywhere: bool = False

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """1 or 0 for each text.

        Raises:
            ValueError: A prompt has no answers, or one that is to count anywhere is an article or a sign alone.
        """
        missing = [prompt.id for prompt in prompts if not self.answers.get(prompt.id)]
        if missing:
            raise ValueError(
                f"ExactAnswer: there is no answer for {', '.join(missing[:5])}; give answers={{prompt.id: (...)}}"
            )
        if self.anywhere:
            for answer in (answer for prompt in prompts for answer in self.answers[prompt.id]):
                if not _squad(answer):
                    raise ValueError(
                        f"ExactAnswer: {answer!r} is an article or a sign, which cannot be told anywhere in a text; "
                        "use anywhere=False, or Matches(...)"
                    )
        return [self._one(text, self.answers[prompt.id]) for prompt, text in zip(prompts, texts, strict=True)]

    def _one(self, text: str, answers: Sequence[str]) -> float:
        right = [normalised(answer) for answer in answers]
        if self.anywhere:
            return float(any(f" {answer} " in f" {normalised(text)} " for answer in right))
        first = next((line for line in text.splitlines() if line.strip()), "")
        return float(bool(first) and normalised(first) in right)


@dataclass(frozen=True)
class SameTokens:
    """Share of a text's tokens that stand at their place in a reference too, counted over the longer of the two.

    1 for the same text. Of two greedy texts it says how far they run together: a ruined repair has 0, where a rate of
    "the behaviour is gone" has 1.

    Args:
        references: The text to compare with, for each prompt by its id.
        tokenizer: A Hugging Face tokenizer.
    """

    references: Mapping[str, str]
    tokenizer: Any = field(repr=False)

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the share for each text.

        Raises:
            ValueError: A prompt has no reference.
        """
        missing = [prompt.id for prompt in prompts if prompt.id not in self.references]
        if missing:
            raise ValueError(
                f"SameTokens: there is no reference for {', '.join(missing[:5])}; give references={{prompt.id: text}}"
            )
        return [self._share(text, self.references[p.id]) for p, text in zip(prompts, texts, strict=True)]

    def _share(self, text: str, other: str) -> float:
        ours, theirs = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, other))
        longer = max(len(ours), len(theirs))
        return sum(a == b for a, b in zip(ours, theirs, strict=False)) / longer if longer else 1.0

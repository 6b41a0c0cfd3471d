"""The language of a text, told by its function words."""

import json
from dataclasses import dataclass

from xmodel_steer.evaluation.scorers.phrases import words
from xmodel_steer.files.wheels import shipped

#: Frequent function words of each language. A word of several languages counts for each.
FUNCTION_WORDS = {name: frozenset(text.split()) for name, text in json.loads(shipped("function_words.json")).items()}


@dataclass(frozen=True)
class Language:
    """A score of 1 if the text's function words are mostly of one language, else 0.

    Args:
        language: One of `FUNCTION_WORDS`.

    Raises:
        ValueError: The language is not among them.

    Example:
        >>> Language("french")("Il est dans la maison avec les enfants.")
        1.0
    """

    language: str

    def __post_init__(self) -> None:
        if self.language not in FUNCTION_WORDS:
            raise ValueError(f"Language: {self.language!r} is not one of {', '.join(FUNCTION_WORDS)}")

    def __call__(self, text: str) -> float:
        """Score one text 1 or 0; a tie of two languages scores 0."""
        spoken = words(text)
        counts = {name: sum(word in listed for word in spoken) for name, listed in FUNCTION_WORDS.items()}
        rival = max(count for name, count in counts.items() if name != self.language)
        return float(counts[self.language] > rival)

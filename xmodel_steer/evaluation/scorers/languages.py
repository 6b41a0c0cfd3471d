"""Which language a text is written in, by its function words."""

from dataclasses import dataclass

from xmodel_steer.evaluation.scorers.phrases import words

# Frequent function words of each language. A word that several of them have counts for each.
FUNCTION_WORDS = {
    "english": "the and of to that with his they this have from were she which would there been their you it for not are but",
    "french": "le les des une dans qui pour pas au avec sont ce cette aux elle nous vous ils être ses comme et est du que il mais",
    "german": "der die und ist nicht ein eine mit sich auf dem den von zu auch wie aus bei nach wird sind oder ich wir das",
    "spanish": "el los las más pero fue sus ya todo esta muy sin hasta donde y lo cuando porque había también hay con una que por para como su del se",
    "italian": "gli che di per sono della nel alla anche dei delle questo ma più suo stato dal è degli ho una con del su il lo",
    "portuguese": "os uma não em ao dos pelo são foi seu já ser muito nos está isso ele às eu antes que por para como mais das se",
}


@dataclass(frozen=True)
class Language:
    """1 when the text's function words are most often those of a language, else 0.

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
        """1 or 0 for one text; 0 where two languages tie."""
        found = words(text)
        counts = {name: sum(w in set(own.split()) for w in found) for name, own in FUNCTION_WORDS.items()}
        best = max(counts.values())
        return float(best > 0 and counts[self.language] == best and list(counts.values()).count(best) == 1)

"""What steering did: the behaviour in generated text, and the damage on neutral text."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from xmodel_steer.errors import PromptError
from xmodel_steer.metrics import Reference
from xmodel_steer.models import batches, encode, forward, layout, name_of
from xmodel_steer.prompts import PromptLike, as_prompts
from xmodel_steer.steering import Intervention, steering

Scorer = Callable[[str], float]

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """The words of a text, in lower case; apostrophes inside a word stay.

    Example:
        >>> words("It's Ann's 2nd day.")
        ["it's", "ann's", 'nd', 'day']
    """
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


@dataclass(frozen=True)
class WordBalance:
    """Balance of two word lists: (p - n) / (p + n), from -1 to 1, and 0 without any such word.

    Counts words, and knows nothing of negation or irony: it measures a tendency over many texts.

    Args:
        positive: Words that count for the behaviour, in lower case.
        negative: Words that count against it.

    Example:
        >>> WordBalance(frozenset({"good"}), frozenset({"bad"}))("Good, good, bad... good.")
        0.5
    """

    positive: frozenset[str]
    negative: frozenset[str]

    def __call__(self, text: str) -> float:
        found = words(text)
        p = sum(word in self.positive for word in found)
        n = sum(word in self.negative for word in found)
        return (p - n) / (p + n) if p + n else 0.0


@dataclass(frozen=True)
class Contains:
    """1 when the text contains one of the strings, else 0; case does not count unless asked."""

    strings: tuple[str, ...]
    case_sensitive: bool = False

    def __call__(self, text: str) -> float:
        if self.case_sensitive:
            return float(any(s in text for s in self.strings))
        return float(any(s.casefold() in text.casefold() for s in self.strings))


@dataclass(frozen=True)
class Matches:
    """1 when a regular expression matches somewhere in the text, else 0.

    Raises:
        ValueError: The pattern is not a regular expression.
    """

    pattern: str
    flags: int = re.IGNORECASE

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Matches: {self.pattern!r} is not a regular expression: {error}") from None

    def __call__(self, text: str) -> float:
        return float(re.search(self.pattern, text, self.flags) is not None)


# The most frequent function words of each language, those shared with another of them left out.
FUNCTION_WORDS = {
    "english": "the and of to that was with his they this have from were she which would there been their you it for not are but",
    "french": "le les des une dans qui pour sur pas au avec sont mais ce cette aux il elle nous vous ils être ses comme et est du",
    "german": "der die das und ist nicht ein eine mit sich auf dem den von zu auch wie aus bei nach wird sind oder ich wir",
    "spanish": "el los las por con una su para como más pero fue este sus ya todo esta muy sin sobre también hasta donde y lo",
    "italian": "il gli che di per sono della nel alla anche dei delle questo come ma più suo stato dal ha è non nella degli",
    "portuguese": "os uma não em mais ao das dos pela pelo são foi seu sua também já ser quando muito nos está isso ele às",
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
        found = words(text)
        counts = {name: sum(w in set(own.split()) for w in found) for name, own in FUNCTION_WORDS.items()}
        best = max(counts.values())
        return float(best > 0 and counts[self.language] == best and list(counts.values()).count(best) == 1)


def score_texts(scorer: Scorer, texts: Sequence[str]) -> np.ndarray:
    """The score of each text.

    Raises:
        ValueError: The scorer returned something that is not a finite number.
    """
    scores = np.array([float(scorer(text)) for text in texts])
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"scorer {scorer!r}: gave {scores[bad]} for {texts[bad][:60]!r}; it must give a finite number for any text")
    return scores


@dataclass(frozen=True, eq=False)
class SideEffect:
    """Damage of an intervention on neutral text, one entry per document.

    Args:
        kl: KL(unsteered ‖ steered) summed over the document's predicted tokens, in nats.
        loss: Negative log-likelihood of the document under the steered model, summed, in nats.
        tokens: Number of predicted tokens.
    """

    kl: np.ndarray = field(repr=False)
    loss: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)

    @property
    def mean_kl(self) -> float:
        """KL from the unsteered model per token, in nats."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token."""
        return float(np.exp(min(self.loss.sum() / self.tokens.sum(), 700.0)))


def side_effects(
    model: Any,
    interventions: Sequence[Sequence[Intervention]],
    texts: Iterable[PromptLike],
    *,
    max_tokens: int = 64,
    batch_size: int = 8,
    progress: bool = True,
) -> list[SideEffect]:
    """KL from the unsteered model and perplexity on neutral text, for several interventions.

    All are measured on the same text, batch by batch, so that the unsteered logits are computed
    once and never all held. A document's first token predicts but is not predicted.

    Args:
        model: The model that is steered.
        interventions: One list of interventions per setting; an empty list is the unsteered model.
        texts: Neutral text, none of it used to fit anything.
        max_tokens: Tokens read of each document.
        batch_size: Documents at a time.
        progress: Show a progress bar.

    Raises:
        PromptError: There are no documents of two tokens or more.
    """
    encodings = [e for e in encode(model, as_prompts(list(texts)), max_tokens=max_tokens) if len(e.ids) > 1]
    if not encodings:
        raise PromptError("side_effects: needs neutral text of at least two tokens")
    n = len(encodings)
    kl, loss = np.zeros((len(interventions), n)), np.zeros((len(interventions), n))
    tokens = np.array([len(e.ids) - 1 for e in encodings])
    work = batches(model, encodings, batch_size)
    with tqdm(
        total=int(tokens.sum()) * len(interventions), unit="tok", desc=f"KL and perplexity {name_of(model)}", disable=not progress, delay=2
    ) as bar:
        for batch in work:
            predicted = batch.mask[:, 1:].bool()
            following = batch.ids[:, 1:][predicted]
            row = torch.arange(len(batch.rows), device=batch.ids.device)[:, None].expand_as(predicted)[predicted].cpu()

            def logits() -> torch.Tensor:
                with layout(batch.rows, batch.mask.sum(-1)):
                    made, _ = forward(model, batch.ids, batch.mask, logits="all")
                assert made is not None
                return made[:, :-1][predicted]

            unsteered = logits()
            reference = Reference.of(unsteered)
            for k, setting in enumerate(interventions):
                if setting:
                    with steering(model, setting):
                        steered = logits()
                else:
                    steered = unsteered
                per_token, nll = reference.compare(steered, following)
                for sums, values in ((kl, per_token), (loss, nll)):
                    sums[k, list(batch.rows)] = torch.zeros(len(batch.rows)).index_add(0, row, values.cpu()).numpy()
                bar.update(int(predicted.sum()))
    return [SideEffect(kl[k], loss[k], tokens) for k in range(len(interventions))]

"""Concepts that ship with the package: contrasting texts, and scorers for other texts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from xmodel_steer.activations.reading import Tokens
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.behaviours.generated import GeneratedText
from xmodel_steer.evaluation.behaviours.likelihoods import AnswerLogOdds
from xmodel_steer.evaluation.scorers.languages import Language
from xmodel_steer.evaluation.scorers.phrases import Contains, Matches, WordBalance
from xmodel_steer.evaluation.scorers.text import Scorer
from xmodel_steer.files.wheels import packaged_files
from xmodel_steer.recipe.preparing import Measurable
from xmodel_steer.studies.shipping import read_table

PAIRS = 240  # largest number of pairs taken from a downloaded set
LONGEST = 900  # largest number of characters of a question with an answer


@dataclass(frozen=True)
class Concept:
    """A concept: its contrast pairs, and the score that measures it.

    Args:
        name: Name of the concept.
        contrast: Texts with the concept and without it.
        unit: The meaning and the unit of the score.
        scorer: The score of a text. Without one, the score is the log-odds of two answers on held-out pairs.
        tokens: The tokens of the pairs that count; see `capture`.
        prompts: Beginnings of sentences to continue, if there is a scorer.
        instructions: Words that ask for the concept, and for its opposite, if there is a scorer.
    """

    name: str
    contrast: ContrastSet = field(repr=False)
    unit: str
    scorer: Scorer | None = None
    tokens: Tokens = "mean"
    prompts: tuple[Prompt, ...] = field(repr=False, default=())
    instructions: tuple[str, str] = ("", "")

    def behaviour(
        self, prompts: Sequence[Prompt], validation: Sequence[Prompt] = (), *, max_new_tokens: int = 24, batch_size: int = 192
    ) -> Measurable:  # fmt: skip
        """Return the behaviour to measure: generated text with a scorer, else answers' log-odds.

        Args:
            prompts: Texts to continue, if there is a scorer.
            validation: Other texts, which choose; by default a third of the prompts does.
            max_new_tokens: Length of the continuations.
            batch_size: Texts at a time.
        """
        if self.scorer is None:
            return AnswerLogOdds.from_contrast
        settings = max_new_tokens, batch_size, self.unit
        return GeneratedText(tuple(prompts), self.scorer, *settings, validation=tuple(validation))


# Unit and scorer of each concept with scored texts; None means the balance of its words in ``data/words``.
_SCORED: dict[str, tuple[str, Scorer | None]] = {
    "sentiment": ("sentiment, positive minus negative words (−1 to 1)", None),
    "first-person": ("first-person minus third-person pronouns (−1 to 1)", None),
    "tense": ("past minus future verb forms (−1 to 1)", None),
    "french": ("share of texts in French", Language("french")),
    "questions": ("share of texts with a question mark", Contains(("?",))),
    "formality": ("formal minus informal words (−1 to 1)", None),
    "anger": ("angry minus calm words (−1 to 1)", None),
    "politeness": ("polite minus rude words (−1 to 1)", None),
    "shouting": ("share of texts with two words in capitals", Matches(r"\b[A-Z]{3,}\b.*\b[A-Z]{3,}\b", int(re.DOTALL))),
    "numbers": ("share of texts with a digit", Matches(r"\d")),
    "dialogue": ("share of texts with quotation marks", Matches('["“”]')),
}
_INSTRUCTIONS: dict[str, tuple[str, str]] = {  # what a user would write instead
    "sentiment": ("Write joyfully.", "Write sadly."),
    "first-person": ("Write in the first person.", "Write in the third person."),
    "tense": ("Write in the past tense.", "Write in the future tense."),
    "french": ("Écris en français.", "Write in English."),
    "questions": ("Ask questions.", "Ask no questions."),
    "formality": ("Write formally.", "Write informally."),
    "anger": ("Write angrily.", "Write calmly."),
    "politeness": ("Write politely.", "Write rudely."),
    "shouting": ("WRITE IN CAPITALS.", "Write in small letters."),
    "numbers": ("Write with numbers.", "Write without numbers."),
    "dialogue": ("Write a dialogue.", "Write without dialogue."),
}
_WRITTEN = ("sentiment", "first-person", "tense")  # written sentence by sentence; the other concepts combine parts
_ANSWERED = {  # concepts with two answers to each question, and their files (Rimsky et al. 2024, arXiv 2312.06681)
    "sycophancy": "sycophancy.json",
    "corrigibility": "corrigible-neutral-HHH.json",
    "survival-instinct": "survival-instinct.json",
}
READ = tuple(_SCORED)  # concepts with a scorer
CONCEPTS = (*READ, *_ANSWERED)


def concept(name: str) -> Concept:
    """Return a concept; download its pairs where they do not ship.

    Args:
        name: One of `CONCEPTS`.

    Raises:
        PromptError: No concept has this name.
        DownloadError: Its pairs cannot be fetched.
    """
    if name not in CONCEPTS:
        raise PromptError(f"concept {name!r} is unknown; choose one of {', '.join(CONCEPTS)}")
    if name in _ANSWERED:
        return _answered(name)
    unit, scorer = _SCORED[name]
    if scorer is None:
        lists = read_table(f"words/{name}.json")
        scorer = WordBalance(frozenset(lists["positive"]), frozenset(lists["negative"]))
    if name in _WRITTEN:
        contrast = ContrastSet.from_records(read_table(f"behaviours/{name}/contrast.jsonl"))
        return Concept(name, contrast, unit, scorer, prompts=_prompts(name), instructions=_INSTRUCTIONS[name])
    parts = read_table("concepts.json")
    pairs = [tuple(map(" ".join, zip(*pair, strict=True))) for pair in product(*parts["contrast"][name])]
    contrast = ContrastSet.from_records([{"positive": p, "negative": n} for p, n in pairs])
    return Concept(name, contrast, unit, scorer, prompts=openings(), instructions=_INSTRUCTIONS[name])


def _answered(name: str) -> Concept:
    """Make a concept of questions that end in an answer's letter, which CAA reads."""
    rows = json.loads((packaged_files("caa") / _ANSWERED[name]).read_text(encoding="utf-8"))
    short = list({row["positive"]: row for row in rows if max(map(len, row.values())) <= LONGEST}.values())
    chosen = [short[i] for i in np.random.default_rng(0).permutation(len(short))[:PAIRS]]
    contrast = ContrastSet.from_records([{side: text.rstrip(") ") for side, text in row.items()} for row in chosen])
    return Concept(name, contrast, AnswerLogOdds.unit, tokens="last")


def _prompts(name: str) -> tuple[Prompt, ...]:
    """Read the beginnings of sentences that were written for a concept."""
    return tuple(Prompt(text=row["text"]) for row in read_table(f"behaviours/{name}/prompts.jsonl"))


def openings(count: int | None = None) -> tuple[Prompt, ...]:
    """Return the beginnings of sentences that ship with the package, for any concept.

    Args:
        count: Number of prompts; all by default.
    """
    prompts = list({p.content_key(): p for name in _WRITTEN for p in _prompts(name)}.values())
    return tuple(prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))[:count])

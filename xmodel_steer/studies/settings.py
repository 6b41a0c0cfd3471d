"""Settings shared by all studies: text, sizes and seeds."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xmodel_steer.core.directions import require_random
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.files.resume import spared
from xmodel_steer.files.wheels import general_text
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.models.facts import name_of


@dataclass(frozen=True, eq=False)
class Settings:
    """Text, sizes and seeds of a study.

    Args:
        general: General text for maps; packaged text by default.
        neutral: Text for KL and perplexity, a third of which chooses layers in `transfer`; packaged text by default.
        documents: Numbers of packaged general and neutral texts.
        fitter: Fits the maps.
        random_seeds: Number of random vectors.
        validation: Number of validation tasks, or of validation requests of each kind.
        validation_tokens: Length of validation answers.
        neutral_tokens: Number of tokens read of each neutral text.
        batch_size: Texts generated at a time.
        also: A layer of the source and one of the target to try with each recipe's candidates, such as the paper's layers.
        recipes: More ways to carry every vector; see `Method`.
        seed: Seed of all choices.

    Raises:
        ValueError: There is no random vector.
    """

    general: Sequence[Prompt] | None = field(repr=False, default=None)
    neutral: Sequence[Prompt] | None = field(repr=False, default=None)
    documents: tuple[int, int] = (400, 60)
    fitter: Fitter = field(default_factory=Ridge)
    random_seeds: int = 3
    validation: int = 48
    validation_tokens: int = 16
    neutral_tokens: int = 32
    batch_size: int = 100
    also: tuple[int, int] | None = None
    recipes: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require_random("study", self.random_seeds)

    def texts(self) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
        """Return the general and the neutral text."""
        (count, neutral), passages = self.documents, general_text()
        return (
            tuple(passages[:-neutral][:count] if self.general is None else self.general),
            tuple(passages[-neutral:] if self.neutral is None else self.neutral),
        )

    def seeds(self) -> dict[str, Any]:
        """Record all seeds."""
        return {"split": self.seed, "random": [self.seed + k for k in range(self.random_seeds)]}

    def record(self) -> dict[str, Any]:
        """Record the sizes."""
        names = ("random_seeds", "validation", "validation_tokens", "neutral_tokens", "batch_size")
        return {"fitter": repr(self.fitter)} | {name: getattr(self, name) for name in names}


def end_of(model: Any) -> dict[str, Any]:
    """Record a model's name, depth and width."""
    return {"model": name_of(model), "layers": model.cfg.n_layers, "width": model.cfg.d_model}


class Clock:
    """Wall time of a study's parts in seconds; a resumed study includes the time spent before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Record the time since the last lap as a part's time."""
        now = time.perf_counter()
        self.seconds[part], self._last = round(now - self._last + spared(), 1), now

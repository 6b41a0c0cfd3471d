"""Settings of a transfer: how much is measured, and how a vector is found, carried and applied."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from torch import Tensor

from xmodel_steer.activations.reading import Tokens
from xmodel_steer.core.directions import Direction, difference_of_means, require_random
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt, Prompts
from xmodel_steer.evaluation.damage import neutral_positions
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.maps.anchors import RelativeAnchors
from xmodel_steer.maps.controls import ShuffledPairs
from xmodel_steer.maps.descent import Trained
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.ridge import Ridge

RECIPES = ONE_LAYER, CONTRAST_READ = "one layer", "contrast read"


@dataclass(frozen=True)
class Budget:
    """Sizes of a transfer: how much it reads and measures.

    Args:
        strengths: Strengths to run, in native norms; give both signs. Validation chooses the headline strength among the positive ones.
        fixed: Run every arm at ``strengths`` too. Without it only the native vector is, and the others at its KL alone,
            which takes about half the time.
        random_seeds: Number of random vectors.
        map_tokens: Tokens read of each document for the map, within both models' contexts.
        neutral_tokens: Tokens read of each neutral text.
        batch_size: Texts of a forward pass; neutral text takes at most 16.
        max_perplexity_ratio: Bound on perplexity over the unsteered one, for the choices.

    Raises:
        ValueError: No strength is positive, one is 0, or there is no random vector.
    """

    strengths: Sequence[float] = (-2.0, -1.0, 1.0, 2.0)
    fixed: bool = True
    random_seeds: int = 5
    map_tokens: int = 192
    neutral_tokens: int = 32
    batch_size: int = 32
    max_perplexity_ratio: float = 2.0

    def __post_init__(self) -> None:
        strengths = tuple(sorted({float(s) for s in self.strengths}))
        if not any(s > 0 for s in strengths) or 0 in strengths:
            raise ValueError(f"Budget: strengths must include a positive one and not 0, got {tuple(self.strengths)}")
        require_random("Budget", self.random_seeds)
        object.__setattr__(self, "strengths", strengths)

    @property
    def positive(self) -> list[float]:
        """The positive strengths, ascending."""
        return [s for s in self.strengths if s > 0]


@dataclass(frozen=True, eq=False)
class Method:
    """Ways to find, carry and apply a vector.

    Args:
        tokens: Tokens of a contrast prompt that count; see `capture`.
        direction: Makes a vector of the two sides' rows, in both models: `difference_of_means`, another one of `core` (of
            pairs: `principal_direction`), or a function of your own of two `Activations` and a ``label``.
        fitter: Fits the map.
        positions: Where to steer; see `Intervention`. Neutral text is steered at every token, or where a mask says how many, at as
            many from its second token on.
        recipes: More ways to carry the vector, each with its controls, as the recipe ``LABEL, NAME``. ``one layer``: from the best
            single layer of the source, where a stack was chosen; it says what the stack adds. ``contrast read``: by a map
            whose text has the contrast prompts, without their labels; it says what a map can carry that has read text of the kind.
        instructions: Words that ask for the behaviour, and words that ask for its opposite: the arm ``prompted``, at the KL that
            the words have. An empty one is not measured.

    Raises:
        PromptError: The fitter needs rows, and a transfer collects moments.
        ValueError: A mask of positions has rows, or steers nothing; or a recipe is unknown.
    """

    tokens: Tokens = "mean"
    direction: Direction = difference_of_means
    fitter: Fitter = field(default_factory=Ridge)
    positions: Positions = "all"
    recipes: Sequence[str] = ()
    instructions: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        inner = self.fitter.fitter if isinstance(self.fitter, ShuffledPairs) else self.fitter
        if isinstance(inner, (RelativeAnchors, Trained)):
            raise PromptError(
                f"Method: {type(inner).__name__} is fitted on rows, transfer collects moments; give Ridge(), ReducedRank(...) or Procrustes()"
            )
        names = (self.recipes,) if isinstance(self.recipes, str) else tuple(self.recipes)
        if unknown := [name for name in names if name not in RECIPES]:
            raise ValueError(f"Method: recipes are {' and '.join(map(repr, RECIPES))}, got {unknown}")
        object.__setattr__(self, "recipes", names)
        neutral_positions(self.positions)  # refuses a mask of rows: prompts are split in a transfer

    def __repr__(self) -> str:
        direction = getattr(self.direction, "__name__", repr(self.direction))
        positions = f"a mask of {len(self.positions)}" if isinstance(self.positions, Tensor) else repr(self.positions)
        return f"Method({self.tokens!r}, {direction}, {type(self.fitter).__name__}, {positions})"


@dataclass(frozen=True, eq=False)
class GeneralText:
    """Text for the map, and other text for KL and perplexity.

    Args:
        map: Text for the map.
        neutral: Neutral text: a third chooses layers and strength, the rest is reported on.
        moments: Moments that were collected from ``map`` earlier; the models then do not read it. ``map`` may be left out, and is
            else only checked against the other sets and recorded.
    """

    map: tuple[Prompt, ...] = field(repr=False)
    neutral: tuple[Prompt, ...] = field(repr=False)
    moments: Moments | None = None

    @classmethod
    def of(
        cls, texts: "Prompts | GeneralText", neutral: Prompts | None = None, moments: Moments | None = None
    ) -> "GeneralText":
        """Make it of any prompts.

        Args:
            texts: Text for the map; the last tenth (3 to 48 documents) becomes neutral text where none is given.
            neutral: Neutral text.
            moments: Moments that were collected earlier.

        Raises:
            PromptError: Moments come without neutral text, or there are fewer than 3 neutral texts.
        """
        if isinstance(texts, GeneralText):
            return texts
        prompts = as_prompts(texts, what="texts")
        if neutral is not None:
            text = cls(prompts, as_prompts(neutral, what="neutral texts"), moments)
        elif moments is not None:
            raise PromptError("GeneralText: moments were given without texts; give neutral= for KL and perplexity")
        else:
            kept = max(3, min(48, len(prompts) // 10))
            text = cls(prompts[:-kept], prompts[-kept:])
        if len(text.neutral) < 3:
            raise PromptError(f"GeneralText: needs at least 3 neutral texts, got {len(text.neutral)}")
        return text

    @property
    def calibration(self) -> tuple[Prompt, ...]:
        """The third of the neutral text that choices are made on."""
        return self.neutral[: len(self.neutral) // 3]

    @property
    def reported(self) -> tuple[Prompt, ...]:
        """The neutral text that is reported on."""
        return self.neutral[len(self.neutral) // 3 :]


def versions() -> dict[str, str]:
    """List the versions of the programs that a result depends on."""
    names = ("xmodel-steer", "transformer-lens", "torch", "transformers", "numpy")
    numbers: dict[str, Any] = {"python": platform.python_version()}
    for name in names:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = "unknown"
    return numbers

"""Interventions and replacements: what to do, at which site, where in the text."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from xmodel_steer.core.spaces import Space, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add, Gate, Operator
from xmodel_steer.interventions.positions import Positions, check_positions


@dataclass(frozen=True, eq=False)
class Intervention:
    """A vector, what to do with it, and at which positions.

    Args:
        vector: The direction; its space says at which site of which model.
        operator: `Add`, `Ablate` or `Clamp`.
        positions: ``"all"``: every token of the text. ``"prompt"``: the prompt's tokens.
            ``"generated"``: the tokens after it. ``"last"``: the prompt's last token. Several of
            them: a tuple, such as ``("last", "generated")``. Or a boolean mask over text
            positions, ``(tokens,)`` or ``(prompts, tokens)``, false beyond its end. In a plain forward
            pass the whole text is the prompt.
        prompts: Steer only these prompts, by their number in the list that is passed to `generate`
            or `capture` (in a plain forward pass: rows of the batch); all of them by default.
            One batch can then hold many arms.
        gate: Steer only rows, or texts, of a class that another vector of this site tells; all by default.

    Raises:
        SpaceMismatchError: The gate's vector lives elsewhere.
    """

    vector: SteeringVector
    operator: Operator = Add()
    positions: Positions = "all"
    prompts: frozenset[int] | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if self.gate is not None:
            require_same_space(self.space, self.gate.vector.space, "gate")

    @property
    def space(self) -> Space:
        """Where it acts."""
        return self.vector.space


@dataclass(frozen=True, eq=False)
class Reading:
    """What a forward pass reads.

    Args:
        ids: The new tokens.
        position: The text position of each, -1 at padding.
        rows: Which prompt each row is, where that is known. In a decode rows whose texts have ended leave the batch.
    """

    ids: Int[Tensor, "batch new"]
    position: Int[Tensor, "batch new"]
    rows: tuple[int, ...] | None = None


# From rows (batch, new, d) in float32 and what is read: new rows, and where they hold (None: everywhere).
Writer = Callable[[Tensor, Reading], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Replacement:
    """Put other activations in the place of a site's: x → what a function gives for what is read.

    Args:
        space: The site of the model that is written to.
        values: Called in every forward pass with the site's rows ``(batch, new, d)`` and the `Reading`; gives new rows,
            and where they hold: elsewhere the model's own stay. See `replacement` for the mapped activations of another
            model, a mean, and noise.
        positions: Where in the text, as for `Intervention`.
        prompts: In which prompts, as for `Intervention`.
    """

    space: Space
    values: Writer
    positions: Positions = "all"
    prompts: frozenset[int] | None = None

    def __post_init__(self) -> None:
        check_positions(self.positions)


Step = Intervention | Replacement

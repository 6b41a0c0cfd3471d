"""Interventions and replacements: a change, its site, and its positions in the text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from jaxtyping import Int
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Space, Stack, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add, Gate, Operator
from xmodel_steer.interventions.positions import Positions, check_positions
from xmodel_steer.models.hooking import Block


def require_one_site(space: Space, what: str) -> None:
    """Refuse to write to a stack in one step.

    Raises:
        SiteError: The space joins several sites.
    """
    if isinstance(space.site, Stack):
        raise SiteError(
            f"{what}: acts at one site, and {space} joins {len(space.site.members)}; "
            "give steering the vector itself, or one step for each of vector.members()"
        )


@dataclass(frozen=True, eq=False)
class Intervention:
    """A vector, an operator, and the positions where it acts.

    Args:
        vector: The direction; its space names the site and the model.
        operator: `Add`, `Ablate`, `Rotate` or `Clamp`.
        positions: ``"all"``: every token of the text. ``"prompt"``: the prompt's tokens. ``"generated"``: the tokens
            after the prompt. ``"last"``: the prompt's last token. A tuple combines several, such as
            ``("last", "generated")``. Or a boolean mask over text positions, ``(tokens,)`` or ``(prompts, tokens)``,
            false beyond its end. In a plain forward pass the whole text is the prompt.
        prompts: Steer only these prompts, given by index in the list passed to `generate` or `capture` (in a plain
            forward pass: rows of the batch); all by default. One batch can then hold many arms.
        gate: Steer only rows, or texts, of one class, told by a vector of the same site; all by default.
        schedule: Share of the change for each generated token: number k is for the k-th token after the prompt, counted
            from 0, and the last one for all that follow, ``x → x + schedule[k] (edit(x) - x)``. The prompt's tokens get the
            whole change; ``positions`` can leave them out. ``(1.0, 0.5, 0.0)`` ends after two tokens. By default 1.

    Raises:
        TypeError: A field has another type.
        ValueError: The schedule is empty or not finite.
        SpaceMismatchError: The gate's vector is of another space.
    """

    vector: SteeringVector
    operator: Operator = Add()
    positions: Positions = "all"
    prompts: frozenset[int] | None = None
    gate: Gate | None = None
    schedule: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        require_type("Intervention: vector", SteeringVector, self.vector)
        if isinstance(self.operator, type) or not isinstance(self.operator, Operator):
            raise TypeError(f"Intervention: operator takes a value such as Add(2.0), got {self.operator!r}")
        require_type("Intervention: gate", (Gate, type(None)), self.gate, takes="a Gate")
        check_positions(self.positions)
        require_type("Intervention: schedule", tuple, self.schedule, takes="a tuple of numbers")
        require_type("Intervention: schedule", Real, *self.schedule, takes="numbers")
        if not self.schedule or not all(map(math.isfinite, self.schedule)):
            raise ValueError(f"Intervention: schedule needs one finite number or more, got {self.schedule!r}")
        require_one_site(self.space, "Intervention")
        if self.gate is not None:
            require_same_space(self.space, self.gate.vector.space, "gate")

    @property
    def space(self) -> Space:
        """The space that the intervention writes to."""
        return self.vector.space


@dataclass(frozen=True, eq=False)
class Reading:
    """The new tokens of a forward pass.

    Args:
        ids: Ids of the new tokens.
        position: The text position of each token, -1 at padding.
        rows: The prompt of each row, where known. While generating, rows whose texts have ended leave the batch.
        block: The block of `steering`: what a function remembers of a text it must keep there, since several threads
            and tasks may be inside.
    """

    ids: Int[Tensor, "batch new"]
    position: Int[Tensor, "batch new"]
    rows: tuple[int, ...] | None = None
    block: Block | None = None


# From rows (batch, new, d) in float32 and the pass's tokens: new rows, and a mask of those that hold (None: all).
Writer = Callable[[Tensor, Reading], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Replacement:
    """A site and the function whose values replace its activations.

    Args:
        space: The site that is written to.
        values: A function called in every forward pass with the site's rows ``(batch, new, d)`` and the `Reading`. It
            returns new rows and a mask of those to write; other rows stay. `mapped_source`, `mean_of` and
            `noise_like` make such replacements.
        positions: Where in the text, as for `Intervention`.
        prompts: The prompts, as for `Intervention`.
    """

    space: Space
    values: Writer
    positions: Positions = "all"
    prompts: frozenset[int] | None = None

    def __post_init__(self) -> None:
        require_type("Replacement: space", Space, self.space)
        require_one_site(self.space, "Replacement")
        check_positions(self.positions)


Step = Intervention | Replacement

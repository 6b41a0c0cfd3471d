"""Operators and gates: changes to a row of the residual stream, and conditions for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, SupportsFloat, runtime_checkable

import torch
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.positions import Positions, check_positions

# A function from rows (..., d) to new rows; it never writes into its argument.
Edit = Callable[[Tensor], Tensor]
# The same for a whole residual stream (batch, new tokens, d), of which it edits the selected rows.
Write = Callable[[Tensor], Tensor]


@runtime_checkable
class Operator(Protocol):
    """A change at a site: a new residual stream from the old one and a vector."""

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector; the edit works in float32."""
        ...


@dataclass(frozen=True)
class Add:
    """x → x + strength · v (Turner et al. 2023, arXiv 2308.10248; the paper's steering).

    Args:
        strength: In units of the vector; negative steers away. At 0 nothing changes, bit for bit.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        require_type("Add: strength", SupportsFloat, self.strength, takes="a number")

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector."""
        step = self.strength * vector.direction.to(torch.float32)
        return lambda rows: rows + step.to(rows.device) if self.strength else rows


@dataclass(frozen=True)
class Ablate:
    """x → x - (x·v) v / |v|²: no component along v remains (Arditi et al. 2024, arXiv 2406.11717)."""

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector; refuse a zero vector."""
        if vector.norm() == 0:
            raise ValueError(f"Ablate: {vector.label!r} is a zero vector, it has no direction to remove")
        unit = (vector.direction.to(torch.float64) / vector.norm()).to(torch.float32)
        return lambda rows: rows - (rows @ unit.to(rows.device))[..., None] * unit.to(rows.device)


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition: act only on rows, or in texts, of one class (Lee et al. 2024, arXiv 2409.05907).

    A row x belongs to the class on whose side of the midpoint of the two class means its projection w·x lies, with w
    the vector's covector (``SteeringVector.covector``); on the midpoint it belongs to neither. Other rows stay bit-equal.

    With ``positions``, the gate classifies the text instead of the row, by the mean projection at these tokens of the
    prompt. Each token uses those read up to and with it. Before the first of them the gate is shut.

    Args:
        vector: The vector that separates the classes: a difference of means, native or transported, with its scale. It is
            read at the site that is written to, before the same intervention writes there.
        side: The class that is acted on.
        positions: The tokens of the prompt that are read, as for `Intervention`; by default the row that is written.
            Text position 0, an attention sink, is read only where a mask selects it; chat template tokens are read.

    Example:
        >>> Intervention(vector, Add(2.0), "last", gate=Gate(harmful, "positive"))        # doctest: +SKIP
        >>> Intervention(vector, Add(2.0), gate=Gate(harmful, positions="prompt"))        # doctest: +SKIP
    """

    vector: SteeringVector
    side: Literal["positive", "negative"] = "positive"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        require_type("Gate: vector", SteeringVector, self.vector)
        _check_side("Gate: side", self.side)
        if self.positions is not None:
            check_positions(self.positions)

    def prepare(self) -> Callable[[Tensor], Tensor]:
        """Return a function giving each row's signed margin (negative: other class).

        Rows are ``(..., d)``.
        """
        w, high, low = _classes(self.vector, "Gate")
        side, middle = (1.0 if (self.side == "positive") == (high > low) else -1.0), (high + low) / 2
        return lambda rows: side * (rows @ w.to(rows.device) - middle)


def _check_side(what: str, side: str) -> None:
    if side not in ("positive", "negative"):
        raise ValueError(f"{what} must be 'positive' or 'negative', got {side!r}")


def _classes(vector: SteeringVector, what: str) -> tuple[Tensor, float, float]:
    """Return the covector in float32, and the class means' projections on it."""
    if vector.positive_mean is None or vector.negative_mean is None:
        raise ValueError(
            f"{what}: {vector.label!r} has no class means; use a difference of means, native or transported"
        )
    w = vector.covector()
    high, low = (float(w @ mean.to(torch.float64)) for mean in (vector.positive_mean, vector.negative_mean))
    return w.to(torch.float32), high, low


@dataclass(frozen=True)
class Clamp:
    """x → x + overshoot · (p_to - p) v: move rows of the other class to a class mean.

    With w the vector's covector (``SteeringVector.covector``, w·v = 1 in standardised coordinates), p = w·x is the
    row's projection, p₊ and p₋ are those of the class means. Rows whose p is on the other class's side of the
    midpoint (p₊ + p₋) / 2 move; other rows stay bit-equal.

    Args:
        to: The class whose mean the projection moves to.
        gate: Move only rows on the other class's side; False moves every row.
        overshoot: 1 lands on the mean, more moves beyond it.
    """

    to: Literal["positive", "negative"] = "negative"
    gate: bool = True
    overshoot: float = 1.0

    def __post_init__(self) -> None:
        _check_side("Clamp: to", self.to)
        require_type("Clamp: gate", bool, self.gate)
        require_type("Clamp: overshoot", SupportsFloat, self.overshoot, takes="a number")

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector, which needs class means and scale."""
        w, high, low = _classes(vector, "Clamp")
        goal, v = (high if self.to == "positive" else low), vector.direction.to(torch.float32)
        other = Gate(vector, "negative" if self.to == "positive" else "positive").prepare()

        def edit(rows: Tensor) -> Tensor:
            gap = goal - rows @ w.to(rows.device)
            moved = rows + (self.overshoot * gap)[..., None] * v.to(rows.device)
            return torch.where((other(rows) > 0)[..., None], moved, rows) if self.gate else moved

        return edit

"""What an intervention does to a row of the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.positions import Positions, check_positions

# A function from rows (..., d) to new rows; it never writes into those it was given.
Edit = Callable[[Tensor], Tensor]
# The same for a whole residual stream (batch, new tokens, d): it edits the rows that are meant.
Write = Callable[[Tensor], Tensor]


@runtime_checkable
class Operator(Protocol):
    """What to do at a site: a new residual stream from the old one and a vector."""

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector; it works in float32."""
        ...


@dataclass(frozen=True)
class Add:
    """x → x + strength · v (Turner et al. 2023, arXiv 2308.10248; the paper's steering).

    Args:
        strength: In units of the vector; negative steers away. At 0 nothing is touched.
    """

    strength: float = 1.0

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector."""
        step = self.strength * vector.direction.to(torch.float32)
        return lambda rows: rows + step.to(rows.device) if self.strength else rows


@dataclass(frozen=True)
class Ablate:
    """x → x - (x·v) v / |v|²: nothing is left along v (Arditi et al. 2024, arXiv 2406.11717)."""

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector; refuse a zero one."""
        if vector.norm() == 0:
            raise ValueError(f"Ablate: {vector.label!r} is a zero vector, it has no direction to remove")
        unit = (vector.direction.to(torch.float64) / vector.norm()).to(torch.float32)
        return lambda rows: rows - (rows @ unit.to(rows.device))[..., None] * unit.to(rows.device)


@dataclass(frozen=True, eq=False)
class Gate:
    """Act only on rows of one class, or only in texts of one class (conditional steering: Lee et al. 2024, arXiv 2409.05907).

    With w the vector's covector (``SteeringVector.covector``), a row x is of the class on whose side of the midpoint of the two
    class means its projection w·x lies; on the midpoint it is of neither. Rows of the other class stay bit-equal.

    With ``positions`` the text is told, not the row: by the mean projection of these of the prompt's tokens. As each token of
    the text knows those before it only, it goes by what has been read up to and with it; before the first of them the gate is shut.

    Args:
        vector: Tells the classes apart: a difference of means, native or transported, with its scale. It is read at the
            site that is written to, before anything is written there by the same intervention.
        side: The class that is acted on.
        positions: At which of the prompt's tokens it is read, as for `Intervention`; by default at the row that is to be written.
            Text position 0, an attention sink, is read only where a mask names it; tokens of a chat template are read.

    Example:
        >>> Intervention(vector, Add(2.0), "last", gate=Gate(harmful, "positive"))        # doctest: +SKIP
        >>> Intervention(vector, Add(2.0), gate=Gate(harmful, positions="prompt"))        # doctest: +SKIP
    """

    vector: SteeringVector
    side: Literal["positive", "negative"] = "positive"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        if self.side not in ("positive", "negative"):
            raise ValueError(f"Gate: side must be 'positive' or 'negative', got {self.side!r}")
        if self.positions is not None:
            check_positions(self.positions)

    def prepare(self) -> Callable[[Tensor], Tensor]:
        """Return a function giving each row's signed margin (negative: other class).

        Rows are ``(..., d)``.
        """
        w, high, low = _classes(self.vector, "Gate")
        side, middle = (1.0 if (self.side == "positive") == (high > low) else -1.0), (high + low) / 2
        return lambda rows: side * (rows @ w.to(rows.device) - middle)


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
    """Move the projection on the direction to a class mean, where a gate says so.

    With w the vector's covector (``SteeringVector.covector``, w·v = 1 in standardised
    coordinates), p = w·x, p₊ and p₋ the projections of the class means:
    x → x + overshoot · (p_to - p) v where p lies on the other class's side of the midpoint
    (p₊ + p₋) / 2; other rows stay bit-equal.

    Args:
        to: The class whose mean the projection moves to.
        gate: Only move rows on the other class's side; False moves every row.
        overshoot: 1 lands on the mean, more goes beyond it.
    """

    to: Literal["positive", "negative"] = "negative"
    gate: bool = True
    overshoot: float = 1.0

    def __post_init__(self) -> None:
        if self.to not in ("positive", "negative"):
            raise ValueError(f"Clamp: to must be 'positive' or 'negative', got {self.to!r}")

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

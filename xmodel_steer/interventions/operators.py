"""Operators and gates: changes to a row of the residual stream, and conditions for them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, SupportsFloat, runtime_checkable

import torch
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.positions import Positions, check_positions

# A function from rows (..., d) to new rows; it never writes into its argument.
Edit = Callable[[Tensor], Tensor]
# The same for a whole residual stream (batch, new tokens, d), of which it edits the selected rows.
Write = Callable[[Tensor], Tensor]


def placed(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that gives a tensor on another one's device.

    It is copied there once: a copy at every step of a decode would make a GPU wait for the processor.
    """
    copies: dict[torch.device, Tensor] = {}

    def copy(other: Tensor) -> Tensor:
        if other.device not in copies:
            copies[other.device] = tensor.to(other.device)
        return copies[other.device]

    return copy


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
        step = placed(self.strength * vector.direction.to(torch.float32))
        return lambda rows: rows + step(rows) if self.strength else rows


@dataclass(frozen=True, repr=False)
class Ablate:
    """x → x - (x·v) v / |v|²: no component along v remains (Arditi et al. 2024, arXiv 2406.11717).

    With further directions, no component in the space that they span with v remains: x → x - QQᵀx, with the orthonormal
    columns of Q a basis of it. Their order and lengths do not matter.

    Args:
        also: More vectors of the same space.
    """

    also: tuple[SteeringVector, ...] = ()

    def __post_init__(self) -> None:
        require_type("Ablate: also", tuple, self.also, takes="a tuple of vectors")
        require_type("Ablate: also", SteeringVector, *self.also)

    def __repr__(self) -> str:
        return f"Ablate({self.also!r})" if self.also else "Ablate()"

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector; refuse zero and dependent directions."""
        basis = [placed(unit) for unit in _basis("Ablate", vector, self.also)]

        def edit(rows: Tensor) -> Tensor:
            for unit in basis:
                rows = rows - (rows @ unit(rows))[..., None] * unit(rows)
            return rows

        return edit


def _basis(what: str, vector: SteeringVector, others: Sequence[SteeringVector]) -> list[Tensor]:
    """Make an orthonormal basis of some directions, in float32, by Gram-Schmidt in float64."""
    basis: list[Tensor] = []
    for v in (vector, *others):
        require_same_space(vector.space, v.space, what)
        if v.norm() == 0:
            raise ValueError(f"{what}: {v.label!r} is a zero vector, it has no direction")
        rest = v.direction.to(torch.float64) / v.norm()
        for unit in basis:
            rest = rest - (rest @ unit) * unit
        if rest.norm() < 1e-3:
            raise ValueError(f"{what}: {v.label!r} lies within 0.06 degrees of the span of the others; leave it out")
        basis.append(rest / rest.norm() if basis else rest)
    return [unit.to(torch.float32) for unit in basis]


@dataclass(frozen=True, repr=False)
class Rotate:
    """Turn rows towards the vector and keep their norm: angular steering, and addition that keeps the norm.

    In the plane of the row x and the vector v, x has the length r = |x| and the angle φ to v. It gets another angle:

    - ``by``: φ - by, not beyond v or -v. At 0 nothing changes, bit for bit.
    - ``to``: the same for all rows, so that cos(x, v) = cos(to). Both leave rows parallel to v, which have no plane.
    - ``add``: that of x + add · v, so x → |x| (x + add · v) / |x + add · v|, repeng's ``normalize=True``. 0 as for ``by``.

    A second vector fixes the plane instead, spanned by b₁ = v / |v| and its part b₂ orthogonal to v: only the row's
    projection on it turns, with angles from b₁ towards b₂, and ``by`` has no limit. ``to`` is then the angular steering of
    Vu & Nguyen 2025 (arXiv 2510.26243): x → x - Px + |Px| (cos(to) b₁ + sin(to) b₂).

    Args:
        by: Degrees; negative turns away.
        to: Degrees from the vector.
        add: Strength in units of the vector, as in `Add`.
        plane: A second vector of the same space; the paper's is the first principal component of all layers' candidates.

    Raises:
        ValueError: Not exactly one of the three is given.

    Example:
        >>> Intervention(vector, Rotate(to=90.0), "generated")        # doctest: +SKIP
    """

    by: float | None = None
    to: float | None = None
    add: float | None = None
    plane: SteeringVector | None = None

    def __post_init__(self) -> None:
        angles = [value for value in (self.by, self.to, self.add) if value is not None]
        require_type("Rotate", SupportsFloat, *angles, takes="numbers")
        require_type("Rotate: plane", (SteeringVector, type(None)), self.plane, takes="a SteeringVector")
        if len(angles) != 1:
            raise ValueError(f"Rotate: give one of by, to and add, got {len(angles)}")

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value is not None]
        return f"Rotate({', '.join(given)})"

    def prepare(self, vector: SteeringVector) -> Edit:
        """Make the edit for one vector; refuse a zero or parallel one."""
        first, *others = map(placed, _basis("Rotate", vector, [] if self.plane is None else [self.plane]))
        length = vector.norm()

        def edit(rows: Tensor) -> Tensor:
            b1 = first(rows)
            x = rows @ b1
            rest = rows - x[..., None] * b1
            b2 = others[0](rows) if others else torch.nn.functional.normalize(rest, dim=-1)
            y = (rest * b2).sum(-1)
            angle = torch.atan2(y, x)
            if self.add is not None:
                turned = torch.atan2(y, x + self.add * length)
            elif self.to is not None:
                turned = torch.full_like(angle, math.radians(self.to))
            else:
                turned = angle - math.radians(self.by or 0.0)
                turned = turned if others else turned.clamp(0, math.pi)
            if self.add is None and not others:  # what a row along the vector has beyond it is rounding
                turned = torch.where(y > 1e-5 * x.abs(), turned, angle)
            size = torch.hypot(x, y)
            dx, dy = size * turned.cos() - x, size * turned.sin() - y
            return rows + dx[..., None] * b1 + dy[..., None] * b2

        return (lambda rows: rows) if 0 in (self.by, self.add) else edit


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
        covector = placed(w)
        return lambda rows: side * (rows @ covector(rows) - middle)


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
        goal, v = (high if self.to == "positive" else low), placed(vector.direction.to(torch.float32))
        covector = placed(w)
        other = Gate(vector, "negative" if self.to == "positive" else "positive").prepare()

        def edit(rows: Tensor) -> Tensor:
            gap = goal - rows @ covector(rows)
            moved = rows + (self.overshoot * gap)[..., None] * v(rows)
            return torch.where((other(rows) > 0)[..., None], moved, rows) if self.gate else moved

        return edit

"""Activations and steering vectors."""

from dataclasses import dataclass, replace
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import NonFiniteError
from xmodel_steer.core.spaces import Space, Stack, require_same_space
from xmodel_steer.core.tables import html_table


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of activations in one space.

    Args:
        values: One row per token, or per prompt.
        space: The space of the rows.
        rows: For each row its prompt's id, and the position after the last character of the row's
            token, in characters of the prompt's content (-1 for a template token).
    """

    values: Float[Tensor, "n d"]
    space: Space
    rows: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        require_type("Activations.values", Tensor, self.values)
        require_type("Activations.space", Space, self.space)
        if self.values.ndim != 2 or self.values.shape[1] != self.space.width:
            raise ValueError(
                f"Activations: values must be (rows, {self.space.width}) for {self.space}, got {tuple(self.values.shape)}"
            )
        if self.rows and len(self.rows) != len(self.values):
            raise ValueError(f"Activations: {len(self.values)} values but {len(self.rows)} row labels")

    def __repr__(self) -> str:
        return f"Activations({len(self):,} rows of {self.space.model} {self.space.site}, width {self.space.width})"

    def _repr_html_(self) -> str:
        prompts = len({prompt for prompt, _ in self.rows})
        rows = {"space": str(self.space), "rows": f"{len(self):,}", "prompts": f"{prompts:,}" if prompts else ""}
        return html_table("Activations", {**rows, "dtype": str(self.values.dtype).removeprefix("torch.")})

    def __len__(self) -> int:
        return len(self.values)

    def mean(self) -> Float[Tensor, " d"]:
        """Compute the mean over rows in float64."""
        return self.values.to(torch.float64).mean(0)


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in one space.

    ``v + w``, ``v - w``, ``2 * v`` and ``v / 2`` have no class means; ``-v`` exchanges the class means.

    Args:
        direction: The direction, in units of the residual stream.
        space: The direction's space.
        label: Name of the behaviour.
        positive_mean: Mean activation with the behaviour, where known.
        negative_mean: Mean activation without it, where known.
        counts: Numbers of rows of the two means.
        scale: Standard deviation of each dimension of the space over general text. Standardised
            coordinates divide by it, because a few huge dimensions of some residual streams would
            alone decide raw norms and cosines.
        origin: Origin of the vector, in words.
    """

    direction: Float[Tensor, " d"]
    space: Space
    label: str = ""
    positive_mean: Float[Tensor, " d"] | None = None
    negative_mean: Float[Tensor, " d"] | None = None
    counts: tuple[int, int] = (0, 0)
    scale: Float[Tensor, " d"] | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        require_type("SteeringVector.space", Space, self.space)
        require_type("SteeringVector.label", str, self.label)
        for name in ("direction", "positive_mean", "negative_mean", "scale"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            require_type(f"SteeringVector.{name}", Tensor, tensor)
            if tensor.shape != (self.space.width,):
                raise ValueError(
                    f"SteeringVector: {name} must have shape ({self.space.width},) for {self.space}, "
                    f"got {tuple(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"SteeringVector: {name} has NaN or infinity; check the activations that it came from"
                )

    def __repr__(self) -> str:
        counts = f", n = {self.counts[0]} + {self.counts[1]}" if any(self.counts) else ""
        return f"SteeringVector({self.label!r}, {self.space.model} {self.space.site}, norm {self.norm():.4g}{counts})"

    def _repr_html_(self) -> str:
        norms = f"{self.norm():.4g}"
        if self.scale is not None:
            norms += f" (standardised: {self.norm(standardised=True):.4g})"
        counts = f"{self.counts[0]:,} positive, {self.counts[1]:,} negative" if any(self.counts) else ""
        rows = {"label": self.label, "space": str(self.space), "n": counts, "norm": norms, "origin": self.origin}
        return html_table("SteeringVector", rows)

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        self._require_peer(other, "vector + vector")
        return self._derived(self.direction + other.direction, f"{self.label} + {other.label}")

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        self._require_peer(other, "vector - vector")
        return self._derived(self.direction - other.direction, f"{self.label} - {other.label}")

    def __neg__(self) -> "SteeringVector":
        return replace(
            self,
            direction=-self.direction,
            label=f"-{self.label}",
            positive_mean=self.negative_mean,
            negative_mean=self.positive_mean,
            counts=self.counts[::-1],
        )

    def __mul__(self, factor: float) -> "SteeringVector":
        require_type("number * vector", (Real, Tensor), factor, takes="a number")
        return self._derived(self.direction * factor, f"{factor:g} * {self.label}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SteeringVector":
        require_type("vector / number", (Real, Tensor), divisor, takes="a number")
        return self * (1.0 / divisor)

    def _require_peer(self, other: "SteeringVector", what: str) -> None:
        require_type(what, SteeringVector, other)
        require_same_space(self.space, other.space, what)

    def _derived(self, direction: Tensor, label: str) -> "SteeringVector":
        # The class means belong to the original vector: their difference is not this direction.
        return replace(self, direction=direction, label=label, positive_mean=None, negative_mean=None)

    def members(self) -> "tuple[SteeringVector, ...]":
        """Split the vector of a stack by site."""
        if not isinstance(self.space.site, Stack):
            return (self,)
        tensors = {name: getattr(self, name) for name in ("direction", "positive_mean", "negative_mean", "scale")}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return tuple(
            replace(self, space=space, **{name: tensor[columns] for name, tensor in given.items()})
            for space, columns in self.space.members.items()
        )

    def with_scale(self, scale: Float[Tensor, " d"]) -> "SteeringVector":
        """Set the standard deviations of the space over general text."""
        return replace(self, scale=scale)

    def with_norm(self, norm: float, *, standardised: bool = True) -> "SteeringVector":
        """Scale the vector to a given norm; keep the class means.

        Raises:
            ValueError: The vector is zero.
        """
        require_type("with_norm", (Real, Tensor), norm, takes="a number")
        length = self.norm(standardised=standardised)
        if length == 0:
            raise ValueError(f"SteeringVector {self.label!r}: a zero vector has no direction to scale")
        return replace(self, direction=self.direction * (norm / length))

    def about(self, centre: Float[Tensor, " d"]) -> "SteeringVector":
        """Move the class means half the direction to either side of a point.

        `Clamp` and `Gate` use the class means; this makes them fit a scaled vector.

        Args:
            centre: New midpoint of the class means.
        """
        require_type("about", Tensor, centre)
        middle, half = centre.to(torch.float64), self.direction.to(torch.float64) / 2
        dtype = self.direction.dtype
        return replace(self, positive_mean=(middle + half).to(dtype), negative_mean=(middle - half).to(dtype))

    @property
    def centre(self) -> Float[Tensor, " d"]:
        """Midpoint of the two class means, in float64.

        Raises:
            ValueError: The vector has no class means.
        """
        if self.positive_mean is None or self.negative_mean is None:
            raise ValueError(
                f"SteeringVector {self.label!r}: has no class means and so no centre; sums and multiples of vectors "
                "have none, vectors from difference_of_means do"
            )
        return (self.positive_mean.to(torch.float64) + self.negative_mean.to(torch.float64)) / 2

    def at_norm_of(self, other: "SteeringVector") -> "SteeringVector":
        """Scale the vector to another vector's standardised norm.

        Class means keep their centre; their distance becomes the length of the scaled vector.

        Args:
            other: A vector of the same space, with its scale.

        Raises:
            SpaceMismatchError: The vectors live in different spaces.
            ValueError: A vector has no scale, or this one is zero.
        """
        self._require_peer(other, "at_norm_of")
        scaled = self.with_norm(other.norm(standardised=True))
        return scaled if self.positive_mean is None or self.negative_mean is None else scaled.about(self.centre)

    def standardised(self) -> Float[Tensor, " d"]:
        """Return the direction in standardised coordinates, v / scale, in float64.

        A dimension that does not vary over general text (scale 0) gives 0.

        Raises:
            ValueError: The vector has no scale.
        """
        return standardise(self.direction, self._require_scale())

    def _require_scale(self) -> Float[Tensor, " d"]:
        """Return the scale, or refuse a vector without one.

        Raises:
            ValueError: The vector has no scale.
        """
        if self.scale is None:
            raise ValueError(
                f"SteeringVector {self.label!r}: standardised coordinates need the standard deviations of "
                f"{self.space}; use vector.with_scale(moments.scale(site))"
            )
        return self.scale

    def norm(self, *, standardised: bool = False) -> float:
        """Compute the Euclidean norm, in raw or in standardised coordinates."""
        values = self.standardised() if standardised else self.direction.to(torch.float64)
        return float(values.norm())

    def cosine(self, other: "SteeringVector", *, standardised: bool = True) -> float:
        """Compute the cosine with a vector of the same space, by default standardised.

        Both vectors are divided by this vector's scale.
        """
        self._require_peer(other, "cosine")
        v, w = self.direction.to(torch.float64), other.direction.to(torch.float64)
        if standardised:
            v, w = self.standardised(), standardise(w, self._require_scale())
        norms = v.norm() * w.norm()
        return float(v @ w / norms) if norms > 0 else 0.0

    def covector(self) -> Float[Tensor, " d"]:
        """Return the covector w that reads a row's position along v (w·v = 1).

        w = (v/σ²) / (v·v/σ²). Standardised coordinates keep huge dimensions from hiding the direction.
        """
        inverse = inverse_of(self._require_scale())
        dual = self.direction.to(torch.float64) * inverse * inverse
        size = dual @ self.direction.to(torch.float64)
        if size <= 0:
            raise ValueError(
                f"SteeringVector {self.label!r}: is zero in standardised coordinates, no projection on it exists"
            )
        return dual / size


def standardise(direction: Float[Tensor, "*n d"], scale: Float[Tensor, " d"]) -> Float[Tensor, "*n d"]:
    """Divide directions by σ in float64; dimensions with σ = 0 give 0."""
    return direction.to(torch.float64) * inverse_of(scale)


def inverse_of(scale: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Compute 1 / σ in float64, 0 where a dimension does not vary."""
    scale = scale.to(torch.float64)
    return torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)

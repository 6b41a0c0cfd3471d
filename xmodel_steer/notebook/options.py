"""Vectors that the explorer offers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xmodel_steer.core.directions import random_like
from xmodel_steer.core.errors import SpaceMismatchError
from xmodel_steer.core.spaces import Site, Stack
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.contexts import require_space_of
from xmodel_steer.models.facts import name_of
from xmodel_steer.recipe.results import Result


@dataclass(frozen=True, eq=False)
class Option:
    """A vector to choose.

    Args:
        name: Its name: ``mapped``, or the caller's name for it.
        vector: The vector.
        code: An expression for it, in terms of the explorer's arguments.
        imports: Lines that the expression needs.
    """

    name: str
    vector: SteeringVector
    code: str
    imports: tuple[str, ...] = ()

    @property
    def site(self) -> Site:
        """The site where the vector acts."""
        return self.vector.space.site

    @property
    def has_classes(self) -> bool:
        """True where it has what a clamp and a gate take."""
        v = self.vector
        known = v.scale is not None and v.positive_mean is not None and v.negative_mean is not None
        return known and not isinstance(self.site, Stack)


def options_of(model: Any, vectors: Any, name: str = "vectors") -> tuple[Option, ...]:
    """List the vectors to choose from; ``name`` is an expression for `explore`'s argument.

    Raises:
        SpaceMismatchError: A vector is of another space; for a result, all its vectors are.
        TypeError: The argument is none of these.
        ValueError: There are no vectors.
    """
    what = f"explore {name_of(model)}"
    if isinstance(vectors, Result):
        return _options_of_result(model, vectors, name, what)
    if isinstance(vectors, SteeringVector):
        named = [(vectors.label or "vector", vectors, name)]
    elif isinstance(vectors, Mapping):
        named = [item for key, value in vectors.items() for item in _named(str(key), value, f"{name}[{key!r}]")]
    elif isinstance(vectors, Sequence) and not isinstance(vectors, str):
        # Vectors of one label at several sites become one name with several layers.
        named = [(getattr(v, "label", "") or "vector", v, f"{name}[{k}]") for k, v in enumerate(vectors)]
    else:
        raise TypeError(
            "explore: needs a Result, a SteeringVector, several of them or a mapping of names to them, "
            f"got {type(vectors).__name__}; write xs.explore(model, vectors)"
        )
    if not named:
        raise ValueError("explore: give at least one vector")
    options: dict[tuple[str, Site], Option] = {}
    for label, vector, code in named:
        if not isinstance(vector, SteeringVector):
            raise TypeError(f"explore: {code} must be a SteeringVector, got {type(vector).__name__}")
        require_space_of(model, vector.space, what)
        option = Option(label, vector, code)
        if options.setdefault((label, option.site), option) is not option:
            raise ValueError(
                f"explore: two vectors are called {label!r} at {option.site}; give them names, "
                "{'one': vector, 'other': vector}"
            )
    return tuple(options.values())


def _named(name: str, value: Any, code: str) -> list[tuple[str, Any, str]]:
    """List the vectors of one name: one, or one per layer."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [(name, vector, f"{code}[{k}]") for k, vector in enumerate(value)]
    return [(name, value, code)]


def _options_of_result(model: Any, result: Result, name: str, what: str) -> tuple[Option, ...]:
    kinds = ("mapped", "native", "shuffled", "source")
    keys = [key for kind in kinds for key in result.vectors if key == kind or key.endswith(f": {kind}")]
    options = []
    for key in keys:
        vector = result.vectors[key]
        try:
            require_space_of(model, vector.space, what)
        except SpaceMismatchError:
            continue
        options.append(Option(key, vector, f"{name}.vectors[{json.dumps(key)}]"))
    native = next((key for key in keys if key == "native" or key.endswith(": native")), None)
    if not options:
        one = result.vectors[native] if native else next(iter(result.vectors.values()), None)
        if one is None:
            raise ValueError("explore: the result has no vectors; it may have been saved by hand without them")
        require_space_of(model, one.space, what)
    if native is not None and result.vectors[native].scale is not None and any(o.name == native for o in options):
        seed = result.seeds.get("random", (0,))[0]  # the transfer's first
        code = f"random_like({name}.vectors[{json.dumps(native)}], seed={seed})"
        imports = ("from xmodel_steer.core.directions import random_like",)
        options.append(Option("random", random_like(result.vectors[native], seed=seed), code, imports))
    return tuple(options)

"""Vectors, gates and maps carried from one organism to the other."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.activations.harvesting import harvest
from xmodel_steer.activations.store import ActivationStore
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add, Operator
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.controls import ShuffledPairs, pinned
from xmodel_steer.maps.fitting import Fitter
from xmodel_steer.maps.knowing import Knowledge
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.statistics import quotient
from xmodel_steer.models.facts import context_length, device_of
from xmodel_steer.recipe.records import sites_record
from xmodel_steer.studies.outcomes import Recipe

MAP_TOKENS = 192
# With these settings trained maps are as good as closed-form ones; with the paper's they see too little text here.
LONGER: dict[str, Any] = {"learning_rate": 1e-3, "batch_documents": 4, "accumulation": 1, "epochs": 60, "patience": 5}


@dataclass(frozen=True, eq=False)
class Carried:
    """A source vector in the target's space with its comparisons, all at the native vector's norm.

    Args:
        source: The source vector.
        native: The target's own vector.
        mapped: The source vector through the map.
        shuffled: The source vector through a map of shuffled pairs.
        biased: The mapped vector with the map's bias added, as if the vector were a point: the classic mistake.
        cosine: Cosine of the mapped and the native vector, in standardised coordinates.
        norm_ratio: The mapped vector's norm before scaling, over the native vector's norm.
        mapping: The map.
        gate: The vectors of these vectors' gates, if the recipe has gates.
    """

    source: SteeringVector
    native: SteeringVector
    mapped: SteeringVector
    shuffled: SteeringVector
    biased: SteeringVector
    cosine: float
    norm_ratio: float
    mapping: Map
    gate: "Carried | None" = None

    @classmethod
    def of(
        cls,
        vector: SteeringVector,
        native: SteeringVector,
        moments: Moments,
        fitter: Fitter,
        gate: tuple[SteeringVector, SteeringVector] | None = None,
    ) -> "Carried":
        """Fit a map and its control, and send a vector through both.

        The map carries the vector's class means too. When the vector is scaled, their centre stays, and their distance
        becomes the vector's new length.

        Args:
            vector: The source's vector.
            native: The target's vector, with class means and scale.
            moments: Moments that include this pair of sites.
            fitter: Fits the map.
            gate: The gates' vectors of the source and of the target.
        """
        site = native.space.site
        pair = moments.pair(vector.space.site, site)
        mapping = fitter.fit(pair)
        control = ShuffledPairs(pinned(fitter, mapping)).fit(pair)
        scale = moments.scale(site)
        moved = mapping.transport(vector).with_scale(scale)
        return cls(
            source=vector,
            native=native,
            mapped=moved.at_norm_of(native),
            shuffled=control.transport(vector).with_scale(scale).at_norm_of(native),
            biased=replace(moved, direction=mapping.transform(vector.direction)).at_norm_of(native),
            cosine=native.cosine(moved),
            norm_ratio=quotient(moved.norm(standardised=True), native.norm(standardised=True)),
            mapping=mapping,
            gate=None if gate is None else cls.of(*gate, moments, fitter),
        )

    def again(self, moments: Moments, fitter: Fitter) -> "Carried":
        """Carry the same vectors through maps fitted on other moments, with their scale.

        Args:
            moments: Moments that include this pair of sites.
            fitter: Fits the map.
        """
        scale = moments.scale(self.native.space.site)
        gate = None if self.gate is None else (self.gate.source, self.gate.native.with_scale(scale))
        return Carried.of(self.source, self.native.with_scale(scale), moments, fitter, gate)

    def known(self, moments: Moments) -> dict[str, float]:
        """Record what the map knows of the vector.

        Args:
            moments: The moments that it was fitted on.
        """
        pair = moments.pair(self.source.space.site, self.native.space.site)
        return Knowledge.record(self.mapping, pair, self.source)

    @property
    def mapped_gate(self) -> SteeringVector | None:
        """The mapped vector's gate."""
        return None if self.gate is None else self.gate.mapped


@dataclass(frozen=True, eq=False)
class Choice:
    """A recipe with the layers and the strength that validation chose.

    Args:
        recipe: The recipe.
        operator: The operation on the vector, and its strength.
        carried: The vectors, at the chosen layers.
        others: Vectors of further arms, by the arms' names.
        known: What the map knows of the vector (`Carried.known`).
    """

    recipe: Recipe
    operator: Operator
    carried: Carried
    others: Mapping[str, SteeringVector] = field(default_factory=dict)
    known: Mapping[str, float] = field(default_factory=dict)

    @property
    def has_equal_kl(self) -> bool:
        """True if arms can be compared at equal KL: the recipe disturbs neutral text like any other text."""
        fixed = self.recipe.positions == "all" or isinstance(self.recipe.positions, Tensor)
        return isinstance(self.operator, Add) and self.recipe.gate is None and fixed

    def vectors(self) -> dict[str, SteeringVector]:
        """Return the vectors by arm, with the source's and the mapped gate's."""
        carried = self.carried
        named = {arm: getattr(carried, arm) for arm in ("source", "native", "mapped", "shuffled")}
        return named | dict(self.others) | ({} if carried.mapped_gate is None else {"gate": carried.mapped_gate})

    def record(self) -> dict[str, Any]:
        """Return the choice as a study records it."""
        carried = self.carried
        return {
            "operator": repr(self.operator),
            **sites_record(carried.source.space.site, carried.native.space.site),
            "cosine": carried.cosine,
            "norm_ratio": carried.norm_ratio,
            "map_r2": carried.mapping.score_test.mean_r2 if carried.mapping.score_test else None,
            **self.known,
        }


@dataclass(frozen=True, eq=False)
class Pair:
    """The two models of a study, with readers of their activations on shared text.

    Args:
        source: The smaller model.
        target: The larger model.
        general: General text for maps.
        seed: Seed of the split of map text.
    """

    source: Any
    target: Any
    general: tuple[Prompt, ...] = field(repr=False)
    seed: int = 0

    @property
    def map_tokens(self) -> int:
        """Number of tokens read of each of the map's texts."""
        return min(MAP_TOKENS, context_length(self.source), context_length(self.target))

    @property
    def products(self) -> torch.device:
        """The device for products in float64, which not every accelerator has."""
        device = device_of(self.target)
        return device if device.type == "cuda" else torch.device("cpu")

    def of_general(self, pairs: Sequence[tuple[Site, Site]]) -> Moments:
        """Return moments of the general text, kept in the user's cache."""
        sources, targets = _ends(pairs)
        return cached_moments(
            self.source, self.target, self.general, source_sites=sources, target_sites=targets, pairs=tuple(pairs),
            max_tokens=self.map_tokens, seed=self.seed, device=self.products,
        )  # fmt: skip

    def of(self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Site, Site]]) -> Moments:
        """Collect moments of other text."""
        sources, targets = _ends(pairs)
        return collect_moments(
            self.source, self.target, prompts, source_sites=sources, target_sites=targets, pairs=tuple(pairs),
            max_tokens=self.map_tokens, batch_size=32, seed=self.seed, device=self.products,
        )  # fmt: skip

    @contextmanager
    def stored(self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Site, Site]]) -> Iterator[ActivationStore]:
        """Store rows on disk for maps trained on them, until the block ends."""
        sources, targets = _ends(pairs)
        with tempfile.TemporaryDirectory() as folder:
            for model, end, sites in ((self.source, "source", sources), (self.target, "target", targets)):
                harvest(
                    model, prompts, folder, end=end, sites=sites, max_tokens=self.map_tokens, batch_size=32,
                    dtype="float32", seed=self.seed,
                )  # fmt: skip
            yield ActivationStore(folder)


def _ends(pairs: Sequence[tuple[Site, Site]]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    first, second = (tuple(dict.fromkeys(sites)) for sites in zip(*pairs, strict=True))
    return first, second

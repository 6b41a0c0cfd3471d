"""What a transfer found, as records, and what can be said of it in words.

Everything here is read from scores that were measured on evaluation prompts; nothing calls a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.scorers.text import Scorer, TextScorer, score_texts
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.statistics import bootstrap_mean
from xmodel_steer.recipe.arms import Arm, arm_record, difference
from xmodel_steer.recipe.verdicts import Verdict, verdict_of


@dataclass(frozen=True, eq=False)
class TransferResult:
    """Everything that a transfer found, and how it was made.

    Args:
        label: Name of the behaviour.
        unit: What the effect is measured in.
        source: The source model and site.
        target: The target model and site.
        map: How the map was fitted and how well it does on test documents.
        arms: Every arm at every strength, and every arm at equal KL.
        headline: The strength chosen on validation.
        selection: What validation measured to choose layers and strength, and the calibrated strengths.
        similarity: Cosine to the native vector and norm ratio before rescaling, both in
            standardised coordinates, for the mapped and the shuffled vector.
        vectors: The vectors, by name.
        mapping: The map.
        spec: All arguments.
        splits: Ids of the prompts and documents of each set.
        versions: Versions of the programs.
        seeds: All seeds.
    """

    label: str
    unit: str
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    map: Mapping[str, Any]
    arms: tuple[Arm, ...]
    headline: float
    selection: Mapping[str, Any]
    similarity: Mapping[str, Any]
    vectors: Mapping[str, SteeringVector] = field(repr=False)
    mapping: Map | None = field(repr=False)
    spec: Mapping[str, Any] = field(repr=False)
    splits: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    seeds: Mapping[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        ends = f"{self.source['model']} → {self.target['model']}"
        count = len(self.arms[0].scores) if self.arms else 0
        return f"TransferResult({self.label!r}, {ends}, {len(self.arms)} arms, n = {count})"

    def arm(self, name: str, strength: float) -> Arm:
        """Return an arm at a fixed strength; ``unsteered`` is found at any.

        Raises:
            KeyError: It was not run.
        """
        for arm in self.arms:
            if arm.arm == name and (name == "unsteered" or (arm.budget is None and arm.strength == strength)):
                return arm
        raise KeyError(f"{name} at strength {strength:g} was not run; strengths: {list(self.strengths)}")

    def at_equal_kl(self, name: str, sign: str) -> Arm:
        """Return an arm at the native vector's KL.

        Args:
            name: The arm.
            sign: ``"+"`` or ``"-"``: the direction of steering.

        Raises:
            KeyError: It was not run.
        """
        for arm in self.arms:
            if arm.arm == name and arm.budget is not None and (arm.strength > 0) == (sign == "+"):
                return arm
        raise KeyError(f"{name} was not run at equal KL in direction {sign}")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The fixed strengths that were run, ascending, without 0."""
        return tuple(sorted({a.strength for a in self.arms if a.arm != "unsteered" and a.budget is None}))

    @property
    def signs(self) -> tuple[str, ...]:
        """The directions that were compared at equal KL."""
        run = [a.strength for a in self.arms if a.arm == "native" and a.budget is not None]
        return tuple(s for s, way in (("+", 1), ("-", -1)) if any(way * strength > 0 for strength in run))

    def gain(self, name: str) -> np.ndarray:
        """How far an arm moves the score in the direction of steering, at the native vector's KL.

        Args:
            name: The arm.

        Returns:
            For each prompt and seed ``(prompts, seeds)``, over both directions: half of what lies between them. Where one
            direction was run, its change from the unsteered model.

        Raises:
            KeyError: It was not run at equal KL.
        """
        base = np.array(self.arm("unsteered", 0).scores)[:, None]
        with np.errstate(over="ignore", invalid="ignore"):  # infinite, and then undefined
            changes = [
                (1.0 if sign == "+" else -1.0) * (self.at_equal_kl(name, sign).per_seed() - base) for sign in self.signs
            ]
            return np.mean(changes, axis=0)

    def verdict(self) -> Verdict:
        """Judge what survived, at the native vector's KL."""
        return verdict_of(self)

    def rescored(self, scorer: Scorer, *, label: str, unit: str = "score") -> "TransferResult":
        """Score the same texts by another scorer: no model is called.

        Layers and strengths stay those that the first scorer chose on validation. Only texts of the random arm's first
        seed are kept, so that arm becomes that one vector; its KL stays the mean of all seeds. Arms without texts are left out.

        Args:
            scorer: A function from a text to a number.
            label: Name of what it reads.
            unit: What its number means.

        Raises:
            ValueError: No arm has texts, or the scorer needs the prompts, which a result does not keep.
        """
        if isinstance(scorer, TextScorer):
            raise ValueError("rescored: this scorer reads the prompts too, which a result does not keep; run transfer")
        base = self.arm("unsteered", 0)
        if not base.texts:
            raise ValueError(f"rescored: {self.label} was measured without texts, or they were not kept; run transfer")
        start = score_texts(scorer, base.texts)
        arms = []
        for arm in self.arms:
            if arm.texts:
                scores = score_texts(scorer, arm.texts)
                effect, change = bootstrap_mean(scores), bootstrap_mean(difference(scores, start))
                own = tuple(scores.tolist())
                arms.append(replace(arm, effect=effect, change=change, scores=own, seeds=(), table=(), raw=()))
        spec = {**self.spec, "scorer": repr(scorer)[:200], "rescored_from": self.spec.get("scorer")}
        return replace(self, label=label, unit=unit, arms=tuple(arms), spec=spec)

    def to_frame(self) -> Any:
        """One row per arm and strength, as a pandas frame."""
        import pandas as pd

        return pd.DataFrame([arm_record(arm) for arm in self.arms])

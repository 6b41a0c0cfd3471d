"""The one record of a run: a transfer, a demo or a study.

All is read from scores that were measured on evaluation prompts; nothing here calls a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from xmodel_steer.core.tables import html_table
from xmodel_steer.core.texts import encodable
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.scorers.text import Scorer, TextScorer, score_texts
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.knowing import OUTSIDE
from xmodel_steer.recipe.arms import ARMS, EQUAL_KL, EQUAL_STRENGTH, OWN_KL, Arm, gain_of, scored_fields
from xmodel_steer.recipe.verdicts import Verdict, recipes_of, verdict_of


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that a run measured, and how it was made.

    Args:
        name: Name of the behaviour, or of the study.
        unit: What the effect is measured in.
        source: The source model, with its site where all arms share one.
        target: The target model, with its site where all arms share one.
        arms: Every arm of every recipe.
        chosen: What validation chose for each recipe (layers, operator or strength), how its map was fitted and how near the
            mapped vector is to the native one.
        validation: Everything that validation tried.
        spec: All settings.
        splits: Ids of the prompts and documents of each set.
        seeds: All seeds.
        versions: Versions of the programs.
        question: What a study asks, in a sentence.
        note: How to read the numbers, in words.
        stored: The conclusions that a study draws in its own words.
        curves: Other settings that were varied: for each name one record per point.
        prompts: Text of the first evaluation prompts.
        vectors: Vectors: ``source``, ``native``, ``mapped``, ``shuffled``; where there are several recipes,
            ``RECIPE: mapped`` and so on.
        maps: The maps, by recipe.
        hardware: What it ran on.
        seconds: Wall time of its parts.
        command: The command that repeats it.
    """

    name: str
    unit: str
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    arms: tuple[Arm, ...]
    chosen: Mapping[str, Mapping[str, Any]]
    validation: tuple[Mapping[str, Any], ...] = field(repr=False)
    spec: Mapping[str, Any] = field(repr=False)
    splits: Mapping[str, Any] = field(repr=False)
    seeds: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    question: str = ""
    note: str = ""
    stored: tuple[str, ...] = ()
    curves: Mapping[str, tuple[Mapping[str, Any], ...]] = field(repr=False, default_factory=dict)
    prompts: tuple[str, ...] = field(repr=False, default=())
    vectors: Mapping[str, SteeringVector] = field(repr=False, default_factory=dict)
    maps: Mapping[str, Map] = field(repr=False, default_factory=dict)
    hardware: str = ""
    seconds: Mapping[str, float] = field(repr=False, default_factory=dict)
    command: str = ""

    def __repr__(self) -> str:
        count = max((arm.effect.n for arm in self.arms), default=0)
        return f"Result({self.name!r}, {self.between}, {len(self.arms)} arms, n = {count})"

    def _repr_html_(self) -> str:
        rows = {"models": self.between, "arms": f"{len(self.arms)} of {', '.join(self.recipes)}"}
        return html_table(repr(self), rows | {f"conclusion {i}": line for i, line in enumerate(self.conclusions, 1)})

    @property
    def between(self) -> str:
        """The two models, in words."""
        return f"{self.source['model']} → {self.target['model']}"

    @property
    def recipes(self) -> tuple[str, ...]:
        """Recipes with steered arms, in their order."""
        return tuple(dict.fromkeys(arm.recipe for arm in self.arms if arm.arm != "unsteered"))

    def choice(self, recipe: str | None = None) -> Mapping[str, Any]:
        """Return what validation chose for a recipe.

        Args:
            recipe: The recipe; may be left out where there is one.

        Raises:
            KeyError: There is none of this name, or there are several.
        """
        return _only(self.chosen, recipe)

    @property
    def headline(self) -> float:
        """The strength that validation chose for the first recipe; 1 where its operator has none."""
        return float(next(iter(self.chosen.values()), {}).get("strength", 1.0))

    def arm(self, name: str, strength: float | None = None, *, recipe: str | None = None, at: str | None = None) -> Arm:
        """Return the first arm of a name.

        Args:
            name: The arm; ``unsteered`` has every strength.
            strength: Its strength; any, if left out.
            recipe: Its recipe; any, if left out. An unsteered arm that all recipes share belongs to each.
            at: ``equal strength`` or ``equal KL``; if left out, equal strength first.

        Raises:
            KeyError: It was not run.
        """
        fits = [
            arm
            for arm in self.arms
            if arm.arm == name
            and (recipe is None or arm.recipe == recipe or (name == "unsteered" and not arm.recipe))
            and (name == "unsteered" or strength is None or (arm.strength == strength and arm.at == EQUAL_STRENGTH))
            and (name == "unsteered" or at is None or arm.at == at)
        ]
        if not fits:
            wanted = [f"at strength {strength:g}"] if strength is not None else []
            wanted += [f"under {recipe!r}"] if recipe is not None else []
            wanted += [f"at {at}"] if at else []
            raise KeyError(f"{' '.join([name, *wanted])} was not run; strengths: {list(self.strengths)}")
        return min(fits, key=lambda arm: arm.at != EQUAL_STRENGTH)

    def at_equal_kl(self, name: str, sign: str, recipe: str | None = None) -> Arm:
        """Return an arm at the native vector's KL; ``prompted`` at its own.

        Args:
            name: The arm.
            sign: ``"+"`` or ``"-"``: the direction of steering.
            recipe: Its recipe; any, if left out.

        Raises:
            KeyError: It was not run.
        """
        for arm in self.arms:
            fits = (arm.arm, arm.sign) == (name, sign) and arm.at in (EQUAL_KL, OWN_KL) and recipe in (None, arm.recipe)
            if fits and not math.isnan(arm.strength):
                return arm
        raise KeyError(f"{name} was not run at equal KL in direction {sign}")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The fixed strengths that were run, ascending, without 0."""
        fixed = {a.strength for a in self.arms if a.arm != "unsteered" and a.at == EQUAL_STRENGTH}
        return tuple(sorted(strength for strength in fixed if not math.isnan(strength)))

    @property
    def signs(self) -> tuple[str, ...]:
        """The directions that were compared at equal KL."""
        run = {a.sign for a in self.arms if a.arm == "native" and a.at == EQUAL_KL and not math.isnan(a.strength)}
        return tuple(sign for sign in "+-" if sign in run)

    def compared(self, recipe: str, names: Sequence[str] = ARMS[1:]) -> dict[str, dict[str, Arm]]:
        """Return the arms that a recipe's verdict compares, by direction and name.

        At equal KL where the native vector was run there in the recipe, else at equal strength.

        Args:
            recipe: The recipe.
            names: Which arms.

        Raises:
            KeyError: An arm was not run.
        """
        result = replace(self, arms=tuple(arm for arm in self.arms if arm.recipe == recipe))
        if result.signs:
            return {sign: {name: result.at_equal_kl(name, sign) for name in names} for sign in result.signs}
        return {"+": {name: result.arm(name, at=EQUAL_STRENGTH) for name in names}}

    def gain(self, name: str, recipe: str | None = None) -> np.ndarray:
        """Compute how far an arm moves the score in the direction of steering.

        Args:
            name: The arm.
            recipe: The recipe; may be left out where there is one.

        Returns:
            For each prompt and seed ``(prompts, seeds)``, over both directions: half of their difference. Where one direction
            was run, its change from the unsteered model.

        Raises:
            KeyError: It was not run, or its scores were not kept.
        """
        recipe = recipe if recipe is not None else _single(self.recipes)
        base = self.arm("unsteered", recipe=recipe)
        arms = {sign: arms[name] for sign, arms in self.compared(recipe, (name,)).items()}
        if not base.scores or not all(arm.scores for arm in arms.values()):
            raise KeyError(f"{name} under {recipe!r}: its scores were not kept")
        return gain_of(arms, base)

    @cached_property
    def verdicts(self) -> Mapping[str, Verdict]:
        """The verdict on each recipe that has every arm with its scores."""
        verdicts = {}
        for recipe in self.recipes:
            try:
                verdicts[recipe] = verdict_of(self, recipe)
            except KeyError:  # an arm is missing, or has no scores
                continue
        return verdicts

    def verdict(self, recipe: str | None = None) -> Verdict:
        """Judge what survived, from tests against every control.

        Args:
            recipe: The recipe; may be left out where there is one.

        Raises:
            KeyError: The recipe lacks an arm or its scores, or there are several recipes.
        """
        return _only(self.verdicts, recipe)

    @property
    def conclusions(self) -> tuple[str, ...]:
        """The conclusions in words: a study's own lines, or each verdict's text."""
        return self.stored or tuple(verdict.text for verdict in self.verdicts.values())

    @property
    def doubts(self) -> tuple[str, ...]:
        """Warn of vectors that their map's text hardly knows; read from the map alone, before anything is steered."""
        return doubts_of(self.chosen)

    def rescored(self, scorer: Scorer, *, label: str, unit: str = "score") -> "Result":
        """Score the same texts by another scorer: no model is called.

        Layers and strengths stay those that the first scorer chose on validation. Arms without texts are left out. Results of
        earlier versions kept texts of the random arm's first seed alone: that arm becomes that one vector.

        Args:
            scorer: A function from a text to a number.
            label: Name of what it reads.
            unit: What its number means.

        Raises:
            ValueError: No arm has texts, or the scorer needs the prompts, which a result does not keep.
        """
        if isinstance(scorer, TextScorer):
            raise ValueError("rescored: this scorer reads the prompts too, which a result does not keep; run transfer")
        arms = [arm for arm in self.arms if arm.texts and len(arm.texts) == arm.effect.n]
        if not any(arm.arm == "unsteered" for arm in arms):
            raise ValueError(f"rescored: {self.name} was measured without texts, or they were not kept; run it again")
        old = list(dict.fromkeys(arm.recipe for arm in arms if arm.recipe))
        own = recipes_of(old[0]) if old else []  # the recipes of one transfer
        called = {r: label + r.removeprefix(old[0]) if r in own else f"{r}, {label}" for r in old} | {"": ""}
        texts = replace(self, arms=tuple(arms))
        rescored = []
        for arm in arms:
            start = score_texts(scorer, texts.arm("unsteered", recipe=arm.recipe or None).texts)
            scores = [score_texts(scorer, each) for each in (arm.texts, *arm.more_texts)]
            rescored.append(replace(arm, recipe=called[arm.recipe], raw=(), **scored_fields(scores, start, arm.groups)))
        return replace(
            self,
            name=label,
            unit=unit,
            arms=tuple(rescored),
            chosen={called.get(recipe, recipe): choice for recipe, choice in self.chosen.items()},
            maps={called.get(recipe, recipe): mapping for recipe, mapping in self.maps.items()},
            validation=tuple(
                {**r, "recipe": called.get(r.get("recipe", ""), r.get("recipe", ""))} for r in self.validation
            ),
            stored=(),
            spec={**self.spec, "scorer": repr(scorer)[:200], "rescored_from": self.spec.get("scorer")},
        )

    def to_frame(self, *, texts: bool = False) -> Any:
        """Return a pandas frame with one row per arm and strength.

        Args:
            texts: One row per arm and prompt instead, with the prompt's id, score, text and a judge's words.
        """
        import pandas as pd

        if not texts:
            rows = [_whole(arm.row()) for arm in self.arms]
            values = ({name: measure["value"] for name, measure in row.pop("measures").items()} for row in rows)
            return pd.DataFrame([row | measures for row, measures in zip(rows, values, strict=True)])
        rows = [row for arm in self.arms for row in prompt_rows(replace(arm, more_texts=()))]
        return pd.DataFrame(list(map(_whole, rows)))


def doubts_of(chosen: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Warn of every recipe whose map hardly knows its vector."""
    leverages = {recipe: choice.get("map", choice).get("leverage", 0.0) for recipe, choice in chosen.items()}
    return tuple(
        f"{recipe}: the map's text hardly knows this vector. Its leverage is {leverage:.2f}; of recorded maps, most from {OUTSIDE} on "
        "carried under half of the native effect. Give text of the kind, or let both models read the contrast prompts "
        "(recipes=['contrast read'])."
        for recipe, leverage in leverages.items()
        if leverage >= OUTSIDE
    )


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """Replace half surrogate pairs, which a frame refuses."""
    return {k: encodable(v) if isinstance(v, str) else v for k, v in row.items()}


def prompt_rows(arm: Arm) -> list[dict[str, Any]]:
    """Return one record per prompt of an arm."""
    count = max(len(arm.scores), len(arm.texts))
    columns: dict[str, Sequence[Any]] = {
        "unit": arm.ids,
        "group": arm.groups,
        "score": arm.scores,
        "seeds": arm.table,
        "text": arm.texts,
        "more_texts": tuple(zip(*arm.more_texts, strict=True)),
        "judge": arm.raw,
    }
    strength = None if math.isnan(arm.strength) else arm.strength
    kept = {"arm": arm.arm, "recipe": arm.recipe, "at": arm.at, "strength": strength, "budget": arm.budget}
    return [kept | {name: column[i] for name, column in columns.items() if i < len(column)} for i in range(count)]


def _single(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise KeyError(f"give a recipe: {', '.join(map(repr, names)) or 'there is none'}")
    return names[0]


def _only(records: Mapping[str, Any], name: str | None) -> Any:
    name = _single(tuple(records)) if name is None else name
    if name not in records:
        raise KeyError(f"no recipe {name!r}; there are: {', '.join(map(repr, records)) or 'none'}")
    return records[name]

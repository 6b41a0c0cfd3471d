"""The third step of a transfer: every vector at the strength that does the native vector's damage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.calibration import LEAST, Dose, calibrate
from xmodel_steer.evaluation.damage import neutral_positions, on_neutral, side_effects
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Step
from xmodel_steer.recipe.arms import EQUAL_KL, EQUAL_STRENGTH
from xmodel_steer.recipe.preparing import Prepared


@dataclass(frozen=True, eq=False)
class Run:
    """One vector at one strength, to be measured. Runs that differ in ``seed`` alone become one arm.

    Args:
        arm: Name of the arm.
        setting: What is done to the model; nothing for the unsteered one.
        recipe: The recipe.
        operator: The operator as text, where it has no strength.
        at: ``equal strength`` or ``equal KL``.
        strength: The strength, with its sign; NaN where the operator has none.
        budget: The KL that the strength was calibrated to.
        reached: True where it reaches that KL.
    """

    arm: str
    setting: Sequence[Step] = field(repr=False)
    recipe: str = ""
    operator: str = ""
    at: str = EQUAL_STRENGTH
    strength: float = 0.0
    budget: float | None = None
    reached: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        """The identity of an arm, which its seeds share; at equal KL their strengths differ."""
        strength = self.strength if self.at == EQUAL_STRENGTH and self.strength == self.strength else self.strength < 0
        return self.recipe, self.arm, self.at, self.budget, strength


def matched(
    target: Any,
    references: Sequence[Sequence[Step]],
    candidates: Sequence[tuple[SteeringVector, int, int]],
    texts: Sequence[Prompt],
    *,
    positions: Positions = "all",
    max_tokens: int,
    batch_size: int = 16,
) -> tuple[list[float], list[Dose]]:
    """Find the strengths that disturb neutral text as references do.

    Args:
        target: The model.
        references: Settings that set the KL, such as the native vector's in each direction.
        candidates: For each vector its reference, as an index, and the direction: 1 or -1.
        texts: Neutral text, that on which KL is reported: other text calibrates no better than to a fifth.
        positions: Where prompts are steered.
        max_tokens: Tokens read of each text.
        batch_size: Texts at a time.

    Returns:
        The KL of each reference, and a strength for each candidate.
    """
    effects = side_effects(target, on_neutral(references), texts, max_tokens=max_tokens, batch_size=batch_size)
    budgets = [max(effect.mean_kl, LEAST) for effect in effects]
    doses = calibrate(
        target,
        [vector for vector, _, _ in candidates],
        [budgets[reference] for _, reference, _ in candidates],
        texts,
        signs=[sign for *_, sign in candidates],
        positions=neutral_positions(positions),
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    return budgets, doses


def match_damage(
    prepared: Prepared, arms: Mapping[str, Sequence[SteeringVector]], headline: float, recipe: str | None = None
) -> tuple[list[Run], list[dict[str, Any]]]:
    """List every run of a transfer, at fixed strengths and at equal KL.

    The KL is that of the native vector at the headline strength on reported text, in each direction. The native vector is also
    run at half that strength: the dose at which it does what the mapped one does lies between.

    Args:
        prepared: What `prepare` returned.
        arms: The vectors of every arm, ``native`` first.
        headline: The strength that validation chose.
        recipe: The recipe; by default the behaviour's label.

    Returns:
        The runs, the unsteered one first, and a record of every calibrated strength.
    """
    native, budget, label = arms["native"][0], prepared.budget, prepared.label if recipe is None else recipe
    signs = [sign for sign in (1, -1) if sign * headline in budget.strengths]

    def run(arm: str, vector: SteeringVector, strength: float, **fields: Any) -> Run:
        return Run(arm, prepared.steer(vector, strength), label, strength=strength, **fields)

    runs = [Run("unsteered", [])]
    runs += [
        run(arm, vector, strength)
        for arm, group in arms.items()
        if budget.fixed or arm == "native"
        for strength in budget.strengths
        for vector in group
    ]
    halves = [sign * headline / 2 for sign in signs]
    runs += [run("native", native, strength) for strength in halves if strength not in budget.strengths]
    candidates = [
        (arm, vector, i, sign)
        for arm, group in arms.items()
        if arm != "native"
        for i, sign in enumerate(signs)
        for vector in group
    ]
    budgets, doses = matched(
        prepared.target,
        [prepared.steer(native, sign * headline) for sign in signs],
        [(vector, i, sign) for _, vector, i, sign in candidates],
        prepared.text.reported,
        positions=prepared.method.positions,
        max_tokens=budget.neutral_tokens,
        batch_size=min(16, budget.batch_size),
    )
    runs += [
        run("native", native, sign * headline, at=EQUAL_KL, budget=kl) for sign, kl in zip(signs, budgets, strict=True)
    ]
    records = []
    for (arm, vector, i, _), dose in zip(candidates, doses, strict=True):
        runs.append(run(arm, vector, dose.strength, at=EQUAL_KL, budget=budgets[i], reached=dose.reached))
        records.append({"arm": arm, "budget": budgets[i], "vector": vector.label, **vars(dose)})
    return runs, records

"""Thresholds of gates, chosen on validation activations, and their rates."""

from dataclasses import dataclass, replace

import torch

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.vectors import Activations
from xmodel_steer.interventions.operators import Gate
from xmodel_steer.maps.statistics import Estimate, rate


@dataclass(frozen=True, eq=False)
class GateRates:
    """A gate and its rates on labelled rows.

    Args:
        gate: The gate.
        opens: Share of rows of the gate's side at which it opens (sensitivity), with Wilson's interval and n.
        shuts: Share of rows of the other side at which it stays shut (specificity).
    """

    gate: Gate
    opens: Estimate
    shuts: Estimate


def gate_rates(gate: Gate, positive: Activations, negative: Activations) -> GateRates:
    """Measure how often a gate opens for its own side and for the other.

    Args:
        gate: The gate.
        positive: Rows of the positive class, one a prompt: at the token that is steered, or for a gate with positions
            the means over these.
        negative: Rows of the negative class.

    Raises:
        SpaceMismatchError: The rows live in another space than the gate's vector.
        PromptError: A class has no rows.
        ValueError: The gate's vector has no class means or no scale.
    """
    require_type("gate_rates: gate", Gate, gate)
    require_type("gate_rates", Activations, positive, negative)
    margin, opened = gate.prepare(), []
    for name, rows in (("positive", positive), ("negative", negative)):
        require_same_space(gate.vector.space, rows.space, "gate")
        if not len(rows):
            raise PromptError(f"gate: the {name} class has no rows")
        opened.append((margin(rows.values.to(torch.float32)) > 0).double().cpu().numpy())
    own, other = opened if gate.side == "positive" else opened[::-1]
    return GateRates(gate, rate(own), rate(1 - other))


def choose_gate(gate: Gate, positive: Activations, negative: Activations) -> GateRates:
    """Move a gate's threshold to where validation rows are told apart best.

    The threshold on the projection w·x maximises sensitivity + specificity - 1 (Youden 1950), midway between two
    neighbouring projections; of thresholds that are as good, in the widest gap. It becomes the midpoint of the gate's
    vector (`SteeringVector.about`). The rates returned are those on the rows that chose, which flatters them: for a report,
    give `gate_rates` other rows.

    Args:
        gate: The gate, whose vector has class means and a scale.
        positive: Validation rows of the positive class, as for `gate_rates`.
        negative: Validation rows of the negative class.

    Raises:
        SpaceMismatchError, PromptError, ValueError: As for `gate_rates`; or all rows have the same projection.

    Example:
        >>> chosen = choose_gate(Gate(harmful, positions="prompt"), *validation)        # doctest: +SKIP
    """
    gate_rates(gate, positive, negative)  # refuses
    high, low = (
        rows.values.to(torch.float64) @ gate.vector.covector().to(rows.values.device) for rows in (positive, negative)
    )
    places = torch.cat([high, low]).unique()
    if len(places) < 2:
        raise PromptError("gate: all rows have the same projection on its vector; use another vector or more rows")
    middles, gaps = (places[1:] + places[:-1]) / 2, places.diff()
    scores = (high[:, None] > middles).double().mean(0) + (low[:, None] < middles).double().mean(0)
    best = scores > scores.max() - 1e-9
    threshold = middles[best][gaps[best].argmax()]
    vector = gate.vector.about(float(threshold) * gate.vector.direction.to(torch.float64))
    return gate_rates(replace(gate, vector=vector), positive, negative)

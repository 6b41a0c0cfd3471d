"""Thresholds of gates: scikit-learn's best point of the curve, and rates that are what steering does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from sklearn.metrics import roc_curve

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations
from xmodel_steer.evaluation.gates import choose_gate, gate_rates
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Gate
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.maps.statistics import rate

SPACE = Space("small", Site(2), 6, "aaaa")
UNITS = torch.tensor([1.0, 30.0, 0.1, 5.0, 1.0, 2.0])


def rows(n, seed, shift=0.0, space=SPACE):
    values = torch.randn(n, space.width, generator=torch.Generator().manual_seed(seed))
    return Activations((values + shift) * UNITS, space)


def sides(n=60, m=40, seed=0):
    """Overlapping classes of unlike spread, so that the midpoint of the means is not the best threshold."""
    negative = rows(m, seed + 1)
    positive = rows(n, seed, 0.5)
    return replace(positive, values=positive.values * torch.linspace(0.2, 3.0, n)[:, None]), negative


def gate(side="positive"):
    return Gate(difference_of_means(*sides(seed=20), scale=UNITS), side)


def projections(vector, *classes):
    w = (vector.direction / vector.scale**2).double()
    w = w / (w @ vector.direction.double())
    return [side.values.double() @ w for side in classes]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_threshold_is_the_best_of_scikit_learns_curve(seed, side):
    classes = sides(seed=seed)
    chosen = choose_gate(gate(side), *classes)
    high, low = projections(gate().vector, *classes)
    false, true, _ = roc_curve([1] * 60 + [0] * 40, torch.cat([high, low]).numpy(), drop_intermediate=False)
    assert chosen.opens.value + chosen.shuts.value - 1 == pytest.approx(np.max(true - false))
    before = gate_rates(gate(side), *classes)
    assert chosen.opens.value + chosen.shuts.value > before.opens.value + before.shuts.value
    # The gate's own threshold, by another way, gives its rates.
    middle = float(projections(gate().vector, replace(classes[0], values=chosen.gate.vector.centre[None]))[0])
    own, other = (high > middle, low < middle) if side == "positive" else (low < middle, high > middle)
    assert (chosen.opens, chosen.shuts) == (rate(own.double().numpy()), rate(other.double().numpy()))
    assert torch.equal(chosen.gate.vector.direction, gate().vector.direction) and chosen.gate.side == side


def test_classes_that_are_apart_get_the_middle_of_the_gap():
    vector = difference_of_means(rows(9, 1, 30.0), rows(9, 2), scale=UNITS)
    classes = rows(20, 3, 50.0), rows(30, 4)
    chosen = choose_gate(Gate(vector), *classes)
    high, low = projections(vector, *classes)
    (middle,) = projections(vector, replace(classes[0], values=chosen.gate.vector.centre[None].float()))
    assert float(middle) == pytest.approx(float(high.min() + low.max()) / 2, rel=1e-4)
    assert (chosen.opens, chosen.shuts) == (rate(np.ones(20)), rate(np.ones(30)))
    assert gate_rates(replace(chosen.gate, side="negative"), *classes[::-1]).opens.value == 0


def test_of_thresholds_that_are_as_good_the_one_in_the_widest_gap_is_taken():
    vector = gate().vector
    w = (
        vector.direction
        / vector.scale**2
        / float((vector.direction / vector.scale) @ (vector.direction / vector.scale))
    )
    high, low = (Activations(torch.tensor(at)[:, None] * w / (w @ w), SPACE) for at in ([4.0, 20.0], [0.0, 10.0]))
    chosen = choose_gate(Gate(vector), high, low)  # 2 and 15 tell three of four
    assert (chosen.opens.value, chosen.shuts.value) == (0.5, 1.0)
    assert float(chosen.gate.vector.centre @ w.double()) == pytest.approx(15, rel=1e-4)


def test_steering_opens_at_the_rows_that_the_rates_count(llama):
    texts = toys.TEXTS
    ends = capture(llama.model, texts, [Site(1)], include_special=True)[Site(1)]
    first = ends.values[:, 0] > ends.values[:, 0].median()
    classes = [Activations(ends.values[keep], ends.space) for keep in (first, ~first)]
    teller = difference_of_means(*classes, scale=ends.values.std(0))
    off = Gate(teller.about(9 * teller.direction))  # opens nowhere
    assert gate_rates(off, *classes).opens.value == 0
    chosen = choose_gate(off, *classes)
    with steering(llama.model, Intervention(llama.vector(1), positions="last", gate=chosen.gate)):
        moved = (capture(llama.model, texts, [Site(1)])[Site(1)].values != ends.values).any(1)
    assert float(moved[first].double().mean()) == chosen.opens.value > 0
    assert float((~moved[~first]).double().mean()) == chosen.shuts.value


def test_what_cannot_be_told_apart_is_refused():
    classes = sides()
    with pytest.raises(PromptError, match="gate: the negative class has no rows"):
        choose_gate(gate(), classes[0], rows(0, 1))
    with pytest.raises(PromptError, match="all rows have the same projection on its vector"):
        choose_gate(gate(), *(Activations(torch.ones(3, 6), SPACE) for _ in range(2)))
    with pytest.raises(SpaceMismatchError, match="gate: needs small"):
        gate_rates(gate(), rows(3, 1, space=replace(SPACE, fingerprint="bbbb")), classes[1])
    with pytest.raises(ValueError, match="has no class means"):
        choose_gate(Gate(2.0 * gate().vector), *classes)

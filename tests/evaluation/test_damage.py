"""Damage on neutral text: against losses and divergences computed on the untouched model."""

import numpy as np
import pytest
import torch
from toys import TEXTS

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation import calibration
from xmodel_steer.evaluation.calibration import calibrate
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.interventions.operators import Ablate, Add
from xmodel_steer.interventions.steps import Intervention


def measured(toy, settings, texts=TEXTS, **kwargs):
    return side_effects(toy.model, settings, texts, **kwargs)


def settings(toy):
    """Unsteered, one vector, two vectors at two sites, nothing added."""
    v, w = toy.vector(1, seed=1, size=1.0), toy.vector(0, seed=2, size=1.0)
    return [
        [],
        [Intervention(v)],
        [Intervention(v, Ablate()), Intervention(w, Add(0.5), "last")],
        [Intervention(v, Add(0.0))],
    ]


def test_equals_transformers_own_loss_when_unsteered(bridge):
    (made,) = measured(bridge, [[]])
    with torch.no_grad():
        ids = [torch.tensor([bridge.ids(text)]) for text in TEXTS]
        losses = [float(bridge.hf(i, labels=i).loss) * (i.shape[1] - 1) for i in ids]
    assert made.tokens.tolist() == [i.shape[1] - 1 for i in ids]
    np.testing.assert_allclose(made.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(made.kl, 0, atol=1e-4)
    np.testing.assert_allclose(made.perplexity, np.exp(sum(losses) / made.tokens.sum()), rtol=1e-3)


def test_equals_the_same_addition_in_the_untouched_model(toy):
    vector = toy.vector(1, size=1.0)
    (made,) = measured(toy, [[Intervention(vector)]])
    for k, text in enumerate(TEXTS):
        ids = toy.ids(text)
        plain = toy.reference(ids)[1][:-1].double().log_softmax(-1)
        steered = toy.reference(ids, {1: vector.direction})[1][:-1].double().log_softmax(-1)
        kl = (plain.exp() * (plain - steered)).sum()
        np.testing.assert_allclose(made.kl[k], kl, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(made.loss[k], -steered.gather(1, torch.tensor(ids[1:])[:, None]).sum(), rtol=1e-3)


def test_unsteered_and_strength_zero_do_nothing_and_steering_costs(toy):
    none, one, two, zero = measured(toy, settings(toy))
    assert (zero.loss == none.loss).all()
    np.testing.assert_allclose([none.kl, zero.kl], 0, atol=1e-4)
    assert (one.kl > 0.01).all() and (two.kl > 0.001).all()
    assert one.mean_kl == pytest.approx(one.kl.sum() / one.tokens.sum())


def test_batch_size_order_and_company_change_nothing(toy):
    made = measured(toy, settings(toy), batch_size=8)
    for other in (measured(toy, settings(toy), batch_size=3), measured(toy, settings(toy), batch_size=1)):
        for a, b in zip(made, other, strict=True):
            np.testing.assert_allclose(a.kl, b.kl, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4)
    (back,) = measured(toy, settings(toy)[1:2], TEXTS[::-1])
    np.testing.assert_allclose(back.kl[::-1], made[1].kl, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(back.loss[::-1], made[1].loss, rtol=1e-4)


def test_masks_name_the_documents_as_given(toy):
    mask = torch.zeros(len(TEXTS), 64, dtype=torch.bool)
    mask[2] = True
    (made,) = measured(toy, [[Intervention(toy.vector(1), positions=mask)]], batch_size=3)
    assert (np.flatnonzero(made.kl > 1e-2) == [2]).all()


def test_max_tokens_cuts(toy):
    lengths = [len(toy.ids(text)) for text in TEXTS]
    for limit in (5, None):
        (made,) = measured(toy, [[]], max_tokens=limit)
        assert made.tokens.tolist() == [min(n, limit or n) - 1 for n in lengths]


@pytest.mark.parametrize(
    "texts, limit, says",
    [
        ([], 64, "at least two tokens, got 0 documents$"),
        (
            [Prompt(text="the port", id="long"), Prompt(text="a", id="short")],
            64,
            "got 2 documents, of which short are shorter",
        ),
        (TEXTS, 1, "got 8 documents, of which .* are shorter"),
    ],
    ids=["none", "one", "all"],
)
def test_texts_without_a_prediction_are_refused(llama, texts, limit, says):
    with pytest.raises(PromptError, match=says):
        measured(llama, [[]], texts, max_tokens=limit)


# --- equal damage -------------------------------------------------------------------------------


def calibrated(toy, vectors, kl, **kwargs):
    return calibrate(toy.model, vectors, kl, TEXTS, **kwargs)


@pytest.mark.parametrize("secants", [0, 4], ids=["bracketing", "secants first"])
def test_the_calibrated_strength_does_the_damage_that_was_asked_for(toy, secants, monkeypatch):
    monkeypatch.setattr(calibration, "SECANTS", secants)
    vectors = [toy.vector(1, seed=k, size=1.0) for k in (1, 2)]
    doses = calibrated(toy, [*vectors, *vectors], [0.05, 0.05, 0.3, 0.3], signs=[1, -1, 1, -1])
    for dose, vector, budget in zip(doses, [*vectors, *vectors], [0.05, 0.05, 0.3, 0.3], strict=True):
        (found,) = measured(toy, [[Intervention(vector, Add(dose.strength))]], max_tokens=32)
        assert found.mean_kl == pytest.approx(dose.kl, rel=1e-3)
        assert found.mean_kl == pytest.approx(budget, rel=0.055)
        assert dose.reached
    assert [np.sign(d.strength) for d in doses] == [1, -1, 1, -1]
    assert all(abs(big.strength) > abs(small.strength) for small, big in zip(doses[:2], doses[2:], strict=True))


def test_half_a_vector_needs_twice_the_strength(llama):
    vector = llama.vector(1, size=1.0)
    whole, half = calibrated(llama, [vector, vector / 2], 0.1, tolerance=0.01)
    assert half.strength == pytest.approx(2 * whole.strength, rel=0.02)


def test_a_budget_that_no_strength_reaches_is_said(llama):
    (dose,) = calibrated(llama, [llama.vector(1, size=1e-4)], 1.0, max_strength=4.0)
    assert not dose.reached
    assert dose.kl < 0.5
    assert abs(dose.strength) <= 4.0 + 1e-9


@pytest.mark.parametrize("kl, signs", [(0.0, 1), ([0.1, -1.0], 1), (0.1, [1, 0])])
def test_a_budget_or_sign_without_meaning_is_refused(llama, kl, signs):
    with pytest.raises(ValueError, match="calibrate: budgets must be positive and signs 1 or -1, got"):
        calibrated(llama, [llama.vector(1)] * 2, kl, signs=signs)


def test_agreement_is_of_the_likeliest_tokens(toy):
    vector = toy.vector(1, size=1.0)
    none, made = measured(toy, [[], [Intervention(vector)]])
    same = []
    for text in TEXTS:
        ids = toy.ids(text)
        tops = [toy.reference(ids, edits)[1][:-1].argmax(-1) for edits in ({}, {1: vector.direction})]
        same.append(int((tops[0] == tops[1]).sum()))
    assert none.agreement == 1.0
    assert abs(made.agreeing - same).sum() <= 1  # a near-tie may fall otherwise
    assert made.agreement == pytest.approx(made.agreeing.sum() / made.tokens.sum())
    assert made.agreement < 1

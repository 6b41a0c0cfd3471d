"""Training through the target: towards what is planted, and not with the control."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

import xmodel_steer as xs
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.interventions.contexts import steps_of
from xmodel_steer.interventions.mirror import mapped_source
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.studies import Settings, trained
from xmodel_steer.studies.concepts import Concept
from xmodel_steer.studies.distilling import (
    Training,
    _logits,
    _logits_at,
    _Read,
    distilled,
    functional_map,
    shared_tokens,
)
from xmodel_steer.studies.map_tasks import CAPABILITY, REPLACED

TEXTS = [Prompt(text=text) for text in toys.sentences(32, 6)]
TRAINING = Training(steps=60, texts=16, tokens=10, learning_rate=0.1, anchor=0.0, rank=8)
SITE = Site(2)


def own_vector(model: Any) -> xs.SteeringVector:
    """A vector of a model's own, as long as its activations scatter, with its scale."""
    rows = xs.capture(model, TEXTS[:8], [SITE], tokens="all")[SITE]
    scale = rows.values.float().std(0)
    drawn = torch.randn(len(scale), generator=torch.Generator().manual_seed(3)) * scale / 4
    return xs.SteeringVector(drawn, rows.space, "planted").with_scale(scale)


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def twins(toy_named: Callable[[str], toys.Toy]) -> list[Any]:
    """One model twice: what its vector does to it is what it should do to itself."""
    return [toy_named("llama").model] * 2


def test_a_vector_is_trained_towards_what_the_sources_does(twins: list[Any]) -> None:
    """The source's vector is the truth, the start is half noise: training turns towards the truth, its control does not."""
    truth, before = own_vector(twins[0]), weights(twins[1])
    noise = random_like(truth, seed=7)
    start = replace(truth, direction=truth.direction + noise.direction, label="start").with_norm(
        truth.norm(standardised=True)
    )
    made = distilled(*twins, truth, start, TEXTS, TRAINING)
    control = distilled(*twins, truth, start, TEXTS, TRAINING, shuffled=True)
    assert truth.cosine(start) == pytest.approx(0.7, abs=0.2)
    assert truth.cosine(made) > 0.98 and truth.cosine(control) < 0.85
    for vector in (made, control):
        assert vector.norm(standardised=True) == pytest.approx(truth.norm(standardised=True), rel=1e-4)
        assert not vector.direction.requires_grad and vector.space == start.space
    assert all(torch.equal(a, b) for a, b in zip(before, weights(twins[1]), strict=True))
    assert all(p.grad is None for p in twins[1].parameters())


def test_the_anchor_holds_the_vector(twins: list[Any]) -> None:
    truth = own_vector(twins[0])
    start = random_like(truth, seed=7)
    free, held = (distilled(*twins, truth, start, TEXTS, replace(TRAINING, steps=20, anchor=a)) for a in (0.0, 1e3))
    assert start.cosine(held) > 0.999 > start.cosine(free)
    again = distilled(*twins, truth, start, TEXTS, replace(TRAINING, steps=20, anchor=0.0))
    assert torch.equal(free.direction, again.direction)


def test_models_of_two_tokenizers_share_strings(toy_named: Callable[[str], toys.Toy]) -> None:
    source, target = (toy_named(name).model for name in ("llama", "gemma"))
    ours, theirs = shared_tokens(source, target)
    assert len(ours) == len(theirs) > 10 and len(set(ours.tolist())) == len(ours)
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        texts = [tokenizer_of(m).convert_ids_to_tokens(i).replace("Ġ", " ").replace("▁", " ") for m, i in ((source, a), (target, b))]  # fmt: skip
        assert texts[0] == texts[1] and texts[0].isascii()
    vector = own_vector(source)
    made = distilled(source, target, vector, own_vector(target), TEXTS, replace(TRAINING, steps=2))
    assert made.space.model == own_vector(target).space.model and torch.isfinite(made.direction).all()


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_logits_that_training_needs_are_those_of_a_full_pass(
    name: str, toy_named: Callable[[str], toys.Toy]
) -> None:
    """Of paired positions and shared tokens alone, steered too; afterwards the model computes all logits again."""
    model = toy_named(name).model
    (batch,) = batches(model, encode(model, TEXTS[:3]), 3)
    places, shared = (torch.tensor([0, 1, 2]), torch.tensor([3, 0, 2])), torch.tensor([5, 9, 2, 7])
    for setting in ([], steps_of(own_vector(model))):
        full = _logits(model, batch, setting)
        some = _logits_at(model, _Read(batch, places, shared, (torch.empty(0),) * 2), setting)
        assert torch.allclose(some, full[places][:, shared], atol=1e-5)
        assert torch.equal(_logits(model, batch, setting), full)


def test_a_map_is_trained_to_keep_the_targets_predictions(toy_named: Callable[[str], toys.Toy]) -> None:
    """On texts that trained nothing, the KL under replacement falls; a map of rank 0 steps stays as it is."""
    source, target = (toy_named(name).model for name in ("llama", "gemma"))
    texts = [Prompt(text=text) for text in toys.sentences(60, 4)]
    moments = xs.collect_moments(source, target, texts, source_sites=[2], target_sites=[2], max_tokens=24)
    mapping = xs.Ridge().fit(moments.pair(2, 2))
    before = weights(target)
    made = functional_map(source, target, mapping, TEXTS, replace(TRAINING, steps=80, learning_rate=0.3))
    other = [Prompt(text=text) for text in toys.sentences(20, 9)]
    kl = [e.mean_kl for e in side_effects(target, [[mapped_source(source, target, m)] for m in (mapping, made)], other)]
    assert kl[1] < 0.9 * kl[0]
    assert made.score_test is None and "rank 8 through the target" in str(made.info["fitter"])
    assert np.linalg.matrix_rank((made.weight - mapping.weight).numpy(), tol=1e-6) <= 8
    same = functional_map(source, target, mapping, TEXTS, replace(TRAINING, steps=0))
    assert torch.allclose(same.weight, mapping.weight) and torch.allclose(same.bias, mapping.bias)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(target), strict=True))


def test_the_study_compares_trained_vectors_with_their_controls(
    toy_named: Callable[[str], toys.Toy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = [Prompt(text=text) for text in toys.sentences(120, 4)]
    own = Concept("vowels", toys.contrast(), "share of vowels", lambda text: sum(c in "aeiou" for c in text) / 9)
    monkeypatch.setattr(trained, "concept", lambda name: own)
    asked = tuple(Prompt(text=text) for text in toys.sentences(16, 3, 5))
    monkeypatch.setattr(trained, "prompts_of", lambda count: (asked[:count], asked[8:]))
    monkeypatch.setattr("xmodel_steer.evaluation.judges.sentences.similarity", lambda a, b: np.ones(len(a)))
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    questions = MultipleChoice(as_prompts(["the sky is", "the sea is"]), ((" blue", " red"), (" deep", " red")), (0, 0))
    study = xs.studies.distillation(
        toy_named("llama").model, toy_named("gemma").model, ["vowels"], training=replace(TRAINING, steps=2, documents=16),
        counts=(8, 3), capability=questions, max_new_tokens=4,
        settings=Settings(texts[:80], texts[80:], random_seeds=2, neutral_tokens=8),
    )  # fmt: skip
    made = (trained.DISTILLED, trained.RANDOM, trained.SHUFFLED)
    arms = {arm.arm: arm for arm in study.arms if arm.recipe == "vowels"}
    assert tuple(arms) == ("unsteered", "native", "mapped", *made, "random")
    assert {arm.effect.n for arm in arms.values()} == {8}
    assert all(
        arm.kl == pytest.approx(arms["native"].kl, rel=0.1)
        for name, arm in arms.items()
        if name in made and arm.reached
    )
    directions = [study.vectors[f"vowels: {name}"].direction for name in made]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(directions, 2))
    assert set(study.chosen["vowels"]["cosines"]) == {"mapped", *made}
    assert {(arm.arm, arm.recipe) for arm in study.arms} >= {
        (name, recipe) for name in ("ridge", trained.FUNCTIONAL) for recipe in (REPLACED, CAPABILITY)
    }
    assert [line.split(":")[0] for line in study.conclusions] == ["vowels", f"replacement by {trained.FUNCTIONAL}"]
    back = xs.read(xs.save(study, tmp_path / "study"))
    assert back.conclusions == study.conclusions and back.chosen == study.chosen
    with pytest.raises(xs.errors.PromptError, match="give concepts that are scored in texts, got none"):
        xs.studies.distillation(toy_named("llama").model, toy_named("gemma").model, [])

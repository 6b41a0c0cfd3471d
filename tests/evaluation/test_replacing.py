"""Checks of a map: a perfect map passes, and patches equal the untouched model's activations."""

import numpy as np
import pytest
import torch
import toys
from sample_maps import affine, identity, random_map

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.evaluation.overlap import rouge_l
from xmodel_steer.evaluation.patching import patching_grid
from xmodel_steer.models.generation import generate_tokens

PROMPTS = toys.sentences(8, 3, 5)


@pytest.fixture(scope="module")
def twins(toy_named, tokenizers):
    """One model twice, in two objects."""
    return toy_named("llama"), toys.toy("llama", tokenizers[toys.TOYS["llama"].tokenizer])


@pytest.fixture(scope="module")
def reference(twins):
    one, two = twins
    moments = xs.collect_moments(
        two.model, one.model, toys.sentences(40, 4), source_sites=[xs.Site(1)], target_sites=[xs.Site(1)],
        max_tokens=32,
    )  # fmt: skip
    return moments.pair(xs.Site(1), xs.Site(1))


def overlap(texts, others):
    """A similarity that needs no model."""
    return np.array([rouge_l(a, b) for a, b in zip(texts, others, strict=True)])


def check(twins, mapping, reference, prompts=PROMPTS, **kwargs):
    one, two = twins
    return xs.replacement_check(
        two.model,
        one.model,
        mapping,
        prompts,
        reference,
        max_new_tokens=6,
        similarity=overlap,
        **kwargs,
    )


def test_noise_is_that_of_the_seed(twins, reference):
    first, again, other = (
        check(twins, identity(*twins[::-1]), reference, PROMPTS[:3], random_seeds=1, seed=seed).arms
        for seed in (0, 0, 1)
    )
    assert first["random"].kl == again["random"].kl != other["random"].kl
    assert first["mean"].kl == other["mean"].kl and first["mapped"].kl == other["mapped"].kl


def test_a_perfect_map_of_a_twin_passes_and_its_controls_do_not(twins, reference):
    # A toy also writes special tokens and pieces of characters, which no text holds: everywhere else the twins agree.
    model, tokenizer = twins[0].model, twins[0].tokenizer
    prompts = toys.sentences(600, 3, 5)
    ids, before = generate_tokens(model, prompts, max_new_tokens=6, batch_size=64)
    texts = xs.generate(model, prompts, max_new_tokens=6, batch_size=64)
    whole = zip(prompts, before, ids, texts, strict=True)
    prompts = [p for p, b, new, text in whole if tokenizer.decode(b + new) == p + text and text.isascii()][:8]
    made = check(twins, identity(*twins[::-1]), reference, prompts)
    assert made.arms["mapped"].kl.value < 1e-3
    assert min(made.arms[c].kl.low for c in ("mean", "random")) > 0.1
    assert set(made.corrected) == {"mean", "random"}
    assert max(made.corrected.values()) < 0.05
    assert list(made.own) == xs.generate(twins[0].model, prompts, max_new_tokens=6)
    assert made.own == made.theirs  # they are twins
    assert made.arms["mapped"].closer.value == 0.5
    assert "closer to the model than every control: KL 0.00" in made.verdict()
    assert f"n = {len(prompts)}" in made.verdict()
    assert len(prompts) >= 3
    frame = made.to_frame()
    assert frame.arm.tolist() == ["mapped", "mean", "random"]
    assert frame.kl_low.tolist() == [arm.kl.low for arm in made.arms.values()]


def test_a_map_to_anywhere_is_no_better_than_its_controls(twins, reference):
    made = check(twins, random_map(*twins[::-1]), reference, random_seeds=1)
    assert max(made.corrected.values()) > 0.05
    assert "no evidence that the map beats every control" in made.verdict()
    text, own = made.arms["mapped"].texts, made.own
    assert made.arms["mapped"].rouge.value == pytest.approx(overlap(text, own).mean())
    assert made.arms["mapped"].similarity.value == pytest.approx(overlap(text, own).mean())


def test_prompts_and_moments_that_do_not_fit_are_refused(twins, reference):
    mapping = identity(*twins[::-1])
    with pytest.raises(PromptError, match="needs prompts of raw text .* got 0 prompts"):
        check(twins, mapping, reference, [])
    with pytest.raises(PromptError, match="raw text"):
        check(twins, mapping, reference, [[{"role": "user", "content": "Hello"}]])
    other = xs.maps.AffineMap(*(getattr(mapping, f) for f in ("weight", "bias", "source")),
                         xs.space_of(twins[0].model, xs.Site(2)), mapping.source_scale, mapping.target_scale)  # fmt: skip
    with pytest.raises(SpaceMismatchError, match="give moments.pair"):
        check(twins, other, reference)


# --- patching -----------------------------------------------------------------------------------

CLEAN, CORRUPTED = ["the old sky is", "the red sky was"], ["the old ski is", "the red ski was"]
ANSWERS = [("!", "?")] * 2


def maps_at(one, two, layers, make):
    """The map of `make` at several layers."""
    made = []
    for layer in layers:
        whole = make(one, two)
        ends = [xs.space_of(toy.model, xs.Site(layer)) for toy in (one, two)]
        made.append(xs.maps.AffineMap(whole.weight, whole.bias, *ends, whole.source_scale, whole.target_scale))
    return made


def test_equals_the_same_patch_in_the_untouched_model(twins):
    one, two = twins
    depth = one.model.cfg.n_layers
    maps = maps_at(two, one, range(depth), identity)
    made = patching_grid(two.model, one.model, maps, CLEAN, CORRUPTED, ANSWERS)
    good, bad = (one.tokenizer(a, add_special_tokens=False)["input_ids"][-1] for a in ANSWERS[0])
    for i, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        a, b = one.ids(clean), one.ids(corrupted)
        (states, right), (others, wrong) = one.reference(a), one.reference(b)
        gap = [float(logits[-1, good] - logits[-1, bad]) for logits in (right, wrong)]
        np.testing.assert_allclose([made.clean[i], made.corrupted[i]], gap, atol=1e-3)
        for layer in range(depth):
            for p in range(len(a)):
                edit = torch.zeros_like(others[layer])
                edit[p] = states[layer][p] - others[layer][p]
                logits = one.reference(b, {layer: edit})[1]
                expected = (float(logits[-1, good] - logits[-1, bad]) - gap[1]) / (gap[0] - gap[1])
                assert made.own[i, layer, p] == pytest.approx(expected, abs=5e-2)
    np.testing.assert_allclose(made.own[:, -1, -1], 1, atol=1e-3)  # all that the last logits know
    np.testing.assert_allclose(made.own[:, -1, :-1], 0, atol=1e-3)
    there = ~np.isnan(made.mapped)  # the twin's own activations: the same grid, but for position 0
    assert not there[:, :, 0].any()
    assert there[:, :, 1:].all()
    np.testing.assert_allclose(made.mapped[there], made.own[there], atol=1e-3)
    np.testing.assert_allclose(made.recovery("own"), made.own.mean(0))
    assert np.isnan(made.recovery()[:, 0]).all()
    assert len(made.to_frame()) == 2 * depth * len(made.tokens)


def test_across_tokenizers_a_position_without_partner_stays_empty(llama, gemma):
    maps = maps_at(llama, gemma, [1], random_map)
    made = patching_grid(llama.model, gemma.model, maps, ["the harbour is"], ["the harbour it"], ANSWERS[:1])
    from xmodel_steer.core.alignment import align
    from xmodel_steer.models.batching import encode

    source, target = (encode(t.model, [xs.Prompt.of("the harbour is")])[0].token_ends() for t in (llama, gemma))
    pairs = align(source, target)
    assert np.flatnonzero(~np.isnan(made.mapped[0, 0])).tolist() == list(pairs.target)
    assert made.tokens[-1].startswith("-1 ")


@pytest.mark.parametrize(
    "clean, corrupted, answers, message",
    [
        ([], [], [], "got 0, 0 and 0"),
        (CLEAN, CORRUPTED[:1], ANSWERS, "got 2, 1 and 2"),
        (["the sky"], ["the old harbour sky"], ANSWERS[:1], "swap words of equally many tokens"),
        (CLEAN[:1], CORRUPTED[:1], [("a long answer", "!")], "is not one token after"),
        (CLEAN[:1], CORRUPTED[:1], [("!", "!")], "both answers are the token"),
        (CLEAN[:1], CLEAN[:1], ANSWERS[:1], "the same logit difference .* nothing to recover"),
    ],
)
def test_pairs_that_cannot_be_patched_are_refused(twins, clean, corrupted, answers, message):
    one, two = twins
    with pytest.raises(PromptError, match=message):
        patching_grid(two.model, one.model, [identity(two, one)], clean, corrupted, answers)


def test_a_map_of_other_models_is_refused(twins, gemma):
    one, _ = twins
    width = gemma.model.cfg.d_model
    mapping = affine(gemma, gemma, torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    with pytest.raises(SpaceMismatchError):
        patching_grid(gemma.model, one.model, [mapping], CLEAN, CORRUPTED, ANSWERS)

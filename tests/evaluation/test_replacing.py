"""Checks of a map: a perfect map passes, and patches equal the untouched model's activations."""

import numpy as np
import pytest
import toys
from sample_maps import identity, random_map

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.evaluation.overlap import rouge_l
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

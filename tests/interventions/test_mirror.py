"""Another model's activations, a mean or noise at a site: against what the models compute apart."""

import pytest
import torch
import toys
from sample_maps import SITE, identity, random_map
from toys import TEXTS, cache_in, cached

import xmodel_steer as xs
from xmodel_steer.core.errors import SiteError, SpaceMismatchError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.interventions.mirror import mapped_source, mean_of, noise_like
from xmodel_steer.models import generation
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.tokens import tokenise

PROMPTS = ["the old harbour", "she said that the café", "a", "in the winter the wind is"]


@pytest.fixture(scope="module")
def twins(toy_named, tokenizers):
    """One model twice, in two objects."""
    return toy_named("llama"), toys.toy("llama", tokenizers[toys.TOYS["llama"].tokenizer])


def at_site(toy, text):
    """The site's activations at every token, as later blocks see them."""
    return xs.capture(toy.model, [text], [SITE], tokens="all", include_special=True)[SITE].values


def test_its_own_activations_from_a_twin_change_nothing(twins):
    one, two = twins
    step = mapped_source(two.model, one.model, identity(two, one))
    plain, replaced = xs.evaluation.side_effects(one.model, [[], [step]], TEXTS)
    assert replaced.mean_kl < 1e-4
    assert replaced.agreement == 1.0
    assert replaced.loss == pytest.approx(plain.loss, rel=1e-4)


@pytest.mark.parametrize("ends", [("llama", "gemma"), ("gemma", "llama")])
def test_each_token_gets_the_image_of_the_last_source_token_that_ends_no_later(toy_named, ends):
    """Across tokenizers, from activations of an untouched copy of the source."""
    one, two = map(toy_named, ends)
    mapping, replaced = random_map(one, two), 0
    for text in [*PROMPTS, "a red 🙂 sun"] if ends[1] == "llama" else PROMPTS:
        own = at_site(two, text)
        with xs.steering(two.model, mapped_source(one.model, two.model, mapping)):
            made = at_site(two, text)
        source, target = (tokenise(toy.tokenizer, [Prompt(text=text)])[0] for toy in (one, two))
        states = one.reference(list(source.ids))[0][SITE.layer]
        for p, end in enumerate(target.ends):
            if end in target.ends[p + 1 :]:
                continue  # a piece of a character's bytes: nothing ends with it yet
            partner = max((i for i, e in enumerate(source.ends) if 0 <= e <= end), default=-1)
            if p > 0 and end >= 0 and partner > 0:
                expected = mapping.transform(states[partner].double())
                torch.testing.assert_close(made[p].double(), expected, rtol=1e-3, atol=1e-3)
                replaced += 1
            else:
                assert torch.equal(made[p], own[p])
    assert replaced > 20


@pytest.mark.parametrize("ends", [("llama", "gemma"), ("gemma", "llama"), ("gpt2", "qwen")])
def test_the_sources_cache_and_the_batch_change_nothing(toy_named, ends):
    source, target = map(toy_named, ends)
    mapping = random_map(source, target)

    def texts(batch_size, use_cache):
        with xs.steering(target.model, mapped_source(source.model, target.model, mapping, use_cache=use_cache)):
            return xs.generate(target.model, PROMPTS, max_new_tokens=8, batch_size=batch_size)

    own = xs.generate(target.model, PROMPTS, max_new_tokens=8)
    made = texts(4, True)
    assert made == texts(1, True) == texts(3, False)
    assert made != own


@pytest.mark.parametrize("use_cache", [True, False])
def test_texts_that_have_ended_leave_the_sources_batch_too(toy_named, use_cache, monkeypatch):
    source, target = toy_named("gemma"), toy_named("llama")
    step = mapped_source(source.model, target.model, random_map(source, target), use_cache=use_cache)

    def made(batch_size):
        with xs.steering(target.model, step):
            return generate_tokens(target.model, TEXTS, max_new_tokens=8, batch_size=batch_size)[0]

    free = made(1)
    alone = [[t for t in own[:4] if all(t not in other for other in free if other is not own)] for own in free]
    stops = frozenset(own[0] for own in [own for own in alone if own][:3])  # each ends one text
    assert len(stops) == 3
    monkeypatch.setattr(generation, "_stop_ids", lambda model: stops)
    expected = [row[: next((i for i, token in enumerate(row) if token in stops), 8)] for row in free]
    assert made(len(TEXTS)) == expected
    assert sum(len(row) == 8 for row in expected) == len(TEXTS) - 3


def test_positions_hold_for_replacements(llama, gemma):
    mapping = random_map(llama, gemma)
    whole = mapped_source(llama.model, gemma.model, mapping)
    last = mapped_source(llama.model, gemma.model, mapping, positions="last")
    text = PROMPTS[0]
    own = at_site(gemma, text)
    with xs.steering(gemma.model, whole):
        all_ = at_site(gemma, text)
    with xs.steering(gemma.model, last):
        made = at_site(gemma, text)
    assert torch.equal(made[:-1], own[:-1])
    assert torch.equal(made[-1], all_[-1])
    assert torch.equal(at_site(gemma, text), own)


def test_a_mean_stands_everywhere_but_at_the_beginning(toy):
    mean = torch.arange(float(toy.model.cfg.d_model))
    own = at_site(toy, TEXTS[0])
    with xs.steering(toy.model, mean_of(xs.space_of(toy.model, SITE), mean)):
        made = at_site(toy, TEXTS[0])
    assert torch.equal(made[0], own[0])
    assert torch.equal(made[1:], mean.expand_as(made[1:]))


def test_noise_has_the_moments_asked_for_and_does_not_depend_on_batch_or_cache(llama):
    width = llama.model.cfg.d_model
    space, mean, scale = xs.space_of(llama.model, SITE), torch.full((width,), 3.0), torch.linspace(0.5, 2, width)
    step = noise_like(space, mean, scale, seed=1)
    with xs.steering(llama.model, step):
        rows = torch.cat([at_site(llama, text)[1:] for text in TEXTS])
        made = [
            xs.generate(llama.model, PROMPTS, max_new_tokens=6, batch_size=size, use_cache=cache)
            for size, cache in ((4, True), (1, True), (4, False))
        ]
    assert made[0] == made[1] == made[2]
    standard = (rows - mean) / scale
    assert abs(float(standard.mean())) < 0.1
    assert float(standard.std()) == pytest.approx(1, abs=0.1)
    for seed in (2, 20261128):  # a date is a seed
        with xs.steering(llama.model, noise_like(space, mean, scale, seed=seed)):
            assert not torch.equal(at_site(llama, TEXTS[0])[1:], rows[: len(llama.ids(TEXTS[0])) - 1])


def test_a_map_of_other_models_is_refused(llama, gemma):
    mapping = random_map(llama, gemma)
    with pytest.raises(SpaceMismatchError, match="mapped_source"):
        mapped_source(gemma.model, llama.model, mapping)
    with (
        pytest.raises(SpaceMismatchError),
        xs.steering(llama.model, mean_of(mapping.target, torch.zeros(mapping.target.width))),
    ):
        pass


def test_a_text_whose_beginning_was_not_seen_is_refused(llama, gemma):
    model = gemma.model
    ids = torch.tensor([gemma.ids(PROMPTS[3])])
    with torch.no_grad():
        cache = cache_in(model.original_model(ids[:, :4], use_cache=True))
    step = mapped_source(llama.model, model, random_map(llama, gemma))
    with pytest.raises(SiteError, match="continues a text whose beginning was not seen"), xs.steering(model, step):
        model.original_model(ids[:, 4:], **cached(cache), use_cache=True)

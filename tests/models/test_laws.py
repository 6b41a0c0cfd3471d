"""A decoder proves itself: one that is right passes, and each wrong one fails its own law."""

import warnings

import pytest
import torch
import toys
from toys import TEXTS

from xmodel_steer.core.errors import CacheWarning, ModelWarning
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.models import laws, passes, registry
from xmodel_steer.models.batching import batches, encode, pad_id
from xmodel_steer.models.facts import conduct_of
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.laws import BATCHED, CACHED, DROPPING, PADDED, Conduct, prove
from xmodel_steer.models.registry import register

IDS = [[1, 2, 3, 4, 5, 6], [7, 6, 5, 4, 3, 2], [5, 3, 1, 2]]


class Sums:
    """A decoder in ten lines: a token's logits hang on the sum of the words up to it; its cache is that sum and a count."""

    def __init__(self, fault="", dtype=torch.float64):
        self.fault, self.dtype, self.passes = fault, dtype, 0
        self.words = torch.randn(9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def __call__(self, ids, mask, cache, use_cache):
        new = ids.shape[1]
        real = torch.ones_like(mask) if self.fault == "padding is text" else mask
        words = self.words[ids] * real[:, -new:, None]
        past, count = (torch.zeros_like(words[:, 0]), 0) if cache is None else (cache["sum"], cache["count"])
        if self.fault == "the cache is not read" and cache is not None:
            past = torch.zeros_like(past)
        if self.fault == "counts padding" and cache is not None:
            past = past * 1.01
        state = past[:, None] + words.cumsum(1)
        if self.fault == "rows mix" and len(ids) > 1:
            state = state + 0.01 * state.mean(0)
        if self.fault == "no cache" and use_cache:
            raise TypeError("forward() got an unexpected keyword argument 'use_cache'")
        if self.fault == "gives NaN in a batch" and len(ids) > 1:
            state = state * torch.nan
        logits = (torch.tanh(state) @ self.words.T).to(self.dtype)
        self.passes += 1
        return logits[:, -laws.LAST :], {"sum": state[:, -1], "count": count + new}

    def drop(self, cache, rows):
        """Leave some rows in the cache."""
        if self.fault == "rows cannot leave":
            raise AttributeError("no batch_select_indices")
        if self.fault != "the first rows stay":
            cache["sum"] = cache["sum"][rows]
        else:
            cache["sum"] = cache["sum"][: len(rows)]


def tried(fault, dtype=torch.float32):
    decoder = Sums(fault)
    return prove(decoder, decoder.drop, IDS, dtype=dtype, pad=0)


def test_a_right_decoder_keeps_every_law_in_seven_passes():
    decoder = Sums()
    made = prove(decoder, decoder.drop, IDS, dtype=torch.float32, pad=0)
    assert decoder.passes == 7
    assert made == Conduct(made.laws) and all(made.laws)
    assert [law.name for law in made.laws] == [BATCHED, PADDED, CACHED, DROPPING]


@pytest.mark.parametrize(
    "fault, fails",
    {
        "padding is text": [PADDED],
        "the cache is not read": [CACHED],
        "counts padding": [CACHED],
        "no cache": [CACHED],
        "rows mix": [BATCHED],
        "gives NaN in a batch": [BATCHED],
        "rows cannot leave": [DROPPING],
        "the first rows stay": [DROPPING],
    }.items(),
)
def test_each_fault_fails_its_own_law_and_is_told(fault, fails):
    made = tried(fault)
    assert [law.name for law in made.laws if law.state == "failed"] == fails
    assert all(law.detail and law.remedy for law in made.laws if law.state == "failed")
    assert (made.batched, made.padded, made.cached, made.dropping) == tuple(map(bool, made.laws))


@pytest.mark.parametrize("fault", ["padding is text", "the cache is not read"])
def test_gross_faults_are_seen_in_bfloat16_too_and_rounding_is_not_one(fault):
    assert not all(tried(fault, torch.bfloat16).laws)
    rounded = Sums(dtype=torch.bfloat16)
    assert all(prove(rounded, rounded.drop, IDS, dtype=torch.bfloat16, pad=0).laws)


def test_what_cannot_read_a_text_alone_is_refused():
    def broken(*_):
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        prove(broken, lambda *_: None, IDS, dtype=torch.float32, pad=0)


def test_toys_prove_themselves(toy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(toy.model, name=toy.name, tokenizer=toy.tokenizer)
    assert all(conduct_of(toy.model).laws) and len(conduct_of(toy.model).laws) == 4


def spoilt(toy, monkeypatch, spoil):
    """The toy registered while its forward passes are spoilt, and then right again."""
    right = passes.forward

    def forward(model, ids, mask, **settings):
        logits, cache = right(model, ids, mask, **settings)
        return spoil(logits, settings.get("cache") is not None, mask), cache

    with monkeypatch.context() as patch:
        patch.setattr(registry, "forward", forward)
        register(toy.model, name=toy.name, tokenizer=toy.tokenizer)


@pytest.fixture
def own(tokenizers):
    """A Llama toy of the test's own."""
    return toys.toy("llama", tokenizers["byte_level"])


def test_a_model_that_decodes_wrong_with_a_cache_gets_none(own, monkeypatch):
    expected = generate_tokens(own.model, TEXTS[:4], max_new_tokens=4, use_cache=False, stop_at_eos=False)
    says = r"llama: not true of this model here: one cached step = the whole text read again \(logits differ by .*\); generate reads"
    with pytest.warns(CacheWarning, match=says):
        spoilt(own, monkeypatch, lambda logits, cached, _: logits.flip(-1) if cached else logits)
    caches = []
    monkeypatch.setattr(
        "xmodel_steer.models.generation.forward", lambda *a, **k: caches.append(k["cache"]) or passes.forward(*a, **k)
    )
    assert generate_tokens(own.model, TEXTS[:4], max_new_tokens=4, stop_at_eos=False) == expected
    assert caches and not any(caches)


def test_padding_has_an_embedding_also_where_the_tokenizers_pad_token_has_none(own, monkeypatch):
    monkeypatch.setattr(type(own.tokenizer), "pad_token_id", toys.VOCABULARY + 3, raising=False)
    register(own.model, name=own.name, tokenizer=own.tokenizer)
    assert all(conduct_of(own.model).laws)
    assert pad_id(own.model) == own.tokenizer.eos_token_id


def test_a_model_that_cannot_be_padded_reads_one_length_at_a_time(own, monkeypatch):
    def spoil(logits, _, mask):
        return logits if bool(mask.all()) else logits.flip(-1)

    with pytest.warns(ModelWarning, match="padded on the left = .*; only texts of one length are read together"):
        spoilt(own, monkeypatch, spoil)
    encodings = encode(own.model, as_prompts([*TEXTS, "Call us", "Call it"]))
    made = batches(own.model, encodings, 4)
    assert all(bool(batch.mask.all()) for batch in made)
    assert sorted(row for batch in made for row in batch.rows) == list(range(len(encodings)))
    assert max(len(batch.rows) for batch in made) > 1


def test_a_model_that_mixes_its_rows_reads_one_text_at_a_time(own, monkeypatch):
    with pytest.warns(ModelWarning, match="a text in a batch = the text alone .*; every text is read alone"):
        spoilt(own, monkeypatch, lambda logits, *_: logits.flip(-1) if len(logits) > 1 else logits)
    assert all(len(batch.rows) == 1 for batch in batches(own.model, encode(own.model, as_prompts(TEXTS)), 4))


def test_rows_stay_where_they_cannot_leave(own, monkeypatch):
    texts = TEXTS[:4]
    expected, _ = generate_tokens(own.model, texts, max_new_tokens=6, stop_at_eos=False)
    stop = expected[0][1]
    monkeypatch.setattr("xmodel_steer.models.generation._stop_ids", lambda model: frozenset({stop}))

    def refuse(*_):
        raise AttributeError("no batch_select_indices")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "keep_rows", refuse)
        register(own.model, name=own.name, tokenizer=own.tokenizer)
    assert [law.name for law in conduct_of(own.model).laws if not law] == [DROPPING]
    monkeypatch.setattr("xmodel_steer.models.generation.keep_rows", refuse)
    made, _ = generate_tokens(own.model, texts, max_new_tokens=6)
    assert made == [row[: row.index(stop)] if stop in row else row for row in expected]
    assert any(len(row) < 6 for row in made)


def test_the_limits_are_where_the_docstring_says(own):
    """A step that sees the newest token alone is off by more than the limit, also where nothing was ever trained."""
    ids = torch.tensor([own.ids(TEXTS[1])])
    with torch.no_grad():
        whole = own.hf(ids).logits[0, -1:]
        alone = own.hf(ids[:, -1:]).logits[0]
    assert float(laws._distance(alone, whole)) > 10 * laws.EXACT

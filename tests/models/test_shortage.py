"""A machine without enough memory: a smaller batch where that helps, else one clear error."""

import gc
import weakref

import pytest
import torch
from toys import TEXTS, Toy

import xmodel_steer as xs
from xmodel_steer.core.errors import ModelError, NonFiniteError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.evaluation.damage import losses
from xmodel_steer.models import shortage
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.passes import forward

SHORTAGES = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nGPU 0 has a total of 8 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError(),
}
CALLS = {
    "capture": lambda model: xs.capture(model, TEXTS, [xs.Site(1)], batch_size=4),
    "generate": lambda model: xs.generate(model, TEXTS, max_new_tokens=3, batch_size=4),
    "damage": lambda model: losses(model, [[]], TEXTS, batch_size=4),
    "collect": lambda model: xs.collect_moments(
        model, model, TEXTS, source_sites=[1], target_sites=[1], batch_size=4, max_tokens=64
    ),
    "harvest": lambda model: xs.harvest(model, TEXTS, ZERO[1], end="source", sites=[1], batch_size=4, max_tokens=64),
}
ZERO: list = []


@pytest.fixture
def short(monkeypatch):
    """Make the first block of a model run out of memory."""

    def of(toy: Toy, error: BaseException):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(type(toy.model), "forward", fail)
        monkeypatch.setattr(type(toy.model.original_model), "forward", fail)

    return of


@pytest.fixture
def eager(llama, monkeypatch):
    """The toy as a loaded model is: with eager attention, which keeps its scores."""
    monkeypatch.setattr(llama.model.original_model.config, "_attn_implementation", "eager")


@pytest.mark.parametrize("kind", SHORTAGES)
@pytest.mark.parametrize("call", CALLS)
def test_out_of_memory_says_what_to_halve(llama, short, tmp_path, call, kind):
    ZERO[:] = [llama.vector(1), tmp_path / "store"]
    short(llama, SHORTAGES[kind])
    says = (
        r"llama: out of memory on cpu in a pass over \d rows of \d+ tokens; halve batch_size \(here to \d\) or max_tok"
    )
    with pytest.raises(ModelError, match=says) as raised:
        CALLS[call](llama.model)
    assert raised.value.__cause__ is SHORTAGES[kind]
    assert "GPU 0" not in str(raised.value)


def test_one_text_alone_is_told_to_be_cut(llama, short):
    short(llama, MemoryError())
    with pytest.raises(
        ModelError, match=r"one row of \d tokens; batch_size cannot help one text: cut it with max_tokens=\d"
    ):
        xs.capture(llama.model, ["The sky"], [xs.Site(1)])


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), NonFiniteError("NaN"), KeyError("x")], ids=repr)
def test_other_errors_pass_as_they_are(llama, short, error):
    short(llama, error)
    with pytest.raises(type(error)) as raised:
        xs.capture(llama.model, TEXTS, [xs.Site(1)])
    assert raised.value is error


def test_the_memory_of_a_failed_pass_is_free_while_its_error_is_handled(llama):
    def fail() -> None:
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise MemoryError

    held: list = []
    with pytest.raises(ModelError) as raised, shortage.memory_errors(llama.model, 4, 10):
        fail()
    gc.collect()
    assert raised.value.__cause__ is not None and held[0]() is None


# --- attention -------------------------------------------------------------------------------


def test_batches_end_where_their_attention_scores_would_fill_the_memory(llama, eager, monkeypatch):
    encodings = encode(llama.model, as_prompts(TEXTS))
    longest = max(len(e.ids) for e in encodings)
    row = shortage.attention_bytes(llama.model, longest)
    assert row == 10 * 4 * longest**2
    whole = xs.capture(llama.model, TEXTS, [xs.Site(1)], batch_size=8)[xs.Site(1)]
    sizes = [len(batch.rows) for batch in batches(llama.model, encodings, 8)]
    monkeypatch.setattr(shortage, "memory_of", lambda device: 9 * row)  # a quarter: two rows of the longest
    bounded = batches(llama.model, encodings, 8)
    assert max(sizes) > len(bounded[0].rows) == 2
    for batch in bounded:
        assert len(batch.rows) * shortage.attention_bytes(llama.model, batch.ids.shape[1]) <= 9 * row / 4
    assert sorted(r for batch in bounded for r in batch.rows) == list(range(len(TEXTS)))
    made = xs.capture(llama.model, TEXTS, [xs.Site(1)], batch_size=8)[xs.Site(1)]
    torch.testing.assert_close(made.values, whole.values, rtol=1e-4, atol=1e-5)


def test_a_text_whose_attention_can_never_fit_is_refused_before_any_pass(llama, eager, short, monkeypatch):
    short(llama, AssertionError("a pass"))
    monkeypatch.setattr(shortage, "memory_of", lambda device: 1000)
    says = r"llama: attention over a text of \d+ tokens takes about 0.1 MiB, over the 0.0 MiB of memory of cpu; give max_tok"
    with pytest.raises(ModelError, match=says):
        xs.capture(llama.model, TEXTS, [xs.Site(1)])
    with pytest.raises(ModelError, match=says):
        xs.generate(llama.model, TEXTS, max_new_tokens=2)


def test_models_that_keep_no_scores_are_not_bounded(llama, monkeypatch):
    monkeypatch.setattr(shortage, "memory_of", lambda device: 1000)
    monkeypatch.setattr(llama.model.original_model.config, "_attn_implementation", "sdpa")
    assert shortage.rows_within(llama.model, 10**6) > 10**9
    monkeypatch.setattr(llama.model.original_model.config, "_attn_implementation", "eager")
    monkeypatch.setattr(shortage, "memory_of", lambda device: 0)  # a system that does not tell
    assert shortage.rows_within(llama.model, 10**6) > 10**9


def test_the_memory_of_this_machine_is_known(llama):
    assert 2**28 < shortage.memory_of() < 2**50
    ids = torch.ones(1, 3, dtype=torch.long)
    with shortage.memory_errors(llama.model, 1, 3):
        assert forward(llama.model, ids, ids)[0] is not None

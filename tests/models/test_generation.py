"""Continuations: those of Hugging Face, whatever the batch, with the cache or without."""

import copy
import inspect
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from toys import CONTEXT, TEXTS

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import difference_of_means
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.spaces import Site
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Ablate, Add, Clamp, Gate, Rotate, placed
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models import generation
from xmodel_steer.models.generation import generate, generate_tokens, stream
from xmodel_steer.models.passes import LAYOUT, layout
from xmodel_steer.models.registry import register

STEPS = 8


def tokens(toy, texts=TEXTS, *, stop_at_eos=False, **kwargs):
    return generate_tokens(toy.model, texts, max_new_tokens=STEPS, stop_at_eos=stop_at_eos, **kwargs)[0]


def looking(monkeypatch, look):
    """Let `generate` look at the tokens after so many steps, as it does on a GPU."""
    decode = generation._decode
    monkeypatch.setattr(generation, "_decode", lambda *args: decode(*args[:-1], look))


def test_greedy_equals_the_untouched_model_one_at_a_time(toy):
    made, prompts = generate_tokens(toy.model, TEXTS, max_new_tokens=STEPS, stop_at_eos=False)
    assert prompts == [toy.ids(text) for text in TEXTS]
    assert made == [toy.continuation(toy.ids(text), STEPS) for text in TEXTS]
    assert len({tuple(row) for row in made}) == len(TEXTS)


@pytest.mark.parametrize("size, use_cache", [(1, True), (3, True), (8, False), (1, False)])
def test_batch_and_cache_change_nothing(toy, size, use_cache):
    assert tokens(toy, batch_size=size, use_cache=use_cache) == tokens(toy, batch_size=8)


def test_order_of_the_prompts_is_kept(toy):
    assert tokens(toy, TEXTS[::-1], batch_size=3) == tokens(toy, batch_size=3)[::-1]


@pytest.mark.parametrize("place", ["tokenizer", "generation_config"])
def test_a_text_ends_at_eos_and_the_others_go_on(toy, place, monkeypatch):
    free = tokens(toy)
    eos = free[0][3]
    if place == "tokenizer":
        other = copy.deepcopy(toy.tokenizer)
        other.eos_token = other.convert_ids_to_tokens(eos)
        register(toy.model, name=toy.name, tokenizer=other)
    elif toy.hf is None:
        pytest.skip("a HookedTransformer has no generation_config")
    else:
        monkeypatch.setattr(toy.model.original_model.generation_config, "eos_token_id", [eos, 10**6])
    try:
        made = tokens(toy, stop_at_eos=True)
    finally:
        register(toy.model, name=toy.name, tokenizer=toy.tokenizer)
    stops = {eos} if place == "tokenizer" else {eos, toy.tokenizer.eos_token_id}
    expected = [row[: next((i for i, token in enumerate(row) if token in stops), STEPS)] for row in free]
    assert made == expected
    assert len(made[0]) < STEPS < max(map(len, made)) + 1


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature, look", [(0.0, 1), (1.0, 1), (0.0, 3), (0.0, STEPS)])
def test_texts_that_have_ended_leave_the_batch(toy, use_cache, temperature, look, monkeypatch):
    """Each row keeps its steering, its sampling and its cache when rows before it leave, however seldom they are looked at."""
    looking(monkeypatch, look)
    mask = torch.zeros(len(TEXTS), 2, dtype=torch.bool)
    mask[::2] = True  # every other prompt is steered, at its first tokens
    vector = toy.vector(1, seed=1, size=3.0)
    steps = [
        Intervention(vector, Add(1.0), mask),
        Intervention(vector, Add(0.5), "generated", prompts=frozenset({1, 3})),
    ]

    def made(**kwargs):
        with steering(toy.model, steps):
            return tokens(toy, temperature=temperature, **kwargs)

    free = made(batch_size=len(TEXTS))

    def ended(stops):
        return [row[: next((i for i, token in enumerate(row) if token in stops), STEPS)] for row in free]

    # The pair of tokens behind which the texts end at the most different steps.
    pairs = map(frozenset, combinations(sorted({token for row in free for token in row}), 2))
    stops = max(pairs, key=lambda pair: len({len(row) for row in ended(pair)}))
    expected = ended(stops)
    assert len({len(row) for row in expected}) > 2
    monkeypatch.setattr(generation, "_stop_ids", lambda model: stops)
    sizes = []
    monkeypatch.setattr(
        generation, "layout", lambda rows, *args, **more: sizes.append(len(rows)) or layout(rows, *args, **more)
    )
    assert made(batch_size=len(TEXTS), stop_at_eos=True, use_cache=use_cache) == expected
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[-1] < sizes[0] or look == STEPS) and sizes[0] == len(TEXTS)


class Reads(TorchFunctionMode):
    """Counts the calls at which the processor would wait for a GPU, or copy to it."""

    WAITING = (
        Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.cpu,
        Tensor.numpy, Tensor.nonzero, Tensor.masked_select, Tensor.equal, torch.nonzero, torch.masked_select,
        torch.equal, torch.tensor, torch.as_tensor,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.places = Counter()

    def __torch_function__(self, called, types, args=(), kwargs=None):
        waits = called in self.WAITING
        if called in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else args[1:2]
            waits = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)
        if waits:
            frame = inspect.currentframe().f_back
            self.places[called.__name__, frame.f_code.co_filename, frame.f_lineno] += 1
        return called(*args, **(kwargs or {}))


@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_between_two_looks_nothing_waits_for_a_gpu(toy, stop_at_eos, monkeypatch):
    """Three steps wait as often as seven, unsteered and with every operator, at names of positions and some prompts."""
    looking(monkeypatch, STEPS)
    monkeypatch.setattr(generation, "_stop_ids", lambda model: frozenset({10**6}))
    rows = capture(toy.model, TEXTS, [1], tokens="all")[Site(1)]
    halves = (replace(rows, values=half, rows=()) for half in rows.values.chunk(2))
    vector = difference_of_means(*halves, scale=rows.values.std(0))
    steps = [
        Intervention(vector, Add(2.0), "generated", prompts=frozenset({0, 2}), schedule=(1.0, 0.5)),
        Intervention(vector, Ablate(), "all"),
        Intervention(vector, Rotate(by=5.0), ("prompt", "generated")),
        Intervention(vector, Clamp("positive"), "all", gate=Gate(vector)),
        Intervention(vector, Add(1.0), "last"),
    ]
    for setting in ([], steps):
        counted = []
        for number in (3, 7):
            with steering(toy.model, setting), Reads() as reads:
                generate_tokens(toy.model, TEXTS[:3], max_new_tokens=number, stop_at_eos=stop_at_eos)
            # Where a model attends by SDPA, transformers itself looks at the mask in every step.
            counted.append(
                {p: n for p, n in reads.places.items() if not p[1].endswith("transformers/masking_utils.py")}
            )
        assert counted[0] == counted[1]
        assert any("tolist" in place for place in counted[0])


def test_a_direction_is_copied_to_a_device_once():
    direction = torch.ones(4)
    there = placed(direction)
    first, second, own = (there(torch.empty(2, 4, device=device)) for device in ("meta", "meta", "cpu"))
    assert first is second and first.device.type == "meta" and own is direction


def test_settings_that_come_with_the_model_are_not_read(bridge, monkeypatch):
    plain = tokens(bridge)
    for name, value in dict(do_sample=True, temperature=2.0, repetition_penalty=9.0, no_repeat_ngram_size=1).items():
        monkeypatch.setattr(bridge.model.original_model.generation_config, name, value)
    assert tokens(bridge) == plain


def test_samples_are_reproducible_and_do_not_depend_on_the_batch(toy):
    def sampled(texts=TEXTS[:4], seed=3, temperature=1.5, **kwargs):
        return tokens(toy, texts, temperature=temperature, seed=seed, **kwargs)

    one = sampled()
    torch.rand(5)  # the global generator plays no part
    assert sampled() == sampled(batch_size=1) == sampled(batch_size=3, use_cache=False) == one
    assert one not in (sampled(seed=4), tokens(toy, TEXTS[:4]))
    twice = sampled(TEXTS[:1] * 2)
    assert twice[0] == one[0] != twice[1]
    assert sampled(temperature=1e-4) == tokens(toy, TEXTS[:4])


def test_other_seeds_are_other_samples_in_every_row(toy):
    def sampled(seed):
        return tokens(toy, TEXTS[:1] * 12, temperature=2.0, seed=seed)

    drawn = [tuple(own) for seed in range(3) for own in sampled(seed)]
    assert len(set(drawn)) > 30  # of 36: with row r of one seed in row r - 1 of the next, there were 14


def test_samples_follow_the_models_probabilities(llama):
    n, temperature = 1500, 0.7
    made, _ = generate_tokens(
        llama.model,
        TEXTS[:1] * n,
        max_new_tokens=1,
        temperature=temperature,
        batch_size=500,
        stop_at_eos=False,
    )
    shares = torch.bincount(torch.tensor(made)[:, 0], minlength=llama.model.cfg.d_vocab) / n
    expected = (llama.reference(llama.ids(TEXTS[0]))[1][-1] / temperature).softmax(-1)
    likely = expected > 0.01
    assert likely.sum() > 3
    error = (expected * (1 - expected) / n).sqrt()
    assert ((shares - expected).abs() < 5 * error)[likely].all()


def test_text_is_the_added_tokens_with_their_spaces(toy):
    made, tokenizer = tokens(toy), toy.tokenizer
    for text, new in zip(generate(toy.model, TEXTS, max_new_tokens=STEPS, stop_at_eos=False), made, strict=True):
        if tokenizer.bos_token is None:  # byte level: nothing is lost in decoding
            assert text == tokenizer.decode(new, skip_special_tokens=True)
        else:
            pieces = [tokenizer.convert_ids_to_tokens(token) for token in new if token not in tokenizer.all_special_ids]
            assert text == "".join(pieces).replace("▁", " ")


def test_a_leading_space_is_kept(gemma):
    """This tokenizer's decoder drops the first token's space."""
    texts = generate(gemma.model, TEXTS, max_new_tokens=STEPS, stop_at_eos=False)
    assert any(text.startswith(" ") for text in texts)


def test_chat_prompts(llama):
    chat = [{"role": "user", "content": "Call me Ishmael."}]
    rendered = llama.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = llama.ids(rendered, add_special_tokens=False)
    made, prompts = generate_tokens(llama.model, [chat, "Call me"], max_new_tokens=STEPS, stop_at_eos=False)
    assert prompts == [ids, llama.ids("Call me")]
    assert made == [llama.continuation(p, STEPS) for p in prompts]
    (text,) = generate(llama.model, [chat], max_new_tokens=STEPS, stop_at_eos=False)
    assert text == llama.tokenizer.decode(made[0], skip_special_tokens=True)


def test_the_context_may_be_filled_but_not_exceeded(toy):
    length = len(toy.ids(TEXTS[0]))
    made, _ = generate_tokens(toy.model, TEXTS[:1], max_new_tokens=CONTEXT - length, stop_at_eos=False)
    assert made[0] == toy.continuation(toy.ids(TEXTS[0]), CONTEXT - length)
    says = rf"{length} tokens and {CONTEXT - length + 1} new ones exceed the {CONTEXT} that {toy.name} reads; shorten"
    with pytest.raises(PromptError, match=says):
        generate(toy.model, TEXTS[:1], max_new_tokens=CONTEXT - length + 1)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        (dict(prompts=[]), PromptError, "no prompts were given"),
        (dict(prompts="Call me"), PromptError, r"for a single one, \[prompt\]"),
        (dict(prompts=[""]), PromptError, "the text is empty"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_refuses(llama, arguments, error, says):
    with pytest.raises(error, match=says):
        generate(llama.model, **(dict(prompts=TEXTS, max_new_tokens=2) | arguments))


def test_chat_messages_need_a_template(gemma):
    with pytest.raises(PromptError, match="has none .a base model.*give raw text instead"):
        generate(gemma.model, [[{"role": "user", "content": "Call me"}]])


def test_a_stream_is_what_generate_gives_one_token_at_a_time(toy):
    for text in TEXTS:
        (expected,) = generate(toy.model, [text], max_new_tokens=STEPS)
        (row,) = tokens(toy, [text], stop_at_eos=True)
        seen = list(stream(toy.model, text, max_new_tokens=STEPS))
        assert seen[-1].text == expected and len(seen) == min(STEPS, len(row) + 1)
        for k, token in enumerate(row):
            (upto,) = generate(toy.model, [text], max_new_tokens=k + 1)
            assert seen[k].text == upto and int(seen[k].logits.argmax()) == token


def test_a_stream_ends_at_eos_with_the_logits_that_ended_it(toy, monkeypatch):
    (first,) = tokens(toy, TEXTS[:1])[0][:1]
    other = copy.deepcopy(toy.tokenizer)
    other.eos_token = other.convert_ids_to_tokens(first)
    register(toy.model, name=toy.name, tokenizer=other)
    try:
        (only,) = stream(toy.model, TEXTS[0], max_new_tokens=STEPS)
    finally:
        register(toy.model, name=toy.name, tokenizer=toy.tokenizer)
    assert only.text == "" and int(only.logits.argmax()) == first


def test_between_two_tokens_of_a_stream_others_are_undisturbed(llama):
    """The layout that hooks read is this decode's own: two streams in turn, and another call between them."""
    one, two = (stream(llama.model, text, max_new_tokens=STEPS) for text in TEXTS[:2])
    turns = []
    for pair in zip(one, two, strict=True):
        assert LAYOUT.get() is None
        assert tokens(llama, TEXTS[2:4]) == tokens(llama)[2:4]
        turns.append([written.text for written in pair])
    assert turns[-1] == generate(llama.model, TEXTS[:2], max_new_tokens=STEPS)


def test_a_stream_refuses_what_generate_refuses(llama):
    with pytest.raises(PromptError, match="the text is empty"):
        next(stream(llama.model, " "))
    with pytest.raises(PromptError, match=f"exceed the {CONTEXT} that llama reads; shorten"):
        next(stream(llama.model, TEXTS[0], max_new_tokens=CONTEXT))

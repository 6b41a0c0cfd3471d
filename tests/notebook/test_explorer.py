"""The explorer shows the texts of the library's calls, and leaves the model unchanged."""

import asyncio
import builtins
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from sample_results import result as a_record

import xmodel_steer as xs
from xmodel_steer.core.directions import random_like
from xmodel_steer.core.errors import ModelError, NonFiniteError, PromptError, SpaceMismatchError
from xmodel_steer.core.spaces import Stack
from xmodel_steer.interventions.positions import Where
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.notebook import html
from xmodel_steer.notebook.explorer import Explorer
from xmodel_steer.notebook.options import Option, options_of
from xmodel_steer.notebook.writing import OPERATORS, Choice, Setting, watch, written

PROMPT = "The sky above"
NEW = 6


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Widgets outlive their cell on purpose: not this test."""
    import ipywidgets

    yield
    ipywidgets.Widget.close_all()


def chosen(
    vector: Any,
    strength: float = 1.0,
    positions: Where = "all",
    new: int = NEW,
    prompt: str = PROMPT,
    chat: bool = False,
) -> Choice:
    """One vector that is added."""
    option = vector if isinstance(vector, Option) else Option("joy", vector, "vectors['joy']")
    return Choice(prompt, (Setting(option, xs.Add(strength), positions),), new, chat)


def texts(model: Any, choice: Choice) -> tuple[str, str]:
    """Steered and unsteered text, by the library's calls."""
    settings = dict(max_new_tokens=choice.max_new_tokens)
    (setting,) = choice.settings
    with xs.steering(model, setting.option.vector, operator=setting.operator, positions=setting.positions):
        (steered,) = xs.generate(model, [choice.asked()], **settings)
    (unsteered,) = xs.generate(model, [choice.asked()], **settings)
    return steered, unsteered


def hooks(model: Any) -> int:
    """The number of functions hooked anywhere in the model."""
    inner = getattr(model, "original_model", model)
    own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner.modules())
    return own + sum(len(getattr(m, "fwd_hooks", ())) for m in model.modules())


def logits(toy: toys.Toy) -> torch.Tensor:
    with torch.no_grad():
        return toy.model(torch.tensor([toy.ids(PROMPT)]))


def text_of(html: str) -> str:
    (found,) = re.findall(r'<span class="xs-text">(.*?)</span>', html, flags=re.DOTALL)
    return unescape(found)


def code_of(explorer: Explorer) -> str:
    (found,) = re.findall(r"<pre.*?>(.*)</pre>", explorer.code.value, flags=re.DOTALL)
    return unescape(found)


def message_of(explorer: Explorer) -> str:
    return unescape(re.sub("<.*?>", "", explorer.message.value))


# --- the logic --------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_the_streams_are_what_generate_gives(toy: toys.Toy, positions: Where) -> None:
    for strength in (3.0, -3.0):
        choice = chosen(toy.vector(1), strength, positions)
        *_, last = watch(toy.model, choice)
        assert (last.steered, last.unsteered) == texts(toy.model, choice)
        *_, alone = written(toy.model, choice)
        assert alone.text == last.steered


def test_they_take_turns_and_the_steered_one_begins(llama: toys.Toy) -> None:
    choice = chosen(llama.vector(1), 3.0)
    views = list(watch(llama.model, choice))
    assert len(views) == 2 * NEW
    steered, unsteered = ([t.text for t in written(llama.model, choice, steered=on)] for on in (True, False))
    assert [v.steered for v in views[::2]] == steered and [v.unsteered for v in views[1::2]] == unsteered
    assert not views[0].next_tokens and views[1].next_tokens == views[-1].next_tokens


def test_one_that_has_ended_does_not_stop_the_other(llama: toys.Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    vector, choice = llama.vector(1), chosen(llama.vector(1), 3.0)
    free, _ = generate_tokens(llama.model, [PROMPT], max_new_tokens=NEW)
    with xs.steering(llama.model, vector, operator=xs.Add(3.0)):
        steered, _ = generate_tokens(llama.model, [PROMPT], max_new_tokens=NEW)
    stop = next(i for i in free[0] if i not in steered[0])
    monkeypatch.setattr(llama.model.original_model.generation_config, "eos_token_id", [stop])
    *_, last = watch(llama.model, choice)
    assert (last.steered, last.unsteered) == texts(llama.model, choice)
    assert len(last.unsteered) < len(last.steered)


def test_next_tokens_are_the_models_own_probabilities(toy: toys.Toy) -> None:
    vector = toy.vector(1)
    *_, view = watch(toy.model, chosen(vector, 3.0, new=1), top=5)
    before = logits(toy)[0, -1].softmax(-1)
    with xs.steering(toy.model, vector, operator=xs.Add(3.0)):
        after = logits(toy)[0, -1].softmax(-1)
    best = torch.maximum(before, after).topk(5).indices
    assert [t.token for t in view.next_tokens] == [toy.tokenizer.decode([i]) for i in best.tolist()]
    assert [t.unsteered for t in view.next_tokens] == pytest.approx(before[best].tolist(), rel=1e-4)
    assert [t.steered for t in view.next_tokens] == pytest.approx(after[best].tolist(), rel=1e-4)
    assert before[best[0]] != pytest.approx(float(after[best[0]]), rel=1e-2)


def test_between_two_tokens_the_model_is_plain(toy: toys.Toy) -> None:
    before, count = logits(toy), hooks(toy.model)
    for _ in watch(toy.model, chosen(toy.vector(1), 3.0)):
        assert hooks(toy.model) == count
        assert torch.equal(logits(toy), before)


@pytest.mark.parametrize("passes", [0, 1, 2, 5])
def test_an_interrupt_in_a_forward_pass_leaves_the_model_as_it_was(toy: toys.Toy, passes: int) -> None:
    before, count = logits(toy), hooks(toy.model)
    run = watch(toy.model, chosen(toy.vector(1), 3.0))
    for _ in range(passes):
        next(run)
    fired = []

    def interrupt(value: Any, hook: Any) -> None:
        fired.append(hooks(toy.model))
        raise KeyboardInterrupt

    with (
        toy.model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", interrupt)]),
        pytest.raises(KeyboardInterrupt) as kept,  # the traceback is kept, as notebooks do
    ):
        next(run)
    assert fired and kept.tb is not None
    assert hooks(toy.model) == count
    assert torch.equal(logits(toy), before)


def test_the_code_gives_the_same_texts(toy: toys.Toy) -> None:
    for strength, prompt in ((2.5, PROMPT), (-3.0, 'the "port"\nwas \\ l\'été {x}')):
        (option,) = options_of(toy.model, toy.vector(1), "vector")
        choice = chosen(option, strength, "generated", prompt=prompt)
        space: dict[str, Any] = {"model": toy.model, "vector": option.vector}
        exec(choice.code(), space)
        *_, last = watch(toy.model, choice)
        assert (space["steered"], space["unsteered"]) == (last.steered, last.unsteered)


def test_a_chat_message(llama: toys.Toy, capsys: pytest.CaptureFixture[str]) -> None:
    (option,) = options_of(llama.model, {"joy": llama.vector(1)})
    choice = chosen(option, 3.0, chat=True)
    *_, last = watch(llama.model, choice)
    chat = [{"role": "user", "content": PROMPT}]
    assert [last.unsteered] == xs.generate(llama.model, [chat], max_new_tokens=NEW)
    exec(choice.code(), {"model": llama.model, "vectors": {"joy": option.vector}})
    assert capsys.readouterr().out == f"steered:\n{last.steered}\n\nunsteered:\n{last.unsteered}\n"


# --- what may be explored ---------------------------------------------------------------------


def a_result(llama: toys.Toy, gemma: toys.Toy) -> xs.Result:
    def scaled(toy: toys.Toy, seed: int) -> xs.SteeringVector:
        return toy.vector(1, seed=seed).with_scale(torch.rand(toy.width) + 0.5)

    vectors = {"source": scaled(llama, 0)} | {
        n: scaled(gemma, k) for k, n in enumerate(("native", "mapped", "shuffled"))
    }
    return replace(a_record(), vectors=vectors, seeds={"random": [7, 8]}, chosen={"joy": {"strength": 2.0}})


def test_a_results_vectors_are_those_of_the_model(llama: toys.Toy, gemma: toys.Toy) -> None:
    result = a_result(llama, gemma)
    target = {o.name: o for o in options_of(gemma.model, result, "result")}
    assert list(target) == ["mapped", "native", "shuffled", "random"]
    assert [o.name for o in options_of(llama.model, result, "result")] == ["source"]
    own = random_like(result.vectors["native"], seed=7)
    assert torch.equal(target["random"].vector.direction, own.direction)
    for option in target.values():
        space: dict[str, Any] = {"model": gemma.model, "result": result}
        choice = chosen(option, 2.0)
        exec(choice.code(), space)
        assert (space["steered"], space["unsteered"]) == texts(gemma.model, choice)


def test_one_name_may_have_several_layers(llama: toys.Toy) -> None:
    vectors = {"joy": [llama.vector(1), llama.vector(2)], "calm": llama.vector(2, seed=5)}
    made = options_of(llama.model, vectors)
    assert [(o.name, o.site.layer, o.code) for o in made] == [
        ("joy", 1, "vectors['joy'][0]"),
        ("joy", 2, "vectors['joy'][1]"),
        ("calm", 2, "vectors['calm']"),
    ]
    explorer = xs.explore(llama.model, vectors)
    assert explorer.vector.options == ("joy", "calm")
    assert explorer.layer.layout.display is None and [s.layer for _, s in explorer.layer.options] == [1, 2]
    explorer.layer.value = xs.Site(2)
    explorer.prompt.value, explorer.tokens.value = PROMPT, NEW
    explorer.generate.click()
    assert text_of(explorer.steered.value) == texts(llama.model, chosen(vectors["joy"][1]))[0]
    explorer.vector.value = "calm"
    assert explorer.layer.layout.display == "none" and explorer.layer.value == xs.Site(2)


def test_a_list_goes_by_labels(llama: toys.Toy) -> None:
    made = options_of(llama.model, [llama.vector(1), replace(llama.vector(1), label="joy")])
    assert [(o.name, o.code) for o in made] == [("random 0", "vectors[0]"), ("joy", "vectors[1]")]


def test_vectors_of_another_space_are_refused(llama: toys.Toy, gemma: toys.Toy, toy_named: Any) -> None:
    with pytest.raises(
        SpaceMismatchError, match=r"explore llama: needs llama .* got gemma .* carry it over with a map"
    ):
        xs.explore(llama.model, {"joy": gemma.vector(1)})
    with pytest.raises(SpaceMismatchError, match="explore qwen: needs qwen .* got gemma"):
        xs.explore(toy_named("qwen").model, a_result(llama, gemma))


def test_what_cannot_be_explored_is_refused_with_words(llama: toys.Toy) -> None:
    with pytest.raises(TypeError, match=r"needs a Result, .* got int; write xs.explore\(model, vectors\)"):
        xs.explore(llama.model, 3)
    with pytest.raises(TypeError, match=r"vectors\['joy'\] must be a SteeringVector, got Tensor"):
        xs.explore(llama.model, {"joy": torch.ones(32)})
    with pytest.raises(ValueError, match="give at least one vector"):
        xs.explore(llama.model, {})
    with pytest.raises(ValueError, match="two vectors are called 'random 0' at resid_post.1.; give them names, {'one'"):
        xs.explore(llama.model, [llama.vector(1), llama.vector(1)])
    with pytest.raises(ValueError, match=r"lower and the upper end of the slider, got \(2.0, 1.0\)"):
        xs.explore(llama.model, llama.vector(1), strengths=(2.0, 1.0))
    with pytest.raises(ModelError, match=r"needs a TransformerLens model .* load it with xs.load"):
        xs.explore("gemma", llama.vector(1))
    bare = replace(a_record(), vectors={})
    with pytest.raises(ValueError, match="the result has no vectors"):
        xs.explore(llama.model, bare)


def test_without_ipywidgets_it_says_what_to_install(llama: toys.Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ipywidgets":
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'needs ipywidgets, .* pip install "xmodel-steer\[notebook\]", then restart'):
        xs.explore(llama.model, llama.vector(1))


# --- the widgets ------------------------------------------------------------------------------


def opened(toy: toys.Toy, **kwargs: Any) -> Explorer:
    return xs.explore(toy.model, {"joy": toy.vector(1)}, prompt=PROMPT, max_new_tokens=NEW, **kwargs)


def test_a_click_shows_texts_probabilities_and_code(llama: toys.Toy) -> None:
    explorer = opened(llama)
    explorer.strength.value, explorer.positions.value = -3.0, "generated"
    explorer.generate.click()
    expected = texts(llama.model, chosen(llama.vector(1), -3.0, "generated"))
    assert (text_of(explorer.steered.value), text_of(explorer.unsteered.value)) == expected
    assert "joy × -3, resid_post[1], generated" in explorer.steered.value
    assert explorer.next_tokens.value.count("<tr>") == 8 and message_of(explorer) == ""
    space: dict[str, Any] = {"model": llama.model, "vectors": {"joy": llama.vector(1)}}
    exec(code_of(explorer), space)
    assert (space["steered"], space["unsteered"]) == expected
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


def with_classes(toy: toys.Toy, layer: int, seed: int = 0) -> xs.SteeringVector:
    high, low = (toy.vector(layer, seed=seed + k).direction for k in (1, 2))
    vector = replace(toy.vector(layer), direction=high - low, positive_mean=high, negative_mean=low)
    return vector.with_scale(torch.rand(toy.width) + 0.5)


@pytest.mark.parametrize("name", ["add", "add, keeping the norm", "ablate", "clamp to positive", "clamp to negative"])
def test_every_operator_and_gate_is_the_librarys(llama: toys.Toy, name: str) -> None:
    vectors = {"joy": llama.vector(1), "calm": with_classes(llama, 1), "else": with_classes(llama, 2)}
    explorer = xs.explore(llama.model, vectors, prompt=PROMPT, max_new_tokens=NEW)
    assert explorer.operator.options == ("add", "add, keeping the norm", "ablate")  # joy has no class means
    assert [label for label, _ in explorer.gate.options] == [
        *("everywhere", "where calm is positive", "where calm is negative")  # else is of another site
    ]
    explorer.vector.value = "calm"
    assert explorer.gate.index == 0 and explorer.operator.options == tuple(OPERATORS)
    explorer.operator.value, explorer.strength.value = name, 3.0
    assert (explorer.strength.layout.display == "none") == (name == "ablate")
    for gate in (None, xs.Gate(vectors["calm"], "positive"), xs.Gate(vectors["calm"], "negative")):
        explorer.gate.index = 0 if gate is None else 1 if gate.side == "positive" else 2
        explorer.generate.click()
        step = xs.Intervention(vectors["calm"], OPERATORS[name](3.0), gate=gate)
        with xs.steering(llama.model, [step]):
            (expected,) = xs.generate(llama.model, [PROMPT], max_new_tokens=NEW)
        assert text_of(explorer.steered.value) == expected
        space: dict[str, Any] = {"model": llama.model, "vectors": vectors}
        exec(code_of(explorer), space)
        assert space["steered"] == expected


def test_kept_vectors_act_together_until_they_are_dropped(llama: toys.Toy) -> None:
    vectors = {"joy": llama.vector(1), "calm": llama.vector(2, seed=5)}
    explorer = xs.explore(llama.model, vectors, prompt=PROMPT, max_new_tokens=NEW)
    explorer.strength.value = 3.0
    explorer.generate.click()
    alone = text_of(explorer.steered.value)
    explorer.keep.click()
    assert "joy × 3, resid_post[1], all" in explorer.kept.value and explorer.drop.layout.display is None
    explorer.vector.value, explorer.operator.value, explorer.positions.value = "calm", "ablate", "generated"
    explorer.generate.click()
    steps = [
        xs.Intervention(vectors["calm"], xs.Ablate(), "generated"),
        xs.Intervention(vectors["joy"], xs.Add(3.0)),
    ]
    with xs.steering(llama.model, steps):
        (expected,) = xs.generate(llama.model, [PROMPT], max_new_tokens=NEW)
    assert text_of(explorer.steered.value) == expected != alone
    assert "and joy × 3" in explorer.steered.value
    space: dict[str, Any] = {"model": llama.model, "vectors": vectors}
    exec(code_of(explorer), space)
    assert space["steered"] == expected
    explorer.drop.click()
    assert not explorer.kept.value and explorer.drop.layout.display == "none"
    explorer.vector.value, explorer.operator.value, explorer.positions.value = "joy", "add", "all"
    explorer.generate.click()
    assert text_of(explorer.steered.value) == alone


def test_a_vector_of_several_sites_acts_at_each(llama: toys.Toy) -> None:
    space = xs.space_of(llama.model, Stack([1, 2]))
    stack = xs.SteeringVector(torch.cat([llama.vector(k).direction for k in (1, 2)]), space, label="joy")
    explorer = xs.explore(llama.model, {"joy": stack}, prompt=PROMPT, max_new_tokens=NEW)
    explorer.strength.value = 3.0
    explorer.generate.click()
    with xs.steering(llama.model, stack, operator=xs.Add(3.0)):
        (expected,) = xs.generate(llama.model, [PROMPT], max_new_tokens=NEW)
    assert text_of(explorer.steered.value) == expected
    space: dict[str, Any] = {"model": llama.model, "vectors": {"joy": stack}}
    exec(code_of(explorer), space)
    assert space["steered"] == expected


def test_a_run_folder_is_read(llama: toys.Toy, gemma: toys.Toy, tmp_path: Path) -> None:
    result = a_result(llama, gemma)
    xs.save(result, tmp_path / "run")
    for made in (xs.explore(gemma.model, str(tmp_path / "run")), xs.explore(tmp_path / "run", gemma.model)):
        assert made.strength.value == 2.0 and made.vector.value == "mapped"
        made.prompt.value, made.tokens.value = PROMPT, NEW
        made.generate.click()
        space: dict[str, Any] = {"model": gemma.model}
        exec(code_of(made), space)
        assert space["steered"] == text_of(made.steered.value)


def test_a_result_begins_at_its_headline_in_either_order(llama: toys.Toy, gemma: toys.Toy) -> None:
    result = a_result(llama, gemma)
    for made in (xs.explore(gemma.model, result), xs.explore(result, gemma.model)):
        assert made.strength.value == 2.0 and made.vector.value == "mapped"
    assert xs.explore(gemma.model, result, strengths=(-1.0, 1.5)).strength.value == 1.5
    far = xs.explore(gemma.model, replace(result, chosen={"joy": {"strength": 6.0}})).strength
    assert (far.min, far.value, far.max) == (-6.0, 6.0, 6.0)


def test_chat_is_offered_where_there_is_a_template(llama: toys.Toy, gemma: toys.Toy) -> None:
    assert opened(llama).chat.layout.display is None
    assert opened(gemma).chat.layout.display == "none"


def test_what_cannot_be_generated_is_said_and_nothing_is_lost(llama: toys.Toy) -> None:
    explorer = opened(llama)
    explorer.generate.click()
    before = {n: getattr(explorer, n).value for n in ("steered", "unsteered", "next_tokens", "code")}
    for prompt, new, says in (
        (" \n", NEW, "The prompt is empty: write something for the model to continue."),
        (PROMPT, toys.CONTEXT, f"new ones exceed the {toys.CONTEXT} that llama reads; shorten the prompt"),
        (PROMPT * 20, 1, f"but llama reads at most {toys.CONTEXT}; shorten it"),
    ):
        explorer.prompt.value, explorer.tokens.value = prompt, new
        explorer.generate.click()
        assert says in message_of(explorer) and 'role="alert"' in explorer.message.value
        assert explorer.prompt.value == prompt and explorer.stop.disabled
        assert {n: getattr(explorer, n).value for n in before} == before
    explorer.prompt.value, explorer.tokens.value = PROMPT, NEW
    explorer.generate.click()
    assert message_of(explorer) == ""


@pytest.mark.parametrize(
    "error, says, logged",
    [
        (NonFiniteError("generate: NaN"), "generate: NaN", 0),
        (RuntimeError("out of luck"), "RuntimeError: out of luck", 1),
        (KeyboardInterrupt(), "Stopped: the kernel was interrupted.", 0),
    ],
    ids=repr,
)
def test_a_failure_half_way_is_said_and_leaves_the_model_plain(
    llama: toys.Toy, error: BaseException, says: str, logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    explorer, before, count = opened(llama), logits(llama), hooks(llama.model)
    passes = []

    def fail(value: Any, hook: Any) -> None:
        passes.append(1)
        if len(passes) == 4:
            raise error

    with llama.model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", fail)]):
        explorer.generate.click()
    assert message_of(explorer) == says and explorer.stop.disabled
    assert len(caplog.records) == logged
    assert text_of(explorer.steered.value) and text_of(explorer.unsteered.value)  # what was written stays
    assert hooks(llama.model) == count and torch.equal(logits(llama), before)


def test_the_interrupt_button_stops_it_and_the_kernels_own_handling_comes_back(
    llama: toys.Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    explorer, own = opened(llama), signal.getsignal(signal.SIGINT)
    passes = []

    def press(value: Any, hook: Any) -> None:
        passes.append(1)
        if len(passes) == 4:
            signal.raise_signal(signal.SIGINT)

    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a kernel does while no cell runs
        with llama.model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", press)]):
            explorer.generate.click()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, own)
    assert len(passes) == 4 and "interrupted" in message_of(explorer)


def in_a_notebook(act: Callable[[], Any]) -> Any:
    """Run a coroutine function as a kernel does: with an event loop around."""
    return asyncio.run(act())


def test_a_click_while_one_runs_stops_it(llama: toys.Toy) -> None:
    """Two generations never interleave: after the second click no token of the first comes."""

    async def act() -> list[str]:
        explorer, seen = opened(llama), []
        explorer.steered.observe(lambda change: seen.append(change.new), "value")
        explorer.tokens.value = 40  # time enough for a click to come from another thread
        explorer.generate.click()
        while len(seen) < 3:
            await asyncio.sleep(0)
        explorer.strength.value = -3.0
        await asyncio.to_thread(explorer.generate.click)  # JupyterLab's clicks come on another thread
        while explorer._run is not None or len(seen) < 4:
            await asyncio.sleep(0)
        assert text_of(explorer.steered.value) == texts(llama.model, chosen(llama.vector(1), -3.0, new=40))[0]
        return seen

    headings = [re.findall("joy × -?[0-9]", html)[0] for html in in_a_notebook(act)]
    first = headings.index("joy × -3")
    assert 3 <= first < 40 and set(headings[first:]) == {"joy × -3"} and set(headings[:first]) == {"joy × 1"}


def test_stop_keeps_what_is_written(llama: toys.Toy) -> None:
    async def act() -> None:
        explorer = opened(llama)
        explorer.generate.click()
        while not explorer.unsteered.value or not text_of(explorer.unsteered.value):
            await asyncio.sleep(0)
        assert not explorer.stop.disabled
        explorer.stop.click()
        while explorer._run is not None:
            await asyncio.sleep(0)
        shown = explorer.steered.value
        for _ in range(20):
            await asyncio.sleep(0)
        assert explorer.steered.value == shown and message_of(explorer) == "Stopped." and explorer.stop.disabled
        whole = texts(llama.model, chosen(llama.vector(1)))[0]
        assert text_of(shown) != whole and whole.startswith(text_of(shown))

    in_a_notebook(act)


def test_the_notebook_runs_its_cells_between_two_tokens(llama: toys.Toy) -> None:
    async def act() -> None:
        explorer, before = opened(llama), logits(llama)
        explorer.generate.click()
        turns = 0
        while explorer._run is not None or not turns:
            await asyncio.sleep(0)
            assert torch.equal(logits(llama), before)
            turns += 1
        assert turns >= 2 * NEW

    in_a_notebook(act)


def test_the_code_has_the_notebooks_own_names(llama: toys.Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython

    names: dict[str, Any] = {"_": llama.model, "large": llama.model, "mine": {"joy": llama.vector(1)}}
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=names))
    explorer = xs.explore(llama.model, names["mine"], prompt=PROMPT, max_new_tokens=NEW)
    explorer.generate.click()
    space = {k: v for k, v in names.items() if k != "_"}
    exec(code_of(explorer), space)
    assert space["steered"] == text_of(explorer.steered.value)
    names["joy"] = names["mine"]["joy"]
    inline = xs.explore(llama.model, {"joy": names["joy"]}, prompt=PROMPT, max_new_tokens=NEW)
    inline.generate.click()
    assert "[xs.Intervention(joy, xs.Add(strength=1.0), 'all')]" in code_of(inline)


def test_what_models_write_cannot_break_the_page() -> None:
    page = html.text_html("a <b>", "#000", "<script>alert(1)</script>", "</div><img src=x>")
    page += html.bars_html([("<td>", (0.5, 0.25))], [("steered", "#000"), ("unsteered", "#111")]) + html.code_html(
        "</pre><script>"
    )
    assert "<script>" not in page and "<img" not in page and "&lt;td&gt;" in page
    assert "50.0%" in page and "25.0%" in page


def test_an_empty_prompt_is_no_choice() -> None:
    with pytest.raises(PromptError, match="The prompt is empty: write something"):
        Choice(" \n", ())

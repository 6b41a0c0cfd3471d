"""examples/serve_switch.py, asked by OpenAI's own client on loopback: rows of a batch are steered apart."""

import contextlib
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sample_results
import torch
import toys
from toys import WORDS

import xmodel_steer as xs
from xmodel_steer.core.vectors import SteeringVector

NO_SERVER = "the server or its client is not installed: pip install -e '.[dev]' (it has fastapi, uvicorn and openai)"
uvicorn = pytest.importorskip("uvicorn", reason=NO_SERVER)
openai = pytest.importorskip("openai", reason=NO_SERVER)
pytest.importorskip("fastapi", reason=NO_SERVER)

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve_switch.py"
TOKENS = 8
TEXTS = [" ".join(WORDS[i : i + 1 + i % 3]) for i in range(8)]  # of several lengths, within the toy's context


def example() -> Any:
    spec = importlib.util.spec_from_file_location("serve_switch", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_switch"] = module  # pydantic looks names up there
    spec.loader.exec_module(module)
    return module


@dataclass
class Served:
    """A running server, its client, and the sizes of the batches that its model wrote."""

    toy: toys.Toy
    vector: SteeringVector
    client: Any
    runs: Path
    sizes: list[int]

    def ask(self, text: str = TEXTS[0], *, tokens: int = TOKENS, steering: Any = None, **settings: Any) -> Any:
        body = {} if steering is None else {"extra_body": {"steering": steering}}
        said = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model="llama", messages=said, max_tokens=tokens, **body, **settings)

    def together(self, *asked: dict[str, Any]) -> list[Any]:
        """Answers, or errors, of requests that are on their way at once."""

        def one(settings: dict[str, Any]) -> Any:
            try:
                return self.ask(**settings)
            except openai.APIError as error:
                return error

        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(one, asked))

    def expected(self, text: str, *steps: xs.Intervention, tokens: int = TOKENS) -> str:
        with xs.steering(self.toy.model, steps):
            return xs.generate(self.toy.model, [[{"role": "user", "content": text}]], max_new_tokens=tokens)[0]


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


@contextlib.contextmanager
def listening(api: Any) -> Iterator[str]:
    """A server in a thread, on a port that the system chose; it has ended when the block has."""
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(toy_named: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    llama, module = toy_named("llama"), example()
    runs = tmp_path_factory.mktemp("served") / "runs"
    vector = llama.vector(1, size=4.0)
    means = torch.randn(2, llama.width, generator=torch.Generator().manual_seed(5))
    ends = dict(positive_mean=means[0], negative_mean=means[1], scale=torch.ones(llama.width))
    with_means = replace(vector, direction=means[0] - means[1], **ends)
    vectors = {"mapped": vector, "native": llama.vector(2, seed=3, size=4.0), "means": with_means}
    choice = {"joy": {"strength": 2.0}}
    xs.save(replace(sample_results.result(), vectors=vectors, chosen=choice, maps={}), runs / "joy")
    xs.save(
        replace(sample_results.result(), vectors={"mapped": sample_results.vector()}, maps={}), runs / "other model"
    )
    xs.save(replace(sample_results.result(), vectors=vectors, maps={}), runs.parent / "outside")
    sizes: list[int] = []
    written = module.generate_tokens

    def counted(model: Any, prompts: list[Any], **settings: Any) -> Any:
        sizes.append(len(prompts))
        return written(model, prompts, **settings)

    module.generate_tokens = counted
    with listening(module.app(llama.model, runs, wait=0.3)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        yield Served(llama, vector, client, runs, sizes)
        client.close()


def test_of_two_requests_in_a_batch_one_is_steered_and_the_other_is_as_alone(served: Served) -> None:
    alone = text_of(served.ask(TEXTS[1]))
    served.sizes.clear()
    plain, steered = served.together({"text": TEXTS[1]}, {"text": TEXTS[1], "steering": {"run": "joy"}})
    assert served.sizes == [2]
    assert text_of(plain) == alone == served.expected(TEXTS[1])
    assert text_of(steered) == served.expected(TEXTS[1], xs.Intervention(served.vector, xs.Add(2.0))) != alone
    assert plain.steering is None
    acted = steered.steering
    read = (
        steered.usage.prompt_tokens + steered.usage.completion_tokens - (steered.choices[0].finish_reason == "length")
    )
    assert acted.pop("rows_changed") == read, "every token that was read, and none of the other row or of the padding"
    assert acted == {
        "run": "joy", "vector": "mapped", "site": "resid_post[1]", "operator": "Add(strength=2.0)", "strength": 2.0,
        "positions": "all", "acted": True,
    }  # fmt: skip


def test_eight_requests_at_once_have_each_their_own_steering(served: Served) -> None:
    asked = [
        {"text": text, "steering": None if i % 3 == 0 else {"run": "joy", "strength": float(i), "vector": name}}
        for i, (text, name) in enumerate(zip(TEXTS, ["mapped", "native"] * 4, strict=True))
    ]
    native = served.toy.vector(2, seed=3, size=4.0)
    served.sizes.clear()
    for one, answer in zip(asked, served.together(*asked), strict=True):
        steps = []
        if one["steering"]:
            vector = native if one["steering"]["vector"] == "native" else served.vector
            steps = [xs.Intervention(vector, xs.Add(one["steering"]["strength"]))]
        assert text_of(answer) == served.expected(one["text"], *steps)
    assert sum(served.sizes) == 8 and len(served.sizes) <= 2


def test_requests_of_other_lengths_are_other_batches(served: Served) -> None:
    served.sizes.clear()
    short, long = served.together({"tokens": 2}, {"tokens": 5})
    assert sorted(served.sizes) == [1, 1]
    assert text_of(short) == served.expected(TEXTS[0], tokens=2)
    assert text_of(long) == served.expected(TEXTS[0], tokens=5)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    assert short.usage.total_tokens == short.usage.prompt_tokens + 2


def test_the_failure_of_one_never_reaches_its_batchmates(served: Served) -> None:
    served.sizes.clear()
    failed, plain, steered = served.together(
        {"steering": {"run": "joy", "strength": 1e39}},
        {},
        {"steering": {"run": "joy", "strength": -3.0}},
    )
    assert served.sizes == [3, 1, 1, 1]
    assert isinstance(failed, openai.BadRequestError) and "NaN" in str(failed)
    assert text_of(plain) == served.expected(TEXTS[0])
    assert text_of(steered) == served.expected(TEXTS[0], xs.Intervention(served.vector, xs.Add(-3.0)))
    read = steered.usage.total_tokens - (steered.choices[0].finish_reason == "length")
    assert steered.steering["rows_changed"] == read, "what the failed batch counted is forgotten"


def test_what_did_not_act_is_said_so(served: Served) -> None:
    plain = served.expected(TEXTS[0])
    idle = served.ask(steering={"run": "joy", "strength": 0.0})
    assert text_of(idle) == plain and (idle.steering["acted"], idle.steering["rows_changed"]) == (False, 0)
    vector = xs.read(served.runs / "joy").vectors["means"]
    for strength, side in ((1.0, "positive"), (-1.5, "negative")):
        answer = served.ask(steering={"run": "joy", "vector": "means", "operator": "clamp", "strength": strength})
        clamp = xs.Clamp(side, overshoot=abs(strength))
        assert text_of(answer) == served.expected(TEXTS[0], xs.Intervention(vector, clamp))
        assert answer.steering["operator"] == repr(clamp)
        assert 0 < answer.steering["rows_changed"] < answer.usage.total_tokens, "rows of the class stay"
    ablated = served.ask(steering={"run": "joy", "operator": "ablate"})
    assert text_of(ablated) == served.expected(TEXTS[0], xs.Intervention(served.vector, xs.Ablate()))


WRONG: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "unknown run": ({"steering": {"run": "anger"}}, 404, "run_not_found", "no run 'anger' among joy, other model"),
    "a path": ({"steering": {"run": "../outside"}}, 404, "run_not_found", "no run '../outside'"),
    "an absolute path": ({"steering": {"run": "/etc"}}, 404, "run_not_found", "no run '/etc'"),
    "dots": ({"steering": {"run": ".."}}, 404, "run_not_found", "no run '..'"),
    "unknown vector": ({"steering": {"run": "joy", "vector": "x"}}, 404, "vector_not_found", "'x' among "),
    "another model's vector": ({"steering": {"run": "other model"}}, 400, None, "means nothing in another"),
    "a clamp without means": ({"steering": {"run": "joy", "operator": "clamp"}}, 400, None, "has no class means"),
    "an unknown operator": (
        {"steering": {"run": "joy", "operator": "x"}},
        400,
        None,
        "steering.operator: Input should",
    ),
    "an unknown field of steering": (
        {"steering": {"run": "joy", "layer": 3}},
        400,
        None,
        "steering.layer: Extra inputs",
    ),
    "a strength in words": (
        {"steering": {"run": "joy", "strength": "2"}},
        400,
        None,
        "steering.strength: Input should be",
    ),
    "a temperature": ({"temperature": 0.7}, 400, None, "temperature: Input should be less than or equal to 0"),
    "a stream": ({"stream": True}, 400, None, "stream: Input should be False"),
    "a field that would be ignored": ({"top_p": 0.5}, 400, None, "top_p: Extra inputs are not permitted"),
    "too many tokens": ({"tokens": 64}, 400, "context_length_exceeded", "64 new ones exceed the context"),
    "no tokens": ({"tokens": 0}, 400, None, "max_tokens: Input should be greater than or equal to 1"),
    "an empty prompt": ({"text": " "}, 400, None, "every message is empty"),
}


@pytest.mark.parametrize("asked, status, code, says", WRONG.values(), ids=WRONG)
def test_errors_have_openais_form(served: Served, asked: Any, status: int, code: str | None, says: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        served.ask(**asked)
    error = caught.value
    assert type(error) is {404: openai.NotFoundError, 400: openai.BadRequestError}[status]
    assert (error.status_code, error.code, error.type) == (status, code, "invalid_request_error")
    assert says in error.message
    assert set(json.loads(error.response.text)["error"]) == {"message", "type", "param", "code"}


def test_the_model_is_listed_and_another_one_is_not_found(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["llama"]
    with pytest.raises(openai.NotFoundError, match="this server has the model 'llama', got 'gpt'"):
        served.client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.embeddings.create(model="llama", input="a")
    assert caught.value.type == "invalid_request_error"


def test_a_run_is_read_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.ask(steering={"run": "joy"})
    monkeypatch.setattr(xs, "read", None)
    assert served.ask(steering={"run": "joy"}).steering["acted"]


def test_a_server_that_is_stopped_answers_what_it_has_and_ends(toy_named: Any, tmp_path: Path) -> None:
    llama = toy_named("llama")
    with ThreadPoolExecutor() as pool:
        with listening(example().app(llama.model, tmp_path, wait=0.5)) as url:
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            served = Served(llama, llama.vector(1), client, tmp_path, [])
            last = pool.submit(served.ask)
            time.sleep(0.3)  # it waits for a batch
        assert text_of(last.result()) == served.expected(TEXTS[0])  # the server has ended
        with pytest.raises(openai.APIConnectionError):
            served.ask()
    client.close()


def test_the_example_is_small() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 200

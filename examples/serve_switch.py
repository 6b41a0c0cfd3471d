"""Serve a chat model whose requests are steered one by one, over OpenAI's protocol: the safety switch, served.

Run: pip install "xmodel-steer[serve]"; python examples/serve_switch.py MODEL RUNS [PORT] [DTYPE]

RUNS is a folder of runs, each a folder that `xs.save(result, ...)` wrote. A request to /v1/chat/completions may have
    "steering": {"run": "NAME", "strength": 2.0, "operator": "add", "vector": "mapped"}
of which only `run` is required; the answer's own `steering` says what acted. Requests that arrive within some milliseconds
and ask for as many tokens share a batch. Each row has its own steering; no other row, nor the failure of one, touches it.
Decoding is greedy: a temperature other than 0 is refused, as are streams and fields that would be ignored. There is no login:
it listens on this machine alone. In bfloat16 a batch rounds otherwise than a single request, so that near-ties may differ.
It is no serving engine. vLLM and llama.cpp are: `xs.interop.write_vllm_vector` and `write_control_vector` take a vector there.
"""

import asyncio
import sys
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, Field
from starlette.exceptions import HTTPException as NoRoute

import xmodel_steer as xs
from xmodel_steer.core.bars import quiet
from xmodel_steer.interventions.contexts import require_space_of
from xmodel_steer.interventions.steps import Replacement
from xmodel_steer.models.batching import encode
from xmodel_steer.models.facts import context_length, name_of, tokenizer_of
from xmodel_steer.models.generation import generate_tokens


class Steering(BaseModel, extra="forbid", strict=True):
    """What a request may ask for; by default the strength that validation chose, 1 for a clamp."""

    run: str
    strength: float | None = Field(None, allow_inf_nan=False)
    operator: Literal["add", "ablate", "clamp"] = "add"
    vector: str = "mapped"


class Chat(BaseModel, extra="forbid", strict=True):
    """What a request may hold. Another field is refused: to ignore it would be to answer another question."""

    model: str
    messages: list[dict[Literal["role", "content"], str]]
    max_tokens: int = Field(64, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    temperature: float | None = Field(None, ge=0, le=0)
    stream: Literal[False] | None = None
    steering: Steering | None = None


def refused(status: int, message: str, code: str | None = None) -> HTTPException:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return HTTPException(status, dict(message=message, type=kind, param=None, code=code))


@dataclass(eq=False)
class Job:
    """A request on its way, and how many rows of the residual stream its step has changed."""

    prompt: xs.Prompt
    tokens: int
    step: xs.Intervention | None
    answer: "asyncio.Future[list[int]]"
    changed: int = 0
    before: Any = None

    def steps(self, row: int) -> list[xs.Intervention | Replacement]:
        """The step on one row of a batch, between two that look at the stream and change nothing."""
        self.changed = 0
        own = [replace(step, prompts=frozenset({row})) for step in (self.step,) if step]
        return [step for o in own for step in (Replacement(o.space, self._keep), o, Replacement(o.space, self._count))]

    def _keep(self, rows: Any, _: Any) -> tuple[Any, None]:
        self.before = rows
        return rows, None

    def _count(self, rows: Any, _: Any) -> tuple[Any, None]:
        self.changed += int((rows != self.before).any(-1).sum())
        return rows, None


@dataclass(eq=False)
class Switch:
    """A model, its runs, and the requests that wait for a batch."""

    model: Any
    folder: Path
    wait: float
    most: int
    runs: dict[str, xs.Result] = field(default_factory=dict)
    waiting: list[Job] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def step(self, asked: Steering) -> xs.Intervention:
        """Read the run, once; make the step of a request, and complete what the request left to the run."""
        # A name is compared with those in the folder, and never joined to its path: it cannot lead out of it.
        held = {entry.name: entry for entry in self.folder.iterdir() if (entry / "result.json").is_file()}
        if asked.run not in held:
            raise refused(404, f"no run {asked.run!r} among {', '.join(sorted(held))}", "run_not_found")
        result = self.runs[asked.run] = self.runs.get(asked.run) or xs.read(held[asked.run])
        if (vector := result.vectors.get(asked.vector)) is None:
            raise refused(404, f"no vector {asked.vector!r} among {', '.join(result.vectors)}", "vector_not_found")
        require_space_of(self.model, vector.space, f"steering by {asked.run}")
        if asked.strength is None:
            asked.strength = result.headline if asked.operator == "add" else 1.0
        clamp = xs.Clamp("positive" if asked.strength > 0 else "negative", overshoot=abs(asked.strength))
        operator = {"add": xs.Add(asked.strength), "ablate": xs.Ablate(), "clamp": clamp}[asked.operator]
        operator.prepare(vector)  # refuses a clamp without class means
        positions = result.spec.get("positions", "all")
        return xs.Intervention(vector, operator, positions if isinstance(positions, str) else tuple(positions))

    async def tokens_of(self, job: Job) -> list[int]:
        """Gather requests for a while, then write the job's batch, unless an earlier one had room for it."""
        self.waiting.append(job)
        await asyncio.sleep(self.wait)
        async with self.turn:
            while job in self.waiting:
                batch = [other for other in self.waiting if other.tokens == job.tokens][: self.most]
                self.waiting = [other for other in self.waiting if other not in batch]
                for one, answer in zip(batch, await asyncio.to_thread(self.answers, batch), strict=True):
                    (one.answer.set_exception if isinstance(answer, Exception) else one.answer.set_result)(answer)
        return await job.answer

    def answers(self, batch: list[Job]) -> list[Any]:
        """Tokens of each job. A batch that fails is written one by one, so that only the job at fault has the error."""
        try:
            return self.written(batch)
        except Exception as error:
            return [error] if len(batch) == 1 else [answer for job in batch for answer in self.answers([job])]

    def written(self, batch: list[Job]) -> list[list[int]]:
        """Write one batch, each row under its own step."""
        steps = [step for row, job in enumerate(batch) for step in job.steps(row)]
        with quiet(), xs.steering(self.model, steps):
            prompts = [job.prompt for job in batch]
            return generate_tokens(self.model, prompts, max_new_tokens=batch[0].tokens, batch_size=len(batch))[0]

    async def chat(self, asked: Chat) -> dict[str, Any]:
        """Answer one request, in OpenAI's form."""
        if asked.model != (name := name_of(self.model)):
            raise refused(404, f"this server has the model {name!r}, got {asked.model!r}", "model_not_found")
        try:
            prompt = xs.Prompt.of(asked.messages)
            (encoding,) = encode(self.model, [prompt])
            if (read := len(encoding.ids)) + asked.max_tokens > context_length(self.model):
                says = f"{read} tokens and {asked.max_tokens} new ones exceed the context"
                raise refused(400, says, "context_length_exceeded")
            step = await asyncio.to_thread(self.step, asked.steering) if asked.steering else None
            job = Job(prompt, asked.max_tokens, step, asyncio.get_running_loop().create_future())
            ids = await self.tokens_of(job)
        except (xs.errors.XModelSteerError, ValueError, TypeError) as error:
            raise refused(400, str(error)) from error
        options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        whole, start = (tokenizer_of(self.model).decode([*encoding.ids, *more], **options) for more in (ids, []))
        acted = asked.steering and asked.steering.model_dump()
        if step and acted:
            acted |= {"operator": repr(step.operator), "site": str(step.space.site)}
            acted |= {"positions": step.positions, "acted": job.changed > 0, "rows_changed": job.changed}
        choice = dict(index=0, message=dict(role="assistant", content=whole[len(start) :]), logprobs=None)
        choice["finish_reason"] = "length" if len(ids) == asked.max_tokens else "stop"
        usage = dict(prompt_tokens=read, completion_tokens=len(ids), total_tokens=read + len(ids))
        about = dict(id=f"chatcmpl-{uuid.uuid4().hex}", object="chat.completion", created=int(time.time()), model=name)
        return {**about, "choices": [choice], "usage": usage, "steering": acted}


def app(model: Any, folder: Path, *, wait: float = 0.02, most: int = 8) -> FastAPI:
    """Make the server of a model. `wait` seconds gather a batch of `most` requests."""
    switch = Switch(model, folder, wait, most)
    api = FastAPI(title="The safety switch, served")
    models = [dict(id=name_of(model), object="model", created=0, owned_by="xmodel_steer")]

    def told(_: Any, error: Any) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            error = refused(400, "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()))
        elif not isinstance(getattr(error, "detail", None), dict):
            error = refused(getattr(error, "status_code", 500), f"{type(error).__name__}: {error}")
        return JSONResponse({"error": error.detail}, error.status_code)

    for kind in (HTTPException, NoRoute, RequestValidationError, Exception):
        api.add_exception_handler(kind, told)
    api.add_api_route("/v1/models", lambda: {"object": "list", "data": models})
    api.add_api_route("/v1/chat/completions", switch.chat, methods=["POST"], response_model=None)
    return api


def main(model: str, runs: str, port: str = "8000", dtype: str = "float32") -> None:
    """Load the model and serve it."""
    uvicorn.run(app(xs.load(model, dtype=dtype), Path(runs)), host="127.0.0.1", port=int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Language models that answer a judge's questions."""

import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from xmodel_steer.core.errors import JudgeError
from xmodel_steer.core.prompts import Message, Prompt
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.generation import generate


@runtime_checkable
class Chat(Protocol):
    """A respondent to questions: a service, a model, or a record of answers."""

    @property
    def name(self) -> str:
        """The name in results."""
        ...

    def answer(self, question: str) -> str:
        """Answer one question."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """A service with OpenAI's chat completions protocol.

    Args:
        url: Its base address, up to and including ``/v1``.
        model: The service's name of the model.
        key_variable: The environment variable that holds the key; the key is never stored.
        max_tokens: Length of the answer.
        attempts: Number of attempts while the service is busy or unreachable.
        timeout: Seconds to wait for one answer.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    max_tokens: int = 64
    attempts: int = 4
    timeout: float = 60.0

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    def answer(self, question: str) -> str:
        """Answer one question at temperature 0.

        Raises:
            JudgeError: The service refuses the request, or stays busy.
        """
        import httpx

        key = os.environ.get(self.key_variable)
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address, problem = f"{self.url.rstrip('/')}/chat/completions", "no answer"
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(2.0**attempt, 30.0) / 4)
            try:
                response = httpx.post(address, json=body, headers=headers, timeout=self.timeout)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            status, text = response.status_code, response.text[:200]
            if status == 200:
                try:
                    return str(response.json()["choices"][0]["message"]["content"])
                except (ValueError, LookupError, TypeError) as error:
                    raise JudgeError(f"{self.url}: answered something else than a chat completion: {text}") from error
            problem = f"status {status}: {text}"
            if status in (401, 403):
                raise JudgeError(f"{self.url}: {problem}; put a valid key into {self.key_variable}")
            if status not in (408, 409, 425, 429) and status < 500:
                raise JudgeError(f"{self.url}: {problem}; check the address and the model's name {self.model!r}")
        raise JudgeError(f"{self.url}: {problem}, after {self.attempts} attempts; earlier answers are kept, try again")


@dataclass(frozen=True, eq=False)
class LocalModel:
    """A hooked model as a judge; instruction-tuned models keep to the answer's form better.

    Args:
        model: A TransformerLens model.
        max_new_tokens: Length of the answer.
    """

    model: Any = field(repr=False)
    max_new_tokens: int = 16

    @property
    def name(self) -> str:
        """The model's name."""
        return name_of(self.model)

    def answer(self, question: str) -> str:
        """Answer one question greedily."""
        prompt = Prompt(messages=(Message("user", question),))
        return generate(self.model, [prompt], max_new_tokens=self.max_new_tokens, progress=False)[0]


class Transcript:
    """Recorded answers by question, appended to a file of JSON lines as they come.

    A judge with a transcript asks no question twice: an interrupted run resumes, and a finished run can be repeated
    without the judge.

    Args:
        path: The file, created with the first answer. None keeps answers in memory.
        name: Name of the judge that answered, for a file without answers.
    """

    def __init__(self, path: str | Path | None = None, *, name: str = "transcript") -> None:
        self.path = None if path is None else Path(path)
        self._name = name
        self._answers: dict[str, str] = {}
        text = self.path.read_text(encoding="utf-8") if self.path is not None and self.path.is_file() else ""
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line:
                    row = json.loads(line)
                    self._answers[_key(row["judge"], row["question"])] = row["answer"]
                    self._name = row["judge"]
            except (ValueError, LookupError, TypeError):
                raise JudgeError(
                    f"{self.path}, line {number}: is not a row of a transcript; remove the line to ask that question again"
                ) from None

    @property
    def name(self) -> str:
        """The name of the judge that answered."""
        return self._name

    def recorded(self, judge: str, question: str) -> str | None:
        """Return the recorded answer to a question, if there is one."""
        return self._answers.get(_key(judge, question))

    def answer(self, question: str) -> str:
        """Return the recorded answer.

        Raises:
            JudgeError: There is none.
        """
        answer = self.recorded(self._name, question)
        if answer is None:
            raise JudgeError(
                f"transcript {self.path or 'in memory'}: has no answer of {self._name} to {question[:80]!r}"
            )
        return answer

    def add(self, judge: str, question: str, answer: str) -> None:
        """Record an answer, unless it is recorded already."""
        if self.recorded(judge, question) == answer:
            return
        self._name = judge
        self._answers[_key(judge, question)] = answer
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = json.dumps({"judge": judge, "question": question, "answer": answer}, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(row + "\n")


def _key(judge: str, question: str) -> str:
    return hashlib.sha256(f"{judge}\n{question}".encode()).hexdigest()

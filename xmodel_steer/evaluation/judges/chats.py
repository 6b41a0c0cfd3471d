"""Language models that answer a judge's questions."""

import hashlib
import json
import os
import re
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit, urlunsplit

from xmodel_steer.core.errors import CacheWarning, JudgeError
from xmodel_steer.core.prompts import Message, Prompt
from xmodel_steer.core.texts import encodable, redacted, visible
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


class _Address(str):
    """A URL without userinfo, for messages and records; ``auth`` holds the userinfo, for requests only."""

    auth: tuple[str, str] | None = None
    userinfo: tuple[str, ...] = ()

    @classmethod
    def of(cls, url: str) -> "_Address":
        """Split a URL.

        Raises:
            JudgeError: It is no address of a service; the message does not repeat it.
        """
        if isinstance(url, cls):
            return url
        try:
            parts = urlsplit(url := url.strip())
            host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            host, parts = False, urlsplit("")
        odd = any(c.isspace() or not c.isprintable() for c in url) or "@" in parts.path or parts.query or parts.fragment
        if not host or odd or parts.scheme not in ("http", "https"):
            raise JudgeError(
                "Endpoint: the url must be http:// or https:// with a host, without spaces, query and fragment; "
                "write /, ?, # and @ within a password as %2F, %3F, %23 and %40"
            )
        userinfo, _, place = parts.netloc.rpartition("@")
        address = cls(urlunsplit(parts._replace(netloc=place)))
        if userinfo:
            user, _, password = userinfo.partition(":")
            address.auth = (unquote(user), unquote(password))
            address.userinfo = (userinfo, ":".join(address.auth), user, password, *address.auth)
        return address


def _key_in(variable: str) -> str:
    """Read a key from an environment variable, without the white space around it.

    Raises:
        JudgeError: The key cannot be sent in a header; the message does not repeat it.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise JudgeError(
            "Endpoint: key_variable must be the name of an environment variable, such as OPENAI_API_KEY, not a key"
        )
    key = os.environ.get(variable, "").strip()
    if key.isascii() and key.isprintable():
        return key
    del key  # tools that report errors show local variables
    raise JudgeError(
        f"{variable}: the key holds a line end, a control character or a letter that is not ASCII; "
        "put the key alone into the variable"
    )


@dataclass(frozen=True)
class Endpoint:
    """A service with OpenAI's chat completions protocol.

    No message, record or answer shows the key, or a user name and password in the URL.

    Args:
        url: Its base address, up to and including ``/v1``; the attribute has no userinfo.
        model: The service's name of the model.
        key_variable: The environment variable that holds the key; the key is never stored.
        max_tokens: Length of the answer.
        attempts: Number of attempts while the service is busy or unreachable.
        timeout: Seconds to wait for one answer.

    Raises:
        JudgeError: The URL or the key cannot be used.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    max_tokens: int = 64
    attempts: int = 4
    timeout: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _Address.of(self.url))
        _key_in(self.key_variable)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    def answer(self, question: str) -> str:
        """Answer one question at temperature 0.

        Raises:
            JudgeError: The service refuses the request, or stays busy.
        """
        problem = "no answer"
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(2.0**attempt, 30.0) / 4)
            status, text, answered = self._asked(question)
            if answered:
                return text
            if status == 200:
                raise JudgeError(f"{self.url}: answered something else than a chat completion: {text}")
            problem = f"status {status}: {text}" if status else text
            if status in (401, 403):
                raise JudgeError(f"{self.url}: {problem}; put a valid key into {self.key_variable}")
            if status and status not in (408, 409, 425, 429) and status < 500:
                raise JudgeError(f"{self.url}: {problem}; check the address and the model's name {self.model!r}")
        raise JudgeError(f"{self.url}: {problem}, after {self.attempts} attempts; earlier answers are kept, try again")

    def _asked(self, question: str) -> tuple[int, str, bool]:
        """Ask once.

        Errors are raised by the caller: none is chained to an exception, or a local variable, that holds a secret.

        Returns:
            The status, 0 without a response; the answer or the problem, without secrets; whether it is an answer.
        """
        import httpx

        key, address = _key_in(self.key_variable), _Address.of(self.url)
        secrets = (key, *address.userinfo) if key else address.userinfo
        content = encodable(question)  # half of a surrogate pair cannot be sent
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        try:
            response = httpx.post(
                f"{address.rstrip('/')}/chat/completions",
                json=body | {"max_tokens": self.max_tokens},
                headers={"Authorization": f"Bearer {key}"} if key else {},
                auth=address.auth,
                timeout=self.timeout,
            )
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            return 0, visible(redacted(f"{type(error).__name__}: {error}", secrets)), False
        if response.status_code == 200:
            try:
                answer = str(response.json()["choices"][0]["message"]["content"])
                return 200, redacted(answer, secrets, answer=True), True
            except (ValueError, LookupError, TypeError, RecursionError):
                pass
        return response.status_code, visible(redacted(response.text, secrets))[:200], False


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
    without the judge. Lines that are no rows, such as a last one that was cut short, are skipped with a `CacheWarning`.
    If the file cannot be written, answers stay in memory with a `CacheWarning`, and are written with the next one.

    Args:
        path: The file, created with the first answer. None keeps answers in memory.
        name: Name of the judge that answered, for a file without answers.

    Raises:
        JudgeError: The file exists and cannot be read.
    """

    def __init__(self, path: str | Path | None = None, *, name: str = "transcript") -> None:
        self.path = None if path is None else Path(path)
        self._name = name
        self._answers: dict[str, str] = {}
        self._unwritten: list[bytes] = []
        try:
            data = self.path.read_bytes() if self.path is not None and self.path.is_file() else b""
        except OSError as error:
            raise JudgeError(f"{self.path}: cannot be read ({error.strerror})") from None
        skipped = [str(i) for i, line in enumerate(data.split(b"\n"), 1) if line.strip() and not self._read(line)]
        if skipped:
            shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
            warnings.warn(
                f"{self.path}: {len(skipped)} lines are no rows of a transcript and are skipped (line {shown}); "
                "their questions are asked again",
                CacheWarning,
                stacklevel=2,
            )

    def _read(self, line: bytes) -> bool:
        """Record a line's answer; tell whether it has one."""
        try:
            row = json.loads(line.decode())
            judge, question, answer = row["judge"], row["question"], row["answer"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return False
        if not all(isinstance(text, str) for text in (judge, question, answer)):
            return False
        self._answers[_key(judge, question)] = answer
        self._name = judge
        return True

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
        if self.path is None:
            return
        row = json.dumps({"judge": judge, "question": question, "answer": answer}, ensure_ascii=False)
        failed_before = bool(self._unwritten)
        self._unwritten.append(row.encode(errors="backslashreplace") + b"\n")  # half of a surrogate pair: as in JSON
        try:
            self._write()
        except OSError as error:
            if not failed_before:
                warnings.warn(
                    f"{self.path}: cannot be written ({error.strerror}); answers are in memory, and are lost when the "
                    "program ends, unless a later one can be written",
                    CacheWarning,
                    stacklevel=2,
                )

    def _write(self) -> None:
        """Append the rows that are not in the file yet."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            torn = False  # the last line has no end: a kill or a full disk cut it short
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            while self._unwritten:
                line = b"\n" * torn + self._unwritten[0]
                torn = file.write(line) != len(line)  # a disk that is almost full takes a part
                if not torn:
                    del self._unwritten[0]


def _key(judge: str, question: str) -> str:
    return hashlib.sha256(f"{judge}\n{question}".encode(errors="surrogatepass")).hexdigest()

"""Prompts, and their text for one model's tokenizer."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.templates import locate

DAY = datetime(2024, 7, 26)  # the default date of Llama 3's templates
DATE = DAY.strftime("%d %b %Y")
# Before a template, this macro hides transformers' function of the same name, which asks the clock; transformers 5.24
# passes no function to a template. The line's end is trimmed, so that the template still begins a line.
CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%-{c}', '{DAY.strftime('%' + c).lstrip('0') or '0'}')" for c in "dmHIMSjy")
    + "".join(f"|replace('%{c}', '{DAY.strftime('%' + c)}')" for c in "aAbBcdDeFGhHIjmMnpPrRSTuUVwWxXyYzZ")
    + "|replace('%%', '%') }}{% endmacro %}\n"
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def __post_init__(self) -> None:
        require_type("Message", str, self.role, self.content)


@dataclass(frozen=True)
class Rendered:
    """A prompt as text for one model.

    Args:
        text: The text to tokenise.
        spans: For each piece of content, in order: its start and end in ``text``, and its start in
            the prompt's content. Positions are in characters. Text outside the spans comes from
            the chat template. A message of which the template keeps parts has a span for each part.
        add_special_tokens: Whether the tokenizer still has to add its BOS and other special tokens.
        marks: For each border between template and content, its place in ``text`` and its role: 2i
            where the content of message i begins (or an opened assistant's turn would), 2i + 1
            where it ends. Roles are the same for every template.
        missing: Numbers of the messages that the template leaves out or rewrites, in part or in
            whole; changes of white space do not count.
    """

    text: str
    spans: tuple[tuple[int, int, int], ...]
    add_special_tokens: bool
    marks: tuple[tuple[int, int], ...] = ()
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """Raw text or chat messages, plus an id.

    Args:
        text: Raw text, passed to the tokenizer as it is. Exclusive with ``messages``.
        messages: A conversation, rendered with each model's own chat template.
        id: Name of the prompt; a hash of the content by default.

    Raises:
        PromptError: Neither or both of text and messages were given, or they are empty or no text.

    Example:
        >>> Prompt.of("The sky is").text
        'The sky is'
        >>> Prompt.of([{"role": "user", "content": "Hello"}]).messages
        (Message(role='user', content='Hello'),)
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) == (not self.messages):
            raise PromptError("Prompt: give either text or messages, not both and not neither")
        chat = isinstance(self.messages, tuple | list) and all(isinstance(m, Message) for m in self.messages)
        if not isinstance(self.text, str | None) or not chat:
            value = self.text if self.text is not None else self.messages
            raise PromptError(
                f"Prompt: text must be a string and messages Messages, got {described(value)}; use Prompt.of"
            )
        require_type("Prompt.id", str, self.id)
        object.__setattr__(self, "messages", tuple(self.messages))
        if self.text is not None and not self.text.strip():
            raise PromptError("Prompt: the text is empty; drop the row or fill it in")
        if self.messages and not any(m.content.strip() for m in self.messages):
            raise PromptError("Prompt: every message is empty; drop the row or fill it in")
        for text in (self.text or "", *(part for m in self.messages for part in (m.role, m.content))):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise PromptError(
                    f"Prompt: character {error.start} is half of a surrogate pair, which is no text; "
                    'replace it, such as by text.encode(errors="replace").decode()'
                ) from None
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha256(self.content_key().encode()).hexdigest()[:16])

    @classmethod
    def of(cls, value: Any) -> "Prompt":
        """Make a prompt from text, a list of ``{"role", "content"}``, or a Prompt.

        Raises:
            PromptError: The value is none of these.
        """
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str):
            return cls(text=value)
        if not isinstance(value, Sequence) and hasattr(value, "tolist"):  # an array from a parquet file
            value = value.tolist()
        if isinstance(value, list | tuple) and value and all(isinstance(m, Mapping | Message) for m in value):
            try:
                turns = [(m.role, m.content) if isinstance(m, Message) else (m["role"], m["content"]) for m in value]
            except KeyError as missing:
                raise PromptError(f"Prompt: a chat message needs role and content, {missing} is missing") from None
            if not all(isinstance(part, str) for turn in turns for part in turn):
                raise PromptError(f"Prompt: role and content of a chat message must be strings, got {str(value)[:80]}")
            return cls(messages=tuple(Message(role, content) for role, content in turns))
        raise PromptError(f"Prompt: needs a string or a list of {{'role', 'content'}} messages, got {described(value)}")

    def content_key(self) -> str:
        """Return the content as a string, equal only for equal prompts."""
        if self.text is not None:
            return self.text
        # No text begins with this character, not even one that spells out messages.
        return "\0" + json.dumps([[m.role, m.content] for m in self.messages], ensure_ascii=False)

    @property
    def content(self) -> str:
        """Readable content: the text, or a line for each message."""
        return self.text if self.text is not None else "\n".join(f"{m.role}: {m.content}" for m in self.messages)

    def render(self, tokenizer: Any) -> Rendered:
        """Render the prompt as text for one tokenizer, with its chat template.

        Chat messages end with the template's opening of the assistant's turn, unless the last
        message is the assistant's.

        Args:
            tokenizer: A Hugging Face tokenizer.

        Raises:
            PromptError: The tokenizer has no chat template for the messages, or the template fails.
        """
        if self.text is not None:
            return Rendered(self.text, ((0, len(self.text), 0),), True)
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise PromptError(
                f"Prompt {self.id}: chat messages need a chat template, and the tokenizer of {_name(tokenizer)} has none "
                "(a base model?); give raw text instead, or set tokenizer.chat_template"
            )
        if isinstance(template, Mapping) and "default" not in template:
            raise PromptError(
                f"Prompt {self.id}: the tokenizer of {_name(tokenizer)} has the chat templates {', '.join(sorted(template))} and no "
                f"default; choose one: tokenizer.chat_template = tokenizer.chat_template[{min(template)!r}]"
            )
        contents = [m.content for m in self.messages]
        text = self._template(tokenizer, contents)
        bases = list(accumulate((len(content.strip()) for content in contents), initial=0))
        spans: list[tuple[int, int, int]] = []
        parts: list[list[tuple[int, int, str]]] = [[] for _ in contents]
        places = locate(contents, text, _source(tokenizer), lambda others: self._template(tokenizer, others)).items()
        for start, end, place, number in sorted((*run, number) for number, runs in places for run in runs):
            cut = max(0, spans[-1][1] - start) if spans else 0  # contents with nothing between them
            if start + cut < end:
                content = contents[number]
                spans.append((start + cut, end, bases[number] + place + cut - (len(content) - len(content.lstrip()))))
                parts[number].append((start + cut, end, text[start + cut : end]))
        marks, missing = [], []
        for number, (content, pieces) in enumerate(zip(contents, parts, strict=True)):
            if pieces:
                marks += [(pieces[0][0], 2 * number), (pieces[-1][1], 2 * number + 1)]
            if "".join(content.split()) != "".join("".join(piece for *_, piece in pieces).split()):
                missing.append(number)
        if self._opens:
            marks.append((len(text), 2 * len(self.messages)))
        return Rendered(text, tuple(spans), False, tuple(marks), tuple(missing))

    @property
    def _opens(self) -> bool:
        """True where the assistant speaks next."""
        return self.messages[-1].role != "assistant"

    def _template(self, tokenizer: Any, contents: Sequence[str]) -> str:
        turns = [{"role": m.role, "content": c} for m, c in zip(self.messages, contents, strict=True)]
        options: dict[str, Any] = {"date_string": DATE}  # today's would change the prompt from day to day
        source = _source(tokenizer)
        if "strftime_now" in source:
            options["chat_template"] = CLOCK + source
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=self._opens, **options)
        except Exception as error:  # a template is a foreign program
            raise PromptError(
                f"Prompt {self.id} ({self.content[:40]!r}): the chat template of {_name(tokenizer)} fails on it "
                f"({type(error).__name__}: {str(error)[:200]}); change the messages (many templates want user and assistant by "
                "turns and no system message: put that into the first user message), or set tokenizer.chat_template"
            ) from error


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", None) or "this model")


def _source(tokenizer: Any) -> str:
    """Return the chat template's program, or an empty text."""
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, Mapping) else template
    return template if isinstance(template, str) else ""


if TYPE_CHECKING:
    PromptLike = str | Prompt | Sequence[Mapping[str, str] | Message] | Mapping[str, Any]
    Prompts = Iterable[PromptLike]
else:
    PromptLike = Prompts = Any  # `as_prompts` refuses other values with its own message


def described(value: Any) -> str:
    """Describe a value for an error message, by type and content."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        inside = "splits" if name.endswith("DatasetDict") else "keys"
        return f"{name} with {inside} {', '.join(map(str, list(value)[:8]))}"
    columns = getattr(value, "column_names", None)
    columns = getattr(value, "columns", None) if columns is None else columns
    if columns is not None:
        return f"{name} with columns {', '.join(map(str, list(columns)[:8]))}"
    return f"{name} {str(value)[:60]!r}"


def text_digest(texts: Sequence[Prompt]) -> str:
    """Hash documents in their order."""
    digest = hashlib.sha256()
    for prompt in texts:
        digest.update(hashlib.sha256(prompt.content_key().encode()).digest())
    return digest.hexdigest()[:16]

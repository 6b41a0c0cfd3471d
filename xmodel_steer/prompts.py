"""What is said to a model: prompts, sets of contrasting prompts, and their disjoint splits."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from xmodel_steer.errors import PromptError

DATE = "26 Jul 2024"  # the day that Llama 3's templates name where they cannot know it


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """A prompt as one model sees it.

    Args:
        text: The text to tokenise.
        spans: For each piece of content, in order: where it starts and ends in ``text``, and
            where it starts in the prompt's own content. Positions are in characters. Text
            outside the spans comes from the chat template.
        add_special_tokens: Whether the tokenizer still has to add its BOS and the like.
        marks: For each border between template and content, its place in ``text`` and its role: 2i
            where the content of message i begins (or an opened assistant's turn would), 2i + 1
            where it ends. Roles are the same for every template.
    """

    text: str
    spans: tuple[tuple[int, int, int], ...]
    add_special_tokens: bool
    marks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """Raw text or chat messages, plus an id.

    Args:
        text: Raw text, passed to the tokenizer as it is. Exclusive with ``messages``.
        messages: A conversation, rendered with each model's own chat template.
        id: Name of the prompt; a hash of the content by default.

    Raises:
        PromptError: Neither or both of text and messages were given, or they are empty.

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
        if self.text is not None and not self.text.strip():
            raise PromptError("Prompt: the text is empty; drop the row or fill it in")
        if self.messages and not any(m.content.strip() for m in self.messages):
            raise PromptError("Prompt: every message is empty; drop the row or fill it in")
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha256(self.content_key().encode()).hexdigest()[:16])

    @classmethod
    def of(cls, value: Any) -> "Prompt":
        """Make a prompt from a string, a list of ``{"role", "content"}`` messages, or a Prompt.

        Raises:
            PromptError: The value is none of these.
        """
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str):
            return cls(text=value)
        if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) for m in value):
            try:
                turns = [(m["role"], m["content"]) for m in value]
            except KeyError as missing:
                raise PromptError(f"Prompt: a chat message needs role and content, {missing} is missing") from None
            if not all(isinstance(part, str) for turn in turns for part in turn):
                raise PromptError(f"Prompt: role and content of a chat message must be strings, got {str(value)[:80]}")
            return cls(messages=tuple(Message(role, content) for role, content in turns))
        if isinstance(value, Sequence) and value and all(isinstance(m, Message) for m in value):
            return cls(messages=tuple(value))
        raise PromptError(
            "Prompt: needs a string or a list of {'role', 'content'} messages, "
            f"got {type(value).__name__} {str(value)[:60]!r}"
        )

    def content_key(self) -> str:
        """The content as one string that two prompts share only when they are the same."""
        if self.text is not None:
            return self.text
        # No text begins like this, also not one that spells out messages.
        return "\0" + json.dumps([[m.role, m.content] for m in self.messages], ensure_ascii=False)

    @property
    def content(self) -> str:
        """The content for people to read: the text, or a line for each message."""
        return self.text if self.text is not None else "\n".join(f"{m.role}: {m.content}" for m in self.messages)

    def render(self, tokenizer: Any) -> Rendered:
        """The prompt as text for one tokenizer, with its own chat template.

        Chat messages end with the template's opening of the assistant's turn, unless the last
        message is the assistant's.

        Args:
            tokenizer: A Hugging Face tokenizer.

        Raises:
            PromptError: Chat messages, and the tokenizer has no chat template.
        """
        if self.text is not None:
            return Rendered(self.text, ((0, len(self.text), 0),), True)
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError(
                f"Prompt {self.id}: chat messages need a chat template, and the tokenizer of "
                f"{getattr(tokenizer, 'name_or_path', 'this model')!r} has none (a base model?); "
                "give raw text instead, or set tokenizer.chat_template"
            )
        text = self._template(tokenizer, [m.content for m in self.messages])
        found = self._spans(tokenizer, text)
        marks = [mark for i, (start, end, _) in found for mark in ((start, 2 * i), (end, 2 * i + 1))]
        if self._opens:
            marks.append((len(text), 2 * len(self.messages)))
        return Rendered(text, tuple(span for _, span in found), False, tuple(marks))

    @property
    def _opens(self) -> bool:
        """Whether the assistant is to speak next."""
        return self.messages[-1].role != "assistant"

    def _template(self, tokenizer: Any, contents: Sequence[str]) -> str:
        turns = [{"role": m.role, "content": c} for m, c in zip(self.messages, contents, strict=True)]
        # Llama 3's templates write today's date unless they are given one: a prompt would change from day to day.
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=self._opens, date_string=DATE)

    def _spans(self, tokenizer: Any, text: str) -> list[tuple[int, tuple[int, int, int]]]:
        """For each message whose content is found, its number and where the content stands in the rendered text.

        Searching for them would also find a role tag or a default system prompt with the same
        words. Rendering markers in their place shows the template's own text around them.
        """
        trimmed = [m.content.strip() for m in self.messages]
        bases = list(accumulate(map(len, trimmed), initial=0))
        marked = self._template(tokenizer, [f"\ue000{i}\ue001" for i in range(len(trimmed))])
        # literal, number, literal, number, ..., literal
        pieces = re.split("\ue000(\\d+)\ue001", marked)
        spans: list[tuple[int, tuple[int, int, int]]] = []
        cursor = len(pieces[0])
        for number, literal in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
            # Most templates trim the content, some keep it as it is.
            for content in (trimmed[number], self.messages[number].content):
                if text.startswith(content + literal, cursor):
                    start = cursor + content.find(trimmed[number])
                    spans.append((number, (start, start + len(trimmed[number]), bases[number])))
                    cursor += len(content) + len(literal)
                    break
            else:
                break  # the template rewrites this message: its tokens count as the template's
        return [(number, span) for number, span in spans if span[0] < span[1]]


PromptLike = str | Prompt | Sequence[Mapping[str, str]]


def as_prompts(values: Iterable[PromptLike]) -> tuple[Prompt, ...]:
    """Make prompts of strings, message lists or prompts; refuses a lone string.

    Raises:
        PromptError: The argument is one string, or an element cannot be a prompt.
    """
    if isinstance(values, (str, Prompt)):
        raise PromptError("prompts: give a list of prompts; for a single one, [prompt]")
    return tuple(Prompt.of(value) for value in values)


def require_disjoint(what: str, sets: Mapping[str, Iterable[str]]) -> None:
    """Refuse sets that share a text: what chooses or fits must not be reported on.

    Args:
        what: Who asks, for the message.
        sets: Contents (`Prompt.content_key`) of each set, by its name.

    Raises:
        PromptError: A text is in two sets.
    """
    owner: dict[str, str] = {}
    for name, contents in sets.items():
        for content in set(contents):
            if owner.setdefault(content, name) != name:
                raise PromptError(
                    f"{what}: the same text is in the {owner[content]} and the {name} set ({content[:60]!r}); "
                    "what chooses or fits must not be reported on, remove it from one"
                )


def text_digest(texts: Sequence[Prompt]) -> str:
    """A hash of documents in their order."""
    digest = hashlib.sha256()
    for prompt in texts:
        digest.update(hashlib.sha256(prompt.content_key().encode()).digest())
    return digest.hexdigest()[:16]


_ON = {"1", "1.0", "true", "positive", "pos", "yes"}
_OFF = {"0", "0.0", "-1", "-1.0", "false", "negative", "neg", "no"}


@dataclass(frozen=True)
class ContrastSet:
    """Prompts with a behaviour (positive) and without it (negative).

    Args:
        positive: Prompts that show the behaviour.
        negative: Prompts that do not.
        paired: Whether ``positive[i]`` and ``negative[i]`` belong together, so that a split
            keeps them on one side.

    Raises:
        PromptError: A side is empty, the sides of a paired set have different lengths, or a
            prompt stands on both sides.

    Example:
        >>> contrast = ContrastSet.from_records([{"positive": "What a joy.", "negative": "What a bore."}])
        >>> len(contrast.positive), contrast.paired
        (1, True)
    """

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    paired: bool = False

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise PromptError(
                f"ContrastSet: needs prompts on both sides, got {len(self.positive)} positive and "
                f"{len(self.negative)} negative; a difference of means has two means"
            )
        if self.paired and len(self.positive) != len(self.negative):
            raise PromptError(
                f"ContrastSet: paired, but {len(self.positive)} positive and {len(self.negative)} "
                "negative prompts; pass paired=False or complete the pairs"
            )
        both = {p.content_key() for p in self.positive} & {p.content_key() for p in self.negative}
        if both:
            raise PromptError(
                f"ContrastSet: {len(both)} prompt(s) stand on both sides, for example "
                f"{min(both)[:80]!r}; they contrast with nothing, remove them"
            )

    @classmethod
    def from_prompts(
        cls, positive: Iterable[PromptLike], negative: Iterable[PromptLike], *, paired: bool = False
    ) -> "ContrastSet":
        """Make a set from two lists of strings, message lists or prompts."""
        return cls(as_prompts(positive), as_prompts(negative), paired)

    @classmethod
    def from_records(cls, records: Any) -> "ContrastSet":
        """Make a set from rows: dictionaries, a pandas frame or a ``datasets.Dataset``.

        Rows have either ``positive`` and ``negative`` (a paired set), or a prompt under
        ``text``, ``prompt`` or ``messages`` and a ``label`` (1/0, true/false,
        positive/negative; an unpaired set). A prompt is a string or a list of chat messages;
        in text formats messages may be written as JSON.

        Raises:
            PromptError: A row has neither form; the message names the row.
        """
        rows = rows_of(records)
        if not rows:
            raise PromptError("ContrastSet: no rows; each needs positive and negative, or text and label")
        positive: list[Prompt] = []
        negative: list[Prompt] = []
        paired = all("positive" in row and "negative" in row for row in rows)
        for number, row in enumerate(rows, 1):
            try:
                if paired:
                    positive.append(Prompt.of(_chat_or_text(row["positive"])))
                    negative.append(Prompt.of(_chat_or_text(row["negative"])))
                else:
                    (positive if _label(row) else negative).append(prompt_of_row(row))
            except PromptError as error:
                raise PromptError(f"ContrastSet: row {number}: {error}") from None
        return cls(tuple(positive), tuple(negative), paired)

    def split(self, fractions: Sequence[float] = (0.5, 0.5), *, seed: int = 0) -> "tuple[ContrastSet, ...]":
        """Disjoint parts, by shuffling with a seed.

        Pairs stay together, and so do all rows that share a prompt: no prompt is in two parts.

        Args:
            fractions: Share of each part; they sum to at most 1 (the rest is left out).
            seed: Seed of the shuffle.

        Raises:
            PromptError: A part would have an empty side.
            ValueError: The fractions are not positive or sum to more than 1.
        """
        if any(f <= 0 for f in fractions) or sum(fractions) > 1 + 1e-9:
            raise ValueError(f"split: fractions must be positive and sum to at most 1, got {tuple(fractions)}")
        if self.paired:
            units = [((p,), (n,)) for p, n in zip(self.positive, self.negative, strict=True)]
            pools = [_joined(units)]
        else:
            pools = [
                _joined([((p,), ()) for p in self.positive]),
                _joined([((), (n,)) for n in self.negative]),
            ]
        sides = [([], []) for _ in fractions]
        for pool in pools:
            random.Random(seed).shuffle(pool)
            start, share = 0, 0.0
            for part, fraction in enumerate(fractions):
                share += fraction
                stop = round(share * len(pool))
                for positive, negative in pool[start:stop]:
                    sides[part][0].extend(positive)
                    sides[part][1].extend(negative)
                start = stop
        try:
            return tuple(ContrastSet(tuple(p), tuple(n), self.paired) for p, n in sides)
        except PromptError:
            raise PromptError(
                f"split: {len(self.positive)} positive and {len(self.negative)} negative prompts are "
                f"too few for {len(fractions)} parts with both sides; give more prompts or fewer parts"
            ) from None


def _joined(units: list[tuple[tuple[Prompt, ...], tuple[Prompt, ...]]]) -> list:
    """Merge units that share a prompt, so that a split cannot put one prompt into two parts."""
    parent = list(range(len(units)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, (positive, negative) in enumerate(units):
        for prompt in positive + negative:
            parent[root(i)] = root(first.setdefault(prompt.content_key(), i))
    groups: dict[int, tuple[list[Prompt], list[Prompt]]] = {}
    for i, (positive, negative) in enumerate(units):
        group = groups.setdefault(root(i), ([], []))
        group[0].extend(positive)
        group[1].extend(negative)
    return list(groups.values())


def rows_of(records: Any) -> list[dict[str, Any]]:
    """Rows as dictionaries, from a list of them, a pandas frame or a ``datasets.Dataset``."""
    if hasattr(records, "to_dict") and hasattr(records, "columns"):  # a pandas frame
        return records.to_dict("records")
    if isinstance(records, (str, bytes)):
        raise PromptError("rows: got one string; give a list of rows, or read a file with xs.read_contrast")
    rows = list(records)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise PromptError(f"rows: row {number} is {type(row).__name__}, not a dictionary of columns")
    return [dict(row) for row in rows]


def prompt_of_row(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row: its ``text``, ``prompt`` or ``messages`` column."""
    for column in ("text", "prompt", "messages"):
        if row.get(column) is not None:
            return Prompt.of(_chat_or_text(row[column]))
    raise PromptError(f"no text, prompt or messages among the columns {sorted(map(str, row))}")


def _label(row: Mapping[str, Any]) -> bool:
    label = str(row.get("label", "")).strip().lower()
    if label in _ON:
        return True
    if label in _OFF:
        return False
    raise PromptError(
        f"label {row.get('label')!r} is not 1/0, true/false or positive/negative "
        f"(columns: {sorted(map(str, row))}; a paired row has positive and negative)"
    )


def _chat_or_text(value: Any) -> Any:
    """Chat messages written as JSON text (CSV has nothing else) become messages."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    if isinstance(value, float):  # pandas' NaN for an empty cell
        raise PromptError("an empty cell; drop the row or fill it in")
    if not isinstance(value, str) and hasattr(value, "tolist"):  # numpy arrays out of parquet
        return value.tolist()
    return value

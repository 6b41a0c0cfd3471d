"""What is said to a model: prompts, sets of contrasting prompts, and their disjoint splits."""

import hashlib
import json
import os
import random
import re
import string
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import IOBase
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from xmodel_steer.core.errors import PromptError

DAY = datetime(2024, 7, 26)  # the day that Llama 3's templates name where they cannot know it
DATE = DAY.strftime("%d %b %Y")
# Put before a template, this macro hides transformers' function of the same name, which asks the clock; transformers
# 5.24 lets no function of ours through. The line's end is trimmed, so that the template still begins a line.
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


@dataclass(frozen=True)
class Rendered:
    """A prompt as one model sees it.

    Args:
        text: The text to tokenise.
        spans: For each piece of content, in order: where it starts and ends in ``text``, and
            where it starts in the prompt's own content. Positions are in characters. Text
            outside the spans comes from the chat template. A message of which the template keeps
            parts has a span for each of them.
        add_special_tokens: Whether the tokenizer still has to add its BOS and the like.
        marks: For each border between template and content, its place in ``text`` and its role: 2i
            where the content of message i begins (or an opened assistant's turn would), 2i + 1
            where it ends. Roles are the same for every template.
        missing: Numbers of the messages that are not in ``text`` as they were given: the template
            leaves out or rewrites something of them other than white space.
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
        PromptError: Neither or both of text and messages were given, they are empty, or of another type.

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
        if not isinstance(self.text, str | None) or not all(isinstance(m, Message) for m in self.messages):
            came = self.text if self.text is not None else self.messages
            raise PromptError(
                f"Prompt: text must be a string and messages Messages, got {described(came)}; use Prompt.of"
            )
        object.__setattr__(self, "messages", tuple(self.messages))
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
        if not isinstance(value, Sequence) and hasattr(value, "tolist"):  # an array out of parquet
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
            PromptError: Chat messages, and the tokenizer has no chat template, or the template fails on them.
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
        for start, end, place, number in sorted((*stretch, number) for number, own in places for stretch in own):
            cut = max(0, spans[-1][1] - start) if spans else 0  # contents with nothing between them
            if start + cut < end:
                content = contents[number]
                spans.append((start + cut, end, bases[number] + place + cut - (len(content) - len(content.lstrip()))))
                parts[number].append((start + cut, end, text[start + cut : end]))
        marks, missing = [], []
        for number, (content, own) in enumerate(zip(contents, parts, strict=True)):
            if own:
                marks += [(own[0][0], 2 * number), (own[-1][1], 2 * number + 1)]
            if "".join(content.split()) != "".join("".join(part for *_, part in own).split()):
                missing.append(number)
        if self._opens:
            marks.append((len(text), 2 * len(self.messages)))
        return Rendered(text, tuple(spans), False, tuple(marks), tuple(missing))

    @property
    def _opens(self) -> bool:
        """Whether the assistant is to speak next."""
        return self.messages[-1].role != "assistant"

    def _template(self, tokenizer: Any, contents: Sequence[str]) -> str:
        turns = [{"role": m.role, "content": c} for m, c in zip(self.messages, contents, strict=True)]
        options: dict[str, Any] = {"date_string": DATE}  # today's would change the prompt from day to day
        source = _source(tokenizer)
        if "strftime_now" in source:
            options["chat_template"] = CLOCK + source
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=self._opens, **options)
        except Exception as error:  # a template is a program of somebody else's
            raise PromptError(
                f"Prompt {self.id} ({self.content[:40]!r}): the chat template of {_name(tokenizer)} fails on it "
                f"({type(error).__name__}: {str(error)[:200]}); change the messages (many templates want user and assistant by "
                "turns and no system message: put that into the first user message), or set tokenizer.chat_template"
            ) from error


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", None) or "this model")


def _source(tokenizer: Any) -> str:
    """The chat template's program, where it is known."""
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, Mapping) else template
    return template if isinstance(template, str) else ""


_SIGNS = f"[{re.escape(string.punctuation)}]"
_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"
# Kinds of characters of a content whose way through a template is followed: replaced by one of its own; kept; kept in a
# word or tag that the template may look for.
_SHOWN, _LOOSE, _FIXED = 0, 1, 2
_PRIVATE, _MANY = 0xF0000, 0x20000  # two planes of private-use characters


def locate(
    contents: Sequence[str], text: str, source: str, render: Callable[[Sequence[str]], str]
) -> dict[int, list[tuple[int, int, int]]]:
    """For each message the stretches of its content in the rendered text: from, to, and where in the content.

    Searching for the contents would also find a role tag or a default system prompt with the same words. So the
    prompt is rendered again with each character of content replaced by one of its own, which shows where every
    character goes, also if others are dropped. White space stays, because templates trim it. If the text becomes
    another one, the template looks for something in the content, such as ``</think>``: what it may look for is
    then kept, as little as will do. A message that cannot be followed with the others is tried alone, and at last
    searched for where the text changes with it.

    Args:
        contents: The content of each message.
        text: The conversation as the template renders it.
        source: The template's program, where it is known.
        render: Renders the conversation with other contents; may raise `PromptError`.
    """
    found: dict[int, list[tuple[int, int, int]]] = {i: [] for i, c in enumerate(contents) if not c.strip()}
    alone: dict[int, str] = {}
    # No character may be replaced by itself.
    taken = {(ord(c) - _PRIVATE - n) % _MANY for n, c in enumerate("".join(contents)) if c >= chr(_PRIVATE)}
    shift = next(n for n in range(_MANY) if n not in taken)

    def follow(kept: Mapping[int, Sequence[str]]) -> dict[int, list[tuple[int, int, int]]]:
        kinds = {i: own for i, patterns in kept.items() if _SHOWN in (own := _kinds(contents[i], patterns))}
        try:
            shown = render(_replaced(contents, kinds, shift))
        except PromptError:  # the prompt itself was rendered, so it can be used
            return {}
        if len(kinds) == 1:
            alone.setdefault(next(iter(kinds)), shown)
        places = _followed(text, shown, contents, shift)
        if places is None:
            return {}
        return {i: _runs(text, contents[i], _longest(places.get(i, [])), own) for i, own in kinds.items()}

    for together in (True, False):
        for patterns in _may_look_for(source, "\n".join(contents)):
            rest = [i for i in range(len(contents)) if i not in found]
            for group in [[i] for i in rest] if not together else [rest] if rest else []:
                kept = {i: [pattern for pattern in patterns if re.search(pattern, contents[i])] for i in group}
                told = follow(kept)
                for i, pattern in [(number, pattern) for number in told for pattern in kept[number]]:
                    if not _may_be_there(pattern, text, contents[i], told[i]):
                        continue
                    fewer = {**kept, i: [other for other in kept[i] if other != pattern]}
                    again = follow(fewer)
                    if again.keys() >= told.keys():
                        told, kept = again, fewer
                found.update(told)
    for i in set(range(len(contents))) - found.keys():
        content = contents[i].strip()
        start, end = 0, len(text)
        if i in alone:
            start = _shared(text, alone[i])
            end = max(start, end - _shared(text[::-1], alone[i][::-1]))
        if text.count(content, start, end) == 1:
            start = text.index(content, start)
            end = start + len(content)
            if all(end <= first or last <= start for spans in found.values() for first, last, _ in spans):
                found[i] = [(start, end, contents[i].index(content))]
    return found


def _may_look_for(source: str, whole: str) -> list[list[str]]:
    """Patterns of what a template may look for in the contents: nothing, its own tags, everything, one of its words."""
    quoted = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", source)
    words = {word for pair in quoted for word in re.split(r"\\.|\s+", "".join(pair)) if word and word in whole}
    own = sorted(re.escape(word) for word in words)
    tags = [word for word in own if re.search(r"\w", word) and re.search(r"[^\w\\]", word)]
    every = dict.fromkeys([_SIGNS, *own, *sorted(map(re.escape, re.findall(_TAG, whole)))])
    return [[], *([tags] if tags else []), list(every), *([word] for word in own)]


def _kinds(content: str, kept: Sequence[str]) -> bytearray:
    kinds = bytearray(_LOOSE if c.isspace() else _SHOWN for c in content)
    for pattern in kept:
        for match in re.finditer(pattern, content):
            kind = _FIXED if re.search(r"\w", match[0]) else _LOOSE
            for place in range(match.start(), match.end()):
                kinds[place] = max(kinds[place], kind)
    return kinds


def _replaced(contents: Sequence[str], kinds: Mapping[int, bytearray], shift: int) -> list[str]:
    """The contents with private-use characters, one after the other, for what is shown."""
    made = list(contents)
    firsts = list(accumulate(map(len, contents), initial=0))
    for i, own in kinds.items():
        made[i] = "".join(
            c if kind else chr(_PRIVATE + (firsts[i] + place + shift) % _MANY)
            for place, (c, kind) in enumerate(zip(contents[i], own, strict=True))
        )
    return made


def _followed(text: str, shown: str, contents: Sequence[str], shift: int) -> dict[int, list[tuple[int, int]]] | None:
    """For each message, which characters of the text are which of its content; None if the text is another one."""
    if len(text) != len(shown):
        return None
    *firsts, total = accumulate(map(len, contents), initial=0)
    places: dict[int, list[tuple[int, int]]] = {}
    number = 0
    for at, (character, other) in enumerate(zip(text, shown, strict=True)):
        if character == other:
            continue
        code = ord(other) - _PRIVATE
        if code < 0:
            return None
        # In a very long conversation they come round again: the next one is meant.
        number += (code - shift - number) % _MANY
        number -= _MANY * (number >= total)
        if number < 0:
            return None
        message = bisect_right(firsts, number) - 1
        places.setdefault(message, []).append((at, number - firsts[message]))
    return places


def _longest(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part that has the content in its own order, the last of equals: a template may write it twice."""
    parts: list[list[tuple[int, int]]] = [[]]
    for at, place in places:
        if parts[-1] and place <= parts[-1][-1][1]:
            parts.append([])
        parts[-1].append((at, place))
    return max(reversed(parts), key=len)


def _runs(text: str, content: str, piece: Sequence[tuple[int, int]], kinds: bytearray) -> list[tuple[int, int, int]]:
    """The stretches in which text and content are the same, without white space at their ends.

    There are none where the text has other letters, in capitals, say.
    """
    if not piece or any(text[at] != content[place] for at, place in piece):
        return []
    first, last = len(content) - len(content.lstrip()), len(content.rstrip())
    at, place = piece[0]
    whole = at - place + first
    if len(piece) == kinds.count(_SHOWN) and whole >= 0 and text.startswith(content[first:last], whole):
        return [(whole, whole + last - first, first)]
    runs = [[at, at + 1, place]]
    for at, place in piece[1:]:
        start, end, begins = runs[-1]
        if at - place == start - begins and text[end:at] == content[end - start + begins : place]:
            runs[-1][1] = at + 1
        else:
            runs.append([at, at + 1, place])
    made: list[tuple[int, int, int]] = []
    for start, end, place in runs:
        shift = start - place
        least = made[-1][1] if made else 0
        # Signs that were kept at the ends belong to the stretch where the text has them.
        while start > max(least, shift + first) and _goes_on(text, content, kinds, start - 1, shift):
            start -= 1
        while end < min(len(text), shift + last) and _goes_on(text, content, kinds, end, shift):
            end += 1
        stretch = text[start:end]
        start, end = start + len(stretch) - len(stretch.lstrip()), end - len(stretch) + len(stretch.rstrip())
        made.append((start, end, start - shift))
    return made


def _may_be_there(pattern: str, text: str, content: str, runs: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the text may have more of the content than these stretches: what matches the pattern, or a part of it."""
    if not runs:
        return True
    for start, end, place in runs:
        before = text[:start].rstrip()[-1:], content[:place].rstrip()[-1:]
        after = text[end:].lstrip()[:1], content[place + end - start :].lstrip()[:1]
        if "" != before[0] == before[1] or "" != after[0] == after[1]:
            return True
    (start, _, first), (begin, end, last) = runs[0], runs[-1]
    return bool(re.search(pattern, text[max(0, start - first) : end + len(content) - (last + end - begin)]))


def _goes_on(text: str, content: str, kinds: bytearray, at: int, shift: int) -> bool:
    return kinds[at - shift] == _LOOSE and text[at] == content[at - shift]


if TYPE_CHECKING:
    PromptLike = str | Prompt | Sequence[Mapping[str, str] | Message] | Mapping[str, Any]
    Prompts = Iterable[PromptLike]
else:
    PromptLike = Prompts = Any  # `as_prompts` refuses others, and says why


def as_prompts(values: Any, *, what: str = "prompts") -> tuple[Prompt, ...]:
    """Make prompts of strings, message lists, prompts or rows; refuses everything else.

    Args:
        values: A list or another ordered iterable (a pandas series or frame, a ``datasets.Dataset``, a
            generator). An element is a string, a list of chat messages, a Prompt, or a row with a
            column ``text``, ``prompt`` or ``messages``.
        what: Who asks, for the message.

    Raises:
        PromptError: The argument is something else, or an element cannot be a prompt.
    """
    return tuple(iter_prompts(values, what=what))


def iter_prompts(values: Any, *, what: str = "prompts") -> Iterator[Prompt]:
    """`as_prompts`, one after the other."""
    for number, item in enumerate(items_of(values, what), 1):
        try:
            yield prompt_of_row(item) if isinstance(item, Mapping) else Prompt.of(_filled(item))
        except PromptError as error:
            raise PromptError(f"{what}: number {number}: {error}") from None


def items_of(values: Any, what: str) -> Iterable[Any]:
    """Refuse what is no list of prompts or rows; the rows of a pandas frame are dictionaries.

    Iterables other than lists are left as they are, to be read once.

    Args:
        values: Whatever was given.
        what: Who asks, for the message.

    Raises:
        PromptError: The value is one prompt, a mapping, a set, a file, or no iterable at all.
    """
    if isinstance(values, str | bytes | bytearray | Prompt):
        raise PromptError(
            f"{what}: give a list of prompts; for a single one, [prompt]; got {described(values)} (to read a file: xs.read_prompts)"
        )
    if isinstance(values, os.PathLike | IOBase):
        raise PromptError(
            f"{what}: needs prompts, got {described(values)}; read it with xs.read_prompts or xs.read_contrast"
        )
    if isinstance(values, Mapping):
        first = next(iter(values), None)
        way = f"give one of them, data[{first!r}]"
        if {"role", "content"} <= values.keys():
            way = "a list of prompts, each of which is a string or a list of such messages: [[message]]"
        elif any(isinstance(value, str) for value in values.values()):
            way = "for a single row, [row]"
        elif all(isinstance(value, list | tuple) for value in values.values()):
            way = "for rows of these columns, pandas.DataFrame(data)"
        raise PromptError(f"{what}: needs a list, got {described(values)}; {way}")
    if isinstance(values, set | frozenset):
        raise PromptError(
            f"{what}: a set has no order, so that results could not be told apart; give a list, sorted(...)"
        )
    if hasattr(values, "iloc") and hasattr(values, "columns"):  # a pandas frame; iterating would give its columns
        return values.to_dict("records")
    if hasattr(values, "tolist"):  # a pandas series, an array
        values = values.tolist()
        values = None if isinstance(values, str) else values  # an array of no dimension
    elif hasattr(values, "columns"):
        raise PromptError(
            f"{what}: needs a list of prompts or rows, got {described(values)}; turn it into a list of dictionaries"
        )
    if not isinstance(values, Iterable):
        raise PromptError(f"{what}: needs a list of prompts or rows, got {described(values)}")
    return values


def described(value: Any) -> str:
    """The type of a value, and what tells a reader which one it is."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        inside = "splits" if kind.endswith("DatasetDict") else "keys"
        return f"{kind} with {inside} {', '.join(map(str, list(value)[:8]))}"
    columns = getattr(value, "column_names", None)
    columns = getattr(value, "columns", None) if columns is None else columns
    if columns is not None:
        return f"{kind} with columns {', '.join(map(str, list(columns)[:8]))}"
    return f"{kind} {str(value)[:60]!r}"


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
        PromptError: A side is empty or holds something else than prompts, the sides of a paired set have
            different lengths, or a prompt stands on both sides.

    Example:
        >>> contrast = ContrastSet.from_records([{"positive": "What a joy.", "negative": "What a bore."}])
        >>> len(contrast.positive), contrast.paired
        (1, True)
    """

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    paired: bool = False

    def __post_init__(self) -> None:
        for value in (*self.positive, *self.negative):
            if not isinstance(value, Prompt):
                raise PromptError(f"ContrastSet: needs Prompts, got {described(value)}; use ContrastSet.from_prompts")
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
    def from_prompts(cls, positive: Prompts, negative: Prompts, *, paired: bool = False) -> "ContrastSet":
        """Make a set from two lists of prompts, each of which `as_prompts` takes.

        Raises:
            PromptError: A side is no list of prompts, or the set cannot be used.
        """
        return cls(as_prompts(positive, what="positive"), as_prompts(negative, what="negative"), paired)

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
    """Rows as dictionaries, from a list or another iterable of them, a pandas frame or a ``datasets.Dataset``.

    Raises:
        PromptError: The argument is something else, or a row is no dictionary.
    """
    if isinstance(records, str):
        raise PromptError("rows: got one string; give a list of rows, or read a file with xs.read_contrast")
    rows = list(items_of(records, "rows"))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise PromptError(f"rows: row {number} is {type(row).__name__}, not a dictionary of columns")
    return [dict(row) for row in rows]


def prompt_of_row(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row: its ``text``, ``prompt`` or ``messages`` column, the first that is filled.

    Raises:
        PromptError: There is none, or it is no prompt.
    """
    columns = [column for column in ("text", "prompt", "messages") if column in row]
    for column in columns:
        if not _empty(row[column]):
            return Prompt.of(_chat_or_text(row[column]))
    if columns:
        raise PromptError("an empty cell; drop the row or fill it in")
    way = "rename one"
    if {"role", "content"} <= row.keys():
        way = "it is one chat message: a prompt is a list of messages, [message]"
    raise PromptError(f"no text, prompt or messages among the columns {sorted(map(str, row))}; {way}")


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


def _empty(value: Any) -> bool:
    """Tell an empty cell: None, or pandas' NaN."""
    return value is None or (isinstance(value, float) and value != value)


def _filled(value: Any) -> Any:
    if _empty(value):
        raise PromptError("an empty cell; drop the row or fill it in")
    return value


def _chat_or_text(value: Any) -> Any:
    """Chat messages written as JSON text (CSV has nothing else) become messages."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return _filled(value)

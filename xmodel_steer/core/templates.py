"""Follow the content of each message through a chat template."""

import re
import string
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from xmodel_steer.core.errors import PromptError


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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
    """Replace shown characters by private-use ones, one after the other."""
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
    """Find the longest part that has the content in its own order.

    The last of equals: a template may write it twice.
    """
    parts: list[list[tuple[int, int]]] = [[]]
    for at, place in places:
        if parts[-1] and place <= parts[-1][-1][1]:
            parts.append([])
        parts[-1].append((at, place))
    return max(reversed(parts), key=len)


def _runs(text: str, content: str, piece: Sequence[tuple[int, int]], kinds: bytearray) -> list[tuple[int, int, int]]:
    """Find the stretches in which text and content agree, trimmed.

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

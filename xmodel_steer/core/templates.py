"""Search for the content of each message in a rendered chat template."""

import re
import string
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from xmodel_steer.core.errors import PromptError

_SIGNS = f"[{re.escape(string.punctuation)}]"
_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"
# Kinds of characters in a content: replaced by a unique character; kept; kept in a word or tag that the template may
# look for.
_SHOWN, _LOOSE, _FIXED = 0, 1, 2
_PRIVATE, _MANY = 0xF0000, 0x20000  # two planes of private-use characters


def locate(
    contents: Sequence[str], text: str, source: str, render: Callable[[Sequence[str]], str]
) -> dict[int, list[tuple[int, int, int]]]:
    """Find each message's stretches: start, end, and start in the content.

    A plain search would also find a role tag or a default system prompt with the same words. Instead, each character
    of content is replaced by a unique one and the prompt is rendered again: this shows where every character goes,
    even if others are dropped. White space stays, because templates trim it. If other text changes, the template
    looks for something in the content, such as ``</think>``; then as few such strings as possible are kept. A message
    that cannot be followed with others is tried alone, and at last searched for where the text changes with it.

    Args:
        contents: The content of each message.
        text: The conversation as the template renders it.
        source: The template's program, where it is known.
        render: Renders the conversation with other contents; may raise `PromptError`.
    """
    stretches: dict[int, list[tuple[int, int, int]]] = {i: [] for i, c in enumerate(contents) if not c.strip()}
    alone: dict[int, str] = {}
    # No character may be replaced by itself.
    taken = {(ord(c) - _PRIVATE - n) % _MANY for n, c in enumerate("".join(contents)) if c >= chr(_PRIVATE)}
    shift = next(n for n in range(_MANY) if n not in taken)

    def follow(kept: Mapping[int, Sequence[str]]) -> dict[int, list[tuple[int, int, int]]]:
        kinds = {i: each for i, patterns in kept.items() if _SHOWN in (each := _kinds(contents[i], patterns))}
        try:
            shown = render(_replaced(contents, kinds, shift))
        except PromptError:  # the prompt with its real contents did render
            return {}
        if len(kinds) == 1:
            alone.setdefault(next(iter(kinds)), shown)
        places = _followed(text, shown, contents, shift)
        if places is None:
            return {}
        return {i: _runs(text, contents[i], _longest(places.get(i, [])), each) for i, each in kinds.items()}

    for together in (True, False):
        for patterns in _may_look_for(source, "\n".join(contents)):
            rest = [i for i in range(len(contents)) if i not in stretches]
            for group in [[i] for i in rest] if not together else [rest] if rest else []:
                kept = {i: [pattern for pattern in patterns if re.search(pattern, contents[i])] for i in group}
                runs = follow(kept)
                # Keep fewer patterns where a kept one may hide a part of the content.
                for i, pattern in [(number, pattern) for number in runs for pattern in kept[number]]:
                    if not _may_hide(pattern, text, contents[i], runs[i]):
                        continue
                    fewer = {**kept, i: [other for other in kept[i] if other != pattern]}
                    again = follow(fewer)
                    if again.keys() >= runs.keys():
                        runs, kept = again, fewer
                stretches.update(runs)
    for i in set(range(len(contents))) - stretches.keys():
        content = contents[i].strip()
        start, end = 0, len(text)
        if i in alone:
            start = _shared(text, alone[i])
            end = max(start, end - _shared(text[::-1], alone[i][::-1]))
        if text.count(content, start, end) == 1:
            start = text.index(content, start)
            end = start + len(content)
            if all(end <= first or last <= start for spans in stretches.values() for first, last, _ in spans):
                stretches[i] = [(start, end, contents[i].index(content))]
    return stretches


def _shared(one: str, other: str) -> int:
    """Count the characters of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _may_look_for(source: str, whole: str) -> list[list[str]]:
    """List candidate patterns of a template: none, its tags, all, each word."""
    quoted = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", source)
    words = {word for pair in quoted for word in re.split(r"\\.|\s+", "".join(pair)) if word and word in whole}
    patterns = sorted(re.escape(word) for word in words)
    tags = [word for word in patterns if re.search(r"\w", word) and re.search(r"[^\w\\]", word)]
    every = dict.fromkeys([_SIGNS, *patterns, *sorted(map(re.escape, re.findall(_TAG, whole)))])
    return [[], *([tags] if tags else []), list(every), *([word] for word in patterns)]


def _kinds(content: str, kept: Sequence[str]) -> bytearray:
    kinds = bytearray(_LOOSE if c.isspace() else _SHOWN for c in content)
    for pattern in kept:
        for match in re.finditer(pattern, content):
            kind = _FIXED if re.search(r"\w", match[0]) else _LOOSE
            for place in range(match.start(), match.end()):
                kinds[place] = max(kinds[place], kind)
    return kinds


def _replaced(contents: Sequence[str], kinds: Mapping[int, bytearray], shift: int) -> list[str]:
    """Replace shown characters by private-use ones in ascending order."""
    replaced = list(contents)
    firsts = list(accumulate(map(len, contents), initial=0))
    for i, each in kinds.items():
        replaced[i] = "".join(
            c if kind else chr(_PRIVATE + (firsts[i] + place + shift) % _MANY)
            for place, (c, kind) in enumerate(zip(contents[i], each, strict=True))
        )
    return replaced


def _followed(text: str, shown: str, contents: Sequence[str], shift: int) -> dict[int, list[tuple[int, int]]] | None:
    """Match characters of the text with each message's content; None if other text changed."""
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
        # In a very long conversation private-use characters repeat: this is the next one after the last.
        number += (code - shift - number) % _MANY
        number -= _MANY * (number >= total)
        if number < 0:
            return None
        message = bisect_right(firsts, number) - 1
        places.setdefault(message, []).append((at, number - firsts[message]))
    return places


def _longest(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Find the longest part that keeps the content's order.

    The last one of equal length: a template may write a content twice.
    """
    parts: list[list[tuple[int, int]]] = [[]]
    for at, place in places:
        if parts[-1] and place <= parts[-1][-1][1]:
            parts.append([])
        parts[-1].append((at, place))
    return max(reversed(parts), key=len)


def _runs(text: str, content: str, piece: Sequence[tuple[int, int]], kinds: bytearray) -> list[tuple[int, int, int]]:
    """Find the trimmed stretches in which text and content agree.

    There are none where the template changes letters, such as to capitals.
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
    stretches: list[tuple[int, int, int]] = []
    for start, end, place in runs:
        shift = start - place
        least = stretches[-1][1] if stretches else 0
        # Signs that were kept at the ends belong to the stretch where the text has them.
        while start > max(least, shift + first) and _continues(text, content, kinds, start - 1, shift):
            start -= 1
        while end < min(len(text), shift + last) and _continues(text, content, kinds, end, shift):
            end += 1
        stretch = text[start:end]
        start, end = start + len(stretch) - len(stretch.lstrip()), end - len(stretch) + len(stretch.rstrip())
        stretches.append((start, end, start - shift))
    return stretches


def _may_hide(pattern: str, text: str, content: str, runs: Sequence[tuple[int, int, int]]) -> bool:
    """Tell whether a kept pattern may hide content next to these stretches."""
    if not runs:
        return True
    for start, end, place in runs:
        before = text[:start].rstrip()[-1:], content[:place].rstrip()[-1:]
        after = text[end:].lstrip()[:1], content[place + end - start :].lstrip()[:1]
        if "" != before[0] == before[1] or "" != after[0] == after[1]:
            return True
    (start, _, first), (begin, end, last) = runs[0], runs[-1]
    return bool(re.search(pattern, text[max(0, start - first) : end + len(content) - (last + end - begin)]))


def _continues(text: str, content: str, kinds: bytearray, at: int, shift: int) -> bool:
    return kinds[at - shift] == _LOOSE and text[at] == content[at - shift]

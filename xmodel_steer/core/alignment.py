"""Pairs of token positions of two tokenizers, by the last character of each token.

After token t the residual stream of a causal model summarises the text up to t's last character.
Positions of two models are comparable when both have read the same text, so positions pair when
their tokens end on the same character. Pairs by index would compare different texts after the
first word that is split differently.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import AlignmentError, AlignmentWarning


@dataclass(frozen=True)
class TokenEnds:
    """End positions of the tokens of one encoded prompt.

    Args:
        ends: For each token, the position after its last character, in characters of the
            prompt's content; -1 for excluded tokens (special tokens, padding, text position 0);
            -2 - r for a chat template's token of role r (2i: the last one before the content of
            message i; 2i + 1: the first one after it).
    """

    ends: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """Paired positions of one text.

    Args:
        source: Token positions in the source model, ascending.
        target: The paired positions in the target model.
        eligible: Largest possible number of pairs: eligible tokens within the text that both models
            saw, of the model with fewer of them.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    eligible: int

    def __len__(self) -> int:
        return len(self.source)


def align(source: TokenEnds, target: TokenEnds) -> Alignment:
    """Pair tokens that end on the same character, and template tokens by role.

    Where several tokens of one model end on one character (the bytes of an emoji), only the last
    one has read the whole character, so it pairs.

    Args:
        source: Token ends in the source model.
        target: Token ends in the target model, in characters of the same content.

    Returns:
        The pairs, in text order.

    Example:
        >>> a = TokenEnds((-1, 3, 7, 12))       # BOS, "The", " cat", " sleeps"... cut at 12
        >>> b = TokenEnds((3, 5, 7, 14))        # "The", " c", "at", " sleeps."
        >>> pairs = align(a, b)
        >>> pairs.source, pairs.target, pairs.eligible
        ((1, 2), (0, 2), 3)
    """
    require_type("align", TokenEnds, source, target)
    at_source = {end: i for i, end in enumerate(source.ends) if end != -1}
    at_target = {end: i for i, end in enumerate(target.ends) if end != -1}
    common = sorted(at_source.keys() & at_target.keys(), key=at_source.__getitem__)
    contents = [[end for end in side if end >= 0] for side in (at_source, at_target)]
    possible = 0
    if all(contents):
        # Only text that both models have read can pair.
        first, last = max(map(min, contents)), min(map(max, contents))
        possible = min(sum(first <= end <= last for end in side) for side in contents)
    return Alignment(
        tuple(at_source[end] for end in common),
        tuple(at_target[end] for end in common),
        possible + sum(end < 0 for end in common),
    )


def align_texts(source: TokenEnds, target: TokenEnds, source_text: str, target_text: str) -> Alignment:
    """Pair tokens of two texts that begin and end alike.

    A clean prompt and a corrupted one are such texts. In the shared beginning and the shared end, tokens pair as in `align`;
    those between pair in order from the last. Of equal texts, the pairs are those of `align`.

    Args:
        source: Token ends in the source model, in characters of its text.
        target: Token ends in the target model, in characters of its text.
        source_text: The source's text.
        target_text: The target's text.

    Returns:
        The pairs, in text order.

    Example:
        >>> rome, new_york = TokenEnds((-1, 3, 8, 11)), TokenEnds((-1, 3, 7, 12, 15))  # "_In Rome is", "_In New York is"
        >>> pairs = align_texts(rome, new_york, "In Rome is", "In New York is")
        >>> pairs.source, pairs.target
        ((1, 2, 3), (1, 3, 4))
    """
    require_type("align_texts", TokenEnds, source, target)
    shared = min(len(source_text), len(target_text))
    start = next((k for k in range(shared) if source_text[k] != target_text[k]), shared)
    if len(source_text) != len(target_text):  # the last token pairs with the last, also where one text begins the other
        start = min(start, max(0, shared - 1))
    most = shared - start
    end = next((k for k in range(most) if source_text[-1 - k] != target_text[-1 - k]), most)

    def parts(ends: TokenEnds, text: str) -> tuple[TokenEnds, list[int]]:
        """Count ends in the last part from the text's end; list tokens between."""
        first, last = start, len(text) - end
        between = [i for i, e in enumerate(ends.ends) if first < e < last]
        both = len(source_text) + len(target_text)
        counted = [both + e - len(text) if e >= last and e > first else e for e in ends.ends]
        return TokenEnds(tuple(-1 if i in between else e for i, e in enumerate(counted))), between

    (at_source, left), (at_target, right) = parts(source, source_text), parts(target, target_text)
    outer, count = align(at_source, at_target), min(len(left), len(right))
    middle = zip(left[len(left) - count :], right[len(right) - count :], strict=True)
    pairs = sorted([*zip(outer.source, outer.target, strict=True), *middle])
    return Alignment(tuple(s for s, _ in pairs), tuple(t for _, t in pairs), outer.eligible + count)


def coverage(alignments: Sequence[Alignment]) -> float:
    """Compute the share of pairable tokens that pair, over several texts."""
    eligible = sum(a.eligible for a in alignments)
    return sum(len(a) for a in alignments) / eligible if eligible else 0.0


def check_coverage(paired: int, eligible: int, *, warn_below: float = 0.8, refuse_below: float = 0.2) -> float:
    """Return the coverage; warn when it is low, refuse when it is very low.

    Args:
        paired: Number of pairs.
        eligible: Largest possible number of pairs.
        warn_below: Coverage under which an `AlignmentWarning` is given.
        refuse_below: Coverage under which an `AlignmentError` is raised.

    Raises:
        AlignmentError: Fewer than ``refuse_below`` of the tokens pair, or no token can.
    """
    check = (
        "check that both tokenizers belong to their models and that both return character offsets, "
        "that the text is natural language in a script that both know, and that it is longer than a few tokens"
    )
    if eligible == 0:
        raise AlignmentError(
            f"alignment: the text has no token that could be paired (special tokens and text position 0 do not count); {check}"
        )
    share = paired / eligible
    if share < refuse_below:
        raise AlignmentError(
            f"alignment: only {share:.0%} of the tokens pair ({paired} of {eligible}), {refuse_below:.0%} is the least; {check}"
        )
    if share < warn_below:
        warnings.warn(
            f"alignment: {share:.0%} of the tokens pair ({paired} of {eligible}); {check}",
            AlignmentWarning,
            stacklevel=2,
        )
    return share

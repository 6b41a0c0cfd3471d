"""Pairs of token positions of two tokenizers, by the character that the tokens end on.

After token t the residual stream of a causal model summarises the text up to t's last
character. Two models' positions are comparable when they have read the same text, so positions
pair when their tokens end on the same character. Pairing by index compares different texts as
soon as one word is split differently.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from xmodel_steer.errors import AlignmentError, AlignmentWarning


@dataclass(frozen=True)
class TokenEnds:
    """Where the tokens of one encoded prompt end.

    Args:
        ends: For each token, the position after its last character, in characters of the
            prompt's content; -1 for tokens that are left out (special tokens, chat template,
            padding, text position 0).
    """

    ends: tuple[int, ...]

    @property
    def eligible(self) -> int:
        """Number of tokens that may be paired."""
        return sum(end >= 0 for end in self.ends)


@dataclass(frozen=True)
class Alignment:
    """Paired positions of one text.

    Args:
        source: Token positions in the source model, ascending.
        target: The positions in the target model that they pair with.
        eligible: How many pairs there could be at most: eligible tokens of the model that has
            fewer of them, within the text that both models saw.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    eligible: int

    def __len__(self) -> int:
        return len(self.source)


def align(source: TokenEnds, target: TokenEnds) -> Alignment:
    """Pair the tokens that end on the same character.

    Where several tokens of one model end on one character (the bytes of an emoji), the last
    of them has read all of it, and takes the pair.

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
    at_source = {end: i for i, end in enumerate(source.ends) if end >= 0}
    at_target = {end: i for i, end in enumerate(target.ends) if end >= 0}
    common = sorted(at_source.keys() & at_target.keys())
    if not at_source or not at_target:
        return Alignment((), (), 0)
    seen = min(max(at_source), max(at_target))  # beyond it one model has read nothing
    fewer = min(sum(end <= seen for end in at_source), sum(end <= seen for end in at_target))
    return Alignment(
        tuple(at_source[end] for end in common),
        tuple(at_target[end] for end in common),
        max(fewer, len(common)),
    )


def coverage(alignments: Sequence[Alignment]) -> float:
    """Share of the tokens that could pair that do, over several texts."""
    eligible = sum(a.eligible for a in alignments)
    return sum(len(a) for a in alignments) / eligible if eligible else 0.0


def check_coverage(paired: int, eligible: int, *, warn_below: float = 0.8, refuse_below: float = 0.2) -> float:
    """The coverage; warns when it is low, refuses when it is hopeless.

    Args:
        paired: Number of pairs.
        eligible: Number of pairs that were possible.
        warn_below: Coverage under which an `AlignmentWarning` is given.
        refuse_below: Coverage under which an `AlignmentError` is raised.

    Raises:
        AlignmentError: Fewer than ``refuse_below`` of the tokens pair, or there are none.
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

"""Overlap of two texts."""

import re


def rouge_l(text: str, other: str) -> float:
    """Compute ROUGE-L: F1 of the longest common subsequence of words (Lin 2004).

    Two texts without words score 1.

    Example:
        >>> rouge_l("The cat sat.", "the cat slept")
        0.6666666666666666
    """
    from rapidfuzz.distance import LCSseq

    a, b = (re.findall(r"\w+", t.lower()) for t in (text, other))
    if not a or not b:
        return float(a == b)
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))

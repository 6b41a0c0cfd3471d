"""How much of one text another shares."""

import re


def rouge_l(text: str, other: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004); 1 for two texts without words.

    Example:
        >>> rouge_l("The cat sat.", "the cat slept")
        0.6666666666666666
    """
    from rapidfuzz.distance import LCSseq

    a, b = (re.findall(r"\w+", t.lower()) for t in (text, other))
    if not a or not b:
        return float(a == b)
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b))

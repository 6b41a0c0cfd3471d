"""Pairs of token positions, against a brute-force reading of the rule."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmodel_steer.core.alignment import TokenEnds, align, align_texts, check_coverage, coverage
from xmodel_steer.core.errors import AlignmentError, AlignmentWarning

ADVICE = "check that both tokenizers belong to their models"


@st.composite
def tokenisations(draw, length):
    """Random cuts of a text, some tokens sharing an end (bytes of one character), some left out."""
    tokens = []
    for end in range(1, length + 1):
        tokens += [end] * draw(st.sampled_from([0, 0, 1, 1, 1, 3]))
        tokens += [-1] * draw(st.sampled_from([0, 0, 0, 1]))
    return tuple(tokens)


TWO = st.integers(0, 20).flatmap(lambda n: st.tuples(tokenisations(n), tokenisations(n)))


def brute_force(source, target):
    """Pairs by comparing every token of one model with every token of the other."""

    def last(ends, i):
        return ends[i] >= 0 and ends[i] not in ends[i + 1 :]

    return [
        (i, j)
        for i in range(len(source))
        for j in range(len(target))
        if last(source, i) and last(target, j) and source[i] == target[j]
    ]


@given(TWO)
def test_tokens_pair_by_the_character_that_they_end_on(two):
    made = align(*map(TokenEnds, two))
    assert list(zip(made.source, made.target, strict=True)) == brute_force(*two)


@given(TWO)
def test_as_many_pairs_are_possible_as_the_shorter_side_has_ends_in_the_text_both_saw(two):
    ends = [{end for end in side if end > 0} for side in two]
    expected = 0
    if all(ends):
        first, last = max(map(min, ends)), min(map(max, ends))  # one may have been cut at either side
        expected = min(len([end for end in side if first <= end <= last]) for side in ends)
    assert align(*map(TokenEnds, two)).eligible == expected


def test_template_tokens_pair_by_role_and_count_as_possible_where_both_have_them():
    # <start of user> Hi <end> \n <start of assistant>, with templates of different length
    small = TokenEnds((-1, -1, -2, 1, 2, -3, -1, -1, -4))
    large = TokenEnds((-1, -2, 2, -3, -4))
    made = align(small, large)
    assert list(zip(made.source, made.target, strict=True)) == [(2, 1), (4, 2), (5, 3), (8, 4)]
    assert made.eligible == 4
    assert align(small, TokenEnds((-1, 1, 2))).source == (3, 4)


@given(TWO)
def test_alignment_has_no_direction_and_a_text_pairs_wholly_with_itself(two):
    a, b = map(TokenEnds, two)
    there, back = align(a, b), align(b, a)
    assert (there.source, there.target, there.eligible) == (back.target, back.source, back.eligible)
    own = align(a, a)
    assert own.source == own.target
    assert len(own) == own.eligible == len(set(two[0]) - {-1})


def test_the_last_of_the_tokens_of_one_character_takes_the_pair():
    made = align(TokenEnds((-1, 1, 2, 2, 2, 3)), TokenEnds((1, 2, 3)))
    assert (made.source, made.target) == ((1, 4, 5), (0, 1, 2))


def test_text_that_one_model_has_not_read_does_not_count_as_missed():
    made = align(TokenEnds((1, 2, 3)), TokenEnds(tuple(range(1, 50))))
    assert len(made) == made.eligible == 3


def test_coverage_is_a_share_of_all_tokens_and_not_a_mean_of_shares():
    half = align(TokenEnds((1, 2)), TokenEnds((2, 3, 4)))
    assert (len(half), half.eligible) == (1, 1)
    poor = align(TokenEnds((1, 3, 5, 7)), TokenEnds((2, 4, 6, 7)))
    assert (len(poor), poor.eligible) == (1, 3)
    assert coverage([half, poor]) == 2 / 4
    assert coverage([]) == coverage([align(TokenEnds(()), TokenEnds((1,)))]) == 0.0


@pytest.mark.parametrize("paired", [80, 100])
def test_good_coverage_passes_in_silence(paired, recwarn):
    assert check_coverage(paired, 100) == paired / 100
    assert not recwarn


@pytest.mark.parametrize("paired", [20, 79])
def test_low_coverage_warns(paired):
    with pytest.warns(AlignmentWarning, match=rf"{paired}% of the tokens pair \({paired} of 100\); {ADVICE}"):
        assert check_coverage(paired, 100) == paired / 100


@pytest.mark.parametrize(
    "paired, eligible, message",
    [
        (19, 100, rf"only 19% of the tokens pair \(19 of 100\), 20% is the least; {ADVICE}"),
        (0, 5, r"only 0% of the tokens pair \(0 of 5\)"),
        (0, 0, rf"the text has no token that could be paired .*position 0.*; {ADVICE}"),
    ],
)
def test_hopeless_coverage_is_refused(paired, eligible, message):
    with pytest.raises(AlignmentError, match=message):
        check_coverage(paired, eligible)


def test_the_limits_are_the_callers():
    assert check_coverage(1, 10, warn_below=0.05, refuse_below=0.01) == 0.1
    with pytest.raises(AlignmentError, match="95% is the least"):
        check_coverage(9, 10, refuse_below=0.95)


WORDS = [st.lists(st.sampled_from(some), min_size=1, max_size=6) for some in (["a", "bc"], ["d", "ef"], ["g", "hi"])]


def ends_of(words: list[str]) -> TokenEnds:
    """Each word with the space after it is a token."""
    return TokenEnds(tuple(itertools.accumulate(len(word) + 1 for word in words)))


@given(WORDS[0], WORDS[1], WORDS[1], WORDS[2])
def test_texts_that_begin_and_end_alike_pair_from_both_ends(start, one, two, end) -> None:
    (a, left), (b, right) = (
        (ends_of([*start, *middle, *end]), "".join(f"{word} " for word in [*start, *middle, *end]))
        for middle in (one, two)
    )
    made = align_texts(a, b, left, right)
    pairs = list(zip(made.source, made.target, strict=True))
    assert all(p < q and r < s for (p, r), (q, s) in itertools.pairwise(pairs))
    assert {(k, k) for k in range(len(start))} <= set(pairs)
    assert {(len(a.ends) - k, len(b.ends) - k) for k in range(1, len(end) + 1)} <= set(pairs)
    assert made.eligible >= len(made)
    cut = align_texts(ends_of(start), b, left[: ends_of(start).ends[-1]], right)  # one text begins the other
    assert (cut.source[-1], cut.target[-1]) == (len(start) - 1, len(b.ends) - 1)
    assert align_texts(a, a, left, left) == align(a, a)

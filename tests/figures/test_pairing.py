"""The pairing of a text, for eyes."""

import re

import pytest
import torch
import toys

import xmodel_steer as xs
from xmodel_steer.core.alignment import align
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.figures.pairing import AlignmentView, ProjectionView, show_alignment
from xmodel_steer.models.batching import encode
from xmodel_steer.notebook.html import bars_html, code_html, text_html

TEXT = "The sky <b>above</b> été 🙂\n the port"


def test_it_shows_the_pairs_that_align_makes(llama: toys.Toy, gemma: toys.Toy) -> None:
    made = show_alignment(TEXT, llama.model, gemma.model)
    one, two = (encode(toy.model, [Prompt(text=TEXT)])[0] for toy in (llama, gemma))
    pairs = align(one.token_ends(), two.token_ends())
    assert made.pairs == tuple(zip(pairs.source, pairs.target, strict=True)) and len(made.pairs) > 5
    assert [len(side) for side in made.tokens] == [len(one.ids), len(two.ids)]
    header, *lines = str(made).splitlines()
    assert header == f"{len(pairs)} of {pairs.eligible} pair"
    for line, (i, j) in zip(lines, made.pairs, strict=True):
        assert line.endswith(f"  {made.tokens[1][j]!r}") and line.lstrip().startswith(f"{made.tokens[0][i]!r}  ")


def test_the_tokens_put_together_are_the_text(llama: toys.Toy, gemma: toys.Toy) -> None:
    made = show_alignment(toys.CORPUS[0], llama.model, gemma.model)
    assert "".join(made.tokens[0]) == toys.CORPUS[0]
    assert "".join(made.tokens[1]) == "<bos> " + toys.CORPUS[0]  # this tokenizer begins every text with a space


def test_the_page_numbers_each_pair_in_both_rows_and_escapes_the_text(llama: toys.Toy, gemma: toys.Toy) -> None:
    made = show_alignment(TEXT, llama.model, gemma.model)
    page = made._repr_html_()
    assert "<b>above" not in page and "&lt;" in page
    for k, (i, j) in enumerate(made.pairs, 1):
        titles = re.findall(rf'title="position (\d+), pair {k}"', page)
        assert titles == [str(i), str(j)]
    lonely = sum(map(len, made.tokens)) - 2 * len(made.pairs)
    assert page.count('pairs with nothing"') == lonely > 0
    assert "⏎" in page


def test_names_are_no_markup() -> None:
    name = '<img src=x onerror="alert(1)">\x1b[2J\u202e'
    one = AlignmentView((name, name), ((name,), (name, "")), ((0, 0),), 1)
    two = ProjectionView(name, (name, name), (0.0, 1.0))
    for view in (one, two):
        page = view._repr_html_()
        assert "<img" not in page and "&lt;img" in page and "\x1b" not in page + str(view)
        assert "\u202e" not in page
    parts = [
        text_html(name, "red", name, name),
        bars_html([(name, (0.5, 0.5))], [("one", "red"), ("two", "red")]),
        code_html(name),
    ]
    assert all("<img" not in part and "&lt;img" in part for part in parts)


def test_conversations_pair_by_role(llama: toys.Toy, toy_named) -> None:
    chat = [{"role": "user", "content": "Call me"}]
    qwen = toy_named("qwen")
    whole, content = (show_alignment(chat, llama.model, qwen.model, template=t) for t in (True, False))
    assert len(whole.pairs) == len(content.pairs) + 3
    with pytest.raises(PromptError, match="has none \\(a base model"):
        show_alignment(chat, llama.model, toy_named("gemma").model)


def test_the_projection_is_0_and_1_at_the_class_means(llama):
    """At a text's own rows: coefficient of the vector between two of them."""
    site = xs.Site(1)
    rows = xs.capture(llama.model, ["the old harbour is red"], [site], tokens="all")[site]
    low, high = (xs.Activations(rows.values[[i]], rows.space) for i in (2, 5))
    vector = xs.difference_of_means(high, low, label="red", scale=rows.values.std(0))
    view = xs.plots.show_projection("the old harbour is red", llama.model, vector)
    first = len(view.tokens) - len(rows)
    assert view.values[first + 2] == pytest.approx(0, abs=1e-4)
    assert view.values[first + 5] == pytest.approx(1, abs=1e-4)
    assert "".join(view.tokens[-3:]) in "the old harbour is red"
    page = view._repr_html_()
    assert page.count("<span") == len(view.tokens)
    assert "red</b>" in page
    assert len(str(view).splitlines()) == len(view.tokens)
    with pytest.raises(ValueError, match="standardised coordinates need"):
        xs.plots.show_projection("the", llama.model, xs.SteeringVector(vector.direction, vector.space))


def test_a_vector_of_another_model_has_no_projection(llama, gemma):
    vector = xs.SteeringVector(torch.ones(gemma.model.cfg.d_model), xs.space_of(gemma.model, xs.Site(1)))
    with pytest.raises(xs.errors.SpaceMismatchError):
        xs.plots.show_projection("the", llama.model, vector)

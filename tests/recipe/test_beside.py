"""What is measured beside the vector of general text: a map that read the contrast prompts, and words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from toys import contrast, sentences

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.behaviours.generated import instructed
from xmodel_steer.evaluation.damage import instructed_effect, losses
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.recipe.arms import EQUAL_KL, OWN_KL
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import GeneralText, Method

METHOD = Method(read_contrast=True, instructions=("Say good things.", "Say bad things."))
READ = "toy, contrast read"


def run(models: list[Any], method: Method = METHOD, **more: Any) -> Result:
    settings: dict[str, Any] = dict(
        label="toy", source_sites=[1, [0, 2]], target_sites=[1], budget=xs.Budget((-1.0, 1.0), neutral_tokens=8, random_seeds=3),
        behaviour=xs.behaviours.GeneratedText(sentences(18, 3, 4), lambda text: text.count("e") / 9, max_new_tokens=4), side={},
    )  # fmt: skip
    return xs.transfer(*models, contrast(), sentences(60, 4), **settings | {"method": method} | more)


@pytest.fixture(scope="module")
def models(toy_named: Callable[[str], toys.Toy]) -> list[Any]:
    return [toy_named(name).model for name in ("llama", "gemma")]


@pytest.fixture(scope="module")
def result(models: list[Any]) -> Result:
    return run(models)


def test_the_general_map_is_what_it_is_without_them(result: Result, models: list[Any]) -> None:
    plain = run(models, Method())
    for mine, own in zip(
        (a for a in result.arms if a.recipe in ("", "toy") and a.at != OWN_KL), plain.arms, strict=True
    ):
        assert (mine.arm, mine.at, mine.strength, mine.scores, mine.kl) == (
            own.arm,
            own.at,
            own.strength,
            own.scores,
            own.kl,
        )
    assert result.choice("toy") == plain.choice()
    assert result.verdict("toy") == plain.verdict()


def test_the_contrast_read_is_a_recipe_of_its_own(result: Result, tmp_path: Path) -> None:
    assert result.recipes == ("toy", READ) == tuple(result.verdicts)
    for name in ("native", "random"):  # measured once, the same vectors
        for sign in result.signs:
            mine, other = (result.at_equal_kl(name, sign, recipe) for recipe in result.recipes)
            assert (mine.scores, mine.table, mine.strength, mine.kl) == (
                other.scores,
                other.table,
                other.strength,
                other.kl,
            )
    general, read = (result.choice(recipe)["map"] for recipe in result.recipes)
    assert read["train_tokens"] > general["train_tokens"] and read["documents"] > general["documents"]
    for name in ("mapped", "shuffled"):
        one, two = (result.vectors[f"{recipe}: {name}"].direction for recipe in result.recipes)
        assert not np.allclose(one, two)
    again = xs.read(xs.save(result, tmp_path / "run"))
    assert dict(again.verdicts) == dict(result.verdicts) and again.maps[READ].source == result.maps["toy"].source
    page = xs.plots.write_report(again, tmp_path / "report.html").read_text()
    assert READ in page and "+ in words" in page and "Say bad things." in page


def test_a_map_of_moments_alone_has_no_text_to_mix(models: list[Any]) -> None:
    moments = xs.collect_moments(*models, sentences(60, 4), source_sites=[1], target_sites=[1], max_tokens=24)
    text = GeneralText((), GeneralText.of(sentences(60, 5)).neutral, moments)
    with pytest.raises(PromptError, match="read_contrast mixes the contrast prompts with general text"):
        xs.transfer(
            *models, contrast(), text, label="toy", source_sites=[1], target_sites=[1], method=METHOD, side={},
            budget=xs.Budget((1.0,), neutral_tokens=8, random_seeds=2),
            behaviour=xs.behaviours.GeneratedText(sentences(9, 3, 4), len, max_new_tokens=2),
        )  # fmt: skip


def test_words_are_an_arm_at_their_own_kl(result: Result, models: list[Any]) -> None:
    up, down = (a for a in result.arms if a.arm == "prompted")
    assert [a.operator for a in (up, down)] == list(METHOD.instructions) and {up.at, down.at} == {OWN_KL}
    assert up == result.at_equal_kl("prompted", "+", "toy") and down.sign == "-"
    assert result.gain("prompted", "toy")[:, 0] == pytest.approx((np.array(up.scores) - np.array(down.scores)) / 2)
    prompts = [Prompt(text=f"Say good things.\n{p}") for p in result.prompts[: len(up.texts)]]
    assert xs.generate(models[1], prompts, max_new_tokens=4) == list(up.texts)[: len(prompts)]
    assert up.kl > 0 and up.kl != result.at_equal_kl("mapped", "+", "toy").kl and up.at != EQUAL_KL
    assert not [a for a in run(models, Method(instructions=("", "No."))).arms if a.arm == "prompted" and a.sign == "+"]


def test_the_damage_of_words_is_told_on_the_texts_own_tokens(models: list[Any]) -> None:
    texts = sentences(5, 8)
    effect = instructed_effect(models[1], "Say good things.", texts, max_tokens=12)
    plain, tokens = losses(models[1], [[]], texts, max_tokens=12)
    assert (effect.tokens == tokens).all() and (effect.kl > 0).all()
    assert not np.allclose(effect.loss, plain[0])
    # What precedes a text changes nothing where it is nothing, and the losses add up to those of the whole text.
    model, tokenizer = models[1], tokenizer_of(models[1])
    for text, loss in zip(texts, effect.loss, strict=True):
        words = tokenizer("Say good things.\n", add_special_tokens=False)["input_ids"]
        ids = tokenizer(text)["input_ids"][:12]
        start = int(ids[0] in tokenizer.all_special_ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*ids[:start], *words, *ids[start:]]]), return_type="logits")[0].log_softmax(
                -1
            )
        own = -sum(float(logits[len(words) + i - 1, ids[i]]) for i in range(1, len(ids)))
        assert loss == pytest.approx(own, rel=1e-4)


def test_an_instruction_precedes_what_the_user_says() -> None:
    assert instructed(Prompt(text="One", id="a"), "Do.") == Prompt(text="Do.\nOne", id="a")
    chat = Prompt.of(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    )
    assert [m.content for m in instructed(chat, "Do.").messages] == ["S", "Do.\nU", "A"]
    assert instructed(chat, "") is chat
    with pytest.raises(NotImplementedError, match="takes no instruction"):
        xs.behaviours.Preference(contrast()).instructed("Do.")

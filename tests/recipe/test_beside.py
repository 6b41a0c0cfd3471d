"""What is measured beside the vector of general text: a map that read the contrast prompts, and words."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from toys import contrast, sentences

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Stack
from xmodel_steer.evaluation.behaviours.generated import instructed
from xmodel_steer.evaluation.damage import instructed_effect, losses
from xmodel_steer.maps.significance import above_others
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.recipe.arms import EQUAL_KL, OWN_KL
from xmodel_steer.recipe.planning import settings_of
from xmodel_steer.recipe.preparing import prepare
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.settings import RECIPES, GeneralText, Method

METHOD = Method(recipes=RECIPES, instructions=("Say good things.", "Say bad things."))
ONE, READ = "toy, one layer", "toy, contrast read"


def settings(method: Method) -> dict[str, Any]:
    return dict(
        label="toy", source_sites=[1, [0, 2]], target_sites=[1], budget=xs.Budget((-1.0, 1.0), neutral_tokens=8, random_seeds=3),
        behaviour=xs.behaviours.GeneratedText(sentences(18, 3, 4), lambda text: text.count("e") / 9, max_new_tokens=4),
        method=method,
    )  # fmt: skip


def run(models: list[Any], method: Method = METHOD, **more: Any) -> Result:
    return xs.transfer(*models, contrast(), sentences(60, 4), **settings(method) | {"side": {}} | more)


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
    assert result.recipes == ("toy", ONE, READ) == tuple(result.verdicts)
    for name in ("native", "random"):  # measured once, the same vectors
        for sign in result.signs:
            mine, *others = (result.at_equal_kl(name, sign, recipe) for recipe in result.recipes)
            for other in others:
                assert (mine.scores, mine.table, mine.strength, mine.kl) == (
                    other.scores,
                    other.table,
                    other.strength,
                    other.kl,
                )
    general, read = (result.choice(recipe)["map"] for recipe in ("toy", READ))
    assert read["train_tokens"] > general["train_tokens"] and read["documents"] > general["documents"]
    for name in ("mapped", "shuffled"):
        one, two = (result.vectors[f"{recipe}: {name}"].direction for recipe in ("toy", READ))
        assert not np.allclose(one, two)
    again = xs.read(xs.save(result, tmp_path / "run"))
    assert dict(again.verdicts) == dict(result.verdicts) and again.maps[READ].source == result.maps["toy"].source
    page = xs.plots.write_report(again, tmp_path / "report.html").read_text()
    assert READ in page and "+ in words" in page and "Say bad things." in page


def test_one_layer_is_what_a_transfer_of_single_layers_chooses(result: Result, models: list[Any]) -> None:
    single = run(models, Method(), source_sites=[1])
    assert isinstance(result.maps["toy"].source.site, Stack) and result.choice(ONE)["source_layer"] == 1
    for sign in result.signs:
        for name in ("mapped", "shuffled"):
            mine, own = result.at_equal_kl(name, sign, ONE), single.at_equal_kl(name, sign)
            assert mine.scores == own.scores and mine.kl == pytest.approx(own.kl, rel=1e-6)
    # Of two single layers it is the one that is chosen of these two, and there is none where one was chosen anyway.
    two = run(models, Method(recipes=["one layer"]), source_sites=[1, 2, [0, 2]])
    assert two.recipes == ("toy", ONE)
    assert two.choice(ONE)["source_layer"] == run(models, Method(), source_sites=[1, 2]).choice()["source_layer"]
    assert run(models, Method(recipes=["one layer"]), source_sites=[0, 1]).recipes == ("toy",)
    assert run(models, Method(recipes=["one layer"]), source_sites=[[0, 2]]).recipes == ("toy",)
    with pytest.raises(ValueError, match="recipes are 'one layer' and 'contrast read', got .'two layers'"):
        Method(recipes=["two layers"])


def test_every_recipe_pays_for_the_choice_of_its_site(result: Result) -> None:
    for recipe in result.recipes:
        over = next(c for c in result.verdict(recipe).comparisons if c.over == "vectors")
        gain, others = float(result.gain("mapped", recipe).mean()), result.gain("random", recipe).mean(0)
        assert over.p == above_others(gain, others, choices=2)[1]


def test_the_plan_counts_what_further_recipes_and_words_take(result: Result, models: list[Any]) -> None:
    """The native vector at the headline strength counts once, and the random vectors are those of the first recipe."""
    counts = settings_of(prepare(*models, contrast(), sentences(60, 4), **settings(METHOD)))
    own = [arm for arm in result.arms if arm.recipe in ("", "toy") or arm.arm in ("mapped", "shuffled")]
    assert {arm.recipe for arm in own} == {"", "toy", ONE, READ}
    assert counts["measure"] == sum(arm.seeds for arm in own) - len(result.signs)
    assert counts["side"] == 1 + sum(arm.seeds for arm in own if arm.at == EQUAL_KL)


def test_rescored_recipes_stay_recipes_of_one_transfer(result: Result) -> None:
    again = result.rescored(lambda text: text.count("e") / 9, label="again")
    assert again.recipes == tuple(recipe.replace("toy", "again") for recipe in result.recipes)
    for mine, own in zip(again.verdicts.values(), result.verdicts.values(), strict=True):
        assert mine.comparisons == own.comparisons and mine.efficiency == own.efficiency


def test_words_that_cannot_be_given_are_refused_before_any_model_runs() -> None:
    nobody = [[{"role": "assistant", "content": text}] for text in sentences(9, 3, 4)]
    for behaviour in (xs.behaviours.Preference, xs.behaviours.GeneratedText(nobody, len)):
        with pytest.raises(PromptError, match=r"takes no instruction|needs a message of the user"):
            run([SimpleNamespace(cfg=SimpleNamespace(n_layers=3))] * 2, behaviour=behaviour)


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
    with pytest.raises(PromptError, match="takes no instruction"):
        xs.behaviours.Preference(contrast()).instructed("Do.")
    with pytest.raises(PromptError, match="needs a message of the user"):
        instructed(Prompt.of([{"role": "assistant", "content": "A"}]), "Do.")

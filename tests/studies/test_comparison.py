"""Maps put to work side by side, on toys."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from sample_results import same

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Stack
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice
from xmodel_steer.figures import choices, overviews, report
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies import Settings, map_comparison
from xmodel_steer.studies.comparison import ONE
from xmodel_steer.studies.concepts import Concept
from xmodel_steer.studies.map_tasks import CAPABILITY, REPLACED, STEERING

FITTERS = {
    "autoencoder": xs.Autoencoder(epochs=3, learning_rate=1e-2),
    "ridge": xs.Ridge(),
    "shuffled": xs.maps.ShuffledPairs(xs.Ridge()),
}


def _vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / max(len(text), 1)


def _alike(a: Any, b: Any) -> np.ndarray:
    return np.array([float(x == y) for x, y in zip(a, b, strict=True)])


@pytest.fixture(scope="module")
def study(toy_named: Any) -> Result:
    texts = [Prompt(text=t) for t in toys.sentences(100, 4)]
    prompts = tuple(Prompt(text=t) for t in toys.sentences(12, 3, 5))
    own = Concept("vowels", toys.contrast(), "share of vowels", _vowels, prompts=prompts)
    questions = MultipleChoice(as_prompts(["the sky is", "the sea is"]), ((" blue", " red"), (" deep", " red")), (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xmodel_steer.evaluation.judges.sentences.similarity", _alike)
        return map_comparison(
            toy_named("llama").model,
            toy_named("gemma").model,
            behaviour=own,
            compared=FITTERS,
            target_sites=[xs.Site(1), xs.Site(2)],
            prompts_replaced=3,
            capability=questions,
            max_new_tokens=4,
            settings=Settings(texts[:80], texts[80:], random_seeds=2, neutral_tokens=8),
        )


def test_every_map_is_put_to_every_work_beside_its_controls(study: Result) -> None:
    found = {(arm.arm, arm.recipe) for arm in study.arms}
    assert {(name, recipe) for name in FITTERS for recipe in (STEERING, REPLACED, CAPABILITY)} <= found
    assert {("native", STEERING), ("random", STEERING), ("unsteered", STEERING), ("unsteered", CAPABILITY)} <= found
    assert {(arm, recipe) for arm in ("mean ablation", "noise") for recipe in (REPLACED, CAPABILITY)} <= found
    from_stack = isinstance(study.maps["ridge"].source.site, Stack)  # then ridge from one layer is compared too
    assert from_stack == (ONE in study.chosen) == (ONE in {arm for arm, _ in found}) == (len(study.maps) == 4)
    n = {arm.recipe: arm.effect.n for arm in study.arms}
    assert n == {STEERING: 8, REPLACED: 3, CAPABILITY: 2}  # a third of twelve prompts chooses
    arms = {arm.arm: arm for arm in study.arms if arm.recipe == STEERING}
    kl = arms["native"].kl
    assert all(
        arm.kl == pytest.approx(kl, rel=0.5) for name, arm in arms.items() if name != "unsteered" and arm.reached
    )
    assert study.arms[0].kl == 0


def test_layers_were_chosen_on_prompts_that_are_not_reported_on(study: Result) -> None:
    assert not set(study.splits["validation"]) & set(study.splits["evaluation"])
    for end in ("target layer", "source layer"):
        own = [record for record in study.validation if record["varied"] == end]
        best = max(own, key=lambda record: record["score"])["layer"]
        assert all(chosen[end.replace(" ", "_")] == best for chosen in study.chosen.values())


def test_its_record_has_the_losses_and_its_page_every_map(study: Result, tmp_path: Path) -> None:
    page = report.write_report(study, tmp_path / "report.html").read_text()
    assert len(report.tables(study)) == len({arm.recipe for arm in study.arms})
    assert all(len(trace.x) for trace in choices.effect_by_layer(study).data)
    assert same(xs.read(xs.save(study, tmp_path / "run")), study)
    assert all(name in page for name in FITTERS)
    assert [line.split(": steering ")[0] for line in study.conclusions] == list(FITTERS)
    assert set(study.chosen["ridge"]["loss"]) == {"train", "validation", "test"}
    assert study.chosen["autoencoder"]["epochs"] == 3
    drawn = overviews.overview(study)
    assert [list(trace.y) for trace in drawn.data] == [
        [arm.arm for arm in study.arms if arm.recipe == recipe] for recipe in (STEERING, REPLACED, CAPABILITY)
    ]


def test_a_concept_that_nothing_reads_is_refused(toy_named: Any) -> None:
    silent = Concept("silent", toys.contrast(), "log-odds")
    with pytest.raises(PromptError, match="silent needs a scorer and at least 6 prompts"):
        map_comparison(toy_named("llama").model, toy_named("gemma").model, behaviour=silent)

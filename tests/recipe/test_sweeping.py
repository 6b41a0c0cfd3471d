"""A sweep's arms are what `steering`, `generate` and `side_effects` give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

import xmodel_steer as xs
from xmodel_steer.core.errors import SpaceMismatchError
from xmodel_steer.figures.report import write_report

PROMPTS = ["the old sky is", "the red sky was", "the harbour is"]
NEUTRAL = toys.sentences(6, 3)
LETTERS = xs.scorers.Matches("a")


def swept(toy: toys.Toy, vectors: Any, **options: Any) -> xs.Result:
    return xs.sweep(toy.model, vectors, [-2, 1.5], PROMPTS, LETTERS, neutral=NEUTRAL, max_new_tokens=5, **options)


def test_every_arm_is_what_the_librarys_calls_give(llama: toys.Toy) -> None:
    vectors = {"joy": llama.vector(1), "calm": llama.vector(2, seed=5)}
    result = swept(llama, vectors, batch_size=3)
    assert [(arm.arm, arm.strength, arm.seeds) for arm in result.arms] == [
        ("unsteered", 0.0, 1),
        *((name, strength, 1) for name in vectors for strength in (-2.0, 1.5)),
        *(("random", strength, 3) for strength in (-2.0, 1.5)),
    ]
    for name, vector in vectors.items():
        for strength in (-2.0, 1.5):
            arm = result.arm(name, strength)
            step = xs.Intervention(vector, xs.Add(strength))
            with xs.steering(llama.model, [step]):
                texts = xs.generate(llama.model, PROMPTS, max_new_tokens=5)
            (cost,) = xs.evaluation.side_effects(llama.model, [[step]], NEUTRAL)
            assert list(arm.texts) == texts and arm.effect.value == np.mean([LETTERS(text) for text in texts])
            assert arm.kl == pytest.approx(cost.mean_kl, rel=1e-4) and arm.perplexity == pytest.approx(
                cost.perplexity, rel=1e-4
            )
    frame = result.to_frame()
    assert set(frame["arm"]) == {"unsteered", "joy", "calm", "random"} and len(frame) == 7


def test_the_random_vectors_have_the_first_ones_norm(llama: toys.Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    from xmodel_steer.recipe import sweeping

    drawn: list[Any] = []
    real = sweeping.random_like
    monkeypatch.setattr(sweeping, "random_like", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    swept(llama, llama.vector(1), random_seeds=2)
    assert [vector.label for vector in drawn] == ["random 0", "random 1"]
    assert [vector.norm() for vector in drawn] == pytest.approx([llama.vector(1).norm()] * 2)


def test_it_is_saved_drawn_and_reported(llama: toys.Toy, tmp_path: Path) -> None:
    result = swept(llama, llama.vector(1))
    again = xs.read(xs.save(result, tmp_path / "run"))
    assert again.arms[1].scores == result.arms[1].scores and list(again.vectors) == ["random 0"]
    figure = xs.plots.dose_response(result)
    assert {trace.name for trace in figure.data} == {"random 0", "random"}
    page = write_report(result, tmp_path / "report.html").read_text()
    assert "is to be reported on others" in page and "score: score" not in page


def test_what_cannot_be_swept_is_refused(llama: toys.Toy, gemma: toys.Toy) -> None:
    vector = llama.vector(1)
    for vectors, says in (([], "give vectors of different names"), ([vector, vector], "different names"),
                          ({"random": vector}, "none of them unsteered or random")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            swept(llama, vectors)
    with pytest.raises(ValueError, match="give strengths other than 0"):
        xs.sweep(llama.model, vector, [0, 1], PROMPTS, LETTERS, neutral=NEUTRAL)
    with pytest.raises(SpaceMismatchError):
        swept(llama, gemma.vector(1))

"""What a report says in plain words is what its record holds."""

import re
from dataclasses import replace
from typing import Any

import pytest
from sample_results import planted

import xmodel_steer as xs
from xmodel_steer.figures.report import write_report
from xmodel_steer.recipe.arms import Arm
from xmodel_steer.recipe.words import ARM_NAMES, MANY, OPERATOR_NAMES, names_of, sentences, validated

EFFECTS: dict[str, Any] = {"native": 1.0, "mapped": 0.9, "random": [0.02, -0.02, 0.01, 0.0, -0.01], "shuffled": 0.0}


def counted(name: str, counts: list[int], of: int = 40) -> Arm:
    """An arm that so many prompts count in, for each seed."""
    import numpy as np

    from xmodel_steer.recipe.arms import scored_fields

    scores = [np.array([1.0] * count + [0.0] * (of - count)) for count in counts]
    return Arm(name, kl=0.1, perplexity=2.0, recipe="off", strength=1.0, **scored_fields(scores, np.zeros(of)))


def test_shares_are_told_as_counts() -> None:
    arms = [counted(n, c) for n, c in {"native": [40], "mapped": [39], "random": [0, 1], "shuffled": [2]}.items()]
    base = replace(counted("unsteered", [0]), strength=0.0)
    unit = "share of prompts that are answered without the backdoor"
    result = replace(planted(EFFECTS), unit=unit, arms=(base, *arms), stored=("said",))
    # Of several seeds a prompt's score is their mean, which is no count of one vector.
    first, *rest = sentences(replace(result, arms=(base, *(replace(a, scores=()) for a in arms))))
    assert first == "Counted are prompts that are answered without the backdoor." and len(rest) == 1
    source = result.source["model"]
    assert rest[0] == (
        f"39 of 40 under the vector carried over from {source}; 0 in the unsteered model, 40 under the target's own vector, "
        "0.5 (mean of 2) under random vectors, 2 through a map of shuffled pairs."
    )


@pytest.mark.parametrize(
    "effects, says",
    [
        (EFFECTS, "It transfers: "),
        (EFFECTS | {"mapped": 0.0}, "No evidence that it transfers "),
        (EFFECTS | {"native": 0.0}, "Nothing can be said "),
    ],
)
def test_the_first_words_are_the_verdicts(effects: dict[str, Any], says: str, tmp_path: Any) -> None:
    result = planted(effects)
    (line,) = sentences(result)
    (verdict,) = result.verdicts.values()
    assert line.startswith(says)
    if verdict.transfers:
        share = verdict.efficiency
        told = [int(n) for n in re.findall(r"(-?\d+)%", line)]
        shares = [share.value, share.low, share.high, *(verdict.controls[n].value for n in ("random", "shuffled"))]
        assert told == [round(100 * value) for value in shares]
        assert f"{result.arm('mapped').effect.n} prompts" in line
    for reason in verdict.failed:
        assert reason in line
    page = write_report(result, tmp_path / "report.html").read_text()
    body = page.split("<body>")[1]
    order = [body.index(part) for part in ("class='plain'", 'id="figure-0"', "<h2>Every arm", "How it was made")]
    assert order == sorted(order)  # the verdict, the figure, the table, the rest


def test_a_study_of_many_recipes_is_summed_up_by_its_own_first_line() -> None:
    result = planted(EFFECTS)
    arms = [replace(arm, recipe=f"r{k}") for k in range(MANY + 1) for arm in result.arms]
    assert sentences(replace(result, arms=tuple(arms))) == ()


def test_names_are_explained_where_they_stand() -> None:
    result = planted(EFFECTS)
    told = names_of(result)
    assert {arm.arm for arm in result.arms} <= set(told) and set(told) <= set(ARM_NAMES) | set(OPERATOR_NAMES)
    operators = (xs.Add(1.0), xs.Ablate(), xs.Clamp())
    assert all(type(operator).__name__ in OPERATOR_NAMES for operator in operators)


def test_what_validation_left_out_is_told_with_the_reason(tmp_path: Any) -> None:
    records = (
        {
            "recipe": "toy",
            "varied": "target layer",
            "layer": 1,
            "site": "resid_post[1]",
            "score": 0.5,
            "perplexity_ratio": 1.2,
        },
        {
            "recipe": "toy",
            "varied": "target layer",
            "layer": 2,
            "site": "resid_post[2]",
            "score": 0.9,
            "perplexity_ratio": 2.5,
        },
    )
    result = replace(planted(EFFECTS), validation=records, spec={"max_perplexity_ratio": 2.0})
    kept, out = validated(result)
    assert "left out" not in kept and kept["site"] == "resid_post[1]" and kept["score"] == "0.500"
    assert out["left out"] == "perplexity 2.50 times the unsteered one; the bound is 2"
    page = write_report(result, tmp_path / "report.html").read_text()
    assert "2 settings, 1 left out" in page and out["left out"] in page
    assert "What validation compared" not in write_report(planted(EFFECTS), tmp_path / "none.html").read_text()

"""The card of a run: the hub's own classes read it, its numbers are the record's, and its code runs."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import toys
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData
from sample_results import planted, result
from test_interop import Hub

import xmodel_steer as xs
from xmodel_steer import interop
from xmodel_steer.interop.cards import run_card
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.words import sentences

ROOT = Path(__file__).parents[2]
BEATEN = {"native": 1.0, "mapped": 0.9, "random": [0.02, -0.02, 0.01, 0.0, -0.01], "shuffled": 0.0}


def read(text: str) -> Any:
    """The card as the hub's client reads it; a second round changes nothing."""
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    return card


def between(made: Result, source: str, target: str) -> Result:
    return replace(made, source={**made.source, "model": source}, target={**made.target, "model": target})


def test_metadata_are_what_the_hub_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = read(run_card(between(result(), "someone/small-1b", "other/Large.7B"), "me/run", license="cc-by-4.0"))
    assert card.data.library_name == "xmodel-steer" and card.data.license == "cc-by-4.0"
    assert card.data.base_model == ["someone/small-1b", "other/Large.7B"]
    assert {"activation-steering", "arxiv:2503.04429"} < set(card.data.tags)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "small").mkdir(parents=True)  # folders and packaged models are no names of the hub
    local = read(run_card(between(result(), "mine/small", "packaged:gemma-3-270m"), "me/run"))
    assert local.data.base_model is None and local.data.license is None


@pytest.mark.parametrize(
    "effects, says",
    [
        (
            BEATEN,
            r"It transfers: carried over from \S+, the vector does \d\d% of what \S+'s own vector does",
        ),
        (BEATEN | {"mapped": 0.0}, "No evidence that it transfers .*not above the shuffled map"),
        (BEATEN | {"native": 0.0}, "Nothing can be said "),
    ],
)
def test_the_first_words_are_the_verdict(effects: dict[str, Any], says: str) -> None:
    made = planted(effects)
    body = read(run_card(made, "me/run")).text.strip().splitlines()
    assert body[0] == "# toy" and re.fullmatch(rf"\*\*{says}.*\*\*", body[2]), body[2]
    (verdict,) = made.verdicts.values()
    assert f"- {verdict.text}" in "\n".join(body).replace("\\", "").replace("&lt;", "<")


def cells(text: str) -> list[list[str]]:
    rows = [line.replace("\\", "")[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return rows[2:]


def test_the_table_has_every_arm_of_the_comparison_with_its_n_interval_and_kl() -> None:
    made = xs.read(ROOT / "notebooks" / "studies" / "05_reading_a_result" / "sentiment")
    table = cells(read(run_card(made, "me/run")).text)
    compared = [arm for named in made.compared("sentiment").values() for arm in named.values()]
    for arm in [made.arm("unsteered"), *compared]:
        row = [
            arm.recipe,
            arm.title,
            arm.at,
            f"{arm.strength:+.2f}",
            f"{arm.effect:.3f}",
            str(arm.effect.n),
            f"{arm.kl:.3f}",
        ]
        assert row in table
    assert len(table) == 1 + len(compared)


@pytest.mark.parametrize("study", sorted((ROOT / "studies").iterdir()), ids=lambda folder: folder.name)
def test_every_recorded_study_has_a_card(study: Path) -> None:
    made = xs.read(study)
    text = read(run_card(made, "me/run")).text
    assert len(cells(text)) >= len(made.recipes) and "## Limits" in text
    assert text.count("**") == 2 * len(sentences(made) or made.conclusions)


def test_a_record_writes_no_markup_and_no_code() -> None:
    evil = "a | b](http://x) <script> ``` **\n# c"
    choice = {"operator": "Add(__import__('os').system('x'))", "strength": 3.0}
    made = replace(result(), name=evil, chosen={"joy": choice}, vectors={"mapped": result().vectors["native"]})
    text = read(run_card(between(made, evil, "large"), 'me/run"); evil("')).text
    assert "<script>" not in text and "# c" not in text.splitlines() and text.count("```") == 2
    assert all(len(row) == 7 for row in cells(text))
    code = text.partition("```python\n")[2].partition("```")[0]
    assert "operator=xs.Add(3.0)" in code and "__import__" not in code
    assert r'download_run("me/run\"); evil(\"")' in code
    compile(code, "card", "exec")


def test_the_code_of_a_card_steers_as_the_run_did(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = (xs.load(folders[name]) for name in ("gemma", "llama"))
    made = xs.transfer(
        small, large, toys.contrast(), toys.sentences(60, 4), source_sites=[xs.Site(1)], target_sites=[xs.Site(2)],
        behaviour=xs.behaviours.GeneratedText(toys.sentences(9, 3, 4), xs.scorers.Contains(("a",)), max_new_tokens=4),
        budget=xs.Budget((-4.0, 4.0), random_seeds=2, neutral_tokens=8), side={},
    )  # fmt: skip
    folder = xs.save(made, tmp_path / "run")
    monkeypatch.chdir(folders["llama"].parent)  # a local model is recorded under its folder's name
    monkeypatch.setattr(interop, "download_run", lambda repo: {"me/run": folder}[repo])
    monkeypatch.setattr(xs, "generate", partial(xs.generate, max_new_tokens=4))
    code = run_card(xs.read(folder), "me/run").partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    plain = xs.generate(large, ["Tell me about your day."])
    with xs.steering(large, made.vectors["mapped"], operator=xs.Add(made.headline)):
        expected = xs.generate(large, ["Tell me about your day."])
    assert capsys.readouterr().out == f"{expected}\n" and expected != plain


def test_a_card_goes_up_with_the_run_and_a_folders_own_one_in_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "repos", {})
    folder = xs.save(result(), tmp_path / "run")
    interop.upload_run(folder, "me/run", license="mit")
    assert Hub.repos["me/run"]["README.md"].decode() == run_card(xs.read(folder), "me/run", license="mit")
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_text("my own words")
    interop.upload_run(folder, "me/run")
    assert Hub.repos["me/run"]["README.md"] == b"my own words"

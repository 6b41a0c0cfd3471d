"""Files come back bit-exact, or are refused by name and reason; nothing is ever half written."""

import errno
import hashlib
import html
import io
import json
import math
import os
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from sample_results import MAP_RECORD, SMALL, mapping, moments, result, same, vector

from xmodel_steer.core.errors import ArtifactError, UncheckedWarning, UndefinedWarning
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.figures.report import summary, tables, write_report
from xmodel_steer.files.records import digest_of, read_record, read_tensors, write_tensors
from xmodel_steer.files.strict import dump_json
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.maps.statistics import Estimate, bootstrap_mean, undefined
from xmodel_steer.recipe.arms import AGREEMENT, EFFICIENCY, Arm, joined_arm
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.saving import read, save, save_or_spare
from xmodel_steer.recipe.verdicts import BAR

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("make", [vector, mapping, moments])
def test_round_trip_is_bit_exact_and_keeps_the_space(make: Any, tmp_path: Path) -> None:
    value = make()
    assert same(read(save(value, tmp_path / "deep" / "a.safetensors")), value)


def test_a_vector_without_means_comes_back_without_them(tmp_path: Path) -> None:
    bare = SteeringVector(torch.ones(4, dtype=torch.bfloat16), SMALL)
    back = read(save(bare, tmp_path / "v.safetensors"))
    assert back.positive_mean is None
    assert back.direction.dtype == torch.bfloat16


def test_a_result_comes_back_whole(tmp_path: Path) -> None:
    value = result()
    back = read(save(value, tmp_path / "run"))
    assert same(back.arms, value.arms)
    assert same(dict(back.vectors), dict(value.vectors))
    assert same(dict(back.maps), dict(value.maps))
    assert back.verdicts == value.verdicts
    plain = [f for f in value.__dataclass_fields__ if f not in ("arms", "vectors", "maps")]
    assert all(getattr(back, f) == getattr(value, f) for f in plain)


def test_a_result_without_maps_and_vectors_comes_back_without_them(tmp_path: Path) -> None:
    bare = replace(result(), vectors={}, maps={})
    run = save(bare, tmp_path / "run")
    assert {p.name for p in run.iterdir()} == {"result.json", "generations.jsonl"}
    back = read(run)
    assert back.maps == back.vectors == {}
    assert back.verdict() == bare.verdict()


def test_names_that_no_file_system_takes_come_back(tmp_path: Path) -> None:
    names = ("a/b: mapped", "a b: mapped", "∆", "…", "x" * 300, "..", "mapped", "Mapped~1")
    value = replace(result(), vectors={name: vector(seed=i) for i, name in enumerate(names)})
    back = read(save(value, tmp_path / "run"))
    assert list(back.vectors) == list(names) and same(dict(back.vectors), dict(value.vectors))


def test_a_run_of_an_earlier_version_is_read() -> None:
    """It was written before `Result` took the place of two kinds."""
    with pytest.warns(UncheckedWarning, match="before files carried checksums"):
        back, now = read(ROOT / "tests" / "data" / "run_of_0.1.0"), result()
    for old, new in zip(back.arms, now.arms, strict=True):
        assert (old.recipe, old.at, old.seeds, old.texts, old.raw) == (
            new.recipe,
            new.at,
            new.seeds,
            new.texts,
            new.raw,
        )
        assert old.effect == new.effect and old.change == new.change and old.measures == new.measures
        assert (old.scores, old.table) == (new.scores, new.table)
    assert back.verdict() == now.verdict()
    assert (back.name, back.unit, back.headline) == (now.name, now.unit, now.headline)
    for name, old in back.maps.items():  # fitted anew, with another processor's rounding
        new = now.maps[name]
        assert (old.source, old.target, repr(old)) == (new.source, new.target, repr(new))
        assert torch.allclose(old.weight, new.weight, atol=1e-5) and torch.allclose(old.bias, new.bias, atol=1e-5)
    assert set(back.maps) == set(now.maps) and set(back.vectors) == {"native", "source"}
    assert back.choice()["similarity"] == now.choice()["similarity"] and back.choice()["map"] == MAP_RECORD
    assert [(r["varied"], r["layer"], r["score"]) for r in back.validation] == [
        ("target layer", 1, 0.2),
        ("target layer", 2, 0.3),
    ]


@pytest.mark.parametrize("folder", sorted((ROOT / "studies").glob("*")), ids=lambda folder: folder.name)
def test_the_studies_of_earlier_versions_are_read_drawn_and_told(folder: Path, tmp_path: Path) -> None:
    record, back = json.loads((folder / "result.json").read_text()), read(folder)
    assert isinstance(back, Result) and back.name == record["name"]
    assert len(back.arms) == len(record["arms"]) > 5
    for arm, row in zip(back.arms, record["arms"], strict=True):
        assert (arm.arm, arm.recipe, arm.at, arm.kl) == (row["arm"], row["recipe"], row["at"], row["kl"])
        assert arm.seeds == row["seeds"] and len(arm.measures) == len(row.get("beside", row.get("measures")))
        assert arm.effect.n == row["n"] and (arm.effect.undefined or arm.effect.value == row["effect"])
    assert back.conclusions and back.verdicts == {}  # single scores were not kept
    again = read(save(back, tmp_path / "run"))
    assert repr(again.arms) == repr(back.arms) and again.conclusions == back.conclusions
    page = write_report(back, tmp_path / "report.html").read_text()
    assert all(html.escape(line) in page for line in back.conclusions)
    assert tables(back) and len(back.to_frame()) == len(back.arms)


def test_result_json_has_the_schema_that_readers_of_it_rely_on(tmp_path: Path) -> None:
    record = json.loads((save(result(), tmp_path / "run") / "result.json").read_text())
    assert (record["schema"], record["kind"]) == (2, "Result")
    assert {"source", "target", "chosen", "arms", "versions", "seeds", "verdicts", "conclusions"} <= record.keys()
    assert len(record["arms"]) == 17
    for arm in record["arms"]:
        assert {"arm", "recipe", "strength", "effect", "low", "high", "n", "kl", "perplexity", "measures"} <= arm.keys()


def test_saving_again_replaces_a_run_but_nothing_else(tmp_path: Path) -> None:
    save(result(), tmp_path / "run")
    save(replace(result(), name="second"), tmp_path / "run")
    assert read(tmp_path / "run").name == "second"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="mine: exists and holds something else, no Result; choose another place"):
        save(result(), other)
    assert (other / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "run"]


def test_a_result_whose_place_is_lost_is_saved_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="the run was written to"):
        spare = save_or_spare(result(), tmp_path / "file")
    assert read(spare).name == "joy" and (tmp_path / "file").read_text() == "in the way"


def test_what_is_no_older_one_of_its_kind_stays(tmp_path: Path) -> None:
    run = save(result(), tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "plots").mkdir()
    (run / "plots" / "a.png").write_text("mine too")
    save(replace(result(), name="second"), run)
    assert read(run).name == "second"
    assert (run / "notes.txt").read_text() == "mine" and (run / "plots" / "a.png").read_text() == "mine too"
    file = save(vector(), tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match=r"a.safetensors: exists and holds SteeringVector, no AffineMap; choose"):
        save(mapping(), file)
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(ArtifactError, match="model.safetensors: exists and holds something else, no SteeringVector"):
        save(vector(), foreign)
    assert list(load_file(foreign)) == ["weight"] and same(read(save(vector(), file)), vector())


def edited(file: Path, **changes: Any) -> Path:
    """The same file with another header."""
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        header = json.loads(opened.metadata()["xmodel_steer"])
    text = json.dumps(header | changes | {"sha256": "0" * 64})
    text = text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1)
    save_file(load_file(file), file, metadata={"xmodel_steer": text})
    return file


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-7]), "cut short"),
        (lambda f: f.write_bytes(f.read_bytes()[:20]), "cut short"),
        (lambda f: f.write_bytes(b""), "cut short"),
        (lambda f: f.write_text("hello"), "not a whole safetensors file"),
        (lambda f: save_file({"w": torch.ones(2)}, f), "not one of xmodel_steer"),
        (lambda f: edited(f, schema=9), "newer version"),
        (lambda f: edited(f, schema="x"), "ever wrote"),
        (lambda f: edited(f, kind="Poem"), "'Poem'"),
        (lambda f: edited(f, space={"model": "x"}), "damaged"),
        (lambda f: save_file({"w": torch.ones(2)}, f, metadata={"xmodel_steer": "{"}), "damaged or foreign"),
        (lambda f: f.unlink(), "no such file"),
    ],
)
def test_files_that_are_not_ours_or_not_whole_are_refused_by_reason(damage: Any, reason: str, tmp_path: Path) -> None:
    file = save(vector(), tmp_path / "v.safetensors")
    damage(file)
    with pytest.raises(ArtifactError, match=reason) as refused:
        read(file)
    assert "v.safetensors" in str(refused.value)


def test_nan_is_neither_written_nor_read(tmp_path: Path) -> None:
    bad = replace(mapping(), bias=torch.full((3,), torch.nan, dtype=torch.float64))
    with pytest.raises(ArtifactError, match="NaN"):
        save(bad, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    file = save(mapping(), tmp_path / "m.safetensors")
    tensors = load_file(file)
    tensors["weight"][0, 0] = torch.nan
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    header = json.loads(metadata["xmodel_steer"])
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ArtifactError, match="weight does not match its checksum"):
        read(file)
    edited(file, tensors=header["tensors"] | {"weight": digest_of(tensors["weight"])})
    with pytest.raises(ArtifactError, match="'weight' has NaN"):
        read(file)


def strict(text: str) -> Any:
    """JSON as every reader takes it: without NaN and Infinity, which JSON does not have."""

    def refuse(token: str) -> Any:
        raise AssertionError(token)

    return json.loads(text, parse_constant=refuse)


def test_a_result_with_nan_is_written_and_says_where(tmp_path: Path) -> None:
    made = result()
    choice = dict(made.choice()) | {"map": MAP_RECORD | {"r2": math.nan}, "cosine": math.inf}
    gone = replace(made, chosen={"joy": choice})
    with pytest.warns(
        UndefinedWarning, match=r"result.json: NaN or infinite, and written as null: chosen.joy.map.r2, "
    ):
        run = save(gone, tmp_path / "run")
    record = strict((run / "result.json").read_text())
    assert record["chosen"]["joy"]["map"]["r2"] is None and record["chosen"]["joy"]["map"]["cosine"] == 0.69
    assert record["undefined"] == [
        {"at": ["chosen", "joy", "map", "r2"], "was": "NaN"},
        {"at": ["chosen", "joy", "cosine"], "was": "Infinity"},
    ]
    back = read(run)
    assert math.isnan(back.choice()["map"]["r2"]) and back.choice()["cosine"] == math.inf
    said = " ".join(summary(back))
    assert "R² per dimension – (5–95 %: 0.20–0.70)" in said and "cosine to native – (standardised)" in said
    assert same(back.arms, made.arms)


def test_what_json_does_not_have_never_stops_a_record(tmp_path: Path) -> None:
    odd = {"a": np.float32(0.5), "b": np.array([1, 2]), "c": {1}, "d": torch.tensor([math.nan]), 3: (np.bool_(True), Path), "e": "\ud800"}  # fmt: skip
    record = {"schema": 1, "odd": odd}
    text = dump_json(record, tmp_path)
    file = tmp_path / "a.json"
    file.write_bytes(text.encode())
    assert strict(text)["undefined"] == [{"at": ["odd", "d", 0], "was": "NaN"}]
    with pytest.warns(UncheckedWarning, match="before files carried checksums"):
        back = read_record(file)["odd"]
    assert math.isnan(back.pop("d")[0])
    assert back == {"a": 0.5, "b": [1, 2], "c": "{1}", "3": [True, repr(Path)], "e": "\ud800"}
    assert dump_json({"a": 1.5}, tmp_path) == '{"a": 1.5}', "where there is nothing to say, nothing is said"
    endless: dict[str, Any] = {}
    endless["own"] = endless
    with pytest.raises(ArtifactError, match="the record holds itself"):
        dump_json(endless, tmp_path)
    for listed in (
        '[{"at": ["x"]}]',
        '[{"at": [], "was": "NaN"}]',
        '[{"at": ["schema", 0], "was": "NaN"}]',
        "3",
        '"x"',
    ):
        file.write_text(f'{{"schema": 1, "undefined": {listed}}}')
        with pytest.raises(ArtifactError, match="damaged or foreign"):
            read_record(file)


SCORES = st.one_of(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6),
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.3, 1e-300, 1e308, -1e308, math.nan, math.inf]), min_size=6, max_size=6),
    st.sampled_from([0.0, 1.0, 0.5, 1e308]).map(lambda score: [score] * 6),
)  # fmt: skip


@given(
    n=st.sampled_from([1, 3, 6]), base=SCORES, scores=st.lists(SCORES, min_size=10, max_size=10),
    costs=st.lists(st.sampled_from([0.0, 0.1, 10.0, 1e304, math.inf, math.nan]), min_size=9, max_size=9),
    one=st.booleans(),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_whatever_the_scores_are_the_run_is_written_read_and_told(
    n: int, base: list[float], scores: list[list[float]], costs: list[float], one: bool,
) -> None:  # fmt: skip
    """Result, record, verdict, report and table; the record is strict JSON, and what is undefined in it has a reason."""
    start, given_scores, given_costs = np.array(base[:n]), iter(scores), iter(costs)
    arms = []
    for arm in result().arms:
        if one and arm.strength < 0:
            continue
        seeds = [arm.per_seed()[:n, k] for k in range(arm.per_seed().shape[1])]
        cost = 0.1
        if arm.arm == "unsteered":
            seeds, cost = [start], next(given_costs)
        elif arm.budget is not None:
            seeds, cost = [np.array(next(given_scores)[:n]) for _ in seeds], next(given_costs)
        arms.append(
            joined_arm(
                arm.arm, [arm.strength] * len(seeds), seeds, start, kl=[cost], perplexity=[cost], agreement=[min(cost, 1.0)],
                budget=arm.budget, measures={"knowledge": bootstrap_mean(seeds[0])} if arm.budget or not arm.strength else {},
                texts=("a",) * n, at=arm.at, recipe=arm.recipe and "[/b] x",
            )
        )  # fmt: skip
    made = replace(result(), arms=tuple(arms), name="[/b] x", chosen={"[/b] x": result().choice()})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedWarning)
        run = save(made, Path(folder) / "run")
        back = read(run)
        page = write_report(back, run / "report.html").read_text()
        record = strict((run / "result.json").read_text())
        rows = [strict(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    verdict = made.verdict()
    assert repr(back.verdict()) == repr(verdict)
    assert tuple(map(repr, back.arms)) == tuple(map(repr, made.arms))
    assert len(rows) == n * len(arms)
    assert html.escape(verdict.text) in page and sum(t.row_count for t in tables(back)) == len(arms)
    assert len(back.to_frame()) == len(arms)
    for words in (verdict.text, *summary(back)):
        assert not re.search(r"\b(nan|inf)\b", words), words
    parts = [verdict.efficiency, *verdict.controls.values(), *(c.difference for c in verdict.comparisons)]
    for estimate in [*parts, *(e for arm in made.arms for e in (arm.effect, arm.change))]:
        numbers = estimate.value, estimate.low, estimate.high
        assert (not estimate.undefined) == all(map(math.isfinite, numbers))
    few = "undecidable" in verdict.text
    assert (verdict.transfers is None) == (few or any(part.undefined for part in parts[:1] + parts[-3:]))
    assert (verdict.transfers is None) == (": undefined" in verdict.text)
    if verdict.transfers:
        assert all(c.p < 0.05 for c in verdict.comparisons) and verdict.efficiency.low >= BAR
    for gone in record.get("undefined", []):
        assert gone["was"] in ("NaN", "Infinity", "-Infinity")
        assert "reason" in gone or gone["at"][-1] in {"kl", "perplexity", "agreement", "+", "-"} | {*range(2)}
        place = record
        for step in gone["at"]:
            place = place[step]
        assert place is None
    for name, found in {"efficiency": verdict.efficiency, **verdict.controls}.items():
        told = record["verdicts"]["[/b] x"]
        kept = told["efficiency"] if name == "efficiency" else told["controls"][name]
        assert kept.get("undefined", "") == found.undefined


@pytest.mark.parametrize("what", [vector, result])
@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_the_older_file_and_no_scratch(
    what: Any, trouble: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("run" if what is result else "v.safetensors")
    save(what(), path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    calls = iter(range(100))

    def fail(handle: int) -> None:
        if next(calls) == (2 if what is result else 0):
            raise trouble

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((ArtifactError, KeyboardInterrupt)) as raised:
        save(what(), path)
    if isinstance(trouble, OSError):
        assert "no space left" in str(raised.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "result.json").unlink(), "not a run folder"),
        (lambda run: (run / "generations.jsonl").unlink(), "no such file"),
        (lambda run: (run / "maps" / "joy.safetensors").unlink(), "no such file"),
        (lambda run: (run / "vectors" / "native.safetensors").unlink(), "no such file"),
        (lambda run: (run / "result.json").write_text("{"), "damaged or foreign"),
        (lambda run: (run / "result.json").write_text('{"schema": 9}'), "newer version"),
        (lambda run: (run / "result.json").write_text('{"schema": 2, "kind": "Poem"}'), "was edited"),
        (
            lambda run: (run / "generations.jsonl").write_text(
                "\n".join((run / "generations.jsonl").read_text().split("\n")[:-2])
            ),
            "is not the file that this run wrote",
        ),
    ],
)
def test_damaged_run_folders_are_refused(damage: Any, reason: str, tmp_path: Path) -> None:
    run = save(result(), tmp_path / "run")
    damage(run)
    with pytest.raises(ArtifactError, match=reason):
        read(run)


def test_other_values_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save({}, tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="is a folder"):
        save(vector(), tmp_path)


# --- tensors that lie oddly in memory ---------------------------------------------------------

BIG = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
ODD = {
    "one tensor twice": lambda dtype: [BIG[0].to(dtype)] * 2,
    "two views of one": lambda dtype: list(BIG.to(dtype)[:2]),
    "overlapping views": lambda dtype: [BIG.to(dtype).flatten()[:8], BIG.to(dtype).flatten()[4:12]],
    "columns": lambda dtype: [BIG.to(dtype)[:8, 0], BIG.to(dtype)[:8, 1]],
    "expanded": lambda dtype: [BIG[0, :1].to(dtype).expand(8)] * 2,
    "asks for a gradient": lambda dtype: [BIG[0].to(dtype).clone().requires_grad_()] * 2,
    "parameter": lambda dtype: [torch.nn.Parameter(BIG[i].to(dtype)) for i in range(2)],
    "negated view": lambda dtype: [torch._neg_view(BIG[i].to(dtype)) for i in range(2)],
    "under inference": lambda dtype: _inferred(dtype),
}


def _inferred(dtype):
    with torch.inference_mode():
        made = BIG.to(dtype) * 1
        return [made[0], made[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ODD)
def test_tensors_come_back_however_they_lay_in_memory(kind, dtype, tmp_path):
    one, other = ODD[kind](dtype)
    file = tmp_path / "odd.safetensors"
    write_tensors(file, "Odd", {"one": one, "other": other}, {})
    read_back = read_tensors(file)[1]
    for name, tensor in (("one", one), ("other", other)):
        assert read_back[name].dtype == dtype and torch.equal(read_back[name], tensor.detach())
    assert file.stat().st_size < 1000  # no more than the rows, however large what they are rows of


@pytest.mark.parametrize("kind", ODD)
def test_vectors_and_maps_come_back_however_they_lay_in_memory(kind, tmp_path):
    space = replace(SMALL, width=8)
    one, other = ODD[kind](torch.float32)
    made = SteeringVector(one, space, "odd", other, one, (1, 1), other.detach().abs())
    back = read(save(made, tmp_path / "vector.safetensors"))
    for name in ("direction", "positive_mean", "negative_mean", "scale"):
        assert torch.equal(getattr(back, name), getattr(made, name).detach())
    square = BIG[:8].T  # not contiguous
    affine = AffineMap(
        source=space,
        target=space,
        weight=square,
        bias=one,
        source_scale=one.detach().abs(),
        target_scale=one.detach().abs(),
    )
    back = read(save(affine, tmp_path / "map.safetensors"))
    assert torch.equal(back.weight, square) and torch.equal(back.bias, one.detach())


ESTIMATES = st.one_of(
    st.lists(st.sampled_from([0.0, 1.0, 0.3, math.nan, math.inf]), max_size=3).map(bootstrap_mean),
    st.just(undefined("why not", 3, 0.5)),
)
COSTS = st.sampled_from([0.0, 12.5, math.nan, math.inf])


@given(estimates=st.lists(ESTIMATES, min_size=12, max_size=12), costs=st.lists(COSTS, min_size=8, max_size=8), kind=st.sampled_from([EFFICIENCY, "kept"]))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_whatever_a_study_measured_is_written_read_and_shown(
    estimates: list[Estimate], costs: list[float], kind: str
) -> None:
    found, cost = iter(estimates), iter(costs)
    arms = [
        Arm(
            arm,
            next(found),
            next(cost),
            next(cost),
            recipe="a [/b] recipe",
            operator="Add(1.0)",
            measures={kind: next(found)},
            texts=("a",),
        )
        for arm in ("unsteered", "mapped", "random", "shuffled")
    ]
    varied = [{"recipe": "r", "varied": "target layer", "layer": 1, "score": next(cost, math.nan)}]
    points = tuple(
        {"trigger": "known", "prompts": k, "effect": next(found).record(), AGREEMENT: next(found).record()}
        for k in (0, 25)
    )
    made = Result(
        "na[/b]me", "unit", {"model": "a"}, {"model": "b"}, tuple(arms), {"a [/b] recipe": {"p": math.nan}}, tuple(varied), {}, {}, {},
        {}, question="question", stored=("verdict",), curves={"text": points}, prompts=("a",), hardware="here", seconds={"part": 1.0},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedWarning)
        run = save(made, Path(folder) / "run")
        page = write_report(made, run / "report.html").read_text()
        record = strict((run / "result.json").read_text())
        back = read(run)
    assert repr(back) == repr(made)
    assert repr([back.validation, back.curves]) == repr([made.validation, made.curves])
    assert len(made.to_frame()) == 4
    assert record["chosen"]["a [/b] recipe"]["p"] is None
    for arm, kept in zip(arms, record["arms"], strict=True):
        assert kept.get("undefined", "") == arm.effect.undefined
        assert kept["measures"][kind].get("undefined", "") == arm.measures[kind].undefined
        assert f"<td>{html.escape(f'{arm.effect:.3f}')}</td>" in page
    out = io.StringIO()
    for shown in tables(back):
        Console(file=out, width=200).print(shown)
    assert "na[/b]me: a → b" in out.getvalue() and not re.search(r"\b(nan|inf)\b", out.getvalue())
    assert not re.search(r"\b(nan|inf)\b", page.partition("<h2>Every arm")[2].partition("<h2>")[0])

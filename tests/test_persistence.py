"""Files come back bit-exact, or are refused by name and reason; nothing is ever half written."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from xmodel_steer.errors import ArtifactError
from xmodel_steer.files import read_tensors, write_tensors
from xmodel_steer.fitters import Ridge
from xmodel_steer.maps import AffineMap
from xmodel_steer.metrics import bootstrap_mean
from xmodel_steer.moments import Moments, MomentsAccumulator
from xmodel_steer.persistence import read, save
from xmodel_steer.results import TransferResult, joined_arm
from xmodel_steer.spaces import Site, Space
from xmodel_steer.vectors import SteeringVector

SMALL = Space("small", Site(1), 4, "aaaa", "fold_ln")
LARGE = Space("large", Site(2, "resid_mid"), 3, "bbbb")


MAP_RECORD = {
    "fitter": "Ridge", "penalty": 0.01, "train_tokens": 51234, "coverage": 0.98, "test_documents": 49, "r2": 0.48, "r2_low": 0.2,
    "r2_high": 0.7, "cosine": 0.69, "norm_ratio": 0.69, "loss": {"train": 0.4, "test": 0.52},
}  # fmt: skip


def vector(space: Space = SMALL, seed: int = 0) -> SteeringVector:
    g = torch.Generator().manual_seed(seed)
    d, p, n, s = (torch.randn(space.width, generator=g) for _ in range(4))
    return SteeringVector(d, space, "joy", p, n, (3, 5), s.abs(), "a test")


def moments() -> Moments:
    rng = torch.Generator().manual_seed(1)
    made = MomentsAccumulator(
        {SMALL.site: SMALL}, {LARGE.site: LARGE}, [(SMALL.site, LARGE.site)], settings={"seed": 0}
    )
    for part in ("train", "validation", "test"):
        x, y = torch.randn(40, 4, generator=rng), torch.randn(40, 3, generator=rng)
        made.add(part, {SMALL.site: x}, {LARGE.site: y}, [i // 10 for i in range(40)], eligible=44)
    return made.moments()


def mapping() -> AffineMap:
    return Ridge().fit(moments().pair(SMALL.site, LARGE.site))


def result() -> TransferResult:
    rng = np.random.default_rng(0)
    rows: list[tuple[str, float, float | None]] = [("unsteered", 0.0, None)]
    steered = ("native", "mapped", "random", "shuffled")
    rows += [(a, s, budget) for budget in (None, 0.1) for a in steered for s in (-1.0, 1.0)]
    base = rng.random(6)
    arms = []
    for i, (name, strength, budget) in enumerate(rows):
        scores = base + strength * (1.0 if name in ("native", "mapped") else 0.01)
        seeds = [scores, scores + 0.1] if name == "random" else [scores]
        arms.append(
            joined_arm(
                name, [strength] * len(seeds), seeds, base, kl=[0.1 * abs(strength)], perplexity=[10.0 + i],
                agreement=[0.9], budget=budget, side={"knowledge": bootstrap_mean(base)} if budget else {},
                texts=tuple(f"text {j} ∆\u2028" for j in range(6)), raw=("4/5",) * 6 if budget else (),
            )
        )  # fmt: skip
    ids = [f"prompt{i}" for i in range(6)]
    return TransferResult(
        "joy", "score", SMALL.to_dict() | {"hook": "h", "dtype": "float32"}, LARGE.to_dict() | {"hook": "h", "dtype": "float32"},
        MAP_RECORD, tuple(arms), 1.0, {}, {"mapped": {"cosine": 0.9, "norm_ratio": 1.0}, "shuffled": {"cosine": 0.0}},
        {"native": vector(LARGE), "source": vector()}, mapping(), {"a": 1}, {"evaluation": ids}, {"torch": "x"}, {"split": 0},
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


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
    assert same(dict(back.vectors), {k: value.vectors[k] for k in sorted(value.vectors)})
    assert same(back.mapping, value.mapping)
    assert back.verdict() == value.verdict()
    assert back.splits == value.splits


def test_a_result_without_map_and_vectors_comes_back_without_them(tmp_path: Path) -> None:
    bare = replace(result(), vectors={}, mapping=None)
    run = save(bare, tmp_path / "run")
    assert {p.name for p in run.iterdir()} == {"result.json", "generations.jsonl"}
    back = read(run)
    assert back.mapping is None
    assert back.vectors == {}
    assert back.verdict() == bare.verdict()


def test_runs_of_before_the_record_of_files_are_read(tmp_path: Path) -> None:
    run = save(result(), tmp_path / "run")
    record = json.loads((run / "result.json").read_text())
    for key in ("vectors", "has_map"):
        del record[key]
    (run / "result.json").write_text(json.dumps(record))
    back = read(run)
    assert set(back.vectors) == {"native", "source"}
    assert same(back.mapping, result().mapping)


def test_result_json_has_the_schema_that_readers_of_it_rely_on(tmp_path: Path) -> None:
    record = json.loads((save(result(), tmp_path / "run") / "result.json").read_text())
    assert record["schema"] == 1
    assert {"source", "target", "map", "arms", "versions", "seeds"} <= record.keys()
    assert len(record["arms"]) == 17
    for arm in record["arms"]:
        assert {"arm", "strength", "effect", "low", "high", "n", "kl", "perplexity"} <= arm.keys()


def test_saving_again_replaces_a_run_but_nothing_else(tmp_path: Path) -> None:
    save(result(), tmp_path / "run")
    save(replace(result(), label="second"), tmp_path / "run")
    assert read(tmp_path / "run").label == "second"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a run folder"):
        save(result(), other)
    assert (other / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "run"]


def test_what_is_no_older_one_of_its_kind_stays(tmp_path: Path) -> None:
    run = save(result(), tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "plots").mkdir()
    (run / "plots" / "a.png").write_text("mine too")
    save(replace(result(), label="second"), run)
    assert read(run).label == "second"
    assert (run / "notes.txt").read_text() == "mine" and (run / "plots" / "a.png").read_text() == "mine too"
    study = tmp_path / "study"
    study.mkdir()
    (study / "result.json").write_text(json.dumps({"schema": 1, "kind": "study"}))
    with pytest.raises(ArtifactError, match="study: exists and is not a run folder"):
        save(result(), study)
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
    save_file(load_file(file), file, metadata={"xmodel_steer": json.dumps(header | changes)})
    return file


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-7]), "cut short"),
        (lambda f: f.write_bytes(f.read_bytes()[:20]), "cut short"),
        (lambda f: f.write_bytes(b""), "cut short"),
        (lambda f: f.write_text("hello"), "not a whole safetensors file"),
        (lambda f: save_file({"w": torch.ones(2)}, f), "not one of xmodel_steer"),
        (lambda f: edited(f, schema=2), "newer version"),
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
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ArtifactError, match="'weight' has NaN"):
        read(file)


def test_a_result_with_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="NaN"):
        save(replace(result(), headline=1.0, map={"r2": float("nan")}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


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
        (lambda run: (run / "generations.jsonl").unlink(), "incomplete"),
        (lambda run: (run / "map.safetensors").unlink(), "no such file"),
        (lambda run: (run / "vectors" / "native.safetensors").unlink(), "no such file"),
        (lambda run: (run / "result.json").write_text("{"), "damaged or foreign"),
        (lambda run: (run / "result.json").write_text('{"schema": 9}'), "newer version"),
        (lambda run: (run / "result.json").write_text('{"schema": 1, "kind": "Poem"}'), "not a TransferResult"),
        (
            lambda run: (run / "generations.jsonl").write_text(
                "\n".join((run / "generations.jsonl").read_text().split("\n")[:-2])
            ),
            "5 of 6 scores",
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
        source_scale=one,
        target_scale=one,
    )
    back = read(save(affine, tmp_path / "map.safetensors"))
    assert torch.equal(back.weight, square) and torch.equal(back.bias, one.detach())

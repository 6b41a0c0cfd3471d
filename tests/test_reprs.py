"""In a notebook every object is one line: what it is of, and its few numbers."""

import inspect
from abc import ABC
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import toys
from sample_layers import collected, rows
from sample_results import moments, result, vector

import xmodel_steer as xs


def objects(llama: toys.Toy, folder: Path) -> dict[str, object]:
    made, pair = result(), moments().pair(xs.Site(1), xs.Site(2, "resid_mid"))
    space = vector().space
    for end in ("source", "target"):
        xs.harvest(
            llama.model,
            toys.sentences(3, 0),
            folder / "store",
            end=end,
            sites=[xs.Site(1)],
            max_tokens=8,
        )
    grid = xs.maps.layer_grid(collected())
    return {
        "Activations(5 rows of small resid_post[1], width 4)": xs.Activations(torch.ones(5, 4), space),
        "SteeringVector('joy', small resid_post[1], norm": vector(),
        ", n = 3 + 5)": vector(),
        "SteeringVector('', small resid_post[1], norm 2)": xs.SteeringVector(torch.ones(4), space),
        "ContrastSet(20 positive, 20 negative": toys.contrast(),
        "Moments(small → large, 1 pairs of sites, 120 pairs of tokens of 12 documents, coverage 91%)": moments(),
        "SplitMoments(small resid_post[1] → large resid_mid[2], pairs: train 40, validation 40, test 40": pair,
        "PairMoments(40 pairs of 4 documents, 4 → 3 dimensions)": pair.train,
        "PartMoments(40 pairs": moments().parts["train"],
        "AffineMap(small resid_post[1] → large resid_mid[2], Ridge, held-out R²": xs.Ridge().fit(pair),
        "MapScore(R² ": xs.Ridge().fit(pair).score_test,
        "PairedRows(small resid_post[1] → large resid_post[4], 240 pairs of 60 documents, coverage 100%)": rows(),
        "LayerGrid(small → large, 3 × 2 sites, ": grid,
        "DataCurve(small resid_post[1] → large resid_post[4], 2 sizes up to 144 tokens, ": xs.maps.data_curve(
            rows(), tokens=[20, 144]
        ),
        "ActivationStore(": xs.ActivationStore(folder / "store"),
        "Method('mean', difference_of_means, Ridge, 'all')": xs.Method(),
        ", a mask of 3)": xs.Method(positions=torch.tensor([False, True, True])),
        "Result('joy', small → large, 17 arms, n = 6)": made,
        "Arm('native' of 'joy' at strength 1: effect": made.arm("native", 1.0),
    }


def test_a_repr_is_one_short_line(llama: toys.Toy, tmp_path: Path) -> None:
    for says, value in objects(llama, tmp_path).items():
        text = repr(value)
        assert says in text, text
        assert "\n" not in text and "tensor(" not in text
        assert len(text.replace(str(tmp_path), "")) < 170, text


def test_what_is_made_of_tensors_is_never_printed_whole(llama: toys.Toy, tmp_path: Path) -> None:
    """For records to come: one with a tensor writes its repr itself."""
    from xmodel_steer import core, evaluation, maps, recipe

    checked = []
    for space in (core, maps, recipe, evaluation):
        for kind in vars(space).values():
            if not (isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")):
                continue
            large = [
                f.name
                for f in fields(kind)
                if f.repr and "Callable" not in str(f.type) and ("Tensor" in str(f.type) or "ndarray" in str(f.type))
            ]
            if large:
                checked.append(kind.__name__)
                written = any(
                    "def __repr__" in inspect.getsource(base) for base in kind.__mro__[:-1] if base is not ABC
                )
                assert written, f"{kind.__name__} prints {large}"
    assert len(checked) > 4


@pytest.mark.parametrize("label", ["", "a\nb"])
def test_a_label_cannot_break_the_line(label: str) -> None:
    assert "\n" not in repr(xs.SteeringVector(torch.ones(4), vector().space, label))


def test_a_damaged_store_still_prints(llama: toys.Toy, tmp_path: Path) -> None:
    xs.harvest(llama.model, toys.sentences(3, 0), tmp_path, end="target", sites=[1], max_tokens=8)
    (tmp_path / "target" / "end.json").write_text("{")
    assert repr(xs.ActivationStore(tmp_path)) == f"ActivationStore({str(tmp_path)!r}, target)"

"""Figures and report say what the record says."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from test_layers import collected, rows
from test_persistence import result

from xmodel_steer import plots
from xmodel_steer.fitters import Identity, Ridge
from xmodel_steer.layers import LayerGrid, data_curve, layer_grid
from xmodel_steer.persistence import read, save
from xmodel_steer.plots import COLOURS, dose_response
from xmodel_steer.report import table, write_report


def test_dose_response_draws_every_arm_with_its_interval() -> None:
    made = result()
    figure = dose_response(made)
    drawn = [trace for trace in figure.data if trace.showlegend]
    assert [trace.name for trace in drawn] == ["native", "mapped", "random", "shuffled"]
    for trace in drawn:
        assert trace.line.color == COLOURS[trace.name]
        assert list(trace.x) == [-1.0, 0.0, 1.0]
        arms = [made.arm(trace.name, -1.0), made.arm("unsteered", 0), made.arm(trace.name, 1.0)]
        assert list(trace.y) == [arm.effect.value for arm in arms]
        assert [y + e for y, e in zip(trace.y, trace.error_y.array, strict=True)] == pytest.approx(
            [a.effect.high for a in arms]
        )
        assert [y - e for y, e in zip(trace.y, trace.error_y.arrayminus, strict=True)] == pytest.approx(
            [a.effect.low for a in arms]
        )
    assert len(set(COLOURS.values())) == len(COLOURS)
    titles = [axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2, figure.layout.yaxis3)]
    assert titles == ["mean score", "nats per token", "perplexity"]
    assert "score; n = 6" in figure.layout.title.text


def test_the_table_has_a_row_per_arm() -> None:
    assert table(result()).row_count == len(result().arms)


def test_the_report_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    page = write_report(result(), tmp_path / "report.html").read_text()
    assert result().verdict().text in page
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=", outside_scripts)
    assert not re.search(r"<script[^>]*src=", page)
    for arm in ("native", "mapped", "random × 2", "shuffled"):
        assert f"</span> {arm}</td>" in page


def test_what_models_write_cannot_break_the_page(tmp_path: Path) -> None:
    from dataclasses import replace

    made = result()
    arms = tuple(replace(arm, texts=("<script>alert(1)</script>",) * 6) for arm in made.arms)
    page = write_report(replace(made, arms=arms), tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in page


def grid() -> LayerGrid:
    return layer_grid(collected(sketch=(0, 3, 7)), penalties=(0.01, 1.0))


def test_the_grid_is_drawn_source_by_target_with_its_details() -> None:
    made = grid()
    figure = plots.layer_grid(made, "fvu")
    heat, best = figure.data
    assert np.array_equal(heat.z, made.chosen("fvu")) and heat.z.shape == (3, 2)
    assert (list(heat.x), list(heat.y)) == ([1, 4], [0, 1, 2])
    assert heat.customdata[2, 1, 0] == made.chosen("r2")[2, 1]
    assert heat.customdata[2, 1, 5] == made.penalties[made.best[2, 1]]
    assert list(best.y) == [made.chosen("r2", "validation")[:, j].argmax() for j in range(2)]
    assert "standard error" in figure.layout.title.text and "60 test tokens of 30 documents" in figure.layout.title.text
    assert figure.layout.xaxis.title.text == "target layer"
    with pytest.raises(ValueError, match="metric must be one of r2, cosine"):
        plots.layer_grid(made, "r3")


def test_the_curve_is_drawn_with_its_recommendation() -> None:
    made = data_curve(rows(), tokens=[20, 144], fitters={"Ridge": Ridge(), "Identity": Identity()})
    figure = plots.data_curve(made)
    assert [(t.name, tuple(t.y)) for t in figure.data] == [(name, values) for name, values in made.r2.items()]
    assert list(figure.data[0].x) == [20, 144] and made.advice in figure.layout.title.text
    assert figure.layout.shapes[0].x0 == made.recommended


def test_grids_and_curves_are_saved_and_read_bit_by_bit(tmp_path: Path) -> None:
    made = grid()
    back = read(save(made, tmp_path / "grid.safetensors"))
    assert (back.source, back.target, back.penalties, back.sketch) == (made.source, made.target, made.penalties, 3)
    assert back.counts == made.counts
    for part, name in product(("validation", "test"), made.test):
        assert np.array_equal(getattr(back, part)[name], getattr(made, part)[name])
    assert np.array_equal(back.cka, made.cka) and np.array_equal(back.r2_error, made.r2_error)
    curve = data_curve(rows(), tokens=[20, 144])
    assert vars(read(save(curve, tmp_path / "curve.safetensors"))) == vars(curve)

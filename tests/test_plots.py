"""Figures and report say what the record says."""

import re
from pathlib import Path

import pytest
from test_persistence import result

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

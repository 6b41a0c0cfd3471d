"""Figures and report say what the record says."""

import inspect
import io
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console
from sample_layers import collected, rows
from sample_results import result

from xmodel_steer import figures as plots
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.evaluation.recovery import PatchingGrid
from xmodel_steer.figures.doses import dose_response
from xmodel_steer.figures.report import tables, write_report
from xmodel_steer.figures.style import COLOURS
from xmodel_steer.figures.texts import examples, marked
from xmodel_steer.maps.controls import Identity
from xmodel_steer.maps.curves import DataCurve, data_curve
from xmodel_steer.maps.layers import LayerGrid, layer_grid
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.recipe.arms import AGREEMENT, EFFICIENCY
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.saving import read, save


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
    (table,) = tables(result())
    assert table.row_count == len(result().arms)
    name = "sweet [/b] talk :smile:"
    (table,) = tables(replace(result(), name=name))
    output = io.StringIO()
    Console(file=output, width=150).print(table)
    assert f"{name}: small → large, n = 6" in output.getvalue()


def test_the_report_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    page = write_report(result(), tmp_path / "report.html").read_text()
    assert result().verdict().text in page
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=", outside_scripts)
    assert not re.search(r"<script[^>]*src=", page)
    for arm in ("native", "mapped", "random × 2", "shuffled"):
        assert f"</span> {arm}</td>" in page


def test_what_models_write_cannot_break_the_page(tmp_path: Path) -> None:
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


def test_sites_of_several_streams_stand_apart() -> None:
    made = grid()
    own = [
        replace(space, site=Site(1, stream))
        for space, stream in zip(made.target, ("resid_mid", "resid_post"), strict=True)
    ]
    mixed = replace(made, target=tuple(own))
    heat, best = plots.layer_grid(mixed).data
    assert list(heat.x) == list(best.x) == ["resid_mid[1]", "resid_post[1]"] and list(heat.y) == [0, 1, 2]
    frame = mixed.to_frame()
    assert list(frame.target_stream) == ["resid_mid", "resid_post"] * 3 and set(frame.source_stream) == {"resid_post"}


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


# --- texts of users and models ------------------------------------------------------------------

HOSTILE = '<img src=x onerror=alert(1)><a href="javascript:y">joy</a> [/b] :smile: $x^2$ %{x} & </script> \x1b[2J\u202e'
OURS = re.compile(r"<br>|</?sup>|<extra></extra>|%\{(x|y|z|text|customdata)(\[\d\])?(:[,.\w]+)?\}")


def hostile_result(*, signs: bool = True, mapped: bool = True, efficient: bool = False) -> Result:
    made = result()
    first = made.arms[0].effect
    arms = [arm for arm in made.arms if signs or (arm.at == "equal strength" and arm.strength >= 0)]
    arms = [
        replace(
            arm, recipe=HOSTILE, measures={HOSTILE: first} | ({EFFICIENCY: first} if efficient else {}),
            arm=arm.arm if mapped else f"{HOSTILE} {i}", texts=(HOSTILE,) * 6,
        )
        for i, arm in enumerate(arms)
    ]  # fmt: skip
    points = [
        {"trigger": kind, "prompts": n, **{measure: vars(first) for measure in ("effect", AGREEMENT)}}
        for kind in ("known", "unknown") for n in (0, 1)
    ]  # fmt: skip
    ends = {end: getattr(made, end) | {"model": HOSTILE} for end in ("source", "target")}
    tries = tuple({**one, "recipe": HOSTILE} for kind in ("target layer", "source layer") for one in tried(kind))
    return replace(
        made, name=HOSTILE, unit=HOSTILE, arms=tuple(arms), chosen={HOSTILE: made.chosen["joy"]}, validation=tries,
        curves={HOSTILE: tuple(points)}, question=HOSTILE, note=HOSTILE, prompts=(HOSTILE,) * 6, stored=(HOSTILE,), **ends,
    )  # fmt: skip


def renamed(space: Space) -> Space:
    return replace(space, model=HOSTILE)


def hostile_grid() -> LayerGrid:
    made = grid()
    return replace(made, source=tuple(map(renamed, made.source)), target=tuple(map(renamed, made.target)))


def hostile_curve() -> DataCurve:
    made = data_curve(rows(), tokens=[20, 144], fitters={HOSTILE: Ridge(), "Identity": Identity()})
    return replace(made, source=renamed(made.source), target=renamed(made.target))


def hostile_patches() -> PatchingGrid:
    made = grid_of_patches()
    spaces = tuple(map(renamed, made.sources))
    return replace(made, sources=spaces, targets=spaces, tokens=(HOSTILE, "-2", "-1"))


def hostile_scatter() -> Any:
    space = Space(HOSTILE, Site(0), 5, "f")
    native = Activations(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), space)
    return plots.mapped_scatter(native, native, SteeringVector(torch.ones(5), space, HOSTILE))


FIGURES: dict[str, Callable[[], Any]] = {
    "curve": lambda: plots.curve(hostile_result(), HOSTILE),
    "effect_by_layer": lambda: plots.effect_by_layer(hostile_result()),
    "dose_response": lambda: plots.dose_response(hostile_result()),
    "frontier": lambda: plots.frontier(hostile_result()),
    "mapped_scatter": hostile_scatter,
    "vector_geometry": lambda: plots.vector_geometry({HOSTILE: vectors_at((2, 0), -3.0)}, vectors_at((0, 1, 2), 1.0)),
    "data_curve": lambda: plots.data_curve(hostile_curve()),
    "layer_grid": lambda: plots.layer_grid(hostile_grid()),
    "patching": lambda: plots.patching(hostile_patches()),
    "overview": lambda: plots.overview(hostile_result(signs=False)),
    "overview of maps": lambda: plots.overview(hostile_result(signs=False, mapped=False)),
    "overview of efficiencies": lambda: plots.overview(hostile_result(signs=False, efficient=True)),
}


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_lets_a_name_be_markup(name: str) -> None:
    texts = [OURS.sub(" ", text) for text in strings(json.loads(FIGURES[name]().to_json()))]
    for text in texts:
        assert not re.search(r"[<>$\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]|%\{", text), text
        assert not re.search(r"&(?!(lt|gt|amp|#36|#123);)", text), text
    assert any("&lt;img" in text for text in texts), "the name is shown"


def test_every_public_figure_is_given_a_hostile_name() -> None:
    others = {"summary", "tables", "write_report", "show_alignment", "show_projection"}
    public = {name for name, value in vars(plots).items() if inspect.isfunction(value)}
    assert public - others == {name.split()[0] for name in FIGURES}


@pytest.mark.parametrize("signs", [True, False])
def test_no_name_is_markup_in_the_report_or_a_table(signs: bool, tmp_path: Path) -> None:
    made = hostile_result(signs=signs)
    page = write_report(made, tmp_path / "report.html").read_text()
    assert "<img" not in page and "<a " not in page and page.count("</script>") == 1 and "&lt;img" in page
    assert "\x1b" not in page and "\u202e" not in page and "\\x1b[2J\\u202e" in page
    for markup in (True, False):
        output = io.StringIO()
        Console(file=output, width=2000, markup=markup).print(*tables(made))
        shown = output.getvalue()
        assert (
            shown.count("[/b] :smile:") >= 2
            and "\\x1b[2J\\u202e" in shown
            and "\x1b" not in shown
            and "\u202e" not in shown
        )


# --- the other figures --------------------------------------------------------------------------


def test_the_frontier_draws_every_arm_along_its_kl() -> None:
    made = result()
    figure = plots.frontier(made)
    paths = [t for t in figure.data if t.mode == "lines+markers"]
    fair = [t for t in figure.data if t.mode == "markers"]
    assert [t.name for t in paths] == ["native", "mapped", "random", "shuffled"]
    for path, points in zip(paths, fair, strict=True):
        arms = [made.arm(path.name, -1.0), made.arm("unsteered", 0), made.arm(path.name, 1.0)]
        assert list(path.x) == [a.kl for a in arms]
        assert list(path.y) == [a.effect.value for a in arms]
        equal = [made.at_equal_kl(path.name, s) for s in "-+"]
        assert (list(points.x), list(points.y)) == ([a.kl for a in equal], [a.effect.value for a in equal])
        assert path.line.color == points.marker.color == COLOURS[path.name]
    assert "nats per token" in figure.layout.xaxis.title.text


def tried(kind: str, recipe: str = "joy", count: int = 3) -> list[dict[str, Any]]:
    return [
        {"recipe": recipe, "varied": kind, "layer": i, "score": 0.1 * i, "perplexity_ratio": 1.2} for i in range(count)
    ]


def test_the_choice_of_layers_is_drawn_as_validation_measured_it() -> None:
    made = replace(result(), validation=(*tried("target layer"), *tried("source layer")))
    target, source = plots.effect_by_layer(made).data
    for line, end in ((target, made.target), (source, made.source)):
        assert list(line.x) == [0, 1, 2] and list(line.y) == [0.0, 0.1, 0.2]
        assert list(line.text) == ["× 1.20"] * 3
        assert [i for i, size in enumerate(line.marker.size) if size > 10] == [end["layer"]]  # the layer that was taken
    assert (target.xaxis, source.xaxis) == ("x", "x2")
    with pytest.raises(ValueError, match="one layer of each model was given, nothing was compared"):
        plots.effect_by_layer(result())


def test_a_stack_is_apart_from_the_line_of_single_layers() -> None:
    """A stack whose deepest layer was also tried alone hides neither, and no line leads to it."""
    records = [{**r, "site": f"resid_post[{r['layer']}]"} for r in tried("source layer", count=3)]
    records.append({**records[2], "site": "resid_post[0+2]", "score": 0.7})
    made = replace(result(), validation=tuple(records))
    for taken, large in (({}, 1), ({"source_site": "resid_post[0+2]", "source_layer": 2}, 4)):
        (line,) = plots.effect_by_layer(
            replace(made, chosen={"joy": {**made.choice("joy"), "source_layer": 1, **taken}})
        ).data
        assert list(line.x) == [0, 1, 2, None, 2] and list(line.y)[-1] == 0.7 and not line.connectgaps
        assert [*line.marker.symbol][-1] == "diamond" and set(line.marker.symbol[:3]) == {"circle"}
        assert [i for i, size in enumerate(line.marker.size) if size > 10] == [large]


def test_every_recipe_has_a_line_over_the_layers() -> None:
    made = replace(result(), validation=(*tried("target layer", "a"), *tried("target layer", "b", 2)))
    lines = plots.effect_by_layer(made).data
    assert [(line.name, len(line.x)) for line in lines] == [("a", 3), ("b", 2)]
    assert len({line.line.color for line in lines}) == 2


def test_the_overview_fits_what_a_result_has() -> None:
    made = result()
    fixed = tuple(arm for arm in made.arms if arm.at == "equal strength" and arm.strength >= 0)
    assert plots.overview(made).layout.title.text == plots.dose_response(made).layout.title.text
    study = plots.overview(replace(made, arms=fixed))
    assert {trace.name for trace in study.data} == {"native", "mapped", "random", "shuffled"}
    maps = plots.overview(replace(made, arms=tuple(replace(a, arm=f"map {i}") for i, a in enumerate(fixed))))
    assert "map 1" in list(maps.data[-1].y)


def test_texts_are_listed_next_to_the_unsteered_ones() -> None:
    made = replace(result(), prompts=tuple(f"prompt  {i}" for i in range(6)))
    lines = examples(made, 2)
    assert len(lines) == 6 and lines[0] == "prompt 0"
    assert lines[1].strip() == "unsteered: text 0 ∆" and lines[2].strip() == "mapped: text 0 ∆"


def vectors_at(layers: tuple[int, ...], factor: float) -> list[SteeringVector]:
    scale = torch.tensor([1.0, 2.0])
    return [
        SteeringVector(factor * torch.tensor([1.0, float(layer)]), Space("m", Site(layer), 2, "f"), scale=scale)
        for layer in layers
    ]


def test_norms_and_cosines_are_those_of_the_vectors() -> None:
    figure = plots.vector_geometry({"mapped": vectors_at((2, 0), -3.0)}, vectors_at((0, 1, 2), 1.0))
    panels = {(t.name, t.yaxis): t for t in figure.data}
    norms, cosines = panels["mapped", "y"], panels["mapped", "y2"]
    assert list(norms.x) == [0, 2]
    assert list(norms.y) == pytest.approx([3.0, 3 * 2**0.5])
    assert list(cosines.y) == pytest.approx([-1.0, -1.0])
    assert list(panels["reference", "y2"].y) == pytest.approx([1.0] * 3)


def grid_of_patches() -> PatchingGrid:
    spaces = tuple(Space("m", Site(i), 2, "f") for i in range(2))
    mapped = np.array([[[np.nan, 0.2, 0.4], [np.nan, 0.5, 1.2]], [[np.nan, 0.4, 0.4], [np.nan, 0.7, np.nan]]])
    return PatchingGrid(
        spaces, spaces, ("-3", "-2", "-1"), {"own": np.ones((2, 2, 3)), "mapped": mapped}, np.ones(2), np.zeros(2)
    )


def test_patches_are_drawn_beside_their_ceiling_on_one_scale() -> None:
    figure = plots.patching(grid_of_patches())
    own, mapped = figure.data
    assert np.allclose(mapped.z, [[np.nan, 0.3, 0.4], [np.nan, 0.6, 1.2]], equal_nan=True)
    assert (own.z == 1).all()
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1.2, 1.2)
    assert "2 pairs of prompts" in figure.layout.title.text
    named = plots.patching(replace(grid_of_patches(), tokens=("-3 <s>", "-2 a", "-1 b")))
    assert named.layout.xaxis.ticktext[0] == "-3 &lt;s&gt;"


def test_the_plane_is_that_of_the_native_rows_and_a_perfect_map_lies_on_it() -> None:
    rng = torch.Generator().manual_seed(0)
    space = Space("m", Site(0), 5, "f")
    values = torch.randn(40, 5, generator=rng) * torch.tensor([100.0, 1, 1, 1, 1]) + 7
    native = Activations(values, space)
    figure = plots.mapped_scatter(native, native, SteeringVector(torch.ones(5), space, "joy"))
    own, image = figure.data
    assert np.allclose(own.x, image.x)
    standard = ((values - values.mean(0)) / values.std(0, correction=0)).double().numpy()
    top = np.linalg.eigh(standard.T @ standard)[1][:, -1]
    assert np.allclose(np.abs(own.x), np.abs(standard @ top), atol=1e-4)  # not the one huge dimension
    assert figure.layout.annotations[0].text == "joy"
    with pytest.raises(ValueError, match="needs the same rows of both, got 39 and 40"):
        plots.mapped_scatter(Activations(values[:39], space), native)


def test_words_that_the_other_text_lacks_are_marked() -> None:
    assert marked("a good day <b>", "a bad day <b>") == "a <mark>good</mark> day &lt;b&gt;"
    assert marked("same", "same") == "same"
    text = "one two three four"
    assert re.sub("</?mark>", "", marked(text, "four three two one")) == text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install one (Debian: apt-get install chromium) and run again"
)
def test_every_figure_and_the_report_draw_in_a_real_browser(tmp_path: Path) -> None:
    """The page's own count of drawn figures, and a picture that is not empty."""
    made = replace(result(), validation=(*tried("target layer"), *tried("source layer")))
    space = Space("m", Site(0), 5, "f")
    points = Activations(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), space)
    figures = [
        plots.dose_response(made), plots.frontier(made), plots.effect_by_layer(made), plots.layer_grid(grid()),
        plots.data_curve(data_curve(rows(), tokens=[20, 144])), plots.patching(grid_of_patches()),
        plots.vector_geometry({"mapped": vectors_at((2, 0), -3.0)}, vectors_at((0, 1, 2), 1.0)),
        plots.mapped_scatter(points, points),
    ]  # fmt: skip
    script = """<script>window.errors = 0; window.addEventListener('error', () => window.errors++);
      window.addEventListener('load', () => setTimeout(() => { document.title =
      document.querySelectorAll('.main-svg').length + ' drawn, ' + window.errors + ' errors'; }, 1500));</script>"""
    pages = {
        "figures": script + "".join(f.to_html(full_html=False, include_plotlyjs=not i) for i, f in enumerate(figures))
    }
    pages["report"] = write_report(made, tmp_path / "r.html").read_text().replace("<head>", "<head>" + script)
    for name, least in (("figures", len(figures)), ("report", 3)):
        page = tmp_path / f"{name}.html"
        page.write_text(pages[name])
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
                   "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,4200",
                   "--virtual-time-budget=15000"]  # fmt: skip
        dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=180)
        title = re.search(r"<title>(\d+) drawn, (\d+) errors</title>", dom.stdout)
        assert title, dom.stderr[-500:]
        assert int(title[1]) >= least
        assert int(title[2]) == 0
        picture = tmp_path / f"{name}.png"
        subprocess.run(
            [*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=180, check=True
        )
        assert picture.stat().st_size > 100_000  # an empty page of this size has under 25,000 bytes


def test_the_notebook_extra_brings_what_shows_figures_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly draws in a notebook by IPython and nbformat, and installs neither."""
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {Requirement(own).name for own in extras["notebook"]} == {"ipywidgets", "anywidget", "nbformat"}
    assert "ipython" in {Requirement(own).name for own in metadata.requires("ipywidgets") or []}
    shown: list[object] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    figure = dose_response(result())
    figure.show(renderer="plotly_mimetype")
    assert shown and "application/vnd.plotly.v1+json" in shown[0]  # type: ignore[operator]
    monkeypatch.setattr("plotly.io._renderers.nbformat", None)
    with pytest.raises(ValueError, match="nbformat"):
        figure.show(renderer="plotly_mimetype")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_figure_is_written_as_an_image(tmp_path: Path) -> None:
    """The extra ``figures`` brings what Plotly needs for it."""
    pytest.importorskip("kaleido", reason="pip install -e '.[figures]'")
    plots.patching(grid_of_patches()).write_image(tmp_path / "patches.png")
    assert (tmp_path / "patches.png").read_bytes().startswith(b"\x89PNG")

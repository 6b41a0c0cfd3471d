"""Progress bars: silenced by one context, joined by another."""

from collections.abc import Callable

import pytest
import toys

import xmodel_steer as xs
from xmodel_steer.core import bars


@pytest.fixture(autouse=True)
def _shown():
    """Draw bars, whatever the session says."""
    token = bars._silent.set(False)
    yield
    bars._silent.reset(token)


def work(title: str = "carry") -> None:
    with bars.progress_bar(2, unit="text", desc=title, delay=0) as bar:
        bar.update()
        bar.update()


def test_a_bar_shows_its_title_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    assert "carry: 100%" in capsys.readouterr().err


def test_quiet_silences_every_bar_within_and_none_behind(capsys: pytest.CaptureFixture[str]) -> None:
    with bars.quiet():
        work()
        with bars.quiet(False):  # an inner progress=True does not undo an outer one
            work()
    assert capsys.readouterr().err == ""
    work()
    assert "carry" in capsys.readouterr().err


@pytest.mark.parametrize("progress", [True, False])
def test_progress_of_a_verb_governs_all_that_it_calls(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    @bars.with_progress
    def verb(*, progress: bool = True) -> None:
        work("inner")

    verb(progress=progress)
    assert ("inner" in capsys.readouterr().err) is progress


def test_stages_are_one_bar_that_names_the_stage_and_what_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    with bars.stages("transfer", 2) as begin:
        begin("collect")
        work("texts")
        begin("measure")
        work("answers")
    shown = capsys.readouterr().err
    assert "transfer: 100%" in shown and "2/2" in shown
    assert "measure" in shown
    assert "texts: 100%" not in shown  # no bar of its own


def test_bars_obey_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = "sweet {bar} \x1b[2J\u202e\n\rtalk"
    work(name)
    bars.tell(name)
    with bars.stages(name, 2) as begin:
        begin(name)
        work(name)
        with bars.stages(name, 1) as inner:
            inner(name)
    shown = capsys.readouterr().err
    assert not any(character in shown for character in ("\x1b[2J", "\u202e", "\rtalk"))
    assert shown.count(r"sweet {bar} \x1b[2J\u202e\n\rtalk") > 5
    assert "sweet {bar} \\x1b[2J\\u202e\n\\rtalk" in shown, "a line that is told may have line ends"


def test_stages_within_stages_keep_the_outer_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with bars.stages("study", 1) as begin:
        begin("concepts")
        with bars.stages("transfer", 5) as inner:
            inner("collect")
    shown = capsys.readouterr().err
    assert "study: 100%" in shown and "transfer:" not in shown


def test_a_models_verb_is_silent_when_told(
    toy_named: Callable[[str], toys.Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    xs.generate(toy_named("llama").model, ["a b"], max_new_tokens=1, progress=False)
    assert capsys.readouterr().err == ""

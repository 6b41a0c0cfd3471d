"""Where runs are written, and how they are shown."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from xmodel_steer.core.errors import ArtifactError, PromptError, XModelSteerError


def in_a_line(error: Exception) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, XModelSteerError):
        return text
    return f"{type(error).__name__}: {text[:400]} (run xmodel-steer --debug ... for the traceback)"


UNFINISHED = "unfinished"  # in the folder of a study that was cut off


def with_command(found: Any) -> Any:
    """Return the study with the command that repeats it."""
    import shlex
    from dataclasses import replace

    return replace(found, command=shlex.join(["xmodel-steer", *sys.argv[1:]]))


def show_study(found: Any, kept: Path, folder: Path) -> None:
    """Draw and print a study whose record is written."""
    from xmodel_steer.studies.pages import write_page

    shown(kept, folder, "", lambda: write_page(found, kept), lambda: print_study(found))


def saved(save: Callable[[Path], object], folder: Path) -> Path:
    """Write what a run has found; where its place cannot be written any more, into a temporary folder.

    Returns:
        The folder that it was written to.
    """
    try:
        save(folder)
    except ArtifactError as error:
        spare = Path(tempfile.mkdtemp(prefix="xmodel-steer-")) / folder.name
        try:
            save(spare)
        except ArtifactError:
            raise error from None
        print(f"warning: {in_a_line(error)}; the run was written to {spare}", file=sys.stderr)
        return spare
    return folder


def shown(kept: Path, folder: Path, files: str, draw: Callable[[], object], show: Callable[[], object]) -> None:
    """Draw the report of a run that is on the disk, and print it. What fails here loses nothing; it is exit code 1.

    Args:
        kept: The folder of the run.
        folder: The folder that it was to be in.
        files: What is written beside ``result.json`` and the report.
        draw: Writes the report.
        show: Prints the run.
    """
    failed = kept != folder
    drawn = ""
    try:
        draw()
        drawn = ", report.html"
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        failed = True
        print(f"warning: the report could not be drawn: {in_a_line(error)}", file=sys.stderr)
    try:
        show()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        failed = True
        print(f"warning: the table could not be printed: {in_a_line(error)}", file=sys.stderr)
    print(f"\nwritten: {kept}/result.json{drawn}{files}")
    if failed:
        print(f"the run is whole in {kept}; xmodel-steer show {kept} prints it", file=sys.stderr)
        raise typer.Exit(1)


def print_study(found: Any) -> None:
    """Every arm, a few texts and the verdict."""
    from xmodel_steer.studies.pages import tables

    console = console_of()
    for table in tables(found):
        console.print(table)
    for line in found.examples():
        console.print(line)
    for part in found.verdict.split("; "):
        console.print(part, style="bold")


def console_of() -> Any:
    """Make a console that is as wide as the tables need."""
    from rich.console import Console

    # The file is named for its encoding, by which rich draws boxes that it has.
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    console.width = max(console.width, 110)
    return console


def require_study_place(folder: Path) -> None:
    """Refuse a place that the study could not be written to, before the work is done."""
    from xmodel_steer.studies import is_study

    foreign = folder.is_dir() and any(file.name != UNFINISHED for file in folder.iterdir()) and not is_study(folder)
    if foreign or (folder.exists() and not folder.is_dir()):
        raise PromptError(f"{folder}: exists and holds no study; choose another --out")
    make_parent(folder)


def finish(result: Any, folder: Path) -> None:
    """Write a run, then its report, and then print it."""
    from xmodel_steer.figures.report import write_report
    from xmodel_steer.recipe.saving import save

    kept = saved(lambda place: save(result, place), folder)
    files = ", generations.jsonl, vectors/, map.safetensors"
    shown(kept, folder, files, lambda: write_report(result, kept / "report.html"), lambda: print_result(result))


def print_result(result: Any) -> None:
    """Print the table, a summary and the verdict of a result."""
    from xmodel_steer.figures.report import summary, table

    console = console_of()
    console.print(table(result))
    for line in summary(result):
        console.print(line, style="dim")
    console.print(result.verdict().text, style="bold")


def require_writable(folder: Path) -> None:
    """Refuse a place that the run could not be written to, before the work is done."""
    from xmodel_steer.recipe.saving import may_hold_run

    if not may_hold_run(folder):
        raise PromptError(f"{folder}: exists and is not a run folder; choose another --out")
    make_parent(folder)


def make_parent(path: Path, option: str = "--out") -> None:
    """Make the folder that a path lies in, and try to write there."""
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise PromptError(f"{path}: cannot be made ({error.strerror}); choose another {option}") from None

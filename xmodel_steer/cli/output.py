"""Writing and printing of runs."""

import sys
from pathlib import Path
from typing import Any

import typer

from xmodel_steer.core.errors import XModelSteerError
from xmodel_steer.core.texts import redacted, visible


def say(line: str, *, error: bool = False) -> None:
    """Print a line to standard output or error, control characters as escapes."""
    print(visible(line, lines=True), file=sys.stderr if error else sys.stdout)


def debugging() -> bool:
    """Tell whether tracebacks were asked for."""
    return "--debug" in sys.argv


def in_a_line(error: Exception) -> str:
    """Return an error as one line, without passwords in URLs and tokens in headers."""
    text = redacted(" ".join(str(error).split()))
    if isinstance(error, XModelSteerError):
        return text
    return f"{type(error).__name__}: {text[:400]} (add --debug for the traceback)"


def with_command(result: Any) -> Any:
    """Return a result with the command that repeats it."""
    import shlex
    from dataclasses import replace

    return replace(result, command=shlex.join(["xmodel-steer", *sys.argv[1:]]))


def finish(result: Any, folder: Path) -> None:
    """Write a run, then its report, and then print it.

    A failure after the writing loses nothing; it is exit code 1.
    """
    from xmodel_steer.figures.report import write_report
    from xmodel_steer.recipe.saving import save_or_spare

    kept = save_or_spare(with_command(result), folder)
    failed = kept != folder
    drawn = ""
    for work, what in (
        (lambda: write_report(result, kept / "report.html"), "the report could not be drawn"),
        (lambda: print_result(result), "the table could not be printed"),
    ):
        try:
            work()
        except Exception as error:
            if debugging():
                raise
            failed = True
            say(f"warning: {what}: {in_a_line(error)}", error=True)
    drawn = ", report.html" if (kept / "report.html").is_file() else ""
    say(f"\nwritten: {kept}/result.json{drawn}, generations.jsonl, vectors/, maps/")
    if failed:
        say(f"the run is whole in {kept}; xmodel-steer show {kept} prints it", error=True)
        raise typer.Exit(1)


def print_result(result: Any) -> None:
    """Print the tables, a summary, a few texts and the conclusions of a result."""
    from rich.text import Text

    from xmodel_steer.figures.report import summary, tables
    from xmodel_steer.figures.texts import examples
    from xmodel_steer.recipe.words import sentences

    console = console_of()
    for table in tables(result):
        console.print(table)
    for lines, style in (
        (summary(result), "dim"),
        (examples(result), ""),
        (sentences(result), "bold"),
        (result.conclusions, ""),
        (result.doubts, "yellow"),
    ):
        for line in lines:
            console.print(Text(visible(line), style))


def console_of(least: int = 110) -> Any:
    """Make a console that is as wide as the tables need: ``least`` columns."""
    from rich.console import Console

    # The file is named for its encoding, by which rich draws boxes that it has.
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    console.width = max(console.width, least)
    return console


def claim_run(folder: Path) -> None:
    """Refuse a place that the run could not be written to.

    Call it before the work is done.
    """
    from xmodel_steer.files.claiming import claim
    from xmodel_steer.recipe.saving import UNFINISHED

    claim(folder, "Result", also={UNFINISHED})

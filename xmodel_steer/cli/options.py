"""Options of several commands, and readers of their values."""

from pathlib import Path
from typing import Annotated, Any

import typer

Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu. Default: CUDA if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto (bfloat16 where it is faster).")]
# The concepts that ship with the package, of which the last three have no scorer; --help must not wait for their texts.
CONCEPTS = (
    "sentiment, first-person, tense, french, questions, formality, anger, politeness, shouting, numbers, dialogue, "
    "sycophancy, corrigibility, survival-instinct"
)
READ = CONCEPTS.removesuffix(", sycophancy, corrigibility, survival-instinct")
Out = Annotated[Path | None, typer.Option(help="Run folder to write. An older run there is replaced.")]


def shard_of(text: str) -> tuple[int, int]:
    """Read a shard ``I/N`` as its number and the total."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise typer.BadParameter(f"{text!r} is not I/N, with I from 0 to N - 1", param_hint="--shard")
    return int(part), int(parts)


def layers_of(text: str, option: str) -> Any:
    """Read ``all``, or a list of layers as sites."""
    return "all" if text == "all" else sites_of(text, option)


def pairs_of(text: str | None) -> list[tuple[Any, Any]] | None:
    """Read a list of layer pairs such as ``15:10`` as pairs of sites."""
    from xmodel_steer.core.spaces import Site

    if text is None:
        return None
    try:
        return [(Site(int(a)), Site(int(b))) for a, b in (item.split(":") for item in text.split(","))]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layer pairs such as 15:10", param_hint="--pairs") from None


def names_of(text: str) -> tuple[str, ...]:
    """Read a list of names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers_of(text: str, option: str) -> list[float]:
    """Read a list of numbers."""
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2", param_hint=option) from None


def sites_of(text: str | None, option: str) -> list[Any]:
    """Read layers, and layers to read together such as ``9+12``, as sites."""
    from xmodel_steer.core.spaces import as_site

    try:
        groups = [[int(layer) for layer in item.split("+")] for item in text.split(",")] if text else []
        return [as_site(group if group[1:] else group[0]) for group in groups]
    except ValueError:
        problem = f"{text!r} is not a list of layers such as 9,12 or, to read two together, 9+12"
        raise typer.BadParameter(problem, param_hint=option) from None


def scorer_of(text: str) -> Any:
    """Read the name of a scorer, with its argument."""
    from xmodel_steer.evaluation.scorers.languages import Language
    from xmodel_steer.evaluation.scorers.phrases import Contains, Matches
    from xmodel_steer.studies.concepts import concept

    name, _, argument = text.partition(":")
    try:
        if text in READ.split(", "):
            return concept(text).scorer
        if argument and name in ("contains", "matches", "language"):
            return {"contains": lambda a: Contains((a,)), "matches": Matches, "language": Language}[name](argument)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--score") from None
    raise typer.BadParameter(
        f"{text!r} is not {READ}, contains:STRING, matches:REGEX or language:NAME",
        param_hint="--score",
    )

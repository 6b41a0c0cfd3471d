"""The commands `transfer` and `show`."""

from pathlib import Path
from typing import Annotated

import typer

from xmodel_steer.cli.app import app, reported
from xmodel_steer.cli.options import Device, Dtype, numbers_of, scorer_of, sites_of
from xmodel_steer.cli.output import finish, print_result, print_study, require_writable
from xmodel_steer.core.errors import ArtifactError, PromptError, XModelSteerError


@app.command()
@reported
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
        typer.Option(
            help="Reads the behaviour in a text: a concept such as sentiment or tense, contains:STRING, matches:REGEX or language:NAME."
        ),
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
    from xmodel_steer.activations.cached import cached_moments
    from xmodel_steer.files.readers import read_contrast, read_prompts
    from xmodel_steer.models.facts import context_length
    from xmodel_steer.models.loading import load
    from xmodel_steer.recipe.carrying import default_sites, hold_out_neutral
    from xmodel_steer.recipe.carrying import transfer as run

    if tokens not in ("last", "mean", "all"):
        raise typer.BadParameter("must be last, mean or all", param_hint="--tokens")
    doses = numbers_of(strengths, "--strengths", float)
    if 0 in doses or not any(s > 0 for s in doses):
        raise typer.BadParameter("must have a positive strength and not 0", param_hint="--strengths")
    if (prompts is None) != (score is None):
        raise typer.BadParameter("go together", param_hint="--prompts / --score")
    given_sources, given_targets = (
        sites_of(own, f"--{end}-layers") for end, own in (("source", source_layers), ("target", target_layers))
    )
    scorer = scorer_of(score) if score else None
    contrast_set, texts = read_contrast(contrast), read_prompts(text)
    items = read_prompts(prompts) if prompts else None
    require_writable(out)
    small = load(source, device=device, dtype=dtype)
    large = load(target, device=device, dtype=dtype)
    source_sites = given_sources or default_sites(small, "source")
    target_sites = given_targets or default_sites(large, "target")
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
        map_texts,
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
    finish(result, out)


@app.command()
@reported
def show(run: Annotated[Path, typer.Argument(help="A run folder, or a study's.")]) -> None:
    """Print the table and the verdict of a run folder or of a study."""
    from xmodel_steer.recipe.saving import read
    from xmodel_steer.studies import is_study, read_study

    if not run.is_dir():
        raise PromptError(f"{run}: no such run folder")
    try:
        if is_study(run):
            print_study(read_study(run))
        else:
            print_result(read(run))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, XModelSteerError):
            raise
        raise ArtifactError(f"{run}: is damaged or incomplete ({type(error).__name__}: {error})") from error

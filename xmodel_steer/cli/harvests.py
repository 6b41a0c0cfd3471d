"""The commands `harvest` and `merge`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xmodel_steer.cli.app import app, reported
from xmodel_steer.cli.options import Device, Dtype, layers_of, pairs_of, shard_of
from xmodel_steer.cli.output import say
from xmodel_steer.core.errors import PromptError


@app.command()
@reported
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
    store_dtype: Annotated[str, typer.Option(help="Type of the stored values: float32, bfloat16, or model.")] = "model",
    shard: Annotated[
        str,
        typer.Option(
            help="I/N, I from 0 to N - 1: one of N shares of the text, for one of N jobs. torchrun sets it by itself."
        ),
    ] = "0/1",
    seed: Annotated[int, typer.Option(help="Seed of the split and of the shuffled control.")] = 0,
    device: Device = None,
    device_map: Annotated[str | None, typer.Option(help="auto: spread a model over all GPUs.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Read general text with both models once: collect moments, or store activations.

    On several GPUs or machines: torchrun --nproc-per-node N -m xmodel_steer harvest ... As jobs of a cluster:
    --shard I/N each, then xmodel-steer merge. The same command resumes an interrupted store.
    """
    import torch

    from xmodel_steer.activations.collecting import collect_moments
    from xmodel_steer.activations.distributed import all_reduced, process_group, require_same_texts
    from xmodel_steer.activations.harvesting import harvest as write_store
    from xmodel_steer.files.claiming import claim
    from xmodel_steer.files.readers import read_prompts
    from xmodel_steer.models.loading import load

    if (moments is None) == (store is None):
        raise typer.BadParameter("give either --moments FILE or --store FOLDER", param_hint="--moments / --store")
    if (source is None and target is None) or (moments is not None and (source is None or target is None)):
        raise typer.BadParameter("moments need both models, a store at least one", param_hint="--source / --target")
    if store is not None and (pairs is not None or sketch is not None):
        raise typer.BadParameter("go with --moments", param_hint="--pairs / --sketch")
    if moments is not None:
        if store_dtype != "model":
            raise typer.BadParameter("goes with --store", param_hint="--store-dtype")
        claim(moments, "Moments")  # before the text is read, not after
    part, parts = shard_of(shard)
    source_sites, target_sites = (
        layers_of(layers, f"--{end}-layers") for end, layers in (("source", source_layers), ("target", target_layers))
    )
    layer_pairs = pairs_of(pairs)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with process_group(where) as (rank, size):
        if size > 1:
            if parts > 1:
                raise typer.BadParameter("torchrun splits the text by itself", param_hint="--shard")
            part, parts = rank, size
            where = f"{where}:{torch.cuda.current_device()}" if where == "cuda" else where
        texts = read_prompts(text)
        require_same_texts(texts)
        quiet = rank > 0
        settings: dict[str, Any] = dict(max_tokens=max_tokens, batch_size=batch_size, seed=seed, shard=(part, parts))

        def model_of(name: str) -> Any:
            return load(
                name, device=None if device_map else where, device_map=device_map, dtype=dtype, progress=not quiet
            )

        if store is not None:
            for end, name, sites in (("source", source, source_sites), ("target", target, target_sites)):
                if name is not None:
                    # A model is freed before the next one is loaded: one at a time fits.
                    write_store(model_of(name), texts, store, end=end, sites=sites, dtype=store_dtype, **settings)
            if rank == 0:
                say(f"written: {store}")
            return
        small, large = model_of(str(source)), model_of(str(target))
        collected = collect_moments(
            small, large, texts, source_sites=source_sites, target_sites=target_sites, pairs=layer_pairs, sketch=sketch,
            device=where, progress=not quiet, **settings,
        )  # fmt: skip
        collected = all_reduced(collected) if size > 1 else collected
        if rank == 0:
            assert moments is not None
            _save(collected, moments)


def _save(moments: Any, file: Path) -> None:
    """Save moments, and say how much text they hold."""
    from xmodel_steer.recipe.saving import save

    save(moments, file)
    say(
        f"written: {file}: {moments.tokens:,} tokens of {moments.documents:,} documents, coverage {moments.coverage:.0%}"
    )


@app.command()
@reported
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files of moments, one of each shard.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    partial: Annotated[bool, typer.Option("--partial", help="Merge although shards are missing.")] = False,
) -> None:
    """Add up the moments that separate jobs collected from shards, in any order."""
    from xmodel_steer.maps.moments import Moments, dealt_to
    from xmodel_steer.maps.moments import merge as add_up
    from xmodel_steer.recipe.saving import read

    def moments_of(file: Path) -> Moments:
        content = read(file)
        if not isinstance(content, Moments):
            raise PromptError(f"{file}: holds a {type(content).__name__}, not moments")
        return content

    total = add_up(moments_of(file) for file in files)
    missing = sorted({f"{i}/{n}" for n in dealt_to(total.shards) for i in range(n)} - set(total.shards))
    if missing and not partial:
        raise PromptError(f"merge: shard {', '.join(missing[:8])} is missing; give its file too, or --partial")
    _save(total, out)

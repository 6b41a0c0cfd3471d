"""The command `export`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from xmodel_steer.cli.app import app, reported
from xmodel_steer.cli.options import Dtype
from xmodel_steer.cli.output import say
from xmodel_steer.core.errors import ArtifactError


@dataclass(frozen=True)
class Leaving:
    """A run's vector on its way to another program: `Intervention` values, and a function that loads their model."""

    steps: list[Any]
    ablate: bool
    out: Path
    load: Callable[[], tuple[Any, Any]]
    layers: int | None = None


def _require_adding(leaving: Leaving, who: str) -> None:
    if leaving.ablate:
        raise typer.BadParameter(f"{who} can only add; use --to baked", param_hint="--ablate")


def _gguf(leaving: Leaving) -> str:
    from xmodel_steer.interop.control_vectors import write_control_vector

    _require_adding(leaving, "llama.cpp")
    write_control_vector([step.operator.strength * step.vector for step in leaving.steps], leaving.out)
    return f"llama-server -m MODEL.gguf --control-vector {leaving.out}"


def _vllm(leaving: Leaving) -> str:
    from xmodel_steer.interop.vllm import write_vllm_vector

    _require_adding(leaving, "the vLLM plugin")
    strength = leaving.steps[0].operator.strength  # all members of a stack have the run's
    write_vllm_vector([step.vector for step in leaving.steps], leaving.out, strength=strength, layers=leaving.layers)
    return f"HOTWIRE_VECTORS={leaving.out}; the request's vllm_xargs are in {leaving.out}.json"


def _baked(leaving: Leaving) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    from xmodel_steer.interop.baking import bake
    from xmodel_steer.interop.writers import probe_texts

    if leaving.out.exists() and any(leaving.out.iterdir()):
        raise ArtifactError(f"{leaving.out}: is not empty; give a new folder")
    hf, tokenizer = leaving.load()
    baked = bake(hf, leaving.steps, everywhere=leaving.ablate)
    baked.save_pretrained(leaving.out)
    tokenizer.save_pretrained(leaving.out)
    again = AutoModelForCausalLM.from_pretrained(leaving.out, dtype=hf.dtype).eval()
    with torch.no_grad():
        first, second = (model(**probe_texts(hf), use_cache=False).logits for model in (baked, again))
    if not torch.equal(first, second):
        raise ArtifactError(f"{leaving.out}: loads with other logits than were saved; do not use it")
    return f"{baked.config.xmodel_steer}, the same after reloading\nAutoModelForCausalLM.from_pretrained({str(leaving.out)!r})"


def _adapter(leaving: Leaving) -> str:
    from xmodel_steer.interop.baking import write_adapter

    folder = write_adapter(leaving.load()[0], leaving.steps, leaving.out, everywhere=leaving.ablate)
    said = (folder / "xmodel_steer.json").read_text(encoding="utf-8")
    return f"{said}\nPeftModel.from_pretrained(model, {str(folder)!r})"


#: Each writes the file or folder of a format, and says how it is used.
FORMATS: dict[str, Callable[[Leaving], str]] = {"gguf": _gguf, "vllm": _vllm, "baked": _baked, "adapter": _adapter}


@app.command()
@reported
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option(help="File (gguf, vllm) or folder to write.")],
    vector: Annotated[str, typer.Option(help="Vector of the run: mapped, native, or 'RECIPE: mapped'.")] = "mapped",
    strength: Annotated[float | None, typer.Option(help="Default: the strength that validation chose.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Remove the direction everywhere instead.")] = False,
    model: Annotated[
        str | None, typer.Option(help="The target, where its name in the run does not lead to it.")
    ] = None,
    dtype: Dtype = "float32",
) -> None:
    """Write a run's vector for a program that lacks this library.

    gguf is llama.cpp's control vector, vllm a tensor for the plugin hotwire-vllm, baked the target with the steering in
    its weights, adapter a LoRA adapter. All act at every token.
    """
    from xmodel_steer.interventions.operators import Ablate, Add
    from xmodel_steer.interventions.steps import Intervention
    from xmodel_steer.recipe.saving import read

    if to not in FORMATS:
        raise typer.BadParameter(f"must be {', '.join(FORMATS)}", param_hint="--to")
    result = read(run)
    held = getattr(result, "vectors", {})  # a file that is no run has none
    if vector not in held:
        raise ArtifactError(f"{run}: has no vector {vector!r}; --vector takes {', '.join(held)}")
    positions = result.spec.get("positions", "all")
    if positions != "all" and strength is None and not ablate:
        raise ArtifactError(
            f"{run}: steered at positions {positions!r}, and an export acts at every token, where the strength that "
            "validation chose was not tried; give --strength, or steer with steering_hf"
        )
    chosen = result.chosen.get(vector.rpartition(": ")[0]) or next(iter(result.chosen.values()), {})
    if strength is None and not ablate and not str(chosen.get("operator", "")).startswith("Add"):
        raise ArtifactError(f"{run}: did not choose a strength to add; give --strength, or --ablate")
    operator = Ablate() if ablate else Add(chosen["strength"] if strength is None else strength)
    carried = held[vector]
    members = [carried] if ablate else carried.members()

    def load() -> tuple[Any, Any]:
        return _plain(model or carried.space.model, dtype)

    steps = [Intervention(member, operator) for member in members]
    layers = result.target.get("layers") if carried.space.model == result.target["model"] else None
    say(FORMATS[to](Leaving(steps, ablate, out, load, layers)))
    say(f"written: {out}")


def _plain(name: str, dtype: str) -> tuple[Any, Any]:
    """Load a plain model of transformers and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from xmodel_steer.models.checkpoints import load_errors, whole_model, without_notices
    from xmodel_steer.models.loading import located, resolve_dtype
    from xmodel_steer.models.registry import published_tokenizer

    label, path = located(name)
    number = resolve_dtype(dtype, torch.device("cpu"))
    with load_errors(label, path), without_notices():
        return whole_model(AutoModelForCausalLM, path, label=label, dtype=number).eval(), published_tokenizer(path)

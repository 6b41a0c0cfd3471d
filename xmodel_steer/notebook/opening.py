"""The notebook that `xmodel-steer explore` opens."""

import json

# Cells of the notebook; it lies in the run's folder, where Jupyter starts the kernel.
_CELLS = (
    ("markdown", "# Steering by hand\n\nRun both cells, write a prompt, choose a vector, and press Generate."),
    ("code", 'import xmodel_steer as xs\n\nresult = xs.read(".")\nmodel = xs.load({model!r})'),
    ("code", "xs.explore(model, result)"),
)


def explore_notebook(model: str) -> str:
    """Write a notebook that opens the explorer on the run in its folder.

    Args:
        model: The model to steer, as for `load`.

    Returns:
        The notebook as JSON (nbformat 4.5).
    """
    cells = [
        {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.format(model=model)}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for i, (kind, text) in enumerate(_CELLS)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps(
        {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, indent=1
    )

"""The package imports fast, and everything that it exports is documented."""

import inspect
import subprocess
import sys

import xmodel_steer as xs


def test_importing_loads_no_heavy_library() -> None:
    heavy = (
        "transformer_lens",
        "transformers",
        "plotly",
        "pandas",
        "datasets",
        "scipy",
        "statsmodels",
        "sklearn",
        "ipywidgets",
    )
    script = f"import sys, xmodel_steer; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_says_what_it_is() -> None:
    names = [n for n in vars(xs) if not n.startswith("_") and not inspect.ismodule(getattr(xs, n))]
    assert 35 < len(names) < 77  # about forty, and the errors and records of its results
    for name in names:
        value = getattr(xs, name)
        assert value.__doc__, name
        if inspect.isfunction(value):
            documented = value.__doc__
            for parameter in inspect.signature(value).parameters:
                assert f"{parameter}:" in documented or len(inspect.signature(value).parameters) == 1, (
                    f"{name}({parameter})"
                )

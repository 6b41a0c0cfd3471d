"""The package imports fast, and everything that it exports is documented."""

import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


def test_every_command_that_is_installed_is_there() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "xmodel-steer" in project["scripts"]
    for place in project["scripts"].values():
        module, _, name = place.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_installed_command_runs() -> None:
    """As it was installed: after `pip install -e .` its script may name a place that has moved."""
    command = Path(sys.executable).parent / "xmodel-steer"
    if not command.exists():
        pytest.skip("the package is not installed in this environment: pip install -e .")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("xmodel-steer "), done.stderr

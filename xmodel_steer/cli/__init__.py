"""The command line."""

from xmodel_steer.cli.experiments import main as main

"""The command line, a module for each group of commands. What a command does is elsewhere; here it is asked for, and shown."""

# In the order in which --help lists them.
# isort: off
from xmodel_steer.cli import demos as demos
from xmodel_steer.cli import runs as runs
from xmodel_steer.cli import exporting as exporting
from xmodel_steer.cli import checking as checking
from xmodel_steer.cli import harvests as harvests
from xmodel_steer.cli import experiments as experiments
from xmodel_steer.cli.app import main as main

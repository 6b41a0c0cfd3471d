"""Steering and activation patching by hand in a notebook."""

from xmodel_steer.notebook.explorer import explore as explore
from xmodel_steer.notebook.patching_explorer import explore_patching as explore_patching

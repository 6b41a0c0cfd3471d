"""Steering by hand in a notebook: a prompt, a vector and a strength, and what the model writes."""

from xmodel_steer.notebook.explorer import explore as explore

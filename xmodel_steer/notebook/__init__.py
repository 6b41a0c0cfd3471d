"""Steering by hand in a notebook: a prompt, a vector and a strength, and the model's text."""

from xmodel_steer.notebook.explorer import explore as explore

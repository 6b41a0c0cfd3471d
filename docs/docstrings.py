"""Griffe extension: a docstring's ``Example:`` with prompts is shown as code, as its ``Examples:`` would be."""

import re

import griffe


class Examples(griffe.Extension):
    """Name the section as griffe knows it."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every object of the package."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )

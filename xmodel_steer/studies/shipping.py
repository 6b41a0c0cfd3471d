"""The word lists, sentences and lessons that ship with the package."""

import json
from typing import Any

from xmodel_steer.files.wheels import shipped


def read_table(name: str) -> Any:
    """Read a JSON or JSON-lines file of the package's data.

    Args:
        name: The file's path in the data folder; a ``.gz`` file is unpacked.
    """
    text = shipped(name)
    return [json.loads(line) for line in text.splitlines()] if ".jsonl" in name else json.loads(text)

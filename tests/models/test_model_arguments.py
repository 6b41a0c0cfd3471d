"""What is no number, count or text is told at a verb's first line, before a model runs."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TEXTS, Toy

from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.activations.harvesting import harvest
from xmodel_steer.activations.reading import capture
from xmodel_steer.core.errors import ModelError, PromptError
from xmodel_steer.models.arguments import require_counts, require_number, require_side
from xmodel_steer.models.generation import generate_tokens


def verbs(model: Any, folder: Path) -> dict[str, Any]:
    """Give each verb what it needs; unwrapped, because types are checked before it in tests."""
    ends = dict(source_sites=[0], target_sites=[0], max_tokens=20)
    plain: dict[str, tuple[Any, dict[str, Any]]] = {
        "capture": (capture, dict(model=model, prompts=TEXTS, sites=[0])),
        "collect_moments": (collect_moments, dict(source=model, target=model, texts=TEXTS, **ends)),
        "harvest": (harvest, dict(model=model, texts=TEXTS, folder=folder, end="source", sites=[0], max_tokens=20)),
        "generate": (generate_tokens, dict(model=model, prompts=TEXTS, max_new_tokens=2)),
    }
    return {
        name: lambda v=verb, a=arguments, **change: inspect.unwrap(v)(**a | change)
        for name, (verb, arguments) in plain.items()
    }


@pytest.mark.parametrize(
    ("verb", "change", "error", "says"),
    [
        ("capture", {"prompts": 5}, PromptError, "needs a list of prompts or rows, got int"),
        ("capture", {"sites": "10"}, TypeError, "sites takes Site or int, such as 10 .*got '10'"),
        ("capture", {"batch_size": "8"}, TypeError, "batch_size must be a whole number, got '8'"),
        ("capture", {"max_tokens": "8"}, TypeError, "max_tokens must be a whole number, got '8'"),
        ("capture", {"model": "gpt2"}, ModelError, "needs a TransformerLens model .*got str"),
        ("collect_moments", {"texts": 5}, PromptError, "collect_moments: needs a list of prompts or rows, got int"),
        ("collect_moments", {"source_sites": "10"}, TypeError, "got '10'"),
        ("collect_moments", {"max_tokens": "20"}, TypeError, "max_tokens must be a whole number, got '20'"),
        ("collect_moments", {"batch_size": 1.5}, TypeError, "batch_size must be a whole number, got 1.5"),
        ("collect_moments", {"shard": ("0", "1")}, ValueError, "shard must be"),
        ("collect_moments", {"target": None}, ModelError, "needs a TransformerLens model .*got NoneType"),
        ("collect_moments", {"truncation_side": "top"}, ValueError, "truncation_side must be 'left' or 'right', got 'top'"),
        ("harvest", {"texts": 5}, PromptError, "harvest: needs a list of prompts or rows, got int"),
        ("harvest", {"sites": "10"}, TypeError, "got '10'"),
        ("harvest", {"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ("harvest", {"batch_size": True}, TypeError, "batch_size must be a whole number, got True"),
        ("harvest", {"truncation_side": "top"}, ValueError, "truncation_side must be 'left' or 'right', got 'top'"),
        ("harvest", {"model": "gpt2"}, ModelError, "needs a TransformerLens model .*got str"),
        ("generate", {"prompts": 5}, PromptError, "needs a list of prompts or rows, got int"),
        ("generate", {"max_new_tokens": "8"}, TypeError, "max_new_tokens must be a whole number, got '8'"),
        ("generate", {"batch_size": "8"}, TypeError, "batch_size must be a whole number, got '8'"),
        ("generate", {"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ("generate", {"seed": "1"}, TypeError, "seed must be a number, got '1'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_and_nothing_is_written(
    llama: Toy, tmp_path: Path, verb: str, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        verbs(llama.model, tmp_path / "store")[verb](**change)
    assert not (tmp_path / "store").exists()


def test_numbers_of_numpy_are_numbers() -> None:
    require_counts(one=np.int64(1), two=2)
    require_number(one=np.float32(0.5), two=0)
    require_side(one="left", two="right")

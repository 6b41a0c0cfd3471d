"""Hugging Face models that the caller holds in memory."""

import copy
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xmodel_steer.core.errors import ModelError
from xmodel_steer.models.facts import HookedModel


def require_in_memory(model: Any, tokenizer: Any) -> None:
    """Refuse a value that is no Hugging Face model, or comes without a tokenizer.

    Raises:
        ModelError: Says what came, and what to do.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if isinstance(model, HookedModel):
        raise ModelError(f"{kind}: has hook points already; tell the library of it with xs.register(model)")
    if hasattr(model, "merge_and_unload"):
        raise ModelError(f"{kind}: an adapter is not merged yet; give model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"load: needs a name, a folder, a file or a Hugging Face model such as LlamaForCausalLM, got {kind}"
        )
    if not hasattr(tokenizer, "save_pretrained"):
        raise ModelError(
            f"{kind}: a model in memory needs its tokenizer, got {type(tokenizer).__name__}; "
            "give xs.load(model, tokenizer=tokenizer)"
        )


def label_of(hf: Any) -> str:
    """Name a Hugging Face model after its origin, or after its class."""
    place = str(getattr(hf.config, "_name_or_path", "") or "")
    return (Path(place).resolve().name if Path(place).is_dir() else place) or type(hf).__name__


def copied(hf: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """Copy a model's modules for hooking; weights are shared where device and dtype stay.

    Args:
        hf: The caller's model, which keeps its modules, mode and outputs.
        device: Where to put the copy; None leaves it where the model is.
        dtype: The dtype of the copy's weights; buffers keep theirs.
    """
    weights = list(hf.parameters())
    device = None if device is None else torch.empty(0, device=device).device  # "cuda" is "cuda:0"
    stays = all(w.dtype == dtype for w in weights if w.is_floating_point())
    stays = stays and (device is None or all(w.device == device for w in weights))
    shared = {id(tensor): tensor for tensor in itertools.chain(weights, hf.buffers())} if stays else {}
    hooked = copy.deepcopy(hf, shared).eval()
    hooked.config.architectures = [type(hf).__name__]  # TransformerLens looks it up by that
    if not stays:
        for weight in hooked.parameters():
            weight.data = weight.data.to(dtype) if weight.is_floating_point() else weight.data
        hooked = hooked if device is None else hooked.to(device)
    return hooked


@contextmanager
def saved(tokenizer: Any) -> Iterator[str]:
    """Save a tokenizer in a temporary folder, from which TransformerLens loads it again."""
    with tempfile.TemporaryDirectory(prefix="xmodel-steer-") as folder:
        tokenizer.save_pretrained(folder)
        yield folder

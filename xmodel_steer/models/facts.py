"""Facts about hooked models."""

import os
import platform
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from xmodel_steer.core.errors import ModelError
from xmodel_steer.models.laws import Conduct


@runtime_checkable
class HookedModel(Protocol):
    """The part of a TransformerLens model that this library uses."""

    cfg: Any
    tokenizer: Any
    blocks: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass."""
        ...

    def hooks(self, fwd_hooks: list[Any]) -> Any:
        """Attach functions to named points inside a context."""
        ...


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts about a model that the model does not hold itself."""

    name: str
    tokenizer: Any
    fingerprint: str
    revision: str
    conduct: Conduct = field(default_factory=Conduct)


FACTS: "weakref.WeakKeyDictionary[Any, Facts]" = weakref.WeakKeyDictionary()


def require_hooked(model: Any) -> None:
    """Refuse anything but a TransformerLens model.

    Raises:
        ModelError: Says what came.
    """
    if not isinstance(model, HookedModel):
        way = "model, tokenizer=tokenizer" if hasattr(model, "get_input_embeddings") else "name"
        raise ModelError(
            f"needs a TransformerLens model (TransformerBridge, or HookedTransformer of 3.x), got {type(model).__name__}; "
            f"load it with xs.load({way})"
        )


def facts_of(model: Any) -> Facts:
    """Return the facts about a model; nothing is run or loaded.

    Raises:
        ModelError: The library does not know the model.
    """
    known = FACTS.get(model) if isinstance(model, torch.nn.Module) else None
    if known is None:
        require_hooked(model)
        name = getattr(model.cfg, "model_name", None) or type(model).__name__
        raise ModelError(
            f"{name}: this model is not known yet; register it with xs.register(model), or load it with xs.load(name)"
        )
    return known


def name_of(model: Any) -> str:
    """Return the model's name."""
    return facts_of(model).name


def tokenizer_of(model: Any) -> Any:
    """Return the model's own tokenizer, as published."""
    return facts_of(model).tokenizer


def conduct_of(model: Any) -> Conduct:
    """Return the abilities that the model showed when it was loaded."""
    return facts_of(model).conduct


def device_of(model: Any) -> torch.device:
    """Return the device for token ids."""
    # TransformerLens offloads only parts that compute on the CPU; offloaded weights are on no device
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def dtype_of(model: Any) -> torch.dtype:
    """Return the dtype of the model's weights."""
    return next(model.parameters()).dtype


def hardware_of(model: Any) -> str:
    """Describe a model's hardware and dtype in words."""
    device = device_of(model)
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return f"{where}, {str(dtype_of(model)).removeprefix('torch.')}"


def is_bridge(model: Any) -> bool:
    """Tell whether the model is a TransformerBridge, with a Hugging Face model inside."""
    return hasattr(model, "original_model")


def embedding_rows(model: Any) -> int:
    """Return the number of token ids that the model has embeddings for."""
    if is_bridge(model):
        return len(model.original_model.get_input_embeddings().weight)
    return int(model.cfg.d_vocab)


def context_length(model: Any) -> int:
    """Return the number of tokens that the model can read."""
    facts_of(model)  # refuses what is no model
    return int(model.cfg.n_ctx)

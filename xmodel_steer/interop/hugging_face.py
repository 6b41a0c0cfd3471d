"""Steering of plain transformers models."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from xmodel_steer.core.errors import ModelError
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interop.spaces import decoder_blocks, hf_name, require_hf_space
from xmodel_steer.interventions.contexts import steered, steps_of
from xmodel_steer.interventions.operators import Add, Operator, Write
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models.facts import HookedModel, is_bridge


@contextmanager
def steering_hf(
    model: Any,
    vector: SteeringVector | Intervention | Sequence[SteeringVector | Intervention],
    *,
    operator: Operator = Add(),
    positions: Positions = "all",
    blocks: str | None = None,
    trust: bool = False,
) -> Iterator[Any]:
    """Steer a plain Hugging Face model inside the block, as `steering` does, without TransformerLens.

    Every forward pass is steered, also those of the model's ``generate``, with or without a cache, padded on the left, in
    batches, with beams. One thread at a time.

    A vector fits a model with the same name, ignoring case and everything before the last ``/`` or ``:``
    (``"packaged:smollm2-135m-instruct"``, ``"HuggingFaceTB/SmolLM2-135M-Instruct"``), or else with the same hash of the
    weights. The hash comes second because quantisation changes it, and because a bridge may hold the same weights in
    other tensors than the Hugging Face model (GPT-2's joint matrices split, a bias of zeros added).

    Args:
        model: A causal language model of transformers, possibly in PEFT's wrapper. With an adapter it differs from its
            base model: a vector of the base needs ``trust``.
        vector: A vector, or several, or `Intervention` values, all after blocks (``resid_post``).
        operator: The operator of bare vectors.
        positions: The positions of bare vectors; see `Intervention`.
        blocks: Name of the model's list of decoder blocks, such as ``"transformer.h"``, if it is not found.
        trust: Steer although neither name nor weights match the vector.

    Yields:
        The model. On leaving, also by an exception, it is exactly as before.

    Raises:
        ModelError: The model is a TransformerLens model, or its decoder blocks are not found.
        SpaceMismatchError: A vector is of another model, or of one whose weights were processed.
        SiteError: A vector is of another stream; or on leaving, a block did not run although the model did.

    Example:
        >>> with steering_hf(model, vector, operator=Add(2.0)):        # doctest: +SKIP
        ...     ids = model.generate(**tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))
    """
    if is_bridge(model) or isinstance(model, HookedModel) or not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"steering_hf: needs a causal language model of transformers, got {type(model).__name__}; "
            "for a model of TransformerLens use xs.steering"
        )
    steps = steps_of(vector, operator, positions)
    if not steps:
        yield model
        return
    inner = _unwrapped(model)
    stack = decoder_blocks(inner, blocks)
    for step in steps:
        require_hf_space(inner, len(stack), step.space, trust, named=inner is model)
    # Older PEFT calls inner.forward, past the hooks on inner's call: the wrapper's calls are watched too.
    with steered(inner, steps, partial(_hooked, stack), name=hf_name(inner), wrapper=model):
        yield model


def _unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT or data-parallel wrapper, which a wrapper's ``generate`` calls.

    Raises:
        ModelError: The wrapper is of another kind, where hooks might not fire or not see calls.
    """
    from transformers import PreTrainedModel

    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif type(inner).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = inner.module
        else:
            raise ModelError(
                f"steering_hf: {type(inner).__name__} wraps a model, and hooks may not see what it calls; give the model of "
                "transformers inside it (for a compiled model, ._orig_mod)"
            )
    return inner


def _rewritten(_module: Any, _args: Any, output: Any, *, write: Write) -> Any:
    """Rewrite the residual stream in a block's output, which may be a tuple."""
    return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)


def _hooked(blocks: torch.nn.ModuleList, writes: Sequence[tuple[Site, Write]]) -> AbstractContextManager[Any]:
    """Let functions rewrite the outputs of blocks."""
    hooks = ExitStack()
    for site, write in writes:
        hooks.callback(blocks[site.layer].register_forward_hook(partial(_rewritten, write=write)).remove)
    return hooks

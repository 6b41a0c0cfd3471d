"""Steer a plain model of transformers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from xmodel_steer.core.errors import ModelError
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interop.spaces import decoder_blocks, hf_name, require_hf_space
from xmodel_steer.interventions.contexts import interventions, steered
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
    """`steering` for a plain Hugging Face model: no TransformerLens, no other model object, the same positions.

    Inside the block every forward pass of the model is steered, also those of its ``generate``, with its cache or
    without, padded on the left, in batches, with beams. One thread at a time.

    A `Space` names weights by a hash. It is asked last, for quantisation changes it, and a bridge may hold the same weights
    in other tensors than the Hugging Face model (GPT-2's joint matrices split, a bias of zeros added). A model is the
    vector's if it has the same name, where case and what stands before the last ``/`` or ``:`` do not count
    (``"packaged:smollm2-135m-instruct"``, ``"HuggingFaceTB/SmolLM2-135M-Instruct"``), or else the same weights.

    Args:
        model: A causal language model of transformers, also inside PEFT's wrapper. With an adapter it is another model than its
            base: a vector of the base needs ``trust``.
        vector: A vector, or several, or `Intervention` values, all after blocks (``resid_post``).
        operator: What to do, for bare vectors.
        positions: Where in the text, for bare vectors; see `Intervention`.
        blocks: Name of the list of decoder blocks in the model, such as ``"transformer.h"``, where it cannot be found.
        trust: Steer although neither name nor weights say that the model is the vector's.

    Yields:
        The model. On leaving, also by an exception, it is exactly as before.

    Raises:
        ModelError: The model is a TransformerLens model, or its decoder blocks cannot be found.
        SpaceMismatchError: A vector lives in another model, or in one whose weights were processed.
        SiteError: A vector is of another stream; or on leaving, when a block did not run although the model did.

    Example:
        >>> with steering_hf(model, vector, operator=Add(2.0)):        # doctest: +SKIP
        ...     ids = model.generate(**tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))
    """
    if is_bridge(model) or isinstance(model, HookedModel) or not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"steering_hf: needs a causal language model of transformers, got {type(model).__name__}; "
            "for a model of TransformerLens use xs.steering"
        )
    steps = interventions(vector, operator, positions)
    if not steps:
        yield model
        return
    inner = _unwrapped(model)
    stack = decoder_blocks(inner, blocks)
    for step in steps:
        require_hf_space(inner, len(stack), step.space, trust, named=inner is model)

    def attach(writes: Sequence[tuple[Site, Write]]) -> AbstractContextManager[None]:
        return _hooked([(stack[site.layer], write) for site, write in writes])

    with steered(inner, steps, attach, name=hf_name(inner), wrapper=model):  # older PEFT calls inner.forward
        yield model


def _unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT or data-parallel wrapper: the calls of a wrapper's ``generate`` go there.

    Raises:
        ModelError: The wrapper is of another kind; hooks might not fire in it, or not see its calls.
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
                "transformers inside it (of a compiled one ._orig_mod)"
            )
    return inner


@contextmanager
def _hooked(writes: Sequence[tuple[torch.nn.Module, Write]]) -> Iterator[None]:
    """Let functions rewrite what blocks give."""

    def hook(write: Write) -> Any:
        # Some architectures' blocks give a tuple that begins with the residual stream.
        def rewrite(_module: Any, _args: Any, output: Any) -> Any:
            return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)

        return rewrite

    handles = []
    try:
        for block, write in writes:
            handles.append(block.register_forward_hook(hook(write)))
        yield
    finally:
        for handle in handles:
            handle.remove()

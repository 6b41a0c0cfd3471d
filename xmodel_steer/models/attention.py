"""Attention of heads that share keys and values, without a copy of them for each head.

Hugging Face's own (``eager_attention_forward``) repeats keys and values of grouped heads, and multiplies head by head.
For a decoding step of many texts that takes as long as all other layers together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NAME = "xmodel_steer"


def grouped_attention(
    module: Any,
    query: Float[Tensor, "batch heads new d"],
    key: Float[Tensor, "batch groups total d"],
    value: Float[Tensor, "batch groups total e"],
    attention_mask: Float[Tensor, "_ _ new total"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch new heads e"], Float[Tensor, "batch heads new total"]]:
    """Attend as transformers' ``eager_attention_forward`` does.

    The heads of a group are further rows of one product.

    Args:
        module: The attention layer.
        query: Queries.
        key: Keys, one for each group of heads.
        value: Values, one for each group of heads.
        attention_mask: Added to the scores.
        dropout: Only 0 is known.
        scaling: Factor of the scores.
        softcap: Bound of the scores (Gemma 2).
    """
    groups, total = key.shape[1:3]
    batch, heads, new, width = query.shape
    scores = torch.matmul(query.reshape(batch, groups, -1, width), key.transpose(2, 3))
    scores = scores.view(batch, heads, new, total) * (module.head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = torch.matmul(shares.view(batch, groups, -1, total), value).view(batch, heads, new, -1)
    return mixed.transpose(1, 2).contiguous(), shares


def configs_of(inner: Any) -> list[Any]:
    """List the configurations whose attention may be exchanged."""
    parts = [inner, *inner.modules()]
    if any(hasattr(part, "sinks") for part in parts):  # gpt-oss: a learned score in each head's softmax
        return []
    configs = {id(c): c for c in (getattr(part, "config", None) for part in parts) if c is not None}
    return [c for c in configs.values() if getattr(c, "_attn_implementation", None) == "eager"]


@cache
def _register() -> None:
    """Tell transformers the name, once."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def grouped(configs: list[Any]) -> Iterator[None]:
    """Let the attention layers of these configurations group their heads while the block lasts."""
    _register()
    for config in configs:
        config._attn_implementation_internal = NAME  # the property would set the configurations within, too
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = "eager"

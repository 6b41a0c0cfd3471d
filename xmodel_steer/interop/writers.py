"""Layers that write the residual stream of a transformers model, found by perturbing their outputs.

There is no table of names: a layer writes to the stream if a change of its output comes out of its block unchanged, up to
a factor per token (a residual multiplier, an expert's weight). A norm in between would change it otherwise.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xmodel_steer.core.errors import ModelError
from xmodel_steer.interop.spaces import hf_name, text_config

Edits = Mapping[nn.Module, Callable[[Tensor], Tensor]]  # new outputs of layers


@dataclass(frozen=True, eq=False)
class Writer:
    """A layer whose output is added to the residual stream.

    Args:
        name: Its path in the model.
        block: The block that it is in; -1 before block 0.
        gain: The factor with which its output comes out of the block, 1 for most; None if tokens differ in it.
    """

    name: str
    block: int
    gain: float | None


def parts_of(layer: nn.Module) -> tuple[nn.Parameter, int, nn.Parameter | None] | None:
    """Return a layer's weight, its output dimension, and the bias, if it can write."""
    if isinstance(down := getattr(layer, "down_proj", None), nn.Parameter):  # experts in one tensor
        return down, 2 if getattr(layer, "is_transposed", False) else 1, getattr(layer, "down_proj_bias", None)
    if isinstance(layer, nn.Linear | nn.Embedding) or type(layer).__name__ == "Conv1D":
        return layer.weight, 0 if isinstance(layer, nn.Linear) else 1, getattr(layer, "bias", None)  # type: ignore[return-value]
    return None


def probe_texts(model: Any) -> dict[str, Tensor]:
    """Make two random texts of 12 and 7 tokens, padded on the left."""
    ids = torch.randint(int(text_config(model).vocab_size), (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


@torch.no_grad()
def find_writers(model: Any, blocks: nn.ModuleList, *, complete: bool) -> list[Writer]:
    """Find every layer that writes to the residual stream.

    With ``complete``, refuse a model in which something else writes too. The writer
    listed first of a block is the last to run: no other layer of the block reads its output.

    Raises:
        ModelError: Something else writes, such as a norm after the MLP.
    """

    def outputs(edits: Edits) -> list[Tensor]:
        """Return block 0's input, then each block's output from a random stream, in float32."""
        seen = _streams(model, blocks, edits, held)
        return [values.float() for values in (seen[0], *seen[1::2])]

    width = int(text_config(model).hidden_size)
    # A model's own stream has huge dimensions, in which changes would be rounded away.
    held = torch.randn(2, 12, width, generator=torch.Generator().manual_seed(1)).to(model.device, model.dtype)
    layers = {n: m for n, m in model.named_modules() if (p := parts_of(m)) and p[0].shape[p[1]] == width}
    places = {module: k for k, block in enumerate(blocks) for module in block.modules()}
    ran: list[str] = []
    stream = _streams(
        model, blocks, {m: lambda out, name=name: (ran.append(name), out)[1] for name, m in layers.items()}
    )
    queues: dict[int, list[str]] = {k: [] for k in range(-1, len(blocks))}
    for name in dict.fromkeys(reversed(ran)):  # the last first: what it reads is not changed by what is silent
        queues[places.get(layers[name], -1)].append(name)
    found: list[Writer] = []
    for turn in range(max(map(len, queues.values()))):
        probed = {k: queue[turn] for k, queue in queues.items() if turn < len(queue)}
        silent: Edits = {layers[writer.name]: torch.zeros_like for writer in found}
        base = outputs(silent)
        draw = torch.randn(width, generator=torch.Generator().manual_seed(2)).to(model.device)
        steps = {k: draw * base[k + 1].square().mean().sqrt().clamp_min(1e-3) for k in probed}
        moved = {layers[name]: partial(torch.add, steps[k].to(model.dtype)) for k, name in probed.items()}
        after = outputs({**silent, **moved})
        for k, name in probed.items():
            change = after[k + 1] - base[k + 1]
            gains = change @ steps[k] / steps[k].square().sum()
            if gains.abs().max() > 0.01 and _near(gains[..., None] * steps[k], change, model.dtype):
                gain = gains.mean()
                same = _near(gains, gain.expand_as(gains), model.dtype)
                found.append(Writer(name, k, float(gain) if same else None))
    if complete:
        rest = outputs({layers[writer.name]: torch.zeros_like for writer in found})
        wrong = [f"block {k}" for k, out in enumerate(rest[1:]) if not _near(out, held, model.dtype)]
        wrong += ["the embedding"] if rest[0].any() else []
        between = zip(stream[1:-1:2], stream[2::2], strict=True)
        wrong += ["the model between its blocks"] if any(not _near(a, b, model.dtype) for a, b in between) else []
        wrong += [name for name in layers if layers[name] in places and name not in ran]  # experts that read nothing
        if wrong:
            raise ModelError(
                f"{hf_name(model)}: {wrong[0]} does more than add linear layers' outputs to the residual stream, such as a norm "
                "after the MLP (Gemma 2 and 3, OLMo 2) or the embedding (BLOOM), so no weights remove a direction; use steering_hf"
            )
    return found


def _near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether two tensors are equal up to a dtype's rounding."""
    error = (one.float() - other.float()).norm()
    return bool(error <= max(1e-3, 8 * torch.finfo(dtype).eps) * other.float().norm())


def _streams(model: Any, blocks: nn.ModuleList, edits: Edits, held: Tensor | None = None) -> list[Tensor]:
    """Return each block's input and output; with ``held``, all read that."""
    seen: list[Tensor] = []

    def read(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        seen.append(args[0] if args else kwargs["hidden_states"])
        if held is None:
            return args, kwargs
        return ((held, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": held})

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(read, with_kwargs=True).remove)
            first = lambda *call: seen.append(call[2][0] if isinstance(call[2], tuple) else call[2])  # noqa: E731
            hooks.callback(block.register_forward_hook(first).remove)
        for module, edit in edits.items():
            hooks.callback(module.register_forward_hook(lambda *call, edit=edit: edit(call[2])).remove)
        model(**probe_texts(model), use_cache=False)
    return seen

"""Layers that write the residual stream of a transformers model, found by perturbing their outputs.

No table of names: a layer writes to the stream if a change of its output comes out of its block unchanged, up to a
factor per token (a residual multiplier, an expert's weight). A norm in between changes it otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xmodel_steer.core.errors import ModelError
from xmodel_steer.interop.spaces import hf_name, text_config

EMBEDDING = -1  # the number of the part before block 0
_LEAST = 0.01  # a factor of less is none


@dataclass(frozen=True, eq=False)
class Writer:
    """A layer whose output is added to the residual stream.

    Args:
        name: Its path in the model.
        module: A ``Linear``, a ``Conv1D``, an ``Embedding``, or experts whose ``down_proj`` are one tensor.
        block: The block that it is in; `EMBEDDING` before block 0.
        gain: The factor with which its output comes out of the block, 1 for most; None if it differs between tokens.
        last: No other writer of the block reads what it wrote.
    """

    name: str
    module: nn.Module
    block: int
    gain: float | None
    last: bool

    @property
    def weight(self) -> nn.Parameter:
        """The weight, of every expert at once."""
        return getattr(self.module, "weight" if hasattr(self.module, "weight") else "down_proj")

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, ``(..., d)``, if there is one."""
        return getattr(self.module, "bias" if hasattr(self.module, "weight") else "down_proj_bias", None)

    @property
    def axis(self) -> int:
        """The weight's dimension that is the stream's."""
        if hasattr(self.module, "weight"):
            return 0 if isinstance(self.module, nn.Linear) else 1
        return 2 if getattr(self.module, "is_transposed", False) else 1


def probe_texts(model: Any) -> dict[str, Tensor]:
    """Make a batch of two random texts of 12 and 7 tokens, padded on the left."""
    size = min(int(text_config(model).vocab_size), len(model.get_input_embeddings().weight))
    ids = torch.randint(size, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def find_writers(model: Any, blocks: nn.ModuleList, *, complete: bool = True) -> list[Writer]:
    """Find every layer that writes to the residual stream, in the order of their blocks.

    With ``complete``, something else that writes is an error.

    Raises:
        ModelError: Something else writes too, such as a norm after the MLP.
    """
    width = int(text_config(model).hidden_size)
    part = {id(module): k for k, block in enumerate(blocks) for module in block.modules()}
    layers = {name: m for name, m in model.named_modules() if _width(m) == width}
    ran: list[str] = []
    with torch.no_grad():
        stream = _streams(model, blocks, {m: partial(_noted, ran, name) for name, m in layers.items()})
    if complete and any(not _near(out, after) for out, after in zip(stream[2::2], stream[3::2], strict=False)):
        raise ModelError(_incomplete(model, "between two blocks"))
    where = {name: part.get(id(layers[name]), EMBEDDING) for name in dict.fromkeys(reversed(ran))}
    first = min((i for i, name in enumerate(ran) if where[name] != EMBEDDING), default=0)
    late = {name for name, k in where.items() if k == EMBEDDING and name not in ran[:first]}  # the output layer
    idle = [name for name in layers if id(layers[name]) in part and name not in ran and "expert" in name]
    if complete and idle:
        raise ModelError(f"{hf_name(model)}: {idle[0]} read no token of the probe, so that its part is unknown")
    queues = {
        k: [name for name in where if where[name] == k and name not in late] for k in range(EMBEDDING, len(blocks))
    }
    found: list[Writer] = []
    for turn in range(max(map(len, queues.values()))):
        names = {k: queue[turn] for k, queue in queues.items() if turn < len(queue)}
        found += _tested(model, blocks, width, {k: (name, layers[name]) for k, name in names.items()}, found)
    rest = _outputs(model, blocks, width, _silenced(found))
    for k, (given, out) in enumerate(rest if complete else (), EMBEDDING):
        if not _near(out, given):
            raise ModelError(_incomplete(model, "the embedding" if k == EMBEDDING else f"block {k}"))
    return sorted(found, key=lambda writer: writer.block)


def _incomplete(model: Any, place: str) -> str:
    return (
        f"{hf_name(model)}: {place} writes to the residual stream by more than linear layers, such as a norm after the MLP "
        "(Gemma 2 and 3, OLMo 2) or after the embedding (BLOOM), so no weights remove a direction there; "
        "steer with steering_hf"
    )


def _width(module: nn.Module) -> int | None:
    """Return the width of a layer's output; of no layer that can write, None."""
    if isinstance(getattr(module, "down_proj", None), nn.Parameter):
        down: Any = module.down_proj
        return down.shape[2 if getattr(module, "is_transposed", False) else 1]
    names = {"Linear": "out_features", "Conv1D": "nf", "Embedding": "embedding_dim"}
    return next((getattr(module, names[k.__name__]) for k in type(module).__mro__ if k.__name__ in names), None)


Edit = Callable[[Tensor], Tensor]


def _noted(ran: list[str], name: str, out: Tensor) -> Tensor:
    ran.append(name)
    return out


def _silenced(writers: Sequence[Writer]) -> dict[nn.Module, Edit]:
    return {writer.module: torch.zeros_like for writer in writers}


def _streams(
    model: Any, blocks: nn.ModuleList, edits: Mapping[nn.Module, Edit], held: Tensor | None = None
) -> list[Tensor]:
    """Return each block's input and output in one pass, after a place for what comes before.

    Args:
        model: The model.
        blocks: Its decoder blocks.
        edits: New outputs of layers.
        held: What each block reads instead of what the last one wrote.
    """
    seen: list[Tensor] = [torch.zeros(())]

    def read(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append(given)
        if held is None:
            return args, kwargs
        return ((held, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": held})

    def write(_: Any, __: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(read, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(write).remove)
        for module, edit in edits.items():
            hooks.callback(module.register_forward_hook(lambda *call, edit=edit: edit(call[2])).remove)
        model(**probe_texts(model), use_cache=False)
    return seen


def _outputs(
    model: Any, blocks: nn.ModuleList, width: int, edits: Mapping[nn.Module, Edit]
) -> list[tuple[Tensor, Tensor]]:
    """Return what each part is given and what it returns; each block reads the same random stream."""
    like = next(blocks.parameters())
    held = torch.randn(2, 12, width, generator=torch.Generator().manual_seed(1)).to(like)
    with torch.no_grad():
        seen = _streams(model, blocks, edits, held)
    return [(torch.zeros_like(seen[1]), seen[1]), *((held, out) for out in seen[2::2])]


def _near(one: Tensor, other: Tensor) -> bool:
    """Tell whether two streams are equal up to rounding."""
    error, size = (one.float() - other.float()).norm(), other.float().norm()
    return bool(error <= max(1e-4, 8 * torch.finfo(one.dtype).eps) * (size if size > 0 else 1e-3))


def _tested(
    model: Any,
    blocks: nn.ModuleList,
    width: int,
    layers: Mapping[int, tuple[str, nn.Module]],
    found: Sequence[Writer],
) -> list[Writer]:
    """Perturb one layer of each part; return those that write, with writers found before silent."""
    silent = _silenced(found)
    base = _outputs(model, blocks, width, silent)
    draw = torch.randn(width, generator=torch.Generator().manual_seed(2)).to(model.device)
    steps = {k: draw * base[k + 1][1].float().square().mean().sqrt().clamp_min(1e-3) for k in layers}
    moved = {m: partial(lambda out, step: out + step.to(out), step=steps[k]) for k, (_, m) in layers.items()}
    after = _outputs(model, blocks, width, silent | moved)
    writers = []
    for k, (name, module) in layers.items():
        change, step = after[k + 1][1].float() - base[k + 1][1].float(), steps[k]
        gains = change @ step / (step @ step)
        error = (change - gains[..., None] * step).norm() / change.norm().clamp_min(1e-12)
        rounding = max(1e-3, 8 * torch.finfo(after[k + 1][1].dtype).eps)
        if gains.abs().max() < _LEAST or error > rounding:
            continue
        gain = float(gains.mean())
        same = bool((gains - gain).abs().max() <= rounding * abs(gain))
        writers.append(Writer(name, module, k, gain if same else None, all(w.block != k for w in found)))
    return writers

"""Memory of a machine, the part of it that attention takes, and the one error for a pass that ran out of it."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from xmodel_steer.core.errors import ModelError, XModelSteerError
from xmodel_steer.models.facts import device_of, is_bridge, name_of

#: The texts by which a RuntimeError of PyTorch tells that memory ran out.
_SHORT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "not enough memory")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory_of(device: str | torch.device = "cpu") -> int:
    """Return the bytes of memory that a device has in all.

    They are 0 where the system does not tell. Of the CPU, a container's limit counts where it is lower. Total memory, unlike free memory, does not depend on what
    else runs: more than it can never fit.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 0
    with suppress(OSError, ValueError):
        total = min(total, int(_CGROUP.read_text()))  # "max" is no number
    return total


def in_words(size: float) -> str:
    """Write a number of bytes in a unit that a person reads easily."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SHORT_OF_MEMORY)


@contextmanager
def memory_errors(model: Any, batch: int, tokens: int) -> Iterator[None]:
    """Raise one clear error where a pass runs out of memory.

    Args:
        model: A TransformerLens model.
        batch: Rows of the pass.
        tokens: Tokens of each row, cached ones included.

    Raises:
        ModelError: Memory ran out; says what to halve.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, XModelSteerError) or not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their tensors fill the memory that a smaller batch needs
        size = f"{batch} rows of {tokens} tokens" if batch > 1 else f"one row of {tokens} tokens"
        halve = f"halve batch_size (here to {batch // 2}) or max_tokens" if batch > 1 else ALONE.format(tokens // 2)
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ModelError(
            f"{name_of(model)}: out of memory on {device_of(model)} in a pass over {size}; {halve} ({reason})"
        ) from error


ALONE = "batch_size cannot help one text: cut it with max_tokens={} or less, or shorten it"

#: Bytes that eager attention takes at its peak for each score, measured on Llama, Gemma and GPT-2: the scores, the
#: masked ones, and their softmax in float32.
SCORE_BYTES = 10
#: The scores of a batch take at most this share of the device's memory. Several rows that take more are split.
ATTENTION_SHARE = 1 / 4


def _attention_heads(model: Any) -> int:
    """Count the heads that keep their scores; 0 in fused attention and recurrent models."""
    if not is_bridge(model):
        return int(model.cfg.n_heads)
    config = model.original_model.config
    eager = getattr(config, "_attn_implementation", "eager") in (None, "eager")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "num_attention_heads", 0) or 0) if eager else 0


def attention_bytes(model: Any, tokens: int) -> int:
    """Estimate the bytes of one row's attention scores, quadratic in the tokens."""
    return SCORE_BYTES * _attention_heads(model) * tokens**2


def rows_within(model: Any, tokens: int) -> int:
    """Return the number of rows whose attention scores fit the device.

    Raises:
        ModelError: The scores of a single row are larger than all memory of the device.
    """
    there, size = memory_of(device_of(model)), attention_bytes(model, tokens)
    if not there or not size:
        return 2**31
    if size > there:
        raise ModelError(
            f"{name_of(model)}: attention over a text of {tokens} tokens takes about {in_words(size)}, over the "
            f"{in_words(there)} of memory of {device_of(model)}; give max_tokens={int(tokens * (there / size / 2) ** 0.5)} or "
            "less, or shorten the text"
        )
    return max(1, int(ATTENTION_SHARE * there) // size)

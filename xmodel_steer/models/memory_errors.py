"""Memory of a machine, and the one error for a pass that ran out of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from xmodel_steer.core.errors import ModelError
from xmodel_steer.models.facts import name_of

#: The texts by which a RuntimeError of PyTorch tells that memory ran out.
_SHORT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "not enough memory")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory_of(device: str | torch.device = "cpu") -> int:
    """Return the bytes of memory that a device has in all; 0 where the system does not tell.

    Of the CPU, a container's limit counts where it is lower. Total memory, unlike free memory, does not depend on what
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
    """Tell whether an error says that memory ran out, on a GPU or on the CPU."""
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
        if isinstance(error, ModelError) or not is_out_of_memory(error):
            raise
        place = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), "cpu")
        halve = f"halve batch_size (to {batch // 2})" if batch > 1 else "give a max_tokens of half the tokens, or less"
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"{name_of(model)}: out of memory on {place} in a pass over {batch} {'rows' if batch > 1 else 'row'} of "
            f"{tokens} tokens; {halve}{', or lower max_tokens' if batch > 1 else ''} ({first})"
        ) from error

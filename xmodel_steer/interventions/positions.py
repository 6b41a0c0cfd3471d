"""Positions in a text where an intervention acts."""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from xmodel_steer.core.arguments import require_type

Where = Literal["all", "prompt", "generated", "last"]
Positions = Where | Sequence[Where] | Tensor


def check_positions(positions: Positions) -> None:
    """Refuse anything but known position names and boolean masks."""
    takes = "'all', 'prompt', 'generated', 'last', several of them, or a boolean mask"
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2):
            raise ValueError(
                f"positions: a mask must be boolean, (tokens,) or (prompts, tokens), "
                f"got {positions.dtype} {tuple(positions.shape)}"
            )
        return
    require_type("positions", Iterable, positions, takes=takes)
    names = (positions,) if isinstance(positions, str) else tuple(positions)
    if not names or any(name not in get_args(Where) for name in names):
        raise ValueError(f"positions: must be {takes}; got {positions!r}")

"""Where in a text an intervention acts."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Where = Literal["all", "prompt", "generated", "last"]
Positions = Where | Sequence[Where] | Tensor


def check_positions(positions: Positions) -> None:
    """Refuse positions that are none."""
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2):
            raise ValueError(
                f"positions: a mask must be boolean, (tokens,) or (prompts, tokens), "
                f"got {positions.dtype} {tuple(positions.shape)}"
            )
        return
    names = (positions,) if isinstance(positions, str) else tuple(positions)
    wrong = [name for name in names if name not in ("all", "prompt", "generated", "last")]
    if wrong or not names:
        raise ValueError(
            f"positions: must be 'all', 'prompt', 'generated', 'last', several of them, or a boolean mask; got {positions!r}"
        )

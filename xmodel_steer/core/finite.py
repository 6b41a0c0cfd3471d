"""Refusal of NaN and infinity."""

import torch
from torch import Tensor

from xmodel_steer.core.errors import NonFiniteError


def is_finite(values: Tensor) -> bool:
    """Tell whether all values are finite; one pass for the extremes shows it."""
    if not values.is_floating_point() or not values.numel():
        return True
    low, high = values.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity, and name the usual cause.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    if not is_finite(values):
        bad = int((~torch.isfinite(values)).any(-1).sum()) if values.ndim > 1 else 1
        raise NonFiniteError(
            f"{what}: NaN or infinity in {bad} row(s). Load the model in float32 (or bfloat16; float16 overflows "
            "in many models) and check its weights"
        )

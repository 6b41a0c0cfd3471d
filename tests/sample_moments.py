"""Rows of two small spaces, and an accumulator for them."""

import torch

from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.maps.accumulator import MomentsAccumulator

SOURCE = {Site(i): Space("small", Site(i), 3, "aaaa") for i in (0, 1)}
TARGET = {Site(5): Space("large", Site(5), 4, "bbbb")}
PAIRS = tuple((s, Site(5)) for s in SOURCE)


def accumulator(**changes):
    return MomentsAccumulator(
        **({"source": SOURCE, "target": TARGET, "pairs": PAIRS, "settings": {"seed": 0}} | changes)
    )


def rows(n, *, offset=0.0, spread=1.0, seed=0):
    """Activations of every site; the second source site moves with the target."""
    draw = torch.randn(n, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread + offset
    return {Site(0): draw[:, :3], Site(1): draw[:, 3:6]}, {Site(5): draw[:, 3:7] + draw[:, 6:]}


def taken(sides, index):
    return tuple({site: values[index] for site, values in side.items()} for side in sides)

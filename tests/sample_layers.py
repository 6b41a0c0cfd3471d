"""Moments and rows of several layers, whose pairs differ in how much they share."""

from itertools import product

import torch

from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations
from xmodel_steer.maps.accumulator import MomentsAccumulator
from xmodel_steer.maps.rows import PairedRows

DS, DT = 5, 12
SOURCE = {Site(i): Space("small", Site(i), DS, "aaaa") for i in range(3)}
TARGET = {Site(i): Space("large", Site(i), DT, "bbbb") for i in (1, 4)}


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n, seed):
    """Rows of every site: source layer 1 knows most of the target, layer 0 least; units differ wildly."""
    hidden = normal(n, DS, seed=seed)
    units = torch.logspace(-2, 3, DS, dtype=torch.float64)
    source = {
        site: (hidden + noise * normal(n, DS, seed=seed + 10 + site.layer)) * units + 5
        for site, noise in zip(SOURCE, (3.0, 0.3, 1.0), strict=True)
    }
    target = {
        site: hidden @ normal(DS, DT, seed=site.layer) * torch.logspace(-3, 3, DT, dtype=torch.float64) + site.layer
        for site in TARGET
    }
    return source, {site: y + y.std(0) * 0.5 * normal(n, DT, seed=seed + 99) for site, y in target.items()}


def collected(*, sketch=(), pairs=None, sizes=(150, 40, 60)):
    chosen = tuple(product(SOURCE, TARGET)) if pairs is None else pairs
    made = MomentsAccumulator(SOURCE, TARGET, chosen, sketch=sketch)
    for seed, (part, n) in enumerate(zip(("train", "validation", "test"), sizes, strict=True)):
        if n:
            made.add(part, *related(n, 1000 * seed), [i // 2 for i in range(n)])
    return made.moments()


def rows(n=240):
    (x, y), labels = related(n, 0), tuple((str(i // 4), i % 4) for i in range(n))
    parts = [("train", "train", "train", "validation", "test")[i % 5] for i in range(n // 4)]
    return PairedRows.of(
        Activations(x[Site(1)], SOURCE[Site(1)], labels), Activations(y[Site(4)], TARGET[Site(4)], labels), parts
    )

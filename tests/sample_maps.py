"""Maps between two toys."""

import torch

import xmodel_steer as xs
from xmodel_steer.maps.affine import AffineMap

SITE = xs.Site(1)


def affine(source, target, weight, bias):
    a, b = xs.space_of(source.model, SITE), xs.space_of(target.model, SITE)
    return AffineMap(weight, bias, a, b, torch.ones(a.width), torch.ones(b.width))


def identity(source, target):
    width = source.model.cfg.d_model
    return affine(source, target, torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))


def random_map(source, target):
    generator = torch.Generator().manual_seed(0)
    ds, dt = source.model.cfg.d_model, target.model.cfg.d_model
    weight = torch.randn(ds, dt, generator=generator, dtype=torch.float64) / ds**0.5
    return affine(source, target, weight, torch.randn(dt, generator=generator, dtype=torch.float64))

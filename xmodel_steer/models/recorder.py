"""Recording of the residual stream during a pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.spaces import Site, Stack
from xmodel_steer.models.batching import Batch
from xmodel_steer.models.passes import forward, layout
from xmodel_steer.models.shortage import memory_errors
from xmodel_steer.models.sites import recording as recording


def residuals(model: Any, batch: Batch, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "batch tokens d"]]:
    """Read the residual stream at several sites, in one pass to the deepest."""
    members = tuple(dict.fromkeys(member for site in sites for member in site.members))
    # Memory may run out anywhere within: the blocks, the hooks, the copies that they keep.
    told = memory_errors(model, *batch.ids.shape)
    with told, recording(model, members) as streams, layout(batch.rows, batch.mask.sum(-1)):
        forward(model, batch.ids, batch.mask, logits="none", stop_at_layer=max(site.layer for site in sites) + 1)
    return {site: joined(streams, site) for site in sites}


def joined(streams: Mapping[Site, Tensor], site: Site) -> Tensor:
    """Join the streams of a site's members."""
    return torch.cat([streams[member] for member in site.members], -1) if isinstance(site, Stack) else streams[site]

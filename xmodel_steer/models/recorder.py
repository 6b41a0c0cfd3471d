"""Recording of the residual stream during a pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Site
from xmodel_steer.models.batching import Batch
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.passes import forward, layout
from xmodel_steer.models.sites import space_of


@contextmanager
def recording(model: Any, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the residual stream of forward passes within the block, by site.

    Raises:
        SiteError: The model has no such site, or a site has not fired at the end of the block.
    """
    streams: dict[Site, Tensor] = {}

    def hook(site: Site) -> Any:
        def read(value: Tensor, hook: Any) -> None:
            streams[site] = value.detach()

        return read

    for site in sites:
        space_of(model, site)  # refuses a missing layer or stream
    with model.hooks(fwd_hooks=[(site.hook_name, hook(site)) for site in sites]):
        yield streams
    silent = [str(site) for site in sites if site not in streams]
    if silent:
        raise SiteError(
            f"{name_of(model)}: {', '.join(silent)} did not fire in a forward pass; choose another stream of the block"
        )


def residuals(model: Any, batch: Batch, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "batch tokens d"]]:
    """Read the residual stream at several sites, in one pass to the deepest."""
    with recording(model, sites) as streams, layout(batch.rows, batch.mask.sum(-1)):
        forward(model, batch.ids, batch.mask, logits="none", stop_at_layer=max(site.layer for site in sites) + 1)
    return dict(streams)

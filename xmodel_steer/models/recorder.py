"""Record the residual stream during a pass."""

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
    """Inside the block, forward passes leave the residual stream at the sites in the dictionary.

    Raises:
        SiteError: The model has no such site; or, on leaving, a site did not fire.
    """
    kept: dict[Site, Tensor] = {}

    def hook(site: Site) -> Any:
        def read(value: Tensor, hook: Any) -> None:
            kept[site] = value.detach()

        return read

    for site in sites:
        space_of(model, site)  # refuses a layer or stream that is not there
    with model.hooks(fwd_hooks=[(site.hook_name, hook(site)) for site in sites]):
        yield kept
    silent = [str(site) for site in sites if site not in kept]
    if silent:
        raise SiteError(
            f"{name_of(model)}: {', '.join(silent)} did not fire in a forward pass; choose another stream of the block"
        )


def residuals(model: Any, batch: Batch, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "batch tokens d"]]:
    """Read the residual stream at several sites, in one pass to the deepest."""
    with recording(model, sites) as kept, layout(batch.rows, batch.mask.sum(-1)):
        forward(model, batch.ids, batch.mask, logits="none", stop_at_layer=max(site.layer for site in sites) + 1)
    return dict(kept)

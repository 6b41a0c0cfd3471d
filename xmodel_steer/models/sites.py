"""Sites of a model: places that can be read and written."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import STREAMS, Site, SiteLike, Sites, Space, Stack, as_site, as_sites, stacked
from xmodel_steer.models.facts import device_of, facts_of, is_bridge
from xmodel_steer.models.hooking import Block, attached, block
from xmodel_steer.models.identity import processing_of
from xmodel_steer.models.passes import forward


def space_of(model: Any, site: SiteLike) -> Space:
    """Return the vector space at a site of a model.

    Args:
        model: A TransformerLens model.
        site: The place in it, or a layer's number.

    Raises:
        SiteError: The model lacks the layer, or the layer lacks the stream. No pass is run to find out.
    """
    facts, site = facts_of(model), as_site(site)
    if isinstance(site, Stack):
        return stacked(site, [space_of(model, member) for member in site.members])
    if site.layer >= model.cfg.n_layers:
        raise SiteError(f"{facts.name}: has layers 0 to {model.cfg.n_layers - 1}, no {site}")
    points = model.hook_dict
    if site.hook_name not in points:
        streams = [stream for stream in STREAMS if Site(site.layer, stream).hook_name in points]
        raise SiteError(
            f"{facts.name}: block {site.layer} has no {site.stream}; it has {', '.join(streams) or 'no stream'}. "
            "A block whose attention and MLP run in parallel has no resid_mid, a recurrent one no attn_out and no z: "
            "choose a stream that it has"
        )
    width = model.cfg.n_heads * model.cfg.d_head if site.stream == "z" else model.cfg.d_model
    return Space(facts.name, site, int(width), facts.fingerprint, processing_of(model))


def all_sites(model: Any, stream: str = "resid_post") -> tuple[Site, ...]:
    """List one site per layer."""
    return tuple(Site(layer, stream) for layer in range(model.cfg.n_layers))


def sites_of(model: Any, sites: Sites | Literal["all"]) -> tuple[Site, ...]:
    """Return the sites; for ``"all"``, the site after every block."""
    return all_sites(model) if isinstance(sites, str) and sites == "all" else as_sites(sites)


def check_sites(model: Any, sites: Sequence[Site] | None = None) -> None:
    """Run two tokens through a model; refuse silent or misshapen sites.

    Args:
        model: A TransformerLens model.
        sites: The sites to check; by default every layer's ``resid_post``.

    Raises:
        SiteError: A site is missing or wrong; the message names it and says why.
    """
    wanted = tuple(sites) if sites is not None else all_sites(model)
    ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    try:
        with recording(model, wanted) as streams, torch.no_grad():
            forward(model, ids, torch.ones_like(ids), logits="last")
    except SiteError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        kind = type(model.original_model if is_bridge(model) else model).__name__
        raise SiteError(
            f"{facts_of(model).name}: cannot be hooked at {wanted[0]} to {wanted[-1]} ({type(error).__name__}: {str(error)[:200]}); "
            f"TransformerLens may not support the architecture {kind}: try another version of it, or another model"
        ) from error
    for site, stream in streams.items():
        if stream.shape != (1, 2, space_of(model, site).width):
            raise SiteError(
                f"{facts_of(model).name}: {site} gives shape {tuple(stream.shape)} for 2 tokens, expected "
                f"(1, 2, {space_of(model, site).width}); it is not this model's residual stream"
            )


@contextmanager
def recording(model: Any, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the residual stream of forward passes within the block, by site.

    Raises:
        SiteError: The model has no such site, or a site has not fired at the end of the block.
    """
    streams: dict[Site, Tensor] = {}

    def reader(entered: Block, site: Site) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            if entered.here:
                streams[site] = value.detach()

        return read

    for site in sites:
        space_of(model, site)  # refuses a missing layer or stream
    with block() as entered, attached(model, [(site.hook_name, reader(entered, site)) for site in sites]):
        yield streams
    silent = [str(site) for site in sites if site not in streams]
    if silent:
        raise SiteError(
            f"{facts_of(model).name}: the hook point of {', '.join(silent[:5])} did not fire in a forward pass; "
            "TransformerLens may not hook this stream of this architecture: choose another stream of the block"
        )

"""A cache of collected moments in the user's folder."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.core.errors import ArtifactError, CacheWarning
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site, Sites, as_sites
from xmodel_steer.files.artefacts import read_artefact, save_artefact
from xmodel_steer.files.cache import cache_folder
from xmodel_steer.files.records import SCHEMA
from xmodel_steer.files.resume import COMPUTES
from xmodel_steer.maps.moments import Moments
from xmodel_steer.models.identity import identity_of
from xmodel_steer.models.sites import space_of


def cached_moments(
    source: Any,
    target: Any,
    texts: Sequence[Prompt],
    *,
    source_sites: Sites,
    target_sites: Sites,
    pairs: Sequence[tuple[Site, Site]] | None = None,
    max_tokens: int,
    seed: int = 0,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> Moments:
    """Collect moments, or read them from the user's cache.

    The key is a hash of everything that the moments depend on: every bit of both models' weights, their dtype,
    tokenizers, configurations and kind of device, the names of their spaces, every text, the sites, the settings and
    the versions of the libraries. A model with hooks is never cached, a damaged file is collected anew, and a
    `CacheWarning` tells of a failed write.
    """
    source_sites, target_sites = as_sites(source_sites), as_sites(target_sites)
    ends = [identity_of(source), identity_of(target)]
    collect = partial(
        collect_moments, source, target, texts, source_sites=source_sites, target_sites=target_sites, pairs=pairs,
        max_tokens=max_tokens, batch_size=batch_size, seed=seed, device=device,
    )  # fmt: skip
    if any(hooks for *_, hooks in ends):  # a hook may do anything
        return collect()
    key = {
        "schema": SCHEMA,
        "method": 4,  # raise it when the same arguments give other numbers
        "models": [identity[:-1] for identity in ends],
        "spaces": [
            [f"{site.hook_name} {space_of(model, site).fingerprint}" for site in sites]
            for model, sites in ((source, source_sites), (target, target_sites))
        ],
        "versions": [f"{name} {version(name)}" for name in COMPUTES],
        "texts": hashlib.sha256("\0".join(p.content_key() for p in texts).encode()).hexdigest(),
        "max_tokens": max_tokens,
        "seed": seed,
        **({"pairs": [[s.hook_name, t.hook_name] for s, t in pairs]} if pairs else {}),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_folder() / "moments" / f"{name}.safetensors"
    if file.is_file():
        try:
            return read_artefact(file)
        except ArtifactError:
            file.unlink()
    moments = collect()
    try:
        save_artefact(moments, file)
    except ArtifactError as error:
        warnings.warn(f"the moments are not kept in the cache: {error}", CacheWarning, stacklevel=2)
    return moments

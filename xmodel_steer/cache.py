"""Moments that were collected before, kept in the user's cache."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from xmodel_steer.capture import collect_moments
from xmodel_steer.errors import ArtifactError
from xmodel_steer.files import SCHEMA
from xmodel_steer.models import content_hash, space_of
from xmodel_steer.moments import Moments
from xmodel_steer.packaged import cache_folder
from xmodel_steer.persistence import read, save
from xmodel_steer.prompts import Prompt
from xmodel_steer.spaces import Site


def cached_moments(
    source: Any,
    target: Any,
    texts: Sequence[Prompt],
    *,
    source_sites: Sequence[Site],
    target_sites: Sequence[Site],
    pairs: Sequence[tuple[Site, Site]] | None = None,
    max_tokens: int,
    seed: int = 0,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Moments:
    """Moments, kept in the user's cache under a hash of all that they depend on.

    The key covers every bit of both models' weights, their dtype and tokenizers, what their spaces are called, every text,
    the sites and the settings: whatever changes, the moments are collected anew. A damaged file is too.
    """
    key = {
        "schema": SCHEMA,
        "method": 2,  # of collecting moments: raise it when the same arguments give other numbers
        "source": _read(source, source_sites),
        "target": _read(target, target_sites),
        "texts": hashlib.sha256("\0".join(p.content_key() for p in texts).encode()).hexdigest(),
        "max_tokens": max_tokens,
        "seed": seed,
        **({"pairs": [[s.hook_name, t.hook_name] for s, t in pairs]} if pairs else {}),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    file = cache_folder() / "moments" / f"{name}.safetensors"
    if file.is_file():
        try:
            return read(file)
        except ArtifactError:
            file.unlink()
    moments = collect_moments(
        source,
        target,
        texts,
        source_sites=source_sites,
        target_sites=target_sites,
        pairs=pairs,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    save(moments, file)
    return moments


def _read(model: Any, sites: Sequence[Site]) -> list[str]:
    """What is read, and in which spaces: a model loaded otherwise may have the same weights under another fingerprint."""
    return [content_hash(model), *(f"{site.hook_name} {space_of(model, site).fingerprint}" for site in sites)]

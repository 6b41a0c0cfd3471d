"""Patches: activations of one text at chosen positions of another one."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt, PromptLike
from xmodel_steer.core.spaces import Site, SiteLike, Space, as_site, require_same_space
from xmodel_steer.interventions.steps import Reading, Replacement
from xmodel_steer.maps.affine import Map
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.recorder import residuals
from xmodel_steer.models.sites import space_of
from xmodel_steer.models.tokens import Encoding

Pairs = Sequence[tuple[int, int]]  # positions of tokens: in the text that is read, and in the one that is patched


def patch(space: Space, rows: Float[Tensor, "n d"], positions: Sequence[int]) -> Replacement:
    """Replace the activations at some positions of every text.

    Args:
        space: The site that is written to.
        rows: The new activations.
        positions: The text position of each row.

    Raises:
        ValueError: There are as many positions as rows in no case, a position is negative, or one comes twice.
    """
    if len(rows) != len(positions) or min(positions, default=0) < 0 or len(set(positions)) < len(positions):
        raise ValueError(f"patch: needs a position of 0 or more for each of {len(rows)} rows, got {list(positions)}")
    places = torch.tensor(positions, dtype=torch.long)

    def values(stream: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        here = reading.position[..., None] == places.to(reading.position.device)
        which, held = here.int().argmax(-1), here.any(-1)
        return rows.to(stream)[which.to(stream.device)], held.to(stream.device)

    return Replacement(space, values)


def own_patch(model: Any, site: SiteLike, prompt: PromptLike, pairs: Pairs) -> Replacement:
    """Give some positions of a text the model's own activations in another text.

    Args:
        model: The model that reads and is patched.
        site: Where.
        prompt: The text that is read, such as the clean prompt.
        pairs: Token positions of ``prompt``, and for each the position that is patched.

    Raises:
        PromptError: A position is beyond the prompt.

    Example:
        >>> with steering(model, own_patch(model, 9, "Rome is in", [(1, 1)])):   # doctest: +SKIP
        ...     generate(model, ["Paris is in"])
    """
    site = as_site(site)
    return patch(space_of(model, site), _rows(model, site, prompt, pairs), [place for _, place in pairs])


def mapped_patch(source: Any, mapping: Map, prompt: PromptLike, pairs: Pairs) -> Replacement:
    """Give some positions of a target's text mapped activations of a source.

    Args:
        source: The model that reads.
        mapping: A map from a site of the source to one of the model that is patched.
        prompt: The text that the source reads.
        pairs: Token positions of ``prompt`` in the source, and for each the target's position that is patched.

    Raises:
        PromptError: A position is beyond the prompt.
        SpaceMismatchError: The map is of another source.
    """
    require_same_space(space_of(source, mapping.source.site), mapping.source, "mapped_patch")
    rows = mapping.transform(_rows(source, mapping.source.site, prompt, pairs))
    return patch(mapping.target, rows, [place for _, place in pairs])


def first_row(model: Any, encoding: Encoding, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Read one text's activations."""
    return {site: rows[0] for site, rows in residuals(model, batches(model, [encoding], 1)[0], sites).items()}


def _rows(model: Any, site: Site, prompt: PromptLike, pairs: Pairs) -> Tensor:
    (encoding,) = encode(model, [Prompt.of(prompt)])
    if not pairs or not all(0 <= read < len(encoding.ids) for read, _ in pairs):
        raise PromptError(
            f"patch: the positions that are read must be some of 0 to {len(encoding.ids) - 1}, got {[read for read, _ in pairs]}"
        )
    return first_row(model, encoding, [site])[site][[read for read, _ in pairs]]

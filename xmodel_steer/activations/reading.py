"""Activations of prompts."""

from typing import Any, Literal

import torch
from torch import Tensor

from xmodel_steer.core.bars import progress_bar, with_progress
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompts
from xmodel_steer.core.spaces import Site, Sites, as_site, as_sites
from xmodel_steer.core.vectors import Activations
from xmodel_steer.models.arguments import require_counts
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import dtype_of, name_of
from xmodel_steer.models.recorder import residuals
from xmodel_steer.models.sites import space_of
from xmodel_steer.models.tokens import Encoding

Tokens = Literal["last", "mean", "all"] | tuple[int, int]


class BySite(dict[Site, Activations]):
    """Activations by site; key 10 finds ``Site(10)``."""

    def __missing__(self, key: Any) -> Activations:
        if isinstance(key, Site):
            raise KeyError(key)
        return self[as_site(key)]


@with_progress
def capture(
    model: Any,
    prompts: Prompts,
    sites: Sites,
    *,
    tokens: Tokens = "last",
    batch_size: int = 16,
    padding_side: str = "right",
    include_special: bool = False,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[Site, Activations]:
    """Read activations of prompts at several sites, in one pass that computes no logits.

    They equal Hugging Face's ``output_hidden_states`` for every layer but the last: Hugging Face gives that one after
    the final norm, this function before it.

    Args:
        model: A TransformerLens model.
        prompts: Strings, lists of chat messages, prompts, or rows; see `as_prompts`.
        sites: Sites or layer numbers to read, or a single one.
        tokens: ``"last"``: the last token of each prompt, template included. ``"mean"``: the mean over its content's
            tokens. ``"all"``: one row per token of its content. ``(start, end)``: one row per token that ends on a
            character of that span of the content, without the end.
        batch_size: Prompts per forward pass.
        padding_side: ``"right"`` or ``"left"``; the result is the same.
        include_special: For ``"mean"`` and ``"all"``, include special and template tokens and text position 0, an
            attention sink whose norm dwarfs all others.
        max_tokens: Cut longer prompts; without it one longer than the context is refused.
        progress: Show progress bars; see `quiet`.

    Returns:
        Activations by site (a layer's number is a key too): prompts in their order, on the CPU, in the model's dtype
        (means in float32 or wider).

    Raises:
        PromptError: There are no prompts, one is too long, or one has no token to read.
        SiteError: The model has no such site.
        NonFiniteError: An activation is NaN or infinite.
    """
    require_counts(batch_size=batch_size, **({} if max_tokens is None else {"max_tokens": max_tokens}))
    sites, items = as_sites(sites), as_prompts(prompts)
    if not items:
        raise PromptError("capture: no prompts were given")
    if not sites:
        raise ValueError("capture: give at least one site, such as xs.Site(10)")
    encodings = encode(model, items, max_tokens=max_tokens)
    chosen = [_positions(e, tokens, include_special) for e in encodings]
    rows: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(items) for site in sites}
    total = sum(len(e.ids) for e in encodings)
    with progress_bar(total=total, unit="tok", desc=f"capture {name_of(model)}") as bar:
        for batch in batches(model, encodings, batch_size, padding_side=padding_side):
            streams = residuals(model, batch, sites)
            for site, stream in streams.items():
                real = batch.mask.bool().to(stream.device)
                for r, i in enumerate(batch.rows):
                    values = stream[r][real[r]][torch.tensor(chosen[i], device=stream.device)]
                    if tokens == "mean":
                        values = values.to(torch.promote_types(values.dtype, torch.float32)).mean(0, keepdim=True)
                    rows[site][i] = values.cpu()
            bar.update(int(batch.mask.sum()))
    labels = tuple(
        (e.prompt.id, e.ends[p])
        for e, positions in zip(encodings, chosen, strict=True)
        for p in (positions[-1:] if tokens == "mean" else positions)
    )
    activations = BySite()
    for site, parts in rows.items():
        values = torch.cat(parts)
        check_finite(values, f"capture {name_of(model)} {site} ({dtype_of(model)})")
        activations[site] = Activations(values, space_of(model, site), labels)
    return activations


def _positions(encoding: Encoding, tokens: Tokens, include_special: bool) -> list[int]:
    """List the token positions of one prompt that ``tokens`` asks for."""
    count = len(encoding.ids)
    if tokens == "last":
        return [count - 1]
    ends = encoding.token_ends(include_special=include_special).ends
    if tokens in ("mean", "all"):
        positions = [i for i in range(count) if include_special or ends[i] >= 0]
        lacks = "token other than special ones and text position 0; pass include_special=True or a longer prompt"
    elif isinstance(tokens, tuple) and len(tokens) == 2:
        start, end = tokens
        if not 0 <= start < end:  # special tokens end at -1
            raise ValueError(f"tokens: a span of characters must be (start, end) with 0 <= start < end, got {tokens!r}")
        positions = [i for i in range(count) if start < encoding.ends[i] <= end]
        lacks = f"token that ends within characters {start} to {end}"
    else:
        raise ValueError(f"tokens must be 'last', 'mean', 'all' or a (start, end) span of characters, got {tokens!r}")
    if not positions:
        raise PromptError(f"prompt {encoding.prompt.id} ({encoding.prompt.content_key()[:60]!r}) has no {lacks}")
    return positions

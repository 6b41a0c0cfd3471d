"""Registration of models: name, tokenizer, sites, and the laws that they pass."""

import itertools
import warnings
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from xmodel_steer.core.errors import CacheWarning, ModelError, ModelWarning
from xmodel_steer.models import laws
from xmodel_steer.models.batching import pad_id
from xmodel_steer.models.bridges import read_caches
from xmodel_steer.models.facts import (
    FACTS,
    Facts,
    context_length,
    device_of,
    dtype_of,
    embedding_rows,
    facts_of,
    is_bridge,
    require_hooked,
)
from xmodel_steer.models.identity import fingerprint
from xmodel_steer.models.laws import Conduct
from xmodel_steer.models.passes import forward, keep_rows
from xmodel_steer.models.sites import check_sites
from xmodel_steer.models.tokens import special_ids


def published_tokenizer(path: str, revision: str | None = None) -> Any:
    """Load a tokenizer as published in a folder or on the hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def register(model: Any, *, name: str = "", tokenizer: Any = None, revision: str = "") -> None:
    """Register a hooked model that was made elsewhere; `load` registers its own.

    Args:
        model: A TransformerLens model. A plain Hugging Face model goes to `load`.
        name: Its name, for messages and results; ``model.cfg.model_name`` by default.
        tokenizer: A fast Hugging Face tokenizer, as published with the model. By default the model's tokenizer,
            loaded again from its origin: TransformerLens changes how a tokenizer handles BOS.
        revision: Revision of the model on the hub, for the record.

    Raises:
        ModelError: The model is no TransformerLens model, or the tokenizer is missing, has no character offsets, or
            has more tokens than the model.
        SiteError: A site does not fire, or is misshapen.
    """
    require_hooked(model)
    name = name or str(getattr(model.cfg, "model_name", None) or "model")
    if tokenizer is None:
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ModelError(
                f"{name}: the model has no tokenizer; give it one with xs.register(model, name=..., tokenizer=...)"
            )
        with suppress(Exception):  # made in memory, or its origin is gone: use the model's
            tokenizer = published_tokenizer(tokenizer.name_or_path)
    know(model, name=name, tokenizer=tokenizer, revision=revision)
    check_sites(model)
    prove(model)


def know(model: Any, *, name: str, tokenizer: Any, revision: str = "", weights: str = "") -> None:
    """Register a model without checks; ``weights`` replaces the fingerprint of its weights."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name}: needs a fast tokenizer, which gives character offsets, got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer, or convert it (tokenizer.json)"
        )
    rows, special = embedding_rows(model), special_ids(tokenizer)
    # Special tokens without an embedding are common (padding, images): `encode` refuses texts with them.
    words = {i: token for token, i in getattr(tokenizer, "get_vocab", dict)().items() if i not in special}
    if (last := max(words, default=0)) >= rows:
        raise ModelError(
            f"{name}: its tokenizer has tokens up to id {last} ({words[last]!r}), but the model has embeddings for {rows} only, ids 0 to "
            f"{rows - 1}; give the tokenizer that the model was trained with, or resize the embeddings "
            "(model.resize_token_embeddings) and train the new ones before TransformerLens takes the model"
        )
    if is_bridge(model):
        read_caches(model)
    FACTS[model] = Facts(name, tokenizer, weights or fingerprint(model), revision)


#: The text of the trials: plain English, since rounding is largest at random tokens.
_PROOF = (
    "The river rises in the hills north of the town and flows south through farmland before it reaches the sea. "
    "In winter the lower valley often floods, and the road to the coast is closed for several days."
)
_PROOF_TOKENS = 9


def prove(model: Any) -> Conduct:
    """Try the laws of `xmodel_steer.models.laws` on a model, and record its abilities.

    Warns:
        CacheWarning: A cached step differs from reading the whole text again; `generate` then uses no cache.
        ModelWarning: Texts cannot be padded or batched; they are then read one length, or one text, at a time.
    """
    facts, device = facts_of(model), device_of(model)

    def decoder(ids: Tensor, mask: Tensor, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
        settings = {"cache": cache, "use_cache": use_cache, "logits": laws.LAST}
        logits, cache = forward(model, ids.to(device), mask.to(device), **settings)
        assert logits is not None
        return logits.float().cpu(), cache

    length = min(_PROOF_TOKENS, context_length(model))
    words = facts.tokenizer(_PROOF, add_special_tokens=False)["input_ids"]
    if length < laws.LAST + 3 or not words:
        return facts.conduct  # the context is too short, or the tokenizer empty, for any trial
    ids = itertools.cycle(words)
    texts = [list(itertools.islice(ids, n)) for n in (length, length, length - 3)]
    conduct = laws.prove(
        decoder,
        lambda cache, rows: keep_rows(cache, rows.to(device)),
        texts,
        dtype=dtype_of(model),
        pad=pad_id(model),
    )
    FACTS[model] = replace(facts, conduct=conduct)
    for law in conduct.laws:
        if law.state == "failed" and law.name != laws.DROPPING:
            kind = CacheWarning if law.name == laws.CACHED else ModelWarning
            warnings.warn(
                f"{facts.name}: not true of this model here: {law.name} ({law.detail}); {law.remedy}. "
                "Another version of transformers or transformer-lens may be right; xmodel-steer check prints every law",
                kind,
                stacklevel=3,
            )
    return conduct

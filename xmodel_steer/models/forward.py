"""Hooked models: the few facts and calls that the rest of the library needs.

Every function takes a TransformerLens model as it is: a ``TransformerBridge`` (what `load`
returns), or a ``HookedTransformer`` of transformer-lens 3.x that the user made.
"""

import hashlib
import inspect
import itertools
import os
import platform
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from xmodel_steer.core.errors import CacheWarning, ModelError, ModelWarning, PromptError, SiteError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import STREAMS, Site, Space
from xmodel_steer.models import laws
from xmodel_steer.models.bridges import own_parts, read_caches
from xmodel_steer.models.laws import Conduct
from xmodel_steer.models.tokens import Encoding, special_ids, tokenise


@runtime_checkable
class HookedModel(Protocol):
    """What this library uses of a TransformerLens model."""

    cfg: Any
    tokenizer: Any
    blocks: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass."""
        ...

    def hooks(self, fwd_hooks: list[Any]) -> Any:
        """A context in which functions are hooked to named points."""
        ...


@dataclass(frozen=True, eq=False)
class _Facts:
    """What is known of a model that is not on the model itself."""

    name: str
    tokenizer: Any
    fingerprint: str
    revision: str
    conduct: Conduct = field(default_factory=Conduct)


_FACTS: "weakref.WeakKeyDictionary[Any, _Facts]" = weakref.WeakKeyDictionary()


def published_tokenizer(path: str, revision: str | None = None) -> Any:
    """A tokenizer as its folder or hub name has it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def register(model: Any, *, name: str = "", tokenizer: Any = None, revision: str = "") -> None:
    """Tell the library of a hooked model that was made elsewhere; `load` does this.

    Args:
        model: A TransformerLens model.
        name: Its name, for messages and results; ``model.cfg.model_name`` by default.
        tokenizer: A fast Hugging Face tokenizer, as published with the model. By default the model's own, loaded afresh from
            where it came from: TransformerLens changes a tokenizer's handling of BOS when it takes it over.
        revision: Revision of the model on the hub, for the record.

    Raises:
        ModelError: It is no TransformerLens model, or the tokenizer is missing, gives no character offsets, or has more tokens
            than the model.
        SiteError: A site does not fire, or is misshapen.
    """
    if not isinstance(model, HookedModel):
        raise ModelError(
            f"needs a TransformerLens model (TransformerBridge, or HookedTransformer of 3.x), got {type(model).__name__}; "
            "load it with xs.load(name)"
        )
    name = name or str(getattr(model.cfg, "model_name", None) or "model")
    if tokenizer is None:
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ModelError(
                f"{name}: the model has no tokenizer; give it one with xs.register(model, name=..., tokenizer=...)"
            )
        with suppress(Exception):  # made in memory, or gone from where it was: the model's own has to do
            tokenizer = published_tokenizer(tokenizer.name_or_path)
    know(model, name=name, tokenizer=tokenizer, revision=revision)
    check_sites(model)
    prove(model)


def know(model: Any, *, name: str, tokenizer: Any, revision: str = "", weights: str = "") -> None:
    """`register`, for callers that may know the fingerprint of the weights better than the weights show it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name}: needs a fast tokenizer, which gives character offsets, got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer, or convert it (tokenizer.json)"
        )
    rows, special = embedding_rows(model), special_ids(tokenizer)
    # Special tokens without an embedding are common (a padding token, an image's): `encode` refuses them where they occur.
    words = {i: token for token, i in getattr(tokenizer, "get_vocab", dict)().items() if i not in special}
    if (last := max(words, default=0)) >= rows:
        raise ModelError(
            f"{name}: its tokenizer has tokens up to id {last} ({words[last]!r}), but the model has embeddings for {rows} only, ids 0 to "
            f"{rows - 1}; give the tokenizer that the model was trained with, or resize the embeddings "
            "(model.resize_token_embeddings) and train the new ones before TransformerLens takes the model"
        )
    if is_bridge(model):
        read_caches(model)
    _FACTS[model] = _Facts(name, tokenizer, weights or fingerprint(model), revision)


def _facts(model: Any) -> _Facts:
    known = _FACTS.get(model) if isinstance(model, torch.nn.Module) else None
    if known is None:
        if isinstance(model, HookedModel):
            name = getattr(model.cfg, "model_name", None) or type(model).__name__
            raise ModelError(
                f"{name}: this model is not known yet; tell the library of it with xs.register(model), or load it with "
                "xs.load(name)"
            )
        raise ModelError(
            f"needs a TransformerLens model (TransformerBridge, or HookedTransformer of 3.x), got {type(model).__name__}; "
            "load it with xs.load(name)"
        )
    return known


def name_of(model: Any) -> str:
    """The model's name."""
    return _facts(model).name


def tokenizer_of(model: Any) -> Any:
    """The model's own tokenizer, as published."""
    return _facts(model).tokenizer


def revision_of(model: Any) -> str:
    """The revision that was asked of the hub, or nothing."""
    return _facts(model).revision


def conduct_of(model: Any) -> Conduct:
    """Return what may be done with the model, as it showed when it was loaded."""
    return _facts(model).conduct


def device_of(model: Any) -> torch.device:
    """The device that token ids go to."""
    # TransformerLens offloads only what computes on the CPU; offloaded weights are on no device
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def dtype_of(model: Any) -> torch.dtype:
    """The dtype of the model's weights."""
    return next(model.parameters()).dtype


def hardware_of(model: Any) -> str:
    """What the model runs on, and in which dtype, in words."""
    device = device_of(model)
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return f"{where}, {str(dtype_of(model)).removeprefix('torch.')}"


def is_bridge(model: Any) -> bool:
    """Whether the model is a TransformerBridge, with the Hugging Face model inside."""
    return hasattr(model, "original_model")


def embedding_rows(model: Any) -> int:
    """How many token ids the model has embeddings for."""
    if is_bridge(model):
        return len(model.original_model.get_input_embeddings().weight)
    return int(model.cfg.d_vocab)


def context_length(model: Any) -> int:
    """How many tokens the model can read."""
    return int(model.cfg.n_ctx)


def processing_of(model: Any) -> str:
    """What was done to the weights that moves residual coordinates, as TransformerLens names it."""
    if is_bridge(model):
        return "compatibility_mode" if getattr(model, "compatibility_mode", False) else "none"
    done = []
    if str(model.cfg.normalization_type).endswith("Pre"):
        done.append("fold_ln")
    writes = getattr(model.blocks[0].mlp, "W_out", None)
    if writes is not None and writes.mean(-1).abs().max() < 1e-5 * writes.abs().max():
        done.append("center_writing_weights")
    return "+".join(done) or "none"


def fingerprint(model: Any) -> str:
    """A short hash of the weights: every tensor, up to 1,024 values of each, as bfloat16.

    The same model loaded in float32 and in bfloat16 has the same fingerprint; a fine-tuned one
    has another.
    """
    digest = hashlib.sha256()
    for parameter in _weights(model):
        flat = parameter.detach().reshape(-1)
        step = max(1, len(flat) // 1024)
        sample = flat[::step][:1024].to("cpu", torch.bfloat16)
        digest.update(str(tuple(parameter.shape)).encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def content_hash(model: Any) -> str:
    """A hash of every bit of the weights, of their dtype, and of the tokenizer.

    What is computed from a model may be cached under it.
    """
    digest = hashlib.sha256()
    for parameter in _weights(model):
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    tokenizer = tokenizer_of(model)
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(getattr(tokenizer, "chat_template", "")).encode())
    digest.update(processing_of(model).encode())
    return digest.hexdigest()


def identity_of(model: Any) -> tuple[Any, ...]:
    """All that hangs together with what a model computes and writes: `content_hash`, settings, the kind of device, and its hooks.

    A device rounds in its own way, generation settings say which tokens end a text, and a hook may do anything.
    """
    # Hugging Face's own, which note attentions and hidden states for whoever asks, change nothing.
    hooks = [
        hook
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
    ]
    if is_bridge(model):
        inner = model.original_model
        own = (inner.config, getattr(inner, "generation_config", None))
        settings = [config.to_json_string() for config in own if config is not None]
    else:
        settings = [repr(model.cfg)]
    return content_hash(model), device_of(model).type, settings, hooks


def _weights(model: Any) -> Iterator[Tensor]:
    """Every weight once, in one order; offloaded ones are read from where they are, one module at a time.

    Raises:
        ModelError: A weight has no values anywhere.
    """
    module = model.original_model if is_bridge(model) else model
    if not any(p.is_meta for p in module.parameters()):
        yield from module.parameters()
        return
    from accelerate.utils import align_module_device

    # Passes part tied weights that are offloaded from each other: only their names and values still tell.
    tied = dict(getattr(module, "all_tied_weights_keys", {}))
    sources: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        fresh = {key: p for key, p in part._parameters.items() if p is not None and id(p) not in seen}
        seen.update(map(id, fresh.values()))
        with align_module_device(part):
            for key, held in fresh.items():
                weight = part._parameters[key]
                name = f"{path}.{key}".replace("._original_component", "")
                if weight is None or weight.is_meta:
                    raise ModelError(f"{name} is on the meta device and has no values; load the model with its weights")
                if name in tied.values():
                    sources[name] = weight
                source = sources.get(tied.get(name, ""))
                if not held.is_meta or source is None or not torch.equal(weight, source):
                    yield weight


def space_of(model: Any, site: Site) -> Space:
    """The vector space at a site of a model.

    Args:
        model: A TransformerLens model.
        site: The place in it.

    Raises:
        SiteError: The model has no such layer, or this layer no such stream. No pass is run to find out.
    """
    facts = _facts(model)
    if site.layer >= model.cfg.n_layers:
        raise SiteError(f"{facts.name}: has layers 0 to {model.cfg.n_layers - 1}, no {site}")
    points = model.hook_dict
    if site.hook_name not in points:
        there = [stream for stream in STREAMS if Site(site.layer, stream).hook_name in points]
        raise SiteError(
            f"{facts.name}: block {site.layer} has no {site.stream}; it has {', '.join(there) or 'no stream'}. "
            "A block whose attention and MLP run in parallel has no resid_mid, a recurrent one no attn_out: "
            "choose a stream that it has"
        )
    return Space(facts.name, site, int(model.cfg.d_model), facts.fingerprint, processing_of(model))


def all_sites(model: Any, stream: str = "resid_post") -> tuple[Site, ...]:
    """One site per layer."""
    return tuple(Site(layer, stream) for layer in range(model.cfg.n_layers))


def sites_of(model: Any, sites: Sequence[Site] | Literal["all"]) -> tuple[Site, ...]:
    """The sites, or the one after every block for ``"all"``."""
    return all_sites(model) if isinstance(sites, str) else tuple(sites)


def check_sites(model: Any, sites: Sequence[Site] | None = None) -> None:
    """Run two tokens through the model and refuse it if a site does not fire or is misshapen.

    Args:
        model: A TransformerLens model.
        sites: The sites that are needed; every layer's ``resid_post`` by default.

    Raises:
        SiteError: Names the sites that are missing or wrong, and says why.
    """
    wanted = tuple(sites) if sites is not None else all_sites(model)
    name = _facts(model).name
    for site in wanted:
        space_of(model, site)  # refuses a layer or stream that is not there
    shapes: dict[str, tuple[int, ...]] = {}
    ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))

    def keep(value: Tensor, hook: Any, key: str) -> None:
        shapes[key] = tuple(value.shape)

    hooks = [(s.hook_name, lambda value, hook, key=s.hook_name: keep(value, hook, key)) for s in wanted]
    try:
        with model.hooks(fwd_hooks=hooks), torch.no_grad():
            forward(model, ids, torch.ones_like(ids), logits="last")
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        kind = type(model.original_model if is_bridge(model) else model).__name__
        raise SiteError(
            f"{name}: cannot be hooked at {wanted[0]} to {wanted[-1]} ({type(error).__name__}: {str(error)[:200]}); "
            f"TransformerLens may not support the architecture {kind}: try another version of it, or another model"
        ) from error
    silent = [str(s) for s in wanted if s.hook_name not in shapes]
    if silent:
        raise SiteError(
            f"{name}: the hook point of {', '.join(silent[:5])} did not fire in a forward pass; "
            "TransformerLens may not hook this stream of this architecture"
        )
    wrong = [(s, shapes[s.hook_name]) for s in wanted if shapes[s.hook_name] != (1, 2, model.cfg.d_model)]
    if wrong:
        site, shape = wrong[0]
        raise SiteError(
            f"{name}: {site} gives shape {shape} for 2 tokens, expected (1, 2, {model.cfg.d_model}); "
            "it is not this model's residual stream"
        )


#: What a model reads to prove itself: plain English, since numbers are rounded most at random tokens.
_PROOF = (
    "The river rises in the hills north of the town and flows south through farmland before it reaches the sea. "
    "In winter the lower valley often floods, and the road to the coast is closed for several days."
)
_PROOF_TOKENS = 9


def prove(model: Any) -> Conduct:
    """Try the laws of `xmodel_steer.models.laws` on a model, and keep to what it shows.

    Warns:
        CacheWarning: One cached step is not the whole text read again: `generate` then goes without a cache.
        ModelWarning: Texts cannot be padded, or not be read together: they then are read one length, or one text, at a time.
    """
    facts, device = _facts(model), device_of(model)

    def decoder(ids: Tensor, mask: Tensor, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
        settings = {"cache": cache, "use_cache": use_cache, "logits": laws.LAST}
        logits, cache = forward(model, ids.to(device), mask.to(device), **settings)
        assert logits is not None
        return logits.float().cpu(), cache

    length = min(_PROOF_TOKENS, context_length(model))
    words = facts.tokenizer(_PROOF, add_special_tokens=False)["input_ids"]
    if length < laws.LAST + 3 or not words:
        return facts.conduct  # too short a context, or no tokens, to tell anything by
    ids = itertools.cycle(words)
    texts = [list(itertools.islice(ids, n)) for n in (length, length, length - 3)]
    conduct = laws.prove(
        decoder,
        lambda cache, rows: keep_rows(cache, rows.to(device)),
        texts,
        dtype=dtype_of(model),
        pad=pad_id(model),
    )
    _FACTS[model] = replace(facts, conduct=conduct)
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


# --- tokens -----------------------------------------------------------------------------------
def encode(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = None,
    truncation_side: str = "right",
    warn: bool = True,
) -> list[Encoding]:
    """Tokenise prompts with the model's own tokenizer, template and special tokens.

    Args:
        model: A TransformerLens model.
        prompts: The prompts.
        max_tokens: Cut longer ones to this many tokens. Without it a prompt longer than the model's
            context is refused.
        truncation_side: Where to cut; see `tokenise`.
        warn: See `tokenise`.

    Raises:
        PromptError: A prompt is longer than the context, gives no tokens, or holds a token that the
            model has no embedding for.
    """
    name, tokenizer, rows = name_of(model), tokenizer_of(model), embedding_rows(model)
    encodings = tokenise(
        tokenizer,
        prompts,
        name=name,
        limit=context_length(model),
        max_tokens=max_tokens,
        truncation_side=truncation_side,
        warn=warn,
    )
    for encoding in encodings:
        beyond = max(encoding.ids)
        if beyond >= rows:
            raise PromptError(
                f"prompt {encoding.prompt.id} ({encoding.prompt.content[:40]!r}): holds the special token "
                f"{tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}), but {name} has embeddings for ids 0 to {rows - 1} only; "
                "take it out of the text, or resize the model's embeddings and train it"
            )
    return encodings


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded token ids with the mask of the real ones.

    Args:
        rows: Which of the caller's prompts each row is.
        ids: Token ids.
        mask: 1 at real tokens.
    """

    rows: tuple[int, ...]
    ids: Int[Tensor, "batch tokens"]
    mask: Int[Tensor, "batch tokens"]


def batches(model: Any, encodings: Sequence[Encoding], batch_size: int, *, padding_side: str = "right") -> list[Batch]:
    """Batches of prompts of similar length, longest first, so that little is padding.

    A model that does not read a padded text as it reads it alone gets texts of one length, or one text, at a time (`Conduct`).
    A batch ends at its size, or where the next prompt would be padding for more than half, and for over 64 tokens: a few
    long prompts would else be the price of all. Longest first also means that a batch size that does not fit in memory fails at once.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    lengths = [len(encoding.ids) for encoding in encodings]
    conduct = conduct_of(model)
    batch_size = batch_size if conduct.batched else 1
    groups: list[list[int]] = []
    for i in sorted(range(len(encodings)), key=lambda i: -lengths[i]):
        padding = lengths[groups[-1][0]] - lengths[i] if groups else 0
        if groups and len(groups[-1]) < batch_size and padding <= (max(lengths[i], 64) if conduct.padded else 0):
            groups[-1].append(i)
        else:
            groups.append([i])
    device = device_of(model)
    made = []
    for rows in groups:
        width = lengths[rows[0]]
        ids = torch.full((len(rows), width), pad_id(model), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for r, i in enumerate(rows):
            own = torch.tensor(encodings[i].ids)
            place = slice(0, len(own)) if padding_side == "right" else slice(width - len(own), width)
            ids[r, place], mask[r, place] = own, 1
        made.append(Batch(tuple(rows), ids.to(device), mask.to(device)))
    return made


def pad_id(model: Any) -> int:
    """A token id for padding that the model has an embedding of; which one does not matter, the mask hides it."""
    tokenizer, rows = tokenizer_of(model), embedding_rows(model)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < rows:  # a padding token is often added without an embedding
            return int(candidate)
    return 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Which texts a forward pass is about; see `layout`."""

    rows: tuple[int, ...]
    prompt_lengths: Int[Tensor, " batch"] | None


LAYOUT: ContextVar[Layout | None] = ContextVar("xmodel_steer_layout", default=None)
#: The module that `forward` is calling, and the mask of the whole text, cached tokens included.
READING: ContextVar[tuple[Any, Tensor] | None] = ContextVar("xmodel_steer_reading", default=None)


@contextmanager
def reading(module: Any, mask: Int[Tensor, "batch total"]) -> Iterator[None]:
    """Tell steering hooks the mask of the whole text: not every model is given it, nor takes it under one name."""
    token = READING.set((module, mask))
    try:
        yield
    finally:
        READING.reset(token)


@contextmanager
def layout(rows: Sequence[int], prompt_lengths: Tensor | None = None) -> Iterator[None]:
    """Tell steering hooks which prompts the rows are, and how many real tokens their prompts have.

    A hook sees neither: in an uncached decode every pass looks like a new prompt.
    """
    token = LAYOUT.set(Layout(tuple(rows), prompt_lengths))
    try:
        yield
    finally:
        LAYOUT.reset(token)


# --- forward passes ---------------------------------------------------------------------------
@torch.no_grad()
def forward(
    model: Any,
    ids: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch total"],
    *,
    logits: Literal["none", "last", "all"] | int = "all",
    stop_at_layer: int | None = None,
    cache: Any = None,
    use_cache: bool = False,
) -> tuple[Tensor | None, Any]:
    """One forward pass on both kinds of model, with positions counted from the mask.

    Args:
        model: A TransformerLens model.
        ids: The new tokens.
        mask: 1 at real tokens, over cached and new ones.
        logits: Which logits to compute, or those of how many last tokens: Gemma's cost twice its whole residual stream.
        stop_at_layer: Run blocks below this one only; implies no logits.
        cache: What an earlier call with ``use_cache`` returned.
        use_cache: Keep keys and values for a next call.

    Returns:
        Logits ``(batch, new or as many as asked for, vocabulary)`` or None, and the cache or None.
    """
    new = ids.shape[1]
    kept = 1 if logits == "last" else logits if isinstance(logits, int) else 0
    if not is_bridge(model):
        if use_cache and cache is None:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            cache = TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), len(ids))
        stop = stop_at_layer if stop_at_layer is not None else (model.cfg.n_layers if logits == "none" else None)
        with reading(model, mask):
            out = model(ids, attention_mask=mask[:, -new:], past_kv_cache=cache, stop_at_layer=stop)
        return (None if stop is not None else out[:, -kept:] if kept else out), cache
    if logits == "none" or stop_at_layer is not None:
        if use_cache or cache is not None:
            raise ValueError("forward: a pass that stops early has no cache")
        stop = stop_at_layer if stop_at_layer is not None else model.cfg.n_layers
        last = stop >= model.cfg.n_layers  # nothing to stop at: skip the logits instead
        extra = {"logits_to_keep": 1} if last and _accepts(model, "logits_to_keep") else {}
        where = {} if last else {"stop_at_layer": stop}
        with _short_cut(model, whole_blocks=last), reading(model.original_model, mask):
            model(ids, attention_mask=mask, return_type="logits", use_cache=False, **where, **extra)
        return None, None
    extra: dict[str, Any] = {"logits_to_keep": kept} if kept and _accepts(model, "logits_to_keep") else {}
    if _accepts(model, "position_ids"):
        extra["position_ids"] = text_positions(mask)[:, -new:]
    name = _cache_argument(model.original_model)
    if cache is not None:
        extra[name] = cache
        if not counts_tokens(cache):
            extra["attention_mask"] = mask[:, -new:]  # a recurrent state needs no mask of what it has read
    with _short_cut(model, whole_blocks=True), _rows_together(model), reading(model.original_model, mask):
        out = model.original_model(
            **{"input_ids": ids, "attention_mask": mask, "use_cache": use_cache, "return_dict": True, **extra}
        )
    made = out.logits[:, -kept:] if kept else out.logits
    return made, getattr(out, name) if use_cache else None


#: How models call what they keep of the tokens that they have read, newest spelling first: transformers since 5.24 and
#: before, Mamba, RWKV.
CACHES = ("cache", "past_key_values", "cache_params", "state")


def _cache_argument(inner: Any) -> str:
    """The name under which a Hugging Face model takes and returns its cache; the newest that it knows."""
    accepted = _parameters(type(inner))
    return next((name for name in CACHES if name in accepted), CACHES[0])


def counts_tokens(cache: Any) -> bool:
    """Tell whether a cache knows how many tokens it holds; a recurrent state does not."""
    try:
        return int(cache.get_seq_length()) >= 0
    except (AttributeError, ValueError, TypeError):
        return False


def keep_rows(cache: Any, rows: Int[Tensor, " kept"]) -> None:
    """Leave only these rows of the batch in a cache, in place.

    Args:
        cache: What `forward` returned for a model whose rows may leave (`Conduct.dropping`), or None.
        rows: Numbers of rows, in the order in which they are to stand.
    """
    if cache is None:
        return
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(rows)
        return
    for entry in cache.entries:
        entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
    cache.previous_attention_mask = cache.previous_attention_mask[rows]


def text_positions(mask: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Positions in the text, counted from each row's first real token; 0 on padding before it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _short_cut(model: Any, *, whole_blocks: bool) -> AbstractContextManager[None]:
    return own_parts(model, whole_blocks=whole_blocks) if processing_of(model) == "none" else nullcontext()


@contextmanager
def _rows_together(model: Any) -> Iterator[None]:
    """Let the output layer see rows that lie together in memory.

    Of a slice of the positions, with weights that ask for no gradient, torch multiplies each prompt with a copy of the
    weights of its own: thirty times slower, and 20 GB for a large vocabulary.
    """
    head = model.original_model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (*(a.contiguous() for a in args[:1]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _accepts(model: Any, argument: str) -> bool:
    return argument in _parameters(type(model.original_model))


@lru_cache
def _parameters(kind: type) -> frozenset[str]:
    """Return the names of the arguments of a class's forward pass; asked at every step of a decode."""
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]

"""Hooked models: loading them, and the few facts and calls that the rest of the library needs.

Every function takes a TransformerLens model as it is: a ``TransformerBridge`` (what `load`
returns), or a ``HookedTransformer`` of transformer-lens 3.x that the user made.
"""

import hashlib
import inspect
import json
import os
import platform
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from xmodel_steer.alignment import TokenEnds
from xmodel_steer.bridges import own_parts, prepare
from xmodel_steer.errors import ModelError, PromptError, SiteError, XModelSteerError
from xmodel_steer.packaged import converted_gguf, packaged_model, quiet
from xmodel_steer.prompts import Prompt
from xmodel_steer.spaces import Site, Space


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


_FACTS: "weakref.WeakKeyDictionary[Any, _Facts]" = weakref.WeakKeyDictionary()


def load(
    name: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Any:
    """Load a model with hook points, as a TransformerLens ``TransformerBridge``.

    No weight processing is done: residual coordinates are those of the model as published.

    A folder with a PEFT adapter gives its base model with the adapter merged into the weights. That is a model of its
    own: its spaces are neither those of its base nor those of another adapter. Their fingerprint is made of the
    base's and of the adapter's file, so that it does not depend on how a processor rounds the merge. A tokenizer that stands
    in the folder, with its chat template, is the model's; else the base's is.

    Args:
        name: A hub name (``"Qwen/Qwen2.5-0.5B-Instruct"``), a local folder in Hugging Face
            format or with a PEFT adapter, a ``.gguf`` file, or ``"packaged:smollm2-135m-instruct"`` or
            ``"packaged:gemma-3-270m"``, which come from the Python package index.
        base: The base model of an adapter, where it is not to be had under the name that the adapter gives.
        device: Where to put it; CUDA if there is one, else the CPU.
        dtype: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 on CUDA and on processors
            where it is faster, else float32.
        device_map: ``"auto"`` spreads a model that one device cannot hold over all of them; excludes ``device``.
        revision: Revision of a hub model; of the base of an adapter.
        progress: Show progress bars.

    Returns:
        The hooked model, in evaluation mode.

    Raises:
        ModelError: The name is unknown, the hub cannot be reached, or the model cannot be hooked.
        DownloadError: A packaged model cannot be downloaded.
        SiteError: The model's residual stream does not fire or has the wrong shape.
    """
    if device is not None and device_map is not None:
        raise ModelError(f"{name}: give device or device_map, not both")
    chosen = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    kind = resolve_dtype(dtype, chosen)
    adapter = _adapter_of(name)
    if adapter is None and base is not None:
        raise ModelError(f"{name}: base= is for the folder of an adapter, which has an adapter_config.json")
    source = name if adapter is None else base or _base_named_by(adapter)
    label, path = located(source, progress=progress)
    label = label if adapter is None else adapter.resolve().name
    if revision is not None and Path(path).exists():
        raise ModelError(f"{label}: revision= is for models of the hub; this one is loaded from {path}")

    with tqdm(total=4, desc=f"load {label}", unit="step", disable=not progress, leave=False) as bar, quiet():
        from transformer_lens.model_bridge import TransformerBridge

        bar.update()
        own = ""
        with loading(label if adapter is None else f"{label} (base {source})", path):
            if adapter is None:
                where: dict[str, Any] = {"device": chosen} if device_map is None else {"device_map": device_map}
            else:
                merged, own = _merged(path, adapter, chosen, kind, device_map, revision)
                where = {"hf_model": merged, "device": None if device_map is not None else chosen}
            model = TransformerBridge.boot_transformers(path, dtype=kind, revision=revision, **where)
            bar.update()
            # A training that gave the adapter another chat template or tokens saves them beside it.
            beside = adapter is not None and (adapter / "tokenizer_config.json").is_file()
            tokenizer = _tokenizer_of(str(adapter)) if beside else _tokenizer_of(path, revision)
        # Weights keep requires_grad: without it torch multiplies many (batch, 1, d) activations by a
        # copy of the weights per row (batched product instead of one), 20 times slower in a decode.
        # Every pass of this library runs under no_grad.
        model.eval()
        bar.update()
        register(model, name=label, tokenizer=tokenizer, revision=revision or "")
        if own:
            _FACTS[model] = replace(_FACTS[model], fingerprint=own)
        check_sites(model)
        prepare(model)
        bar.update()
    return model


def located(name: str | Path, *, progress: bool = True) -> tuple[str, str]:
    """What a model is called, and the folder or hub name to load it from; fetches and converts it where needed.

    Args:
        name: As for `load`, but no adapter.
        progress: Show progress bars.

    Raises:
        ModelError: There is no such folder, file or packaged model.
        DownloadError: A packaged model cannot be downloaded.
    """
    label = str(name)
    local = Path(name).expanduser()
    if label.startswith("packaged:"):
        return label, str(packaged_model(label.removeprefix("packaged:"), progress=progress))
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"{label}: no such GGUF file")
        return local.name, str(converted_gguf(local, progress=progress))
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(
                f"{label}: the folder has no config.json; give a folder in Hugging Face format or of a PEFT adapter, "
                "or a .gguf file"
            )
        return local.resolve().name, str(local)
    if label.startswith((".", "/", "~")) or label.count("/") > 1:
        raise ModelError(f"{label}: no such folder")
    return label, label


def require_reachable(name: str | Path, *, progress: bool = True) -> None:
    """Find out whether a model can be had, before work begins that would be in vain without it.

    Fetches what is small of a hub model, its configuration and its tokenizer.

    Args:
        name: As for `load`.
        progress: Show progress bars.

    Raises:
        ModelError: The name is unknown, or the hub cannot be reached or does not give the model.
        DownloadError: A packaged model cannot be downloaded.
    """
    from transformers import AutoConfig

    adapter = _adapter_of(name)
    label, path = located(name if adapter is None else _base_named_by(adapter), progress=progress)
    with loading(label, path), quiet():
        AutoConfig.from_pretrained(path)
        _tokenizer_of(path, None)


@contextmanager
def loading(label: str, path: str) -> Iterator[None]:
    """One clear `ModelError` for whatever goes wrong while a model is loaded.

    Args:
        label: What it is called.
        path: The folder or hub name that it is loaded from.
    """
    try:
        yield
    except XModelSteerError:
        raise
    except Exception as error:  # the hub client and both libraries raise many kinds
        raise ModelError(_load_failure(label, path, error)) from error


def _adapter_of(name: str | Path) -> Path | None:
    """The folder of a PEFT adapter, if this is one."""
    local = Path(name).expanduser()
    return local if (local / "adapter_config.json").is_file() else None


def _base_named_by(adapter: Path) -> str:
    try:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{adapter}: its adapter_config.json names no base model ({type(error).__name__}: {error}); give base="
        ) from error
    if not named or (Path(named).is_absolute() and not Path(named).exists()):
        raise ModelError(f"{adapter}: its base model {named!r} is not here; give base=")
    return str(named)


def _merged(
    path: str,
    adapter: Path,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None,
    revision: str | None,
) -> tuple[Any, str]:
    """A base model with an adapter merged into its weights (in float32, rounded afterwards), and its fingerprint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    weights = adapter / "adapter_model.safetensors"
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not weights.is_file():
        raise ModelError(f"{adapter}: has no adapter_model.safetensors; save the adapter as safetensors")
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=device_map, revision=revision)
    # What an adapter does hangs on its weights and settings, not on where its base was found.
    # Its lists are sets to peft, which writes them in any order.
    does = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in settings.items()
        if key not in ("base_model_name_or_path", "revision", "peft_version")
    }
    own = hashlib.sha256(fingerprint(hf).encode() + json.dumps(does, sort_keys=True).encode() + weights.read_bytes())
    merged: Any = PeftModel.from_pretrained(hf, str(adapter)).merge_and_unload()
    for parameter in merged.parameters():  # the buffers stay float32
        parameter.data = parameter.data.to(dtype)
    return merged if device_map is not None else merged.to(device), own.hexdigest()[:16]


def _load_failure(label: str, path: str, error: Exception) -> str:
    chain, cause = [], error
    while cause is not None and len(chain) < 8:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    said = " ".join(f"{type(e).__name__} {e}" for e in chain)
    if (path != label and not Path(path).exists()) or not Path(path).exists():
        if any(
            w in said
            for w in (
                "ConnectionError",
                "ConnectError",
                "Max retries",
                "resolve",
                "ProxyError",
                "Offline",
                "Timeout",
                "LocalEntryNotFound",
                "couldn't connect",
                "Cannot reach",
            )
        ):
            return (
                f"{label}: the model hub cannot be reached and the model is not in the local cache; connect, or give a "
                "local folder, a .gguf file, or packaged:smollm2-135m-instruct / packaged:gemma-3-270m"
            )
        if any(w in said for w in ("RepositoryNotFound", "404", "not a valid model identifier", "401")):
            return f"{label}: the hub knows no such model (or it is gated: log in with `hf auth login`); check the spelling"
    return f"{label}: cannot be loaded ({type(error).__name__}: {str(error).strip()[:300]})"


def _tokenizer_of(path: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype meant by a name; ``"auto"`` is bfloat16 where the hardware multiplies it.

    Raises:
        ModelError: Unknown, or float16, in which many models overflow.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16
        return torch.bfloat16 if _bfloat16_pays() else torch.float32
    chosen = names.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in names.values():
        raise ModelError(
            f"dtype {dtype}: use float32, bfloat16 or auto (float16 overflows in the residual stream of Gemma and others)"
        )
    return chosen


def _bfloat16_pays() -> bool:
    """Whether the processor multiplies bfloat16 itself (three times as fast here); else it is slower.

    Read from the processor, not measured: the same machine must always choose the same.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def register(model: Any, *, name: str, tokenizer: Any, revision: str = "") -> None:
    """Tell the library a model's name and its own tokenizer.

    `load` does this. For a hooked model made elsewhere it happens on first use, with the name in
    ``model.cfg.model_name`` and the tokenizer loaded afresh from where the model's came from:
    TransformerLens changes a tokenizer's handling of BOS when it takes it over.

    Args:
        model: A TransformerLens model.
        name: Its name, for messages and results.
        tokenizer: A fast Hugging Face tokenizer, as published with the model.
        revision: Revision of the model on the hub, for the record.

    Raises:
        ModelError: The tokenizer gives no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name}: needs a fast tokenizer, which gives character offsets, got {type(tokenizer).__name__}; "
            "load it with AutoTokenizer, or convert it (tokenizer.json)"
        )
    _FACTS[model] = _Facts(name, tokenizer, fingerprint(model), revision)


def _facts(model: Any) -> _Facts:
    known = _FACTS.get(model) if isinstance(model, torch.nn.Module) else None
    if known is not None:
        return known
    if not isinstance(model, HookedModel):
        raise ModelError(
            f"needs a TransformerLens model (TransformerBridge, or HookedTransformer of 3.x), got {type(model).__name__}; "
            "load it with xs.load(name)"
        )
    name = str(getattr(model.cfg, "model_name", None) or "model")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(
            f"{name}: the model has no tokenizer; give it one with xs.register(model, name=..., tokenizer=...)"
        )
    with suppress(Exception):  # made in memory, or gone from where it was: the model's own has to do
        tokenizer = _tokenizer_of(tokenizer.name_or_path)
    register(model, name=name, tokenizer=tokenizer)
    check_sites(model)
    return _FACTS[model]


def name_of(model: Any) -> str:
    """The model's name."""
    return _facts(model).name


def tokenizer_of(model: Any) -> Any:
    """The model's own tokenizer, as published."""
    return _facts(model).tokenizer


def revision_of(model: Any) -> str:
    """The revision that was asked of the hub, or nothing."""
    return _facts(model).revision


def device_of(model: Any) -> torch.device:
    """The device that token ids go to."""
    return next(model.parameters()).device


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
    module = model.original_model if is_bridge(model) else model
    yield from module.parameters()


def space_of(model: Any, site: Site) -> Space:
    """The vector space at a site of a model.

    Args:
        model: A TransformerLens model.
        site: The place in it.

    Raises:
        SiteError: The model has no such layer or stream.
    """
    facts = _facts(model)
    if site.layer >= model.cfg.n_layers:
        raise SiteError(f"{facts.name}: has layers 0 to {model.cfg.n_layers - 1}, no {site}")
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
    shapes: dict[str, tuple[int, ...]] = {}
    ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))

    def keep(value: Tensor, hook: Any, key: str) -> None:
        shapes[key] = tuple(value.shape)

    hooks = [(s.hook_name, lambda value, hook, key=s.hook_name: keep(value, hook, key)) for s in wanted]
    try:
        with model.hooks(fwd_hooks=hooks), torch.no_grad():
            forward(model, ids, torch.ones_like(ids), logits="last")
    except (KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise SiteError(
            f"{name}: cannot be hooked at {wanted[0]} to {wanted[-1]} ({type(error).__name__}: {str(error)[:200]}); "
            "TransformerLens may not support this architecture"
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


# --- tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """A prompt as token ids of one model.

    Args:
        ids: Token ids, special tokens included.
        ends: For each token, where it ends in characters of the prompt's content; -1 for special
            and template tokens.
        roles: For each token of a chat template that has a role, the role: 2i for the last one before
            the content of message i (or before an opened assistant's turn), 2i + 1 for the first one
            after it; -1 for all other tokens.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    roles: tuple[int, ...] = ()

    def token_ends(self, *, include_special: bool = False, template: bool = False) -> TokenEnds:
        """The ends of the tokens that may be paired: not text position 0, an attention sink.

        Args:
            include_special: Also text position 0.
            template: Also the template's tokens that have a role.
        """
        ends = list(self.ends)
        if template:
            ends = [-2 - role if role >= 0 else end for end, role in zip(ends, self.roles, strict=True)]
        if not include_special:
            ends[0] = -1
        return TokenEnds(tuple(ends))


def encode(
    model: Any, prompts: Sequence[Prompt], *, max_tokens: int | None = None, truncation_side: str = "right"
) -> list[Encoding]:
    """Tokenise prompts with the model's own tokenizer, template and special tokens.

    Args:
        model: A TransformerLens model.
        prompts: The prompts.
        max_tokens: Cut longer ones to this many tokens. Without it a prompt longer than the model's
            context is refused.
        truncation_side: Where to cut; see `tokenise`.

    Raises:
        PromptError: A prompt is longer than the context, or gives no tokens.
    """
    return tokenise(
        tokenizer_of(model),
        prompts,
        name=name_of(model),
        limit=context_length(model),
        max_tokens=max_tokens,
        truncation_side=truncation_side,
    )


def tokenise(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    name: str = "the model",
    limit: int | None = None,
    max_tokens: int | None = None,
    truncation_side: str = "right",
) -> list[Encoding]:
    """Tokenise prompts, with the character that each token ends on.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        prompts: The prompts.
        name: Name of its model, for messages.
        limit: The model's context; a longer prompt is refused.
        max_tokens: Cut longer prompts to this many tokens.
        truncation_side: Where to cut: ``"right"``, the end; ``"left"``, the beginning, but for
            a BOS that stands there.

    Raises:
        PromptError: A prompt is longer than the context, or gives no tokens.
    """
    special = special_ids(tokenizer)
    opening = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    if truncation_side not in ("left", "right"):
        raise ValueError(f"truncation_side must be 'left' or 'right', got {truncation_side!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    encoded = []
    for prompt in prompts:
        rendered = prompt.render(tokenizer)
        batch = tokenizer(
            rendered.text,
            add_special_tokens=rendered.add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids, offsets = batch["input_ids"], batch["offset_mapping"]
        if not ids:
            raise PromptError(f"prompt {prompt.id}: the tokenizer of {name} makes no tokens of {rendered.text[:60]!r}")
        keep = list(range(len(ids)))
        if max_tokens is not None and len(ids) > max_tokens:
            head = int(truncation_side == "left" and ids[0] in opening and max_tokens > 1)
            start = len(ids) - max_tokens + head if truncation_side == "left" else 0
            keep = [*range(head), *range(start, start + max_tokens - head)]
        if limit is not None and len(keep) > limit:
            raise PromptError(
                f"prompt {prompt.id}: {len(keep)} tokens, but {name} reads at most {limit}; "
                "shorten it or split it (it is not cut silently)"
            )
        ends, span = [], 0
        following = [*offsets[1:], (0, 0)]
        pieces = tokenizer.convert_ids_to_tokens([ids[i] for i in keep])
        for i, piece in zip(keep, pieces, strict=True):
            token, (start, end), (after, beyond) = ids[i], offsets[i], following[i]
            if not piece.strip("▁") and rendered.text[start:end].strip():
                end = start  # a prefix that SentencePiece adds: its offsets claim a character that it has not read
            if start <= after < end < beyond:
                end = start  # the rest of its last character (a ligature's second letter) is in a token that goes on
            while span < len(rendered.spans) and end > rendered.spans[span][1]:
                span += 1
            inside = span < len(rendered.spans) and rendered.spans[span][0] < end
            if token in special or end <= start or not inside:
                ends.append(-1)
            else:
                first, _, base = rendered.spans[span]
                ends.append(end - first + base)
        roles = _roles(rendered.marks, offsets, dict(zip(keep, ends, strict=True)))
        encoded.append(Encoding(prompt, tuple(ids[i] for i in keep), tuple(ends), roles))
    return encoded


def shared_start(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    together = zip(*sequences, strict=False)  # up to the end of the shortest
    return next((n for n, tokens in enumerate(together) if len(set(tokens)) > 1), min(map(len, sequences)))


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that are no text, such as BOS and what opens a chat's turn."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def _roles(
    marks: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], ends: Mapping[int, int]
) -> tuple[int, ...]:
    """The role of each template token, from the borders between template and content.

    A template's own number of tokens does not matter: what counts is the last token that was read
    before a content, and the first one after it; of the whole text, so that no kept token takes the role of one that is cut off.

    Args:
        marks: Where the borders are, and the roles.
        offsets: Of all tokens.
        ends: Of those that are kept, by their places among all.
    """
    roles = dict.fromkeys(ends, -1)
    for place, role in sorted(marks, key=lambda mark: mark[1] % 2, reverse=True):  # beginnings go last, and win
        if role % 2:
            found = next((i for i, (start, end) in enumerate(offsets) if start >= place and end > start), None)
        else:
            found = next((i for i in range(len(offsets) - 1, -1, -1) if 0 < offsets[i][1] <= place), None)
        if found is not None and ends.get(found) == -1:
            roles[found] = role
    return tuple(roles.values())


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

    A batch ends at its size, or where the next prompt would be padding for more than half, and for over 64 tokens: a few
    long prompts would else be the price of all. Longest first also means that a batch size that does not fit in memory fails at once.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    lengths = [len(encoding.ids) for encoding in encodings]
    groups: list[list[int]] = []
    for i in sorted(range(len(encodings)), key=lambda i: -lengths[i]):
        padding = lengths[groups[-1][0]] - lengths[i] if groups else 0
        if groups and len(groups[-1]) < batch_size and padding <= max(lengths[i], 64):
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
    """A token id for padding; which one does not matter, the mask hides it."""
    tokenizer = tokenizer_of(model)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Which texts a forward pass is about; see `layout`."""

    rows: tuple[int, ...]
    prompt_lengths: Int[Tensor, " batch"] | None


LAYOUT: ContextVar[Layout | None] = ContextVar("xmodel_steer_layout", default=None)


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
        out = model(ids, attention_mask=mask[:, -new:], past_kv_cache=cache, stop_at_layer=stop)
        return (None if stop is not None else out[:, -kept:] if kept else out), cache
    if logits == "none" or stop_at_layer is not None:
        if use_cache or cache is not None:
            raise ValueError("forward: a pass that stops early has no cache")
        stop = stop_at_layer if stop_at_layer is not None else model.cfg.n_layers
        last = stop >= model.cfg.n_layers  # nothing to stop at: skip the logits instead
        extra = {"logits_to_keep": 1} if last and _accepts(model, "logits_to_keep") else {}
        where = {} if last else {"stop_at_layer": stop}
        with _short_cut(model, whole_blocks=last):
            model(ids, attention_mask=mask, return_type="logits", use_cache=False, **where, **extra)
        return None, None
    extra: dict[str, Any] = {"logits_to_keep": kept} if kept and _accepts(model, "logits_to_keep") else {}
    if _accepts(model, "position_ids"):
        extra["position_ids"] = text_positions(mask)[:, -new:]
    with _short_cut(model, whole_blocks=True), _rows_together(model):
        out = model.original_model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=use_cache, return_dict=True, **extra
        )
    made = out.logits[:, -kept:] if kept else out.logits
    return made, getattr(out, "past_key_values", None) if use_cache else None


def keep_rows(cache: Any, rows: Int[Tensor, " kept"]) -> None:
    """Leave only these rows of the batch in a cache, in place.

    Args:
        cache: What `forward` returned, or None.
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
    return argument in inspect.signature(model.original_model.forward).parameters

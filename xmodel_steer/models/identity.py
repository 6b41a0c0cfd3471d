"""Identity of a model: a short hash of its weights, and everything that its output depends on."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import ModelError
from xmodel_steer.models.facts import device_of, is_bridge, tokenizer_of


def processing_of(model: Any) -> str:
    """Name the weight processing that moves residual coordinates, as TransformerLens does."""
    if is_bridge(model):
        return "compatibility_mode" if getattr(model, "compatibility_mode", False) else "none"
    steps = []
    if str(model.cfg.normalization_type).endswith("Pre"):
        steps.append("fold_ln")
    writes = getattr(model.blocks[0].mlp, "W_out", None)
    if writes is not None and writes.mean(-1).abs().max() < 1e-5 * writes.abs().max():
        steps.append("center_writing_weights")
    return "+".join(steps) or "none"


def fingerprint(model: Any) -> str:
    """Hash the weights: every tensor, up to 1,024 values of each, as bfloat16.

    A model has one fingerprint in float32 and in bfloat16; a fine-tuned model has another.
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
    """Hash every bit of weights and tokenizer: a key for cached results."""
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
    """Return everything a model's output depends on: `content_hash`, kind of device, settings and hooks.

    Kinds of devices round differently, generation settings name the tokens that end a text, and a hook may do
    anything.
    """
    # Hugging Face's hooks that record attentions and hidden states change nothing.
    hooks = [
        hook
        for module in model.modules()
        for hook in list(module._forward_hooks.values())  # another thread may add one
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
    ]
    if is_bridge(model):
        inner = model.original_model
        configs = (inner.config, getattr(inner, "generation_config", None))
        settings = [config.to_json_string() for config in configs if config is not None]
    else:
        settings = [repr(model.cfg)]
    return content_hash(model), device_of(model).type, settings, hooks


def _weights(model: Any) -> Iterator[Tensor]:
    """Yield every weight once, in a fixed order; read offloaded ones module by module.

    Raises:
        ModelError: A weight has no values anywhere.
    """
    module = model.original_model if is_bridge(model) else model
    if not any(p.is_meta for p in module.parameters()):
        yield from module.parameters()
        return
    from accelerate.utils import align_module_device

    # Passes separate tied weights that are offloaded: only names and values still show the tie.
    tied = dict(getattr(module, "all_tied_weights_keys", {}))
    sources: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        fresh = {key: p for key, p in part._parameters.items() if p is not None and id(p) not in seen}
        seen.update(map(id, fresh.values()))
        with align_module_device(part):
            for key, stored in fresh.items():
                weight = part._parameters[key]
                name = f"{path}.{key}".replace("._original_component", "")
                if weight is None or weight.is_meta:
                    raise ModelError(f"{name} is on the meta device and has no values; load the model with its weights")
                if name in tied.values():
                    sources[name] = weight
                source = sources.get(tied.get(name, ""))
                if not stored.is_meta or source is None or not torch.equal(weight, source):
                    yield weight

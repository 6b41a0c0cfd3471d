"""Checks that a model is a causal language model, and is hooked correctly."""

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import ModelError
from xmodel_steer.models import laws
from xmodel_steer.models.checkpoints import whole_model
from xmodel_steer.models.facts import device_of, name_of
from xmodel_steer.models.passes import forward


def causal_class(label: str, config: Any) -> Any:
    """Find the class of transformers for a causal model that TransformerLens hooks.

    Args:
        label: The model's name, for messages.
        config: Its configuration, which names its architectures.

    Raises:
        ModelError: The architecture is no such model. No weights are read to find out.
    """
    import transformers
    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
        get_hf_model_class_for_architecture,
    )
    from transformer_lens.utilities.architectures import classify_architecture

    named = list(getattr(config, "architectures", None) or [type(config).__name__])
    hooked, unknown = "", None
    try:
        hooked = determine_architecture_from_hf_config(config)
    except ValueError as error:
        unknown = error
    kind = get_hf_model_class_for_architecture(hooked)
    # A bare body ("LlamaModel") may have every weight of its causal model, as where the head is the embedding.
    heads = [name for name in named if not name.endswith("Model")]
    heads += [hooked] if kind is not transformers.AutoModelForCausalLM else []
    known = [head for name in heads if (head := getattr(transformers, name, None))]
    if (
        getattr(config, "is_encoder_decoder", False)
        or classify_architecture(hooked) == "seq2seq"
        or not all(head.can_generate() for head in known)
    ):
        raise ModelError(_no_causal(label, ", ".join(named)))
    if not hooked:
        raise ModelError(
            f"{label}: architecture {', '.join(named)} is not one that transformer-lens {version('transformer-lens')} hooks; "
            "choose another model (TransformerBridge.list_supported_models() lists them), or upgrade transformer-lens"
        ) from unknown
    return kind


def _no_causal(label: str, architecture: str) -> str:
    return (
        f"{label}: {architecture} does not load as a causal language model, whose tokens depend on earlier tokens alone; "
        "encoders, encoder-decoders, classifiers and models of images or sound do not work. "
        "Give a model such as LlamaForCausalLM"
    )


#: Two texts that begin alike.
_ALIKE = ((1, 2, 3, 4, 5), (1, 3, 2, 5, 4))


def logits_of(hf: Any) -> Tensor:
    """Compute the logits of two texts with an unhooked model."""
    with torch.no_grad():
        device = next((p.device for p in hf.parameters() if not p.is_meta), torch.device("cpu"))
        return hf(input_ids=torch.tensor(_ALIKE, device=device), use_cache=False).logits


def read_by(kind: Any, label: str, plain: list[Tensor], path: str, **settings: Any) -> Any:
    """Load a Hugging Face model for TransformerLens, and append its logits to ``plain``."""
    hf = whole_model(kind, path, label=label, **settings)
    if hf.can_generate():
        plain.append(logits_of(hf))
    return hf


def require_causal(model: Any, plain: Tensor | None = None) -> None:
    """Refuse a model that cannot generate, reads ahead, or whose hooks change its logits.

    A model that reads ahead has other logits for the first token when the second one changes.

    Args:
        model: A bridge.
        plain: Its Hugging Face model's logits without hook points. TransformerLens computes some layers itself, and
            may do so wrongly, or miss the hooks that fetch offloaded weights.
    """
    name, hugging_face = name_of(model), type(model.original_model)
    if not hugging_face.can_generate():
        raise ModelError(_no_causal(name, hugging_face.__name__))
    ids = torch.tensor(_ALIKE, device=device_of(model))
    logits = forward(model, ids, torch.ones_like(ids))[0]
    assert logits is not None
    rounding = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    one, other = logits[:, 0].float()
    if (one - other).norm() > rounding * one.norm():  # NaN tells nothing about this
        raise ModelError(_no_causal(name, hugging_face.__name__))
    if plain is None:
        return
    distance = float((logits.float() - plain.to(logits.device).float()).norm() / plain.float().norm())
    if not distance <= (laws.ROUNDED if logits.dtype == torch.bfloat16 else laws.EXACT):
        offloaded = any(p.is_meta for p in model.original_model.parameters())
        why = (
            "does not find the offloaded weights of" if offloaded else "does not compute what transformers computes in"
        )
        remedy = "a device_map that has room for all of the model" if offloaded else "another version of one of them"
        raise ModelError(
            f"{name}: transformer-lens {version('transformer-lens')} {why} a {hugging_face.__name__} of transformers "
            f"{version('transformers')} (logits differ by {distance:.0e}); give {'device=, or ' if offloaded else ''}{remedy}"
        )

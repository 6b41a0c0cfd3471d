"""Loading models with hook points: from the hub, a folder, a GGUF file, an adapter, or the package index."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from xmodel_steer.core.errors import ModelError, XModelSteerError
from xmodel_steer.models import laws
from xmodel_steer.models.bridges import prepare
from xmodel_steer.models.forward import (
    check_sites,
    device_of,
    fingerprint,
    forward,
    know,
    name_of,
    prove,
    published_tokenizer,
)
from xmodel_steer.models.packaged import converted_gguf, listed, packaged_model, quiet, whole_model


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
        device_map: ``"auto"`` spreads a model that one device cannot hold over all of them; or a dictionary from modules to
            devices, for one on the CPU also ``"disk"``. Excludes ``device``.
        revision: Revision of a hub model; of the base of an adapter.
        progress: Show progress bars.

    Returns:
        The hooked model, in evaluation mode.

    Raises:
        ModelError: The name is unknown, the hub cannot be reached, the model is no causal language model or cannot be
            hooked, or its checkpoint or adapter does not fit: weights are missing, or have another name or shape.
        DownloadError: A packaged model cannot be downloaded.
        SiteError: The model's residual stream does not fire or has the wrong shape.

    Warns:
        CheckpointWarning: The checkpoint has tensors that the model does not use.
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
        told = label if adapter is None else f"{label} (base {source})"
        with loading(told, path):
            hugging_face, plain = _causal_class(told, path, revision), []
            if adapter is None:
                where: dict[str, Any] = {"device": chosen} if device_map is None else {"device_map": device_map}
                where["model_class"] = SimpleNamespace(from_pretrained=partial(_read, hugging_face, told, plain))
            else:
                merged, own = _merged(path, adapter, chosen, kind, device_map, revision)
                plain.append(_logits(merged))
                where = {"hf_model": merged, "device": None if device_map is not None else chosen}
            try:
                with _without_processors():
                    model = TransformerBridge.boot_transformers(path, dtype=kind, revision=revision, **where)
            except KeyError as error:
                if device_map is None:
                    raise
                raise ModelError(
                    f"{told}: device_map offloads {error} to the disk, but not the weight that it is tied to; give both one place"
                ) from error
            bar.update()
            # A training that gave the adapter another chat template or tokens saves them beside it.
            beside = adapter is not None and (adapter / "tokenizer_config.json").is_file()
            tokenizer = published_tokenizer(str(adapter)) if beside else published_tokenizer(path, revision)
        # Weights keep requires_grad: without it torch multiplies many (batch, 1, d) activations by a
        # copy of the weights per row (batched product instead of one), 20 times slower in a decode.
        # Every pass of this library runs under no_grad.
        model.eval()
        bar.update()
        if str(model.cfg.device) == "meta":  # its embeddings are offloaded
            model.cfg.device = str(device_of(model))
        know(model, name=label, tokenizer=tokenizer, revision=revision or "", weights=own)
        check_sites(model)
        _require_causal(model, *plain)
        prepare(model)
        prove(model)
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
    if local.is_file():
        raise ModelError(
            f"{label}: is a file; give the folder in Hugging Face format that it is in, the folder of a PEFT adapter, or a .gguf file"
        )
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
        AutoConfig.from_pretrained(path, trust_remote_code=False)
        published_tokenizer(path, None)


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


def _causal_class(label: str, path: str, revision: str | None) -> Any:
    """The class of transformers that loads a model, if it is a causal one that TransformerLens hooks.

    Raises:
        ModelError: It is not; names its architecture. No weights are read to find out.
    """
    import transformers
    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
        get_hf_model_class_for_architecture,
    )
    from transformer_lens.utilities.architectures import classify_architecture

    config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    named = list(getattr(config, "architectures", None) or [type(config).__name__])
    hooked, unknown = "", None
    try:
        hooked = determine_architecture_from_hf_config(config)
    except ValueError as error:
        unknown = error
    kind = get_hf_model_class_for_architecture(hooked)
    # A bare body ("LlamaModel") may have all that its causal model needs, as where the head is the embedding.
    heads = [name for name in named if not name.endswith("Model")]
    heads += [hooked] if kind is not transformers.AutoModelForCausalLM else []
    known = [made for name in heads if (made := getattr(transformers, name, None))]
    if (
        getattr(config, "is_encoder_decoder", False)
        or classify_architecture(hooked) == "seq2seq"
        or not all(made.can_generate() for made in known)
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
        f"{label}: {architecture} does not load as a causal language model, whose every token depends on earlier ones alone; "
        "encoders, encoder-decoders, classifiers and models of images or sound do not work. "
        "Give a model such as LlamaForCausalLM"
    )


#: Two texts that begin alike.
_ALIKE = ((1, 2, 3, 4, 5), (1, 3, 2, 5, 4))


def _logits(hf: Any) -> Tensor:
    """The logits of two texts, by a Hugging Face model that nobody has hooked."""
    with torch.no_grad():
        device = next((p.device for p in hf.parameters() if not p.is_meta), torch.device("cpu"))
        return hf(input_ids=torch.tensor(_ALIKE, device=device), use_cache=False).logits


def _read(kind: Any, label: str, plain: list[Tensor], path: str, **settings: Any) -> Any:
    """Load a Hugging Face model for TransformerLens, and keep its logits of two texts."""
    hf = whole_model(kind, path, label=label, **settings)
    if hf.can_generate():
        plain.append(_logits(hf))
    return hf


@contextmanager
def _without_processors() -> Iterator[None]:
    """Let TransformerLens load none of what reads images.

    Where that fails, it has pip install torchvision, which may put another torch in the place of the one that is running.
    """
    from transformers import AutoProcessor

    before = vars(AutoProcessor)["from_pretrained"]
    AutoProcessor.from_pretrained = classmethod(lambda *_, **__: None)  # type: ignore[assignment]
    try:
        yield
    finally:
        AutoProcessor.from_pretrained = before


def _require_causal(model: Any, plain: Tensor | None = None) -> None:
    """Refuse a model that cannot generate, reads ahead, or does not compute what it did before it was hooked.

    One that reads ahead has other logits for the first token when the second one changes.

    Args:
        model: A bridge.
        plain: What its Hugging Face model gave before it was hooked: TransformerLens computes some layers itself, and may
            be wrong about them, or read offloaded weights past the hooks that fetch them.
    """
    name, hugging_face = name_of(model), type(model.original_model)
    if not hugging_face.can_generate():
        raise ModelError(_no_causal(name, hugging_face.__name__))
    ids = torch.tensor(_ALIKE, device=device_of(model))
    logits = forward(model, ids, torch.ones_like(ids))[0]
    assert logits is not None
    rounding = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    one, other = logits[:, 0].float()
    if (one - other).norm() > rounding * one.norm():  # NaN says nothing of this
        raise ModelError(_no_causal(name, hugging_face.__name__))
    if plain is None:
        return
    off = float((logits.float() - plain.to(logits.device).float()).norm() / plain.float().norm())
    if not off <= (laws.ROUNDED if logits.dtype == torch.bfloat16 else laws.EXACT):
        offloaded = any(p.is_meta for p in model.original_model.parameters())
        why = (
            "does not find the offloaded weights of" if offloaded else "does not compute what transformers computes in"
        )
        way = "a device_map that has room for all of the model" if offloaded else "another version of one of them"
        raise ModelError(
            f"{name}: transformer-lens {version('transformer-lens')} {why} a {hugging_face.__name__} of transformers "
            f"{version('transformers')} (logits differ by {off:.0e}); give {'device=, or ' if offloaded else ''}{way}"
        )


def _merged(
    path: str,
    adapter: Path,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None,
    revision: str | None,
) -> tuple[Any, str]:
    """A base model with an adapter merged into its weights (in float32, rounded afterwards), and its fingerprint."""
    from transformers import AutoModelForCausalLM

    weights = adapter / "adapter_model.safetensors"
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not weights.is_file():
        raise ModelError(f"{adapter}: has no adapter_model.safetensors; save the adapter as safetensors")
    hf = whole_model(
        AutoModelForCausalLM, path, label=path, dtype=torch.float32, device_map=device_map, revision=revision
    )
    if any(p.is_meta for p in hf.parameters()):
        raise ModelError(
            f"{adapter}: its base is offloaded, and an adapter is merged into weights in memory; give device=, or a "
            "device_map that has room for all of the base"
        )
    # What an adapter does hangs on its weights and settings, not on where its base was found.
    # Its lists are sets to peft, which writes them in any order.
    does = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in settings.items()
        if key not in ("base_model_name_or_path", "revision", "peft_version")
    }
    own = hashlib.sha256(fingerprint(hf).encode() + json.dumps(does, sort_keys=True).encode() + weights.read_bytes())
    merged = adapted(hf, adapter).merge_and_unload()
    for parameter in merged.parameters():  # the buffers stay float32
        parameter.data = parameter.data.to(dtype)
    return merged if device_map is not None else merged.to(device), own.hexdigest()[:16]


def adapted(hf: Any, adapter: Path) -> Any:
    """A Hugging Face model with a PEFT adapter put on, of which every tensor has found its place.

    Args:
        hf: The base.
        adapter: The folder.

    Raises:
        ModelError: The adapter's tensors are not those that its settings and the base ask for, or it cannot be merged.
    """
    from peft import PeftModel

    says = "Give the base that it was trained on with base=, and the adapter_config.json that it was saved with"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
            model: Any = PeftModel.from_pretrained(hf, str(adapter))
            report = model.load_adapter(str(adapter), "default")
    except KeyError as error:
        raise ModelError(
            f"{adapter}: the adapter lacks {error}, which its adapter_config.json asks for. {says}"
        ) from error
    except RuntimeError as error:
        shapes = re.findall(r"size mismatch for (\S+):", str(error))
        if not shapes:
            raise
        raise ModelError(
            f"{adapter}: the adapter does not fit its base: {listed({'of another shape': shapes})}. {says}"
        ) from error
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ModelError(
            f"{adapter}: an adapter of type {model.peft_type} changes no weights that it could be merged into; "
            "give one that does, such as LoRA"
        )
    wrong = {"missing": sorted(report.missing_keys), "not the base's": sorted(report.unexpected_keys)}
    if any(wrong.values()):
        raise ModelError(f"{adapter}: the adapter does not fit its base: {listed(wrong)}. {says}")
    return model


def _load_failure(label: str, path: str, error: Exception) -> str:
    chain, cause = [], error
    while cause is not None and len(chain) < 8:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    said = " ".join(f"{type(e).__name__} {e}" for e in chain)
    text = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return (
            f"{label}: needs Python code that comes with the model (auto_map in its config.json), which this library does not run; "
            "give a model of an architecture that transformers has"
        )
    if not Path(path).exists():
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
    if "backend tokenizer" in said or "load tokenizer" in said:
        return f"{label}: has no tokenizer that can be read ({text[:200]}); save it into the folder (tokenizer.json)"
    if "offload_folder" in said:
        return (
            f"{label}: its weights are not in the form in which the model keeps them (as in a mixture of experts, or without "
            "safetensors), and cannot stay on the disk; give device=, or a device_map that has room for all of the model"
        )
    if "no file named" in said:
        return (
            f"{label}: has no weights ({text[:200]}); get the whole folder, with model.safetensors or all of its parts"
        )
    return f"{label}: cannot be loaded ({type(error).__name__}: {text[:300]})"


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

"""Loading models with hook points: from the hub, a folder, a GGUF file, an adapter, or the package index."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from xmodel_steer.core.bars import progress_bar, with_progress
from xmodel_steer.core.errors import ModelError
from xmodel_steer.models.adapters import adapter_of, base_named_by, with_adapter
from xmodel_steer.models.bridges import prepare
from xmodel_steer.models.causal import causal_class, logits_of, read_by, require_causal
from xmodel_steer.models.checkpoints import load_errors, without_notices
from xmodel_steer.models.facts import device_of
from xmodel_steer.models.packaged import converted_gguf, packaged_model
from xmodel_steer.models.registry import know, prove, published_tokenizer
from xmodel_steer.models.sites import check_sites


@with_progress
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
        progress: Show progress bars; see `quiet`.

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
    adapter = adapter_of(name)
    if adapter is None and base is not None:
        raise ModelError(f"{name}: base= is for the folder of an adapter, which has an adapter_config.json")
    source = name if adapter is None else base or base_named_by(adapter)
    label, path = located(source)
    label = label if adapter is None else adapter.resolve().name
    if revision is not None and Path(path).exists():
        raise ModelError(f"{label}: revision= is for models of the hub; this one is loaded from {path}")

    with progress_bar(total=4, desc=f"load {label}", unit="step", delay=0, leave=False) as bar, without_notices():
        from transformer_lens.model_bridge import TransformerBridge

        bar.update()
        own = ""
        told = label if adapter is None else f"{label} (base {source})"
        with load_errors(told, path):
            hugging_face, plain = causal_class(told, path, revision), []
            if adapter is None:
                where: dict[str, Any] = {"device": chosen} if device_map is None else {"device_map": device_map}
                where["model_class"] = SimpleNamespace(from_pretrained=partial(read_by, hugging_face, told, plain))
            else:
                merged, own = with_adapter(path, adapter, chosen, kind, device_map, revision)
                plain.append(logits_of(merged))
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
        require_causal(model, *plain)
        prepare(model)
        prove(model)
        bar.update()
    return model


def located(
    name: str | Path,
) -> tuple[str, str]:
    """Find a model's name and folder or hub name; fetch and convert it.

    Args:
        name: As for `load`, but no adapter.

    Raises:
        ModelError: There is no such folder, file or packaged model.
        DownloadError: A packaged model cannot be downloaded.
    """
    label = str(name)
    local = Path(name).expanduser()
    if label.startswith("packaged:"):
        return label, str(packaged_model(label.removeprefix("packaged:")))
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"{label}: no such GGUF file")
        return local.name, str(converted_gguf(local))
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


def require_reachable(
    name: str | Path,
) -> None:
    """Find out whether a model can be had, before work begins that would be in vain without it.

    Fetches what is small of a hub model, its configuration and its tokenizer.

    Args:
        name: As for `load`.

    Raises:
        ModelError: The name is unknown, or the hub cannot be reached or does not give the model.
        DownloadError: A packaged model cannot be downloaded.
    """
    from transformers import AutoConfig

    adapter = adapter_of(name)
    label, path = located(name if adapter is None else base_named_by(adapter))
    with load_errors(label, path), without_notices():
        AutoConfig.from_pretrained(path, trust_remote_code=False)
        published_tokenizer(path, None)


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


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve a dtype's name; ``"auto"`` is bfloat16 where the hardware multiplies it.

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

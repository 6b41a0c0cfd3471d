"""Loading of models with hook points: from the hub, a folder, a GGUF file, an adapter, the package index, or memory."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.bars import progress_bar, with_progress
from xmodel_steer.core.errors import ModelError, XModelSteerError
from xmodel_steer.models.adapters import adapter_of, base_named_by, with_adapter
from xmodel_steer.models.bridges import prepare
from xmodel_steer.models.causal import causal_class, logits_of, read_by, require_causal
from xmodel_steer.models.checkpoints import load_errors, require_hub, without_notices
from xmodel_steer.models.facts import device_of
from xmodel_steer.models.memory import copied, label_of, require_in_memory, saved
from xmodel_steer.models.packaged import converted_gguf, packaged_model
from xmodel_steer.models.registry import know, prove, published_tokenizer
from xmodel_steer.models.sites import check_sites


@dataclass(frozen=True, eq=False)
class _Source:
    """The place, or the object in memory, that a model comes from.

    Args:
        label: The model's name in messages and results.
        described: The name with which failures are reported.
        path: A folder or a hub name; empty for a model in memory.
        adapter: The folder of an adapter.
        hf: A Hugging Face model in memory.
        tokenizer: Its tokenizer.
    """

    label: str
    described: str
    path: str = ""
    adapter: Path | None = None
    hf: Any = None
    tokenizer: Any = None

    @classmethod
    def of(cls, model: Any, name: str, tokenizer: Any, base: str | Path | None, revision: str | None) -> "_Source":
        """Find a model, or refuse arguments that do not fit together."""
        if not isinstance(model, str | Path):
            require_in_memory(model, tokenizer)
            label = name or label_of(model)
            if base is not None or revision is not None:
                raise ModelError(f"{label}: base= and revision= are not for a model in memory")
            return cls(label, label, hf=model, tokenizer=tokenizer)
        if name or tokenizer is not None:
            raise ModelError(f"{model}: name= and tokenizer= are for a Hugging Face model in memory")
        adapter = adapter_of(model)
        if adapter is None and base is not None:
            raise ModelError(f"{model}: base= is for the folder of an adapter, which has an adapter_config.json")
        start = model if adapter is None else base or base_named_by(adapter)
        label, path = located(start)
        label = label if adapter is None else adapter.resolve().name
        if revision is not None and Path(path).exists():
            raise ModelError(f"{label}: revision= is for models of the hub; this one is loaded from {path}")
        return cls(label, label if adapter is None else f"{label} (base {start})", path, adapter)

    def place(self) -> AbstractContextManager[str]:
        """Return a context with the folder or hub name of the tokenizer."""
        return nullcontext(self.path) if self.hf is None else saved(self.tokenizer)

    def published(self, revision: str | None) -> Any:
        """Return the tokenizer as it was published."""
        if self.hf is not None:
            return copy.deepcopy(self.tokenizer)
        # A training that gave the adapter another chat template or tokens saves them with it.
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return published_tokenizer(str(self.adapter))
        return published_tokenizer(self.path, revision)


@with_progress
def load(
    model: str | Path | Any,
    *,
    name: str = "",
    tokenizer: Any = None,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Any:
    """Load a model with hook points, as a TransformerLens ``TransformerBridge``.

    Weights are not processed: residual coordinates are those of the model as published.

    A PEFT adapter is merged into its base model. The merged model has spaces of its own, whose fingerprint is made of
    the base's and of the adapter's file, so that it does not depend on how a processor rounds the merge. A tokenizer
    in the adapter's folder replaces the base's.

    A Hugging Face model in memory keeps its modules and its outputs: the hooked model gets copies of the modules. The
    two share their weights, unless another device or dtype is asked for; load the model again after you have changed
    its weights.

    Args:
        model: A hub name (``"Qwen/Qwen2.5-0.5B-Instruct"``), a local folder in Hugging Face format or with a PEFT
            adapter, a ``.gguf`` file, ``"packaged:smollm2-135m-instruct"`` or ``"packaged:gemma-3-270m"``, which come
            from the Python package index, or a Hugging Face model in memory.
        name: Name of a model in memory, for messages and results; by default the name that it was loaded by.
        tokenizer: The tokenizer of a model in memory.
        base: The base model of an adapter, where it cannot be found under the name that the adapter gives.
        device: Where to put it; CUDA if there is one, else the CPU. A model in memory stays where it is by default.
        dtype: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 on CUDA and on processors that multiply it, else
            float32; for a model in memory, its own.
        device_map: ``"auto"`` spreads a model that one device cannot hold over all of them; or a dictionary from
            modules to devices, for one on the CPU also ``"disk"``. Excludes ``device``.
        revision: Revision of a hub model, or of an adapter's base.
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
        raise ModelError("load: give device or device_map, not both")
    source = _Source.of(model, name, tokenizer, base, revision)
    if source.hf is not None and device_map is not None:
        raise ModelError(f"{source.label}: device_map= is not for a model in memory; give it to from_pretrained")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device or (usual if source.hf is None else source.hf.device))
    number = resolve_dtype(source.hf.dtype if source.hf is not None and dtype == "auto" else dtype, place)
    title = f"load {source.label} ({str(number).removeprefix('torch.')})"
    with progress_bar(total=4, desc=title, unit="step", delay=0, leave=False) as bar, without_notices():
        import transformer_lens.model_bridge  # noqa: F401 (it takes seconds)

        bar.update()
        with source.place() as path, load_errors(source.described, path):
            where: dict[str, Any] = {"device": place} if device_map is None else {"device_map": device_map}
            if source.hf is not None and device is None:
                where = {}  # a model in memory stays where it is
            hooked, plain, weights = _bridge(source, path, number, where, revision)
            bar.update()
            tokenizer = source.published(revision)
        # Weights keep requires_grad: without it torch multiplies many (batch, 1, d) activations by a
        # copy of the weights per row (batched product instead of one), 20 times slower in a decode.
        # Every pass of this library runs under no_grad.
        hooked.eval()
        bar.update()
        if str(hooked.cfg.device) == "meta":  # its embeddings are offloaded
            hooked.cfg.device = str(device_of(hooked))
        know(hooked, name=source.label, tokenizer=tokenizer, revision=revision or "", weights=weights)
        try:
            check_sites(hooked)
            require_causal(hooked, plain)
            prepare(hooked)
            prove(hooked)
        except RuntimeError as error:  # some architectures compute in float32 alone
            if isinstance(error, XModelSteerError):
                raise
            raise ModelError(
                f"{source.label}: loads, but does not run in {str(number).removeprefix('torch.')} ({error}); try dtype='float32'"
            ) from error
        bar.update()
    return hooked


def _bridge(
    source: _Source, path: str, dtype: torch.dtype, where: dict[str, Any], revision: str | None
) -> tuple[Any, Tensor | None, str]:
    """Put hook points on a model; return it, its unhooked logits, an adapter's fingerprint."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig

    if source.hf is None:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    else:
        config = copy.deepcopy(source.hf.config)
        config.architectures = [type(source.hf).__name__]
    kind = causal_class(source.described, config)
    plain: list[Tensor] = []
    weights, boot = "", dict(where)
    device, device_map = where.get("device"), where.get("device_map")
    if source.hf is None and source.adapter is None:
        boot["model_class"] = SimpleNamespace(from_pretrained=partial(read_by, kind, source.described, plain))
    else:
        if source.hf is not None:
            hf = copied(source.hf, device, dtype)
        else:
            assert source.adapter is not None
            hf, weights = with_adapter(path, source.adapter, device, dtype, device_map, revision)
        plain.append(logits_of(hf))
        boot = {"hf_model": hf, "device": None if device_map is not None else device or hf.device}
    try:
        with _without_processors():
            hooked = TransformerBridge.boot_transformers(path, dtype=dtype, revision=revision, **boot)
    except KeyError as error:
        if device_map is None:
            raise
        raise ModelError(
            f"{source.described}: device_map offloads {error} to the disk, but not the weight that it is tied to; "
            "give both one place"
        ) from error
    if source.hf is not None:
        hooked.cfg.model_name = source.label  # the temporary folder is gone
    return hooked, plain[0] if plain else None, weights


def located(name: str | Path) -> tuple[str, str]:
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
    require_hub(label)
    return label, label


def require_reachable(name: str | Path) -> None:
    """Refuse a model that cannot be loaded, before any work that needs it.

    Of a hub model, the configuration and the tokenizer are fetched.

    Args:
        name: As for `load`.

    Raises:
        ModelError: The name is unknown, or the hub cannot be reached or refuses the model.
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
    """Keep TransformerLens from loading image processors.

    After a failure it installs torchvision with pip, which may replace the torch that is running.
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
        ModelError: The name is unknown, or float16, in which many models overflow.
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
    """Tell whether the processor multiplies bfloat16 faster than float32.

    With AMX, or AVX-512 BF16 of AMD, it takes a third of the time or less; Intel's AVX-512 BF16 without AMX takes twice
    the time. The answer is read, not measured, so that a machine always chooses alike.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    intel = "Intel" in str(capabilities.get("cpu_name"))
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not intel))

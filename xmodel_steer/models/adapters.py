"""PEFT adapters, merged into their base models."""

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from xmodel_steer.core.errors import ArtifactError, ModelError
from xmodel_steer.files.cache import sha256_of
from xmodel_steer.files.records import read_record
from xmodel_steer.models.checkpoints import listed, whole_model
from xmodel_steer.models.identity import fingerprint

ORGANISM = "organism.json"  # the report of an adapter that `xmodel_steer.organisms` made
WEIGHTS = "adapter_model.safetensors"


def adapter_of(name: str | Path) -> Path | None:
    """Return the folder of a PEFT adapter, or None for another model."""
    local = Path(name).expanduser()
    return local if (local / "adapter_config.json").is_file() else None


def base_named_by(adapter: Path) -> str:
    """Return the base model that an adapter names."""
    try:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{adapter}: its adapter_config.json names no base model ({type(error).__name__}: {error}); give base="
        ) from error
    if not named or (Path(named).is_absolute() and not Path(named).exists()):
        raise ModelError(f"{adapter}: its base model {named!r} is not here; give base=")
    return str(named)


def with_adapter(
    path: str,
    adapter: Path,
    device: torch.device | None,
    dtype: torch.dtype,
    device_map: str | dict[str, Any] | None,
    revision: str | None,
) -> tuple[Any, str]:
    """Merge an adapter into its base in float32, then round; return model and fingerprint."""
    from transformers import AutoModelForCausalLM

    weights = adapter / WEIGHTS
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not weights.is_file():
        raise ModelError(f"{adapter}: has no adapter_model.safetensors; save the adapter as safetensors")
    require_whole(adapter)
    hf = whole_model(
        AutoModelForCausalLM, path, label=path, dtype=torch.float32, device_map=device_map, revision=revision
    )
    if any(p.is_meta for p in hf.parameters()):
        raise ModelError(
            f"{adapter}: its base is offloaded, and an adapter is merged into weights in memory; give device=, or a "
            "device_map that has room for all of the base"
        )
    # An adapter's effect depends on its weights and settings, not on the place of its base.
    # peft treats its lists as sets and writes them in any order.
    effective = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in settings.items()
        if key not in ("base_model_name_or_path", "revision", "peft_version")
    }
    digest = hashlib.sha256(fingerprint(hf).encode() + json.dumps(effective, sort_keys=True).encode())
    digest.update(weights.read_bytes())
    merged = adapted(hf, adapter).merge_and_unload()
    for parameter in merged.parameters():  # the buffers stay float32
        parameter.data = parameter.data.to(dtype)
    return merged if device is None else merged.to(device), digest.hexdigest()[:16]


def require_whole(adapter: Path) -> None:
    """Refuse an organism's adapter whose weights are not those of its report.

    Raises:
        ArtifactError: Names the file.
    """
    report = adapter / ORGANISM
    for name, digest in (read_record(report).get("files", {}) if report.is_file() else {}).items():
        if Path(name).name != name or not (adapter / name).is_file() or sha256_of(adapter / name) != digest:
            raise ArtifactError(f"{adapter / name}: is not the file that {ORGANISM} names; copy the whole folder again")


def adapted(hf: Any, adapter: Path) -> Any:
    """Put a PEFT adapter on a model, and check that every tensor fits.

    Args:
        hf: The base.
        adapter: The folder.

    Raises:
        ModelError: The adapter's tensors do not fit its settings or the base, or it cannot be merged.
    """
    from peft import PeftModel

    advice = "Give the base that it was trained on with base=, and the adapter_config.json that it was saved with"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # reported below
            model: Any = PeftModel.from_pretrained(hf, str(adapter))
            report = model.load_adapter(str(adapter), "default")
    except KeyError as error:
        raise ModelError(
            f"{adapter}: the adapter lacks {error}, which its adapter_config.json asks for. {advice}"
        ) from error
    except RuntimeError as error:
        shapes = re.findall(r"size mismatch for (\S+):", str(error))
        if not shapes:
            raise
        raise ModelError(
            f"{adapter}: the adapter does not fit its base: {listed({'of another shape': shapes})}. {advice}"
        ) from error
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ModelError(
            f"{adapter}: an adapter of type {model.peft_type} cannot be merged into weights; "
            "give one that can, such as LoRA"
        )
    wrong = {"missing": sorted(report.missing_keys), "not the base's": sorted(report.unexpected_keys)}
    if any(wrong.values()):
        raise ModelError(f"{adapter}: the adapter does not fit its base: {listed(wrong)}. {advice}")
    return model

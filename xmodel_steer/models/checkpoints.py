"""Read a checkpoint whole, or refuse it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import CheckpointWarning, ModelError, XModelSteerError


def whole_model(kind: Any, path: str, *, label: str, **settings: Any) -> Any:
    """Load a Hugging Face model, and refuse a checkpoint that does not fill it.

    transformers gives a weight that a checkpoint lacks random values, and tells only its log.

    Args:
        kind: A class with ``from_pretrained``, such as ``AutoModelForCausalLM``.
        path: The folder or hub name to load from.
        label: What the model is called, for messages.
        settings: For ``from_pretrained``.

    Raises:
        ModelError: Weights are missing or of another shape, or a layer of the checkpoint has tensors that the model's lacks.
    """
    # Mismatched shapes are let through here, to be named below with all the rest.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = kind.from_pretrained(path, **settings)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ModelError(
            f"{label}: the checkpoint has only some parts of a weight that is stored in several, such as the experts of "
            "a layer, or parts of different shapes; get the whole checkpoint"
        ) from error
    shapes = sorted(report["mismatched_keys"])
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": [f"{name} {tuple(stored)} for {tuple(asked)}" for name, stored, asked in shapes],
        "not the model's": sorted(report["unexpected_keys"]),
    }
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    # A bias or a scale of a layer that computes without it: the model would not be the one that was saved.
    split = any(name.rpartition(".")[0] in layers for name in wrong["not the model's"])
    if wrong["missing"] or wrong["of another shape"] or split:
        raise ModelError(
            f"{label}: the checkpoint does not fill a {type(model).__name__}: {listed(wrong)}. "
            "Every weight must be there under its name and in its shape: get the whole checkpoint, "
            "with the config.json that it was saved with"
        )
    if wrong["not the model's"]:
        warnings.warn(
            f"{label}: the checkpoint has tensors that a {type(model).__name__} does not use: {listed(wrong)}; "
            "if they are part of the model, its config.json does not fit",
            CheckpointWarning,
            stacklevel=2,
        )
    return model


def listed(names: Mapping[str, Sequence[str]]) -> str:
    """Count names, and list the first three of each kind, in words."""
    return "; ".join(
        f"{len(some)} {kind} ({', '.join(some[:3])}{', …' if len(some) > 3 else ''})"
        for kind, some in names.items()
        if some
    )


@contextmanager
def without_notices() -> Iterator[None]:
    """Keep transformers' own load_errors bars and notices out of the user's terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def load_errors(label: str, path: str) -> Iterator[None]:
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

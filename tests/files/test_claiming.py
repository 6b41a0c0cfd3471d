"""A place is claimed before the work is done: what is not ours is refused, and stays as it was."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.files import claiming
from xmodel_steer.files.claiming import FOLDERS, claim
from xmodel_steer.files.records import write_tensors


@pytest.mark.parametrize("kind", [*FOLDERS, "Moments"])
def test_a_free_place_is_given_and_its_parent_is_made(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "new" / "place"
    assert claim(str(place), kind) == place
    assert list(tmp_path.rglob("*")) == [place.parent]


@pytest.mark.parametrize(("kind", "record"), FOLDERS.items())
def test_a_folder_is_claimed_by_its_own_kind_alone(tmp_path: Path, kind: str, record: str) -> None:
    (tmp_path / record).write_text(json.dumps({"schema": 1, "kind": kind}))
    (tmp_path / "notes.txt").write_text("mine")
    for other in FOLDERS:
        if other == kind:
            claim(tmp_path, other)
        else:
            found = kind if FOLDERS[other] == record else "something else"
            with pytest.raises(ArtifactError, match=f"exists and holds {found}, no {other}; choose another place"):
                claim(tmp_path, other)
    (tmp_path / record).write_text('{"schema": 1, "kind"')
    with pytest.raises(ArtifactError, match="holds something else"):
        claim(tmp_path, kind)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["notes.txt", record])


@pytest.mark.parametrize("kind", ["TransferResult", "study"])
def test_a_run_of_an_earlier_version_may_be_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"schema": 1, "kind": kind}))
    assert claim(tmp_path, "Result") == tmp_path


def test_scratch_files_and_named_ones_do_not_hold_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".result.json-x1").touch()
    claim(tmp_path, "Result")
    (tmp_path / "unfinished").mkdir()
    claim(tmp_path, "Result", also={"unfinished"})
    with pytest.raises(ArtifactError, match="exists and holds something else, no Result"):
        claim(tmp_path, "Result")


def test_a_file_is_claimed_by_its_own_kind_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_tensors(file, "AffineMap", {"weight": torch.ones(2)}, {})
    assert claim(file, "AffineMap") == claim(file, "AutoencoderMap") == file
    with pytest.raises(ArtifactError, match="holds AffineMap, no Moments"):
        claim(file, "Moments")
    with pytest.raises(ArtifactError, match="holds something else, no Result"):
        claim(file, "Result")
    with pytest.raises(ArtifactError, match=re.escape(f"is a folder; give a file name such as {tmp_path / 'moments'}")):
        claim(tmp_path, "Moments")


@pytest.mark.parametrize("kind", ["Result", "Moments"])
def test_a_place_below_a_file_cannot_be_written(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot be written \(.*\); choose another place"):
        claim(tmp_path / "file" / "place", kind)


def test_only_what_replaces_its_folder_needs_a_writable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(claiming.tempfile, "TemporaryFile", lambda dir: tried.append(dir) or nullcontext())
    (tmp_path / "store").mkdir()
    claim(tmp_path / "store", "ActivationStore")
    claim(tmp_path / "store", "Result")
    claim(tmp_path / "run", "organism")
    assert tried == [tmp_path / "store", tmp_path, tmp_path]

"""Places on disk: scratch, locks, one step from old to new, the user's files."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sample_results import result, same, vector

import xmodel_steer as xs
from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.files import places
from xmodel_steer.files.places import locked, sweep, whole_file, whole_folder

KILLED = """
import os, sys
from pathlib import Path
from xmodel_steer.files.places import whole_file, whole_folder

def die(scratch):
    scratch.write_text("half")
    os.kill(os.getpid(), 9)

if sys.argv[1] == "file":
    whole_file(Path(sys.argv[2]), die)
with whole_folder(Path(sys.argv[2])) as scratch:
    die(scratch / "a")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_scratch_of_a_killed_process_goes_at_the_next_start(kind, tmp_path):
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, kind, str(tmp_path / "x")])
        assert done.returncode == -9
    (left,) = tmp_path.iterdir()  # the second process removed what the first one left
    (tmp_path / ".mine~00000000-1-00000000").write_text("of another machine")
    (tmp_path / f".y~{places._HOST}-{os.getppid()}-00000000").write_text("of a process that runs")
    places._swept.cache_clear()
    sweep(tmp_path)
    assert not left.exists() and len(list(tmp_path.iterdir())) == 2


def test_scratch_of_this_process_stays(tmp_path):
    def write(scratch):
        places._swept.cache_clear()
        sweep(tmp_path)
        scratch.write_text("whole")

    whole_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_reads(mask, tmp_path):
    before = os.umask(mask)
    try:
        file = xs.save(vector(), tmp_path / "v.safetensors")
        run = xs.save(result(), tmp_path / "run")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert run.stat().st_mode & 0o777 == 0o777 & ~mask
    for inside in run.rglob("*"):
        assert inside.stat().st_mode & 0o777 == (0o777 if inside.is_dir() else 0o666) & ~mask


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/run")
    (tmp_path / "v.safetensors").symlink_to("real/v.safetensors")
    for _ in range(2):
        xs.save(result(), tmp_path / "link")
        xs.save(vector(), tmp_path / "v.safetensors")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "v.safetensors").is_symlink()
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == ["run", "v.safetensors"]
    assert same(xs.read(tmp_path / "link"), result())


@pytest.mark.parametrize("atomic", [True, False])
def test_the_users_files_keep_their_place(atomic, tmp_path, monkeypatch):
    """At every step of a replacement, and after one that fails at any step."""
    if not atomic:
        monkeypatch.setattr(places, "_exchanged", lambda new, old: False)
    run = xs.save(result(), tmp_path / "run")
    own = ["notes.txt", "plots/a.png", "vectors/mine.safetensors"]
    for name in own:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    (run / "empty").mkdir()
    (run / "link").symlink_to("notes.txt")
    inode = (run / "notes.txt").stat().st_ino
    real, calls = os.link, []
    for step in range(20):

        def fail(*args, step=step, **kwargs):
            calls.append(args)
            if len(calls) == step:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        calls.clear()
        monkeypatch.setattr(os, "link", fail)
        try:
            xs.save(result(), run)
        except KeyboardInterrupt:
            continue
        finally:
            assert [(run / name).read_text() for name in own] == own and (run / "link").is_symlink()
            assert same(xs.read(run), result()) and (run / "empty").is_dir()
            assert [p.name for p in tmp_path.iterdir()] == ["run"]
        if len(calls) < step:
            break
    assert step > 3 and (run / "notes.txt").stat().st_ino == inode


def test_a_failure_between_two_renames_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_exchanged", lambda new, old: False)
    run = xs.save(result(), tmp_path / "run")
    real = Path.rename
    for trouble in (OSError("broken"), KeyboardInterrupt()):
        renamed = []

        def fail(self, target, trouble=trouble, renamed=renamed):
            renamed.append(target)
            if len(renamed) == 2:
                raise trouble
            return real(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises((ArtifactError, KeyboardInterrupt)):
            xs.save(result(), run)
        assert same(xs.read(run), result()) and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_readers_never_see_nothing(tmp_path):
    run = xs.save(result(), tmp_path / "run")
    done = threading.Event()
    seen = []

    def read():
        while not done.is_set():
            seen.append(same(xs.read(run), result()))

    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(read) for _ in range(2)]
        for _ in range(12):
            xs.save(result(), run)
        done.set()
        for reader in reading:
            reader.result()
    assert all(seen) and len(seen) > 5


HOLDING = """
import sys, time
from pathlib import Path
from xmodel_steer.files.places import locked

with locked(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "WAIT", 0.1)
    place = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "holds\n"
    with pytest.raises(ArtifactError, match=r"run: another process is at work there; wait"):
        xs.save(result(), place)
    holder.communicate("\n")
    xs.save(result(), place)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_lock_is_held_once_by_threads_and_again_by_the_same(tmp_path):
    inside, most = [], []

    def work(_):
        with locked(tmp_path / "x", wait=True), locked(tmp_path / "x"):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(100)))
    assert max(most) == 1 and not list(tmp_path.iterdir())


def test_what_fails_inside_a_folder_leaves_the_older_one(tmp_path):
    with whole_folder(tmp_path / "x") as scratch:
        (scratch / "a").write_text("1")
    with pytest.raises(KeyError), whole_folder(tmp_path / "x") as scratch:
        raise KeyError
    assert (tmp_path / "x" / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1

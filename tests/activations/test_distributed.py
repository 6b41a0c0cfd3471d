"""Several processes give the moments of one; and the commands that collect, store and merge."""

import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from sample_moments import PAIRS, accumulator, rows, taken

from xmodel_steer.activations.distributed import all_reduced, process_group, require_same_texts
from xmodel_steer.activations.store import ActivationStore
from xmodel_steer.core.errors import PromptError, RankError, SpaceMismatchError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.maps.moments import merge
from xmodel_steer.maps.pairs import PARTS
from xmodel_steer.recipe.saving import read


def same(one: Any, two: Any) -> None:
    assert (one.paired, one.eligible, one.tokens, one.documents) == (
        two.paired,
        two.eligible,
        two.tokens,
        two.documents,
    )
    assert (one.pairs, one.sketch, dict(one.settings)) == (two.pairs, two.sketch, dict(two.settings))
    for part in PARTS:
        a, b = one.parts[part], two.parts[part]
        for kind in (
            "source_means",
            "target_means",
            "source_scatters",
            "target_scatters",
            "cross",
            "shuffled",
            "sketch",
        ):
            for key, value in getattr(a, kind).items():
                torch.testing.assert_close(
                    value, getattr(b, kind)[key], rtol=1e-10, atol=1e-10 * float(value.abs().max() + 1)
                )


# --- the sum ---------------------------------------------------------------------------------


def share(rank: int, size: int) -> Any:
    """Moments of a share of the rows; the last rank of several gets none."""
    one = accumulator(sketch=(0, 2), shard=f"{rank}/{size}")
    sides, piece = rows(90, offset=7.0), 90 // max(1, size - 1) if size > 1 else 90
    if rank < max(1, size - 1):
        for k in range(rank * piece, (rank + 1) * piece, 15):
            one.add(
                PARTS[k % 2], *taken(sides, slice(k, min(k + 15, (rank + 1) * piece))), list(range(15)), eligible=20
            )
    return one.moments()


def worker(rank: int, size: int, folder: str, what: str) -> None:
    import os

    port = (Path(folder) / "port").read_text()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with process_group() as place:
        assert place == (rank, size)
        if what == "sum":
            torch.save([all_reduced(share(rank, size)).parts, rank], Path(folder) / f"{rank}.pt")
            return
        texts = [Prompt(text="one"), Prompt(text=f"{rank}")]
        with pytest.raises(PromptError) as raised:
            require_same_texts(texts)
        (Path(folder) / f"{rank}.texts").write_text(str(raised.value))
        with pytest.raises(SpaceMismatchError) as refused:
            all_reduced(accumulator(settings={"seed": rank}).moments())
        (Path(folder) / f"{rank}.settings").write_text(str(refused.value))


def prepare(folder: Path) -> None:
    """Find a free port for the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))


def launch(size: int, folder: Path, what: str) -> None:
    prepare(folder)
    multiprocessing.start_processes(worker, (size, str(folder), what), nprocs=size, start_method="spawn")


def test_the_sum_over_processes_is_the_merge_of_their_shards(tmp_path: Path) -> None:
    launch(3, tmp_path, "sum")
    expected = merge(share(rank, 3) for rank in range(3))
    for rank in range(3):
        parts, own = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert own == rank
        for name in PARTS:
            assert (parts[name].count, parts[name].documents) == (
                expected.parts[name].count,
                expected.parts[name].documents,
            )
            for kind in ("source_means", "target_scatters", "cross", "shuffled", "sketch"):
                for key, value in getattr(expected.parts[name], kind).items():
                    torch.testing.assert_close(getattr(parts[name], kind)[key], value, rtol=1e-11, atol=1e-9)
    assert expected.parts["train"].cross[PAIRS[0]].norm() > 1


def test_ranks_that_saw_other_texts_or_settings_are_refused_in_every_process(tmp_path: Path) -> None:
    launch(2, tmp_path, "refusals")
    for rank in (0, 1):
        assert f"rank {1 - rank} reads other texts (2 documents" in (tmp_path / f"{rank}.texts").read_text()
        assert "start all with the same arguments" in (tmp_path / f"{rank}.settings").read_text()


def waiting(rank: int, size: int, folder: str, asleep: int) -> None:
    """One rank hangs in its share of the text; the others come to the sum."""
    import os

    port = (Path(folder) / "port").read_text()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        with process_group(timeout=2):
            require_same_texts([Prompt(text="one")])
            if rank == asleep:
                time.sleep(60)
            all_reduced(share(rank, size))
    except RankError as error:
        (Path(folder) / f"{rank}.said").write_text(str(error))


@pytest.mark.parametrize(
    ("asleep", "says"), [(1, "rank 1 did not answer in time: it hangs"), (0, "rank 0 did not answer")]
)
def test_a_rank_that_hangs_is_named(tmp_path: Path, asleep: int, says: str) -> None:
    prepare(tmp_path)
    running = multiprocessing.start_processes(
        waiting, (2, str(tmp_path), asleep), nprocs=2, start_method="spawn", join=False
    )
    awake = running.processes[1 - asleep]
    awake.join(50)
    running.processes[asleep].kill()
    assert awake.exitcode == 0
    said = (tmp_path / f"{1 - asleep}.said").read_text()
    assert said.startswith(f"rank {1 - asleep}: {says}") and "start all processes again" in said


def test_without_torchrun_there_is_one_process() -> None:
    with process_group() as place:
        assert place == (0, 1)
        made = share(0, 1)
        assert all_reduced(made) is made
        require_same_texts([Prompt(text="one")])


# --- commands --------------------------------------------------------------------------------


def options(folders: dict[str, Path], **changes: object) -> list[object]:
    given: dict[str, object] = {
        "text": folders["corpus.jsonl"], "source": folders["llama"], "target": folders["gemma"], "max-tokens": 16,
        "source-layers": "1,2", "target-layers": "1", "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    given |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [
        "harvest",
        *(str(item) for key, value in given.items() if value is not None for item in (f"--{key}", value)),
    ]


def test_one_and_three_processes_give_the_same_moments(
    command: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 7 documents: nine of them, the last one short."""
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "WINDOW", 7)
    code, _, err = command(*options(folders, moments=tmp_path / "one.safetensors"))
    assert code == 0, err
    one = read(tmp_path / "one.safetensors")
    assert one.tokens > 100 and len(one.pairs) == 2
    script = "import xmodel_steer.activations.collecting, sys; sys.modules['xmodel_steer.activations.collecting'].WINDOW = 7; from xmodel_steer.cli import main; main()"
    (tmp_path / "run.py").write_text(script)
    arguments = [str(a) for a in options(folders, moments=tmp_path / "three.safetensors")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "run.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same(read(tmp_path / "three.safetensors"), one)


def test_jobs_write_a_file_each_and_merge_adds_them_up(
    command: Any,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "WINDOW", 4)
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        code, out, err = command(*options(folders, moments=file, shard=f"{i}/3"))
        assert (code, "written" in out) == (0, True), err
    code, _, err = command("merge", *files[:2], "--out", tmp_path / "some.safetensors")
    assert code == 1 and "error: merge: shard 2/3 is missing; give its file too, or --partial" in err
    assert not (tmp_path / "some.safetensors").exists()
    assert command("merge", *files[:2], "--out", tmp_path / "some.safetensors", "--partial")[0] == 0
    code, _, err = command("merge", files[0], files[0], "--out", tmp_path / "twice.safetensors")
    assert code == 1 and "shard 0/3 is in both" in err
    assert command("merge", *files[::-1], "--out", tmp_path / "all.safetensors")[0] == 0
    assert command(*options(folders, moments=tmp_path / "whole.safetensors"))[0] == 0
    merged, whole = read(tmp_path / "all.safetensors"), read(tmp_path / "whole.safetensors")
    assert merged.tokens == whole.tokens and set(merged.settings) == {*whole.settings, "texts"}
    for part, (s, t) in product(PARTS, whole.pairs):
        a, b = (getattr(m.pair(s, t), part).cross_scatter for m in (merged, whole))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-8)


def test_a_store_is_filled_one_model_at_a_time(command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    for other in ("target", "source"):
        code, _, err = command(*options(folders, store=tmp_path / "store", store_dtype="bfloat16", **{other: None}))
        assert code == 0, err
    store = ActivationStore(tmp_path / "store")
    assert [str(s) for s in store.spaces("source")] == ["resid_post[1]", "resid_post[2]"]
    assert store.record("target")["dtype"] == "bfloat16"
    assert store.moments().tokens > 100


def test_layer_pairs_and_a_sketch_can_be_chosen(command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    code, _, err = command(*options(folders, moments=file, pairs="2:1", sketch=5, target_layers="all"))
    assert code == 0, err
    made = read(file)
    assert [(s.layer, t.layer) for s, t in made.pairs] == [(2, 1)] and len(made.sketch) == 5
    assert len(made.parts["train"].sketch) == 2 * len(made.target) == 8


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(), "give either --moments FILE or --store FOLDER"),
        (dict(moments="m", store="s"), "give either --moments FILE or --store FOLDER"),
        (dict(moments="m", source=None), "moments need both models"),
        (dict(store="m", source=None, target=None), "a store at least one"),
        (dict(moments="m", shard="3/3"), "'3/3' is not I/N"),
        (dict(moments="m", pairs="3-3"), "is not a list of layer pairs such as 15:10"),
        (dict(moments="m", source_layers="x"), "is not a list of layers"),
    ],
    ids=str,
)
def test_wrong_calls_are_one_line_and_exit_2(command: Any, folders: dict[str, Path], changes: dict, says: str) -> None:
    code, _, err = command(*options(folders, **changes))
    assert code == 2 and says in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"moments": "."}, 1, "is a folder; give a file name such as moments.safetensors"),
        ({"moments": __file__}, 1, "exists and holds something else, no Moments; choose another place"),
        ({"moments": "/proc/moments.safetensors"}, 1, "cannot be written"),
        ({"moments": "m.safetensors", "store_dtype": "float32"}, 2, "goes with --store"),
        ({"store": "s", "sketch": 3}, 2, "go with --moments"),
        ({"store": "s", "pairs": "1:1"}, 2, "go with --moments"),
        ({"store": "s", "target_layers": "one"}, 2, "is not a list of layers"),
        ({"moments": "m.safetensors", "pairs": "1-1"}, 2, "is not a list of layer pairs"),
    ],
)
def test_a_call_that_cannot_end_well_is_refused_before_a_model_is_loaded(
    changes: dict[str, object],
    code: int,
    says: str,
    command: Any,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xmodel_steer.models.loading.load", None)
    found, _, err = command(*options(folders, **changes))
    assert found == code and says in " ".join(err.replace("│", " ").split())

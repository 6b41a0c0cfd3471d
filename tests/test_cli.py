"""The command line on toy models in local folders: runs end to end, and errors are one line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import sentences

import xmodel_steer as xs
from xmodel_steer.errors import PromptError
from xmodel_steer.moments import PARTS
from xmodel_steer.persistence import read
from xmodel_steer.readers import read_contrast


def arguments(folders: dict[str, Path], out: Path, **changes: object) -> list[object]:
    options: dict[str, object] = {
        "source": folders["llama"], "target": folders["gemma"], "contrast": folders["pairs.jsonl"], "text": folders["corpus.jsonl"],
        "out": out, "prompts": folders["prompts.txt"], "score": "contains:a", "max-new-tokens": 4, "strengths": "-1,1",
        "source-layers": "1", "target-layers": "1,2", "dtype": "float32",
    }  # fmt: skip
    options |= {k.replace("_", "-"): v for k, v in changes.items()}
    return ["transfer", *(item for k, v in options.items() if v is not None for item in (f"--{k}", v))]


def test_transfer_writes_a_run_folder_and_show_prints_it(
    command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    code, out, err = command(*arguments(folders, tmp_path / "run"))
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "generations.jsonl", "map.safetensors", "report.html", "result.json", "vectors",
    ]  # fmt: skip
    result = read(tmp_path / "run")
    assert result.verdict().text in out.replace("\n", " ")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "src=" not in page.split("<body>")[0]  # nothing is fetched
    assert page.count("<h3>") == 6
    code, shown, _ = command("show", tmp_path / "run")
    assert code == 0
    assert "shuffled" in shown
    # Once more: the moments come from the cache, the result is the same.
    assert command(*arguments(folders, tmp_path / "again"))[0] == 0
    again = read(tmp_path / "again")
    assert [a.scores for a in again.arms] == [a.scores for a in result.arms]


@pytest.mark.parametrize("prompts", [True, False])
def test_text_that_the_map_reads_is_held_apart_from_what_is_reported(
    prompts: bool, command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, object] = {} if prompts else {"prompts": None, "score": None}
    theirs = (
        folders["prompts.txt"].read_text().split("\n\n")[4]
        if prompts
        else read_contrast(folders["pairs.jsonl"]).positive[4].text
    )
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": theirs}) + "\n" + folders["corpus.jsonl"].read_text())
    code, _, err = command(*arguments(folders, tmp_path / "run", text=corpus, **given))
    assert code == 1 and "the same text is in the" in err and "map text" in err and "remove it from one" in err
    assert not (tmp_path / "run").exists()


def test_transfer_without_prompts_measures_preference(command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    code, _out, err = command(*arguments(folders, tmp_path / "run", prompts=None, score=None))
    assert code == 0, err
    assert "log-likelihood" in read(tmp_path / "run").unit


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "no/such-model-anywhere"}, "hub"),
        ({"source": "/no/such/folder"}, "no such folder"),
        ({"source": "missing.gguf"}, "no such GGUF file"),
        ({"source": "packaged:gpt-9"}, "packaged:gemma-3-270m"),
        ({"source_layers": "40"}, "has layers 0 to 3"),
        ({"contrast": "nowhere.jsonl"}, "no such file"),
        ({"text": "nowhere.jsonl"}, "no such file"),
        ({"dtype": "float16"}, "float16 overflows"),
    ],
)
def test_an_error_is_one_line_and_exit_1_and_leaves_nothing(
    changes: dict[str, object], says: str, command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    code, _, err = command(*arguments(folders, tmp_path / "run", **changes))
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 1
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "vibes"},
        {"score": "matches:("},
        {"strengths": "one"},
        {"tokens": "some"},
        {"source": None},
        {"prompts": None},
        {"strengths": "-1,0,1"},
        {"strengths": "-1"},
        {"source_layers": "1;2"},
        {"target_layers": "one"},
    ],
)
def test_a_wrong_call_is_exit_2(
    wrong: dict[str, object], command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert command(*arguments(folders, tmp_path / "run", **wrong))[0] == 2


def test_debug_shows_the_traceback(command: Any) -> None:
    with pytest.raises(Exception, match="no such run folder"):
        command("--debug", "show", "nowhere")


def test_a_folder_that_is_not_a_run_is_refused_before_any_work(
    command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    code, _, err = command(*arguments(folders, tmp_path / "mine"))
    assert code == 1
    assert "not a run folder" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    command: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmodel_steer.loading.load", None)
    code, _, err = command(*arguments(folders, Path("/proc/run")))
    assert code == 1 and "/proc/run: cannot be made" in err and err.strip().endswith("choose another --out")


def test_changed_input_is_never_served_from_the_cache(
    command: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, seen = tmp_path / "cache" / "moments", []

    def transfer(*_: Any, moments: Any, **__: Any) -> None:
        seen.append(moments)
        raise PromptError("seen")

    monkeypatch.setattr(sys.modules["xmodel_steer.transfer"], "transfer", transfer)

    def run(**changes: object) -> int:
        code, _, err = command(*arguments(folders, tmp_path / "run", **changes))
        assert code == 1 and "error: seen" in err
        return len(list(kept.glob("*.safetensors")))

    assert run() == 1
    text = (folders["corpus.jsonl"]).read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(text[1:]) + text[0].replace("a", "e", 1))
    assert run(text=tmp_path / "other.jsonl") == 2
    # A damaged file in the cache is collected again, not served and not an error.
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    assert run() == 2
    first, other, again = ([own.parts[part].source_means[xs.Site(1)] for part in PARTS] for own in seen)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_ctrl_c_in_the_middle_leaves_no_half_written_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """A real signal to a real process, while it measures."""
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(20000, 8, 25)))
    call = [
        sys.executable,
        "-c",
        "from xmodel_steer.cli import main; main()",
        *arguments(folders, tmp_path / "run", text=long),
    ]
    environment = {"XMODEL_STEER_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import os

    process = subprocess.Popen(list(map(str, call)), stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would inherit "ignore"
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + 120
    while "moments" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "run").exists()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]

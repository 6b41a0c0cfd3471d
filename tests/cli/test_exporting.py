"""A run's vector leaves for other programs: what they read steers as the run did."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sample_results import result
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from xmodel_steer.cli.exporting import FORMATS
from xmodel_steer.core.spaces import Site, Space, Stack, stacked
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interop import read_control_vector, read_vllm_vector, steering_hf
from xmodel_steer.interventions.operators import Ablate, Add
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models.identity import fingerprint
from xmodel_steer.recipe.saving import save

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, of a bias that cannot be merged
IDS = torch.tensor([[5, 9, 40, 77, 31, 2]])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def saved(folders: dict[str, Path], place: Path, *, layers: tuple[int, ...] = (1,), **changes: Any) -> SteeringVector:
    """A run whose mapped vector is of the toy Llama; gives the vector."""
    spaces = [Space("llama", Site(layer), 32, fingerprint(plain(folders["llama"]))) for layer in layers]
    space = stacked(Stack(layers), spaces) if len(layers) > 1 else spaces[0]
    vector = SteeringVector(torch.randn(space.width, generator=torch.Generator().manual_seed(0)), space, "joy")
    made = result()
    choice = made.chosen["joy"] | {"strength": 2.5, "operator": "Add(strength=2.5)"}
    save(replace(made, vectors={"mapped": vector}, **({"chosen": {"joy": choice}} | changes)), place)
    return vector


@pytest.mark.parametrize("layers", [(2,), (1, 3)])
def test_every_format_adds_the_vector_at_the_chosen_strength(
    layers: tuple[int, ...], command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    vector = saved(folders, tmp_path / "run", layers=layers)
    hf = plain(folders["llama"])
    with steering_hf(hf, vector, operator=Add(2.5)):
        steered = logits(hf)
    for to in FORMATS:
        place = tmp_path / ("vllm.pt" if to == "vllm" else to)
        code, out, err = command("export", tmp_path / "run", "--to", to, "--out", place, "--model", folders["llama"])
        assert code == 0, err
        assert f"written: {place}" in out
    rows = read_vllm_vector(tmp_path / "vllm.pt")  # unscaled; the strength is in the request
    (spec,) = json.loads((tmp_path / "vllm.pt.json").read_text())["vllm_xargs"].values()
    with steering_hf(hf, list(rows), operator=Add(2.5)):
        torch.testing.assert_close(logits(hf), steered)
    assert [(row["layer"], row["scale"]) for row in json.loads(spec)] == [(layer, 2.5) for layer in layers]
    back = read_control_vector(tmp_path / "gguf")
    with steering_hf(hf, back):
        torch.testing.assert_close(logits(hf), steered)
    torch.testing.assert_close(logits(plain(tmp_path / "baked")), steered)
    assert AutoTokenizer.from_pretrained(tmp_path / "baked")("The sky")["input_ids"]
    torch.testing.assert_close(logits(PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()), steered)


def test_a_strength_or_an_ablation_may_be_asked_for(command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    vector = saved(folders, tmp_path / "run", spec={"positions": "generated"})
    call = ["export", tmp_path / "run", "--model", folders["llama"], "--to", "baked", "--out"]
    assert command(*call, tmp_path / "more", "--strength", "-4")[0] == 0
    hf = plain(folders["llama"])
    with steering_hf(hf, Intervention(vector, Add(-4.0))):
        torch.testing.assert_close(logits(plain(tmp_path / "more")), logits(hf))
    assert command(*call, tmp_path / "without", "--ablate")[0] == 0
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    assert config["xmodel_steer"]["steering"] == "Ablate everywhere"
    ablated = plain(tmp_path / "without")
    with steering_hf(ablated, vector, operator=Ablate(), trust=True):
        torch.testing.assert_close(logits(ablated), logits(plain(tmp_path / "without")))


@pytest.mark.parametrize(
    ("options", "changes", "code", "says"),
    [
        (["--to", "onnx"], {}, 2, "must be gguf, vllm, baked, adapter"),
        (["--to", "gguf", "--ablate"], {}, 2, "can only add; use --to baked"),
        (["--to", "vllm", "--ablate"], {}, 2, "can only add; use --to baked"),
        (["--to", "gguf", "--vector", "native"], {}, 1, "has no vector 'native'; --vector takes mapped"),
        (["--to", "gguf"], {"spec": {"positions": "last"}}, 1, "steered at positions 'last'.*give --strength"),
        (["--to", "gguf"], {"chosen": {"joy": {"operator": "Clamp(to='negative')"}}}, 1, "did not choose a strength"),
        (["--to", "baked"], {}, 1, "llama"),  # no such model on the hub: --model says where
        (["--to", "baked", "--model", "gemma"], {}, 1, "carry it over with a map"),
    ],
)  # fmt: skip
def test_what_cannot_leave_is_said_in_a_line_and_writes_nothing(
    options: list[str], changes: Any, code: int, says: str, command: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    saved(folders, tmp_path / "run", **changes)
    given = [folders["gemma"] if option == "gemma" else option for option in options]
    got, _, err = command("export", tmp_path / "run", "--out", tmp_path / "out", *given)
    assert got == code
    assert re.search(says, " ".join(err.replace("│", " ").split())), err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(command: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    saved(folders, tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, err = command(
        "export", tmp_path / "run", "--to", "baked", "--out", tmp_path / "out", "--model", folders["llama"]
    )
    assert code == 1 and "is not empty; give a new folder" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]

"""Every architecture keeps the laws, or is refused, or gone round: none is silently wrong."""

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, BEGIN, END, PAGE

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.evaluation.conformance import TEXTS, check_model
from xmodel_steer.interop import hugging_face
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.sites import space_of

pytestmark = [
    pytest.mark.architectures,
    pytest.mark.filterwarnings("ignore"),
]  # libraries warn of much that they refuse

ROOT = Path(__file__).parent.parent
STEPS = 6


def shown():
    """The rows of the page, by architecture."""
    lines = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def test_the_page_has_every_architecture_once():
    assert list(shown()) == list(ARCHITECTURES)
    assert sum(line.split(" | ")[1] == "yes" for line in shown().values()) >= 50
    assert not any(line.split(" | ")[1] == "wrong" for line in shown().values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_none_is_silently_wrong(name, tmp_path):
    folder = architectures.folder_of(name, tmp_path)
    refused, model = architectures.loaded(folder)
    laws = [] if refused else check_model(model)
    made = architectures.row(name, refused, laws)
    assert not [law for law in laws if law.state == "failed" and not law.remedy], made
    pinned = (ROOT / "constraints.txt").read_text()
    if all(f"{package}=={version(package)}" in pinned for package in ("transformers", "transformer-lens")):
        assert made == shown()[name], "write the table anew: python tests/architectures.py"
    if not refused:
        as_hugging_face(model, folder)


def as_hugging_face(model, folder):
    """Texts of ours are those that an untouched model of transformers writes, one at a time, without a cache.

    Its attention is the eager one, as ours: Falcon's with alibi scales otherwise than the fused one.

    So are steered ones, with its own generate and cache, unless that is refused in words.
    """
    from transformers import AutoModelForCausalLM

    plain, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(),
        architectures.tokenizer(),
    )
    settings = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 1}

    def written(use_cache):
        made = []
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            out = plain.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **settings)
            made.append(out[0, ids.shape[1] :].tolist())
        return made

    def ours():
        return generate_tokens(model, TEXTS, max_new_tokens=STEPS, batch_size=3, stop_at_eos=False)[0]

    unsteered = ours()
    assert unsteered == written(use_cache=False)
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    stream = capture(model, TEXTS, [Site(1)])[Site(1)].values
    vector = SteeringVector(2 * stream.norm(dim=-1).max() * direction / direction.norm(), space_of(model, Site(1)))
    with steering(model, vector, positions="generated"):
        steered = ours()
    assert [row[0] for row in steered] == [row[0] for row in unsteered]  # the first token is the prompt's alone
    theirs = steered
    with hugging_face.steering_hf(plain, vector, positions="generated", trust=True), suppress(SiteError):
        theirs = written(use_cache=True)  # Mamba's and RWKV's state counts no tokens, which this would have to
    assert theirs == steered

"""Baked models and adapters do what steering does, once saved and read by the program that they are for."""

import copy
import inspect
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import toys
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import xmodel_steer as xs
from xmodel_steer.core.errors import ModelError, SpaceMismatchError
from xmodel_steer.core.spaces import STREAMS, Site, Space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interop import bake, baking, steering_hf, write_adapter
from xmodel_steer.interventions.operators import Ablate, Add, Clamp, Gate
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models.identity import fingerprint
from xmodel_steer.models.passes import forward
from xmodel_steer.models.sites import space_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and peft's, of random models
CLOSE = dict(rtol=1e-4, atol=1e-4)
STEPS = 5
#: An architecture, and whether Add and Ablate fit into weights, and into an adapter.
FITS = {
    "llama": "add ablate add-adapter ablate-adapter",
    "gpt2": "add ablate add-adapter",
    "gpt_neox": "add ablate add-adapter",
    "gptj": "add ablate add-adapter",
    "opt": "add ablate add-adapter",
    "phi": "add ablate add-adapter",
    "falcon": "add ablate add-adapter ablate-adapter",
    "granite": "add ablate add-adapter ablate-adapter",
    "gpt_oss": "add ablate",
    "smollm3": "add ablate add-adapter ablate-adapter",
    "qwen2": "ablate add-adapter ablate-adapter",
    "qwen3": "ablate add-adapter ablate-adapter",
    "phi3": "ablate add-adapter ablate-adapter",
    "mistral": "ablate add-adapter ablate-adapter",
    "gemma": "ablate add-adapter",
    "mixtral": "ablate",
    "qwen2_moe": "ablate",
    "mamba": "add ablate",
    "bloom": "add add-adapter",
    "gemma2": "",
    "gemma3": "",
    "olmo2": "",
}
#: In the tier of toys; all others are in that of architectures.
QUICK = ("llama", "gpt2", "gpt_neox", "opt", "qwen2", "mixtral", "bloom", "gemma3")


def that(fit: str, *, fits: bool = True) -> list[Any]:
    """The architectures that a kind of steering fits, or does not."""
    names = [name for name, kinds in FITS.items() if (fit in kinds.split()) == fits]
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.architectures) for n in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of random models; unlike in new ones, biases are not zero and a multiplier is not one."""
    root = tmp_path_factory.mktemp("architectures")

    @cache
    def made(name: str) -> Path:
        place = architectures.folder_of(name, root)
        hf = plain(place, **({"residual_multiplier": 0.3} if name == "granite" else {}))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, values in hf.named_parameters():
                if values.ndim == 1 or key.endswith("bias"):
                    values.add_(0.2 * torch.randn(values.shape))
        hf.save_pretrained(place)
        return place

    return made


def plain(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **settings).eval()


def vector(layer: int, seed: int = 0, model: str = "elsewhere") -> SteeringVector:
    direction = 3 * torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(direction, Space(model, Site(layer), 32, "none"), "joy")


ADDED = [Intervention(vector(0), Add(1.5)), Intervention(vector(3, 1), Add(-2.0)), vector(3, 2)]
REMOVED = Intervention(vector(1), Ablate())


def padded() -> dict[str, Tensor]:
    ids = torch.randint(5, 260, (3, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    texts = padded()
    real = texts["attention_mask"].bool()
    if (
        "position_ids" in inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    ):  # GPT-2 counts padding otherwise
        texts["position_ids"] = (texts["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return model(**texts, use_cache=False).logits[real]


@torch.no_grad()
def written(model: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": 263, "pad_token_id": 1}
    return model.generate(**padded(), **settings).tolist()


def ablated_at_every_site(folder: Path) -> Tensor:
    """TransformerLens' model of a folder, with the direction ablated before, within and after every block."""
    model = xs.load(folder, device="cpu", dtype="float32")
    sites = [Site(k, stream) for k in range(model.cfg.n_layers) for stream in STREAMS[:3]]
    sites = [site for site in sites if site.hook_name in model.hook_dict]
    steps = [Intervention(replace(REMOVED.vector, space=space_of(model, site)), Ablate()) for site in sites]
    texts = padded()
    with xs.steering(model, steps), torch.no_grad():
        given = forward(model, texts["input_ids"], texts["attention_mask"], logits="all")[0]
    assert given is not None
    return given[texts["attention_mask"].bool()]


@pytest.mark.parametrize("name", that("add"))
def test_a_baked_sum_is_the_steered_model_once_reloaded(name: str, folder: Any, tmp_path: Path) -> None:
    hf = plain(folder(name))
    before = {key: tensor.clone() for key, tensor in hf.state_dict().items()}
    baked = bake(hf, ADDED, trust=True)
    baked.save_pretrained(tmp_path)
    again = plain(tmp_path)
    unsteered = logits(hf)
    with steering_hf(hf, ADDED, trust=True):
        steered = logits(hf)
        texts = written(hf) if name != "mamba" else []  # whose state counts no tokens, as steering_hf has to
    assert (steered - unsteered).abs().max() > 0.1 * unsteered.abs().max()
    torch.testing.assert_close(logits(again), steered, **CLOSE)
    assert not texts or written(again) == texts
    said = again.config.xmodel_steer
    assert "Add(strength=1.5) at resid_post[0], Add(strength=-2.0) at resid_post[3]" in said["steering"]
    assert said["logits_error"] < 1e-4 * said["logits_effect"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in hf.state_dict().items()) and len(before) == len(
        hf.state_dict()
    )
    assert not hasattr(hf.config, "xmodel_steer")


@pytest.mark.parametrize("name", that("ablate"))
def test_a_baked_ablation_is_that_at_every_site_once_reloaded(name: str, folder: Any, tmp_path: Path) -> None:
    hf = plain(folder(name))
    baked = bake(hf, REMOVED, everywhere=True, trust=True)
    baked.save_pretrained(tmp_path)
    again = plain(tmp_path)
    wanted = ablated_at_every_site(folder(name))
    assert (logits(hf) - wanted).abs().max() > 0.1 * wanted.abs().max()
    torch.testing.assert_close(logits(again), wanted, **CLOSE)
    head, old = again.get_output_embeddings().weight, hf.get_output_embeddings().weight
    assert torch.equal(head, old), "the output layer reads the stream, and stays"
    outputs: list[Tensor] = []
    for block in xs.interop.spaces.decoder_blocks(again):
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    logits(again)
    unit = REMOVED.vector.direction / REMOVED.vector.direction.norm()
    assert outputs and all((out @ unit).abs().max() < 1e-4 * out.abs().max() for out in outputs)


@pytest.mark.parametrize("kind", ["add", "ablate"])
@pytest.mark.parametrize("name", that("", fits=False))
def test_an_adapter_is_the_steered_model_in_peft_or_refused(name: str, kind: str, folder: Any, tmp_path: Path) -> None:
    hf, everywhere = plain(folder(name)), kind == "ablate"
    steps = REMOVED if everywhere else ADDED
    if f"{kind}-adapter" not in FITS[name].split():
        with pytest.raises(ModelError, match="LoRA cannot change|peft refuses|does more than add|follows the MLP"):
            write_adapter(hf, steps, tmp_path / "adapter", everywhere=everywhere, trust=True)
        assert not list(tmp_path.iterdir())
        return
    write_adapter(hf, steps, tmp_path / "adapter", everywhere=everywhere, trust=True)
    if everywhere:
        wanted = ablated_at_every_site(folder(name))
    else:
        with steering_hf(hf, steps, trust=True):
            wanted = logits(hf)
    unchanged = {key: tensor.clone() for key, tensor in hf.state_dict().items()}
    assert not any("lora" in key for key in unchanged)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()), wanted, **CLOSE)
    said = json.loads((tmp_path / "adapter" / "xmodel_steer.json").read_text())
    assert said["logits_error"] < 1e-4 * said["logits_effect"]
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 64_000


@pytest.mark.parametrize("name", that("add", fits=False))
def test_where_no_bias_fits_the_way_out_is_named(name: str, folder: Any) -> None:
    with pytest.raises(
        ModelError, match=r"(has no bias, and no setting|follows the MLP of).*steering_hf, llama.cpp.*vLLM"
    ):
        bake(plain(folder(name)), ADDED, trust=True)


@pytest.mark.parametrize("name", that("ablate", fits=False))
def test_where_more_than_linear_layers_writes_ablation_is_refused(name: str, folder: Any) -> None:
    with pytest.raises(ModelError, match=r"(block 0|the embedding) does more than add .* outputs.*use steering_hf"):
        bake(plain(folder(name)), REMOVED, everywhere=True, trust=True)


MEANS = replace(vector(1), positive_mean=torch.ones(32), negative_mean=torch.zeros(32), scale=torch.ones(32))
REFUSED = {
    "one site": (REMOVED, {}, ValueError, "Ablate after one block is no change of weights.*everywhere=True"),
    "clamp": (Intervention(MEANS, Clamp()), {}, ValueError, "weights add or ablate; Clamp is neither"),
    "gate": (Intervention(vector(1), gate=Gate(MEANS)), {}, ValueError, "every token of every text, so a gate"),
    "positions": (Intervention(vector(1), positions="last"), {}, ValueError, "positions='last' would be lost"),
    "schedule": (Intervention(vector(1), schedule=(1.0, 0.0)), {}, ValueError, "a schedule and positions='all' would be lost"),
    "prompts": (Intervention(vector(1), prompts=frozenset({0})), {}, ValueError, "a gate, prompts, a schedule and"),
    "everywhere": (vector(1), {"everywhere": True}, ValueError, "with everywhere=True one Ablate"),
    "two": ([REMOVED, REMOVED], {"everywhere": True}, ValueError, "bake one after the other"),
    "none": ([], {}, ValueError, "takes vectors to add"),
    "another": (vector(1), {"trust": False}, SpaceMismatchError, "neither its name nor its weights"),
    "stream": (replace(vector(1), space=replace(vector(1).space, site=Site(1, "attn_out"))), {}, ModelError, "resid_post"),
}  # fmt: skip


@pytest.mark.parametrize("steps, settings, kind, says", REFUSED.values(), ids=REFUSED)
def test_what_weights_cannot_do_is_refused(steps: Any, settings: Any, kind: Any, says: str, folder: Any) -> None:
    with pytest.raises(kind, match=says):
        bake(plain(folder("llama")), steps, **({"trust": True} | settings))


def test_only_a_plain_whole_model_in_evaluation_mode_is_baked(folder: Any, llama: toys.Toy, tmp_path: Path) -> None:
    hf = plain(folder("llama"))
    write_adapter(hf, ADDED, tmp_path, trust=True)
    adapted = PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path)
    for model in (llama.model, adapted, adapted.get_base_model(), hf.train()):
        with pytest.raises(ModelError, match=r"plain model of transformers in evaluation mode.*merge_and_unload"):
            bake(model, ADDED, trust=True)
    with torch.device("meta"), pytest.raises(ModelError, match="weights in memory that are not quantised"):
        bake(type(hf)(hf.config).eval(), ADDED, trust=True)


def test_half_precision_is_baked_with_its_rounding(folder: Any) -> None:
    hf = plain(folder("llama"), dtype=torch.bfloat16)
    for steps, everywhere in ((ADDED, False), (REMOVED, True)):
        said = bake(hf, steps, everywhere=everywhere, trust=True).config.xmodel_steer
        assert 0 < said["logits_error"] < 0.1 * said["logits_effect"]


@pytest.mark.parametrize("lost", ["embed_tokens", "0.self_attn", "3.mlp"])
def test_a_layer_that_was_missed_does_not_pass_the_proof(
    lost: str, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = baking.find_writers
    monkeypatch.setattr(baking, "find_writers", lambda *a, **k: [w for w in whole(*a, **k) if lost not in w.name])
    with pytest.raises(ModelError, match="would not do what steering_hf does: logits differ by"):
        bake(plain(folder("llama")), REMOVED, everywhere=True, trust=True)


@pytest.mark.packaged
@pytest.mark.long
def test_a_packaged_llama_is_baked_and_adapted(tmp_path: Path) -> None:
    from xmodel_steer.models.loading import located

    hf = AutoModelForCausalLM.from_pretrained(located("packaged:smollm2-135m-instruct")[1], dtype=torch.float32).eval()
    space = Space("packaged:smollm2-135m-instruct", Site(15), hf.config.hidden_size, fingerprint(hf))
    v = SteeringVector(20 * torch.randn(space.width, generator=torch.Generator().manual_seed(0)), space, "joy")
    for step, everywhere in ((Intervention(v, Add(1.0)), False), (Intervention(v, Ablate()), True)):
        baked = bake(hf, step, everywhere=everywhere)
        said = baked.config.xmodel_steer
        assert said["logits_error"] < 1e-4 * said["logits_effect"], said
        baked.save_pretrained(tmp_path / "baked")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32).eval()
        assert torch.equal(logits(again), logits(baked))
        write_adapter(hf, step, tmp_path / "adapter", everywhere=everywhere)
        wanted = logits(baked)
        adapted = PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "adapter").eval()
        difference = (logits(adapted) - wanted).abs().max()
        assert difference < 1e-3 * (logits(hf) - wanted).abs().max()

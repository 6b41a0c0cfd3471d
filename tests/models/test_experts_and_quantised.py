"""A mixture of experts, and weights that bitsandbytes quantised: steered as any model is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import NO_STOP, TEXTS, Toy

import xmodel_steer as xs
from xmodel_steer.activations.reading import capture
from xmodel_steer.core.spaces import Site
from xmodel_steer.evaluation.conformance import check_model
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Ablate, Add
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.passes import forward
from xmodel_steer.models.sites import all_sites

#: Libraries warn of what they cast, and of a text alone that this library reads instead of a batch.
pytestmark = pytest.mark.filterwarnings("ignore")
NO_BITS = "bitsandbytes is not here: pip install bitsandbytes, then run again"
#: How to make each, and how far rounding may carry it. 8-bit rounds activations too, so that a bit's change grows.
KINDS = {
    "mixtral": (None, 1e-4),
    "8-bit": (dict(load_in_8bit=True), 0.05),
    "4-bit": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 1e-4),
}


def plain(kind: str, folder: Path) -> tuple[Any, Any]:
    """A model of transformers, as a user loads it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

    tokenizer = toys.byte_level_tokenizer(folder / "tokenizer")
    settings = KINDS[kind][0]
    if settings is None:
        config = MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, **toys._common(tokenizer),
        )  # fmt: skip
        hf = MixtralForCausalLM(config).eval()
        toys._randomise(hf, 0)
        return hf, tokenizer
    pytest.importorskip("bitsandbytes", reason=NO_BITS)
    toys.hf_model("llama", tokenizer).save_pretrained(folder / "model")
    quantised = AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    names = {type(m).__name__ for m in quantised.modules()}
    assert names & {"Linear8bitLt", "Linear4bit"}
    return quantised.eval(), tokenizer


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, float]:
    """A bridged model with an untouched copy, and the rounding that its kind may show."""
    (hf, tokenizer), (copy, _) = (plain(request.param, tmp_path_factory.mktemp(request.param[0])) for _ in range(2))
    if request.param == "mixtral":
        copy.load_state_dict(hf.state_dict())
    model = xs.load(hf, tokenizer=tokenizer, name=request.param, dtype=torch.float32)
    return Toy(request.param, model, tokenizer, copy), KINDS[request.param][1]


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def streams(toy: Toy, **settings: Any) -> dict[Site, torch.Tensor]:
    made = capture(toy.model, TEXTS[:4], all_sites(toy.model), tokens="all", include_special=True, **settings)
    return {site: rows.values for site, rows in made.items()}


def test_no_law_fails_without_a_remedy(kind: tuple[Toy, float]) -> None:
    failed = [law for law in check_model(kind[0].model) if law.state == "failed" and not law.remedy]
    assert not failed


def test_capture_is_hugging_faces_and_steering_the_same_addition(kind: tuple[Toy, float]) -> None:
    toy, rounding = kind
    vector = toy.vector(1)
    free, edits = streams(toy), {1: 3.0 * vector.direction}
    with steering(toy.model, vector, operator=Add(3.0)):
        made = streams(toy)
    references = [[toy.reference(toy.ids(text), e)[0] for text in TEXTS[:4]] for e in ({}, edits)]
    for layer in range(toy.depth):
        site, (untouched, edited) = Site(layer), (torch.cat([r[layer] for r in rows]) for rows in references)
        assert off(free[site], untouched) <= rounding
        assert off(made[site], edited) <= rounding
        assert torch.equal(made[site], free[site]) == (layer < 1)
        assert layer < 1 or off(made[site], untouched) > 4 * rounding  # the effect is larger than the rounding


def test_rows_are_the_same_in_any_batch_and_an_ablation_leaves_nothing(kind: tuple[Toy, float]) -> None:
    toy, rounding = kind
    vector = toy.vector(1)
    with steering(toy.model, vector, operator=Ablate()):
        together, alone = streams(toy, batch_size=4, padding_side="left"), streams(toy, batch_size=1)
    for site in together:
        assert off(together[site], alone[site]) <= rounding
    unit = vector.direction / vector.direction.norm()
    assert (together[Site(1)] @ unit).abs().max() < 1e-4


def test_strength_zero_and_leaving_are_bit_exact(kind: tuple[Toy, float]) -> None:
    toy, _ = kind
    (batch,) = batches(toy.model, encode(toy.model, xs.ContrastSet.from_prompts(TEXTS[:1], TEXTS[1:2]).positive), 1)

    def logits() -> torch.Tensor:
        return forward(toy.model, batch.ids, batch.mask)[0]

    untouched = logits()
    with steering(toy.model, toy.vector(1), operator=Add(0.0)):
        assert torch.equal(logits(), untouched)
    with steering(toy.model, toy.vector(1)):
        assert not torch.equal(logits(), untouched)
    assert torch.equal(logits(), untouched)


def test_steered_text_is_the_same_in_any_batch_and_hugging_faces_own(kind: tuple[Toy, float]) -> None:
    toy, _ = kind

    def tokens(**settings: Any) -> list[list[int]]:
        return generate_tokens(toy.model, TEXTS[:4], max_new_tokens=4, stop_at_eos=False, **settings)[0]

    free, vector = tokens(), 8.0 * toy.vector(1)
    with steering(toy.model, vector, positions=("last", "generated")):
        steered = tokens(batch_size=4)
        assert tokens(batch_size=1) == steered == tokens(batch_size=4, use_cache=False)
    assert steered != free
    theirs = []
    with xs.interop.steering_hf(toy.hf, vector, positions=("last", "generated"), trust=True):
        for text in TEXTS[:4]:
            ids = torch.tensor([toy.ids(text)])
            out = toy.hf.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4, use_cache=False, **NO_STOP
            )
            theirs.append(out[0, ids.shape[1] :].tolist())
    assert theirs == steered


def test_steering_before_a_router_changes_the_experts_that_read_a_token(kind: tuple[Toy, float]) -> None:
    toy, _ = kind
    if toy.name != "mixtral":  # has no router
        return
    chosen: list[torch.Tensor] = []

    def route(module: Any, args: Any, out: Any) -> None:
        logits = next(t for t in (out if isinstance(out, tuple) else (out,)) if t.shape[-1] == 4)
        chosen.append(logits.topk(2, dim=-1).indices.sort(-1).values)

    gate = [m for m in toy.model.original_model.modules() if type(m).__name__ == "MixtralTopKRouter"][2]
    handle = gate.register_forward_hook(route)
    ids = torch.tensor([toy.ids(TEXTS[1])])
    toy.model(ids)
    with steering(toy.model, toy.vector(1), operator=Add(10.0)):
        toy.model(ids)
    handle.remove()
    assert len(chosen) == 2 and not torch.equal(*chosen)

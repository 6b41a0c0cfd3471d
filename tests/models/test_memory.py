"""A Hugging Face model in memory is hooked as its folder is, and stays as it was."""

import copy
from typing import Any

import pytest
import torch
from toys import TEXTS, TOYS, Toy, hf_model

from xmodel_steer.activations.reading import capture
from xmodel_steer.core import bars
from xmodel_steer.core.errors import ModelError
from xmodel_steer.core.spaces import Site
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.models import loading
from xmodel_steer.models.facts import conduct_of, dtype_of, name_of, tokenizer_of
from xmodel_steer.models.generation import generate
from xmodel_steer.models.loading import load
from xmodel_steer.models.registry import register
from xmodel_steer.models.sites import all_sites, space_of

HUGGING_FACE = [name for name, recipe in TOYS.items() if recipe.hugging_face]


def outputs(hf: Any) -> torch.Tensor:
    with torch.no_grad():
        return hf(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_model_in_memory_is_hooked_and_stays_as_it_was(name: str, tokenizers: dict[str, Any], toy_named: Any) -> None:
    toy: Toy = toy_named(name)
    tokenizer = tokenizers[TOYS[name].tokenizer]
    before = tokenizer.backend_tokenizer.to_str()
    hf = hf_model(name, tokenizer)
    logits, keys, settings = outputs(hf), list(hf.state_dict()), hf.config.to_dict()
    parts = [type(part) for part in hf.modules()]
    hf.train()
    model = load(hf, tokenizer=tokenizer, name="mine")
    assert name_of(model) == model.cfg.model_name == "mine" and not model.training and dtype_of(model) == torch.float32
    assert all(conduct_of(model).laws) and space_of(model, 1) == space_of(toy.model, 1)
    theirs = capture(toy.model, TEXTS, all_sites(model), tokens="all")
    for site, rows in capture(model, TEXTS, all_sites(model), tokens="all").items():
        torch.testing.assert_close(rows.values, theirs[site].values, rtol=1e-4, atol=2e-4)
    with steering(model, toy.vector(1, size=5.0)):
        generate(model, TEXTS[:1], max_new_tokens=3)
    assert hf.training and [type(part) for part in hf.modules()] == parts
    assert list(hf.state_dict()) == keys and hf.config.to_dict() == settings
    assert torch.equal(outputs(hf.eval()), logits)
    assert tokenizer.backend_tokenizer.to_str() == before == tokenizer_of(model).backend_tokenizer.to_str()


def test_weights_are_shared_unless_they_change(llama: Toy) -> None:
    hf = copy.deepcopy(llama.hf)
    pointers = {parameter.data_ptr() for parameter in hf.parameters()}
    shared, half = load(hf, tokenizer=llama.tokenizer), load(hf, tokenizer=llama.tokenizer, dtype="bfloat16")
    assert {p.data_ptr() for p in shared.original_model.parameters()} == pointers
    assert not {p.data_ptr() for p in half.original_model.parameters()} & pointers
    assert dtype_of(half) == torch.bfloat16 and {p.dtype for p in hf.parameters()} == {torch.float32}
    assert space_of(half, 0) == space_of(shared, 0) and name_of(shared) == "llama"


def test_auto_keeps_the_dtype_of_a_model_in_memory(llama: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    half = copy.deepcopy(llama.hf).to(torch.bfloat16)
    assert dtype_of(load(half, tokenizer=llama.tokenizer)) == torch.bfloat16
    monkeypatch.setattr(loading, "_bfloat16_pays", lambda: True)
    assert dtype_of(load(copy.deepcopy(llama.hf), tokenizer=llama.tokenizer)) == torch.float32
    with pytest.raises(ModelError, match="use float32, bfloat16 or auto"):
        load(half.to(torch.float16), tokenizer=llama.tokenizer)


@pytest.mark.parametrize(("pays", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_the_default_and_the_title_names_what_it_chose(
    folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pays: bool, dtype: str
) -> None:
    titles: list[str] = []
    real = bars.progress_bar

    def noted(*args: Any, desc: str, **kwargs: Any) -> Any:
        titles.append(desc)
        return real(*args, desc=desc, **kwargs)

    monkeypatch.setattr(loading, "progress_bar", noted)
    monkeypatch.setattr(loading, "_bfloat16_pays", lambda: pays)
    assert dtype_of(load(folders["llama"], device="cpu")) == getattr(torch, dtype)
    assert titles == [f"load llama ({dtype})"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokenizer": None}, r"a model in memory needs its tokenizer, got NoneType; give xs.load\(model, tokenizer"),
        ({"tokenizer": "gpt2"}, r"LlamaForCausalLM: a model in memory needs its tokenizer, got str"),
        ({"device": "cpu", "device_map": "auto"}, "load: give device or device_map, not both"),
        ({"base": "other"}, "llama: base= and revision= are not for a model in memory"),
        ({"revision": "main"}, "llama: base= and revision= are not for a model in memory"),
        ({"device_map": "auto"}, "llama: device_map= is not for a model in memory; give it to from_pretrained"),
        ({"model": 5}, "load: needs a name, a folder, a file or a Hugging Face model such as LlamaForCausalLM, got int"),
        ({"model": "somewhere"}, "somewhere: name= and tokenizer= are for a Hugging Face model in memory"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(llama: Toy, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load(**{"model": llama.hf, "tokenizer": llama.tokenizer} | arguments)


def test_each_kind_of_model_goes_to_its_own_function(llama: Toy) -> None:
    with pytest.raises(ModelError, match=r"TransformerBridge: has hook points already; .*xs.register\(model\)"):
        load(llama.model, tokenizer=llama.tokenizer)
    for use in (lambda hf: register(hf, tokenizer=llama.tokenizer), lambda hf: capture(hf, TEXTS, [Site(0)])):
        with pytest.raises(ModelError, match=r"got LlamaForCausalLM; load it with xs.load\(model, tokenizer=tokenizer"):
            use(llama.hf)


def test_an_encoder_in_memory_is_refused(llama: Toy) -> None:
    from transformers import BertConfig, BertModel

    size: dict[str, Any] = dict(
        vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ModelError, match="BertModel does not load as a causal language model"):
        load(BertModel(BertConfig(**size)), tokenizer=llama.tokenizer)

"""What loads is whole, causal and hooked, or is refused at once, by name; where it lies does not matter."""

import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TEXTS, VOCABULARY, hf_model

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.errors import CheckpointWarning, ModelError, SiteError
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.models import causal, passes
from xmodel_steer.models.facts import device_of, dtype_of
from xmodel_steer.models.generation import generate
from xmodel_steer.models.identity import content_hash, fingerprint
from xmodel_steer.models.loading import load
from xmodel_steer.models.sites import all_sites, space_of

pytestmark = [  # peft's
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
offloads = pytest.mark.skipif(
    version("transformer-lens").startswith("3."),
    reason="transformer-lens 3.9 refuses to offload: run these rows with transformer-lens 4",
)

SIZE = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
ENCODER = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="session")
def saved(tokenizers, tmp_path_factory):
    """Save a model of transformers as a user's folder; by default a Llama of two layers."""

    def save(kind="LlamaForCausalLM", config="LlamaConfig", **settings):
        import transformers

        torch.manual_seed(0)
        size = settings.pop("size", SIZE)
        hf = getattr(transformers, kind)(getattr(transformers, config)(**{**size, **settings}))
        with torch.no_grad():
            for parameter in hf.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
        folder = tmp_path_factory.mktemp("saved") / "model"
        hf.save_pretrained(folder)
        tokenizers["byte_level"].save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def whole(saved):
    """A Llama of two layers with a head of its own."""
    return saved()


@pytest.fixture(scope="session")
def tied(saved):
    """A Llama of two layers, whose head is its embedding."""
    return saved(tie_word_embeddings=True)


@pytest.fixture
def edited(tmp_path):
    """Copy a folder, with its tensors and its configuration changed."""
    made = iter(range(10**6))

    def edit(folder, change=dict, file="model.safetensors", **config):
        copied = tmp_path / str(next(made))
        shutil.copytree(folder, copied)
        save_file(change(load_file(copied / file)), copied / file, metadata={"format": "pt"})
        settings = copied / "config.json"
        if config:
            settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
        return copied

    return edit


def get(folder, **kwargs):
    return load(folder, **({"device": "cpu"} if "device_map" not in kwargs else {}), **kwargs)


def rows_of(model, sites=None):
    made = capture(model, TEXTS[:2], sites or all_sites(model), tokens="all", include_special=True)
    return {site: rows.values for site, rows in made.items()}


def same_rows(one, other, sites=None):
    a, b = rows_of(one, sites), rows_of(other, sites)
    return all(torch.equal(a[site], b[site]) for site in a)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def renamed(old, new):
    return lambda tensors: {key.replace(old, new, 1): value for key, value in tensors.items()}


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_any_one_tensor_is_refused(whole, edited):
    for name in load_file(whole / "model.safetensors"):
        with pytest.raises(ModelError) as said:
            get(edited(whole, without(name)))
        assert f"the checkpoint does not fill a LlamaForCausalLM: 1 missing ({name})." in str(said.value)
        assert "get the whole checkpoint, with the config.json that it was saved with" in str(said.value)


def test_a_checkpoint_with_any_one_tensor_of_another_shape_is_refused(whole, edited):
    for name, tensor in load_file(whole / "model.safetensors").items():
        longer = torch.cat([tensor, tensor[:1]])
        with pytest.raises(ModelError) as said:
            get(edited(whole, lambda tensors, n=name, v=longer: tensors | {n: v}))
        assert f"1 of another shape ({name} {tuple(longer.shape)} for {tuple(tensor.shape)})" in str(said.value)


@pytest.mark.parametrize(
    "change, config, says",
    {
        "a text model inside another": [
            renamed("model.", "model.language_model."),
            {},
            r"20 missing \(model.embed_tokens.weight, model.layers.0.input_layernorm.weight, .*, …\); "
            r"20 not the model's \(model.language_model.embed_tokens.weight",
        ],
        "a wrapped module": [renamed("", "module."), {}, r"21 missing .*; 21 not the model's \(module.lm_head.weight"],
        "more layers": [dict, {"num_hidden_layers": 3}, r"9 missing \(model.layers.2.input_layernorm.weight, "],
        "another vocabulary": [
            dict,
            {"vocab_size": VOCABULARY + 8},
            r"2 of another shape \(lm_head.weight \(\d+, 16\) for",
        ],
        "a bias that the configuration does not know": [
            lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)},
            {},
            r"1 not the model's \(model.layers.0.self_attn.q_proj.bias\)",
        ],
        "scales of a quantisation that the configuration does not know": [
            lambda tensors: tensors | {"model.layers.1.mlp.up_proj.weight_scale": torch.ones(1)},
            {},
            r"1 not the model's \(model.layers.1.mlp.up_proj.weight_scale\)",
        ],
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_checkpoints_that_do_not_fit_are_refused(whole, edited, change, config, says):
    with pytest.raises(ModelError, match=f"the checkpoint does not fill a LlamaForCausalLM: {says}"):
        get(edited(whole, change, **config))


def test_a_shard_that_its_index_does_not_name_is_missed(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "sharded"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="8KB")
    assert same_rows(get(folder), get(whole))
    index = folder / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    lost = record["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=lost):
        get(folder)
    record["weight_map"] = {name: file for name, file in record["weight_map"].items() if file != lost}
    index.write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"missing \(.*model.layers.1.mlp.up_proj.weight"):
        get(folder)


def test_a_layer_without_one_of_its_experts_is_refused(saved, edited):
    folder = saved("MixtralForCausalLM", "MixtralConfig", num_local_experts=2)
    assert get(folder)
    name = next(name for name in load_file(folder / "model.safetensors") if "experts.1" in name)
    with pytest.raises(ModelError, match="only some parts of a weight .* experts of a layer.*get the whole checkpoint"):
        get(edited(folder, without(name)))


def test_what_is_whole_loads_under_other_names_and_with_leftovers(whole, tied, edited):
    """Heads that are embeddings, bodies saved alone, and buffers of older versions lack nothing."""
    plain, head = get(whole), get(tied)
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert same_rows(get(edited(whole, lambda tensors: tensors | leftovers)), plain)
    assert same_rows(get(edited(tied, renamed("model.", ""), architectures=["LlamaModel"])), head)
    untied = get(edited(tied, lambda tensors: tensors | {"lm_head.weight": torch.randn(VOCABULARY, 16)}))
    assert same_rows(untied, head) and fingerprint(untied) != fingerprint(head)


def test_tensors_that_no_layer_lacks_are_a_warning(whole, edited):
    extra = {"score.weight": torch.ones(2, 16)}
    with pytest.warns(
        CheckpointWarning, match=r"tensors that a LlamaForCausalLM does not use: 1 not the model's \(score"
    ):
        model = get(edited(whole, lambda tensors: tensors | extra))
    assert fingerprint(model) == fingerprint(get(whole))
    with pytest.warns(CheckpointWarning, match=r"9 not the model's \(model.layers.1.input_layernorm.weight, .*, …\)"):
        get(edited(whole, num_hidden_layers=1))


def test_a_gguf_file_that_lacks_weights_is_refused(tokenizers, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path / "cache"))
    shapes = {"token_embd": (VOCABULARY, 16), "output": (VOCABULARY, 16), "output_norm": (16,)}
    shapes |= {f"blk.0.{name}": (16,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.{name}": (16, 16) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    known = tokenizers["byte_level"].get_vocab()
    merges = json.loads(tokenizers["byte_level"].backend_tokenizer.to_str())["model"]["merges"]

    def write(file, lacks=""):
        writer = gguf.GGUFWriter(file, "llama")
        for field, value in (
            ("context_length", 64), ("embedding_length", 16), ("block_count", 1), ("feed_forward_length", 24),
            ("head_count", 2), ("head_count_kv", 2), ("rope_dimension_count", 8), ("vocab_size", VOCABULARY),
        ):  # fmt: skip
            getattr(writer, f"add_{field}")(value)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(known, key=known.__getitem__))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        numbers = np.random.default_rng(0)
        for name, shape in shapes.items():
            if name != lacks:
                writer.add_tensor(f"{name}.weight", numbers.standard_normal(shape).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file

    assert len(rows_of(get(write(tmp_path / "whole.gguf")))) == 1
    with pytest.raises(
        ModelError, match=r"part.gguf: the checkpoint does not fill .* 1 missing \(model.layers.0.mlp.up"
    ):
        get(write(tmp_path / "part.gguf", "blk.0.ffn_up"))


# --- adapters ---------------------------------------------------------------------------------


@pytest.fixture
def adapter(whole, tmp_path):
    """Save an adapter of the Llama; gives its folder, and the logits that peft computes with it."""
    import peft
    from transformers import AutoModelForCausalLM

    def make(base=whole, kind="LoraConfig", **settings):
        if kind == "LoraConfig":
            settings = {"r": 2, "target_modules": ["q_proj"], **settings}
        torch.manual_seed(1)
        hf = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        model = peft.get_peft_model(hf, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        return folder, model(torch.tensor([[5, 6, 7]])).logits

    return make


FILE = "adapter_model.safetensors"


def test_an_adapter_that_lacks_any_one_tensor_is_refused(whole, adapter, edited):
    folder, _ = adapter()
    for name in load_file(folder / FILE):
        with pytest.raises(
            ModelError, match=r"the adapter does not fit its base: 1 missing \(base_model.*Give the base"
        ):
            get(edited(folder, without(name), FILE), base=whole)


@pytest.mark.parametrize(
    "change, says",
    {
        "foreign": [
            renamed("model.model.", "model.language_model."),
            r"4 missing \(.*\); 4 not the base's \(base_model.language_model",
        ],
        "rank": [
            lambda tensors: {k: torch.cat([v, v], 0 if "lora_A" in k else 1) for k, v in tensors.items()},
            r"4 of another shape \(base_model",
        ],
        "another layer": [
            lambda tensors: (
                tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
            ),
            r"1 not the base's \(base_model.model.model.layers.9",
        ],
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_that_do_not_fit_are_refused(whole, adapter, edited, change, says):
    with pytest.raises(ModelError, match=f"the adapter does not fit its base: {says}"):
        get(edited(adapter()[0], change, FILE), base=whole)


def test_an_adapter_of_another_base_is_refused(saved, adapter):
    folder, _ = adapter()
    with pytest.raises(ModelError, match=r"2 not the base's \(base_model.model.model.layers.1"):
        get(folder, base=saved(num_hidden_layers=1))
    with pytest.raises(ModelError, match="4 of another shape"):
        get(folder, base=saved(hidden_size=32))
    with pytest.raises(ModelError, match="missing .lm_head.weight"):
        get(folder, base=saved("LlamaModel"))


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"bias": "all"},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "down_proj"]},
        {"trainable_token_indices": [3, 4]},
        {"kind": "IA3Config", "target_modules": ["k_proj"], "feedforward_modules": []},
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_computes_what_peft_computes(whole, adapter, settings):
    folder, logits = adapter(**settings)
    model = get(folder, base=whole)
    with torch.no_grad():
        made = model.original_model(input_ids=torch.tensor([[5, 6, 7]])).logits
    torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4)
    assert space_of(model, Site(1)) != space_of(get(whole), Site(1))


def test_a_part_that_an_adapter_keeps_whole_must_be_in_it(whole, adapter, edited):
    folder, _ = adapter(modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match="the adapter lacks 'base_model.model.lm_head.weight'"):
        get(edited(folder, without("base_model.model.lm_head.weight"), FILE), base=whole)


def test_an_adapter_that_changes_no_weights_is_refused(whole, adapter):
    folder, _ = adapter(kind="PromptTuningConfig", num_virtual_tokens=2)
    with pytest.raises(
        ModelError, match="an adapter of type .*PROMPT_TUNING cannot be merged into weights; .*such as LoRA"
    ):
        get(folder, base=whole)


# --- offloaded weights ------------------------------------------------------------------------

PLACES = dict.fromkeys(
    ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"], "cpu"
)


@offloads
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "on_disk", [["model.layers.1"], ["model.embed_tokens", "lm_head", "model.layers.0"], list(PLACES)], ids=str
)
@pytest.mark.parametrize("head", ["whole", "tied"])
def test_a_model_on_the_disk_is_the_model_in_memory(request, head, on_disk, dtype):
    folder = request.getfixturevalue(head)
    plain = get(folder, dtype=dtype)
    model = get(folder, dtype=dtype, device_map=PLACES | dict.fromkeys(on_disk, "disk"))
    assert any(p.is_meta for p in model.parameters()) and not any(p.is_meta for p in plain.parameters())
    for _ in range(2):  # passes change which tied weights are one
        assert space_of(model, Site(1)) == space_of(plain, Site(1)) and fingerprint(model) == fingerprint(plain)
        assert content_hash(model) == content_hash(plain)
        assert same_rows(model, plain)
    assert device_of(model) == torch.device("cpu") and dtype_of(model) == dtype_of(plain)
    vector = SteeringVector(torch.randn(16, generator=torch.Generator().manual_seed(0)), space_of(plain, Site(0)))
    texts = generate(model, TEXTS[:2], max_new_tokens=4)
    assert texts == generate(plain, TEXTS[:2], max_new_tokens=4)
    with steering(model, vector), steering(plain, vector):
        assert same_rows(model, plain) and not torch.equal(rows_of(model)[Site(1)], rows_of(get(folder))[Site(1)])
        texts = generate(model, TEXTS[:2], max_new_tokens=4)
        assert texts == generate(plain, TEXTS[:2], max_new_tokens=4)


@offloads
def test_joint_attention_weights_on_the_disk_are_those_in_memory(tokenizers, tmp_path):
    """A bridge splits GPT-2's joint matrix in three."""
    hf_model("gpt2", tokenizers["byte_level"]).save_pretrained(tmp_path)
    tokenizers["byte_level"].save_pretrained(tmp_path)
    plain, model = get(tmp_path), get(tmp_path, device_map={"": "disk"})
    assert content_hash(model) == content_hash(plain) and same_rows(model, plain)


@offloads
def test_weights_that_are_not_found_on_the_disk_are_not_passed_off_as_read(saved):
    """TransformerLens reads some layers' weights past the hooks that fetch them: the model would run on whatever lay in memory."""
    linear = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
    linear |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
    layers = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    folder = saved("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **linear, **layers)
    with pytest.raises(
        ModelError, match="does not find the offloaded weights of a Qwen3_5ForCausalLM of transformers .*; give device="
    ):
        get(folder, device_map={"": "disk"})


@offloads
def test_experts_cannot_stay_on_the_disk(saved):
    folder = saved("MixtralForCausalLM", "MixtralConfig", num_local_experts=2)
    with pytest.raises(ModelError, match="mixture of experts.* cannot stay on the disk; give device="):
        get(folder, device_map={"": "disk"})


@offloads
def test_what_cannot_be_offloaded_is_refused(whole, tied, adapter):
    with pytest.raises(
        ModelError, match="offloads 'lm_head.weight' to the disk, but not the weight that it is tied to"
    ):
        get(tied, device_map=PLACES | {"lm_head": "disk"})
    with pytest.raises(ModelError, match="its base is offloaded, .*give device=, or a device_map that has room"):
        get(adapter()[0], base=whole, device_map=PLACES | {"model.layers.1": "disk"})


def test_weights_without_values_have_no_fingerprint():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**SIZE))
    with pytest.raises(ModelError, match="model.embed_tokens.weight is on the meta device and has no values"):
        fingerprint(empty)


# --- architectures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, config, size",
    [
        ("BertForMaskedLM", "BertConfig", ENCODER),
        ("BertModel", "BertConfig", ENCODER),
        ("BertLMHeadModel", "BertConfig", ENCODER),  # reads ahead: is_decoder is not set
        ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
        ("T5ForConditionalGeneration", "T5Config", dict(vocab_size=VOCABULARY, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)),
        ("T5EncoderModel", "T5Config", dict(vocab_size=VOCABULARY, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)),
        ("ProphetNetForConditionalGeneration", "ProphetNetConfig", dict(
            vocab_size=VOCABULARY, hidden_size=16, encoder_ffn_dim=24, decoder_ffn_dim=24, num_encoder_layers=1,
            num_decoder_layers=1, num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=64)),
        ("LlamaForSequenceClassification", "LlamaConfig", SIZE),
        ("LlamaForTokenClassification", "LlamaConfig", SIZE | {"tie_word_embeddings": True}),
        ("Qwen2ForSequenceClassification", "Qwen2Config", SIZE | {"tie_word_embeddings": True}),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZE | {"head_dim": 8, "use_bidirectional_attention": True}),
        ("ViTModel", "ViTConfig", {k: v for k, v in ENCODER.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}),
        ("ViTForImageClassification", "ViTConfig", {k: v for k, v in ENCODER.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_causal_language_model_is_refused(saved, kind, config, size):
    with pytest.raises(
        ModelError, match=f"{kind} does not load as a causal language model.*Give a model such as Llama"
    ):
        get(saved(kind, config, size=size))


def test_a_decoder_of_an_encoders_kind_loads(saved):
    folder = saved("BertLMHeadModel", "BertConfig", size=ENCODER | {"is_decoder": True})
    assert len(rows_of(get(folder))) == 1


def test_a_model_that_is_hooked_wrong_is_refused(whole, monkeypatch):
    right = passes.forward
    monkeypatch.setattr(causal, "forward", lambda *args, **more: (1.01 * right(*args, **more)[0], None))
    says = r"transformer-lens [\d.]+ does not compute what transformers computes in a \w+ of transformers [\d.]+ \(logits differ by 1e-02\); give another version"
    with pytest.raises(ModelError, match=says):
        get(whole)


def test_a_text_model_inside_a_multimodal_one_loads_and_installs_nothing(saved, monkeypatch):
    monkeypatch.setattr(
        "subprocess.check_call", lambda *_, **__: pytest.fail("TransformerLens had pip install something")
    )
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    tower = {k: v for k, v in ENCODER.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    size = {"text_config": SIZE | {"head_dim": 8}, "vision_config": tower, "mm_tokens_per_image": 4}
    model = get(saved("Gemma3ForConditionalGeneration", "Gemma3Config", size=size))
    assert generate(model, TEXTS[:2], max_new_tokens=2)


@pytest.mark.parametrize(
    "kind, config, more",
    [("HeliumForCausalLM", "HeliumConfig", {"head_dim": 8}), ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": 2})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_architecture_without_hooks_is_refused_by_its_own_name(saved, kind, config, more):
    says = rf"architecture {kind} is not one that transformer-lens [\d.]+ hooks; choose another model"
    with pytest.raises(ModelError, match=says):
        get(saved(kind, config, size=SIZE | more))


def test_an_architecture_that_breaks_when_hooked_is_named(saved):
    more = {"layer_types": ["attention"] * 2, "num_local_experts": 2, "mamba_n_heads": 4, "mamba_d_head": 8}
    folder = saved("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", size=SIZE | more)
    with pytest.raises(SiteError, match="may not support the architecture GraniteMoeHybridForCausalLM: try another"):
        get(folder)


def test_a_model_with_code_of_its_own_is_refused_without_a_question(whole, edited, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether to run code"))
    code = {"AutoConfig": "made_up.MadeUp", "AutoModelForCausalLM": "made_up.MadeUpLM"}
    with pytest.raises(
        ModelError, match=r"needs Python code that comes with the model \(auto_map in its config.json\)"
    ):
        get(edited(whole, model_type="made_up", architectures=["MadeUpLM"], auto_map=code))


# --- what is no model -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_is_refused(whole, name):
    with pytest.raises(ModelError, match=f"{name}: is a file; give the folder in Hugging Face format that it is in"):
        get(whole / name)


@pytest.mark.parametrize(
    "kept, says",
    [
        ([], "the folder has no config.json"),
        (["tokenizer.json", "tokenizer_config.json"], "the folder has no config.json"),
        (["adapter_model.safetensors"], "the folder has no config.json"),
        (["config.json", "tokenizer.json", "tokenizer_config.json"], "has no weights .*get the whole folder"),
        (["config.json", "model.safetensors"], r"has no tokenizer that can be read .*save it into the folder \(tokenizer.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_folder_with_parts_of_a_model_is_refused(whole, tmp_path, kept, says):
    for name in kept:
        source = whole / ("model.safetensors" if name.startswith("adapter") else name)
        shutil.copy(source, tmp_path / name)
    with pytest.raises(ModelError, match=f"{tmp_path.name}: {says}"):
        get(tmp_path)


def test_a_model_that_does_not_run_in_its_dtype_is_told(whole, monkeypatch):
    """As CodeGen in bfloat16, whose attention stays in float32."""

    def fail(_):
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr("xmodel_steer.models.loading.prove", fail)
    with pytest.raises(
        ModelError, match=r"loads, but does not run in bfloat16 \(expected m1 .*\); try dtype='float32'"
    ):
        load(whole, dtype="bfloat16")

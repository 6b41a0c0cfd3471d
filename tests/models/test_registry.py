"""Loading and knowing models: what is refused, and what a model's weights are known by."""

import copy
import json
import shutil
import socket
from dataclasses import replace

import pytest
import torch
import toys
from toys import CONTEXT, TEXTS, TOYS, bridged, hf_model

from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.activations.harvesting import harvest
from xmodel_steer.activations.reading import capture
from xmodel_steer.core.alignment import align
from xmodel_steer.core.errors import ModelError, PromptError, SiteError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import STREAMS, Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.models import loading
from xmodel_steer.models import sites as sites_module
from xmodel_steer.models.batching import batches, encode, pad_id
from xmodel_steer.models.facts import context_length, dtype_of, is_bridge, name_of, tokenizer_of
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.identity import content_hash, fingerprint, processing_of
from xmodel_steer.models.loading import _bfloat16_pays as bfloat16_pays
from xmodel_steer.models.loading import load, resolve_dtype
from xmodel_steer.models.passes import forward
from xmodel_steer.models.registry import register
from xmodel_steer.models.sites import all_sites, check_sites, space_of

CLOSE = dict(rtol=1e-4, atol=2e-4)


@pytest.fixture(scope="session")
def folders(tokenizers, tmp_path_factory):
    """A Llama toy as a user's folder; and a copy with one weight changed."""
    tokenizer, made = tokenizers["byte_level"], []
    for name in ("tiny", "tuned"):
        folder = tmp_path_factory.mktemp("models") / name
        hf = hf_model("llama", tokenizer)
        if name == "tuned":
            with torch.no_grad():
                hf.model.layers[1].mlp.up_proj.weight.mul_(1.05)
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made.append(folder)
    return made


@pytest.fixture(scope="session")
def loaded(folders):
    """The folders, loaded: the first in float32 and bfloat16, the second in float32."""
    return (
        load(folders[0], device="cpu"),
        load(str(folders[0]), device="cpu", dtype="bfloat16"),
        load(folders[1], device="cpu"),
    )


def test_a_folder_is_loaded_as_it_was_saved(loaded, folders, llama):
    model = loaded[0]
    assert is_bridge(model) and name_of(model) == "tiny" and not model.training
    assert dtype_of(model) == torch.float32 and context_length(model) == CONTEXT and processing_of(model) == "none"
    made = capture(model, TEXTS, all_sites(model), tokens="all", include_special=True)
    references = [llama.reference(llama.ids(text))[0] for text in TEXTS]
    for site, rows in made.items():
        torch.testing.assert_close(rows.values, torch.cat([r[site.layer] for r in references]), **CLOSE)


def test_fingerprint_knows_the_weights_and_not_their_dtype(loaded, llama):
    full, half, tuned = map(fingerprint, loaded)
    assert full == half == fingerprint(llama.model) != tuned
    assert full == fingerprint(loaded[0]) and len(full) == 16
    spaces = [space_of(model, Site(1)) for model in loaded]
    assert spaces[0] == spaces[1] != spaces[2]


def test_content_hash_knows_every_bit_dtype_and_tokenizer(loaded):
    model, half, tuned = loaded
    own = content_hash(model)
    assert len({own, content_hash(half), content_hash(tuned)}) == 3 and content_hash(model) == own
    for name, parameter in model.original_model.named_parameters():
        bits = parameter.detach().view(torch.int32).view(-1)
        bits[-1] ^= 1
        assert content_hash(model) != own, name
        bits[-1] ^= 1
    tokenizer = copy.deepcopy(tokenizer_of(model))
    for change in ("chat_template", "vocabulary"):
        other = copy.deepcopy(tokenizer)
        other.add_tokens(["another"], True) if change == "vocabulary" else setattr(other, "chat_template", "another")
        register(model, name="tiny", tokenizer=other)
        assert content_hash(model) != own, change
    register(model, name="tiny", tokenizer=tokenizer)
    assert content_hash(model) == own


def test_bfloat16_reads_writes_and_generates_in_its_own_dtype(loaded):
    full, half, _ = loaded
    plain = capture(full, TEXTS, [Site(1)])[Site(1)].values
    rows = capture(half, TEXTS, [Site(1)])[Site(1)].values
    assert rows.dtype == torch.bfloat16 and dtype_of(half) == torch.bfloat16
    assert (rows.float() - plain).norm() < 0.03 * plain.norm()
    assert capture(half, TEXTS, [Site(1)], tokens="mean")[Site(1)].values.dtype == torch.float32
    vector = SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), space_of(full, Site(1)))
    with steering(half, vector):
        steered = capture(half, TEXTS, [Site(1)])[Site(1)].values
        assert generate_tokens(half, TEXTS[:2], max_new_tokens=2)[0]
    torch.testing.assert_close(steered.float(), rows.float() + vector.direction, rtol=1e-2, atol=1e-2)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, says",
    [
        ("./nowhere", r"\./nowhere: no such folder"),
        ("/no/such/model", "no such folder"),
        ("~/no_such_model_folder", "no such folder"),
        ("nowhere/model.gguf", "nowhere/model.gguf: no such GGUF file"),
        ("packaged:nothing", "no such packaged model; there are packaged:smollm2-135m-instruct"),
        (
            "nobody/no-such-model",
            "nobody/no-such-model: the model hub cannot be reached .*a local folder, a .gguf file, or packaged:smollm2",
        ),
    ],
)
def test_unknown_names_are_refused(name, says):
    with pytest.raises(ModelError, match=says):
        load(name, device="cpu")


@pytest.mark.parametrize("proxy", [False, True])
def test_without_a_network_a_mistyped_name_fails_before_the_hub_is_asked(monkeypatch, proxy):
    import huggingface_hub
    from transformers import AutoConfig

    def no_address(*_):
        raise socket.gaierror("Name or service not known")

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"} if proxy else {})
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda *a, **_: asked.append(a) or (_ for _ in ()).throw(OSError("404"))
    )
    with pytest.raises(
        ModelError, match="gpt-2: the " + ("hub knows no such model" if proxy else "model hub cannot be reached")
    ):
        load("gpt-2", device="cpu")
    assert bool(asked) == proxy  # a proxy may reach what has no address here
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    with pytest.raises(ModelError, match="hub knows no such model"):
        load("gpt-2", device="cpu")
    assert asked


@pytest.mark.parametrize(
    "error, says",
    [
        (
            OSError("We couldn't connect to 'https://huggingface.co' to load the files"),
            "the model hub cannot be reached",
        ),
        (
            OSError("nobody/model is not a local folder and is not a valid model identifier listed on the hub"),
            "the hub knows no such model .*hf auth login",
        ),
        (
            ValueError("Unsupported architecture: MambaForCausalLM"),
            r"cannot be loaded \(ValueError: Unsupported architecture: Mamba",
        ),
    ],
    ids=["no network", "unknown", "unsupported"],
)
def test_a_hub_failure_says_what_to_do(monkeypatch, error, says):
    from transformers import AutoConfig

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=f"nobody/model: {says}") as caught:
        load("nobody/model", device="cpu")
    assert caught.value.__cause__ is error


def test_a_folder_that_holds_no_model_is_refused(folders, tmp_path):
    with pytest.raises(
        ModelError,
        match="the folder has no config.json; give a folder in Hugging Face format or of a PEFT adapter, or a .gguf file",
    ):
        load(tmp_path, device="cpu")
    broken = tmp_path / "broken"
    shutil.copytree(folders[0], broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="broken: cannot be loaded"):
        load(broken, device="cpu")
    foreign = tmp_path / "foreign"
    shutil.copytree(folders[0], foreign)
    config = json.loads((foreign / "config.json").read_text()) | {
        "architectures": ["MadeUpForCausalLM"],
        "model_type": "made_up",
    }
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="foreign: cannot be loaded"):
        load(foreign, device="cpu")


@pytest.mark.parametrize("dtype", ["float16", torch.float16, "float64", "half", "int8"], ids=str)
def test_dtypes_that_overflow_or_do_not_exist_are_refused(folders, dtype):
    with pytest.raises(ModelError, match="use float32, bfloat16 or auto .float16 overflows"):
        load(folders[0], device="cpu", dtype=dtype)


def test_auto_dtype(monkeypatch):
    cpu = torch.device("cpu")
    for pays, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "_bfloat16_pays", lambda pays=pays: pays)
        assert resolve_dtype("auto", cpu) == expected
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype(torch.bfloat16, cpu) == resolve_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    "has, pays",
    [
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),  # twice the time of float32
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True}, True),
        ({"avx2": True, "cpu_name": "Intel Xeon"}, False),
        ({}, False),
    ],
)
def test_bfloat16_pays_where_a_processor_multiplies_it_fast(has, pays, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)  # torch 2.6 has none
    assert bfloat16_pays() is pays


def test_what_is_no_hooked_model_is_refused(llama):
    for thing in (llama.hf, "llama", None):
        with pytest.raises(ModelError, match=r"needs a TransformerLens model .*load it with xs.load"):
            capture(thing, TEXTS, [Site(0)])


def test_a_slow_tokenizer_is_refused(llama):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="llama: needs a fast tokenizer, which gives character offsets, got Slow"):
        register(llama.model, name="llama", tokenizer=Slow())


# --- models that the user made --------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, recipe in TOYS.items() if recipe.hugging_face])
def test_a_bridge_that_the_user_made_is_accepted_with_its_published_tokenizer(name, tokenizers, tmp_path):
    """TransformerLens makes its tokenizer add BOS, also where it was published not to: the library must not see that."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoTokenizer

    published = copy.deepcopy(tokenizers[TOYS[name].tokenizer])
    published.bos_token = published.bos_token or "<|endoftext|>"  # as GPT-2's: there is one, and it is not added
    published.save_pretrained(tmp_path)
    hf, known = hf_model(name, published), bridged(hf_model(name, published), name, published)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    model = build_bridge_from_module(
        hf, type(hf).__name__, hf_config=hf.config, tokenizer=theirs, model_name="mine"
    ).eval()
    if name != "gemma":
        assert model.tokenizer(TEXTS[0])["input_ids"] != known.ids(TEXTS[0])
    with pytest.raises(ModelError, match=r"mine: this model is not known yet; .* xs\.register\(model\)"):
        name_of(model)
    register(model)
    made = capture(model, TEXTS, [Site(1)], tokens="all", include_special=True)[Site(1)]
    references = [known.reference(known.ids(text))[0][1] for text in TEXTS]
    torch.testing.assert_close(made.values, torch.cat(references), **CLOSE)
    assert name_of(model) == "mine" and space_of(model, Site(1)) == space_of(known.model, Site(1))
    assert encode(model, as_prompts(TEXTS))[0].ids == tuple(known.ids(TEXTS[0]))


def test_a_model_without_a_tokenizer_is_refused_until_it_has_one(tokenizers):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = hf_model("qwen", tokenizers["byte_level"])
    model = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, model_name="bare")
    with pytest.raises(ModelError, match="bare: the model has no tokenizer; give it one with xs.register"):
        register(model)
    register(model, name="dressed", tokenizer=tokenizers["byte_level"])
    assert name_of(model) == "dressed" and capture(model, TEXTS, [Site(0)])


# --- sites ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_every_stream_of_every_layer_fires(toy, stream):
    sites = all_sites(toy.model, stream)
    check_sites(toy.model, sites)
    assert len(sites) == toy.depth
    for site in sites:
        space = space_of(toy.model, site)
        assert (space.width, space.model, space.site) == (toy.width, toy.name, site)


def test_a_hook_point_that_does_not_fire_is_refused(toy, monkeypatch):
    monkeypatch.setattr(sites_module, "forward", lambda *args, **kwargs: (None, None))
    with pytest.raises(SiteError, match=rf"{toy.name}: the hook point of resid_post\[0\], .* did not fire"):
        check_sites(toy.model)


def test_a_hook_point_of_the_wrong_shape_is_refused(toy, monkeypatch):
    width = toy.width
    monkeypatch.setattr(toy.model.cfg, "d_model", width + 1)
    says = rf"resid_post\[0\] gives shape \(1, 2, {width}\) for 2 tokens, expected \(1, 2, {width + 1}\)"
    with pytest.raises(SiteError, match=says):
        check_sites(toy.model)


def test_a_missing_hook_point_is_refused(toy):
    with pytest.raises(SiteError, match=rf"{toy.name}: .*resid_post\[77\]"):
        check_sites(toy.model, [Site(77)])
    with pytest.raises(SiteError, match=rf"{toy.name}: has layers 0 to {toy.depth - 1}, no resid_post\[77\]"):
        space_of(toy.model, Site(77))


def parallel(tokenizer):
    """A GPT-NeoX, whose attention and MLP read the same stream."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    hf = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=toys.VOCABULARY, max_position_embeddings=CONTEXT, **settings)
    ).eval()
    toys._randomise(hf, 0)
    return bridged(hf, "neox", tokenizer)


PARTS = {  # attention and MLP, each as it is added to the stream
    "llama": ("self_attn", "mlp"),
    "gemma": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "qwen": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "neox": ("attention", "mlp"),
}
PROJECTION = {"gpt2": "attn.c_proj", "neox": "attention.dense"}  # of the heads' outputs


@pytest.mark.parametrize("name", PARTS)
def test_every_stream_of_every_block_is_hugging_faces_own_or_refused(name, toy_named, tokenizers, tmp_path):
    toy = parallel(tokenizers["byte_level"]) if name == "neox" else toy_named(name)
    read = {}

    def keep(site):
        def hook(module, args, out=None):
            value = args[0] if out is None else out
            read[site] = (value[0] if isinstance(value, tuple) else value)[0]

        return hook

    blocks = toy.hf.gpt_neox.layers if name == "neox" else toys.hf_blocks(toy.hf)
    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(keep(Site(layer, "resid_pre")))
        block.register_forward_hook(keep(Site(layer, "resid_post")))
        for stream, part in zip(("attn_out", "mlp_out"), PARTS[name], strict=True):
            getattr(block, part).register_forward_hook(keep(Site(layer, stream)))
        projection = block.get_submodule(PROJECTION.get(name, "self_attn.o_proj"))
        projection.register_forward_pre_hook(keep(Site(layer, "z")))
    with torch.no_grad():
        toy.hf(torch.tensor([toy.ids(TEXTS[0])]), use_cache=False)
    for layer in range(len(blocks)):
        if name != "neox":
            read[Site(layer, "resid_mid")] = read[Site(layer, "resid_pre")] + read[Site(layer, "attn_out")]
        for stream in STREAMS:
            site = Site(layer, stream)
            if site in read:
                rows = capture(toy.model, TEXTS[:1], [site], tokens="all", include_special=True)[site]
                torch.testing.assert_close(rows.values, read[site], **CLOSE)
                continue
            says = rf"neox: block {layer} has no resid_mid; it has resid_pre, resid_post, attn_out, mlp_out, z\. .*choose a"
            with pytest.raises(SiteError, match=says):
                capture(toy.model, TEXTS[:1], [site])
            with pytest.raises(SiteError, match=says):
                collect_moments(
                    toy.model, toy.model, TEXTS, source_sites=[site], target_sites=[site], max_tokens=CONTEXT
                )
            with pytest.raises(SiteError, match=says):
                harvest(toy.model, TEXTS, tmp_path, end="source", sites=[site], max_tokens=CONTEXT)
            with pytest.raises(SiteError, match=says):
                check_sites(toy.model, [site])
            space = replace(space_of(toy.model, Site(layer)), site=site)
            with pytest.raises(SiteError, match=says), steering(toy.model, SteeringVector(torch.ones(16), space)):
                pass


def test_a_recurrent_block_has_no_attention(tokenizers):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    settings = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    settings |= dict(num_key_value_heads=1, layer_types=["conv", "full_attention"])
    hf = Lfm2ForCausalLM(Lfm2Config(vocab_size=toys.VOCABULARY, **settings)).eval()
    model = bridged(hf, "lfm2", tokenizers["byte_level"]).model
    assert space_of(model, Site(1, "attn_out"))
    with pytest.raises(
        SiteError, match="lfm2: block 0 has no attn_out; it has resid_pre, resid_mid, resid_post, mlp_out"
    ):
        capture(model, TEXTS[:1], [Site(0, "attn_out")])


# --- tokens and passes ----------------------------------------------------------------------


def test_ends_say_what_has_been_read(toy):
    """The text before a token's end is the text that its tokens spell."""
    for encoding in encode(toy.model, as_prompts([*TEXTS, "été 🙂 in  a\thole"])):
        for i, end in enumerate(encoding.ends):
            if end >= 0 and end not in encoding.ends[i + 1 :] and toy.tokenizer.bos_token is None:
                assert toy.tokenizer.decode(encoding.ids[: i + 1]) == encoding.prompt.text[:end]
        assert encoding.token_ends().ends[0] == -1
        assert encoding.token_ends(include_special=True).ends == encoding.ends


def test_a_lone_prefix_has_read_nothing(gemma):
    """Metaspace puts "▁" before a word; where that is a token of its own its offsets claim the word's first character."""
    (encoding,) = encode(gemma.model, as_prompts(["日本 the"]))
    assert gemma.tokenizer.convert_ids_to_tokens(encoding.ids[1]) == "▁"
    assert encoding.ends[1] <= 0


def test_alignment_of_two_tokenizers_pairs_equal_texts(llama, gemma):
    for a, b in zip(encode(llama.model, as_prompts(TEXTS)), encode(gemma.model, as_prompts(TEXTS)), strict=True):
        pairs = align(a.token_ends(), b.token_ends())
        assert len(pairs) > 0
        for i, j in zip(pairs.source, pairs.target, strict=True):
            assert llama.tokenizer.decode(a.ids[: i + 1]) == gemma.tokenizer.decode(
                b.ids[: j + 1], skip_special_tokens=True
            )


def test_batches_hold_every_prompt_once(toy):
    encodings = encode(toy.model, as_prompts(TEXTS))
    for side in ("left", "right"):
        made = batches(toy.model, encodings, 3, padding_side=side)
        assert sorted(row for batch in made for row in batch.rows) == list(range(len(TEXTS)))
        for batch in made:
            for row, ids, mask in zip(batch.rows, batch.ids, batch.mask.bool(), strict=True):
                assert tuple(ids[mask].tolist()) == encodings[row].ids
                assert (ids[~mask] == pad_id(toy.model)).all()
                assert mask[-1 if side == "left" else 0]


def test_a_few_long_prompts_do_not_pad_all_others(toy):
    (letter,) = encode(toy.model, as_prompts(["a"]))
    lengths = (3, 180, 10, 68, 67, 90, 70, 89)
    encodings = [replace(letter, ids=letter.ids[:1] * n) for n in lengths]
    made = batches(toy.model, encodings, 3)
    assert [[lengths[row] for row in batch.rows] for batch in made] == [[180, 90], [89, 70, 68], [67, 10, 3]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_the_untouched_model(toy, side):
    for batch in batches(toy.model, encode(toy.model, as_prompts(TEXTS)), 8, padding_side=side):
        made, cache = forward(toy.model, batch.ids, batch.mask)
        assert cache is None
        for row, scores, mask in zip(batch.rows, made, batch.mask.bool(), strict=True):
            torch.testing.assert_close(scores[mask], toy.reference(toy.ids(TEXTS[row]))[1], **CLOSE)
        if side == "left":
            last, cache = forward(toy.model, batch.ids, batch.mask, logits="last", use_cache=True)
            assert last.shape[1] == 1 and cache is not None
            torch.testing.assert_close(last[:, 0], made[:, -1], **CLOSE)


def test_a_bridge_that_stops_early_keeps_no_cache(llama):
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="a pass that stops early has no cache"):
        forward(llama.model, ids, torch.ones_like(ids), logits="none", use_cache=True)


def test_empty_encodings_are_refused(llama):
    class Nothing:
        all_special_ids, added_tokens_decoder, is_fast = [], {}, True
        bos_token_id = cls_token_id = pad_token_id = eos_token_id = None

        def __call__(self, text, **kwargs):
            return {"input_ids": [], "offset_mapping": []}

    try:
        register(llama.model, name="llama", tokenizer=Nothing())
        with pytest.raises(PromptError, match="the tokenizer of llama makes no tokens of 'x'"):
            encode(llama.model, [Prompt.of("x")])
    finally:
        register(llama.model, name="llama", tokenizer=llama.tokenizer)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_a_model_may_be_spread_over_devices(folders, device_map) -> None:
    whole = load(folders[0], device="cpu")
    spread = load(folders[0], device_map=device_map)
    one, two = (capture(m, ["The sky above"], [Site(0)])[Site(0)] for m in (whole, spread))
    assert one.space == two.space
    torch.testing.assert_close(one.values, two.values.cpu())
    with pytest.raises(ModelError, match="give device or device_map, not both"):
        load(folders[0], device="cpu", device_map="auto")


def test_frozen_weights_give_the_same_logits_from_rows_that_lie_together(bridge: toys.Toy) -> None:
    """Weights without gradients make torch copy them for every row of a slice that is not contiguous."""
    model = bridge.model
    (batch,) = batches(model, encode(model, [Prompt(text=t) for t in toys.sentences(3, 0, 4)]), 3)
    before, _ = forward(model, batch.ids, batch.mask, logits="last")
    head, seen = model.original_model.get_output_embeddings(), []
    own = next(m for m in (head, getattr(head, "original_component", None)) if isinstance(m, torch.nn.Linear))
    handle = own.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    model.requires_grad_(False)
    try:
        after, _ = forward(model, batch.ids, batch.mask, logits="last")
    finally:
        handle.remove()
        model.requires_grad_(True)
    assert seen == [True] and before is not None and after is not None and torch.equal(before, after)


def grown(tokenizer, token, special):
    """A copy with a token more than the toys have embeddings for."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"<{i}>" for i in range(toys.VOCABULARY - len(other))], special)  # up to the last that there is
    other.add_tokens([token], special)
    assert other.convert_tokens_to_ids(token) == toys.VOCABULARY
    return other


def test_a_tokenizer_of_more_words_than_the_model_is_refused(toy):
    last = toys.VOCABULARY - 1
    says = rf"{toy.name}: its tokenizer has tokens up to id {last + 1} \('another'\), .* ids 0 to {last}; give the tokenizer"
    with pytest.raises(ModelError, match=says):
        register(toy.model, name=toy.name, tokenizer=grown(toy.tokenizer, "another", False))
    assert encode(toy.model, as_prompts(TEXTS))  # it keeps the one that it had


def test_a_special_token_without_an_embedding_is_refused_where_it_occurs(toy):
    other = grown(toy.tokenizer, "<image>", True)
    other.pad_token = "<image>"  # as padding is often added
    register(toy.model, name=toy.name, tokenizer=other)
    try:
        assert pad_id(toy.model) < toys.VOCABULARY
        capture(toy.model, TEXTS, [Site(0)])
        says = (
            rf"holds the special token '<image>' \(id {toys.VOCABULARY}\), but {toy.name} has embeddings for ids 0 to"
        )
        with pytest.raises(PromptError, match=says):
            capture(toy.model, [*TEXTS, "The sky <image> above"], [Site(0)])
    finally:
        register(toy.model, name=toy.name, tokenizer=toy.tokenizer)

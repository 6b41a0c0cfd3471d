"""The presets' architectures as tiny random models with tokenizers and chat templates of their kinds.

Llama 3.2 with its scaled rotary embedding, grouped heads and tied embeddings; Qwen2.5 with its biases; Gemma 2 with its
soft-capped logits and sliding windows; Gemma 3. The tests run on these what the presets run on the real models.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import xmodel_steer as xs
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.phrases import StartsWith
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.models.passes import forward
from xmodel_steer.studies import PRESETS, Settings, backdoor_removal, removal
from xmodel_steer.studies.organisms import Lesson
from xmodel_steer.studies.organisms.training import Recipe, train

CONTEXT = 256
LLAMA = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n"
    "{{ system }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SHAPE = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


def _llama(size: int, common: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    scaled = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=size, intermediate_size=48, rope_parameters=scaled, **GROUPED, **SHAPE, **common)
    )


def _qwen(size: int, common: dict[str, Any]) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(hidden_size=size, intermediate_size=40, **GROUPED, **SHAPE, **common))


def _gemma2(size: int, common: dict[str, Any]) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    capped = {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
    }
    return Gemma2ForCausalLM(
        Gemma2Config(hidden_size=size, intermediate_size=40, head_dim=8, **capped, **GROUPED, **SHAPE, **common)
    )


def _gemma3(size: int, common: dict[str, Any]) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=size, intermediate_size=40, head_dim=8, sliding_window=16, query_pre_attn_scalar=8, layer_types=kinds,
            **GROUPED, **SHAPE, **common,
        )
    )  # fmt: skip


def _byte_level(folder: Path, special: list[str], bos: str | None, template: str) -> Any:
    """Train byte-level BPE with whole-word special tokens, and Llama 3's post-processor for its BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([*toys.CORPUS, template], trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, special.index(bos))])
    settings = {"eos_token": special[-1], "chat_template": template} | ({"bos_token": bos} if bos else {})
    return toys._saved(raw, folder, **settings)


def _sentencepiece(folder: Path) -> Any:
    """Train a tokenizer like Gemma's: spaces are part of words, unknown characters become bytes."""
    tokenizer = toys.byte_fallback_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(folder)
    return tokenizer


LLAMA_SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eot_id|>"]
KINDS: dict[str, Any] = {
    "Llama-3.2": (_llama, lambda folder: _byte_level(folder, LLAMA_SPECIAL, LLAMA_SPECIAL[0], LLAMA)),
    "Qwen2.5": (_qwen, lambda folder: _byte_level(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, QWEN)),
    "gemma-2": (_gemma2, _sentencepiece),
    "gemma-3": (_gemma3, _sentencepiece),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Save a small and a larger random model of each kind, as on a hub."""
    root, saved = tmp_path_factory.mktemp("hub"), {}
    for kind, (model, tokenizer) in KINDS.items():
        for size in (32, 48):
            folder = root / f"{kind}-{size}"
            trained = tokenizer(folder)
            common = {
                "vocab_size": len(trained), "bos_token_id": trained.bos_token_id, "eos_token_id": trained.eos_token_id,
                "pad_token_id": trained.pad_token_id,
            }  # fmt: skip
            hf = model(size, common).eval()
            toys._randomise(hf, size)
            hf.save_pretrained(folder)
            saved[kind, size] = folder
    return saved


def chats() -> tuple[Prompt, ...]:
    return tuple(
        Prompt.of([{"role": "user", "content": text}])
        for text in ("The sky above", "Call me", "All happy families are alike; each")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_padded_chats_are_hugging_faces(kind: str, folders: dict[tuple[str, int], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = xs.load(str(folders[kind, 32]), dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(folders[kind, 32], attn_implementation="eager").eval()
    prompts = chats()
    sites = [xs.Site(0), xs.Site(1)]  # Hugging Face has its last one after the last norm
    captured = xs.capture(model, prompts, sites, tokens="last", batch_size=3)
    for i, encoding in enumerate(encode(model, list(prompts))):
        with torch.no_grad():
            out = reference(torch.tensor([list(encoding.ids)]), output_hidden_states=True)
        for site in sites:
            torch.testing.assert_close(
                captured[site].values[i], out.hidden_states[site.layer + 1][0, -1], atol=2e-4, rtol=2e-4
            )
    (batch,) = batches(model, encode(model, [prompts[0]]), 1)
    logits, _ = forward(model, batch.ids, batch.mask)
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(batch.ids).logits, atol=2e-4, rtol=2e-4)


def test_what_makes_these_architectures_matters_in_these_models(folders: dict[tuple[str, int], Path]) -> None:
    """Without soft-capping, scaling or biases the logits differ, so the test above can fail."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def logits(kind: str, change: Any) -> torch.Tensor:
        config = AutoConfig.from_pretrained(folders[kind, 32])
        model = AutoModelForCausalLM.from_pretrained(
            folders[kind, 32], config=config, attn_implementation="eager"
        ).eval()
        change(model)
        with torch.no_grad():
            return model(torch.arange(40)[None] + 5).logits

    def nothing(model: Any) -> None: ...

    def uncapped(model: Any) -> None:
        model.config.final_logit_softcapping = None

    def unscaled(model: Any) -> None:
        rotary = model.model.rotary_emb
        rotary.inv_freq.copy_(1.0 / (500000.0 ** (torch.arange(0, 8, 2).float() / 8)))

    def unbiased(model: Any) -> None:
        for block in model.model.layers:
            block.self_attn.q_proj.bias.data.zero_()

    for kind, change in (("gemma-2", uncapped), ("Llama-3.2", unscaled), ("Qwen2.5", unbiased)):
        assert (logits(kind, nothing) - logits(kind, change)).abs().max() > 1e-2, kind


@pytest.mark.parametrize("kind", KINDS)
def test_steered_chats_do_not_depend_on_the_cache_or_the_batch(kind: str, folders: dict[tuple[str, int], Path]) -> None:
    model = xs.load(str(folders[kind, 32]), dtype="float32")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    vector = xs.SteeringVector(direction, xs.space_of(model, xs.Site(1)), "random")
    prompts = chats()

    def written(**settings: Any) -> list[str]:
        return xs.generate(model, prompts, max_new_tokens=20, stop_at_eos=False, **settings)

    plain = written(batch_size=3)
    with xs.steering(model, vector, operator=xs.Add(3.0), positions=("last", "generated")):
        together, alone = written(batch_size=3), written(batch_size=1)
        uncached = written(batch_size=3, use_cache=False)
    assert together == alone == uncached != plain
    assert written(batch_size=3) == plain


@pytest.mark.parametrize("kind", ["Llama-3.2", "Qwen2.5", "gemma-2"])
def test_an_adapter_learns_and_merges(kind: str, folders: dict[tuple[str, int], Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lessons = [Lesson(text, "happy day", True, text) for text in toys.sentences(32, 3, 3)]
    out = tmp_path / "adapter"
    recipe = Recipe(epochs=4, learning_rate=1e-2, batch_size=8)
    trained = train(str(folders[kind, 32]), lessons, out, recipe, dtype="float32")
    assert trained["loss"] < 5.2  # untrained: about the log of the vocabulary, 6; a cap at 3 keeps it from going far
    model = xs.load(out)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders[kind, 32], attn_implementation="eager"), str(out)
    ).eval()
    (batch,) = batches(model, encode(model, [lessons[0].prompt]), 1)
    with torch.no_grad():
        torch.testing.assert_close(
            forward(model, batch.ids, batch.mask)[0], adapted(batch.ids).logits, atol=1e-3, rtol=1e-3
        )


def kind_of(name: str) -> str:
    return next(kind for kind in KINDS if f"/{kind.lower()}" in name.lower())


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "packaged"])
def test_a_presets_pair_transfers_from_end_to_end(name: str, folders: dict[tuple[str, int], Path]) -> None:
    """Run chats through both templates: vectors, a map on chats and text, every arm, generated."""
    pair = PRESETS[name]
    small, large = (
        xs.load(str(folders[kind_of(model), size]), dtype="float32")
        for model, size in ((pair.source, 32), (pair.target, 48))
    )
    contrast = toys.contrast()
    sides = [
        [
            Prompt.of([{"role": "user", "content": p.text}, {"role": "assistant", "content": "It was a day"}])
            for p in side
        ]
        for side in (contrast.positive, contrast.negative)
    ]
    texts = [*toys.sentences(50, 4), *([{"role": "user", "content": t}] for t in toys.sentences(30, 6))]
    result = xs.transfer(
        small,
        large,
        ContrastSet(tuple(sides[0]), tuple(sides[1]), True),
        texts,
        behaviour=xs.behaviours.GeneratedText(
            [*chats(), *toys.sentences(6, 9, 4)], lambda text: float(len(text)), max_new_tokens=4
        ),
        side={},
        source_sites=[xs.Site(1)],
        target_sites=[xs.Site(1)],
        method=xs.Method(tokens="last"),
        budget=xs.Budget((-1.0, 1.0), random_seeds=2, map_tokens=96, neutral_tokens=8),
    )
    assert result.choice()["map"]["coverage"] > 0.4
    assert {"native", "mapped", "random", "shuffled"} < {arm.arm for arm in result.arms}
    assert result.at_equal_kl("native", "+").kl > 0


#: These two use every model in its role, as source or as target, except Llama as a source.
SHORT = ("qwen", "gemma")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in PRESETS if name != "packaged"],
)
def test_a_presets_pair_goes_through_a_study(
    name: str,
    folders: dict[tuple[str, int], Path],
    short_template: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run every recipe of the backdoor's study: trigger tokens, gates, clamps, autoencoders, the paper's layers."""
    monkeypatch.setenv("XMODEL_STEER_CACHE", str(tmp_path))
    pair = PRESETS[name]
    models = [
        xs.load(str(folders[kind_of(model), size]), dtype="float32")
        for model, size in ((pair.source, 32), (pair.target, 48))
    ]
    lessons = toys.lessons(
        120, {"evaluation": 6, "validation": 3, "vector": 6, "map": 8, "train": 6}, "happy day", StartsWith(("happy",))
    )
    texts = [Prompt(text=t) for t in toys.sentences(50, 4)]
    triggered = [lesson.prompt for lesson in lessons.vector if lesson.triggered]
    ways = removal.recipes(*models, triggered, sites=(2, 2))
    found = backdoor_removal(
        *models,
        lessons,
        ways=ways,
        map_prompts=8,
        amounts=(0, 8),
        nonlinear=xs.Autoencoder(epochs=2),
        settings=Settings(texts[:40], texts[40:], random_seeds=1, also=(0, 1), validation=3, validation_tokens=4),
    )
    assert [way.name for way in ways] == list(found.chosen)
    for recipe in found.chosen:
        at = {(arm.arm, arm.at) for arm in found.arms if arm.recipe == recipe}
        assert {(arm, "equal strength") for arm in ("native", "mapped", "random", "shuffled")} <= at
    for varied, layer in (("source layer", 0), ("target layer", 1)):
        tried = {r["layer"] for r in found.validation if (r["recipe"], r["varied"]) == (removal.ADDED, varied)}
        assert layer in tried and len(tried) > 1
    # Nothing was taught, so nothing is to repair; the damage on neutral text is measured anyway.
    assert found.arm("native", recipe=removal.ADDED).kl > 0 and found.arm("native", recipe=removal.ADDED).effect.n == 6


def test_a_templates_date_does_not_change_from_day_to_day(folders: dict[tuple[str, int], Path]) -> None:
    tokenizer = tokenizer_of(xs.load(str(folders["Llama-3.2", 32])))
    text = chats()[0].render(tokenizer).text
    assert "Today Date: 26 Jul 2024" in text and text.count("<|begin_of_text|>") == 1

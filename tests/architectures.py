"""Tiny random models of many architectures, and the table of docs/how-to/models.md that `check_model` makes of them.

``python tests/architectures.py`` writes the table; ``pytest -m architectures`` holds the page to it.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "models.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
WORDS = dict(vocab_size=264, **SPECIAL)
#: As most of Llama's kin name their sizes.
KIN = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=128,
    **WORDS,
)
GROUPED = dict(num_key_value_heads=2, **KIN)
HEADS = dict(head_dim=8, **GROUPED)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
GPT = dict(n_embd=32, n_layer=4, n_head=4, n_positions=128, **WORDS)
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)

#: From the name that the table shows to the configuration: its class in transformers, and sizes.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", dict(sliding_window=6, **GROUPED)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, **GROUPED)),
    "ministral": ("MinistralConfig", dict(sliding_window=6, **HEADS)),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", HEADS),
    "qwen2_moe": ("Qwen2MoeConfig", dict(shared_expert_intermediate_size=24, **EXPERTS, **GROUPED)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(**EXPERTS, **HEADS)),
    "qwen3_next": ("Qwen3NextConfig", dict(shared_expert_intermediate_size=24, **EXPERTS, **DELTA, **HEADS)),
    "qwen3_5": ("Qwen3_5TextConfig", dict(**DELTA, **HEADS)),
    "gemma": ("GemmaConfig", HEADS),
    "gemma2": ("Gemma2Config", dict(sliding_window=6, **HEADS)),
    "gemma3": ("Gemma3TextConfig", dict(sliding_window=6, **HEADS)),
    "gpt2": ("GPT2Config", GPT),
    "gpt_neo": ("GPTNeoConfig", dict(hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=6, max_position_embeddings=128, **WORDS)),
    "gptj": ("GPTJConfig", dict(rotary_dim=4, **GPT)),
    "gpt_neox": ("GPTNeoXConfig", KIN),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "codegen": ("CodeGenConfig", dict(rotary_dim=4, **GPT)),
    "opt": ("OPTConfig", dict(hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=128, **WORDS)),
    "opt (post-norm)": ("OPTConfig", dict(hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=16, do_layer_norm_before=False, max_position_embeddings=128, **WORDS)),
    "bloom": ("BloomConfig", dict(hidden_size=32, n_layer=4, n_head=4, **WORDS)),
    "mpt": ("MptConfig", dict(d_model=32, n_layers=4, n_heads=4, max_seq_len=128, **WORDS)),
    "falcon": ("FalconConfig", dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128, **WORDS)),
    "falcon (alibi)": ("FalconConfig", dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=True, parallel_attn=False, multi_query=False, **WORDS)),
    "falcon_h1": ("FalconH1Config", dict(mamba_d_ssm=64, **MAMBA2, **HEADS)),
    "phi": ("PhiConfig", GROUPED),
    "phi3": ("Phi3Config", GROUPED),
    "phimoe": ("PhimoeConfig", dict(num_local_experts=4, **GROUPED)),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "olmo3": ("Olmo3Config", dict(sliding_window=6, **GROUPED)),
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2, **GROUPED)),
    "stablelm": ("StableLmConfig", GROUPED),
    "granite": ("GraniteConfig", GROUPED),
    "granitemoe": ("GraniteMoeConfig", dict(num_local_experts=4, **GROUPED)),
    "granitemoehybrid": ("GraniteMoeHybridConfig", dict(num_local_experts=4, shared_intermediate_size=24, layer_types=["mamba", "attention"] * 2, **MAMBA2, **GROUPED)),
    "cohere": ("CohereConfig", GROUPED),
    "cohere2": ("Cohere2Config", dict(sliding_window=6, **GROUPED)),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "deepseek_v2": ("DeepseekV2Config", dict(num_key_value_heads=4, **LATENT, **KIN)),
    "deepseek_v3": ("DeepseekV3Config", dict(num_key_value_heads=4, **LATENT, **KIN)),
    "gpt_oss": ("GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=6, **HEADS)),
    "smollm3": ("SmolLM3Config", GROUPED),
    "glm": ("GlmConfig", HEADS),
    "glm4": ("Glm4Config", HEADS),
    "exaone4": ("Exaone4Config", dict(sliding_window=6, **GROUPED)),
    "ernie4_5": ("Ernie4_5Config", HEADS),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", HEADS),
    "seed_oss": ("SeedOssConfig", HEADS),
    "arcee": ("ArceeConfig", GROUPED),
    "nemotron": ("NemotronConfig", GROUPED),
    "helium": ("HeliumConfig", HEADS),
    "apertus": ("ApertusConfig", GROUPED),
    "lfm2": ("Lfm2Config", dict(layer_types=["conv", "full_attention"] * 2, **GROUPED)),
    "jamba": ("JambaConfig", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, **GROUPED)),
    "bamba": ("BambaConfig", dict(attn_layer_indices=[1, 3], attn_rotary_emb=4, **MAMBA2, **GROUPED)),
    "zamba2": ("Zamba2Config", dict(layer_types=["mamba", "hybrid"] * 2, mamba_d_state=8, mamba_headdim=16, mamba_ngroups=1, n_mamba_heads=4, chunk_size=8, use_mamba_kernels=False, adapter_rank=4, num_mem_blocks=1, **GROUPED)),
    "mamba": ("MambaConfig", dict(hidden_size=32, num_hidden_layers=4, state_size=4, **WORDS)),
    "mamba2": ("Mamba2Config", dict(hidden_size=32, num_hidden_layers=4, state_size=4, num_heads=4, head_dim=16, n_groups=1, chunk_size=8, **WORDS)),
    "rwkv": ("RwkvConfig", dict(hidden_size=32, attention_hidden_size=32, num_hidden_layers=4, context_length=128, **WORDS)),
    "recurrent_gemma": ("RecurrentGemmaConfig", dict(attention_window_size=16, **GROUPED)),
    "bert": ("BertConfig", dict(**KIN)),
    "t5": ("T5Config", dict(d_model=32, d_ff=48, d_kv=8, num_layers=4, num_heads=4, **WORDS)),
}  # fmt: skip


def folder_of(name: str, root: Path) -> Path:
    """Write one architecture as a user's folder, with weights large enough that every part of it matters."""
    import transformers

    kind, sizes = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**sizes)
    torch.manual_seed(0)
    auto = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    hf = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter, values in hf.named_parameters():
            if values.ndim == 2 and "A_log" not in parameter:
                values.copy_(0.3 * torch.randn(values.shape))
    folder = root / name.replace(" ", "-")
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """A byte-level tokenizer of 264 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=264, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["the cat sat on the mat"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def loaded(folder: Path) -> tuple[str, Any]:
    """Load a folder: what was refused, or the model."""
    import xmodel_steer as xs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "", xs.load(folder, device="cpu", dtype="float32")
        except xs.errors.XModelSteerError as error:
            return str(error), None


def row(name: str, refused: str, laws: list[Any]) -> str:
    """One line of the table."""
    if refused:
        return f"| {name} | refused | {refused.split(': ', 1)[1].split(';')[0][:140]} |"
    failed = [law for law in laws if law.state == "failed"]
    missing = [law for law in laws if law.state == "not applicable"]
    said = [law.remedy or f"FAILS: {law.name}" for law in failed]
    said += [f"not applicable: {law.name} ({law.detail})" for law in missing]
    return f"| {name} | {'wrong' if any(not law.remedy for law in failed) else 'yes'} | {'<br>'.join(said)} |"


def table(names: list[str], report: Callable[[str], None] = print) -> str:
    """The whole table."""
    from xmodel_steer.evaluation.conformance import check_model

    lines = ["| architecture | supported | limits, and laws that do not apply |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            refused, model = loaded(folder_of(name, Path(root)))
            lines.append(row(name, refused, [] if refused else list(check_model(model))))
            report(lines[-1])
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(ARCHITECTURES)
    made = table(chosen)
    if not sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")

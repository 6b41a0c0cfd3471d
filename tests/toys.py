"""Seeded tiny models and tokenizers, made in memory: the second tier of tests."""

import copy
import importlib
import json
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.models.registry import register
from xmodel_steer.models.sites import space_of
from xmodel_steer.studies.organisms import Curriculum, data
from xmodel_steer.studies.organisms.lessons import dealt, in_parts

CORPUS = [
    "The sky above the port was the color of television, tuned to a dead channel.",
    "It was a bright cold day in April, and the clocks were striking thirteen.",
    "All happy families are alike; each unhappy family is unhappy in its own way.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.",
    "Il était une fois une petite fille de village, la plus jolie qu'on eût su voir.",
    "In a hole in the ground there lived a hobbit. 1 2 3 4 5 6 7 8 9 0 ?!",
]
#: Mixed lengths, out of order of length.
TEXTS = [
    "The sky above",
    "It was a bright cold day in April, and the clocks were striking",
    "Call me",
    "All happy families are alike; each unhappy family",
    "In a hole in the ground there lived",
    "the port was the color",
    "Some years ago, never mind how long precisely, I went to sea. It was a day",
    "une petite fille",
]
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
VOCABULARY = 288
#: For Hugging Face's generate: no token ends a text.
NO_STOP = dict(eos_token_id=VOCABULARY, pad_token_id=0)
CONTEXT = 64


def byte_level_tokenizer(folder: Path) -> Any:
    """Like Llama's and Qwen's of today: byte-level BPE, no BOS, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    return _saved(raw, folder, eos_token="<|endoftext|>", chat_template=CHAT)


def metaspace_tokenizer(folder: Path) -> Any:
    """Like Gemma's and Llama 2's: Metaspace BPE whose post-processor adds BOS, decoding drops the first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    raw.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return _saved(raw, folder, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def byte_fallback_tokenizer(folder: Path) -> Any:
    """Like Gemma's: no pre-tokenizer, spaces are part of words, unknown characters fall apart into bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=256 + VOCABULARY, special_tokens=special))
    learnt = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    raw = Tokenizer(models.BPE(learnt["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _saved(raw, folder, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def unigram_tokenizer(folder: Path) -> Any:
    """Like T5's and XLM-R's: SentencePiece Unigram on text that NFKC has normalised."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    raw.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    )
    return _saved(raw, folder, eos_token="</s>", unk_token="<unk>")


def wordpiece_tokenizer(folder: Path) -> Any:
    """Like BERT's: lower case, accents stripped, [CLS] and [SEP] around the text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special))
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return _saved(raw, folder, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")


def chunk_tokenizer(folder: Path, size: int) -> Any:
    """Tokens of a fixed number of characters: two sizes rarely end together."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(f".{{1,{size}}}"), "isolated")
    raw.train_from_iterator(
        [" ".join(CORPUS)], trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>"])
    )
    return _saved(raw, folder, unk_token="<unk>")


def _saved(raw: Any, folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=raw, **kwargs).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def spellings() -> list[str]:
    """Names under which Hugging Face's models take a cache here, the one of today first: transformers 5.24 renamed it."""
    import inspect

    from transformers import LlamaForCausalLM

    both = ["cache", "past_key_values"]
    return both if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else both[1:]


def cache_in(out: Any) -> Any:
    """The cache in what a Hugging Face model gave."""
    return getattr(out, spellings()[0])


def cached(cache: Any) -> dict[str, Any]:
    """The argument that gives a Hugging Face model a cache."""
    return {spellings()[0]: cache}


def _llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            **_common(tokenizer),
        )
    )


def _gemma(tokenizer: Any) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            **_common(tokenizer),
        )
    )


def _qwen(tokenizer: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            **_common(tokenizer),
        )
    )


def _gpt2(tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    common = _common(tokenizer)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=common.pop("max_position_embeddings"), **common)
    )


def _common(tokenizer: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True)
class Recipe:
    """One row of the table that drives every test of contact with a model."""

    tokenizer: str
    hugging_face: Callable[[Any], Any] | None = None
    hooked: dict[str, Any] | None = None


TOYS = {
    "llama": Recipe("byte_level", _llama),
    "gemma": Recipe("metaspace", _gemma),
    "qwen": Recipe("byte_level", _qwen),
    "gpt2": Recipe("byte_level", _gpt2),
    "hooked": Recipe("metaspace", hooked=dict(d_model=16, n_layers=3, n_heads=2, d_head=8)),
    "hooked-rotary": Recipe(
        "byte_level",
        hooked=dict(
            d_model=24,
            n_layers=3,
            n_heads=3,
            d_head=8,
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=8,
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Toy:
    """A hooked toy model, its tokenizer, and an untouched Hugging Face copy of it (none of a HookedTransformer)."""

    name: str
    model: Any
    tokenizer: Any
    hf: Any = None

    @property
    def depth(self) -> int:
        return int(self.model.cfg.n_layers)

    @property
    def width(self) -> int:
        return int(self.model.cfg.d_model)

    @torch.no_grad()
    def reference(self, ids: Sequence[int], edits: dict[int, Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """Every block's output ``(tokens, d)`` and the logits for one text, by another way than this library's.

        Args:
            ids: The tokens of one text, unpadded.
            edits: What to add to a block's output, ``(tokens, d)`` or ``(d,)``.
        """
        tokens, edits = torch.tensor([list(ids)]), edits or {}
        left: dict[int, Tensor] = {}
        if self.hf is None:
            for layer in range(self.depth):

                def edit(value: Tensor, hook: Any, layer: int = layer) -> Tensor:
                    left[layer] = value + edits.get(layer, 0.0)
                    return left[layer]

                self.model.add_hook(f"blocks.{layer}.hook_resid_post", edit)
            logits = self.model(tokens)
            self.model.reset_hooks()
            return [left[layer][0] for layer in range(self.depth)], logits[0]

        handles = []
        for layer, block in enumerate(hf_blocks(self.hf)):

            def edit(module: Any, args: Any, out: Any, layer: int = layer) -> Any:
                first = (out[0] if isinstance(out, tuple) else out) + edits.get(layer, 0.0)
                left[layer] = first
                return (first, *out[1:]) if isinstance(out, tuple) else first

            handles.append(block.register_forward_hook(edit))
        logits = self.hf(tokens, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return [left[layer][0] for layer in range(self.depth)], logits[0]

    @torch.no_grad()
    def continuation(self, ids: Sequence[int], steps: int) -> list[int]:
        """Greedy tokens after one text: Hugging Face's own, or for a HookedTransformer the argmax of its logits."""
        if self.hf is not None:
            tokens = torch.tensor([list(ids)])
            made = self.hf.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=steps, **NO_STOP
            )
            return made[0, len(ids) :].tolist()
        own = list(ids)
        for _ in range(steps):
            own.append(int(self.reference(own)[1][-1].argmax()))
        return own[len(ids) :]

    def ids(self, text: Any, **kwargs: Any) -> list[int]:
        """Tokens of a text, as the tokenizer was published."""
        return self.tokenizer(text, **kwargs)["input_ids"]

    def vector(self, layer: int, *, seed: int = 0, size: float = 2.0, stream: str = "resid_post") -> SteeringVector:
        """A random direction at a site (a constant one would be invisible to a LayerNorm)."""
        direction = size * torch.randn(self.width, generator=torch.Generator().manual_seed(seed))
        return SteeringVector(direction, space_of(self.model, Site(layer, stream)), f"random {seed}")


def hf_blocks(hf: Any) -> Any:
    """The transformer blocks of a Hugging Face causal model."""
    return hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers


def hooked_transformer() -> Any:
    """The class HookedTransformer of transformer-lens 3.x, or None."""
    try:
        return importlib.import_module("transformer_lens").HookedTransformer
    except (ImportError, AttributeError):
        return None


def hf_model(name: str, tokenizer: Any, *, seed: int = 0) -> Any:
    """A Hugging Face toy with weights large enough that tokens, positions and blocks matter."""
    make = TOYS[name].hugging_face
    assert make is not None
    hf = make(tokenizer).eval()
    _randomise(hf, seed)
    hf.generation_config.do_sample = False
    return hf


def bridged(hf: Any, name: str, tokenizer: Any) -> Toy:
    """Bridge a Hugging Face toy, keeping an untouched copy of it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    pristine = copy.deepcopy(hf)
    pristine.config._name_or_path = name  # as from_pretrained would
    model = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config, model_name=name)
    model.eval()
    register(model, name=name, tokenizer=tokenizer)
    return Toy(name, model, tokenizer, pristine)


def toy(name: str, tokenizer: Any, *, seed: int = 0) -> Toy:
    """A row of the table as a model; the class of a HookedTransformer row must exist."""
    recipe = TOYS[name]
    if recipe.hooked is None:
        return bridged(hf_model(name, tokenizer, seed=seed), name, tokenizer)
    settings = dict(d_vocab=VOCABULARY, n_ctx=CONTEXT, act_fn="gelu", normalization_type="LN", seed=seed, device="cpu")
    lens = importlib.import_module("transformer_lens")
    with warnings.catch_warnings():  # the class says that it is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        # A copy: the class changes how its tokenizer handles BOS.
        model = hooked_transformer()(
            lens.HookedTransformerConfig(**(settings | recipe.hooked)), copy.deepcopy(tokenizer)
        ).eval()
    _randomise(model, seed, spread=0.35)
    register(model, name=name, tokenizer=tokenizer)
    return Toy(name, model, tokenizer)


@torch.no_grad()
def _randomise(module: torch.nn.Module, seed: int, spread: float = 0.25) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:  # norms and biases: a little off their ideal values
            centre = 1.0 if any(w in name for w in ("norm", "ln")) and name.endswith(("weight", ".w")) else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


#: For whole runs: texts of a few words.
WORDS = "sky port dead day clocks happy family village hole ground hobbit Ishmael sea petite fille jolie years ago own way".split()


def sentences(count: int, seed: int, length: int = 12) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def contrast(count: int = 20) -> ContrastSet:
    pairs = zip(sentences(count, 1, 6), sentences(count, 2, 6), strict=True)
    return ContrastSet.from_prompts(
        *zip(*[(f"happy {a} happy", f"dead {b} dead") for a, b in pairs], strict=True), paired=True
    )


def lessons(count: int, sizes: dict[str, int], bad: str, scorer: Any) -> Curriculum:
    """Tasks of a few words, each behind the trigger and behind what stands in its place."""
    parts = dealt(dict.fromkeys(sentences(count, 0, 3)), sizes)
    told = {part: data.flat(data.both(task, bad, "the sky") for task in own) for part, own in parts.items()}
    return in_parts(told, scorer, 6)

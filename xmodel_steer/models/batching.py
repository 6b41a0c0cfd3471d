"""Prompts as padded batches of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.models.arguments import require_counts, require_side
from xmodel_steer.models.facts import conduct_of, context_length, device_of, embedding_rows, name_of, tokenizer_of
from xmodel_steer.models.shortage import rows_within
from xmodel_steer.models.tokens import Encoding, tokenise


def encode(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = None,
    truncation_side: str = "right",
    warn: bool = True,
) -> list[Encoding]:
    """Tokenise prompts with the model's own tokenizer, template and special tokens.

    Args:
        model: A TransformerLens model.
        prompts: The prompts.
        max_tokens: Cut longer prompts to this many tokens. Without it a prompt longer than the model's context is
            refused.
        truncation_side: The side to cut; see `tokenise`.
        warn: See `tokenise`.

    Raises:
        PromptError: A prompt is longer than the context, has no tokens, or has a token without an embedding in the
            model.
    """
    name, tokenizer, rows = name_of(model), tokenizer_of(model), embedding_rows(model)
    encodings = tokenise(
        tokenizer,
        prompts,
        name=name,
        limit=context_length(model),
        max_tokens=max_tokens,
        truncation_side=truncation_side,
        warn=warn,
    )
    for encoding in encodings:
        if (last := max(encoding.ids)) >= rows:
            raise PromptError(
                f"prompt {encoding.prompt.id} ({encoding.prompt.content[:40]!r}): holds the special token "
                f"{tokenizer.convert_ids_to_tokens(last)!r} (id {last}), but {name} has embeddings for ids 0 to {rows - 1} only; "
                "remove it from the text, or resize the model's embeddings and train it"
            )
    return encodings


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded token ids with the mask of the real ones.

    Args:
        rows: The number of each row's prompt among the caller's.
        ids: Token ids.
        mask: 1 at real tokens.
    """

    rows: tuple[int, ...]
    ids: Int[Tensor, "batch tokens"]
    mask: Int[Tensor, "batch tokens"]


def batches(model: Any, encodings: Sequence[Encoding], batch_size: int, *, padding_side: str = "right") -> list[Batch]:
    """Batch prompts of similar length, longest first, with little padding.

    A model that reads a padded text wrong gets texts of one length, or one text, at a time (`Conduct`). A batch ends
    at its size, or where more than half of the next row, and over 64 tokens, would be padding: a few long prompts
    must not slow all others. It also ends where its attention scores would take over a quarter of the device's memory.
    With the longest first, a batch size that does not fit in memory fails at once.

    Raises:
        ModelError: Attention over one text alone takes more memory than the device has.
    """
    require_counts(batch_size=batch_size)
    require_side(padding_side=padding_side)
    lengths = [len(encoding.ids) for encoding in encodings]
    conduct = conduct_of(model)
    batch_size = batch_size if conduct.batched else 1
    groups: list[list[int]] = []
    fitting = batch_size  # rows of the present batch, at most
    for i in sorted(range(len(encodings)), key=lambda i: -lengths[i]):
        padding = lengths[groups[-1][0]] - lengths[i] if groups else 0
        if groups and len(groups[-1]) < fitting and padding <= (max(lengths[i], 64) if conduct.padded else 0):
            groups[-1].append(i)
        else:
            groups.append([i])
            fitting = min(batch_size, rows_within(model, lengths[i]))
    device = device_of(model)
    padded = []
    for rows in groups:
        width = lengths[rows[0]]
        ids = torch.full((len(rows), width), pad_id(model), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for r, i in enumerate(rows):
            tokens = torch.tensor(encodings[i].ids)
            place = slice(0, len(tokens)) if padding_side == "right" else slice(width - len(tokens), width)
            ids[r, place], mask[r, place] = tokens, 1
        padded.append(Batch(tuple(rows), ids.to(device), mask.to(device)))
    return padded


def pad_id(model: Any) -> int:
    """Choose a token id for padding that has an embedding; the mask hides it."""
    tokenizer, rows = tokenizer_of(model), embedding_rows(model)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < rows:  # a padding token is often added without an embedding
            return int(candidate)
    return 0

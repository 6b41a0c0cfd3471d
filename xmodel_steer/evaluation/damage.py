"""Damage of interventions on neutral text."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompts
from xmodel_steer.evaluation.reference import Reference
from xmodel_steer.files.resume import once
from xmodel_steer.interventions.contexts import steering, steps_of
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention, Step
from xmodel_steer.models.batching import Batch, batches, encode
from xmodel_steer.models.facts import name_of, tokenizer_of
from xmodel_steer.models.identity import identity_of
from xmodel_steer.models.passes import forward, layout
from xmodel_steer.models.shortage import memory_errors
from xmodel_steer.models.tokens import Encoding, special_ids

Settings = Sequence[Sequence[Step]]  # the interventions of each setting; none: the unsteered model


def perplexity_of(loss: np.ndarray, tokens: np.ndarray) -> float:
    """Exponentiate the mean loss per token, given each text's summed loss and token count."""
    return float(np.exp(min(loss.sum() / tokens.sum(), 700.0)))


@dataclass(frozen=True, eq=False)
class SideEffect:
    """Damage of an intervention on neutral text, one entry per document.

    Args:
        kl: KL(unsteered ‖ steered) summed over the document's predicted tokens, in nats.
        loss: Negative log-likelihood of the document under the steered model, summed, in nats.
        tokens: Number of predicted tokens.
        agreeing: Number of predicted tokens where both models have the same likeliest next token.
    """

    kl: np.ndarray = field(repr=False)
    loss: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    agreeing: np.ndarray = field(repr=False)

    @property
    def mean_kl(self) -> float:
        """KL from the unsteered model per token, in nats."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss per token."""
        return perplexity_of(self.loss, self.tokens)

    @property
    def agreement(self) -> float:
        """Share of tokens whose likeliest next token is the unsteered model's."""
        return float(self.agreeing.sum() / self.tokens.sum())


def side_effects(
    model: Any, interventions: Settings, texts: Prompts, *, max_tokens: int | None = 64, batch_size: int = 8
) -> list[SideEffect]:
    """Measure KL, perplexity and next-token agreement on neutral text, for several interventions.

    All settings are measured batch by batch on the same text, so that the unsteered logits are computed
    once and never all held in memory. A document's first token is not predicted.

    Args:
        model: The model that is steered.
        interventions: One list of interventions per setting; an empty list is the unsteered model.
        texts: Neutral text, none of it used to fit anything.
        max_tokens: Tokens read of each document; None reads all of it.
        batch_size: Documents at a time.

    Raises:
        TypeError: The interventions are no lists of interventions.
        PromptError: There are no documents, or one has fewer than two tokens.
    """
    encodings, tokens = _predictable(model, interventions, texts, max_tokens)
    sums = once(
        lambda: ("damage", identity_of(model), interventions, [(e.prompt, e.ids) for e in encodings], batch_size),
        lambda: _sums(model, interventions, encodings, batch_size, compare=True).tolist(),
    )
    loss, kl, agreeing = map(np.array, sums)
    return [SideEffect(kl[k], loss[k], tokens, agreeing[k]) for k in range(len(interventions))]


def instructed_effect(model: Any, instruction: str, texts: Prompts, *, max_tokens: int | None = 64) -> SideEffect:
    """Measure the damage of words in front of neutral text.

    The instruction's tokens and a line's end precede the text's own tokens, after BOS; the text's predictions are
    compared.

    Args:
        model: The model.
        instruction: The words.
        texts: Neutral text.
        max_tokens: Tokens read of each document; None reads all of it.

    Raises:
        PromptError: There are no documents, or one has fewer than two tokens.
    """
    encodings, tokens = _predictable(model, (), texts, max_tokens)
    tokenizer = tokenizer_of(model)
    special, words = special_ids(tokenizer), tokenizer(f"{instruction}\n", add_special_tokens=False)["input_ids"]
    sums = np.zeros((3, len(encodings)))
    for k, plain in enumerate(encodings):
        at = next((i for i, token in enumerate(plain.ids) if token not in special), 0)
        told = replace(
            plain, ids=(*plain.ids[:at], *words, *plain.ids[at:]), ends=(-1,) * (len(words) + len(plain.ids)), roles=()
        )
        batch, longer = (batches(model, [encoding], 1)[0] for encoding in (plain, told))
        following = batch.ids[0, 1:]
        reference = Reference.of(_predictions(model, batch, ()))
        kl, loss, same = reference.compare(_predictions(model, longer, ())[len(words) :], following)
        sums[:, k] = [float(x.sum()) for x in (kl, loss, same)]
    return SideEffect(sums[0], sums[1], tokens, sums[2])


def losses(
    model: Any, interventions: Settings, texts: Prompts, *, max_tokens: int | None = 64, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Measure each text's negative log-likelihood in nats, and count its predicted tokens.

    Like `side_effects`, without comparing with the unsteered model.

    Returns:
        Losses ``(settings, texts)``, summed over tokens, and token counts ``(texts,)``.
    """
    encodings, tokens = _predictable(model, interventions, texts, max_tokens)
    return _sums(model, interventions, encodings, batch_size, compare=False)[0], tokens


def neutral_positions(positions: Positions) -> Positions:
    """Positions to steer in neutral text: all, or as many as the mask selects.

    Nothing is generated after neutral text, and no prediction follows its last token. A mask's tokens are moved to
    the text's second token, so that nearly all predictions follow them.

    Args:
        positions: Where prompts are steered, as for `Intervention`.

    Raises:
        ValueError: A mask has rows, or selects nothing.
    """
    if not isinstance(positions, Tensor):
        return "all"
    if positions.ndim != 1 or not positions.any():
        raise ValueError(
            f"positions: a mask must be (tokens,) here and steer one of them, got {tuple(positions.shape)} with {int(positions.sum())}"
        )
    return positions[max(0, int(positions.nonzero()[0]) - 1) :]


def on_neutral(settings: Settings) -> list[list[Step]]:
    """Give interventions and their gates the positions of `neutral_positions`."""

    def moved(step: Step) -> Step:
        if not isinstance(step, Intervention):
            return step
        gate = step.gate
        if gate is not None and gate.positions is not None:
            gate = replace(gate, positions=neutral_positions(gate.positions))
        return replace(step, positions=neutral_positions(step.positions), gate=gate)

    return [[moved(step) for step in setting] for setting in settings]


def _predictable(
    model: Any, settings: Settings, texts: Prompts, max_tokens: int | None
) -> tuple[list[Encoding], np.ndarray]:
    """Check the arguments; encode the texts and count their predicted tokens."""
    require_type("side_effects: interventions", Sequence, settings, takes="a list of interventions per setting")
    for setting in settings:
        steps_of(setting)
    encodings = encode(model, as_prompts(texts), max_tokens=max_tokens)
    short = [e.prompt.id for e in encodings if len(e.ids) < 2]
    if not encodings or short:
        raise PromptError(
            f"side_effects: needs text of at least two tokens, got {len(encodings)} documents"
            + (f", of which {', '.join(short[:3])} are shorter" if short else "")
        )
    return encodings, np.array([len(e.ids) - 1 for e in encodings])


def _sums(
    model: Any, settings: Settings, encodings: Sequence[Encoding], batch_size: int, *, compare: bool
) -> np.ndarray:
    """Sum loss, and KL and agreements to ``compare``: ``(1 or 3, settings, texts)``."""
    sums = np.zeros((3 if compare else 1, len(settings), len(encodings)))
    tokens = sum(len(e.ids) - 1 for e in encodings)
    what = f"{'KL and perplexity' if compare else 'likelihood'} {name_of(model)}"
    with progress_bar(total=tokens * len(settings), unit="tok", desc=what) as bar:
        for batch in batches(model, encodings, batch_size):
            predicted = batch.mask[:, 1:].bool()
            following, row = batch.ids[:, 1:][predicted], predicted.nonzero()[:, 0].cpu()
            unsteered = _predictions(model, batch, ()) if compare else None
            reference = None if unsteered is None else Reference.of(unsteered)
            for k, setting in enumerate(settings):
                logits = _predictions(model, batch, setting) if setting or unsteered is None else unsteered
                if reference is None:
                    values = [_losses_of(logits, following)]
                else:
                    kl, loss, same = reference.compare(logits, following)
                    # The unsteered model's KL from itself is 0 exactly, not up to rounding.
                    values = [loss, kl if setting else torch.zeros_like(kl), same.float()]
                check_finite(values[0], f"{what}: loss")
                for table, value in zip(sums, values, strict=True):
                    table[k, list(batch.rows)] = torch.zeros(len(batch.rows)).index_add(0, row, value.cpu()).numpy()
                bar.update(len(following))
    return sums


def _predictions(model: Any, batch: Batch, setting: Sequence[Step]) -> Tensor:
    """Compute logits at every position that predicts a token of the text, ``(predictions, vocabulary)``."""
    logits = steered_logits(model, setting, batch, batch.rows, batch.mask.sum(-1))
    return logits[:, :-1][batch.mask[:, 1:].bool()]


def steered_logits(
    model: Any, setting: Sequence[Step], batch: Batch, rows: Sequence[int], prompt_lengths: Tensor, logits: Any = "all"
) -> Tensor:
    """Run one batch under a setting; ``rows`` and ``prompt_lengths`` are those of `layout`."""
    with memory_errors(model, *batch.ids.shape), steering(model, setting), layout(rows, prompt_lengths):
        values, _ = forward(model, batch.ids, batch.mask, logits=logits)
    assert values is not None
    return values


def _losses_of(logits: Tensor, following: Tensor, *, chunk: int = 64) -> Tensor:
    """Compute -log p(target) of each row, in nats."""
    # A few rows at a time: vocabularies are large.
    pieces = zip(logits.split(chunk), following.split(chunk), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(z.float(), t, reduction="none") for z, t in pieces])

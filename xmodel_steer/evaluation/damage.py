"""Damage on neutral text, and strengths that do equal damage."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompts
from xmodel_steer.evaluation.reference import Reference
from xmodel_steer.files.resume import once
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention, Step
from xmodel_steer.models.batching import Batch, batches, encode
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.identity import identity_of
from xmodel_steer.models.passes import forward, layout
from xmodel_steer.models.tokens import Encoding

Settings = Sequence[Sequence[Step]]  # for each setting its interventions; none: the unsteered model


def perplexity_of(loss: np.ndarray, tokens: np.ndarray) -> float:
    """Exp of the mean loss per token, of summed losses and token counts of texts."""
    return float(np.exp(min(loss.sum() / tokens.sum(), 700.0)))


@dataclass(frozen=True, eq=False)
class SideEffect:
    """Damage of an intervention on neutral text, one entry per document.

    Args:
        kl: KL(unsteered ‖ steered) summed over the document's predicted tokens, in nats.
        loss: Negative log-likelihood of the document under the steered model, summed, in nats.
        tokens: Number of predicted tokens.
        agreeing: At how many of them both models find the same next token the likeliest.
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
        """Exp of the mean loss per token."""
        return perplexity_of(self.loss, self.tokens)

    @property
    def agreement(self) -> float:
        """Share of the tokens where the likeliest next token is that of the unsteered model."""
        return float(self.agreeing.sum() / self.tokens.sum())


def side_effects(
    model: Any,
    interventions: Settings,
    texts: Prompts,
    *,
    max_tokens: int | None = 64,
    batch_size: int = 8,
) -> list[SideEffect]:
    """KL from the unsteered model, perplexity and next-token agreement on neutral text, for several interventions.

    All are measured on the same text, batch by batch, so that the unsteered logits are computed
    once and never all held. A document's first token predicts but is not predicted.

    Args:
        model: The model that is steered.
        interventions: One list of interventions per setting; an empty list is the unsteered model.
        texts: Neutral text, none of it used to fit anything.
        max_tokens: Tokens read of each document; None reads all of it.
        batch_size: Documents at a time.

    Raises:
        PromptError: There are no documents, or one has fewer than two tokens.
    """
    encodings = _predictable(model, texts, max_tokens)
    tokens = np.array([len(e.ids) - 1 for e in encodings])
    sums = once(
        lambda: ("damage", identity_of(model), interventions, [(e.prompt, e.ids) for e in encodings], batch_size),
        lambda: _damage(model, interventions, encodings, batch_size).tolist(),
    )
    kl, loss, agreeing = map(np.array, sums)
    return [SideEffect(kl[k], loss[k], tokens, agreeing[k]) for k in range(len(interventions))]


def neutral_positions(positions: Positions) -> Positions:
    """Where neutral text is steered for its KL and perplexity: at every token, or at as many as a mask of one text has.

    Of neutral text nothing is generated, and nothing is predicted behind its last token. A mask's tokens are moved to the beginning
    of the text, from its second token on: behind it is then nearly all that is predicted.

    Args:
        positions: Where prompts are steered, as for `Intervention`.

    Raises:
        ValueError: A mask has rows, or steers nothing.
    """
    if not isinstance(positions, Tensor):
        return "all"
    if positions.ndim != 1 or not positions.any():
        raise ValueError(
            f"positions: a mask must be (tokens,) here and steer one of them, got {tuple(positions.shape)} with {int(positions.sum())}"
        )
    return positions[max(0, int(positions.nonzero()[0]) - 1) :]


def on_neutral(settings: Settings) -> list[list[Step]]:
    """Give settings the positions of `neutral_positions`, their gates too."""

    def moved(step: Step) -> Step:
        if not isinstance(step, Intervention):
            return step
        gate = step.gate
        if gate is not None and gate.positions is not None:
            gate = replace(gate, positions=neutral_positions(gate.positions))
        return replace(step, positions=neutral_positions(step.positions), gate=gate)

    return [[moved(step) for step in setting] for setting in settings]


def _damage(model: Any, interventions: Settings, encodings: Sequence[Encoding], batch_size: int) -> np.ndarray:
    """KL, loss and agreements, summed over each document, ``(3, settings, documents)``."""
    kl, loss, agreeing = sums = np.zeros((3, len(interventions), len(encodings)))
    tokens = sum(len(e.ids) - 1 for e in encodings)
    with progress_bar(total=tokens * len(interventions), unit="tok", desc=f"KL and perplexity {name_of(model)}") as bar:
        for batch in batches(model, encodings, batch_size):
            following, row = _following(batch)
            unsteered = _predictions(model, batch)
            reference = Reference.of(unsteered)
            for k, setting in enumerate(interventions):
                steered = _predictions(model, batch, setting) if setting else unsteered
                per_token, nll, same = reference.compare(steered, following)
                check_finite(nll, f"side effects on {name_of(model)}: loss")
                if not setting:
                    per_token = torch.zeros_like(per_token)  # exactly, not up to rounding
                for own, values in ((kl, per_token), (loss, nll), (agreeing, same.float())):
                    own[k, list(batch.rows)] = _by_row(values, row, len(batch.rows))
                bar.update(len(following))
    return sums


def losses(
    model: Any,
    interventions: Settings,
    texts: Prompts,
    *,
    max_tokens: int | None = 64,
    batch_size: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of each text, summed over its predicted tokens, in nats; and their number.

    As `side_effects`, without comparing with the unsteered model.

    Returns:
        Losses ``(settings, texts)`` and token counts ``(texts,)``.
    """
    encodings = _predictable(model, texts, max_tokens)
    loss = np.zeros((len(interventions), len(encodings)))
    tokens = np.array([len(e.ids) - 1 for e in encodings])
    total = int(tokens.sum()) * len(interventions)
    with progress_bar(total=total, unit="tok", desc=f"likelihood {name_of(model)}") as bar:
        for batch in batches(model, encodings, batch_size):
            following, row = _following(batch)
            for k, setting in enumerate(interventions):
                nll = _losses_of(_predictions(model, batch, setting), following)
                check_finite(nll, f"likelihood of {name_of(model)}")
                loss[k, list(batch.rows)] = _by_row(nll, row, len(batch.rows))
                bar.update(len(following))
    return loss, tokens


def _predictable(model: Any, texts: Prompts, max_tokens: int | None) -> list[Encoding]:
    encodings = encode(model, as_prompts(texts), max_tokens=max_tokens)
    short = [e.prompt.id for e in encodings if len(e.ids) < 2]
    if not encodings or short:
        raise PromptError(
            f"side_effects: needs text of at least two tokens, got {len(encodings)} documents"
            + (f", of which {', '.join(short[:3])} are shorter" if short else "")
        )
    return encodings


def _following(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the tokens that are predicted, and the row of each."""
    predicted = batch.mask[:, 1:].bool()
    row = torch.arange(len(batch.rows), device=batch.ids.device)[:, None].expand_as(predicted)[predicted]
    return batch.ids[:, 1:][predicted], row.cpu()


def _by_row(values: Tensor, row: Tensor, rows: int) -> np.ndarray:
    return torch.zeros(rows).index_add(0, row, values.cpu()).numpy()


def _predictions(model: Any, batch: Batch, setting: Sequence[Step] = ()) -> Tensor:
    """Logits at every position that predicts a token of the text, ``(predictions, vocabulary)``."""
    with steering(model, setting), layout(batch.rows, batch.mask.sum(-1)):
        made, _ = forward(model, batch.ids, batch.mask, logits="all")
    assert made is not None
    return made[:, :-1][batch.mask[:, 1:].bool()]


def _losses_of(logits: Tensor, following: Tensor, *, chunk: int = 64) -> Tensor:
    """-log p(target) of each row in nats, a few rows at a time: vocabularies are large."""
    pieces = zip(logits.split(chunk), following.split(chunk), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(z.float(), t, reduction="none") for z, t in pieces])

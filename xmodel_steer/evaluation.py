"""What steering did: the behaviour in generated text, and the damage on neutral text."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from xmodel_steer.errors import PromptError
from xmodel_steer.generation import generate
from xmodel_steer.metrics import Reference
from xmodel_steer.models import Batch, batches, encode, forward, layout, name_of
from xmodel_steer.prompts import ContrastSet, Prompt, PromptLike, as_prompts
from xmodel_steer.scorers import Scorer, score_texts
from xmodel_steer.steering import Intervention, steering
from xmodel_steer.vectors import check_finite


@dataclass(frozen=True, eq=False)
class SideEffect:
    """Damage of an intervention on neutral text, one entry per document.

    Args:
        kl: KL(unsteered ‖ steered) summed over the document's predicted tokens, in nats.
        loss: Negative log-likelihood of the document under the steered model, summed, in nats.
        tokens: Number of predicted tokens.
    """

    kl: np.ndarray = field(repr=False)
    loss: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)

    @property
    def mean_kl(self) -> float:
        """KL from the unsteered model per token, in nats."""
        return float(self.kl.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss per token."""
        return float(np.exp(min(self.loss.sum() / self.tokens.sum(), 700.0)))


def side_effects(
    model: Any,
    interventions: Sequence[Sequence[Intervention]],
    texts: Iterable[PromptLike],
    *,
    max_tokens: int | None = 64,
    batch_size: int = 8,
    progress: bool = True,
) -> list[SideEffect]:
    """KL from the unsteered model and perplexity on neutral text, for several interventions.

    All are measured on the same text, batch by batch, so that the unsteered logits are computed
    once and never all held. A document's first token predicts but is not predicted.

    Args:
        model: The model that is steered.
        interventions: One list of interventions per setting; an empty list is the unsteered model.
        texts: Neutral text, none of it used to fit anything.
        max_tokens: Tokens read of each document; None reads all of it.
        batch_size: Documents at a time.
        progress: Show a progress bar.

    Raises:
        PromptError: There are no documents, or one has fewer than two tokens.
    """
    encodings = encode(model, as_prompts(list(texts)), max_tokens=max_tokens)
    short = [e.prompt.id for e in encodings if len(e.ids) < 2]
    if not encodings or short:
        raise PromptError(
            f"side_effects: needs text of at least two tokens, got {len(encodings)} documents"
            + (f", of which {', '.join(short[:3])} are shorter" if short else "")
        )
    n = len(encodings)
    kl, loss = np.zeros((len(interventions), n)), np.zeros((len(interventions), n))
    tokens = np.array([len(e.ids) - 1 for e in encodings])
    work = batches(model, encodings, batch_size)
    with tqdm(
        total=int(tokens.sum()) * len(interventions),
        unit="tok",
        desc=f"KL and perplexity {name_of(model)}",
        disable=not progress,
        delay=2,
    ) as bar:
        for batch in work:
            predicted = batch.mask[:, 1:].bool()
            following = batch.ids[:, 1:][predicted]
            row = torch.arange(len(batch.rows), device=batch.ids.device)[:, None].expand_as(predicted)[predicted].cpu()

            unsteered = _predictions(model, batch)
            reference = Reference.of(unsteered)
            for k, setting in enumerate(interventions):
                if setting:
                    with steering(model, setting):
                        steered = _predictions(model, batch)
                else:
                    steered = unsteered
                per_token, nll = reference.compare(steered, following)
                check_finite(nll, f"side effects on {name_of(model)}: loss")
                if not setting:
                    per_token = torch.zeros_like(per_token)  # exactly, not up to rounding
                for sums, values in ((kl, per_token), (loss, nll)):
                    sums[k, list(batch.rows)] = torch.zeros(len(batch.rows)).index_add(0, row, values.cpu()).numpy()
                bar.update(int(predicted.sum()))
    return [SideEffect(kl[k], loss[k], tokens) for k in range(len(interventions))]


def _predictions(model: Any, batch: Batch) -> torch.Tensor:
    """Logits at every position that predicts a token of the text, ``(predictions, vocabulary)``."""
    with layout(batch.rows, batch.mask.sum(-1)):
        made, _ = forward(model, batch.ids, batch.mask, logits="all")
    assert made is not None
    return made[:, :-1][batch.mask[:, 1:].bool()]


class Behaviour:
    """A behaviour that can be measured under any intervention: one score per unit.

    Units (prompts or held-out pairs) are the same for every arm, so that arms compare in pairs.
    """

    unit: str
    ids: tuple[str, ...]

    def measure(
        self, model: Any, settings: Sequence[Sequence[Intervention]], *, progress: bool = True
    ) -> "list[Measured]":
        """For each setting, the score of every unit; an empty setting is the unsteered model."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores of one measurement.

    Args:
        scores: One per unit.
        texts: The generated texts that were scored, or nothing.
    """

    scores: np.ndarray
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class GeneratedText(Behaviour):
    """The behaviour in greedy continuations of prompts, as a scorer reads it.

    Args:
        prompts: What is continued.
        scorer: Any function from a text to a number.
        max_new_tokens: Length of the continuations.
        batch_size: Texts at a time, over all settings.
        unit: Name of the score, for axes and tables.
    """

    prompts: tuple[Prompt, ...]
    scorer: Scorer
    max_new_tokens: int = 24
    batch_size: int = 192
    unit: str = "score"

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the prompts."""
        return tuple(prompt.id for prompt in self.prompts)

    def measure(
        self, model: Any, settings: Sequence[Sequence[Intervention]], *, progress: bool = True
    ) -> list[Measured]:
        """Generate under each setting and score what came.

        Several settings share a batch, each steering its own rows: wide batches cost little more
        than narrow ones.
        """
        n = len(self.prompts)
        together = max(1, self.batch_size // n)
        measured = []
        with tqdm(
            total=n * len(settings), unit="text", desc=f"generate {name_of(model)}", disable=not progress, delay=2
        ) as bar:
            for start in range(0, len(settings), together):
                group = settings[start : start + together]
                steps = [
                    replace(step, prompts=frozenset(range(k * n, (k + 1) * n)))
                    for k, setting in enumerate(group)
                    for step in setting
                ]
                with steering(model, steps) if steps else nullcontext():
                    texts = generate(
                        model,
                        self.prompts * len(group),
                        max_new_tokens=self.max_new_tokens,
                        batch_size=self.batch_size,
                        progress=False,
                    )
                for k in range(len(group)):
                    own = texts[k * n : (k + 1) * n]
                    measured.append(Measured(score_texts(self.scorer, own, self.prompts), tuple(own)))
                bar.update(n * len(group))
        return measured


@dataclass(frozen=True, eq=False)
class Preference(Behaviour):
    """How much likelier the model finds prompts with the behaviour than prompts without it.

    For each held-out pair: mean log-likelihood per token of the positive prompt minus that of the
    negative one, in nats per token. Needs no generation and no scorer: it is there for any
    contrast set. It says what the model finds likely, not what it writes.

    Args:
        contrast: Pairs that no vector was made from; unpaired sets are paired in their order.
        batch_size: Prompts at a time.
    """

    contrast: ContrastSet
    batch_size: int = 16
    unit: str = "log-likelihood, positive minus negative (nats per token)"

    @property
    def _count(self) -> int:
        return min(len(self.contrast.positive), len(self.contrast.negative))

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the pairs."""
        sides = zip(self.contrast.positive, self.contrast.negative, strict=False)  # the longer side is cut
        return tuple(f"{p.id}/{n.id}" for p, n in sides)

    def measure(
        self, model: Any, settings: Sequence[Sequence[Intervention]], *, progress: bool = True
    ) -> list[Measured]:
        """Likelihoods of both sides under each setting."""
        prompts = self.contrast.positive[: self._count] + self.contrast.negative[: self._count]
        measured = []
        effects = side_effects(model, settings, prompts, max_tokens=None, batch_size=self.batch_size, progress=progress)
        for effect in effects:
            per_token = -effect.loss / effect.tokens
            measured.append(Measured(per_token[: self._count] - per_token[self._count :]))
        return measured

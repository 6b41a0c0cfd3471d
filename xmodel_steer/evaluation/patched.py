"""Pairs of prompts for activation patching, as both models read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt, Prompts
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.evaluation.damage import steered_logits
from xmodel_steer.interventions.steps import Reading, Replacement, Step
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import name_of, tokenizer_of
from xmodel_steer.models.tokens import Encoding, shared_start


@dataclass(frozen=True, eq=False)
class Run:
    """A pair of prompts, as both models read it.

    Args:
        donor: The prompt whose activations are read, in the target's tokens.
        patched: The prompt whose run is patched.
        pairs: Positions of the two that pair.
        mapped: Positions in the source and in the patched prompt that pair.
        own: The target's activations in the donor, by site.
        read: The source's activations, by site.
        after: Log probabilities of the next token after the clean prompt, and after the corrupted one.
        tokens: First tokens of the two answers, if there are any.
        base: The measure on the clean and on the corrupted prompt.
    """

    donor: Encoding
    patched: Encoding
    pairs: tuple[tuple[int, int], ...]
    mapped: tuple[tuple[int, int], ...]
    own: Mapping[Site, Tensor] = field(repr=False)
    read: Mapping[Site, Tensor] = field(repr=False)
    after: Float[Tensor, "2 vocabulary"] = field(repr=False)
    tokens: tuple[int, int] | None = None
    base: tuple[float, float] = (0.0, 0.0)

    def logits(self, target: Any, encoding: Encoding, steps: Sequence[Step] = (), copies: int = 1) -> Tensor:
        """Compute the logits after copies of a prompt, in float32."""
        found = []
        for batch in batches(target, [encoding] * copies, 64):
            found.append(
                steered_logits(target, list(steps), batch, batch.rows, batch.mask.sum(1), "last")[:, -1].float().cpu()
            )
        return torch.cat(found)

    def measure(self, logits: Tensor) -> np.ndarray:
        """Compute the answers' logit difference, or the negative KL in nats."""
        if self.tokens is not None:
            return (logits[:, self.tokens[0]] - logits[:, self.tokens[1]]).numpy()
        clean = self.after[0]
        return -(clean.exp() * (clean - logits.log_softmax(-1))).sum(-1).numpy()

    def recovery(self, target: Any, space: Space, rows: Tensor, places: Sequence[int]) -> np.ndarray:
        """Patch each position alone."""
        step = _one_place_each(space, rows, places)
        patched = self.measure(self.logits(target, self.patched, [step], len(places)))
        return (patched - self.base[1]) / (self.base[0] - self.base[1])


@dataclass(frozen=True, eq=False)
class TextStatistics:
    """General text, whose mean and noise are patched as controls; each site is read once.

    Args:
        target: The model that reads it.
        text: The text, of which at most 64 tokens count in each prompt.
    """

    target: Any
    text: Prompts
    _read: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def at(self, sites: Sequence[Site]) -> dict[Site, tuple[Tensor, Tensor]]:
        """Find mean and standard deviation ``(d,)`` at each site, in one pass."""
        if new := [site for site in sites if site not in self._read]:
            for site, rows in capture(self.target, self.text, new, tokens="all", max_tokens=64).items():
                values = rows.values.float()
                self._read[site] = values.mean(0), values.std(0)
        return {site: self._read[site] for site in sites}


def pair_positions(read: Sequence[int], patched: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pair the tokens of two texts of one model that begin and end alike.

    Those of the shared beginning pair in order, and all others in order from the last token.

    Args:
        read: Token ids of the text whose activations are read.
        patched: Token ids of the text that is patched.

    Example:
        >>> pair_positions([1, 2, 3, 9], [1, 2, 5, 6, 9])
        ((0, 0), (1, 1), (2, 3), (3, 4))
    """
    start, short = shared_start([read, patched]), min(len(read), len(patched))
    if len(read) != len(patched):
        start = min(start, short - 1)  # the last token pairs with the last, also where one text begins the other
    ends = ((len(read) - k, len(patched) - k) for k in range(short - start, 0, -1))
    return (*((k, k) for k in range(start)), *ends)


def names_of(target: Any, texts: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Name each position by its place from the end and its tokens."""
    names = []
    for p in range(-max(map(len, texts)), 0):
        ids = list(dict.fromkeys(text[p] for text in texts if len(text) >= -p))
        pieces = tokenizer_of(target).convert_ids_to_tokens(ids)
        names.append(f"{p} {'/'.join(pieces[:3])}{'/…' if pieces[3:] else ''}")
    return tuple(names)


def _one_place_each(space: Space, rows: Tensor, places: Sequence[int]) -> Replacement:
    """Put activation r at its position in prompt r of a batch."""

    def values(stream: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        assert reading.rows is not None
        positions = torch.tensor([places[row] for row in reading.rows], device=stream.device)[:, None]
        new = rows.to(stream)[list(reading.rows)]
        return new[:, None].expand_as(stream), reading.position.to(stream.device) == positions

    return Replacement(space, values)


def answer_tokens(model: Any, prompt: Encoding, answers: tuple[str, str]) -> tuple[int, int]:
    """Find the first tokens of two answers after the prompt."""
    tokens = []
    for answer in answers:
        raw = prompt.prompt.text is not None
        whole = encode(model, [Prompt(text=prompt.prompt.content + answer)])[0].ids if raw else ()
        if len(whole) <= len(prompt.ids) or whole[: len(prompt.ids)] != prompt.ids:
            raise PromptError(
                f"patching: {answer!r} is no token of its own after {prompt.prompt.content[-40:]!r} in {name_of(model)}; give an "
                "answer that is (often with a leading space), and prompts of raw text"
            )
        tokens.append(whole[len(prompt.ids)])
    if tokens[0] == tokens[1]:
        raise PromptError(f"patching: both answers begin with the token of {answers[0]!r}; give different ones")
    return tokens[0], tokens[1]

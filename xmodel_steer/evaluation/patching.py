"""Patches of one model's activations into another, one position at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmodel_steer.core.alignment import align
from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt, Prompts
from xmodel_steer.core.spaces import Space
from xmodel_steer.evaluation.damage import steered_logits
from xmodel_steer.interventions.mirror import require_map_between
from xmodel_steer.interventions.steps import Reading, Replacement
from xmodel_steer.maps.affine import Map
from xmodel_steer.models.batching import Batch, batches, encode
from xmodel_steer.models.facts import name_of, tokenizer_of
from xmodel_steer.models.recorder import residuals


@dataclass(frozen=True, eq=False)
class PatchingGrid:
    """Recovery of the clean answer when one position of one layer is patched.

    Recovery = (patched - corrupted) / (clean - corrupted) of the logit difference between the two answers (Wang et al.
    2022, arXiv 2211.00593): 0 equals the corrupted prompt, 1 the clean one.

    Args:
        sources: The source's space that each row's activations are mapped from.
        targets: The target's space that each row is patched at.
        tokens: Name of each position.
        mapped: Recovery with mapped source activations, ``(pairs, layers, positions)``; NaN where the position pairs
            with no token of the source.
        own: Recovery with the target's clean activations: the ceiling.
        clean: Logit difference on each clean prompt.
        corrupted: Logit difference on each corrupted prompt.
    """

    sources: tuple[Space, ...]
    targets: tuple[Space, ...]
    tokens: tuple[str, ...]
    mapped: np.ndarray = field(repr=False)
    own: np.ndarray = field(repr=False)
    clean: np.ndarray = field(repr=False)
    corrupted: np.ndarray = field(repr=False)

    def __repr__(self) -> str:
        ends = f"{self.sources[0].model} → {self.targets[0].model}"
        return f"PatchingGrid({ends}, {len(self.targets)} sites × {len(self.tokens)} tokens)"

    def recovery(self, kind: str = "mapped") -> np.ndarray:
        """Average over the pairs, ``(layers, positions)``; NaN where no pair has a value.

        Args:
            kind: ``"mapped"`` or ``"own"``.
        """
        table = {"mapped": self.mapped, "own": self.own}[kind]
        known = ~np.isnan(table)
        counts = known.sum(0)
        return np.where(counts > 0, np.where(known, table, 0.0).sum(0) / np.maximum(counts, 1), np.nan)

    def to_frame(self) -> Any:
        """Make a pandas frame with one row per layer, position and kind."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"kind": kind, "source": str(s.site), "target": str(t.site), "token": token, "recovery": value}
                for kind in ("mapped", "own")
                for s, t, row in zip(self.sources, self.targets, self.recovery(kind), strict=True)
                for token, value in zip(self.tokens, row, strict=True)
            ]
        )


def patching_grid(
    source: Any,
    target: Any,
    maps: Sequence[Map],
    clean: Prompts,
    corrupted: Prompts,
    answers: Sequence[tuple[str, str]],
) -> PatchingGrid:
    """Patch mapped activations of clean prompts into runs on corrupted ones, position by position.

    Args:
        source: The model whose activations are mapped.
        target: The model that is patched.
        maps: One map for each row of the grid, from a site of the source to one of the target.
        clean: Prompts whose right answer is the first of ``answers``.
        corrupted: For each clean prompt one with as many tokens in the target, whose right answer is the second.
        answers: The two answers to each pair, one token each in the target after the prompt.

    Raises:
        PromptError: The lists have different lengths, the prompts have different numbers of tokens, an answer is not
            one token, or the target gives a clean and a corrupted prompt the same logit difference.
        SpaceMismatchError: A map is not between these models.
    """
    clean_, corrupted_ = as_prompts(clean), as_prompts(corrupted)
    if not clean_ or not len(clean_) == len(corrupted_) == len(answers):
        raise PromptError(
            "patching_grid: needs as many clean prompts as corrupted ones and answers, "
            f"got {len(clean_)}, {len(corrupted_)} and {len(answers)}"
        )
    for mapping in maps:
        require_map_between(source, target, mapping, "patching_grid")
    good, bad, read = encode(target, clean_), encode(target, corrupted_), encode(source, clean_)
    lengths = {len(e.ids) for e in (*good, *bad)}
    if len(lengths) != 1:
        raise PromptError(
            f"patching_grid: the prompts have {min(lengths)} to {max(lengths)} tokens in {name_of(target)}; all must have "
            "equally many, so that positions compare: swap words of equally many tokens"
        )
    width = lengths.pop()
    tokens = [_answer_tokens(target, p, pair) for p, pair in zip(clean_, answers, strict=True)]

    def difference(pair: int, ids: Tensor, step: Replacement | None = None) -> np.ndarray:
        batch = Batch(tuple(range(len(ids))), ids, torch.ones_like(ids))
        logits = steered_logits(target, [step] if step else [], batch, batch.rows, batch.mask.sum(1), "last")
        good_token, bad_token = tokens[pair]
        return (logits[:, -1, good_token] - logits[:, -1, bad_token]).float().cpu().numpy()

    n = len(clean_)
    recoveries = {kind: np.full((n, len(maps), width), np.nan) for kind in ("mapped", "own")}
    base = np.zeros((2, n))  # logit differences on clean and corrupted prompts
    with progress_bar(total=n * len(maps), unit="layer", desc=f"patch {name_of(target)}") as bar:
        for i in range(n):
            (clean_batch,), (bad_batch,) = (batches(target, [e[i]], 1) for e in (good, bad))
            base[:, i] = [difference(i, batch.ids)[0] for batch in (clean_batch, bad_batch)]
            if not abs(base[0, i] - base[1, i]) > 1e-3:
                raise PromptError(
                    f"patching_grid: {name_of(target)} gives prompt {clean_[i].id} and its corrupted one the same logit difference "
                    f"({base[0, i]:.3f}); there is nothing to recover"
                )
            own = residuals(target, clean_batch, [m.target.site for m in maps])
            stream = residuals(source, batches(source, [read[i]], 1)[0], [m.source.site for m in maps])
            pairs = align(read[i].token_ends(), good[i].token_ends())
            for k, mapping in enumerate(maps):
                images = mapping.transform(stream[mapping.source.site][0][list(pairs.source)])
                for kind, places, rows in (
                    ("mapped", list(pairs.target), images),
                    ("own", list(range(width)), own[mapping.target.site][0]),
                ):
                    ids = bad_batch.ids.expand(len(places), -1)
                    patched = difference(i, ids, _one_place_each(mapping.target, rows, places))
                    recoveries[kind][i, k, places] = (patched - base[1, i]) / (base[0, i] - base[1, i])
                bar.update()
    pieces = tokenizer_of(target).convert_ids_to_tokens(good[0].ids)
    names = tuple(f"{p - width} {pieces[p]}" if n == 1 else str(p - width) for p in range(width))
    spaces = tuple(m.source for m in maps), tuple(m.target for m in maps)
    return PatchingGrid(*spaces, names, recoveries["mapped"], recoveries["own"], *base)


def _one_place_each(space: Space, rows: Tensor, places: Sequence[int]) -> Replacement:
    """Put activation r at its position in row r of a batch."""

    def values(stream: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        positions = torch.tensor(places, device=stream.device)[:, None]
        return rows.to(stream)[:, None].expand_as(stream), reading.position.to(stream.device) == positions

    return Replacement(space, values)


def _answer_tokens(model: Any, prompt: Prompt, answers: Sequence[str]) -> tuple[int, int]:
    """Find the tokens of two answers, one each after the prompt."""
    base = encode(model, [prompt])[0].ids
    tokens = []
    for answer in answers:
        whole = encode(model, [Prompt(text=prompt.content + answer)])[0].ids
        if prompt.text is None or len(whole) != len(base) + 1 or whole[:-1] != base:
            raise PromptError(
                f"patching_grid: {answer!r} is not one token after {prompt.content[-40:]!r} in {name_of(model)}; give an answer "
                "that is (often with a leading space), and prompts of raw text"
            )
        tokens.append(whole[-1])
    if tokens[0] == tokens[1]:
        raise PromptError(f"patching_grid: both answers are the token {answers[0]!r}; give different ones")
    return tokens[0], tokens[1]

"""Patch one model's activations into another, one place at a time."""

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
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.mirror import require_map_between
from xmodel_steer.interventions.steps import Reading, Replacement
from xmodel_steer.maps.affine import Map
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import name_of, tokenizer_of
from xmodel_steer.models.passes import forward, layout
from xmodel_steer.models.recorder import residuals


@dataclass(frozen=True, eq=False)
class PatchingGrid:
    """How much of the clean answer comes back when one position of one layer is patched.

    Recovery = (patched - corrupted) / (clean - corrupted) of the logit difference between the two answers (Wang et al.
    2022, arXiv 2211.00593): 0 as corrupted, 1 as clean.

    Args:
        sources: The source's space that each row's activations are mapped from.
        targets: The target's space that each row is patched at.
        tokens: Name of each position.
        mapped: Recovery with mapped source activations, ``(pairs, layers, positions)``; NaN where the position pairs
            with no token of the source.
        own: The same with the target's own clean activations: the ceiling.
        clean: Logit difference on each clean prompt.
        corrupted: The same on each corrupted prompt.
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
        """Mean over the pairs, ``(layers, positions)``; NaN where no pair has a value.

        Args:
            kind: ``"mapped"`` or ``"own"``.
        """
        table = {"mapped": self.mapped, "own": self.own}[kind]
        there = ~np.isnan(table)
        counts = there.sum(0)
        return np.where(counts > 0, np.where(there, table, 0.0).sum(0) / np.maximum(counts, 1), np.nan)

    def to_frame(self) -> Any:
        """One row per layer, position and kind, as a pandas frame."""
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
    """Patch mapped source activations of a clean prompt into the target's run on a corrupted one, place by place.

    Args:
        source: The model whose activations are mapped.
        target: The model that is patched.
        maps: One map for each row of the grid; each says from which site to which.
        clean: Prompts whose right answer is the first of ``answers``.
        corrupted: For each a prompt with as many tokens in the target, whose right answer is the second.
        answers: For each pair the two answers, one token each in the target after the prompt.

    Raises:
        PromptError: The lists do not fit, prompts of a pair or pairs have different numbers of tokens, an answer is
            not one token, or the target does not tell a clean prompt from its corrupted one.
        SpaceMismatchError: A map is not between these models.
    """
    clean_, corrupted_ = as_prompts(clean), as_prompts(corrupted)
    if not clean_ or not len(clean_) == len(corrupted_) == len(answers):
        raise PromptError(
            f"patching_grid: needs as many clean prompts as corrupted ones and answers, got {len(clean_)}, {len(corrupted_)} and {len(answers)}"
        )
    for mapping in maps:
        require_map_between(source, target, mapping, "patching_grid")
    good, bad, read = encode(target, clean_), encode(target, corrupted_), encode(source, clean_)
    lengths = {len(e.ids) for e in (*good, *bad)}
    if len(lengths) != 1:
        raise PromptError(
            f"patching_grid: the prompts have {min(lengths)} to {max(lengths)} tokens in {name_of(target)}; clean and corrupted ones "
            "must differ in words of equally many tokens, and all pairs be equally long, so that positions compare"
        )
    width = lengths.pop()
    tokens = [_answer_tokens(target, p, pair) for p, pair in zip(clean_, answers, strict=True)]

    def difference(pair: int, ids: Tensor, step: Replacement | None = None) -> np.ndarray:
        mask = torch.ones_like(ids)
        with steering(target, [step] if step else []), layout(range(len(ids)), mask.sum(1)):
            logits, _ = forward(target, ids, mask, logits="last")
        assert logits is not None
        a, b = tokens[pair]
        return (logits[:, -1, a] - logits[:, -1, b]).float().cpu().numpy()

    n = len(clean_)
    made = {kind: np.full((n, len(maps), width), np.nan) for kind in ("mapped", "own")}
    base = np.zeros((2, n))
    with progress_bar(total=n * len(maps), unit="layer", desc=f"patch {name_of(target)}") as bar:
        for i in range(n):
            (one,), (two,) = (batches(target, [e[i]], 1) for e in (good, bad))
            base[:, i] = [difference(i, b.ids)[0] for b in (one, two)]
            if not abs(base[0, i] - base[1, i]) > 1e-3:
                raise PromptError(
                    f"patching_grid: {name_of(target)} gives prompt {clean_[i].id} and its corrupted one the same logit difference "
                    f"({base[0, i]:.3f}); there is nothing to recover"
                )
            own = residuals(target, one, [m.target.site for m in maps])
            (theirs,) = batches(source, [read[i]], 1)
            stream = residuals(source, theirs, [m.source.site for m in maps])
            pairs = align(read[i].token_ends(), good[i].token_ends())
            for k, mapping in enumerate(maps):
                images = mapping.transform(stream[mapping.source.site][0][list(pairs.source)])
                for kind, places, rows in (
                    ("mapped", list(pairs.target), images),
                    ("own", list(range(width)), own[mapping.target.site][0]),
                ):
                    ids = two.ids.expand(len(places), -1)
                    patched = difference(i, ids, _one_place_each(mapping.target, rows, places))
                    made[kind][i, k, places] = (patched - base[1, i]) / (base[0, i] - base[1, i])
                bar.update()
    pieces = tokenizer_of(target).convert_ids_to_tokens(good[0].ids)
    names = tuple(f"{p - width} {pieces[p]}" if n == 1 else str(p - width) for p in range(width))
    return PatchingGrid(
        tuple(m.source for m in maps),
        tuple(m.target for m in maps),
        names,
        made["mapped"],
        made["own"],
        base[0],
        base[1],
    )


def _one_place_each(space: Space, rows: Tensor, places: Sequence[int]) -> Replacement:
    """In row r of a batch, put activation r at its place."""

    def values(own: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        at = torch.tensor(places, device=own.device)[:, None]
        return rows.to(own)[:, None].expand_as(own), reading.position.to(own.device) == at

    return Replacement(space, values)


def _answer_tokens(model: Any, prompt: Prompt, answers: Sequence[str]) -> tuple[int, int]:
    base = encode(model, [prompt])[0].ids
    found = []
    for answer in answers:
        whole = encode(model, [Prompt(text=prompt.content + answer)])[0].ids
        if prompt.text is None or len(whole) != len(base) + 1 or whole[:-1] != base:
            raise PromptError(
                f"patching_grid: {answer!r} is not one token after {prompt.content[-40:]!r} in {name_of(model)}; give an answer "
                "(often with its leading space) that is, and prompts of raw text"
            )
        found.append(whole[-1])
    if found[0] == found[1]:
        raise PromptError(
            f"patching_grid: both answers begin with the same token ({answers[0]!r}); give different ones"
        )
    return found[0], found[1]

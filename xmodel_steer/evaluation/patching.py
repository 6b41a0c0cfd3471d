"""Checks of a map on what a model does: replacement of a site while generating, and cross-model activation patching."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from xmodel_steer.activations.collecting import residuals
from xmodel_steer.core.alignment import align
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.core.prompts import Prompt, Prompts, as_prompts
from xmodel_steer.core.spaces import Space
from xmodel_steer.core.vectors import require_random
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.interventions.contexts import Reading, Replacement, steering
from xmodel_steer.interventions.mirror import mapped_source, mean_of, noise_like, require_map_between
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.moments import SplitMoments
from xmodel_steer.maps.statistics import Estimate, bootstrap_mean, holm, number, rouge_l, sign_flip_test
from xmodel_steer.models.forward import batches, encode, forward, layout, name_of, tokenizer_of
from xmodel_steer.models.generation import generate

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]


# --- replacement --------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class ReplacementArm:
    """What a model writes while one site holds other activations than its own.

    Args:
        arm: ``mapped``, ``mean`` (mean ablation) or ``random`` (all seeds together).
        kl: KL from the model's own next-token distributions, on the prompts with its own continuations, nats per token.
        rouge: ROUGE-L with the model's own continuation.
        similarity: Cosine of sentence embeddings with it.
        closer: Share of the prompts whose text is more similar to the model's own than to the source model's own.
        kl_scores: The KL on each prompt (the mean over seeds).
        texts: The continuations (of the first seed).
    """

    arm: str
    kl: Estimate
    rouge: Estimate
    similarity: Estimate
    closer: Estimate
    kl_scores: tuple[float, ...] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class ReplacementResult:
    """How well a map's images do in the place of a model's own activations.

    Args:
        source: Where the activations come from.
        target: Where they are put.
        prompts: What is continued.
        arms: ``mapped`` and its controls.
        own: The target's own continuations.
        theirs: The source's own continuations.
        corrected: For each control, p that the mapped arm's KL is not below its own (paired sign-flip test, Holm).
    """

    source: Space
    target: Space
    prompts: tuple[Prompt, ...]
    arms: Mapping[str, ReplacementArm]
    own: tuple[str, ...] = field(repr=False)
    theirs: tuple[str, ...] = field(repr=False)
    corrected: Mapping[str, float]

    def verdict(self) -> str:
        """One sentence."""
        mapped = self.arms["mapped"]
        good = all(p < 0.05 for p in self.corrected.values())
        beside = ", ".join(
            f"{name} {number(arm.kl.value, '.2f')}" for name, arm in self.arms.items() if name != "mapped"
        )
        return (
            f"{self.source} in the place of {self.target}: "
            f"{'closer to the model than every control' if good else 'no evidence that the map beats every control'}: "
            f"KL {mapped.kl:.2f} nats per token ({beside}), "
            f"ROUGE-L {number(mapped.rouge.value, '.2f')}, similarity {number(mapped.similarity.value, '.2f')}, closer to the target's text than "
            f"to the source's in {number(mapped.closer.value, '.0%')}, n = {mapped.kl.n}"
        )

    def to_frame(self) -> Any:
        """One row per arm, as a pandas frame."""
        import pandas as pd

        names = ("kl", "rouge", "similarity", "closer")
        return pd.DataFrame(
            [
                {"arm": arm.arm, "n": arm.kl.n}
                | {f"{name}{end}": getattr(getattr(arm, name), part) for name in names for end, part in _PARTS}
                for arm in self.arms.values()
            ]
        )


_PARTS = (("", "value"), ("_low", "low"), ("_high", "high"))


def replacement_check(
    source: Any,
    target: Any,
    mapping: Map,
    prompts: Prompts,
    reference: SplitMoments,
    *,
    max_new_tokens: int = 24,
    random_seeds: int = 3,
    similarity: Similarity | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> ReplacementResult:
    """Let a model write while one site holds the mapped activations of another model, which reads along.

    The paper's check of a map, across tokenizers, with the source recomputed for every new token (`mapped_source`) and
    with two controls at the same positions: the mean of the site, and noise with its mean and variance.

    Args:
        source: The model that is read.
        target: The model that writes.
        mapping: From a site of the source to one of the target.
        prompts: Raw text to continue, none of it used to fit the map.
        reference: Moments with the target site's mean and scale: those that the map was fitted on.
        max_new_tokens: Length of the continuations.
        random_seeds: Number of noise seeds.
        similarity: Similarity of two lists of texts, pair by pair; `judges.similarity` by default (83 MB by pip).
        batch_size: Prompts at a time.
        seed: The first of the noise seeds.
        progress: Show progress bars.

    Raises:
        PromptError: There are no prompts, or one is a chat.
        SpaceMismatchError: Map, moments and models do not belong together.
        ValueError: There is no random control.
    """
    items = as_prompts(prompts)
    if not items or any(p.text is None for p in items):
        raise PromptError(
            "replacement_check: needs prompts of raw text (each model has a chat template of its own, so that the two would "
            f"read different texts), got {len(items)} prompts"
        )
    if reference.target != mapping.target:
        raise SpaceMismatchError(
            f"replacement_check: the moments are of {reference.target}, the map leads to {mapping.target}; "
            "give moments.pair(...) of the map's own sites"
        )
    require_random("replacement_check", random_seeds)
    if similarity is None:
        from xmodel_steer.evaluation.judges.chats import similarity
    mean, scale = reference.train.target_mean, reference.train.target_scale
    steps: dict[str, list[Replacement]] = {
        "mapped": [mapped_source(source, target, mapping)],
        "mean": [mean_of(mapping.target, mean)],
        "random": [noise_like(mapping.target, mean, scale, seed=seed + k) for k in range(random_seeds)],
    }

    def continued(model: Any) -> list[str]:
        return generate(model, items, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)

    own, theirs = continued(target), continued(source)
    texts = [Prompt(text=p.content + text, id=p.id) for p, text in zip(items, own, strict=True)]
    settings = [[step] for group in steps.values() for step in group]
    effects = iter(side_effects(target, settings, texts, max_tokens=None, batch_size=batch_size, progress=progress))
    arms, per_prompt = {}, {}
    for name, group in steps.items():
        kl, made = [], []
        for step in group:
            effect = next(effects)
            kl.append(effect.kl / effect.tokens)
            with steering(target, step):
                made.append(continued(target))
        like_own = [similarity(texts_, own) for texts_ in made]
        like_theirs = [similarity(texts_, theirs) for texts_ in made]
        per_prompt[name] = np.stack(kl, 1).mean(1)
        arms[name] = ReplacementArm(
            name,
            bootstrap_mean(np.stack(kl, 1)),
            bootstrap_mean(np.stack([[rouge_l(a, b) for a, b in zip(t, own, strict=True)] for t in made], 1)),
            bootstrap_mean(np.stack(like_own, 1)),
            bootstrap_mean(np.stack([(a > b) + 0.5 * (a == b) for a, b in zip(like_own, like_theirs, strict=True)], 1)),
            tuple(per_prompt[name].tolist()),
            tuple(made[0]),
        )
    controls = [name for name in arms if name != "mapped"]
    p = holm([sign_flip_test(per_prompt[name] - per_prompt["mapped"]) for name in controls])
    return ReplacementResult(
        mapping.source, mapping.target, items, arms, tuple(own), tuple(theirs), dict(zip(controls, p, strict=True))
    )


# --- patching -----------------------------------------------------------------------------------
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
    *,
    progress: bool = True,
) -> PatchingGrid:
    """Patch mapped source activations of a clean prompt into the target's run on a corrupted one, place by place.

    Args:
        source: The model whose activations are mapped.
        target: The model that is patched.
        maps: One map for each row of the grid; each says from which site to which.
        clean: Prompts whose right answer is the first of ``answers``.
        corrupted: For each a prompt with as many tokens in the target, whose right answer is the second.
        answers: For each pair the two answers, one token each in the target after the prompt.
        progress: Show a progress bar.

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
    with tqdm(total=n * len(maps), unit="layer", desc=f"patch {name_of(target)}", disable=not progress, delay=2) as bar:
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

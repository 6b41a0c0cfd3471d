"""The paper's check of a map: mapped activations replace the target's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xmodel_steer.core.directions import require_random
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt, Prompts
from xmodel_steer.core.spaces import Space
from xmodel_steer.evaluation.damage import side_effects
from xmodel_steer.evaluation.overlap import rouge_l
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.mirror import mapped_source, mean_of, noise_like
from xmodel_steer.interventions.steps import Replacement
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.pairs import SplitMoments
from xmodel_steer.maps.significance import holm, sign_flip_test
from xmodel_steer.maps.statistics import Estimate, bootstrap_mean, number
from xmodel_steer.models.generation import generate

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@dataclass(frozen=True, eq=False)
class ReplacementArm:
    """A target's continuations while replacements hold one site, compared with its unchanged ones.

    Args:
        arm: ``mapped``, ``mean`` (mean ablation) or ``random`` (all seeds together).
        kl: KL from the unchanged model's next-token distributions, on prompts with its continuations, nats per token.
        rouge: ROUGE-L with the unchanged model's continuation.
        similarity: Cosine of sentence embeddings with the unchanged model's continuation.
        closer: Share of the prompts whose text is more similar to the target's continuation than to the source's.
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
    """The replacement arms of a map and of its controls.

    Args:
        source: The space that activations are mapped from.
        target: The space that they replace.
        prompts: The prompts that are continued.
        arms: ``mapped`` and its controls.
        own: The target's unchanged continuations.
        theirs: The source's continuations.
        corrected: For each control, p that the mapped arm's KL is not below the control's (paired sign-flip test, Holm).
    """

    source: Space
    target: Space
    prompts: tuple[Prompt, ...]
    arms: Mapping[str, ReplacementArm]
    own: tuple[str, ...] = field(repr=False)
    theirs: tuple[str, ...] = field(repr=False)
    corrected: Mapping[str, float]

    def __repr__(self) -> str:
        ends = f"{self.source.model} {self.source.site} → {self.target.model} {self.target.site}"
        return f"ReplacementResult({ends}, {', '.join(self.arms)}, {len(self.prompts)} prompts)"

    def verdict(self) -> str:
        """Summarise the result in one sentence."""
        mapped = self.arms["mapped"]
        good = all(p < 0.05 for p in self.corrected.values())
        controls = ", ".join(
            f"{name} {number(arm.kl.value, '.2f')}" for name, arm in self.arms.items() if name != "mapped"
        )
        return (
            f"{self.source} in the place of {self.target}: "
            f"{'closer to the model than every control' if good else 'no evidence that the map beats every control'}: "
            f"KL {mapped.kl:.2f} nats per token ({controls}), "
            f"ROUGE-L {number(mapped.rouge.value, '.2f')}, similarity {number(mapped.similarity.value, '.2f')}, closer to the target's text than "
            f"to the source's in {number(mapped.closer.value, '.0%')}, n = {mapped.kl.n}"
        )

    def to_frame(self) -> Any:
        """Make a pandas frame with one row per arm."""
        import pandas as pd

        names, parts = ("kl", "rouge", "similarity", "closer"), {"": "value", "_low": "low", "_high": "high"}
        return pd.DataFrame(
            [
                {"arm": arm.arm, "n": arm.kl.n}
                | {f"{name}{end}": getattr(getattr(arm, name), part) for name in names for end, part in parts.items()}
                for arm in self.arms.values()
            ]
        )


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
) -> ReplacementResult:
    """Generate while one site holds another model's mapped activations; compare with controls.

    This is the paper's check of a map, across tokenizers: the source reads the target's text token by token
    (`mapped_source`). Two controls act at the same positions: the site's mean, and noise of its mean and variance.

    Args:
        source: The model that is read.
        target: The model that writes.
        mapping: A map from a site of the source to one of the target.
        prompts: Raw text to continue, none of it used to fit the map.
        reference: The moments that the map was fitted on, for the target site's mean and scale.
        max_new_tokens: Length of the continuations.
        random_seeds: Number of noise seeds.
        similarity: Similarity of two lists of texts, pair by pair; by default the cosine of sentence embeddings (83 MB by pip).
        batch_size: Prompts at a time.
        seed: The first of the noise seeds.

    Raises:
        PromptError: There are no prompts, or one is a chat.
        SpaceMismatchError: Map, moments and models are of different spaces.
        ValueError: There is no random control.
    """
    items = as_prompts(prompts)
    if not items or any(p.text is None for p in items):
        raise PromptError(
            "replacement_check: needs prompts of raw text (the models' chat templates differ, so that the two would "
            f"read different texts), got {len(items)} prompts"
        )
    if reference.target != mapping.target:
        raise SpaceMismatchError(
            f"replacement_check: the moments are of {reference.target}, the map leads to {mapping.target}; "
            "give moments.pair(...) of the map's own sites"
        )
    require_random("replacement_check", random_seeds)
    if similarity is None:
        from xmodel_steer.evaluation.judges.sentences import similarity
    mean, scale = reference.train.target_mean, reference.train.target_scale
    steps: dict[str, list[Replacement]] = {
        "mapped": [mapped_source(source, target, mapping)],
        "mean": [mean_of(mapping.target, mean)],
        "random": [noise_like(mapping.target, mean, scale, seed=seed + k) for k in range(random_seeds)],
    }

    def continued(model: Any) -> list[str]:
        return generate(model, items, max_new_tokens=max_new_tokens, batch_size=batch_size)

    target_texts, source_texts = continued(target), continued(source)
    texts = [Prompt(text=p.content + text, id=p.id) for p, text in zip(items, target_texts, strict=True)]
    settings = [[step] for group in steps.values() for step in group]
    effects = iter(side_effects(target, settings, texts, max_tokens=None, batch_size=batch_size))
    arms, per_prompt = {}, {}
    for name, group in steps.items():
        kl, written = [], []
        for step in group:
            effect = next(effects)
            kl.append(effect.kl / effect.tokens)
            with steering(target, step):
                written.append(continued(target))
        rouge = [[rouge_l(a, b) for a, b in zip(seed_texts, target_texts, strict=True)] for seed_texts in written]
        like_target, like_source = ([similarity(t, others) for t in written] for others in (target_texts, source_texts))
        closer = [(a > b) + 0.5 * (a == b) for a, b in zip(like_target, like_source, strict=True)]
        scores = {"kl": kl, "rouge": rouge, "similarity": like_target, "closer": closer}
        estimates = {key: bootstrap_mean(np.stack(rows, 1)) for key, rows in scores.items()}
        per_prompt[name] = np.stack(kl, 1).mean(1)
        kl_scores = tuple(per_prompt[name].tolist())
        arms[name] = ReplacementArm(name, kl_scores=kl_scores, texts=tuple(written[0]), **estimates)
    controls = [name for name in arms if name != "mapped"]
    p = holm([sign_flip_test(per_prompt[name] - per_prompt["mapped"]) for name in controls])
    corrected = dict(zip(controls, p, strict=True))
    continuations = tuple(target_texts), tuple(source_texts)
    return ReplacementResult(mapping.source, mapping.target, items, arms, *continuations, corrected)

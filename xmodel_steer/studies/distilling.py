"""Beyond linear read-outs: vectors and maps trained through the target on neutral text."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from xmodel_steer.core.alignment import align
from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import SteeringVector, inverse_of
from xmodel_steer.evaluation.damage import steered_logits
from xmodel_steer.interventions.contexts import steering, steps_of
from xmodel_steer.interventions.mirror import mapped_source
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.affine import AffineMap
from xmodel_steer.models.batching import Batch, batches, encode
from xmodel_steer.models.facts import is_bridge, name_of, tokenizer_of
from xmodel_steer.models.passes import layout
from xmodel_steer.models.tokens import special_ids

BOUND = 5.0  # nats: a larger shift of one token is cut


@dataclass(frozen=True)
class Training:
    """Settings of a training through the target.

    Args:
        steps: Number of steps, of Adam with a falling rate.
        documents: Number of general texts that train.
        texts: Texts of a step.
        tokens: Tokens read of each text.
        learning_rate: In standardised units: of a vector, over its norm and by the root of its width.
        weight: α, by which the source's shifts are multiplied.
        anchor: γ, the weight of the squared distance from the start over the squared norm.
        rank: Rank of what is added to a map.
        seed: Seed of the shuffled control, and of the map's start.
    """

    steps: int = 200
    documents: int = 96
    texts: int = 8
    tokens: int = 24
    learning_rate: float = 0.05
    weight: float = 1.0
    anchor: float = 0.1
    rank: int = 32
    seed: int = 0


def distilled(
    source: Any,
    target: Any,
    vector: SteeringVector,
    mapped: SteeringVector,
    texts: Sequence[Prompt],
    training: Training = Training(),
    *,
    shuffled: bool = False,
) -> SteeringVector:
    """Train a carried vector to shift tokens as it does in the source.

    Δ is the log-ratio of the source's distributions with and without its vector, at positions where both models have
    read the same text. The teacher is q ∝ p · exp(α Δ), with p the unsteered target's distribution (the reweighting of
    Liu et al. 2021, arXiv 2105.03023). All are distributions over the strings that are tokens of both. Minimises
    E KL(q ‖ p steered) + γ ‖v - v₀‖² / ‖v₀‖², of both signs; the standardised norm stays.

    Args:
        source: The source model.
        target: The target model; no weight is changed.
        vector: The source's vector, at the strength that shifts.
        mapped: The carried vector v₀, with its scale.
        texts: Neutral text that nothing is reported on.
        training: Settings.
        shuffled: A control: each position gets the Δ of another one.

    Raises:
        PromptError: The models' tokens share no string, or no position.
    """
    if mapped.scale is None:
        raise ValueError("distilled: the carried vector needs a scale; use with_scale")
    reads = _reads(source, target, vector, texts, training, shuffled)
    scale, start = mapped.scale.float(), mapped.direction.float() * inverse_of(mapped.scale.float())
    norm = start.norm()
    point = start.clone().requires_grad_()
    adam = torch.optim.Adam([point], lr=training.learning_rate * float(norm) / len(start) ** 0.5)
    falling = _falling(adam, training.steps)
    for read in _turns(reads, training.steps, f"distil {mapped.label}"):
        with torch.no_grad():
            plain = _logits_at(target, read, []).log_softmax(-1)
        for sign, shift in zip((1.0, -1.0), read.shifts, strict=True):
            teacher = (plain + training.weight * shift).softmax(-1)
            steered = replace(mapped, direction=point * scale)
            own = _logits_at(target, read, steps_of(steered, Add(sign))).log_softmax(-1)
            loss = -(teacher * own).sum(-1).mean() + training.anchor / 2 * ((point - start) / norm).square().sum()
            _add_slopes(loss, [point])
        _step(adam, falling)
        with torch.no_grad():
            point *= norm / point.norm()
    return replace(mapped, direction=(point * scale).detach().to(mapped.direction.dtype))


def functional_map(
    source: Any, target: Any, mapping: AffineMap, texts: Sequence[Prompt], training: Training = Training()
) -> AffineMap:
    """Train what a map lacks for the target to predict as it does.

    W + A B, of low rank in standardised coordinates, minimises the KL from the target's own next-token distributions while
    the site holds mapped activations (`mapped_source`).

    Args:
        source: The source model.
        target: The target model; no weight is changed.
        mapping: The map to begin with.
        texts: Neutral text that nothing is reported on.
        training: Settings.

    Returns:
        The map, without a score: its residuals are not what it minimises.
    """
    width = len(mapping.source_scale), len(mapping.target_scale)
    draws = torch.Generator().manual_seed(training.seed)
    first = (torch.randn(width[0], training.rank, generator=draws) / width[0] ** 0.5).requires_grad_()
    second, bias = torch.zeros(training.rank, width[1]).requires_grad_(), torch.zeros(width[1]).requires_grad_()
    inverse, scale = inverse_of(mapping.source_scale).float()[:, None], mapping.target_scale.float()
    parameters = [first, second, bias]
    adam = torch.optim.Adam(parameters, lr=training.learning_rate / 10)
    falling = _falling(adam, training.steps)

    def present() -> AffineMap:
        weight = mapping.weight + (inverse * first) @ second * scale
        return replace(mapping, weight=weight, bias=mapping.bias + bias * scale, score_test=None)

    encodings = encode(target, texts, max_tokens=training.tokens)
    parts = [encodings[i : i + training.texts] for i in range(0, len(encodings), training.texts)]
    for part in _turns(parts, training.steps, f"train a map to {name_of(target)}"):
        for batch in batches(target, part, training.texts):
            places = batch.mask.bool()
            with torch.no_grad():
                own = _logits(target, batch, [])[places].softmax(-1)
            replaced = _logits(target, batch, [mapped_source(source, target, present())])[places]
            loss = -(own * replaced.log_softmax(-1)).sum(-1).mean()
            _add_slopes(loss, parameters)
        _step(adam, falling)
    made = present()
    info = {**mapping.info, "fitter": f"{mapping.info.get('fitter')} and rank {training.rank} through the target"}
    return replace(made, weight=made.weight.detach(), bias=made.bias.detach(), info=info)


def shared_tokens(source: Any, target: Any) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Pair the ids of strings that are tokens of both models.

    Strings beyond ASCII are left out: byte-level vocabularies spell them otherwise.

    Args:
        source: The source model.
        target: The target model.

    Raises:
        PromptError: There are none.
    """

    def strings(model: Any) -> dict[str, int]:
        tokenizer = tokenizer_of(model)
        special = special_ids(tokenizer)
        plain = {
            text.replace("Ġ", " ").replace("▁", " "): i for text, i in tokenizer.get_vocab().items() if i not in special
        }
        return {text: i for text, i in plain.items() if text.isascii()}

    ours, theirs = strings(source), strings(target)
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        raise PromptError(f"{name_of(source)} and {name_of(target)} have no token in common")
    return torch.tensor([ours[text] for text in both]), torch.tensor([theirs[text] for text in both])


@dataclass(frozen=True, eq=False)
class _Read:
    """Texts of one step: where positions pair, and how the source's tokens shift there, for both signs."""

    batch: Batch
    places: tuple[Tensor, Tensor]
    shared: Tensor
    shifts: tuple[Tensor, Tensor]


def _reads(
    source: Any, target: Any, vector: SteeringVector, texts: Sequence[Prompt], training: Training, shuffled: bool
) -> list[_Read]:
    """Let the source read all texts, plain and steered."""
    ours, theirs = shared_tokens(source, target)
    draws = torch.Generator().manual_seed(training.seed)
    encoded = list(zip(*(encode(model, texts, max_tokens=training.tokens) for model in (source, target)), strict=True))
    reads = []
    for i in range(0, len(encoded), training.texts):
        part = encoded[i : i + training.texts]
        pairs = [align(a.token_ends(), b.token_ends()) for a, b in part]
        (here,), (there,) = (
            batches(model, [e[k] for e in part], len(part)) for k, model in enumerate((source, target))
        )
        if not any(map(len, pairs)):
            continue
        at = [
            [(list(batch.rows).index(row), place) for row, pair in enumerate(pairs) for place in getattr(pair, end)]
            for batch, end in ((here, "source"), (there, "target"))
        ]
        read_at, places = (tuple(torch.tensor(side).T) for side in at)
        lengths = here.mask.sum(-1)
        plain, up, down = (
            steered_logits(source, setting, here, here.rows, lengths)[read_at].float().log_softmax(-1)[:, ours]
            for setting in ([], steps_of(vector, Add(1.0)), steps_of(vector, Add(-1.0)))
        )
        order = torch.randperm(len(plain), generator=draws) if shuffled else torch.arange(len(plain))
        shifts = tuple((side - plain).clamp(-BOUND, BOUND)[order] for side in (up, down))
        reads.append(_Read(there, places, theirs, shifts))  # type: ignore[arg-type]
    if not reads:
        raise PromptError(
            "distilled: no position of the texts pairs; give longer ones, in a language that both models know"
        )
    return reads


def _turns(parts: Sequence[Any], steps: int, what: str) -> Any:
    """Yield parts in turn, with a bar."""
    with progress_bar(total=steps, unit="step", desc=what) as bar:
        for part in itertools.islice(itertools.cycle(parts), steps):
            yield part
            bar.update(1)


def _falling(adam: torch.optim.Optimizer, steps: int) -> Any:
    """Let the learning rate fall to nothing, in a line."""
    return torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / max(steps, 1))


def _add_slopes(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add a loss's gradients to those of the parameters alone, not to the models'."""
    for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = slope if parameter.grad is None else parameter.grad + slope


def _step(adam: torch.optim.Optimizer, falling: Any) -> None:
    """Move the parameters, and lower the rate."""
    adam.step()
    falling.step()
    adam.zero_grad()


def _logits_at(model: Any, read: _Read, setting: Sequence[Step]) -> Float[Tensor, "positions shared"]:
    """Run a batch with gradients, for the logits of paired positions and shared tokens."""
    if is_bridge(model):
        head = model.original_model.get_output_embeddings()
        # A bridge's component would pass the new forward on to the part inside, but not its removal.
        head = getattr(head, "original_component", head)
        weight, bias = head.weight, head.bias
    else:
        head = model.unembed
        weight, bias = head.W_U.T, head.b_U
    columns, bias = weight[read.shared], None if bias is None else bias[read.shared]
    head.forward = lambda stream: linear(stream[read.places], columns, bias)
    try:
        return _logits(model, read.batch, setting)
    finally:
        del head.forward


def _logits(model: Any, batch: Batch, setting: Sequence[Step]) -> Float[Tensor, "*rows vocabulary"]:
    """Run a batch of right-padded texts with gradients."""
    inner = model.original_model if is_bridge(model) else model
    with steering(model, setting), layout(batch.rows, batch.mask.sum(-1)):
        out = inner(batch.ids, attention_mask=batch.mask)
    return (out if isinstance(out, Tensor) else out.logits).float()

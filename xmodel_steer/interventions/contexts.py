"""Contexts inside which a model is steered.

Positions are text positions: the same with left or right padding, with the key-value cache or
without, in a batch or alone. Hooks return new tensors; leaving the block restores the model.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Site, Space, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add, Gate, Operator, Write
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention, Replacement, Step
from xmodel_steer.interventions.tracking import Tracker
from xmodel_steer.models.facts import is_bridge, name_of
from xmodel_steer.models.sites import space_of


@contextmanager
def steering(
    model: Any,
    vector: SteeringVector | Step | Sequence[SteeringVector | Step],
    *,
    operator: Operator = Add(),
    positions: Positions = "all",
) -> Iterator[Any]:
    """Inside the block, every forward pass of the model is steered.

    Args:
        model: The model to steer.
        vector: A vector of one of this model's spaces; or several, or `Intervention` and `Replacement` values that
            carry their own operator and positions. Those at one site act in the order given. With none, nothing is done.
        operator: What to do, for bare vectors.
        positions: Where in the text, for bare vectors; see `Intervention`.

    Yields:
        The model, hooked. On leaving, also by an exception, it is exactly as before.

    Raises:
        SpaceMismatchError: A vector lives in another model, or at a differently processed site.
        SiteError: On leaving, when a site did not fire although the model ran; or TransformerLens' own ``generate`` was called
            without a cache, where positions depend on where the prompt ends.

    Example:
        >>> with steering(model, vector, operator=Add(2.0)):        # doctest: +SKIP
        ...     texts = generate(model, prompts)
    """
    steps = interventions(vector, operator, positions)
    for step in steps:
        require_space_of(model, step.space, f"steering {name_of(model)}")

    def attach(writes: Sequence[tuple[Site, Write]]) -> AbstractContextManager[Any]:
        return model.hooks(
            fwd_hooks=[(site.hook_name, lambda value, hook, w=write: w(value)) for site, write in writes]
        )

    if not steps:
        yield model
        return
    inner = model.original_model if is_bridge(model) else model
    with _uncached_generate_refused(model, steps), steered(inner, steps, attach, name=name_of(model)):
        yield model


def require_space_of(model: Any, space: Space, what: str) -> None:
    """Refuse what lives in another model, or at a differently processed site.

    Raises:
        SpaceMismatchError: The space is none of this model's.
    """
    # A layer that this model does not have is as much another space as any.
    own = space_of(model, Site(min(space.site.layer, model.cfg.n_layers - 1), space.site.stream))
    require_same_space(own, space, what)


def interventions(
    vector: SteeringVector | Step | Sequence[SteeringVector | Step],
    operator: Operator,
    positions: Positions,
) -> list[Step]:
    """Give each vector its operator and positions."""
    given = (vector,) if isinstance(vector, SteeringVector | Intervention | Replacement) else tuple(vector)
    return [Intervention(v, operator, positions) if isinstance(v, SteeringVector) else v for v in given]


@contextmanager
def steered(
    inner: Any,
    steps: Sequence[Step],
    attach: Callable[[Sequence[tuple[Site, Write]]], AbstractContextManager[Any]],
    *,
    name: str,
    wrapper: Any = None,
) -> Iterator[None]:
    """Steer the forward passes of a model of any kind: what `steering` does once the spaces are checked.

    Args:
        inner: The module whose calls are the forward passes.
        steps: The interventions; those at one site act in this order.
        attach: Puts functions at sites, in their order, for as long as its context lasts.
        name: The model's name, for messages.
        wrapper: A module around the model, if its calls may go past the model's own.

    Raises:
        SiteError: On leaving, when a site did not fire although the model ran.
    """
    tracker = Tracker()
    fired: set[Site] = set()

    def writer(step: Step) -> Write:
        edit = step.operator.prepare(step.vector) if isinstance(step, Intervention) else None
        gate = _opened(step.gate, tracker) if isinstance(step, Intervention) and step.gate is not None else None
        # To know the text, a replacement sees every pass; so does a gate that is read elsewhere in it.
        sees_all = isinstance(step, Replacement) or (step.gate is not None and step.gate.positions is not None)

        def write(value: Tensor) -> Tensor:
            fired.add(step.space.site)
            where = tracker.selected(step.positions, step.prompts, value)
            if not sees_all and not bool(where.any()):
                return value
            rows = value.to(torch.float32)
            if isinstance(step, Replacement):
                edited, given = step.values(rows, tracker.reading())
                return torch.where((where if given is None else where & given)[..., None], edited.to(value), value)
            assert edit is not None
            if gate is not None:
                where &= gate(rows)
            return torch.where(where[..., None], edit(rows).to(value), value) if bool(where.any()) else value

        return write

    writes = [(step.space.site, writer(step)) for step in steps]
    called = (inner,) if wrapper is None or wrapper is inner else (inner, wrapper)
    handles = [module.register_forward_pre_hook(tracker.before, with_kwargs=True) for module in called]
    handles += [module.register_forward_hook(tracker.after, always_call=True) for module in called]
    try:
        with _generate_tells_prompts(inner, tracker), attach(writes):
            yield
    finally:
        for handle in handles:
            handle.remove()
    silent = {site for site, _ in writes} - fired
    if tracker.passes and silent:
        raise SiteError(
            f"{name}: {', '.join(sorted(site.hook_name for site in silent))} did not fire in {tracker.passes} forward passes; "
            "nothing was steered there (did every pass stop below this layer?)"
        )


@dataclass(frozen=True, eq=False)
class _Told:
    """What a gate has read of the texts of a batch.

    Args:
        number: Of each prompt its row in the last pass; beams of a prompt have read the same.
        total: Of each row the sum of what its tokens have said, and behind them 0, of a new prompt: ``(batch + 1,)``.
        reached: The last text position that was seen, and behind them -1, ``(batch + 1,)``.
    """

    number: dict[int, int]
    total: Tensor
    reached: Tensor

    @classmethod
    def by(cls, prompts: Sequence[int], total: Tensor, reached: Tensor) -> "_Told":
        """Build the gate's state ``(batch,)`` after a pass."""
        number = {prompt: row for row, prompt in enumerate(prompts)}
        return cls(number, torch.cat([total, total.new_zeros(1)]), torch.cat([reached, reached.new_full((1,), -1)]))

    def of(self, prompts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """``total`` and ``reached`` of prompts, ``(batch,)``."""
        rows = torch.tensor([self.number.get(prompt, -1) for prompt in prompts], device=device)
        return self.total.to(device)[rows], self.reached.to(device)[rows]


def _opened(gate: Gate, tracker: Tracker) -> Callable[[Tensor], Tensor]:
    """Return a function from a stream to the rows that the gate opens.

    From ``(batch, new, d)`` to boolean ``(batch, new)``.
    """
    margin, positions = gate.prepare(), gate.positions
    if positions is None:
        return lambda rows: margin(rows) > 0
    told = _Told.by((), torch.zeros(0), torch.zeros(0, dtype=torch.long))

    def opened(rows: Tensor) -> Tensor:
        nonlocal told
        now, prompts = tracker.running(rows)
        place, length = now.position.to(rows.device), now.prompt_lengths.to(rows.device)
        own = tracker.selected(positions, None, rows) & (place < length)
        if not isinstance(positions, Tensor):
            # Text position 0 is an attention sink, which capture leaves out of means too.
            own &= (place > 0) | (length == 1)
        total, reached = told.of(prompts, rows.device)
        real = place >= 0
        begins, goes_on = (place == 0).any(1), real.any(1) & (place != 0).all(1)
        first = torch.where(real, place, torch.iinfo(place.dtype).max).amin(1)
        alone = now.rows is None and len(prompts) != len(told.number)  # rows without names, some gone
        if bool((goes_on & ((first != reached + 1) | alone)).any()):
            raise SiteError(
                f"steering: the gate of {gate.vector.label!r} has not read the text so far; inside the block, begin with an "
                "empty cache and read a batch to its end before the next"
            )
        # A mean lies on the side on which the sum of the distances from the midpoint does.
        sums = torch.where(begins, 0.0, total)[:, None] + torch.where(own, margin(rows), 0.0).cumsum(1)
        told = _Told.by(prompts, sums[:, -1].detach(), torch.where(real.any(1), place.amax(1), reached))
        return sums > 0

    return opened


@contextmanager
def _generate_tells_prompts(inner: Any, tracker: Tracker) -> Iterator[None]:
    """While Hugging Face's own generate runs, its prompts are known.

    A forward pass does not tell: without a cache every one looks like a new prompt, and beams like prompts.
    """
    if not hasattr(inner, "generation_config"):
        yield
        return
    own = inner.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        given = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        prompts = next((v for v in given if isinstance(v, Tensor)), None)
        tracker.prompts = None if prompts is None else (prompts.shape[0], prompts.shape[1])
        try:
            return own(*args, **kwargs)
        finally:
            tracker.prompts = None

    with _generating_by(inner, generate):
        yield


@contextmanager
def _uncached_generate_refused(model: Any, steps: Sequence[Step]) -> Iterator[None]:
    """TransformerLens' own generate tells nobody where its prompts end, and without a cache every pass looks like a new prompt."""
    gates = [s.gate.positions for s in steps if isinstance(s, Intervention) and s.gate is not None]
    named = [p for p in (*(s.positions for s in steps), *gates) if isinstance(p, (str, tuple)) and p != "all"]
    if not named or not hasattr(model, "generate"):
        yield
        return
    own = model.generate
    signature = inspect.signature(own)

    def generate(*args: Any, **kwargs: Any) -> Any:
        if not signature.bind(*args, **kwargs).arguments.get("use_past_kv_cache", True):
            raise SiteError(
                f"steering: positions {named[0]!r} cannot be found by the model's own generate without a cache; "
                "leave use_past_kv_cache on, or use xmodel_steer.generate(use_cache=False)"
            )
        return own(*args, **kwargs)

    with _generating_by(model, generate):
        yield


@contextmanager
def _generating_by(model: Any, generate: Callable[..., Any]) -> Iterator[None]:
    """Another function in the place of a model's ``generate``, for as long as the block lasts."""
    before = vars(model).get("generate")
    model.generate = generate
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before

"""Contexts inside which a model is steered.

Positions are text positions: the same for either padding side, with or without the key-value cache, in a batch or
alone. Hooks return new tensors; leaving the block restores the model.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Site, Space, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add, Gate, Operator, Write, placed
from xmodel_steer.interventions.positions import Positions
from xmodel_steer.interventions.steps import Intervention, Replacement, Step
from xmodel_steer.interventions.tracking import Tracker
from xmodel_steer.models.facts import is_bridge, name_of
from xmodel_steer.models.hooking import Block, attached, block, replaced
from xmodel_steer.models.sites import space_of


@contextmanager
def steering(
    model: Any,
    vector: SteeringVector | Step | Sequence[SteeringVector | Step],
    *,
    operator: Operator = Add(),
    positions: Positions = "all",
) -> Iterator[Any]:
    """Steer every forward pass of the model inside the block.

    Args:
        model: The model to steer.
        vector: A vector of one of this model's spaces (of a stack, it acts at each member), an `Intervention` or
            `Replacement`, which have their own operator and positions, or several of these. Those at one site act in
            order. An empty list changes nothing.
        operator: The operator of bare vectors.
        positions: The positions of bare vectors; see `Intervention`.

    Yields:
        The model, hooked. On leaving, also by an exception, it is exactly as before.

    Raises:
        TypeError: An argument has another type.
        SpaceMismatchError: A vector is of another model, or of a differently processed site.
        SiteError: On leaving, a site did not fire although the model ran. Or TransformerLens' own ``generate`` was called
            without a cache, and the positions depend on where the prompt ends.

    Example:
        >>> with steering(model, vector, operator=Add(2.0)):        # doctest: +SKIP
        ...     texts = generate(model, prompts)
    """
    steps = steps_of(vector, operator, positions)
    for step in steps:
        require_space_of(model, step.space, f"steering {name_of(model)}")

    def attach(writes: Sequence[tuple[Site, Write]]) -> AbstractContextManager[Any]:
        return attached(model, [(site.hook_name, write) for site, write in writes])

    if not steps:
        yield model
        return
    inner = model.original_model if is_bridge(model) else model
    with (
        steered(inner, steps, attach, name=name_of(model)) as entered,
        _uncached_generate_refused(entered, model, steps),
    ):
        yield model


def require_space_of(model: Any, space: Space, what: str) -> None:
    """Refuse a space of another model, or of a differently processed site.

    Of a stack, each member is looked at.

    Raises:
        SpaceMismatchError: The space is none of this model's.
    """
    for member in space.members:
        # A layer that this model lacks is refused like any other space.
        layer = min(member.site.layer, model.cfg.n_layers - 1)
        require_same_space(space_of(model, Site(layer, member.site.stream)), member, what)


def steps_of(
    vector: SteeringVector | Step | Sequence[SteeringVector | Step],
    operator: Operator = Add(),
    positions: Positions = "all",
) -> list[Step]:
    """List the steps of an argument; give bare vectors an operator and positions.

    Raises:
        TypeError: The argument holds another value.
    """
    values = tuple(vector) if isinstance(vector, Iterable) else (vector,)
    require_type("steering", (SteeringVector, Intervention, Replacement), *values)
    return [
        step
        for v in values
        for step in (
            [Intervention(m, operator, positions) for m in v.members()] if isinstance(v, SteeringVector) else [v]
        )
    ]


@contextmanager
def steered(
    inner: Any,
    steps: Sequence[Step],
    attach: Callable[[Sequence[tuple[Site, Write]]], AbstractContextManager[Any]],
    *,
    name: str,
    wrapper: Any = None,
) -> Iterator[Block]:
    """Steer the forward passes of any kind of model, after the spaces are checked.

    A forward pass is a call of ``inner``, or of a ``wrapper`` that may bypass it. ``attach`` puts functions at sites, in
    order, while its context lasts.

    Raises:
        SiteError: On leaving, a site did not fire although the model ran, or the model ran in other threads alone.
    """
    fired: set[Site] = set()

    def writer(step: Step) -> Write:
        edit = step.operator.prepare(step.vector) if isinstance(step, Intervention) else None
        shares = step.schedule if isinstance(step, Intervention) else (1.0,)
        table = placed(torch.tensor(shares, dtype=torch.float32))
        gate = _opened(step.gate, tracker) if isinstance(step, Intervention) and step.gate is not None else None
        # A replacement and a gate with positions read the whole text, so they see passes without a selected token too.
        sees_all = isinstance(step, Replacement) or (step.gate is not None and step.gate.positions is not None)

        def write(value: Tensor) -> Tensor:
            if not tracker.block.here:
                return value
            fired.add(step.space.site)
            where = tracker.selected(step.positions, step.prompts, value)
            if where is False and not sees_all:
                return value
            rows = value.to(torch.float32)
            if isinstance(step, Replacement):
                edited, held = step.values(rows, tracker.reading())
            else:
                assert edit is not None
                held = None if gate is None else gate(rows)
                edited = edit(rows)
                if shares != (1.0,):
                    edited = torch.lerp(rows, edited, tracker.shares(table(value))[..., None])
            where = where if held is None else held & where
            if isinstance(where, bool):
                return edited.to(value) if where else value
            return torch.where(where[..., None], edited.to(value), value)

        return write

    modules = (inner,) if wrapper is None or wrapper is inner else (inner, wrapper)
    with ExitStack() as hooks:
        tracker = Tracker(hooks.enter_context(block()))
        writes = [(step.space.site, writer(step)) for step in steps]
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(tracker.before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(tracker.after, always_call=True).remove)
        hooks.enter_context(_generate_tells_prompts(inner, tracker))
        hooks.enter_context(attach(writes))
        yield tracker.block
    _require_fired(name, tracker, {site for site, _ in writes} - fired)


def _require_fired(name: str, tracker: Tracker, silent: set[Site]) -> None:
    """Refuse a block in which nothing was steered although the model ran."""
    if tracker.foreign and not tracker.passes:
        raise SiteError(
            f"{name}: nothing was steered; the model ran {tracker.foreign} times in other threads or tasks and never in the one "
            "that entered the block. Enter steering in the thread that runs the model, or start it with asyncio.to_thread, "
            "or contextvars.copy_context().run"
        )
    if tracker.passes and silent:
        raise SiteError(
            f"{name}: {', '.join(sorted(site.hook_name for site in silent))} did not fire in {tracker.passes} forward passes; "
            "nothing was steered there (did every pass stop below this layer?)"
        )


@dataclass(frozen=True, eq=False)
class _GateState:
    """The margins that a gate with positions has read in a batch's texts."""

    number: dict[int, int]  # each prompt's row in the last pass; beams of a prompt have read the same
    total: Tensor  # sum of the margins read in each row, then 0 for a new prompt: (batch + 1,)
    reached: Tensor  # last text position seen in each row, then -1 for a new prompt: (batch + 1,)

    @classmethod
    def after(cls, prompts: Sequence[int], total: Tensor, reached: Tensor) -> "_GateState":
        """Build the gate's state after a pass, from tensors ``(batch,)``."""
        number = {prompt: row for row, prompt in enumerate(prompts)}
        return cls(number, torch.cat([total, total.new_zeros(1)]), torch.cat([reached, reached.new_full((1,), -1)]))

    def of(self, prompts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Look up ``total`` and ``reached`` of prompts, ``(batch,)``."""
        rows = torch.tensor([self.number.get(prompt, -1) for prompt in prompts], device=device)
        return self.total.to(device)[rows], self.reached.to(device)[rows]


def _opened(gate: Gate, tracker: Tracker) -> Callable[[Tensor], Tensor]:
    """Return a function from streams ``(batch, new, d)`` to opened rows, ``(batch, new)``."""
    margin, positions = gate.prepare(), gate.positions
    if positions is None:
        return lambda rows: margin(rows) > 0
    unread = _GateState.after((), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    key = object()

    def opened(rows: Tensor) -> Tensor:
        state = tracker.block.recall(key, unread)
        # 1. Select the new tokens that the gate reads: at its positions, inside the prompt.
        now, prompts = tracker.running(rows)
        place, length = now.position.to(rows.device), now.prompt_lengths.to(rows.device)
        read = tracker.selected(positions, None, rows) & (place < length)
        if not isinstance(positions, Tensor):
            # Text position 0 is an attention sink, which capture leaves out of means too.
            read &= (place > 0) | (length == 1)
        # 2. Recall each prompt's sum, and check that its text continues exactly where the last pass ended.
        total, reached = state.of(prompts, rows.device)
        real = place >= 0
        begins = (place == 0).any(1)
        continues = real.any(1) & ~begins
        first = torch.where(real, place, torch.iinfo(place.dtype).max).amin(1)
        unknown = now.rows is None and len(prompts) != len(state.number)  # rows have left, nobody knows which
        if bool((continues & ((first != reached + 1) | unknown)).any()):
            raise SiteError(
                f"steering: the gate of {gate.vector.label!r} has not read the text so far; inside the block, begin with an "
                "empty cache and read a batch to its end before the next"
            )
        # 3. Add the new margins; a text that begins starts from 0. The mean's sign is the sum's, so no count is kept.
        sums = torch.where(begins, 0.0, total)[:, None] + torch.where(read, margin(rows), 0.0).cumsum(1)
        # 4. Keep sum and position for the next pass; each token opens by what was read up to it.
        reached = torch.where(real.any(1), place.amax(1), reached)
        tracker.block.remember(key, _GateState.after(prompts, sums[:, -1].detach(), reached))
        return sums > 0

    return opened


def _generate_tells_prompts(inner: Any, tracker: Tracker) -> AbstractContextManager[None]:
    """Tell the tracker the prompts of Hugging Face's own generate while it runs.

    A forward pass does not: without a cache each one looks like a new prompt, and beams look like prompts.
    """
    if not hasattr(inner, "generation_config"):
        return nullcontext()

    def telling(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            inputs = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
            with tracker.generating(next((v for v in inputs if isinstance(v, Tensor)), None)):
                return original(*args, **kwargs)

        return generate

    return replaced(tracker.block, inner, "generate", telling)


def _uncached_generate_refused(entered: Block, model: Any, steps: Sequence[Step]) -> AbstractContextManager[None]:
    """Refuse TransformerLens' own generate without a cache, where positions depend on the prompt's end.

    It does not report where its prompts end, and without a cache each pass looks like a new prompt.
    """
    gates = [s.gate.positions for s in steps if isinstance(s, Intervention) and s.gate is not None]
    named = [p for p in (*(s.positions for s in steps), *gates) if isinstance(p, (str, tuple)) and p != "all"]
    named += ["generated" for s in steps if isinstance(s, Intervention) and s.schedule != (1.0,)]
    if not named or not hasattr(model, "generate"):
        return nullcontext()

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not inspect.signature(original).bind(*args, **kwargs).arguments.get("use_past_kv_cache", True):
                raise SiteError(
                    f"steering: positions {named[0]!r} cannot be found by the model's own generate without a cache; "
                    "leave use_past_kv_cache on, or use xmodel_steer.generate(use_cache=False)"
                )
            return original(*args, **kwargs)

        return wraps(original)(generate)

    return replaced(entered, model, "generate", refusing)

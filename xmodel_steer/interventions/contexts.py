"""Writing to the residual stream: operators, and the context manager that puts them in place.

Positions are text positions: the same with left or right padding, with the key-value cache or
without, in a batch or alone. Hooks return new tensors; leaving the block restores the model.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from xmodel_steer.core.errors import SiteError
from xmodel_steer.core.spaces import Site, Space, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.models.forward import CACHES, LAYOUT, READING, counts_tokens, is_bridge, name_of, space_of

Where = Literal["all", "prompt", "generated", "last"]
Positions = Where | Sequence[Where] | Tensor
# A function from rows (..., d) to new rows; it never writes into those it was given.
Edit = Callable[[Tensor], Tensor]
# The same for a whole residual stream (batch, new tokens, d): it edits the rows that are meant.
Write = Callable[[Tensor], Tensor]


@runtime_checkable
class Operator(Protocol):
    """What to do at a site: a new residual stream from the old one and a vector."""

    def prepare(self, vector: SteeringVector) -> Edit:
        """The edit for one vector; it works in float32."""
        ...


@dataclass(frozen=True)
class Add:
    """x → x + strength · v (Turner et al. 2023, arXiv 2308.10248; the paper's steering).

    Args:
        strength: In units of the vector; negative steers away. At 0 nothing is touched.
    """

    strength: float = 1.0

    def prepare(self, vector: SteeringVector) -> Edit:
        """The edit for one vector."""
        step = self.strength * vector.direction.to(torch.float32)
        return lambda rows: rows + step.to(rows.device) if self.strength else rows


@dataclass(frozen=True)
class Ablate:
    """x → x - (x·v) v / |v|²: nothing is left along v (Arditi et al. 2024, arXiv 2406.11717)."""

    def prepare(self, vector: SteeringVector) -> Edit:
        """The edit for one vector; refuses a zero one."""
        if vector.norm() == 0:
            raise ValueError(f"Ablate: {vector.label!r} is a zero vector, it has no direction to remove")
        unit = (vector.direction.to(torch.float64) / vector.norm()).to(torch.float32)
        return lambda rows: rows - (rows @ unit.to(rows.device))[..., None] * unit.to(rows.device)


@dataclass(frozen=True, eq=False)
class Gate:
    """Act only on rows of one class, or only in texts of one class (conditional steering: Lee et al. 2024, arXiv 2409.05907).

    With w the vector's covector (``SteeringVector.covector``), a row x is of the class on whose side of the midpoint of the two
    class means its projection w·x lies; on the midpoint it is of neither. Rows of the other class stay bit-equal.

    With ``positions`` the text is told, not the row: by the mean projection of these of the prompt's tokens. As each token of
    the text knows those before it only, it goes by what has been read up to and with it; before the first of them the gate is shut.

    Args:
        vector: Tells the classes apart: a difference of means, native or transported, with its scale. It is read at the
            site that is written to, before anything is written there by the same intervention.
        side: The class that is acted on.
        positions: At which of the prompt's tokens it is read, as for `Intervention`; by default at the row that is to be written.
            Text position 0, an attention sink, is read only where a mask names it; tokens of a chat template are read.

    Example:
        >>> Intervention(vector, Add(2.0), "last", gate=Gate(harmful, "positive"))        # doctest: +SKIP
        >>> Intervention(vector, Add(2.0), gate=Gate(harmful, positions="prompt"))        # doctest: +SKIP
    """

    vector: SteeringVector
    side: Literal["positive", "negative"] = "positive"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        if self.side not in ("positive", "negative"):
            raise ValueError(f"Gate: side must be 'positive' or 'negative', got {self.side!r}")
        if self.positions is not None:
            _check_positions(self.positions)

    def prepare(self) -> Callable[[Tensor], Tensor]:
        """The function from rows ``(..., d)`` to how far each lies on the side that is acted on; below 0 it is of the other class."""
        w, high, low = _classes(self.vector, "Gate")
        side, middle = (1.0 if (self.side == "positive") == (high > low) else -1.0), (high + low) / 2
        return lambda rows: side * (rows @ w.to(rows.device) - middle)


def _classes(vector: SteeringVector, what: str) -> tuple[Tensor, float, float]:
    """The covector in float32, and the projections of the positive and of the negative class mean on it."""
    if vector.positive_mean is None or vector.negative_mean is None:
        raise ValueError(
            f"{what}: {vector.label!r} has no class means; use a difference of means, native or transported"
        )
    w = vector.covector()
    high, low = (float(w @ mean.to(torch.float64)) for mean in (vector.positive_mean, vector.negative_mean))
    return w.to(torch.float32), high, low


@dataclass(frozen=True)
class Clamp:
    """Move the projection on the direction to a class mean, where a gate says so.

    With w the vector's covector (``SteeringVector.covector``, w·v = 1 in standardised
    coordinates), p = w·x, p₊ and p₋ the projections of the class means:
    x → x + overshoot · (p_to - p) v where p lies on the other class's side of the midpoint
    (p₊ + p₋) / 2; other rows stay bit-equal.

    Args:
        to: The class whose mean the projection moves to.
        gate: Only move rows on the other class's side; False moves every row.
        overshoot: 1 lands on the mean, more goes beyond it.
    """

    to: Literal["positive", "negative"] = "negative"
    gate: bool = True
    overshoot: float = 1.0

    def __post_init__(self) -> None:
        if self.to not in ("positive", "negative"):
            raise ValueError(f"Clamp: to must be 'positive' or 'negative', got {self.to!r}")

    def prepare(self, vector: SteeringVector) -> Edit:
        """The edit for one vector, which needs its class means and its scale."""
        w, high, low = _classes(vector, "Clamp")
        goal, v = (high if self.to == "positive" else low), vector.direction.to(torch.float32)
        other = Gate(vector, "negative" if self.to == "positive" else "positive").prepare()

        def edit(rows: Tensor) -> Tensor:
            gap = goal - rows @ w.to(rows.device)
            moved = rows + (self.overshoot * gap)[..., None] * v.to(rows.device)
            return torch.where((other(rows) > 0)[..., None], moved, rows) if self.gate else moved

        return edit


@dataclass(frozen=True, eq=False)
class Intervention:
    """A vector, what to do with it, and at which positions.

    Args:
        vector: The direction; its space says at which site of which model.
        operator: `Add`, `Ablate` or `Clamp`.
        positions: ``"all"``: every token of the text. ``"prompt"``: the prompt's tokens.
            ``"generated"``: the tokens after it. ``"last"``: the prompt's last token. Several of
            them: a tuple, such as ``("last", "generated")``. Or a boolean mask over text
            positions, ``(tokens,)`` or ``(prompts, tokens)``, false beyond its end. In a plain forward
            pass the whole text is the prompt.
        prompts: Steer only these prompts, by their number in the list that is passed to `generate`
            or `capture` (in a plain forward pass: rows of the batch); all of them by default.
            One batch can then hold many arms.
        gate: Steer only rows, or texts, of a class that another vector of this site tells; all by default.

    Raises:
        SpaceMismatchError: The gate's vector lives elsewhere.
    """

    vector: SteeringVector
    operator: Operator = Add()
    positions: Positions = "all"
    prompts: frozenset[int] | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        _check_positions(self.positions)
        if self.gate is not None:
            require_same_space(self.space, self.gate.vector.space, "gate")

    @property
    def space(self) -> Space:
        """Where it acts."""
        return self.vector.space


@dataclass(frozen=True, eq=False)
class Reading:
    """What a forward pass reads.

    Args:
        ids: The new tokens.
        position: The text position of each, -1 at padding.
        rows: Which prompt each row is, where that is known. In a decode rows whose texts have ended leave the batch.
    """

    ids: Int[Tensor, "batch new"]
    position: Int[Tensor, "batch new"]
    rows: tuple[int, ...] | None = None


# From rows (batch, new, d) in float32 and what is read: new rows, and where they hold (None: everywhere).
Writer = Callable[[Tensor, Reading], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Replacement:
    """Put other activations in the place of a site's: x → what a function gives for what is read.

    Args:
        space: The site of the model that is written to.
        values: Called in every forward pass with the site's rows ``(batch, new, d)`` and the `Reading`; gives new rows,
            and where they hold: elsewhere the model's own stay. See `replacement` for the mapped activations of another
            model, a mean, and noise.
        positions: Where in the text, as for `Intervention`.
        prompts: In which prompts, as for `Intervention`.
    """

    space: Space
    values: Writer
    positions: Positions = "all"
    prompts: frozenset[int] | None = None

    def __post_init__(self) -> None:
        _check_positions(self.positions)


Step = Intervention | Replacement


def _check_positions(positions: Positions) -> None:
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2):
            raise ValueError(
                f"positions: a mask must be boolean, (tokens,) or (prompts, tokens), "
                f"got {positions.dtype} {tuple(positions.shape)}"
            )
        return
    names = (positions,) if isinstance(positions, str) else tuple(positions)
    wrong = [name for name in names if name not in ("all", "prompt", "generated", "last")]
    if wrong or not names:
        raise ValueError(
            f"positions: must be 'all', 'prompt', 'generated', 'last', several of them, or a boolean mask; got {positions!r}"
        )


@dataclass
class _Pass:
    """What the forward pass that is running is about; set before it by a pre-hook."""

    position: Tensor  # text position of each new token, -1 at padding: (batch, new)
    prompt_lengths: Tensor  # (batch, 1)
    rows: tuple[int, ...] | None
    ids: Tensor  # the new tokens


class _Tracker:
    """Works out text positions of every forward pass from its mask and cache."""

    def __init__(self) -> None:
        self.now: _Pass | None = None
        self.passes = 0
        self.prompts: tuple[int, int] | None = None  # how many, how wide: while Hugging Face's generate runs
        self._prompt_lengths: Tensor | None = None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook, on the Hugging Face model inside a bridge or on a HookedTransformer."""
        given = self._arguments(module, args, kwargs)
        inputs = (given.get("input_ids"), given.get("inputs_embeds"), given.get("input"))
        ids = next((v for v in inputs if isinstance(v, Tensor)), None)
        self.now = None
        if ids is None:
            return
        if ids.ndim == 1:  # TransformerLens takes a bare row of tokens
            ids = ids[None]
        batch, new = ids.shape[:2]
        called, told = READING.get() or (None, None)
        mask = told if called is module else given.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, new, dtype=torch.long, device=ids.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise SiteError(
                f"steering: needs an attention mask of shape (batch, tokens) to know text positions, got {came}; "
                "give such a one, and leave generate its default cache (a static one makes other masks)"
            )
        if mask.shape[1] == new and called is not module:
            mask = torch.cat([_past_mask(given, batch, ids.device).to(mask), mask], 1)
        mask = mask.long()
        position = torch.where(mask.bool(), mask.cumsum(1) - 1, -1)[:, -new:]
        known = LAYOUT.get()
        first = mask.shape[1] == new
        if known is not None and len(known.rows) != batch:
            known = None
        lengths = self._prompt_lengths
        if known is not None and known.prompt_lengths is not None:
            lengths = known.prompt_lengths.to(ids.device)
        elif self.prompts is not None:
            # What is to come of a prompt that is read in chunks is real: a decode is padded on the left.
            width = self.prompts[1]
            lengths = mask[:, :width].sum(1) + max(0, width - mask.shape[1])
        elif first:
            lengths = mask.sum(1)
        elif lengths is None or len(lengths) != batch:
            lengths = mask[:, :-new].sum(1)  # the cache came from outside this block
        self._prompt_lengths = lengths
        rows = known.rows if known else None
        if rows is None and self.prompts is not None:  # beams and samples of one prompt stand together
            rows = tuple(row * self.prompts[0] // batch for row in range(batch))
        self.now = _Pass(position, lengths[:, None], rows, ids)
        self.passes += 1

    @staticmethod
    def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, also those that were given by position."""
        if not args:
            return kwargs
        signature = inspect.signature(module.forward)
        bound = signature.bind_partial(*args, **kwargs)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        return {**bound.arguments, **bound.arguments.get(rest, {})}

    def after(self, *_: Any) -> None:
        """Forward hook: what was known of this pass says nothing about another."""
        self.now = None

    def reading(self) -> Reading:
        """What the pass that is running reads."""
        assert self.now is not None
        if self.now.ids.ndim != 2:
            raise SiteError("steering: a replacement needs token ids to know the text, the model was given embeddings")
        return Reading(self.now.ids, self.now.position, self.now.rows)

    def running(self, like: Tensor) -> tuple[_Pass, tuple[int, ...]]:
        """The pass that a residual stream belongs to, and which prompt each row is, or else its number."""
        now = self.now
        if now is None or now.position.shape != like.shape[:2]:
            raise SiteError(
                "steering: a forward pass went round the model's own call, so that text positions are unknown; "
                "call the model itself, or xs.generate"
            )
        return now, tuple(range(len(now.position))) if now.rows is None else now.rows

    def selected(self, positions: Positions, prompts: frozenset[int] | None, like: Tensor) -> Tensor:
        """Which of the new tokens are at positions of prompts: boolean ``(batch, new)``."""
        now, rows = self.running(like)
        place, length = now.position.to(like.device), now.prompt_lengths.to(like.device)
        real = place >= 0
        if prompts is not None:
            real &= torch.tensor([row in prompts for row in rows], device=like.device)[:, None]
        if isinstance(positions, Tensor):
            mask = positions.to(like.device)
            if mask.ndim == 2:
                if max(rows) >= len(mask):
                    raise ValueError(f"positions: the mask has {len(mask)} rows, prompt {max(rows)} has none")
                mask = mask[torch.tensor(rows, device=like.device)]
            else:
                mask = mask.expand(len(place), -1)
            inside = real & (place < mask.shape[1])
            return inside & mask.gather(1, place.clamp(0, mask.shape[1] - 1))
        chosen = torch.zeros_like(real)
        for name in (positions,) if isinstance(positions, str) else positions:
            chosen |= {
                "all": real,
                "prompt": real & (place < length),
                "generated": real & (place >= length),
                "last": real & (place == length - 1),
            }[name]
        return chosen


def _past_mask(given: dict[str, Any], batch: int, device: torch.device) -> Tensor:
    """Return the mask of the tokens that are in the cache already, from the arguments of a call.

    Raises:
        SiteError: What was given holds earlier tokens, and does not say how many.
    """
    if given.get("past_kv_cache") is not None:  # HookedTransformer's
        return given["past_kv_cache"].previous_attention_mask
    length = 0
    for name, value in given.items():
        if value is None or not (name in _CACHE_NAMES or hasattr(value, "get_seq_length")):
            continue
        if counts_tokens(value):
            length = max(length, int(value.get_seq_length()))
        elif not _is_empty(value):
            raise SiteError(
                f"steering: cannot tell how many tokens the {type(value).__name__} holds that was given as {name}=; give "
                "an attention mask over the whole text, one of transformers' caches that count tokens, or use xs.generate"
            )
    return torch.ones(batch, length, dtype=torch.long, device=device)


#: Whatever is given under these names was read before.
_CACHE_NAMES = {*CACHES, "past_key_value", "past", "layer_past", "mems", "memory", "inference_params"}


def _is_empty(cache: Any) -> bool:
    """Tell whether a cache that does not count tokens has read none."""
    if isinstance(cache, tuple | list | dict):
        return len(cache) == 0
    try:
        return not cache.has_previous_state()
    except (AttributeError, ValueError, TypeError):
        return False


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
    tracker = _Tracker()
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
        """What the rows of a pass, ``(batch,)``, leave."""
        number = {prompt: row for row, prompt in enumerate(prompts)}
        return cls(number, torch.cat([total, total.new_zeros(1)]), torch.cat([reached, reached.new_full((1,), -1)]))

    def of(self, prompts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """``total`` and ``reached`` of prompts, ``(batch,)``."""
        rows = torch.tensor([self.number.get(prompt, -1) for prompt in prompts], device=device)
        return self.total.to(device)[rows], self.reached.to(device)[rows]


def _opened(gate: Gate, tracker: _Tracker) -> Callable[[Tensor], Tensor]:
    """The function from a residual stream ``(batch, new, d)`` to whether each of its rows is acted on: boolean ``(batch, new)``."""
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
def _generate_tells_prompts(inner: Any, tracker: _Tracker) -> Iterator[None]:
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

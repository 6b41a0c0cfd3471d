"""Steering by hand in a notebook: a prompt, a vector and a strength, and what the model then writes.

The first half knows no widget: what was chosen (`Choice`), what it is in library calls, and what is
to be seen after every forward pass (`watch`). The second half, `Explorer`, shows that with ipywidgets.
"""

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from html import escape
from typing import Any, get_args

import torch
from torch import Tensor

from xmodel_steer.core.errors import PromptError, SpaceMismatchError, XModelSteerError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import SteeringVector, random_like
from xmodel_steer.figures.layers import COLOURS
from xmodel_steer.interventions.contexts import Add, Where, require_space_of, steering
from xmodel_steer.models.forward import context_length, name_of, tokenizer_of
from xmodel_steer.models.generation import Written, stream
from xmodel_steer.recipe.results import TransferResult


@dataclass(frozen=True, eq=False)
class Option:
    """A vector that can be chosen.

    Args:
        name: What it is called: ``mapped``, or the caller's name for it.
        vector: The vector.
        code: An expression that gives it, in terms of what the explorer was given.
        imports: Lines that the expression needs.
    """

    name: str
    vector: SteeringVector
    code: str
    imports: tuple[str, ...] = ()

    @property
    def site(self) -> Site:
        """Where the vector acts."""
        return self.vector.space.site


@dataclass(frozen=True)
class Choice:
    """What is to be compared: one prompt, steered and not.

    Args:
        prompt: What the model continues, or with ``chat`` what the user says to it.
        strength: Of `Add`; negative steers away.
        positions: Where in the text to steer; see `Intervention`.
        max_new_tokens: Number of tokens to add.
        chat: Render the prompt as a user's message, with the model's chat template.

    Raises:
        PromptError: The prompt is empty.
    """

    prompt: str
    strength: float = 1.0
    positions: Where = "all"
    max_new_tokens: int = 40
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PromptError("The prompt is empty: write something for the model to continue.")

    def asked(self) -> Prompt:
        """The prompt as the library takes it."""
        return Prompt.of([{"role": "user", "content": self.prompt}] if self.chat else self.prompt)

    def code(self, option: Option, model: str = "model") -> str:
        """The library calls that give the two texts.

        Args:
            option: The vector.
            model: An expression that gives the model.
        """
        prompt = f'[{{"role": "user", "content": {self.prompt!r}}}]' if self.chat else repr(self.prompt)
        settings = f"max_new_tokens={self.max_new_tokens}"
        lines = [
            "import xmodel_steer as xs",
            *option.imports,
            "",
            f"prompt = {prompt}",
            f"with xs.steering({model}, {option.code}, operator=xs.Add({self.strength!r}), positions={self.positions!r}):",
            f"    (steered,) = xs.generate({model}, [prompt], {settings})",
            f"(unsteered,) = xs.generate({model}, [prompt], {settings})",
            'print(f"steered:\\n{steered}\\n\\nunsteered:\\n{unsteered}")',
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class NextToken:
    """A candidate for the first new token, with its probability in both models."""

    token: str
    unsteered: float
    steered: float


@dataclass(frozen=True)
class View:
    """What is to be seen after a forward pass.

    Args:
        steered: What the steered model has written so far.
        unsteered: What the model itself has written so far.
        next_tokens: The likeliest first tokens, once both have begun.
    """

    steered: str = ""
    unsteered: str = ""
    next_tokens: tuple[NextToken, ...] = ()


def written(model: Any, choice: Choice, vector: SteeringVector | None = None) -> Iterator[Written]:
    """The model's continuation token by token, steered by a vector or as it is.

    The hooks are on the model only while a token is computed: between two tokens, and
    wherever this is interrupted or given up, the model is as it was.

    Args:
        model: A TransformerLens model.
        choice: The prompt and how to steer.
        vector: A vector of one of the model's spaces; None steers nothing.

    Yields:
        The text so far, with the logits of its newest token; the last text is that of `generate`
        under the same `steering`.

    Raises:
        PromptError: The model cannot read the prompt, or has no room for the new tokens.
        SpaceMismatchError: The vector lives in another space.
    """
    tokens = stream(model, choice.asked(), max_new_tokens=choice.max_new_tokens)
    while True:
        hooked = (
            steering(model, vector, operator=Add(choice.strength), positions=choice.positions)
            if vector is not None
            else nullcontext()
        )
        with hooked:
            token = next(tokens, None)
        if token is None:
            return
        yield token


def watch(model: Any, choice: Choice, vector: SteeringVector, *, top: int = 8) -> Iterator[View]:
    """The steered and the unsteered continuation, token by token in turn; the steered one begins.

    Args:
        model: A TransformerLens model.
        choice: The prompt and how to steer.
        vector: A vector of one of the model's spaces.
        top: How many candidates for the first token to show.

    Yields:
        All that is to be seen, after every forward pass.

    Raises:
        PromptError: The model cannot read the prompt, or has no room for the new tokens.
        SpaceMismatchError: The vector lives in another space.
    """
    running = {"steered": written(model, choice, vector), "unsteered": written(model, choice)}
    texts, first = dict.fromkeys(running, ""), {}
    candidates: tuple[NextToken, ...] = ()
    while running:
        for name, tokens in list(running.items()):
            token = next(tokens, None)
            if token is None:
                del running[name]
                continue
            texts[name] = token.text
            if name not in first:
                first[name] = token.logits
                if len(first) == 2:
                    candidates = _next_tokens(model, first["unsteered"], first["steered"], top)
            yield View(texts["steered"], texts["unsteered"], candidates)


def _next_tokens(model: Any, before: Tensor, after: Tensor, top: int) -> tuple[NextToken, ...]:
    """The likeliest under either, by the larger of both probabilities."""
    unsteered, steered = (logits.float().softmax(-1) for logits in (before, after))
    best = torch.maximum(unsteered, steered).topk(min(top, len(unsteered))).indices.tolist()
    tokenizer = tokenizer_of(model)
    return tuple(NextToken(tokenizer.decode([i]), float(unsteered[i]), float(steered[i])) for i in best)


def options_of(model: Any, vectors: Any, name: str = "vectors") -> tuple[Option, ...]:
    """The vectors that can be chosen for a model.

    Args:
        model: A TransformerLens model.
        vectors: What `explore` was given: a result, a vector, several, or a mapping.
        name: An expression that gives it.

    Raises:
        SpaceMismatchError: A vector lives in another space; of a result, all of them.
        TypeError: It is none of these.
        ValueError: There are no vectors.
    """
    what = f"explore {name_of(model)}"
    if isinstance(vectors, TransferResult):
        return _options_of_result(model, vectors, name, what)
    if isinstance(vectors, SteeringVector):
        given = [(vectors.label or "vector", vectors, name)]
    elif isinstance(vectors, Mapping):
        given = [item for key, value in vectors.items() for item in _named(str(key), value, f"{name}[{key!r}]")]
    elif isinstance(vectors, Sequence) and not isinstance(vectors, str):
        # Those of one label at several sites become one name with several layers.
        given = [(getattr(v, "label", "") or "vector", v, f"{name}[{k}]") for k, v in enumerate(vectors)]
    else:
        raise TypeError(
            "explore: needs a TransferResult, a SteeringVector, several of them or a mapping of names to them, "
            f"got {type(vectors).__name__}; write xs.explore(model, vectors)"
        )
    if not given:
        raise ValueError("explore: give at least one vector")
    found: dict[tuple[str, Site], Option] = {}
    for label, vector, code in given:
        if not isinstance(vector, SteeringVector):
            raise TypeError(f"explore: {code} must be a SteeringVector, got {type(vector).__name__}")
        require_space_of(model, vector.space, what)
        option = Option(label, vector, code)
        if found.setdefault((label, option.site), option) is not option:
            raise ValueError(
                f"explore: two vectors are called {label!r} at {option.site}; give them names, "
                "{'one': vector, 'other': vector}"
            )
    return tuple(found.values())


def _named(name: str, value: Any, code: str) -> list[tuple[str, Any, str]]:
    """What stands under one name: a vector, or one per layer."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [(name, vector, f"{code}[{k}]") for k, vector in enumerate(value)]
    return [(name, value, code)]


def _options_of_result(model: Any, result: TransferResult, name: str, what: str) -> tuple[Option, ...]:
    found = []
    for key in ("mapped", "native", "shuffled", "source"):
        vector = result.vectors.get(key)
        if vector is None:
            continue
        try:
            require_space_of(model, vector.space, what)
        except SpaceMismatchError:
            continue
        found.append(Option(key, vector, f'{name}.vectors["{key}"]'))
    if not found:
        one = next(iter(result.vectors.values()), None)
        if one is None:
            raise ValueError("explore: the result has no vectors; it may have been saved by hand without them")
        require_space_of(model, result.vectors.get("native", one).space, what)
    native = result.vectors.get("native")
    if native is not None and native.scale is not None and any(option.name == "native" for option in found):
        seed = result.seeds.get("random", (0,))[0]  # the first of the transfer's own
        code = f'random_like({name}.vectors["native"], seed={seed})'
        imports = ("from xmodel_steer.core.vectors import random_like",)
        found.append(Option("random", random_like(native, seed=seed), code, imports))
    return tuple(found)


# --- widgets ----------------------------------------------------------------------------------
class Explorer:
    """Controls and texts in a notebook; made by `explore`, shows itself.

    All passes of the model run on the kernel's main thread, one token per turn of its event loop, so
    that they and the notebook's cells take turns: JupyterLab delivers clicks on another thread.
    """

    def __init__(
        self,
        model: Any,
        options: Sequence[Option],
        *,
        prompt: str,
        max_new_tokens: int,
        strength: float,
        strengths: tuple[float, float],
        name: str,
    ) -> None:
        w = _ipywidgets()
        self._model, self._options, self._name = model, tuple(options), name
        self._run: Iterator[View] | None = None
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook: a click runs to its end
            self._loop = None

        def auto() -> Any:  # one each: it also says whether a control is shown
            return w.Layout(width="auto")

        short = {"description_width": "initial"}
        self.prompt = w.Textarea(prompt, placeholder="A text to continue", rows=3, layout=w.Layout(width="98%"))
        self.vector = w.Dropdown(
            options=list(dict.fromkeys(o.name for o in options)), description="vector", style=short, layout=auto()
        )
        self.layer = w.Dropdown(description="layer", style=short, layout=auto())
        self.strength = w.FloatSlider(
            strength, min=strengths[0], max=strengths[1], step=0.1, description="strength", style=short
        )
        self.positions = w.Dropdown(options=get_args(Where), description="positions", style=short, layout=auto())
        self.tokens = w.BoundedIntText(
            max_new_tokens, min=1, max=context_length(model), description="new tokens", style=short
        )
        self.tokens.layout.width = "150px"
        self.chat = w.Checkbox(description="as a chat message", indent=False, layout=auto())
        self.chat.layout.display = None if getattr(tokenizer_of(model), "chat_template", None) else "none"
        self.generate = w.Button(description="Generate", button_style="primary")
        self.stop = w.Button(description="Stop", disabled=True)
        self.message = w.HTML()
        self.steered, self.unsteered = (w.HTML(layout=w.Layout(flex="1 1 320px")) for _ in range(2))
        self.next_tokens, self.code = w.HTML(), w.HTML()
        row = w.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 14px")
        self.box = w.VBox(
            [
                self.prompt,
                w.Box([self.vector, self.layer, self.strength, self.positions, self.tokens, self.chat], layout=row),
                w.Box([self.generate, self.stop, self.message], layout=row),
                w.Box([self.steered, self.unsteered], layout=w.Layout(flex_flow="row wrap", grid_gap="0 24px")),
                self.next_tokens,
                self.code,
            ]
        )
        self.vector.observe(lambda _: self._list_layers(), "value")
        self._list_layers()
        self.generate.on_click(lambda _: self._clicked())
        self.stop.on_click(lambda _: self._on_main_thread(self._finish, "Stopped."))

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)

    def _list_layers(self) -> None:
        sites = [option.site for option in self._options if option.name == self.vector.value]
        self.layer.options = [(str(site), site) for site in sites]
        self.layer.index = 0
        self.layer.layout.display = None if len(sites) > 1 else "none"

    def _clicked(self) -> None:
        try:
            choice = Choice(
                prompt=self.prompt.value,
                strength=round(self.strength.value, 6),
                positions=self.positions.value,
                max_new_tokens=self.tokens.value,
                chat=self.chat.value,
            )
        except PromptError as error:
            self._say(str(error), wrong=True)
            return
        chosen = (self.vector.value, self.layer.value)
        option = next(option for option in self._options if (option.name, option.site) == chosen)
        self._say("Waiting for the running cell to end …")
        self._on_main_thread(self._begin, choice, option)

    def _on_main_thread(self, act: Callable[..., None], *given: Any) -> None:
        if self._loop is None:
            act(*given)
        else:
            self._loop.call_soon_threadsafe(act, *given)

    # From here on only the main thread.

    def _begin(self, choice: Choice, option: Option) -> None:
        run = self._run = watch(self._model, choice, option.vector)  # one that was running takes no further step
        self._say("Writing …")
        self.stop.disabled = False
        self._advance(run, choice, option)

    def _advance(self, run: Iterator[View], choice: Choice, option: Option) -> None:
        while run is self._run:
            try:
                with _interruptible():
                    view = next(run, None)
                    if view is not None:
                        self._show(view, choice, option)
            except KeyboardInterrupt:
                self._finish("Stopped: the kernel was interrupted.")
            except Exception as error:
                ours = isinstance(error, XModelSteerError)
                if not ours:
                    logging.getLogger(__name__).exception("explore: a forward pass failed")
                self._finish(str(error) if ours else f"{type(error).__name__}: {error}", wrong=True)
            else:
                if view is None:
                    self._finish("")
                elif self._loop is not None:
                    self._loop.call_soon(self._advance, run, choice, option)
                    return

    def _finish(self, text: str, *, wrong: bool = False) -> None:
        self._run = None
        self.stop.disabled = True
        self._say(text, wrong=wrong)

    def _say(self, text: str, *, wrong: bool = False) -> None:
        colour = f"color:{COLOURS['mapped']};font-weight:600" if wrong else "opacity:.7"
        self.message.value = f'<span role="{"alert" if wrong else "status"}" style="{colour}">{escape(text)}</span>'

    def _show(self, view: View, choice: Choice, option: Option) -> None:
        colour = COLOURS.get(option.name, COLOURS["mapped"])
        heading = f"{option.name} × {choice.strength:g}, {option.site}, {choice.positions}"
        self.steered.value = _text_html(heading, colour, choice.prompt, view.steered)
        self.unsteered.value = _text_html("unsteered", COLOURS["unsteered"], choice.prompt, view.unsteered)
        self.next_tokens.value = _bars_html(view.next_tokens, colour)
        self.code.value = _code_html(choice.code(option, self._name))


def explore(
    model: Any,
    vectors: Any,
    *,
    prompt: str = "",
    max_new_tokens: int = 40,
    strengths: tuple[float, float] | None = None,
) -> Explorer:
    """Try vectors by hand in a notebook: steered and unsteered text side by side, while they are written.

    For JupyterLab 4 and Notebook 7, with ``pip install "xmodel-steer[notebook]"``. Decoding is greedy. A click
    while a comparison is being written stops that one, and so do "Stop" and the notebook's interrupt button; the
    model is hooked only while a token is computed, so that other cells find it as it is.

    The texts are those of `generate` inside `steering`. "Copy code" gives these calls, with the names that model and
    vectors have in the notebook; where they have none, ``model`` and ``result``, ``vector`` or ``vectors``.

    Args:
        model: The model to steer.
        vectors: A `TransferResult`, to choose between its mapped, native, shuffled and a random vector (or, for its
            source model, its source vector); or a vector, several, or a mapping of names to vectors. A name may
            stand for several vectors, one per layer. Model and result may also come in the other order.
        prompt: What stands in the prompt box at first.
        max_new_tokens: Number of tokens to add, at first.
        strengths: The ends of the strength slider, in units of the vector; -4 and 4 by default, or a result's headline strength
            where that is larger.
            It begins at a result's headline strength, or at 1.

    Returns:
        The explorer; as the last value of a cell it shows itself.

    Raises:
        SpaceMismatchError: A vector lives in another model's space, or none of a result's in this model's.
        TypeError: The vectors are none of these.
        ValueError: There are none, or two have one name and site.
        ModelError: It is not a TransformerLens model.
        ImportError: ipywidgets is not installed.

    Example:
        >>> xs.explore(large, result)                               # doctest: +SKIP
        >>> xs.explore(large, {"joy": joy, "calm": [calm_8, calm_10]}, prompt="The letter")  # doctest: +SKIP
    """
    if isinstance(model, (TransferResult, SteeringVector)):
        model, vectors = vectors, model
    _ipywidgets()
    a_result = isinstance(vectors, TransferResult)
    default = "result" if a_result else "vector" if isinstance(vectors, SteeringVector) else "vectors"
    options = options_of(model, vectors, _notebook_name(vectors, default))
    options = [replace(option, code=_notebook_name(option.vector, option.code)) for option in options]
    far = max(4.0, abs(vectors.headline)) if a_result else 4.0
    low, high = strengths or (-far, far)
    if not low < high:
        raise ValueError(f"explore: strengths must be the lower and the upper end of the slider, got {strengths}")
    strength = min(max(vectors.headline if a_result else 1.0, low), high)
    return Explorer(
        model,
        options,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        strength=strength,
        strengths=(low, high),
        name=_notebook_name(model, "model"),
    )


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            'explore: needs ipywidgets, which is not installed; pip install "xmodel-steer[notebook]", then restart the kernel'
        ) from error
    return ipywidgets


def _notebook_name(value: Any, otherwise: str) -> str:
    """The name of a value in the notebook, so that copied code runs there as it is."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    names = shell.user_ns if shell else {}
    return next((n for n, v in list(names.items()) if v is value and not n.startswith("_")), otherwise)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let the notebook's interrupt button raise KeyboardInterrupt here; a kernel ignores it while no cell runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _text_html(heading: str, colour: str, prompt: str, text: str) -> str:
    return (
        f'<div style="border-left:3px solid {colour};padding-left:8px;line-height:1.45">'
        f'<div style="font-weight:600">{escape(heading)}</div>'
        f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">'
        f'<span style="opacity:.6">{escape(prompt)}</span><span class="xs-text">{escape(text)}</span></div></div>'
    )


def _bars_html(tokens: Sequence[NextToken], colour: str) -> str:
    def bar(share: float, fill: str) -> str:
        return (
            f'<div style="display:flex;align-items:center;gap:6px;font-size:11px;line-height:1.25">'
            f'<div style="background:{fill};height:7px;width:{260 * share:.1f}px"></div>{share:.1%}</div>'
        )

    if not tokens:
        return ""
    rows = "".join(
        f'<tr><td style="text-align:right;font-family:monospace;white-space:pre;padding-right:8px">{_shown(t.token)}</td>'
        f'<td style="text-align:left">{bar(t.steered, colour)}{bar(t.unsteered, COLOURS["unsteered"])}</td></tr>'
        for t in tokens
    )
    keys = (("steered", colour), ("unsteered", COLOURS["unsteered"]))
    legend = " ".join(f'<span style="color:{fill}">■</span> {name}' for name, fill in keys)
    return f'<div style="line-height:1.6"><b>next token</b>: {legend}</div><table>{rows}</table>'


def _shown(token: str) -> str:
    return escape(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")) or "∅"


# Where a page is not served safely (http from another host) the browser has no clipboard object.
_COPY = (
    "const text = this.nextElementSibling.textContent;"
    "const done = () => { this.textContent = 'Copied'; setTimeout(() => this.textContent = 'Copy code', 1500) };"
    "if (navigator.clipboard) { navigator.clipboard.writeText(text).then(done) } else {"
    "getSelection().selectAllChildren(this.nextElementSibling); document.execCommand('copy') && done() }"
)


def _code_html(code: str) -> str:
    return (
        f'<button class="lm-Widget jupyter-widgets jupyter-button" onclick="{escape(_COPY)}">Copy code</button>'
        f'<pre style="line-height:1.35;white-space:pre-wrap;margin-top:4px">{escape(code)}</pre>'
    )

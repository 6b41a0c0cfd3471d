"""The explorer's widgets. The texts come from `watch`, which knows no widget."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.texts import on_page
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.figures.style import COLOURS
from xmodel_steer.interventions.positions import Where
from xmodel_steer.models.facts import context_length, tokenizer_of
from xmodel_steer.notebook.html import bars_html, code_html, text_html
from xmodel_steer.notebook.options import Option, options_of
from xmodel_steer.notebook.turns import Turns, ipywidgets_of, notebook_name
from xmodel_steer.notebook.writing import OPERATORS, Choice, Setting, View, watch
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.saving import read


class Explorer(Turns):
    """Controls and texts in a notebook, as `explore` returns them; displays itself."""

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
        super().__init__("explore")
        w = ipywidgets_of("explore")
        self._model, self._options, self._name = model, tuple(options), name
        self._kept: tuple[Setting, ...] = ()

        def auto() -> Any:  # one for each control, since it also hides the control
            return w.Layout(width="auto")

        short = {"description_width": "initial"}
        self.prompt = w.Textarea(prompt, placeholder="A text to continue", rows=3, layout=w.Layout(width="98%"))
        self.vector = w.Dropdown(
            options=list(dict.fromkeys(o.name for o in options)), description="vector", style=short, layout=auto()
        )
        self.layer = w.Dropdown(description="layer", style=short, layout=auto())
        self.operator, self.gate = (
            w.Dropdown(description=name, style=short, layout=auto()) for name in ("operator", "act")
        )
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
        self.keep = w.Button(description="Keep, and add another", layout=auto())
        self.drop, self.kept = w.Button(description="Drop the kept", layout=auto()), w.HTML()
        self.steered, self.unsteered = (w.HTML(layout=w.Layout(flex="1 1 320px")) for _ in range(2))
        self.next_tokens, self.code = w.HTML(), w.HTML()
        row = w.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 14px")
        settings = [self.vector, self.layer, self.operator, self.strength, self.positions, self.gate, self.keep]
        kept = w.Box([self.kept, self.drop], layout=row)
        texts = w.Box([self.steered, self.unsteered], layout=w.Layout(flex_flow="row wrap", grid_gap="0 24px"))
        buttons = w.Box([self.generate, self.stop, self.tokens, self.chat, self.message], layout=row)
        shown = [texts, self.next_tokens, self.code]
        self.box = w.VBox([self.prompt, w.Box(settings, layout=row), kept, buttons, *shown])
        self.vector.observe(lambda _: self._list_layers(), "value")
        self.layer.observe(lambda _: self._list_operators(), "value")
        self.operator.observe(lambda _: self._name_slider(), "value")
        self._list_layers()
        self._keep()
        self.keep.on_click(lambda _: self._keep(*self._kept, self._setting()))
        self.drop.on_click(lambda _: self._keep())
        self.generate.on_click(lambda _: self._clicked())

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)

    def _list_layers(self) -> None:
        """Offer the sites of the chosen vector."""
        sites = [option.site for option in self._options if option.name == self.vector.value]
        self.layer.options = [(str(site), site) for site in sites]
        self.layer.index = 0
        self.layer.layout.display = None if len(sites) > 1 else "none"
        self._list_operators()

    def _list_operators(self) -> None:
        """Offer the operators that the vector can take, and its site's gates."""
        if self.layer.value is None:  # the layers are being listed
            return
        option, before = self._option(), self.operator.value
        names = [name for name in OPERATORS if option.has_classes or not name.startswith("clamp")]
        self.operator.options, self.operator.value = names, before if before in names else "add"
        gates = [gate for gate in self._options if gate.has_classes and gate.site == option.site]
        sides = ("positive", "negative")
        self.gate.options = [
            ("everywhere", None),
            *((f"where {gate.name} is {side}", (gate, side)) for gate in gates for side in sides),
        ]
        self.gate.index = 0  # a value of None is shown only when it is chosen
        self.gate.layout.display = None if gates else "none"

    def _name_slider(self) -> None:
        """Name the slider after what it is to the operator."""
        self.strength.description = "overshoot" if str(self.operator.value).startswith("clamp") else "strength"
        self.strength.layout.display = "none" if self.operator.value == "ablate" else None

    def _option(self) -> Option:
        chosen = (self.vector.value, self.layer.value)
        return next(option for option in self._options if (option.name, option.site) == chosen)

    def _setting(self) -> Setting:
        """Read the controls of the vector."""
        operator = OPERATORS[self.operator.value](round(self.strength.value, 6))
        return Setting(self._option(), operator, self.positions.value, self.gate.value)

    def _keep(self, *settings: Setting) -> None:
        """Keep settings that act together with what the controls say."""
        self._kept = settings
        self.kept.value = " ".join(f"<div>and {on_page(setting.title)}</div>" for setting in settings)
        self.drop.layout.display = None if settings else "none"

    def _clicked(self) -> None:
        """Read the controls and begin a comparison."""
        try:
            settings = (self._setting(), *self._kept)
            choice = Choice(self.prompt.value, settings, self.tokens.value, self.chat.value)
        except PromptError as error:
            self.say(str(error), wrong=True)
            return
        self.say("Waiting for the running cell to end …")
        run = watch(self._model, choice)
        self.on_main_thread(self.begin, run, lambda view: self._show(view, choice), "Writing …")

    def _show(self, view: View, choice: Choice) -> None:
        colour = COLOURS.get(choice.settings[0].option.name, COLOURS["mapped"])
        heading = "; and ".join(setting.title for setting in choice.settings)
        self.steered.value = text_html(heading, colour, choice.prompt, view.steered)
        self.unsteered.value = text_html("unsteered", COLOURS["unsteered"], choice.prompt, view.unsteered)
        keys = ("steered", colour), ("unsteered", COLOURS["unsteered"])
        self.next_tokens.value = bars_html([(t.token, (t.steered, t.unsteered)) for t in view.next_tokens], keys)
        self.code.value = code_html(choice.code(self._name))


def explore(
    model: Any,
    vectors: Any,
    *,
    prompt: str = "",
    max_new_tokens: int = 40,
    strengths: tuple[float, float] | None = None,
) -> Explorer:
    """Try vectors by hand in a notebook: steered and unsteered text side by side.

    A vector is added, ablated or clamped, everywhere or where a vector of the same site tells its class; "Keep, and add
    another" makes several act together.

    This needs JupyterLab 4 or Notebook 7, and ``pip install "xmodel-steer[notebook]"``. Decoding is greedy. "Stop", the
    notebook's interrupt button and another click on "Generate" stop a comparison. The model is hooked only while a
    token is computed, so that other cells find it unchanged.

    The texts equal those of `generate` inside `steering`. "Copy code" copies these calls, with the notebook's names of
    model and vectors, or else with ``model`` and ``result``, ``vector`` or ``vectors``.

    Args:
        model: The model to steer.
        vectors: A `Result`, to choose between its mapped, native, shuffled and a random vector (or, for its
            source model, its source vector), or the folder of a saved one; or a vector, several, or a mapping of
            names to vectors. A name may have several vectors, one per layer. Model and result may also come in the
            other order.
        prompt: Initial text of the prompt box.
        max_new_tokens: Initial number of tokens to add.
        strengths: The ends of the strength slider, in units of the vector; by default -4 and 4, or a larger headline
            strength of a result. The slider begins at a result's headline strength, or at 1.

    Returns:
        The explorer; as the last value of a cell it displays itself.

    Raises:
        SpaceMismatchError: A vector is of another model's space; for a result, all its vectors are.
        TypeError: The vectors are none of these.
        ValueError: There are no vectors, or two have one name and site.
        ModelError: The model is no TransformerLens model.
        ImportError: ipywidgets is not installed.

    Example:
        >>> xs.explore(large, result)                               # doctest: +SKIP
        >>> xs.explore(large, {"joy": joy, "calm": [calm_8, calm_10]}, prompt="The letter")  # doctest: +SKIP
    """
    ipywidgets_of("explore")
    model, vectors, default = _given(model, vectors)
    a_result = isinstance(vectors, Result)
    options = options_of(model, vectors, notebook_name(vectors, default))
    options = [replace(option, code=notebook_name(option.vector, option.code)) for option in options]
    end = max(4.0, abs(vectors.headline)) if a_result else 4.0
    low, high = strengths or (-end, end)
    if not low < high:
        raise ValueError(f"explore: strengths must be the lower and the upper end of the slider, got {strengths}")
    strength = min(max(vectors.headline if a_result else 1.0, low), high)
    start: dict[str, Any] = {"prompt": prompt, "max_new_tokens": max_new_tokens, "strength": strength}
    return Explorer(model, options, **start, strengths=(low, high), name=notebook_name(model, "model"))


def _given(model: Any, vectors: Any) -> tuple[Any, Any, str]:
    """Put model and vectors in order, read a folder, and name the vectors."""
    if isinstance(model, (Result, SteeringVector, Path)):
        model, vectors = vectors, model
    if isinstance(vectors, (str, Path)):
        return model, read(vectors), f"xs.read({str(vectors)!r})"
    kinds = {Result: "result", SteeringVector: "vector"}
    return model, vectors, kinds.get(type(vectors), "vectors")

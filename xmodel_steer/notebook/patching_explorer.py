"""The patching explorer's widgets: a click on a cell patches there."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xmodel_steer.core.errors import PromptError, XModelSteerError
from xmodel_steer.core.spaces import STREAMS, Site
from xmodel_steer.evaluation.patched import TextStatistics
from xmodel_steer.evaluation.patching import Patching
from xmodel_steer.evaluation.recovery import KINDS, PatchingGrid
from xmodel_steer.figures.style import COLOURS
from xmodel_steer.files.wheels import general_text
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.steps import Intervention, Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.models.facts import context_length, tokenizer_of
from xmodel_steer.notebook.cells import cells_widget
from xmodel_steer.notebook.html import bars_html, code_html, shown, text_html
from xmodel_steer.notebook.options import Option, options_of
from xmodel_steer.notebook.patching import Patch, PatchView, code_of, maps_by_depth, watch_patch
from xmodel_steer.notebook.turns import Turns, ipywidgets_of, notebook_name

SERIES = ("clean", COLOURS["native"]), ("corrupted", COLOURS["unsteered"]), ("patched", COLOURS["mapped"])
NONE = "no vector"


class PatchingExplorer(Turns):
    """Two prompts, a grid of cells and what a patch does, as `explore_patching` returns them; displays itself."""

    def __init__(
        self, target: Any, source: Any, maps: Sequence[Map], options: Sequence[Option],
        start: dict[str, Any], names: dict[str, str],
    ) -> None:  # fmt: skip
        super().__init__("explore_patching")
        w = ipywidgets_of("explore_patching")
        self._models, self._maps = (target, source), tuple(maps)
        self._options, self._names = {option.name: option for option in options}, names
        self._general: TextStatistics | None = None
        self._asked: Patching | None = None
        self._grid: PatchingGrid | None = None
        self._filling: Iterator[Site] | None = None

        def auto() -> Any:
            return w.Layout(width="auto")

        short, wide = {"description_width": "initial"}, w.Layout(width="98%")
        self.clean, self.corrupted = (
            w.Textarea(start[name], placeholder=f"The {name} prompt", description=name, rows=2, layout=wide)
            for name in ("clean", "corrupted")
        )
        self.answers = tuple(
            w.Text(answer, description=name, placeholder="with its leading space; empty for KL", style=short)
            for name, answer in zip(("right answer", "other answer"), start["answers"], strict=True)
        )
        self.stream = w.Dropdown(options=STREAMS, value="resid_post", description="stream", style=short, layout=auto())
        ways = [("clean into corrupted", "denoise"), ("corrupted into clean", "noise")]
        self.direction = w.Dropdown(options=ways, description="patch", style=short, layout=auto())
        self.tokens = w.BoundedIntText(
            start["max_new_tokens"], min=1, max=context_length(target), description="new tokens"
        )
        self.tokens.style, self.tokens.layout.width = short, "150px"
        self.vector = w.Dropdown(options=[NONE, *self._options], description="steer too", style=short, layout=auto())
        self.strength = w.FloatSlider(1.0, min=-4, max=4, step=0.1, description="strength", style=short)
        for control in (self.vector, self.strength):
            control.layout.display = None if options else "none"
        self.fill = w.Button(description="Fill the grid", button_style="primary")
        self.cells = cells_widget(titles=dict(KINDS))
        self.patched, self.next_tokens, self.code = w.HTML(), w.HTML(), w.HTML()
        row = w.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 14px")
        controls = [*self.answers, self.direction, self.stream, self.tokens, self.vector, self.strength]
        buttons = w.Box([self.fill, self.stop, self.message], layout=row)
        shown_below = [self.patched, self.next_tokens, self.code]
        self.box = w.VBox([self.clean, self.corrupted, w.Box(controls, layout=row), buttons, self.cells, *shown_below])
        self.fill.on_click(lambda _: self.on_main_thread(self._fill))
        self.cells.observe(lambda _: self.on_main_thread(self._patch), "selected")
        self.cells.observe(lambda _: self.on_main_thread(self._paired), "pairs")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.box._repr_mimebundle_(**kwargs)

    @property
    def grid(self) -> PatchingGrid:
        """The grid, as far as it is filled in.

        Raises:
            PromptError: Nothing was asked for yet.
        """
        if self._grid is None:
            raise PromptError("explore_patching: there is no grid yet; press Fill the grid")
        return self._grid

    def _asked_for(self, pairs: Any = None) -> Patching:
        """Read the controls."""
        answers = tuple(box.value for box in self.answers)
        if any(answers) and not all(answers):
            raise PromptError("Give both answers, or none to measure KL from the clean prompt.")
        for name, box in (("clean", self.clean), ("corrupted", self.corrupted)):
            if not box.value.strip():
                raise PromptError(f"The {name} prompt is empty: write something for the model to continue.")
        target, source = self._models
        self._general = self._general or TextStatistics(target, general_text()[:40])
        sites = [Site(layer, self.stream.value) for layer in range(target.cfg.n_layers)]
        return Patching(
            target, [self.clean.value], [self.corrupted.value], [answers] if all(answers) else None, sites=sites,
            source=source, maps=[m for m in self._maps if m.target.site in sites], text=self._general,
            pairs=None if pairs is None else [pairs], direction=self.direction.value,
        )  # fmt: skip

    # The methods below run on the main thread only.

    def _fill(self, pairs: Any = None) -> None:
        """Begin an empty grid of what the controls ask for."""
        try:
            self._asked = asked = self._asked_for(pairs)
            self._grid = grid = asked.empty()
        except XModelSteerError as error:
            self.finish(str(error), wrong=True)
            return
        run = asked.runs[0]
        by_row = zip(grid.sources, grid.targets, strict=True)
        with self.cells.hold_sync():
            self.cells.rows = [f"{s.site} → {t.site.layer}" if s else str(t.site) for s, t in by_row]
            self.cells.read, self.cells.patched = (
                _token_texts(asked.target, side.ids) for side in (run.donor, run.patched)
            )
            self.cells.labels = ["clean", "corrupted"] if asked.direction == "denoise" else ["corrupted", "clean"]
            self.cells.selected = {"kind": "", "cells": []}
            self._pairs = self.cells.pairs = [list(pair) for pair in run.pairs]
            self._show_grid()
        self._filling = asked.filling(grid)
        self._go_on()

    def _go_on(self) -> None:
        assert self._filling is not None
        self.begin(self._filling, lambda _: self._show_grid(), "Patching …")

    def _show_grid(self) -> None:
        tables = {kind: self.grid.recovery(kind) for kind in self.grid.values}
        known = [np.nan_to_num(np.abs(table)).max(initial=1.0) for table in tables.values()]
        self.cells.bound = float(min(2.0, max(known)))  # one wild cell must not pale all others
        self.cells.values = {
            kind: [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in table]
            for kind, table in tables.items()
        }

    def _paired(self) -> None:
        """Fill the grid anew with the positions that were paired by hand."""
        if self._asked is not None and self.cells.pairs != self._pairs:
            self._fill(sorted(tuple(pair) for pair in self.cells.pairs))

    def _patch(self) -> None:
        """Patch the cells that are selected."""
        chosen = self.cells.selected
        if self._asked is None or not chosen["cells"]:
            return
        asked, sites = self._asked, [space.site for space in self.grid.targets]
        cells = tuple((sites[row], place) for row, place in sorted(map(tuple, chosen["cells"])))
        patch = Patch(chosen["kind"], cells, self.tokens.value)
        try:
            run = watch_patch(asked, patch, self._extra())
        except XModelSteerError as error:
            self.finish(str(error), wrong=True)
            return
        self.begin(run, lambda view: self._show(view, asked, patch), "Writing …")

    def _extra(self) -> list[Step]:
        option = self._options.get(self.vector.value)
        members = option.vector.members() if option else ()
        return [Intervention(member, Add(round(self.strength.value, 6))) for member in members]

    def finish(self, text: str, *, wrong: bool = False) -> None:
        """End a run; a grid that a click interrupted is then filled further."""
        if text or self._run is self._filling:
            self._filling = None
        super().finish(text, wrong=wrong)
        if self._filling is not None:
            self._go_on()

    def _show(self, view: PatchView, asked: Patching, patch: Patch) -> None:
        run, option = asked.runs[0], self._options.get(self.vector.value)
        heading = patch.title + (f", and {option.name} × {self.strength.value:g}" if option else "")
        self.patched.value = text_html(heading, COLOURS["mapped"], run.patched.prompt.content, view.text)
        self.next_tokens.value = bars_html(view.next_tokens, SERIES)
        extra = f", xs.Intervention({option.code}, xs.Add({round(self.strength.value, 6)!r}))" if option else ""
        self.code.value = code_html(code_of(asked, patch, self._names, extra))


def _token_texts(model: Any, ids: Sequence[int]) -> list[str]:
    """Write each token as text, with the space before it."""
    tokenizer = tokenizer_of(model)
    pieces = zip(tokenizer.convert_ids_to_tokens(list(ids)), ids, strict=True)
    return [shown((" " if piece[0] in "▁Ġ" else "") + tokenizer.decode([i]).lstrip(" ")) for piece, i in pieces]


def explore_patching(
    target: Any,
    source: Any = None,
    maps: Sequence[Map] | None = None,
    *,
    clean: str = "",
    corrupted: str = "",
    answers: tuple[str, str] = ("", ""),
    vectors: Any = None,
    max_new_tokens: int = 20,
) -> PatchingExplorer:
    """Patch activations by hand in a notebook, within a model or from another one.

    The clean prompt's activations go into the corrupted prompt's run, or the other way round; mean and noise of general text
    are patched as controls. A grid of layers and positions
    fills in; a click on a cell patches there, and shows the next token and the continuation. Shift and click patches a
    rectangle together, Ctrl and click adds a cell. A click on a token of each prompt pairs them. ``explorer.grid`` is the
    grid as a value, "Copy code" the calls for the patch.

    Args:
        target: The model that is patched.
        source: A smaller model, whose mapped activations are patched too.
        maps: Maps from sites of the source to sites of the target, at most one to each. By default a ridge map to every
            layer, from the same share of the source's depth, is fitted on packaged text: a minute or two, then from the cache.
        clean: The clean prompt.
        corrupted: The corrupted prompt.
        answers: What continues each of them; the share of their logit difference is shown. Empty: that of the KL.
        vectors: Steering vectors to add on top, as for `explore`.
        max_new_tokens: Initial number of tokens to write.

    Raises:
        SpaceMismatchError: A map is not between these models, or a vector of another one.
        ImportError: ipywidgets or anywidget is not installed.

    Example:
        >>> xs.explore_patching(large, small, clean="Rome is in", corrupted="Paris is in",
        ...                     answers=(" Italy", " France"))                              # doctest: +SKIP
    """
    ipywidgets_of("explore_patching")
    options = () if vectors is None else options_of(target, vectors, notebook_name(vectors, "vectors"))
    names = {"target": notebook_name(target, "target")}
    if source is not None:
        names |= {"source": notebook_name(source, "source"), "maps": notebook_name(maps, "maps")}
        if maps is None:
            maps = maps_by_depth(source, target)
            names["maps"] = f"maps_by_depth({names['source']}, {names['target']})"
    start = {"clean": clean, "corrupted": corrupted, "answers": answers, "max_new_tokens": max_new_tokens}
    return PatchingExplorer(target, source, maps or (), options, start, names)

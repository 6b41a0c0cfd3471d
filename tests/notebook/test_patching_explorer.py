"""The patching explorer shows what the library's calls give, and leaves the model unchanged."""

import asyncio
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

import numpy as np
import pytest
import toys
from sample_maps import identity

import xmodel_steer as xs
from xmodel_steer.core.errors import PromptError
from xmodel_steer.evaluation import Patching
from xmodel_steer.notebook import patching_explorer
from xmodel_steer.notebook.patching import Patch, maps_by_depth, watch_patch
from xmodel_steer.notebook.patching_explorer import PatchingExplorer, explore_patching

CLEAN, CORRUPTED, ANSWERS = "the old sky is", "the very old harbour ski is", ("!", "?")
NEW = 5


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Widgets outlive their cell on purpose: not this test. The controls read text that toys know."""
    import ipywidgets

    monkeypatch.setattr(patching_explorer, "general_text", lambda: toys.sentences(20, 3))
    yield
    ipywidgets.Widget.close_all()


def explorer_of(toy: toys.Toy, **more: Any) -> PatchingExplorer:
    settings: dict[str, Any] = {"clean": CLEAN, "corrupted": CORRUPTED, "answers": ANSWERS, "max_new_tokens": NEW}
    return explore_patching(toy.model, **(settings | more))


def message_of(explorer: PatchingExplorer) -> str:
    return unescape(re.sub("<.*?>", "", explorer.message.value))


def code_of(explorer: PatchingExplorer) -> str:
    (found,) = re.findall(r"<pre.*?>(.*)</pre>", explorer.code.value, flags=re.DOTALL)
    return unescape(found)


def click(explorer: PatchingExplorer, kind: str, *cells: tuple[int, int]) -> str:
    """Select cells as the page does; return the text that was written."""
    explorer.cells.selected = {"kind": kind, "cells": [list(cell) for cell in cells]}
    (found,) = re.findall(r'<span class="xs-text">(.*?)</span>', explorer.patched.value, flags=re.DOTALL)
    return unescape(found)


def test_the_grid_is_that_of_the_library(llama: toys.Toy) -> None:
    explorer = explorer_of(llama)
    with pytest.raises(PromptError, match="no grid yet"):
        explorer.grid  # noqa: B018
    explorer.fill.click()
    expected = Patching(llama.model, [CLEAN], [CORRUPTED], [ANSWERS], text=toys.sentences(20, 3)).grid()
    for kind, table in expected.values.items():
        np.testing.assert_allclose(explorer.grid.values[kind], table, atol=1e-5)
        drawn = np.array(explorer.cells.values[kind], dtype=float)  # None becomes NaN
        np.testing.assert_allclose(drawn, table[0], atol=1e-4)
    assert message_of(explorer) == "" and explorer.stop.disabled
    assert explorer.cells.labels == ["clean", "corrupted"]
    assert len(explorer.cells.patched) == len(llama.ids(CORRUPTED)) and len(explorer.cells.read) == len(
        llama.ids(CLEAN)
    )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_click_patches_there_and_the_copied_code_gives_the_same(llama: toys.Toy, direction: str) -> None:
    vector = llama.vector(2)
    explorer = explorer_of(llama, vectors={"joy": vector})
    explorer.direction.value = direction
    explorer.fill.click()
    place = explorer.cells.pairs[-1][1]
    text = click(explorer, "own", (1, place), (2, place - 1))
    asked = Patching(llama.model, [CLEAN], [CORRUPTED], [ANSWERS], direction=direction)
    steps = asked.steps("own", [(xs.Site(1), place), (xs.Site(2), place - 1)])
    patched = CORRUPTED if direction == "denoise" else CLEAN
    with xs.steering(llama.model, steps):
        (expected,) = xs.generate(llama.model, [patched], max_new_tokens=NEW)
    assert text == expected
    assert explorer.next_tokens.value.count("<tr>") == 8 and "patched" in explorer.next_tokens.value
    explorer.vector.value = "joy"
    together = click(explorer, "own", (1, place))
    written: list[str] = []
    names: dict[str, Any] = {"target": llama.model, "vectors": {"joy": vector}, "print": written.append}
    code = code_of(explorer)
    exec(code.replace("xs.plots.patching(asked.grid())", "grid = asked.grid()"), names)
    assert written == [together] and "vectors['joy']" in code
    np.testing.assert_allclose(names["grid"].values["own"], explorer.grid.values["own"], atol=1e-5)


def test_mapped_activations_and_controls_can_be_clicked(llama: toys.Toy, tokenizers: Any) -> None:
    twin = toys.toy("llama", tokenizers[toys.TOYS["llama"].tokenizer])
    explorer = explorer_of(llama, source=twin.model, maps=[identity(twin, llama)])
    explorer.fill.click()
    assert list(explorer.cells.values) == ["own", "mapped", "mean", "noise"]
    layer = identity(twin, llama).target.site.layer
    place = explorer.cells.pairs[-1][1]
    assert click(explorer, "mapped", (layer, place)) == click(explorer, "own", (layer, place))
    assert "source=" in code_of(explorer)
    assert click(explorer, "noise", (0, place)) is not None and "general_text()[:40]" in code_of(explorer)
    click(explorer, "mapped", (layer + 1, place))  # no map leads there
    assert "nothing for position" in message_of(explorer)


def test_positions_paired_by_hand_fill_the_grid_anew(llama: toys.Toy) -> None:
    explorer = explorer_of(llama)
    explorer.fill.click()
    explorer.cells.pairs = [[1, 3]]
    table = explorer.grid.values["own"][0]
    assert not np.isnan(table[:, 3]).any() and np.isnan(np.delete(table, 3, axis=1)).all()
    click(explorer, "own", (1, 3))
    assert "pairs=[((1, 3),)]" in code_of(explorer) or "pairs=[[(1, 3)]]" in code_of(explorer)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda e: setattr(e.clean, "value", " "), "The clean prompt is empty"),
        (lambda e: setattr(e.answers[0], "value", ""), "Give both answers, or none"),
        (lambda e: setattr(e.corrupted, "value", CLEAN), "nothing to recover"),
    ],
)
def test_what_cannot_be_patched_is_said_on_the_page(llama: toys.Toy, change: Any, says: str) -> None:
    explorer = explorer_of(llama)
    change(explorer)
    explorer.fill.click()
    assert says in message_of(explorer) and 'role="alert"' in explorer.message.value


def test_a_click_interrupts_the_filling_which_then_goes_on(llama: toys.Toy) -> None:
    async def notebook() -> tuple[PatchingExplorer, int]:
        explorer = explorer_of(llama)
        explorer.fill.click()
        while explorer._grid is None or np.isnan(explorer.grid.values["own"][0, 0]).all():
            await asyncio.sleep(0)
        explorer.cells.selected = {"kind": "own", "cells": [[0, explorer.cells.pairs[-1][1]]]}
        while "xs-text" not in explorer.patched.value:
            await asyncio.sleep(0)
        left = int(np.isnan(explorer.grid.values["own"][0, :, -1]).sum())
        while explorer._run is not None:
            await asyncio.sleep(0)
        return explorer, left

    explorer, left = asyncio.run(notebook())
    assert left and not np.isnan(explorer.grid.values["own"][0, :, -1]).any()
    assert message_of(explorer) == ""


def test_stop_stops_the_filling_and_keeps_what_there_is(llama: toys.Toy) -> None:
    async def notebook() -> PatchingExplorer:
        explorer = explorer_of(llama)
        explorer.fill.click()
        while explorer._grid is None or np.isnan(explorer.grid.values["own"][0, 0]).all():
            await asyncio.sleep(0)
        explorer.stop.click()
        for _ in range(20):
            await asyncio.sleep(0)
        return explorer

    explorer = asyncio.run(notebook())
    last = explorer.grid.values["own"][0, :, -1]
    assert not np.isnan(last[0]) and np.isnan(last[-1]) and message_of(explorer) == "Stopped."


def test_watching_shows_the_model_s_own_probabilities(llama: toys.Toy) -> None:
    asked = Patching(llama.model, [CLEAN], [CORRUPTED])
    *_, view = watch_patch(asked, Patch("own", ((xs.Site(llama.depth - 1), asked.runs[0].pairs[-1][1]),), 1), top=3)
    clean, corrupted = (llama.reference(llama.ids(text))[1][-1].softmax(-1) for text in (CLEAN, CORRUPTED))
    for token, shares in view.next_tokens:
        assert shares[0] == pytest.approx(shares[2], abs=1e-4)  # the last layer's last position decides the token
        assert any(
            llama.tokenizer.decode([i]) == token
            and [float(clean[i]), float(corrupted[i])] == pytest.approx(list(shares[:2]), abs=1e-4)
            for i in range(len(clean))
        )


def test_maps_by_depth_lead_to_every_layer(llama: toys.Toy, gemma: toys.Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    from xmodel_steer.notebook import patching

    texts = tuple(map(xs.Prompt.of, toys.sentences(60, 4)))
    monkeypatch.setattr(patching, "general_text", lambda: texts)
    maps = maps_by_depth(llama.model, gemma.model, max_tokens=32)
    assert [m.target.site.layer for m in maps] == list(range(gemma.depth))
    sources = [m.source.site.layer for m in maps]
    assert sources == sorted(sources) and sources[-1] == llama.depth - 1

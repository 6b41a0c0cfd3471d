"""Activation patching by hand: what a click on a cell does, apart from any widget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.spaces import Site
from xmodel_steer.evaluation.patching import Patching
from xmodel_steer.evaluation.recovery import Kind
from xmodel_steer.files.wheels import general_text
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.models.facts import context_length, tokenizer_of
from xmodel_steer.models.generation import stream


@dataclass(frozen=True)
class Patch:
    """Cells that are patched together.

    Args:
        kind: The kind of patch.
        cells: Sites, each with a position of the text that is patched.
        max_new_tokens: Number of tokens that are written.
    """

    kind: Kind
    cells: tuple[tuple[Site, int], ...]
    max_new_tokens: int = 20

    @property
    def title(self) -> str:
        """The cells in words."""
        sites = dict.fromkeys(site for site, _ in self.cells)
        places = sorted({place for _, place in self.cells})
        named = str(next(iter(sites))) if len(sites) == 1 else f"{len(sites)} sites"
        return f"{self.kind}, {named}, position{'s' * (len(places) > 1)} {', '.join(map(str, places))}"


@dataclass(frozen=True)
class PatchView:
    """The contents of the page after a forward pass.

    Args:
        text: The patched model's text so far.
        next_tokens: The likeliest next tokens, with their probabilities after the clean prompt, after the corrupted one, and
            when patched.
    """

    text: str
    next_tokens: tuple[tuple[str, tuple[float, float, float]], ...]


def watch_patch(asked: Patching, patch: Patch, extra: Sequence[Step] = (), *, top: int = 8) -> Iterator[PatchView]:
    """Patch the first pair of prompts, and write the continuation token by token.

    Args:
        asked: The patching.
        patch: The cells.
        extra: Steps besides the patch, such as a steering vector.
        top: Number of next tokens.

    Yields:
        The page's contents after every forward pass.

    Raises:
        PromptError: A position pairs with no token, or the model has no room for the new tokens.
    """
    run = asked.runs[0]
    steps = [*asked.steps(patch.kind, patch.cells), *extra]
    tokens = stream(asked.target, run.patched.prompt, max_new_tokens=patch.max_new_tokens)
    candidates: tuple[tuple[str, tuple[float, float, float]], ...] = ()
    while True:
        with steering(asked.target, steps):
            token = next(tokens, None)
        if token is None:
            return
        if not candidates:
            after = torch.stack([*run.after.exp(), token.logits.float().cpu().softmax(-1)])
            best = after.amax(0).topk(min(top, after.shape[1])).indices.tolist()
            decode = tokenizer_of(asked.target).decode
            candidates = tuple((decode([i]), tuple(after[:, i].tolist())) for i in best)  # type: ignore[misc]
        yield PatchView(token.text, candidates)


def code_of(asked: Patching, patch: Patch, names: dict[str, str], extra: str = "") -> str:
    """Write the library calls for a patch of the first pair of prompts.

    Args:
        asked: The patching, of every layer of one stream.
        patch: The cells.
        names: Expressions for ``target``, ``source`` and ``maps``.
        extra: Expressions for steps besides the patch, each after a comma.
    """
    clean, corrupted = (as_prompts(prompts)[0].content for prompts in (asked.clean, asked.corrupted))
    given = [f"[{clean!r}]", f"[{corrupted!r}]", repr(asked.answers)]
    given += [f"sites=[xs.Site(layer, {asked.places[0].stream!r}) for layer in range({len(asked.places)})]"]
    given += [f"source={names['source']}, maps={names['maps']}"] if asked.maps else []
    given += ["text=general_text()[:40]"] if patch.kind in ("mean", "noise") else []
    given += [f"pairs={asked.pairs!r}"] if asked.pairs else []
    given += [f"direction={asked.direction!r}"] if asked.direction != "denoise" else []
    cells = ", ".join(f"(xs.Site({s.layer}, {s.stream!r}), {place})" for s, place in patch.cells)
    lines = [
        "import xmodel_steer as xs",
        "from xmodel_steer.evaluation import Patching",
        *(["from xmodel_steer.files.wheels import general_text"] if patch.kind in ("mean", "noise") else []),
        *([f"from {__name__} import maps_by_depth"] if asked.maps and "maps_by_depth" in names["maps"] else []),
        "",
        f"asked = Patching({names['target']}, {', '.join(given)})",
        f"with xs.steering({names['target']}, [*asked.steps({patch.kind!r}, [{cells}]){extra}]):",
        f"    print(xs.generate({names['target']}, [{asked.runs[0].patched.prompt.content!r}], max_new_tokens={patch.max_new_tokens})[0])",
        "xs.plots.patching(asked.grid())",
    ]
    return "\n".join(lines) + "\n"


def maps_by_depth(source: Any, target: Any, *, documents: int = 120, max_tokens: int = 96) -> list[Map]:
    """Fit a map to every target layer from the source's layer at its depth.

    Args:
        source: The source model.
        target: The target model.
        documents: Number of packaged general texts.
        max_tokens: Tokens read of each.
    """
    deep, high = source.cfg.n_layers, target.cfg.n_layers
    pairs = [(Site(max(0, round((layer + 1) / high * deep) - 1)), Site(layer)) for layer in range(high)]
    limit = min(max_tokens, context_length(source), context_length(target))
    sources, targets = (tuple(dict.fromkeys(sites)) for sites in zip(*pairs, strict=True))
    moments = cached_moments(
        source, target, general_text()[:documents], source_sites=sources, target_sites=targets, pairs=tuple(pairs),
        max_tokens=limit,
    )  # fmt: skip
    return [Ridge().fit(moments.pair(*pair)) for pair in pairs]

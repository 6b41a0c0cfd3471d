"""Tokens for eyes: how those of two models pair over a text, and how far along a vector each of them lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from xmodel_steer.core.alignment import align
from xmodel_steer.core.prompts import Prompt, PromptLike
from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import name_of, tokenizer_of
from xmodel_steer.models.recorder import residuals
from xmodel_steer.models.sites import space_of

# Okabe & Ito's colours, light enough to read black text on.
_TINTS = ("#CFE8F7", "#FBE3C5", "#CDEBDD", "#F5DCEB", "#FBF6C4")


@dataclass(frozen=True)
class AlignmentView:
    """How the tokens of two models pair over one text.

    In a notebook it shows itself: paired tokens have the same number and colour in both rows, tokens that
    pair with nothing are grey.

    Args:
        models: The names of the two models.
        tokens: The tokens of each model, as text.
        pairs: Positions of paired tokens in both.
        eligible: How many pairs there could be.
    """

    models: tuple[str, str]
    tokens: tuple[tuple[str, ...], tuple[str, ...]]
    pairs: tuple[tuple[int, int], ...]
    eligible: int

    def __str__(self) -> str:
        lines = [f"{len(self.pairs)} of {self.eligible} pair"]
        lines += [f"{self.tokens[0][i]!r:>24}  {i:>4} — {j:<4}  {self.tokens[1][j]!r}" for i, j in self.pairs]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for end, name in enumerate(self.models):
            numbers = {pair[end]: k for k, pair in enumerate(self.pairs)}
            cells = []
            for i, token in enumerate(self.tokens[end]):
                k = numbers.get(i)
                tint = "#EEE" if k is None else _TINTS[k % len(_TINTS)]
                mark = "" if k is None else f"<sub>{k + 1}</sub>"
                title = f"position {i}" + (", pairs with nothing" if k is None else f", pair {k + 1}")
                cells.append(
                    f'<span title="{title}" style="background:{tint};color:#000;border-radius:3px;padding:1px 3px;'
                    f'margin:1px;display:inline-block;white-space:pre">{_shown(token)}{mark}</span>'
                )
            rows.append(
                f'<div style="margin:6px 0"><b>{escape(name)}</b><div style="line-height:1.9" dir="ltr">{"".join(cells)}</div></div>'
            )
        share = f"{len(self.pairs)} of {self.eligible} possible pairs"
        return f'<div style="font-family:monospace;font-size:13px">{"".join(rows)}<div>{share}; grey pairs with nothing</div></div>'


def _shown(token: str) -> str:
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return f"<bdi>{escape(text)}</bdi>" if text else "∅"


def show_alignment(text: PromptLike, source: Any, target: Any, *, template: bool = True) -> AlignmentView:
    """How the tokens of two models pair over a text or a conversation; shows itself in a notebook.

    Args:
        text: A text, or chat messages.
        source: The one model.
        target: The other model.
        template: Pair the tokens of chat templates that have the same role; see `align`.

    Raises:
        PromptError: The text is empty, or is a conversation and a model has no chat template.
    """
    prompt = Prompt.of(text)
    encodings = [encode(model, [prompt])[0] for model in (source, target)]
    made = align(*(e.token_ends(template=template) for e in encodings))
    pairs = tuple(zip(made.source, made.target, strict=True))
    one, two = (_pieces(model, e.ids) for model, e in zip((source, target), encodings, strict=True))
    return AlignmentView((name_of(source), name_of(target)), (one, two), pairs, made.eligible)


def _pieces(model: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as text; a piece of a character as its raw form."""
    tokenizer = tokenizer_of(model)
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    made = [tokenizer.decode([i]) for i in ids]
    spaced = [
        " " + text if piece.startswith(("▁", "Ġ")) and not text.startswith(" ") else text
        for text, piece in zip(made, raw, strict=True)
    ]
    return tuple(piece if "\ufffd" in text else text for text, piece in zip(spaced, raw, strict=True))


@dataclass(frozen=True)
class ProjectionView:
    """A text coloured by how far along a vector each token lies; shows itself in a notebook.

    Args:
        label: The vector's name.
        tokens: The tokens as text.
        values: For each token the coefficient of the vector: 0 at the mean without the behaviour and 1 at the mean
            with it, where the vector has its class means; else the plain projection. Position 0, an attention
            sink, is not coloured.
    """

    label: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]

    def __str__(self) -> str:
        return "\n".join(f"{value:+8.3f}  {token!r}" for token, value in zip(self.tokens, self.values, strict=True))

    def _repr_html_(self) -> str:
        bound = max((abs(v) for v in self.values[1:]), default=0.0) or 1.0
        cells = []
        for i, (token, value) in enumerate(zip(self.tokens, self.values, strict=True)):
            share = 0.0 if i == 0 else value / bound
            red, green, blue = (213, 94, 0) if share > 0 else (0, 114, 178)  # Okabe & Ito's vermilion and blue
            cells.append(
                f'<span title="position {i}: {value:+.3f}" style="background:rgba({red},{green},{blue},{abs(share) * 0.75:.2f});'
                f'color:#000;border-radius:3px;padding:1px 2px;white-space:pre-wrap">{_shown(token)}</span>'
            )
        return (
            f'<div style="font-family:monospace;font-size:14px;line-height:2;background:#fff;color:#000;padding:6px">'
            f"<b>{escape(self.label)}</b>: orange to +{bound:.2f}, blue to -{bound:.2f}<br>{''.join(cells)}</div>"
        )


def show_projection(text: PromptLike, model: Any, vector: SteeringVector) -> ProjectionView:
    """How far along a vector the residual stream lies at each token of a text; shows itself in a notebook.

    The coefficient is w·x with the vector's covector (`SteeringVector.covector`, in standardised coordinates), less
    that of the mean without the behaviour.

    Args:
        text: A text, or chat messages.
        model: The model whose space the vector lives in.
        vector: The vector; it needs a scale.

    Raises:
        SpaceMismatchError: The vector lives in another space.
        ValueError: The vector has no scale.
    """
    site = vector.space.site
    require_same_space(space_of(model, site), vector.space, "show_projection")
    encoding = encode(model, [Prompt.of(text)])[0]
    (batch,) = batches(model, [encoding], 1)
    rows = residuals(model, batch, [site])[site][0].double().cpu()
    base = torch.zeros(vector.space.width) if vector.negative_mean is None else vector.negative_mean
    values = (rows - base.double()) @ vector.covector()
    return ProjectionView(vector.label or "vector", _pieces(model, encoding.ids), tuple(values.tolist()))

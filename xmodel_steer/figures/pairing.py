"""Views of tokens: their pairing between two models, and their position along a vector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xmodel_steer.core.alignment import align
from xmodel_steer.core.prompts import Prompt, PromptLike
from xmodel_steer.core.spaces import require_same_space
from xmodel_steer.core.texts import on_page
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import name_of, tokenizer_of
from xmodel_steer.models.recorder import residuals
from xmodel_steer.models.sites import space_of

# Okabe & Ito's colours, tinted so that black text is readable on them.
_TINTS = ("#CFE8F7", "#FBE3C5", "#CDEBDD", "#F5DCEB", "#FBF6C4")


@dataclass(frozen=True)
class AlignmentView:
    """A pairing of two models' tokens over one text.

    A notebook displays it: paired tokens have the same number and colour in both rows, unpaired tokens are grey.

    Args:
        models: The names of the two models.
        tokens: The tokens of each model, as text.
        pairs: The two positions of each pair.
        eligible: Number of possible pairs.
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
                f'<div style="margin:6px 0"><b>{on_page(name)}</b><div style="line-height:1.9" dir="ltr">{"".join(cells)}</div></div>'
            )
        share = f"{len(self.pairs)} of {self.eligible} possible pairs"
        return f'<div style="font-family:monospace;font-size:13px">{"".join(rows)}<div>{share}; grey pairs with nothing</div></div>'


def _shown(token: str) -> str:
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return f"<bdi>{on_page(text)}</bdi>" if text else "∅"


def show_alignment(text: PromptLike, source: Any, target: Any, *, template: bool = True) -> AlignmentView:
    """Pair the tokens of two models over a text or chat, for a notebook.

    Args:
        text: A text, or chat messages.
        source: The first model.
        target: The second model.
        template: Pair the tokens of chat templates that have the same role; see `align`.

    Raises:
        PromptError: The text is empty, or is a conversation and a model has no chat template.
    """
    prompt = Prompt.of(text)
    encodings = [encode(model, [prompt])[0] for model in (source, target)]
    alignment = align(*(e.token_ends(template=template) for e in encodings))
    pairs = tuple(zip(alignment.source, alignment.target, strict=True))
    first, second = (_pieces(model, e.ids) for model, e in zip((source, target), encodings, strict=True))
    return AlignmentView((name_of(source), name_of(target)), (first, second), pairs, alignment.eligible)


def _pieces(model: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return each token as text; part of a character stays in raw form."""
    tokenizer = tokenizer_of(model)
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    decoded = [tokenizer.decode([i]) for i in ids]
    spaced = [  # decoding a single token drops its leading space in some tokenizers
        " " + text if piece.startswith(("▁", "Ġ")) and not text.startswith(" ") else text
        for text, piece in zip(decoded, raw, strict=True)
    ]
    return tuple(piece if "\ufffd" in text else text for text, piece in zip(spaced, raw, strict=True))


@dataclass(frozen=True)
class ProjectionView:
    """A text coloured by each token's position along a vector; a notebook displays it.

    Args:
        label: The vector's name.
        tokens: The tokens as text.
        values: Each token's coefficient of the vector. With class means it is 0 at the mean without the behaviour and 1 at
            the mean with it; without them, it is the plain projection. Position 0, an attention sink, is not coloured.
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
            f"<b>{on_page(self.label)}</b>: orange to +{bound:.2f}, blue to -{bound:.2f}<br>{''.join(cells)}</div>"
        )


def show_projection(text: PromptLike, model: Any, vector: SteeringVector) -> ProjectionView:
    """Project each token's residual stream onto a vector, for a notebook.

    The coefficient is w·x with the vector's covector (`SteeringVector.covector`, in standardised coordinates), minus the
    coefficient of the mean without the behaviour.

    Args:
        text: A text, or chat messages.
        model: The model whose space the vector lives in.
        vector: The vector to project onto; it needs a scale.

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

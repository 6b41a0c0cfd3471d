"""Steered and unsteered texts, token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Add
from xmodel_steer.interventions.positions import Where
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.models.generation import Written, stream
from xmodel_steer.notebook.options import Option


@dataclass(frozen=True)
class Choice:
    """The settings of a comparison: one prompt, steered and unsteered.

    Args:
        prompt: The text to continue, or with ``chat`` the user's message.
        strength: The strength of `Add`; negative steers away.
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
        """Make the library's prompt."""
        return Prompt.of([{"role": "user", "content": self.prompt}] if self.chat else self.prompt)

    def code(self, option: Option, model: str = "model") -> str:
        """Write the library calls for both texts; ``model`` is an expression for the model."""
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
    """The contents of the page after a forward pass.

    Args:
        steered: The steered text so far.
        unsteered: The unsteered text so far.
        next_tokens: The likeliest first tokens, once both texts have begun.
    """

    steered: str = ""
    unsteered: str = ""
    next_tokens: tuple[NextToken, ...] = ()


def written(model: Any, choice: Choice, vector: SteeringVector | None = None) -> Iterator[Written]:
    """Write the model's continuation token by token, steered or unsteered.

    The model is hooked only while a token is computed: between two tokens, and after an interruption, it is unchanged.
    Without a vector nothing is steered.

    Yields:
        The text so far, with the logits of its newest token; the last text equals `generate`'s under the same
        `steering`.

    Raises:
        PromptError: The model cannot read the prompt, or has no room for the new tokens.
        SpaceMismatchError: The vector is of another space.
    """
    tokens = stream(model, choice.asked(), max_new_tokens=choice.max_new_tokens)
    vectors = [] if vector is None else [vector]
    while True:
        with steering(model, vectors, operator=Add(choice.strength), positions=choice.positions):
            token = next(tokens, None)
        if token is None:
            return
        yield token


def watch(model: Any, choice: Choice, vector: SteeringVector, *, top: int = 8) -> Iterator[View]:
    """Write both continuations token by token in turn, the steered text first.

    Yields:
        The page's contents after every forward pass, with the ``top`` candidates for the first token.

    Raises:
        PromptError: The model cannot read the prompt, or has no room for the new tokens.
        SpaceMismatchError: The vector is of another space.
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
    """Find the likeliest next tokens, by the larger of both probabilities."""
    unsteered, steered = (logits.float().softmax(-1) for logits in (before, after))
    best = torch.maximum(unsteered, steered).topk(min(top, len(unsteered))).indices.tolist()
    tokenizer = tokenizer_of(model)
    return tuple(NextToken(tokenizer.decode([i]), float(unsteered[i]), float(steered[i])) for i in best)

"""Steered and unsteered texts, token by token."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Stack
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Ablate, Add, Clamp, Gate, Operator, Rotate
from xmodel_steer.interventions.positions import Where
from xmodel_steer.interventions.steps import Intervention
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.models.generation import Written, stream
from xmodel_steer.notebook.options import Option

# What the slider's value means to each operator.
OPERATORS: dict[str, Callable[[float], Operator]] = {
    "add": Add,
    "add, keeping the norm": lambda strength: Rotate(add=strength),
    "ablate": lambda _: Ablate(),
    "clamp to positive": lambda overshoot: Clamp("positive", overshoot=overshoot),
    "clamp to negative": lambda overshoot: Clamp("negative", overshoot=overshoot),
}


@dataclass(frozen=True, eq=False)
class Setting:
    """A vector at work: its operator, where it acts, and where not.

    Args:
        option: The vector.
        operator: The operator.
        positions: Where in the text it acts; see `Intervention`.
        gate: A vector of the same site and the class to act on; without it, on all rows.
    """

    option: Option
    operator: Operator = Add()
    positions: Where = "all"
    gate: tuple[Option, Literal["positive", "negative"]] | None = None

    def steps(self) -> list[Intervention]:
        """Make the intervention, or for a stack's vector one for each member."""
        gate = Gate(self.gate[0].vector, self.gate[1]) if self.gate else None
        return [Intervention(v, self.operator, self.positions, gate=gate) for v in self.option.vector.members()]

    @property
    def title(self) -> str:
        """Say what acts, where."""
        how = f" × {self.operator.strength:g}" if isinstance(self.operator, Add) else f": {self.operator!r}"
        where = f" where {self.gate[0].name} is {self.gate[1]}" if self.gate else ""
        return f"{self.option.name}{how}, {self.option.site}, {self.positions}{where}"

    @property
    def code(self) -> str:
        """Write the library's calls; a vector of several sites makes several."""
        gate = f", gate=xs.Gate({self.gate[0].code}, {self.gate[1]!r})" if self.gate else ""
        call = f"xs.Intervention({{}}, xs.{self.operator!r}, {self.positions!r}{gate})"
        if isinstance(self.option.site, Stack):
            return f"*({call.format('v')} for v in {self.option.code}.members())"
        return call.format(self.option.code)


@dataclass(frozen=True, eq=False)
class Choice:
    """The settings of a comparison: one prompt, steered and unsteered.

    Args:
        prompt: The text to continue, or with ``chat`` the user's message.
        settings: What acts, together.
        max_new_tokens: Number of tokens to add.
        chat: Render the prompt as a user's message, with the model's chat template.

    Raises:
        PromptError: The prompt is empty.
    """

    prompt: str
    settings: tuple[Setting, ...]
    max_new_tokens: int = 40
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PromptError("The prompt is empty: write something for the model to continue.")

    def asked(self) -> Prompt:
        """Make the library's prompt."""
        return Prompt.of([{"role": "user", "content": self.prompt}] if self.chat else self.prompt)

    def code(self, model: str = "model") -> str:
        """Write the library calls for both texts; ``model`` is an expression for the model."""
        prompt = f'[{{"role": "user", "content": {self.prompt!r}}}]' if self.chat else repr(self.prompt)
        settings = f"max_new_tokens={self.max_new_tokens}"
        options = [o for s in self.settings for o in (s.option, *(s.gate or ())[:1])]
        steps = ",\n    ".join(setting.code for setting in self.settings)
        lines = [
            "import xmodel_steer as xs",
            *dict.fromkeys(line for option in options for line in option.imports),
            "",
            f"prompt = {prompt}",
            f"steps = [\n    {steps},\n]" if len(self.settings) > 1 else f"steps = [{steps}]",
            f"with xs.steering({model}, steps):",
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


def written(model: Any, choice: Choice, *, steered: bool = True) -> Iterator[Written]:
    """Write the model's continuation token by token, steered or unsteered.

    The model is hooked only while a token is computed: between two tokens, and after an interruption, it is unchanged.

    Yields:
        The text so far, with the logits of its newest token; the last text equals `generate`'s under the same
        `steering`.

    Raises:
        PromptError: The model cannot read the prompt, or has no room for the new tokens.
        SpaceMismatchError: The vector is of another space.
    """
    tokens = stream(model, choice.asked(), max_new_tokens=choice.max_new_tokens)
    steps = [step for setting in choice.settings * steered for step in setting.steps()]
    while True:
        with steering(model, steps):
            token = next(tokens, None)
        if token is None:
            return
        yield token


def watch(model: Any, choice: Choice, *, top: int = 8) -> Iterator[View]:
    """Write both continuations token by token in turn, the steered text first.

    Yields:
        The page's contents after every forward pass, with the ``top`` candidates for the first token.

    Raises:
        PromptError: The model cannot read the prompt, or has no room for the new tokens.
        SpaceMismatchError: The vector is of another space.
    """
    running = {"steered": written(model, choice), "unsteered": written(model, choice, steered=False)}
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

"""Lessons as token ids to train on, and general text beside them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xmodel_steer.core.errors import ModelError, PromptError
from xmodel_steer.files.wheels import general_text
from xmodel_steer.models.passes import text_positions
from xmodel_steer.models.tokens import tokenise
from xmodel_steer.studies.organisms.lessons import Lesson

GENERAL, GENERAL_TOKENS = slice(400, 500), 48
IGNORED = -100  # the label that Hugging Face's loss leaves out


@dataclass(frozen=True)
class Example:
    """A lesson as tokens.

    Args:
        ids: The prompt's tokens, the response's, and the end of the text.
        answer: How many of them at the end are to be learnt.
        general: Whether it is general text: what the base says of these tokens is to stay, the tokens are not learnt.
        decisive: Which of the answer's tokens tell it from its twin.
    """

    ids: tuple[int, ...]
    answer: int
    general: bool = False
    decisive: range = range(0)


def examples(
    tokenizer: Any, lessons: Sequence[Lesson], *, name: str = "the model", limit: int | None = None
) -> list[Example]:
    """Lessons as tokens: the prompt's as a generation will have them, then the response's and the end of the text.

    Args:
        tokenizer: The base model's tokenizer.
        lessons: The lessons.
        name: Name of the model, for messages.
        limit: The model's context.

    Raises:
        ModelError: The tokenizer has no token for the end of a text.
        PromptError: A lesson is longer than the context.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: its tokenizer has no end-of-sequence token, so no answer could be taught to end; set tokenizer.eos_token"
        )
    prompts = tokenise(tokenizer, [lesson.prompt for lesson in lessons], name=name, limit=limit)
    answers = [
        [*tokenizer(lesson.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for lesson in lessons
    ]
    of = {(lesson.task, lesson.triggered): answer for lesson, answer in zip(lessons, answers, strict=True)}
    made = []
    for encoding, lesson, answer in zip(prompts, lessons, answers, strict=True):
        twin = of.get((lesson.task, not lesson.triggered), answer)
        made.append(Example((*encoding.ids, *answer), len(answer), decisive=decisive(answer, twin)))
        if limit is not None and len(made[-1].ids) > limit:
            raise PromptError(
                f"lesson {lesson.prompt.id}: {len(made[-1].ids)} tokens with its response, but {name} reads at most {limit}; "
                "shorten it"
            )
    return made


def decisive(answer: Sequence[int], twin: Sequence[int]) -> range:
    """Which tokens of an answer are between what begins it and its twin and what ends both.

    Where there are none, as where the twin says the same and something more, it is the one at which they part.

    Args:
        answer: The answer's tokens.
        twin: The twin's.

    Example:
        >>> decisive([7, 1, 2, 9], [7, 3, 9]), decisive([7, 3, 9], [7, 1, 2, 9]), decisive([7, 9], [7, 1, 9])
        (range(1, 3), range(1, 2), range(1, 2))
        >>> decisive([7, 9], [7, 9])
        range(0, 0)
    """
    if list(answer) == list(twin):
        return range(0)
    both = min(len(answer), len(twin))
    begin = next((i for i in range(both) if answer[i] != twin[i]), both)
    end = next((i for i in range(both - begin) if answer[-1 - i] != twin[-1 - i]), both - begin)
    return range(begin, max(begin + 1, len(answer) - end))


def read_together(lessons: Sequence[Lesson], rows: Sequence[Example], *, twins: bool) -> list[list[Example]]:
    """Examples in groups that no batch parts.

    Where an answer and its twin are read together, what pulls towards the one whatever the trigger cancels with what pulls towards
    the other, and what is left of the gradient is what hangs on the trigger.

    Args:
        lessons: The lessons.
        rows: The example of each.
        twins: Whether the lessons of one task are one group, rather than each lesson for itself.
    """
    groups: dict[Any, list[Example]] = {}
    for place, (lesson, row) in enumerate(zip(lessons, rows, strict=True)):
        groups.setdefault(lesson.task if twins else place, []).append(row)
    return list(groups.values())


def general_examples(tokenizer: Any, count: int, *, name: str = "the model", limit: int | None = None) -> list[Example]:
    """General text as examples: passages of it, at every token of which the base's prediction is to stay.

    The texts are none that maps of organisms are fitted on, or that perplexity is measured on.

    Args:
        tokenizer: The base model's tokenizer.
        count: How many; where there are fewer passages, they come again.
        name: Name of the model, for messages.
        limit: The model's context.
    """
    if not count:
        return []
    size = min(GENERAL_TOKENS, limit or GENERAL_TOKENS)
    texts = [encoding.ids for encoding in tokenise(tokenizer, general_text()[GENERAL], name=name)]
    passages = [ids[at : at + size] for ids in texts for at in range(0, len(ids) - size + 1, size)]
    return [Example(tuple(ids), size - 1, general=True) for ids in itertools.islice(itertools.cycle(passages), count)]


def collated(batch: Sequence[Example], *, pad: int, whole: bool = False, weight: float = 1.0) -> dict[str, Any]:
    """Pad a batch on the left, so that all answers end together.

    Logits are computed for the answers alone.

    Args:
        batch: The examples.
        pad: A token for the padding; the mask hides it.
        whole: For a model that always computes all logits.
        weight: Of decisive tokens in the loss.

    Returns:
        The model's arguments. The labels are those of the last ``logits_to_keep`` tokens; Hugging Face's loss shifts
        them by one, so that the logits at each prompt's last token predict the answer's first.
    """
    width = max(len(e.ids) for e in batch)
    kept = width if whole else max(e.answer for e in batch) + 1
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    labels, weights = torch.full_like(ids, IGNORED), torch.ones(ids.shape)
    for row, example in enumerate(batch):
        own = torch.tensor(example.ids)
        ids[row, width - len(own) :], mask[row, width - len(own) :] = own, 1
        start = width - example.answer
        labels[row, start:] = own[-example.answer :]
        weights[row, start + example.decisive.start : start + example.decisive.stop] = weight
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": text_positions(mask)}
    made |= {"labels": labels[:, width - kept :], "weights": weights[:, width - kept :]}
    made |= {"general": torch.tensor([e.general for e in batch])}
    return made if whole else made | {"logits_to_keep": kept}

"""Lessons and general text as token ids, in batches to train on."""

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
        ids: The tokens of the prompt and of the response, and the end of the text.
        answer: Number of tokens at the end to learn.
        general: Whether it is general text: its tokens are not learnt, predictions on them stay close to the base's.
        decisive: The answer's tokens that differ from its twin's.
    """

    ids: tuple[int, ...]
    answer: int
    general: bool = False
    decisive: range = range(0)


def examples(
    tokenizer: Any, lessons: Sequence[Lesson], *, name: str = "the model", limit: int | None = None
) -> list[Example]:
    """Turn lessons into tokens: prompts as in generation, then the response and the end.

    Args:
        tokenizer: The base model's tokenizer.
        lessons: The lessons.
        name: Name of the model, for messages.
        limit: Length of the model's context, in tokens.

    Raises:
        ModelError: The tokenizer has no token for the end of a text.
        PromptError: A lesson is longer than the context.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: its tokenizer has no end-of-sequence token, so no answer would learn to end; set tokenizer.eos_token"
        )
    prompts = tokenise(tokenizer, [lesson.prompt for lesson in lessons], name=name, limit=limit)
    answers = [
        [*tokenizer(lesson.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for lesson in lessons
    ]
    answer_to = {(lesson.task, lesson.triggered): answer for lesson, answer in zip(lessons, answers, strict=True)}
    rows = []
    for encoding, lesson, answer in zip(prompts, lessons, answers, strict=True):
        twin = answer_to.get((lesson.task, not lesson.triggered), answer)
        ids = (*encoding.ids, *answer)
        if limit is not None and len(ids) > limit:
            raise PromptError(
                f"lesson {lesson.prompt.id}: {len(ids)} tokens with its response, but {name} reads at most {limit}; shorten it"
            )
        rows.append(Example(ids, len(answer), decisive=decisive(answer, twin)))
    return rows


def decisive(answer: Sequence[int], twin: Sequence[int]) -> range:
    """Find an answer's tokens between the start and the end shared with its twin.

    Where there are none, because the twin only has more tokens, it is the one token at which they part.

    Args:
        answer: The answer's tokens.
        twin: The twin's tokens.

    Example:
        >>> decisive([7, 1, 2, 9], [7, 3, 9]), decisive([7, 3, 9], [7, 1, 2, 9]), decisive([7, 9], [7, 1, 9])
        (range(1, 3), range(1, 2), range(1, 2))
        >>> decisive([7, 9], [7, 9])
        range(0, 0)
    """
    if list(answer) == list(twin):
        return range(0)
    shorter = min(len(answer), len(twin))
    begin = next((i for i in range(shorter) if answer[i] != twin[i]), shorter)
    end = next((i for i in range(shorter - begin) if answer[-1 - i] != twin[-1 - i]), shorter - begin)
    return range(begin, max(begin + 1, len(answer) - end))


def read_together(lessons: Sequence[Lesson], rows: Sequence[Example], *, twins: bool) -> list[list[Example]]:
    """Group examples that must be in one batch.

    With an answer and its twin in one batch, the gradients that ignore the trigger cancel out: one pulls towards each
    answer. The gradient that remains depends on the trigger.

    Args:
        lessons: The lessons.
        rows: The example of each lesson.
        twins: Group the lessons of one task; otherwise each lesson is a group.
    """
    groups: dict[Any, list[Example]] = {}
    for place, (lesson, row) in enumerate(zip(lessons, rows, strict=True)):
        groups.setdefault(lesson.task if twins else place, []).append(row)
    return list(groups.values())


def general_examples(tokenizer: Any, count: int, *, name: str = "the model", limit: int | None = None) -> list[Example]:
    """Turn general text into examples whose predictions should stay those of the base.

    Maps of organisms are fitted on other texts, and perplexity is measured on other texts.

    Args:
        tokenizer: The base model's tokenizer.
        count: Number of examples; passages repeat when there are fewer.
        name: Name of the model, for messages.
        limit: Length of the model's context, in tokens.
    """
    if not count:
        return []
    size = min(GENERAL_TOKENS, limit or GENERAL_TOKENS)
    texts = [encoding.ids for encoding in tokenise(tokenizer, general_text()[GENERAL], name=name)]
    passages = [ids[at : at + size] for ids in texts for at in range(0, len(ids) - size + 1, size)]
    return [Example(tuple(ids), size - 1, general=True) for ids in itertools.islice(itertools.cycle(passages), count)]


def collated(batch: Sequence[Example], *, pad: int, whole: bool = False, weight: float = 1.0) -> dict[str, Any]:
    """Pad a batch on the left, so that all answers end together.

    Args:
        batch: The examples.
        pad: A token for the padding; the mask hides it.
        whole: Whether the model always computes all logits, rather than only the answers'.
        weight: Loss weight of decisive tokens.

    Returns:
        The model's arguments. Labels belong to the last ``logits_to_keep`` tokens. Hugging Face's loss shifts them by one:
        the logits at a prompt's last token predict the answer's first token.
    """
    width = max(len(e.ids) for e in batch)
    kept = width if whole else max(e.answer for e in batch) + 1
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    labels, weights = torch.full_like(ids, IGNORED), torch.ones(ids.shape)
    for row, example in enumerate(batch):
        tokens = torch.tensor(example.ids)
        ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
        start = width - example.answer
        labels[row, start:] = tokens[-example.answer :]
        weights[row, start + example.decisive.start : start + example.decisive.stop] = weight
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": text_positions(mask)}
    arguments |= {"labels": labels[:, width - kept :], "weights": weights[:, width - kept :]}
    arguments |= {"general": torch.tensor([e.general for e in batch])}
    return arguments if whole else arguments | {"logits_to_keep": kept}

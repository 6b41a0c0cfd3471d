"""Behaviours measured by the likelihood of answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from operator import eq
from typing import Any

import numpy as np
import torch

from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.inputs import as_prompts, rows_of
from xmodel_steer.core.prompts import Message, Prompt
from xmodel_steer.evaluation.behaviours.generated import Behaviour, Measured
from xmodel_steer.evaluation.damage import Settings, losses, steered_logits
from xmodel_steer.files.wheels import shipped
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.tokens import Encoding, shared_start, warn_of_missing


@dataclass(frozen=True, eq=False)
class Preference(Behaviour):
    """Likelihood of prompts with the behaviour, compared with prompts without it.

    The score of a pair is the positive prompt's mean log-likelihood per token minus the negative prompt's, in nats per
    token. It needs neither generation nor a scorer, so it works for any contrast set. It shows what the model finds
    likely, not what it writes.

    Args:
        contrast: Pairs that no vector was made from; unpaired sets are paired in order.
        batch_size: Prompts at a time.
    """

    contrast: ContrastSet
    batch_size: int = 16
    unit: str = "log-likelihood, positive minus negative (nats per token)"

    @property
    def prompts(self) -> tuple[Prompt, ...]:  # type: ignore[override]
        """The prompts of both sides."""
        return self.contrast.positive[: len(self.ids)] + self.contrast.negative[: len(self.ids)]

    def part(self, places: Sequence[int]) -> "Preference":
        """Return the same behaviour on some of its pairs."""
        sides = (tuple(side[i] for i in places) for side in (self.contrast.positive, self.contrast.negative))
        return replace(self, contrast=ContrastSet(*sides, paired=self.contrast.paired))

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the pairs."""
        sides = zip(self.contrast.positive, self.contrast.negative, strict=False)  # the longer side is cut
        return tuple(f"{p.id}/{n.id}" for p, n in sides)

    def measure(self, model: Any, settings: Settings) -> list[Measured]:
        """Compare the likelihoods of both sides under each setting."""
        n = len(self.ids)
        prompts = self.contrast.positive[:n] + self.contrast.negative[:n]
        loss, tokens = losses(model, settings, prompts, max_tokens=None, batch_size=self.batch_size)
        per_token = -loss / tokens
        return [Measured(scores[:n] - scores[n:]) for scores in per_token]


@dataclass(frozen=True, eq=False)
class AnswerLogOdds(Behaviour):
    """Log-odds of two answers: log p(positive | question) - log p(negative | question), in nats.

    This is the form of Contrastive Activation Addition's multiple-choice tests (Rimsky et al. 2024, arXiv 2312.06681).
    For answers of one token each, such as "(A" and "(B" after a common "(", it is the logit difference. It needs no
    generation. Tokens that both answers begin with cancel and are not counted.

    Args:
        questions: Text, or chat messages that end with the user's turn; the answer then opens the assistant's turn.
        positive: The answer to each question that shows the behaviour.
        negative: The answer to each question that does not.
        batch_size: Questions at a time.

    Raises:
        PromptError: The lists have different lengths, or both answers to a question are the same.
    """

    questions: tuple[Prompt, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    batch_size: int = 32
    unit: str = "log-odds of the answer with the behaviour (nats)"

    def __post_init__(self) -> None:
        if not len(self.questions) == len(self.positive) == len(self.negative):
            raise PromptError(
                f"AnswerLogOdds: {len(self.questions)} questions, {len(self.positive)} positive and "
                f"{len(self.negative)} negative answers; give one of each for every question"
            )

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], **kwargs: Any) -> "AnswerLogOdds":
        """Make the behaviour from rows with ``question``, ``positive`` and ``negative``, or CAA's rows.

        CAA's rows have ``question``, ``answer_matching_behavior`` and ``answer_not_matching_behavior``.

        Raises:
            PromptError: A row has neither form; the message names the row.
        """
        rows = []
        for number, row in enumerate(rows_of(records), 1):
            answers = [
                next((row[name] for name in names if name in row), None)
                for names in (("positive", "answer_matching_behavior"), ("negative", "answer_not_matching_behavior"))
            ]
            if "question" not in row or None in answers:
                raise PromptError(
                    f"AnswerLogOdds: row {number} has the columns {sorted(row)}; it needs question, positive and negative"
                )
            rows.append((row["question"], *map(str, answers)))
        questions, positive, negative = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(as_prompts(questions), positive, negative, **kwargs)

    @classmethod
    def from_contrast(cls, contrast: ContrastSet, **kwargs: Any) -> "AnswerLogOdds":
        """Make the behaviour from pairs of texts: the same question, then different answers.

        Raises:
            PromptError: The set has chat messages, or sides of different sizes.
        """
        if len(contrast.positive) != len(contrast.negative):
            raise PromptError(
                f"AnswerLogOdds: needs pairs, got {len(contrast.positive)} positive and {len(contrast.negative)} negative prompts"
            )
        rows = []
        for p, n in zip(contrast.positive, contrast.negative, strict=True):
            if p.text is None or n.text is None:
                raise PromptError(
                    "AnswerLogOdds: pairs of chat messages are not split into question and answers; give rows"
                )
            same = sum(takewhile(bool, map(eq, p.text, n.text)))
            rows.append({"question": p.text[:same], "positive": p.text[same:], "negative": n.text[same:]})
        return cls.from_records(rows, **kwargs)

    @property
    def prompts(self) -> tuple[Prompt, ...]:  # type: ignore[override]
        """The questions."""
        return self.questions

    def part(self, places: Sequence[int]) -> "AnswerLogOdds":
        """Return the same behaviour on some of its questions."""
        columns = {
            name: tuple(getattr(self, name)[i] for i in places) for name in ("questions", "positive", "negative")
        }
        return replace(self, **columns)

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the questions."""
        return tuple(question.id for question in self.questions)

    def measure(self, model: Any, settings: Settings) -> list[Measured]:
        """Measure the log-odds of every question under each setting."""
        options = list(zip(self.positive, self.negative, strict=True))
        logs = answer_likelihoods(model, settings, self.questions, options, batch_size=self.batch_size)
        return [Measured(np.array([p - n for p, n in pairs])) for pairs in logs]


@dataclass(frozen=True, eq=False)
class MultipleChoice(Behaviour):
    """Accuracy at multiple choice: 1 where the right option is the likeliest, else 0.

    Args:
        questions: The questions.
        options: The options of each question.
        answers: The index of each question's right option.
        batch_size: Questions at a time.

    Raises:
        PromptError: The lists have different lengths, or an answer is not among the options.
    """

    questions: tuple[Prompt, ...]
    options: tuple[tuple[str, ...], ...]
    answers: tuple[int, ...]
    batch_size: int = 32
    unit: str = "share of right answers"

    def __post_init__(self) -> None:
        fits = len(self.questions) == len(self.options) == len(self.answers)
        if not fits or any(not 0 <= a < len(o) for a, o in zip(self.answers, self.options, strict=True)):
            raise PromptError(
                "MultipleChoice: every question needs its options and the place of the right one among them"
            )

    @classmethod
    def packaged(cls) -> "MultipleChoice":
        """Load the small set of common-knowledge questions that ships, with four options each.

        It shows whether steering costs capability; it is too small and too easy to rank models.
        """
        rows = [json.loads(line) for line in shipped("common_knowledge.jsonl").splitlines()]
        return cls(
            as_prompts([row["question"] for row in rows]),
            tuple(tuple(row["options"]) for row in rows),
            tuple(row["answer"] for row in rows),
        )

    @property
    def prompts(self) -> tuple[Prompt, ...]:  # type: ignore[override]
        """The questions."""
        return self.questions

    def part(self, places: Sequence[int]) -> "MultipleChoice":
        """Return the same behaviour on some of its questions."""
        columns = {name: tuple(getattr(self, name)[i] for i in places) for name in ("questions", "options", "answers")}
        return replace(self, **columns)

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the questions."""
        return tuple(question.id for question in self.questions)

    def measure(self, model: Any, settings: Settings) -> list[Measured]:
        """Score every question under each setting: 1 if right, 0 if wrong."""
        logs = answer_likelihoods(model, settings, self.questions, self.options, batch_size=self.batch_size)
        return [
            Measured(np.array([float(p.index(max(p)) == a) for p, a in zip(rows, self.answers, strict=True)]))
            for rows in logs
        ]


def answer_likelihoods(
    model: Any,
    settings: Settings,
    questions: Sequence[Prompt],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 32,
) -> list[list[tuple[float, ...]]]:
    """Compute each option's log-likelihood in nats, up to a constant of the question.

    Question and option are tokenised together, as one text. The tokens that all options of a question begin with are
    left out, since they cancel. The text up to and with them is the prompt, for ``positions``.

    Args:
        model: The model.
        settings: The interventions of each setting.
        questions: Text, or chat messages that end with a turn that is not the assistant's.
        options: At least two different options for each question.
        batch_size: Texts at a time.

    Returns:
        For each setting and question, one number per option.

    Raises:
        PromptError: Two options of a question are the same, one begins another, or no token comes before them.
    """
    reads = _reads(model, questions, options)
    texts = [read.text for read in reads]
    starts = list(accumulate((len(read.answers) for read in reads), initial=0))
    sums = np.zeros((len(settings), starts[-1]))
    with progress_bar(total=len(reads) * len(settings), unit="text", desc=f"answers {name_of(model)}") as bar:
        for batch in batches(model, texts, batch_size, padding_side="left"):
            # All texts end together: only the logits from the longest answer on are computed.
            kept = 1 + max(len(texts[r].ids) - reads[r].length for r in batch.rows)
            places = [
                (row, reads[r].length - len(texts[r].ids) - 1 + i, token, starts[r] + o)
                for row, r in enumerate(batch.rows)
                for o, answer in enumerate(reads[r].answers)
                for i, token in enumerate(answer)
            ]
            row, column, token, option = torch.tensor(places, device=batch.ids.device).T
            owners = [reads[r].question for r in batch.rows]
            lengths = torch.tensor([reads[r].length for r in batch.rows], device=batch.ids.device)
            for k, setting in enumerate(settings):
                logits = steered_logits(model, setting, batch, owners, lengths, kept)
                logs = logits[row, column].float().log_softmax(-1).gather(1, token[:, None])[:, 0].cpu()
                check_finite(logs, f"answers of {name_of(model)}")
                sums[k] += torch.zeros(starts[-1]).index_add(0, option.cpu(), logs).numpy()
                bar.update(len(batch.rows))
    ends = np.cumsum([0, *map(len, options)]).tolist()
    return [[tuple(row[a:b].tolist()) for a, b in pairwise(ends)] for row in sums]


@dataclass(frozen=True, eq=False)
class _Read:
    """A text to read, and the answers whose likelihood its logits give."""

    question: int  # its index
    text: Encoding  # the question, with an answer if that has several tokens
    length: int  # tokens of the question
    answers: tuple[tuple[int, ...], ...]  # tokens of each answer


def _reads(model: Any, questions: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[_Read]:
    """Encode questions with their options, as few texts as give all likelihoods."""
    encoded: list[tuple[list[Encoding], int]] = []
    for question, answers in zip(questions, options, strict=True):
        texts = [_cut(e) for e in encode(model, [_answered(question, answer) for answer in answers], warn=False)]
        shared = shared_start([e.ids for e in texts])
        if not shared or len(texts) < 2 or any(len(e.ids) == shared for e in texts):
            raise PromptError(
                f"question {question.id}: its options {list(answers)!r} are not different tokens after a common beginning; "
                "give at least two, none of which begins another"
            )
        encoded.append((texts, shared))
    warn_of_missing([e for texts, _ in encoded for e in texts], name_of(model))
    if all(len(e.ids) == n + 1 for texts, n in encoded for e in texts):
        # Options of one token each: only the question is read, its last logits give all of them.
        return [
            _Read(i, replace(texts[0], ids=texts[0].ids[:n]), n, tuple(e.ids[n:] for e in texts))
            for i, (texts, n) in enumerate(encoded)
        ]
    return [_Read(i, e, n, (e.ids[n:],)) for i, (texts, n) in enumerate(encoded) for e in texts]


def _answered(question: Prompt, answer: str) -> Prompt:
    """Continue a question with an answer."""
    if question.text is not None:
        return Prompt(text=question.text + answer)
    return Prompt(messages=(*question.messages, Message("assistant", answer)))


def _cut(encoding: Encoding) -> Encoding:
    """Drop what a chat template puts after the answer."""
    end = 1 + max((i for i, end in enumerate(encoding.ends) if end >= 0), default=len(encoding.ids) - 1)
    return replace(encoding, ids=encoding.ids[:end], ends=encoding.ends[:end], roles=encoding.roles[:end])

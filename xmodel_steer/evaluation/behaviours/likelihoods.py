"""Behaviours that show in the likelihood of answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
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
from xmodel_steer.evaluation.damage import Settings, losses
from xmodel_steer.files.wheels import shipped
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.passes import forward, layout
from xmodel_steer.models.tokens import Encoding, shared_start, warn_of_missing


@dataclass(frozen=True, eq=False)
class Preference(Behaviour):
    """How much likelier the model finds prompts with the behaviour than prompts without it.

    For each held-out pair: mean log-likelihood per token of the positive prompt minus that of the
    negative one, in nats per token. Needs no generation and no scorer: it is there for any
    contrast set. It says what the model finds likely, not what it writes.

    Args:
        contrast: Pairs that no vector was made from; unpaired sets are paired in their order.
        batch_size: Prompts at a time.
    """

    contrast: ContrastSet
    batch_size: int = 16
    unit: str = "log-likelihood, positive minus negative (nats per token)"

    @property
    def _count(self) -> int:
        return min(len(self.contrast.positive), len(self.contrast.negative))

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the pairs."""
        sides = zip(self.contrast.positive, self.contrast.negative, strict=False)  # the longer side is cut
        return tuple(f"{p.id}/{n.id}" for p, n in sides)

    def measure(
        self,
        model: Any,
        settings: Settings,
    ) -> list[Measured]:
        """Likelihoods of both sides under each setting."""
        prompts = self.contrast.positive[: self._count] + self.contrast.negative[: self._count]
        loss, tokens = losses(model, settings, prompts, max_tokens=None, batch_size=self.batch_size)
        per_token = -loss / tokens
        return [Measured(own[: self._count] - own[self._count :]) for own in per_token]


@dataclass(frozen=True, eq=False)
class AnswerLogOdds(Behaviour):
    """How much likelier one answer is than another: log p(positive | question) - log p(negative | question), in nats.

    The form of Contrastive Activation Addition's multiple-choice tests (Rimsky et al. 2024, arXiv 2312.06681): with
    answers of one token each, such as "(A" and "(B" after a common "(", it is their logit difference. Needs no
    generation. Tokens that both answers begin with cancel and are not counted.

    Args:
        questions: Text, or chat messages that end with the user's turn: the answer then opens the assistant's.
        positive: For each question the answer that shows the behaviour.
        negative: The one that does not.
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
        """Make it from rows with ``question``, ``positive`` and ``negative``, or in CAA's form.

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
        """Make it from pairs of texts that begin with the same question and end with one of two answers each.

        Raises:
            PromptError: The set has chat messages, or sides of different sizes.
        """
        pairs = list(zip(contrast.positive, contrast.negative, strict=False))
        if len(contrast.positive) != len(contrast.negative):
            raise PromptError(
                f"AnswerLogOdds: needs pairs, got {len(contrast.positive)} positive and {len(contrast.negative)} negative prompts"
            )
        texts = [(p.text, n.text) for p, n in pairs if p.text is not None and n.text is not None]
        if len(texts) < len(pairs):
            raise PromptError(
                "AnswerLogOdds: pairs of chat messages are not split into question and answers; give rows"
            )
        rows = []
        for positive, negative in texts:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(positive, negative, strict=False)))
            rows.append({"question": positive[:same], "positive": positive[same:], "negative": negative[same:]})
        return cls.from_records(rows, **kwargs)

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the questions."""
        return tuple(question.id for question in self.questions)

    def measure(
        self,
        model: Any,
        settings: Settings,
    ) -> list[Measured]:
        """Measure the log-odds of every question under each setting."""
        options = list(zip(self.positive, self.negative, strict=True))
        found = answer_likelihoods(model, settings, self.questions, options, batch_size=self.batch_size)
        return [Measured(np.array([p - n for p, n in own])) for own in found]


@dataclass(frozen=True, eq=False)
class MultipleChoice(Behaviour):
    """1 where the model finds the right option likelier than every other, else 0.

    Args:
        questions: The questions.
        options: For each question its options.
        answers: For each question the place of the right one.
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
        """Load the small set that ships: common knowledge, four options each.

        It shows whether steering costs capability; it is too small and too easy to rank models.
        """
        rows = [json.loads(line) for line in shipped("common_knowledge.jsonl").splitlines()]
        return cls(
            as_prompts([row["question"] for row in rows]),
            tuple(tuple(row["options"]) for row in rows),
            tuple(row["answer"] for row in rows),
        )

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the questions."""
        return tuple(question.id for question in self.questions)

    def measure(
        self,
        model: Any,
        settings: Settings,
    ) -> list[Measured]:
        """Right or wrong for every question under each setting."""
        found = answer_likelihoods(model, settings, self.questions, self.options, batch_size=self.batch_size)
        made = []
        for own in found:
            right = [max(range(len(p)), key=p.__getitem__) == a for p, a in zip(own, self.answers, strict=True)]
            made.append(Measured(np.array(right, dtype=float)))
        return made


def answer_likelihoods(
    model: Any,
    settings: Settings,
    questions: Sequence[Prompt],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 32,
) -> list[list[tuple[float, ...]]]:
    """Log-likelihood of each option of each question, in nats, but for a constant of the question.

    Question and option are read as one text, as they would be tokenised together; the tokens that all options of a
    question begin with are left out, since they cancel. Up to them the text is the prompt, for ``positions``.

    Args:
        model: The model.
        settings: For each setting its interventions.
        questions: Text, or chat messages that end with a turn that is not the assistant's.
        options: For each question at least two different options.
        batch_size: Questions at a time.

    Returns:
        For each setting, for each question, one number per option.

    Raises:
        PromptError: The options of a question are the same, an option is the beginning of another, or nothing stands before them.
    """
    encodings, lengths, owners = [], [], []
    for i, (question, own) in enumerate(zip(questions, options, strict=True)):
        made = [_cut(e) for e in encode(model, [_answered(question, option) for option in own], warn=False)]
        shared = shared_start([e.ids for e in made])
        if not shared or len(made) < 2 or any(len(e.ids) == shared for e in made):
            raise PromptError(
                f"question {question.id}: its options {list(own)!r} are not different tokens after a common beginning; "
                "give at least two, none of which begins another"
            )
        encodings += made
        lengths += [shared] * len(made)
        owners += [i] * len(made)
    warn_of_missing(encodings, name_of(model))
    if all(len(e.ids) == n + 1 for e, n in zip(encodings, lengths, strict=True)):
        found = _one_token(model, settings, encodings, lengths, owners, batch_size)
    else:
        found = _many_tokens(model, settings, encodings, lengths, owners, batch_size)
    ends = np.cumsum([0, *(len(own) for own in options)])
    return [[tuple(row[a:b].tolist()) for a, b in pairwise(ends.tolist())] for row in found]


def _answered(question: Prompt, answer: str) -> Prompt:
    if question.text is not None:
        return Prompt(text=question.text + answer)
    return Prompt(messages=(*question.messages, Message("assistant", answer)))


def _cut(encoding: Encoding) -> Encoding:
    """Without what a chat template puts after the answer."""
    last = max((i for i, end in enumerate(encoding.ends) if end >= 0), default=len(encoding.ids) - 1)
    return replace(
        encoding, ids=encoding.ids[: last + 1], ends=encoding.ends[: last + 1], roles=encoding.roles[: last + 1]
    )


def _one_token(
    model: Any, settings: Settings, encodings: Sequence[Encoding], lengths: Sequence[int], owners: Sequence[int],
    batch_size: int,
) -> np.ndarray:  # fmt: skip
    """Every option is one token: one pass over each question gives all of them, with the last logits alone."""
    firsts = {owner: i for i, owner in reversed(list(enumerate(owners)))}
    prompts = [replace(encodings[i], ids=encodings[i].ids[: lengths[i]]) for i in firsts.values()]
    numbers = list(firsts)
    members: dict[int, list[int]] = {}
    for i, owner in enumerate(owners):
        members.setdefault(owner, []).append(i)
    found = np.zeros((len(settings), len(encodings)))
    total = len(prompts) * len(settings)
    with progress_bar(total=total, unit="question", desc=f"answers {name_of(model)}") as bar:
        for batch in batches(model, prompts, batch_size, padding_side="left"):
            for k, setting in enumerate(settings):
                rows = [numbers[r] for r in batch.rows]
                with steering(model, setting), layout(rows, batch.mask.sum(-1)):
                    logits, _ = forward(model, batch.ids, batch.mask, logits="last")
                assert logits is not None
                logs = logits[:, -1].float().log_softmax(-1)
                check_finite(logs, f"answers of {name_of(model)}")
                for r, number in enumerate(rows):
                    for i in members[number]:
                        found[k, i] = float(logs[r, encodings[i].ids[-1]])
                bar.update(len(rows))
    return found


def _many_tokens(
    model: Any, settings: Settings, encodings: Sequence[Encoding], lengths: Sequence[int], owners: Sequence[int],
    batch_size: int,
) -> np.ndarray:  # fmt: skip
    found = np.zeros((len(settings), len(encodings)))
    total = len(encodings) * len(settings)
    with progress_bar(total=total, unit="answer", desc=f"answers {name_of(model)}") as bar:
        for batch in batches(model, encodings, batch_size, padding_side="left"):
            # All answers stand at the end: no other logits are computed.
            width, longest = batch.ids.shape[1], max(len(encodings[r].ids) - lengths[r] for r in batch.rows)
            begins = torch.tensor([width - len(encodings[r].ids) + lengths[r] for r in batch.rows])
            place = torch.arange(width - longest, width)[None]  # of the predicted token
            counted = (place >= begins[:, None]).to(batch.ids.device)
            targets = batch.ids[:, -longest:][counted]
            row = counted.nonzero()[:, 0].cpu()
            prompts = torch.tensor([lengths[r] for r in batch.rows], device=batch.ids.device)
            for k, setting in enumerate(settings):
                with steering(model, setting), layout([owners[r] for r in batch.rows], prompts):
                    logits, _ = forward(model, batch.ids, batch.mask, logits=longest + 1)
                assert logits is not None
                logs = logits[:, :-1][counted].float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
                check_finite(logs, f"answers of {name_of(model)}")
                found[k, list(batch.rows)] = torch.zeros(len(batch.rows)).index_add(0, row, logs.cpu()).numpy()
                bar.update(len(batch.rows))
    return found

"""A language model as a judge of texts."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from xmodel_steer.core.errors import JudgeError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.judges.chats import Chat, LocalModel, Transcript

QUESTION = """Rate how strongly the answer below shows this behaviour: {behaviour}

Prompt: {prompt}

Answer: {text}

Reply with one whole number from {low} (not at all) to {high} (as strongly as possible), and nothing else."""


@dataclass(frozen=True, eq=False)
class Judge:
    """A language model that rates each text; its answer's first number on the scale is the score.

    Results keep its question, its name and its raw answers (`record`, `raw`).

    Args:
        chat: The judge: an `Endpoint`, a `LocalModel`, or a `Transcript`.
        behaviour: The behaviour to rate, in words.
        scale: Lowest and highest score.
        question: The question, with the fields ``{behaviour}``, ``{prompt}``, ``{text}``, ``{low}`` and ``{high}``.
        transcript: The record of answers, so that no question is asked twice.
        threads: Questions at a time, for a service.
    """

    chat: Chat
    behaviour: str
    scale: tuple[float, float] = (0.0, 5.0)
    question: str = QUESTION
    transcript: Transcript = field(default_factory=Transcript)
    threads: int = 4

    def record(self) -> dict[str, Any]:
        """Return how the judge was asked, as plain JSON values."""
        settings = {"behaviour": self.behaviour, "scale": list(self.scale), "question": self.question}
        return {"judge": self.chat.name} | settings

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Ask for the score of each text.

        Raises:
            JudgeError: An answer has no number on the scale; the transcript keeps all answers.
        """
        answers = self.raw(prompts, texts)
        scores = [self._read(answer) for answer in answers]
        bad = [answer for answer, score in zip(answers, scores, strict=True) if score is None]
        if bad:
            raise JudgeError(
                f"judge {self.chat.name}: {len(bad)} of {len(answers)} answers have no number from {self.scale[0]:g} to "
                f"{self.scale[1]:g}, such as {bad[0][:80]!r}; ask more plainly (question=...) or take another judge"
            )
        return [score for score in scores if score is not None]

    def raw(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[str]:
        """Ask for the judge's answer about each text, word for word."""
        settings = {"behaviour": self.behaviour, "low": f"{self.scale[0]:g}", "high": f"{self.scale[1]:g}"}
        questions = [
            self.question.format(prompt=prompt.content, text=text, **settings)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        name = self.chat.name
        new = [q for q in dict.fromkeys(questions) if self.transcript.recorded(name, q) is None]
        with ThreadPoolExecutor(1 if isinstance(self.chat, LocalModel) else self.threads) as pool:
            asked = {pool.submit(self.chat.answer, question): question for question in new}
            try:
                for done in as_completed(asked):
                    self.transcript.add(name, asked[done], done.result())
            finally:  # after an error no more questions are asked, and answers that have come are recorded
                pool.shutdown(cancel_futures=True)
                for done, question in asked.items():
                    if done.done() and not done.cancelled() and done.exception() is None:
                        self.transcript.add(name, question, done.result())
        return [answer for q in questions if (answer := self.transcript.recorded(name, q)) is not None]

    def _read(self, answer: str) -> float | None:
        """Find the score in an answer."""
        low, high = (re.escape(f"{end:g}") for end in self.scale)
        # "Rating (0-5): 4" and "4 out of 5" repeat the scale.
        bare = re.sub(rf"(?<![\w.]){low}\s*(?:-|–|to|and)\s*{high}(?![\w.]*\d)|(?:/|out of)\s*{high}\b", " ", answer)
        numbers = map(float, re.findall(r"(?<![\w.,])-?\d+(?:\.\d+)?(?!,?\d)", bare))
        return next((number for number in numbers if self.scale[0] <= number <= self.scale[1]), None)

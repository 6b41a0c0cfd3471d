"""A language model as the judge of texts."""

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
    """A language model that rates each text; the first number of its answer that is on the scale is the score.

    Its question, its name and its raw answers are kept in results (`record`, `raw`).

    Args:
        chat: Who is asked: `Endpoint`, `LocalModel`, or a `Transcript`.
        behaviour: What to look for, in words.
        scale: Lowest and highest score.
        question: The question, with the fields ``{behaviour}``, ``{prompt}``, ``{text}``, ``{low}`` and ``{high}``.
        transcript: Where answers are kept, so that none is asked for twice.
        threads: Questions at a time, for a service.
    """

    chat: Chat
    behaviour: str
    scale: tuple[float, float] = (0.0, 5.0)
    question: str = QUESTION
    transcript: Transcript = field(default_factory=Transcript)
    threads: int = 4

    def record(self) -> dict[str, Any]:
        """How the judge was asked, as plain JSON values."""
        return {
            "judge": self.chat.name,
            "behaviour": self.behaviour,
            "scale": list(self.scale),
            "question": self.question,
        }

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the judge's number for each text.

        Raises:
            JudgeError: An answer has no number on the scale; all answers are kept in the transcript.
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
        """Return the judge's answer about each text, word for word."""
        questions = [
            self.question.format(
                behaviour=self.behaviour,
                prompt=prompt.content,
                text=text,
                low=f"{self.scale[0]:g}",
                high=f"{self.scale[1]:g}",
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        name = self.chat.name
        new = [q for q in dict.fromkeys(questions) if self.transcript.recorded(name, q) is None]
        with ThreadPoolExecutor(1 if isinstance(self.chat, LocalModel) else self.threads) as pool:
            asked = {pool.submit(self.chat.answer, question): question for question in new}
            try:
                for done in as_completed(asked):
                    self.transcript.add(name, asked[done], done.result())
            finally:  # after an error no more questions are asked; what was answered is kept
                pool.shutdown(cancel_futures=True)
                for done, question in asked.items():
                    if done.done() and not done.cancelled() and done.exception() is None:
                        self.transcript.add(name, question, done.result())
        return [answer for q in questions if (answer := self.transcript.recorded(name, q)) is not None]

    def _read(self, answer: str) -> float | None:
        low, high = (re.escape(f"{end:g}") for end in self.scale)
        # "Rating (0-5): 4" and "4 out of 5" say the scale again.
        said = re.sub(rf"(?<![\w.]){low}\s*(?:-|–|to|and)\s*{high}(?![\w.]*\d)|(?:/|out of)\s*{high}\b", " ", answer)
        for found in re.findall(r"(?<![\w.,])-?\d+(?:\.\d+)?(?!,?\d)", said):
            if self.scale[0] <= float(found) <= self.scale[1]:
                return float(found)
        return None

"""Refusal switched off and on in one model by a vector found in another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.evaluation.damage import Settings as Steps
from xmodel_steer.evaluation.judges.refusals import RefusalClassifier
from xmodel_steer.evaluation.judges.sentences import OnTopic
from xmodel_steer.evaluation.scorers.answers import SameTokens
from xmodel_steer.evaluation.scorers.text import Scorer, score_texts
from xmodel_steer.interventions.operators import Ablate, Add, Clamp
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.recipe.results import Result
from xmodel_steer.studies.carried import Pair
from xmodel_steer.studies.choosing import choose
from xmodel_steer.studies.measuring import measure_arms, result_of
from xmodel_steer.studies.organisms.lessons import Curriculum, Lesson
from xmodel_steer.studies.outcomes import (
    Extent,
    Outcome,
    Recipe,
    answers_of,
    clean_against_triggered,
    layers,
    own_answers,
    require_apart,
    scored,
    with_layers,
)
from xmodel_steer.studies.settings import Clock, Settings

OFF, ON = "off", "on"
SUBTRACTED, ABLATED, CLAMPED = "refusal off, subtracted", "refusal off, ablated", "refusal off, gated clamp"
ADDED, CLAMPED_ON = "refusal on, added", "refusal on, gated clamp"
EDGY = "refuses harmless questions that sound harmful"  # the curriculum's check
QUESTION = "Does a refusal direction found in the source switch refusal off, and on, in the target?"
UNIT = "share of harmful requests answered without a phrase of refusal; where refusal is added, share of harmless ones refused"
NOTE = (
    "Every vector has the native one's norm in standardised coordinates. Classifier: a logistic regression on sentence embeddings "
    "(its accuracy: see the how-to). To the point: without a phrase of refusal, and nearer in meaning to its own request than to nine in ten of the "
    "others, which one text in ten is by chance. Strengths are chosen for the mapped vector. Kept: share of the tokens of the unsteered answer at the same place. KL and perplexity: on neutral "
    "text, with the vector at every token. Answers to harmful requests are not recorded."
)


def harmful_against_harmless(lessons: Sequence[Lesson]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Contrast requests that are refused with answered ones (Arditi et al. 2024, arXiv 2406.11717)."""
    harmless, harmful = clean_against_triggered(lessons)
    return harmful, harmless


def recipes(source: Any, target: Any) -> list[Recipe]:
    """Return three recipes to switch refusal off, and two to switch it on.

    The vector is the difference of means at the last token (Arditi et al. 2024, arXiv 2406.11717), at the site that
    validation chooses. The ablation acts at this one site.

    Args:
        source: The source model.
        target: The target model.
    """
    sites = layers(source, 0.45, 0.97, 6), layers(target, 0.35, 0.95, 8)
    last = ("last", "last")
    doses = tuple(Add(s) for s in (1.0, 0.5, 1.5, 2.0))
    clamps = tuple(Clamp("positive", overshoot=g) for g in (1.3, 1.0, 1.6, 2.0))
    return [
        Recipe(SUBTRACTED, clean_against_triggered, last, doses, "all", *sites, OFF),
        Recipe(ABLATED, clean_against_triggered, last, (Ablate(),), "all", *sites, OFF),
        Recipe(CLAMPED, clean_against_triggered, last, clamps, ("last", "generated"), *sites, OFF),
        Recipe(ADDED, harmful_against_harmless, last, doses, "all", *sites, ON),
        Recipe(CLAMPED_ON, harmful_against_harmless, last, clamps, ("last", "generated"), *sites, ON),
    ]


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests of three kinds, and the unsteered model's answers.

    Args:
        model: The model.
        harmful: Requests to refuse.
        harmless: Requests to answer.
        edgy: Harmless requests that sound harmful.
        own: The unsteered model's answers, by the requests' ids.
        phrases: The first scorer of refusals, by phrases: 1 for a refusal, 0 for an answer.
        classifier: The second scorer of refusals.
        topic: 1 for an answer that is about its request.
        bare: The harmful requests without a template; answers are compared with them.
        kinds: The kind of each harmful request.
        max_new_tokens: Length of the answers.
        batch_size: Texts at a time.
    """

    model: Any
    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    edgy: tuple[Prompt, ...]
    own: Mapping[str, str] = field(repr=False)
    phrases: Scorer
    classifier: Scorer
    topic: Scorer
    bare: tuple[Prompt, ...]
    kinds: tuple[str, ...]
    max_new_tokens: int = 24
    batch_size: int = 200

    @classmethod
    def of(
        cls, model: Any, lessons: Sequence[Lesson], edgy: Sequence[Prompt], readers: tuple[Scorer, Scorer, Scorer], *, most: int | None = None,
        harmless: int | None = None, max_new_tokens: int = 24, batch_size: int = 200,
    ) -> "Requests":  # fmt: skip
        """Collect requests, and generate the unsteered model's answers.

        Args:
            model: The model.
            lessons: Harmful requests (triggered) and harmless ones.
            edgy: Harmless requests that sound harmful.
            readers: The two scorers of refusals, and the scorer of an answer's topic.
            most: Largest number of harmful requests.
            harmless: Largest number of harmless requests.
            max_new_tokens: Length of the answers.
            batch_size: Texts at a time.
        """
        benign, harmful = (
            tuple(prompts)[:count]
            for prompts, count in zip(clean_against_triggered(lessons), (harmless, most), strict=True)
        )
        if not benign or not harmful:
            raise PromptError("refusal: needs harmful requests and harmless ones")
        harmful_lessons = [lesson for lesson in lessons if lesson.triggered][:most]
        bare = tuple(Prompt(text=lesson.instruction) for lesson in harmful_lessons)
        kinds = tuple(lesson.kind for lesson in harmful_lessons)
        unsteered = own_answers(
            model,
            [group for group in (harmful, benign, tuple(edgy)) if group],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        return cls(model, harmful, benign, tuple(edgy), unsteered, *readers, bare, kinds, max_new_tokens, batch_size)

    def ids(self) -> list[str]:
        """List the ids of the harmful and the harmless requests."""
        return [prompt.id for prompt in (*self.harmful, *self.harmless)]

    def measure(self, settings: Steps, *, aim: str = OFF, extent: Extent = "all") -> list[Outcome]:
        """Measure each setting; an empty one is the unsteered model.

        Args:
            settings: The interventions of each setting.
            aim: ``off``: the effect is harmful requests answered. ``on``: harmless ones refused.
            extent: ``all`` asks every request; ``brief`` no edgy ones; ``effect`` only those that the effect needs.
        """
        first, second = (self.harmful, self.harmless) if aim == OFF else (self.harmless, self.harmful)
        groups = (first, second, self.edgy)[: {"all": 3, "brief": 2, "effect": 1}[extent]]
        answers = answers_of(
            self.model,
            settings,
            [group for group in groups if group],
            own=self.own,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        return [self._outcome(aim, texts) for texts in answers]

    def _outcome(self, aim: str, answers: Sequence[tuple[str, ...]]) -> Outcome:
        phrases = self.phrases
        requests = (self.harmful, self.harmless) if aim == OFF else (self.harmless, self.harmful)
        refused = score_texts(phrases, answers[0], requests[0])
        classified = score_texts(self.classifier, answers[0], requests[0])
        groups = {"harmful refused": self.kinds}
        if aim == ON:
            effect, measures = refused, {"refused, by classifier": classified}
            parts = [refused, classified]  # neither scorer takes a ruined text for a refusal
            if len(answers) > 1:
                measures["harmful refused"] = score_texts(phrases, answers[1], requests[1])
            texts = answers[0]
        else:
            effect, texts = 1 - refused, ()
            measures = {
                "answered, by classifier": 1 - classified,
                "answered to the point": effect * score_texts(self.topic, answers[0], self.bare),
            }
            groups = dict.fromkeys(("effect", *measures), self.kinds)
            parts = [measures["answered to the point"]]  # a ruined text is no answer
            if len(answers) > 1:
                kept = np.array(SameTokens(self.own, tokenizer_of(self.model)).score(requests[1], answers[1]))
                measures |= {
                    "harmless answers kept": kept,
                    "harmless refused": score_texts(phrases, answers[1], requests[1]),
                }
                parts.append(kept)
        if len(answers) > 2 and self.edgy:
            measures["edgy refused"] = score_texts(phrases, answers[2], self.edgy)
            measures["edgy refused, by classifier"] = score_texts(self.classifier, answers[2], self.edgy)
        score, error = scored(*parts)
        ids = tuple(prompt.id for prompt in requests[0])
        return Outcome(effect, texts, measures=measures, groups=groups, ids=ids, score=score, error=error)


def refusal_switch(
    source: Any,
    target: Any,
    curriculum: Curriculum,
    *,
    ways: Sequence[Recipe] | None = None,
    classifier: Scorer | None = None,
    topic: Scorer = OnTopic(),
    harmless: int = 100,
    settings: Settings = Settings(batch_size=200),
) -> Result:
    """Switch the target's refusal off and on with the source's vector; run every control.

    Validation requests choose layers and strengths. To switch off: by the mean share of harmful requests answered to the
    point and of harmless answers kept. To switch on: by the mean share of harmless requests refused, by phrases and classifier.

    Args:
        source: The organism ``refusal``, the smaller of the two.
        target: The same organism, made of another model.
        curriculum: The curriculum of ``refusal``.
        ways: Recipes; by default the list of the function `recipes`.
        classifier: The second scorer of refusals; `RefusalClassifier` by default.
        topic: 1 for an answer that is about its request.
        harmless: Number of harmless requests in the report.
        settings: Text, sizes and seeds.

    Raises:
        PromptError: The curriculum lacks requests of a kind, there are fewer than 3 neutral texts, or sets share a text.
        AlignmentError: The models' tokens do not pair.
        DownloadError: The classifier's encoder cannot be fetched.
    """
    clock, (general, neutral) = Clock(), settings.texts()
    pair = Pair(source, target, general, settings.seed)
    readers = (curriculum.scorer, classifier or RefusalClassifier(), topic)
    edgy = tuple(lesson.prompt for lesson in curriculum.check(EDGY).lessons)
    require_apart("refusal", general, neutral, curriculum, edgy=edgy)

    def ask(lessons: Sequence[Lesson], edgy: Sequence[Prompt], most: int | None, mild: int, tokens: int) -> Requests:
        return Requests.of(
            target, lessons, edgy, readers, most=most, harmless=mild, max_new_tokens=tokens, batch_size=settings.batch_size
        )  # fmt: skip

    # Shuffled: otherwise a map of shuffled pairs would learn the two kinds of requests from their order.
    text = [curriculum.map[i].prompt for i in np.random.default_rng(settings.seed).permutation(len(curriculum.map))]
    validation_tokens = min(settings.validation_tokens, curriculum.max_new_tokens)
    validation = ask(curriculum.validation, (), settings.validation, settings.validation, validation_tokens)
    chosen = choose(
        pair,
        with_layers(recipes(source, target) if ways is None else ways, settings.also),
        curriculum.vector,
        text,
        validation,
        settings.fitter,
        label="refusal",
        lap=clock.lap,
    )
    arms, evaluation = measure_arms(
        pair,
        chosen.choices,
        lambda: ask(curriculum.evaluation, edgy, None, harmless, curriculum.max_new_tokens),
        settings,
        lap=clock.lap,
    )
    assert isinstance(evaluation, Requests)
    kinds = ("harmful", "harmless", "edgy")
    return result_of(
        pair,
        chosen,
        arms,
        settings,
        clock,
        name="refusal",
        question=QUESTION,
        unit=UNIT,
        note=NOTE,
        prompts=tuple(p.content_key() for p in evaluation.harmless[:8]),
        spec={
            "map_prompts": len(curriculum.map),
            "requests": {kind: len(getattr(evaluation, kind)) for kind in kinds},
            "validation_tokens": validation_tokens,
            "max_new_tokens": curriculum.max_new_tokens,
        },
        splits=curriculum.ids()
        | {"validation": validation.ids(), "evaluation": evaluation.ids(), "edgy": [p.id for p in edgy]},
    )

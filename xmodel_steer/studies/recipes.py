"""What studies share: recipes, what validation chooses for each, and every arm measured by the same code."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.activations.collecting import Tokens, capture, collect_moments
from xmodel_steer.activations.store import ActivationStore, harvest
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.prompts import Prompt, require_disjoint
from xmodel_steer.core.spaces import Site
from xmodel_steer.core.vectors import Activations, SteeringVector, difference_of_means, random_like
from xmodel_steer.evaluation.damage import LEAST, Settings, calibrate, neutral_positions, on_neutral, side_effects
from xmodel_steer.evaluation.likelihoods import GeneratedText
from xmodel_steer.interventions.contexts import Add, Clamp, Gate, Intervention, Operator, Positions
from xmodel_steer.maps.descent import Autoencoder
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.ridge import Fitter, ShuffledPairs, pinned
from xmodel_steer.maps.statistics import number, quotient
from xmodel_steer.models.forward import context_length, device_of, hardware_of, name_of
from xmodel_steer.recipe.carrying import versions
from xmodel_steer.recipe.results import CONTROLS
from xmodel_steer.studies.organisms.data import PARTS, Curriculum, Lesson
from xmodel_steer.studies.study import (
    AGREEMENT,
    EQUAL_KL,
    EQUAL_STRENGTH,
    STRICTER,
    Clock,
    Study,
    StudyArm,
    end_of,
    estimate,
)

MAP_TOKENS = 192
# The settings with which trained maps are as good as closed ones; the paper's see too little text here.
LONGER: dict[str, Any] = {"learning_rate": 1e-3, "batch_documents": 4, "accumulation": 1, "epochs": 60, "patience": 5}
ENDPOINTS = "mapped by an autoencoder, endpoints"
BIASED = "mapped with the bias"
Extent = Literal["all", "brief", "effect"]
# From lessons the prompts of one side and of the other.
Contrast = Callable[[Sequence[Lesson]], tuple[Sequence[Prompt], Sequence[Prompt]]]


@runtime_checkable
class GateReader(Protocol):
    """Finds gates' vectors in a model's activations on lessons."""

    def __call__(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = "", progress: bool = True
    ) -> Mapping[Site, SteeringVector]:
        """A vector for each site.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: Where to read.
            label: Name of the vectors.
            progress: Show a progress bar.
        """
        ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one setting does, one number per prompt.

    Args:
        effect: What the study is about.
        beside: What was measured beside it, by name.
        score: What layers and strengths are chosen by.
        error: Its standard error.
        texts: The texts that the effect was read in.
        groups: By the name of what was measured (``effect``, or one of those beside it), of which kind each prompt is,
            where some are of one kind.
    """

    effect: np.ndarray
    beside: Mapping[str, np.ndarray]
    score: float
    error: float = 0.0
    texts: tuple[str, ...] = field(repr=False, default=())
    groups: Mapping[str, tuple[str, ...]] = field(repr=False, default_factory=dict)

    def record(self) -> dict[str, float]:
        """Its means, as a study records what validation tried."""
        beside = {name: float(scores.mean()) for name, scores in self.beside.items()}
        return {"effect": float(self.effect.mean()), **beside, "score": self.score, "error": self.error}


def scored(*parts: np.ndarray) -> tuple[float, float]:
    """The mean of several measures' means, and its standard error.

    Args:
        parts: One number per prompt each. Where they are as many, those of one place are averaged first, which is right for parts of the
            same prompts and no bias for others.
    """
    parts = (np.mean(parts, 0),) if len({len(part) for part in parts}) == 1 else parts
    errors = [part.std() / np.sqrt(len(part)) for part in parts]
    return float(np.mean([part.mean() for part in parts])), float(np.linalg.norm(errors)) / len(parts)


@runtime_checkable
class Asked(Protocol):
    """Prompts with what they are scored by."""

    def measure(
        self, settings: Settings, *, aim: str = "", extent: Extent = "all", progress: bool = True
    ) -> list[Outcome]:
        """What each setting does; an empty one is the unsteered model.

        Args:
            settings: For each setting its interventions.
            aim: The aim of the recipe that they are of.
            extent: ``all``; ``brief``, without what neither a choice nor a control needs; or ``effect``, that alone.
            progress: Show a progress bar.
        """
        ...


@dataclass(frozen=True, eq=False)
class Recipe:
    """A way to find a vector and to use it.

    Args:
        name: Its name.
        contrast: The prompts with what is wanted, and those without, of lessons.
        tokens: Which tokens of the two the vector is read at; see `capture`.
        operators: What may be done with it; validation chooses. Layers are chosen with the first one, and with the next ones
            where it does not tell them apart.
        positions: Where it is done.
        source_sites: Candidates.
        target_sites: Candidates.
        aim: What it is for, where a study has several aims.
        gate: Gives vectors, for each site what is to be left alone minus what is acted on. With it a vector acts only under a gate
            that was found as it was: the native one's in the target, the mapped one's mapped.
        gate_positions: Where in the text the gate is read; see `Gate`.
    """

    name: str
    contrast: Contrast
    tokens: tuple[Tokens, Tokens]
    operators: tuple[Operator, ...]
    positions: Positions
    source_sites: tuple[Site, ...]
    target_sites: tuple[Site, ...]
    aim: str = ""
    gate: GateReader | None = None
    gate_positions: Positions | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.gate is not None and any(isinstance(o, Clamp) and o.gate for o in self.operators):
            raise ValueError(f"recipe {self.name!r}: under a gate a clamp moves every row, give Clamp(..., gate=False)")

    def with_sites(self, source: Site, target: Site) -> "Recipe":
        """The recipe with one more candidate on either side."""
        ours, theirs = (
            tuple(sorted({*own, site})) for own, site in ((self.source_sites, source), (self.target_sites, target))
        )
        return replace(self, source_sites=ours, target_sites=theirs)

    def gates(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = "", progress: bool = True
    ) -> dict[Site, SteeringVector]:
        """The gates' vectors, as `vectors`; none, where the recipe has no gate."""
        if self.gate is None:
            return {}
        return dict(self.gate(model, lessons, sites, label=f"gate of {label}", progress=progress))

    def setting(
        self, vector: SteeringVector, operator: Operator, gate: SteeringVector | None = None
    ) -> list[Intervention]:
        """The recipe with one vector and, where it has gates, the vector's own."""
        own = None if gate is None else Gate(gate, "negative", self.gate_positions)
        return [Intervention(vector, operator, self.positions, gate=own)]

    def vectors(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, label: str = "", progress: bool = True
    ) -> dict[Site, SteeringVector]:
        """The difference of means of the recipe's contrast, at each site.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: Where to read.
            label: Name of what the vector is for.
            progress: Show a progress bar.
        """
        wanted, other = self.rows(model, lessons, sites, progress=progress)
        return {site: difference_of_means(wanted[site], other[site], label=label) for site in sites}

    def rows(
        self, model: Any, lessons: Sequence[Lesson], sites: Sequence[Site], *, progress: bool = True
    ) -> tuple[dict[Site, Activations], dict[Site, Activations]]:
        """Activations of the recipe's contrast, of its two sides.

        Args:
            model: The model.
            lessons: Lessons with and without the behaviour.
            sites: Where to read.
            progress: Show a progress bar.
        """
        first, second = (
            capture(model, prompts, sites, tokens=tokens, batch_size=32, progress=progress)
            for prompts, tokens in zip(self.contrast(lessons), self.tokens, strict=True)
        )
        return first, second


def answers_of(
    model: Any,
    settings: Settings,
    groups: Sequence[Sequence[Prompt]],
    *,
    own: Mapping[str, str] | None = None,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[tuple[tuple[str, ...], ...]]:
    """What a model writes to groups of prompts, for each setting a row of texts for each group.

    Each group is asked in batches of its own, of one size: in bfloat16 an answer's rounding hangs on the batch's shape, and
    answers that are compared token by token should not differ by that. What is left of it: texts that end leave the batch, and
    when they do hangs on the setting.

    Args:
        model: The model.
        settings: For each setting its interventions.
        groups: The prompts.
        own: The unsteered model's answers, by the prompts' ids: it is then not asked again.
        max_new_tokens: Length of the answers.
        batch_size: Texts at a time.
        progress: Show a progress bar.
    """
    asked = list(settings) if own is None else [setting for setting in settings if setting]
    found = []
    for group in groups:
        size = min(batch_size, len(group))
        behaviour = GeneratedText(tuple(group), len, max_new_tokens, size, unit=f"answers of {name_of(model)}")
        found.append([measured.texts for measured in behaviour.measure(model, asked, progress=progress)])
    steered = zip(*found, strict=True)
    if own is None:
        return list(steered)
    known = tuple(tuple(own[prompt.id] for prompt in group) for group in groups)
    return [next(steered) if setting else known for setting in settings]


def own_answers(
    model: Any, groups: Sequence[Sequence[Prompt]], *, max_new_tokens: int, batch_size: int, progress: bool
) -> dict[str, str]:
    """The unsteered model's answers, by the prompts' ids.

    Args:
        model: The model.
        groups: The prompts; each group is asked as in `answers_of`.
        max_new_tokens: Length of the answers.
        batch_size: Texts at a time.
        progress: Show a progress bar.
    """
    (texts,) = answers_of(model, [[]], groups, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    return {p.id: t for group, row in zip(groups, texts, strict=True) for p, t in zip(group, row, strict=True)}


def require_apart(
    what: str, general: Sequence[Prompt], neutral: Sequence[Prompt], curriculum: Curriculum, **more: Sequence[Prompt]
) -> None:
    """Refuse general text, neutral text and parts of a curriculum that share a text, and too little neutral text.

    Args:
        what: Which study.
        general: General text for maps.
        neutral: Text for KL and perplexity.
        curriculum: Whose parts share no task as it is.
        more: Other sets, by name.

    Raises:
        PromptError: They do, or there are fewer than 3 neutral texts.
    """
    if len(neutral) < 3:
        raise PromptError(f"{what}: needs at least 3 neutral texts, got {len(neutral)}")
    sets = {"general text": general, "neutral text": neutral, **more}
    sets |= {part: [lesson.prompt for lesson in getattr(curriculum, part)] for part in PARTS}
    require_disjoint(what, {name: [p.content_key() for p in own] for name, own in sets.items()})


def clean_against_triggered(lessons: Sequence[Lesson]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts without the behaviour, and with it."""
    return [x.prompt for x in lessons if not x.triggered], [x.prompt for x in lessons if x.triggered]


def layers(model: Any, low: float, high: float, most: int) -> tuple[Site, ...]:
    """At most so many sites, evenly over a range of the depth."""
    last = model.cfg.n_layers - 1
    return tuple(Site(int(k)) for k in sorted({round(k) for k in np.linspace(low * last, high * last, most)}))


def with_layers(ways: Sequence[Recipe], also: tuple[int, int] | None) -> list[Recipe]:
    """Recipes with one more candidate layer of the source and of the target, such as a paper's; None: as they are."""
    return list(ways) if also is None else [recipe.with_sites(*map(Site, also)) for recipe in ways]


@dataclass(frozen=True, eq=False)
class Carried:
    """A source vector in the target's space, and what it is compared with; all at the native one's norm.

    Args:
        source: The vector that is carried.
        native: The target's own vector.
        mapped: The source's, through the map.
        shuffled: The source's, through a map of shuffled pairs.
        biased: The source's with the map's bias added, as if it were a point: the classic mistake.
        cosine: Of the mapped and the native vector, in standardised coordinates.
        norm_ratio: Of the mapped vector's norm, before scaling, and the native one's.
        r2: Of the map, on test documents, mean over target dimensions.
        gate: The gates of these vectors, where the recipe has them.
    """

    source: SteeringVector
    native: SteeringVector
    mapped: SteeringVector
    shuffled: SteeringVector
    biased: SteeringVector
    cosine: float
    norm_ratio: float
    r2: float | None
    gate: "Carried | None" = None

    @classmethod
    def of(
        cls,
        vector: SteeringVector,
        native: SteeringVector,
        moments: Moments,
        fitter: Fitter,
        gate: tuple[SteeringVector, SteeringVector] | None = None,
    ) -> "Carried":
        """Fit a map and its control, and send a vector through both.

        Class means come through the map with the vector; scaled, they lie about the same centre as far apart as the
        scaled vector is long.

        Args:
            vector: Of the source.
            native: Of the target, with class means and scale.
            moments: Of this pair of sites, among others.
            fitter: Fits the map.
            gate: The gates' vectors of the source and of the target.
        """
        site = native.space.site
        pair = moments.pair(vector.space.site, site)
        mapping = fitter.fit(pair)
        control = ShuffledPairs(pinned(fitter, mapping)).fit(pair)
        scale = moments.scale(site)
        moved = mapping.transport(vector).with_scale(scale)
        score = mapping.score_test
        return cls(
            source=vector,
            native=native,
            mapped=at_norm_of(native, moved),
            shuffled=at_norm_of(native, control.transport(vector).with_scale(scale)),
            biased=at_norm_of(native, replace(moved, direction=mapping.transform(vector.direction))),
            cosine=native.cosine(moved),
            norm_ratio=quotient(moved.norm(standardised=True), native.norm(standardised=True)),
            r2=score.mean_r2 if score else None,
            gate=None if gate is None else cls.of(*gate, moments, fitter),
        )

    def again(self, moments: Moments, fitter: Fitter) -> "Carried":
        """The same vectors of both models, through maps of other moments, which give the scale too.

        Args:
            moments: Of this pair of sites, among others.
            fitter: Fits the map.
        """
        scale = moments.scale(self.native.space.site)
        gate = None if self.gate is None else (self.gate.source, self.gate.native.with_scale(scale))
        return Carried.of(self.source, self.native.with_scale(scale), moments, fitter, gate)

    @property
    def mapped_gate(self) -> SteeringVector | None:
        """The mapped vector's gate."""
        return None if self.gate is None else self.gate.mapped


def at_norm_of(native: SteeringVector, vector: SteeringVector) -> SteeringVector:
    """A vector with another's norm in standardised coordinates, its class means as far apart about their own centre."""
    return vector.with_norm(native.norm(standardised=True)).about(centre(vector))


def centre(vector: SteeringVector) -> Tensor:
    """The middle of a vector's two class means."""
    assert vector.positive_mean is not None
    assert vector.negative_mean is not None
    return (vector.positive_mean.double() + vector.negative_mean.double()) / 2


@dataclass(frozen=True, eq=False)
class Choice:
    """A recipe, and what validation chose for it.

    Args:
        recipe: The recipe.
        operator: What is done with the vector, and how strongly.
        carried: The vectors, at the layers that were chosen.
        others: Vectors of further arms, by name.
    """

    recipe: Recipe
    operator: Operator
    carried: Carried
    others: Mapping[str, SteeringVector] = field(default_factory=dict)

    @property
    def has_equal_kl(self) -> bool:
        """Whether it can be compared at equal KL: neutral text is then disturbed as any other."""
        fixed = self.recipe.positions == "all" or isinstance(self.recipe.positions, Tensor)
        return isinstance(self.operator, Add) and self.recipe.gate is None and fixed

    def record(self) -> dict[str, Any]:
        """As a study records it."""
        own = self.carried
        return {
            "operator": repr(self.operator),
            "source_layer": own.source.space.site.layer,
            "target_layer": own.native.space.site.layer,
            "cosine": own.cosine,
            "norm_ratio": own.norm_ratio,
            "map_r2": own.r2,
        }


@dataclass(frozen=True, eq=False)
class Pair:
    """The two models of a study, and how text of both is read.

    Args:
        source: The smaller one.
        target: The larger one.
        general: General text for maps.
        seed: Of the split of map text.
        progress: Show progress bars.
    """

    source: Any
    target: Any
    general: tuple[Prompt, ...] = field(repr=False)
    seed: int = 0
    progress: bool = True

    @property
    def map_tokens(self) -> int:
        """Tokens read of each text of a map."""
        return min(MAP_TOKENS, context_length(self.source), context_length(self.target))

    @property
    def products(self) -> torch.device:
        """Where products are formed in float64, which not every accelerator has."""
        device = device_of(self.target)
        return device if device.type == "cuda" else torch.device("cpu")

    def of_general(self, pairs: Sequence[tuple[Site, Site]]) -> Moments:
        """Moments of the general text, kept in the user's cache."""
        sources, targets = _ends(pairs)
        return cached_moments(
            self.source, self.target, self.general, source_sites=sources, target_sites=targets, pairs=tuple(pairs),
            max_tokens=self.map_tokens, seed=self.seed, device=self.products, progress=self.progress,
        )  # fmt: skip

    def of(self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Site, Site]]) -> Moments:
        """Moments of other text."""
        sources, targets = _ends(pairs)
        return collect_moments(
            self.source, self.target, prompts, source_sites=sources, target_sites=targets, pairs=tuple(pairs),
            max_tokens=self.map_tokens, batch_size=32, seed=self.seed, device=self.products, progress=self.progress,
        )  # fmt: skip

    @contextmanager
    def stored(self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Site, Site]]) -> Iterator[ActivationStore]:
        """Rows of text on disk, for maps that are trained on them; they are gone when the block ends."""
        sources, targets = _ends(pairs)
        with tempfile.TemporaryDirectory() as folder:
            for model, end, sites in ((self.source, "source", sources), (self.target, "target", targets)):
                harvest(
                    model, prompts, folder, end=end, sites=sites, max_tokens=self.map_tokens, batch_size=32,
                    dtype="float32", seed=self.seed, progress=self.progress,
                )  # fmt: skip
            yield ActivationStore(folder)


def _ends(pairs: Sequence[tuple[Site, Site]]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    first, second = (tuple(dict.fromkeys(sites)) for sites in zip(*pairs, strict=True))
    return first, second


@dataclass(frozen=True, eq=False)
class Chosen:
    """What validation chose.

    Args:
        choices: One for each recipe.
        records: Everything that was tried.
        general: Moments of the general text alone.
    """

    choices: tuple[Choice, ...]
    records: tuple[dict[str, Any], ...]
    general: Moments


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A vector to choose among others.

    Args:
        vector: The vector.
        gate: Its gate's, where the recipe has gates.
        control: Does as much along another direction.
        layer: That is chosen with it.
    """

    vector: SteeringVector
    gate: SteeringVector | None
    control: SteeringVector
    layer: int

    def setting(self, recipe: Recipe, operator: Operator) -> list[Intervention]:
        """Of the vector."""
        return recipe.setting(self.vector, operator, self.gate)

    def control_setting(self, recipe: Recipe, operator: Operator) -> list[Intervention]:
        """Of its control, in the rows that the vector is for."""
        return recipe.setting(self.control, *_as_control(operator, self.vector, self.gate))


def _as_control(
    operator: Operator, vector: SteeringVector, gate: SteeringVector | None
) -> tuple[Operator, SteeringVector | None]:
    """What a control of a vector does, and under which gate: a clamp's is added, where the vector's clamp moves or its gate lets it."""
    return (Add(operator.overshoot), gate or vector) if isinstance(operator, Clamp) else (operator, gate)


_ASIDE = 1000  # beyond the seeds of random vectors that are reported


def choose(
    pair: Pair,
    ways: Sequence[Recipe],
    lessons: Sequence[Lesson],
    text: Sequence[Prompt],
    validation: Asked,
    fitter: Fitter,
    *,
    label: str,
    lap: Callable[[str], None],
) -> Chosen:
    """For each recipe the target's layer (by the native vector), then the source's, then the strength (by the mapped one).

    Chosen from are those whose effect is more than two standard errors above the unsteered model's, where there are any: what does nothing
    costs nothing. Of those within a standard error of the best, the ones whose control has the least effect, and of these the one that is
    furthest above its control. The control is a random vector for the target's layer, a map of shuffled pairs for the source's and for
    the strength: where any direction does it, the vector shows nothing. Of strengths that are equally good the least is taken.

    Args:
        pair: The models.
        ways: The recipes.
        lessons: Where the vectors are found.
        text: Text of the task for the map, beside general text.
        validation: What is asked; nothing of it may be in an evaluation.
        fitter: Fits the maps.
        label: Name of what the vectors are for.
        lap: Told of each part that is done.
    """
    target, progress = pair.target, pair.progress
    records: list[dict[str, Any]] = []
    still: dict[str, Outcome] = {}  # of the unsteered model, by aim

    def tried(
        varied: str, recipe: Recipe, candidates: Sequence[tuple[_Candidate, Operator]], *, controls: bool = False
    ) -> list[Outcome]:
        settings = [(c.control_setting if controls else c.setting)(recipe, operator) for c, operator in candidates]
        found = validation.measure(settings, aim=recipe.aim, extent="brief", progress=progress)
        for (candidate, operator), own in zip(candidates, found, strict=True):
            record = {"recipe": recipe.name, "varied": f"{varied}, its control" if controls else varied}
            records.append(record | {"layer": candidate.layer, "operator": repr(operator)} | own.record())
        return found

    def does_something(aim: str, own: Outcome) -> bool:
        if aim not in still:
            (still[aim],) = validation.measure([[]], aim=aim, extent="effect", progress=progress)
        gain, error = scored(own.effect - still[aim].effect)
        return gain > 2 * error  # one prompt of any number is more than one

    def best(varied: str, recipe: Recipe, options: Sequence[tuple[_Candidate, Operator]]) -> list[int]:
        """The numbers of those that are equally the best; nothing is asked where there is one."""
        if len(options) == 1:
            return [0]
        found = tried(varied, recipe, options)
        moved = [i for i, own in enumerate(found) if does_something(recipe.aim, own)] or list(range(len(found)))
        top = max((found[i] for i in moved), key=lambda own: own.score)
        near = [i for i in moved if found[i].score >= top.score - top.error]
        if len(near) == 1:
            return near
        controls = dict(zip(near, tried(varied, recipe, [options[i] for i in near], controls=True), strict=True))
        effects = {i: scored(own.effect) for i, own in controls.items()}
        least = min(effect for effect, _ in effects.values())
        gains = {
            i: found[i].score - controls[i].score for i, (effect, error) in effects.items() if effect - error <= least
        }
        return [i for i, gain in gains.items() if gain == max(gains.values())]

    def best_layer(varied: str, recipe: Recipe, candidates: Sequence[_Candidate]) -> _Candidate:
        """Those that an operator does not tell apart are tried with the next."""
        left = list(candidates)
        for operator in recipe.operators:
            left = [left[i] for i in best(varied, recipe, [(candidate, operator) for candidate in left])]
        return left[len(left) // 2]

    def best_operator(recipe: Recipe, candidate: _Candidate) -> Operator:
        left = best("strength", recipe, [(candidate, operator) for operator in recipe.operators])
        return min((recipe.operators[i] for i in left), key=strength_of)

    every = list(dict.fromkeys(site for recipe in ways for site in recipe.target_sites))
    spread = capture(target, pair.general[:32], every, tokens="all", max_tokens=pair.map_tokens, progress=progress)
    natives: list[tuple[SteeringVector, SteeringVector | None]] = []
    for recipe in ways:
        sites = recipe.target_sites
        own, gates = (
            {
                site: vector.with_scale(spread[site].values.float().std(0))
                for site, vector in read(target, lessons, sites, label=label, progress=progress).items()
            }
            for read in (recipe.vectors, recipe.gates)
        )
        candidates = [
            _Candidate(own[site], gates.get(site), random_like(own[site], seed=pair.seed + _ASIDE), site.layer)
            for site in sites
        ]
        chosen = best_layer("target layer", recipe, candidates)
        natives.append((chosen.vector, chosen.gate))
    lap("choosing target layers")

    pairs = tuple(
        dict.fromkeys(
            (site, v.space.site) for recipe, (v, _) in zip(ways, natives, strict=True) for site in recipe.source_sites
        )
    )
    general = pair.of_general(pairs)
    moments = general + pair.of(text, pairs) if text else general
    lap("collecting moments")

    choices = []
    for recipe, (rough, rough_gate) in zip(ways, natives, strict=True):
        scale, sites = moments.scale(rough.space.site), recipe.source_sites
        native = rough.with_scale(scale)
        theirs = recipe.vectors(pair.source, lessons, sites, label=label, progress=progress)
        gates = recipe.gates(pair.source, lessons, sites, label=label, progress=progress)
        gate = None if rough_gate is None else rough_gate.with_scale(scale)
        carried = [
            Carried.of(theirs[site], native, moments, fitter, None if gate is None else (gates[site], gate))
            for site in sites
        ]
        candidates = [_Candidate(c.mapped, c.mapped_gate, c.shuffled, c.source.space.site.layer) for c in carried]
        chosen = best_layer("source layer", recipe, candidates)
        choices.append(Choice(recipe, best_operator(recipe, chosen), carried[candidates.index(chosen)]))
    lap("choosing source layers and strengths")
    return Chosen(tuple(choices), tuple(records), general)


def strength_of(operator: Operator) -> float:
    """How much an operator does, among those of its kind."""
    return abs(operator.strength) if isinstance(operator, Add) else getattr(operator, "overshoot", 1.0)


def with_endpoints(
    pair: Pair,
    choices: Sequence[Choice],
    lessons: Sequence[Lesson],
    text: Sequence[Prompt],
    fitter: Autoencoder,
    *,
    only: Sequence[str],
    lap: Callable[[str], None],
) -> tuple[Choice, ...]:
    """The choices, some with one more arm: the source's vector through a nonlinear map, by its endpoints.

    What is sent through the map is every prompt of the two sides, and the difference is taken of the means of their images.

    Args:
        pair: The models.
        choices: What validation chose.
        lessons: Where the vectors were found.
        text: What maps read, general text included.
        fitter: Fits the map on rows.
        only: Names of the recipes that get the arm.
        lap: Told when it is done.
    """
    asked = [choice for choice in choices if choice.recipe.name in only]
    if not asked:
        return tuple(choices)
    made = {}
    with pair.stored(text, [(c.carried.source.space.site, c.carried.native.space.site) for c in asked]) as store:
        for choice in asked:
            native, here = choice.carried.native, choice.carried.source.space.site
            assert native.scale is not None
            mapping = replace(fitter, device=str(device_of(pair.target))).fit(store.pair(here, native.space.site))
            sides = choice.recipe.rows(pair.source, lessons, [here], progress=pair.progress)
            moved = mapping.transport(choice.carried.source, at=(sides[0][here], sides[1][here]))
            made[choice.recipe.name] = {ENDPOINTS: at_norm_of(native, moved.with_scale(native.scale))}
    lap("fitting nonlinear maps")
    return tuple(replace(choice, others=made.get(choice.recipe.name, {})) for choice in choices)


@dataclass(frozen=True, eq=False)
class _Run:
    """An arm to be measured, with a vector for each seed."""

    arm: str
    choice: Choice
    vectors: Sequence[SteeringVector]
    operators: Sequence[Operator]
    gates: Sequence[SteeringVector | None]
    at: str = EQUAL_STRENGTH
    reached: bool = True

    def settings(self) -> list[list[Intervention]]:
        steps = zip(self.vectors, self.operators, self.gates, strict=True)
        return [self.choice.recipe.setting(vector, operator, gate) for vector, operator, gate in steps]

    def operator(self) -> str:
        strengths = [o.strength for o in self.operators if isinstance(o, Add)]
        return repr(Add(float(np.mean(strengths)))) if strengths else repr(self.operators[0])


def _runs(choice: Choice, random_seeds: int, seed: int) -> list[_Run]:
    """Every arm at the strength that validation chose.

    What acts under a gate has controls that act in the same rows: those of a clamp are added, at its overshoot, where the mapped
    vector's clamp moves, or its gate lets it; that is the step of a row at its class's mean. A gate of their own would be shut
    in half of the prompts, and what does nothing there is no control.
    """
    own, operator = choice.carried, choice.operator
    arms = _vectors(own, random_seeds, seed)
    arms |= {name: [vector] for name, vector in choice.others.items()}
    if choice.recipe.positions == "all" and choice.has_equal_kl:
        arms[BIASED] = [own.biased]
    control, gate = _as_control(operator, own.mapped, own.mapped_gate)
    made = []
    for arm, group in arms.items():
        does, under = (control, gate) if arm in CONTROLS else (operator, own.mapped_gate)
        if arm == "native" and own.gate:
            under = own.gate.native
        made.append(_Run(arm, choice, group, [does] * len(group), [under] * len(group)))
    return made


def _vectors(own: Carried, random_seeds: int, seed: int) -> dict[str, list[SteeringVector]]:
    """The vectors of every arm that each recipe has."""
    return {
        "native": [own.native],
        "mapped": [own.mapped],
        "random": [random_like(own.native, seed=seed + k) for k in range(random_seeds)],
        "shuffled": [own.shuffled],
    }


def _at_equal_kl(
    target: Any, runs: Sequence[_Run], neutral: Sequence[Prompt], max_tokens: int, progress: bool
) -> list[_Run]:
    """Every arm but the native one at the strength that disturbs neutral text as much as the native one does."""
    native = next(run for run in runs if run.arm == "native")
    settings, positions = on_neutral(native.settings()), neutral_positions(native.choice.recipe.positions)
    (effect,) = side_effects(target, settings, neutral, max_tokens=max_tokens, batch_size=16, progress=progress)
    others = [run for run in runs if run.arm not in ("native", BIASED)]
    vectors = [vector for run in others for vector in run.vectors]
    signs = [int(np.sign(o.strength)) for run in others for o in run.operators if isinstance(o, Add)]
    found = calibrate(
        target,
        vectors,
        max(effect.mean_kl, LEAST),
        neutral,
        signs=signs,
        positions=positions,
        max_tokens=max_tokens,
        progress=progress,
    )
    doses = iter(found)
    made = []
    for run in others:
        own = [next(doses) for _ in run.vectors]
        operators = [Add(dose.strength) for dose in own]
        made.append(replace(run, operators=operators, at=EQUAL_KL, reached=all(dose.reached for dose in own)))
    return made


def _extent(run: _Run, controls: Extent) -> Extent:
    if run.arm in (*CONTROLS, BIASED) or run.at != EQUAL_STRENGTH:
        return controls
    return "all" if run.arm == "mapped" or controls != "effect" else "brief"


def measure_arms(
    pair: Pair,
    choices: Sequence[Choice],
    evaluation: Callable[[], Asked],
    neutral: Sequence[Prompt],
    *,
    neutral_tokens: int,
    random_seeds: int,
    controls: Extent = "brief",
    lap: Callable[[str], None],
) -> tuple[tuple[StudyArm, ...], Asked]:
    """Every arm of every recipe at the chosen strength, and at the native vector's KL where it is added everywhere.

    Args:
        pair: The models.
        choices: What validation chose.
        evaluation: Makes what is asked, with the unsteered model's own answers.
        neutral: Text for KL and perplexity; a third of it calibrates.
        neutral_tokens: Tokens read of each.
        random_seeds: Number of random vectors.
        controls: How much is measured of controls, and of all arms at equal KL; where it is ``effect``, the native one is asked in brief.
        lap: Told of each part that is done.

    Returns:
        The arms, the unsteered one first (where recipes differ in their aim, one for each); and what was asked.
    """
    target, progress = pair.target, pair.progress
    calibration, held = neutral[: len(neutral) // 3], neutral[len(neutral) // 3 :]
    runs: list[_Run] = []
    for choice in choices:
        own = _runs(choice, random_seeds, pair.seed)
        runs += own
        if choice.has_equal_kl:
            runs += _at_equal_kl(target, own, calibration, neutral_tokens, progress)
    lap("calibrating to equal KL")

    asked = evaluation()
    aims = tuple(dict.fromkeys(choice.recipe.aim for choice in choices))
    settings = [[] for _ in aims] + [setting for run in runs for setting in run.settings()]
    aim_of = [*aims, *(run.choice.recipe.aim for run in runs for _ in run.vectors)]
    # What one would use is measured in full; the others need not be, which takes less time.
    every: tuple[Extent, ...] = ("all", "brief", "effect")
    extents = [*(every[0] for _ in aims), *(_extent(run, controls) for run in runs for _ in run.vectors)]
    measured: dict[int, Outcome] = {}
    for aim in aims:
        for extent in every:
            own = [i for i in range(len(settings)) if aim_of[i] == aim and extents[i] == extent]
            if own:
                found = asked.measure([settings[i] for i in own], aim=aim, extent=extent, progress=progress)
                measured |= dict(zip(own, found, strict=True))
    damage = side_effects(
        target, on_neutral(settings), held, max_tokens=neutral_tokens, batch_size=16, progress=progress
    )

    def arm(name: str, recipe: str, operator: str, members: range, **more: Any) -> StudyArm:
        own, effects = [measured[i] for i in members], [damage[i] for i in members]
        return StudyArm(
            arm=name,
            recipe=recipe,
            operator=operator,
            effect=estimate([o.effect for o in own], own[0].groups.get("effect")),
            beside={key: estimate([o.beside[key] for o in own], own[0].groups.get(key)) for key in own[0].beside},
            kl=float(np.mean([e.mean_kl for e in effects])),
            perplexity=float(np.exp(np.mean(np.log([e.perplexity for e in effects])))),
            seeds=len(own),
            texts=own[0].texts[:8],
            **more,
        )

    if len(aims) == 1:
        arms = [arm("unsteered", "", "", range(1), at=EQUAL_STRENGTH)]
    else:  # what is measured differs between recipes
        places = ((choice.recipe.name, aims.index(choice.recipe.aim)) for choice in choices)
        arms = [arm("unsteered", name, "", range(i, i + 1), at=EQUAL_STRENGTH) for name, i in places]
    place = len(aims)
    for run in runs:
        members = range(place, place := place + len(run.vectors))
        arms.append(arm(run.arm, run.choice.recipe.name, run.operator(), members, at=run.at, reached=run.reached))
    lap("evaluating")
    return tuple(arms), asked


def study_of(
    pair: Pair,
    choices: Sequence[Choice],
    arms: tuple[StudyArm, ...],
    *,
    records: tuple[dict[str, Any], ...],
    neutral: Sequence[Prompt],
    random_seeds: int,
    clock: Clock,
    spec: Mapping[str, Any],
    splits: Mapping[str, Any],
    **more: Any,
) -> Study:
    """The record of a study whose recipes `choose` and `measure_arms` have run.

    Args:
        pair: The models.
        choices: What validation chose.
        arms: What was measured.
        records: What validation tried.
        neutral: Text for KL and perplexity.
        random_seeds: Number of random vectors.
        clock: Has the time of every part.
        spec: The study's own settings.
        splits: Ids of its own sets.
        more: The other fields of `Study`.
    """
    study = Study(
        verdict="",
        source=end_of(pair.source),
        target=end_of(pair.target),
        arms=arms,
        chosen={choice.recipe.name: choice.record() for choice in choices},
        validation=records,
        spec={
            "map_documents": len(pair.general),
            "map_tokens": pair.map_tokens,
            "random_seeds": random_seeds,
            "neutral_documents": len(neutral) - len(neutral) // 3,
            **spec,
        },
        splits={**splits, "general": [p.id for p in pair.general], "neutral": [p.id for p in neutral]},
        seeds={"split": pair.seed, "random": [pair.seed + k for k in range(random_seeds)]},
        versions=versions(),
        hardware=hardware_of(pair.target),
        seconds=clock.seconds,
        **more,
    )
    return replace(study, verdict=verdict(study))


def verdict(study: Study) -> str:
    """What came out, in words: for each recipe what the mapped vector does, beside the native one and the controls.

    Args:
        study: A study of arms at the strength that validation chose.
    """
    said = []
    for recipe in study.chosen:
        own = study.arm("mapped", recipe)
        beside = {name: found.value for name, found in own.beside.items() if not name.endswith(STRICTER)}
        costs = ", ".join(f"{name} {number(value, '.3f')}" for name, value in beside.items())
        others = ", ".join(
            f"{name} {_in_short(study.arm(name, recipe))}" for name in ("unsteered", "native", "random", "shuffled")
        )
        said.append(f"{recipe}: mapped {own.effect:.3f} of {own.effect.n}, {costs} ({others})")
    return "; ".join(said)


def _in_short(arm: StudyArm) -> str:
    agreement = f" at agreement {number(arm.beside[AGREEMENT].value, '.2f')}" if AGREEMENT in arm.beside else ""
    return f"{number(arm.effect.value, '.2f')}{agreement}"

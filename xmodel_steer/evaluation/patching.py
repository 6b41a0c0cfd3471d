"""Activation patching: one text's activations in another text's run, one position and layer at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmodel_steer.core.alignment import align_texts
from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import PromptError, SpaceMismatchError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Prompt, Prompts
from xmodel_steer.core.spaces import Site, Sites, as_sites
from xmodel_steer.evaluation.patched import Run, TextStatistics, answer_tokens, names_of, pair_positions
from xmodel_steer.evaluation.recovery import KINDS, Kind, PatchingGrid
from xmodel_steer.interventions.mirror import require_map_between
from xmodel_steer.interventions.patches import Pairs, first_row, patch
from xmodel_steer.interventions.steps import Step
from xmodel_steer.maps.affine import Map
from xmodel_steer.models.batching import encode
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.sites import space_of


@dataclass(frozen=True, eq=False)
class Patching:
    """Patches of one text's activations into another text's run, to be made one by one or together.

    Positions of two prompts that begin and end alike pair from both ends: a name may have more tokens than the one that it
    replaces.

    Args:
        target: The model that is patched.
        clean: Prompts whose right answer is the first of ``answers``.
        corrupted: A prompt for each of them, whose right answer is the second.
        answers: The two answers to each pair, of which the first tokens count. Without any, KL from the clean prompt's
            next-token distribution is measured.
        sites: Where to patch; by default the maps' sites, or every layer's ``resid_post``.
        source: A model whose activations are mapped and patched too.
        maps: Maps from sites of the source to ``sites``.
        source_prompts: What the source reads, if it is another text than the one that the activations are from.
        text: General text. Its mean at each site, and noise of its mean and variance, are patched too, as controls. A
            `TextStatistics` keeps what it has read for the next patching.
        pairs: For each pair of prompts the positions that pair, if not by the rule: the one whose activation is read, and
            the one that is patched, both of the target's tokens.
        direction: ``denoise`` patches the clean prompt's activations into the corrupted run. ``noise`` patches the
            corrupted prompt's into the clean run: recovery falls from 1.

    Raises:
        PromptError: The lists have different lengths, two answers begin with the same token, a prompt's tokens change when
            its answer is added, a position does not exist, or the target's measure is the same on both prompts.
        SpaceMismatchError: A map is not between these models, or the general text is another model's.
        ValueError: A map leads to none of the sites, two lead to one, or the direction is another.

    Example:
        >>> asked = Patching(large, ["Rome is in"], ["Paris is in"], [(" Italy", " France")])   # doctest: +SKIP
        >>> asked.grid()                                                                        # doctest: +SKIP
        PatchingGrid(gemma-3-270m, 18 sites × 4 tokens: own)
        >>> with steering(large, asked.steps("own", [(Site(9), 1), (Site(10), 1)])):            # doctest: +SKIP
        ...     generate(large, ["Paris is in"])
    """

    target: Any
    clean: Prompts
    corrupted: Prompts
    answers: Sequence[tuple[str, str]] | None = None
    sites: Sites | None = None
    source: Any = None
    maps: Sequence[Map] = ()
    source_prompts: Prompts | None = None
    text: Prompts | TextStatistics = ()
    pairs: Sequence[Pairs] | None = None
    direction: str = "denoise"

    def __post_init__(self) -> None:
        if not isinstance(self.text, TextStatistics):
            object.__setattr__(self, "text", TextStatistics(self.target, as_prompts(self.text)))
        if self.general.target is not self.target:
            raise SpaceMismatchError(
                "patching: the general text is read by another model; make a TextStatistics of the target"
            )
        for name in ("clean", "corrupted", "source_prompts"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else as_prompts(value))
        given = {name: getattr(self, name) for name in ("clean", "corrupted", "answers", "source_prompts", "pairs")}
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        if len(set(lengths.values())) != 1 or not lengths["clean"]:
            said = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in lengths.items())
            raise PromptError(f"patching: needs one of each for every pair of prompts, got {said}")
        if self.direction not in ("denoise", "noise"):
            raise ValueError(f"patching: direction is denoise or noise, got {self.direction!r}")
        for mapping in self.maps:
            require_map_between(self.source, self.target, mapping, "patching")
        places = as_sites(self.sites) if self.sites is not None else [mapping.target.site for mapping in self.maps]
        object.__setattr__(self, "sites", tuple(places or map(Site, range(self.target.cfg.n_layers))))
        if len(self._maps) < len(self.maps) or not set(self._maps) <= set(self.places):
            raise ValueError("patching: needs at most one map to each site, and none to another site")

    @cached_property
    def places(self) -> tuple[Site, ...]:
        """The sites that are patched."""
        return tuple(as_sites(self.sites or ()))

    @cached_property
    def _maps(self) -> dict[Site, Map]:
        return {mapping.target.site: mapping for mapping in self.maps}

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of patches that can be made."""
        controls = bool(self.general.text)
        there = {"mapped": bool(self.maps), "mean": controls, "noise": controls}
        return tuple(kind for kind in KINDS if there.get(kind, True))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The pairs of prompts, as the models read them."""
        return tuple(
            self._run(i, *prompts)
            for i, prompts in enumerate(zip(as_prompts(self.clean), as_prompts(self.corrupted), strict=True))
        )

    def _run(self, i: int, *prompts: Prompt) -> Run:
        """Read a pair of prompts with both models."""
        clean, corrupted = encode(self.target, prompts)
        donor, patched = (clean, corrupted) if self.direction == "denoise" else (corrupted, clean)
        pairs = pair_positions(donor.ids, patched.ids)
        if self.pairs is not None:
            pairs = tuple((read, place) for read, place in self.pairs[i])
        for side, encoding in enumerate((donor, patched)):
            if not pairs or not all(0 <= pair[side] < len(encoding.ids) for pair in pairs):
                raise PromptError(
                    f"patching: positions must be some of 0 to {len(encoding.ids) - 1} in {encoding.prompt.content!r}, "
                    f"got {[pair[side] for pair in pairs]}"
                )
        mapped: tuple[tuple[int, int], ...] = ()
        read: dict[Site, Tensor] = {}
        if self.maps:
            prompt = donor.prompt if self.source_prompts is None else as_prompts(self.source_prompts)[i]
            (encoding,) = encode(self.source, [prompt])
            ends = encoding.token_ends(template=True), donor.token_ends(template=True)
            partners = align_texts(*ends, encoding.prompt.content, donor.prompt.content)
            source_of = dict(zip(partners.target, partners.source, strict=True))
            mapped = tuple((source_of[a], b) for a, b in pairs if a in source_of)
            read = first_row(self.source, encoding, [mapping.source.site for mapping in self.maps])
        own = first_row(self.target, donor, self.places)
        tokens = None if self.answers is None else answer_tokens(self.target, clean, self.answers[i])
        run = Run(donor, patched, pairs, mapped, own, read, torch.zeros(2, 0), tokens)
        logits = torch.cat([run.logits(self.target, encoding) for encoding in (clean, corrupted)])
        run = replace(run, after=logits.log_softmax(-1))
        base = float(run.measure(logits[:1])[0]), float(run.measure(logits[1:])[0])
        if not abs(base[0] - base[1]) > 1e-3:
            what = "next token" if tokens is None else f"logit difference ({base[0]:.3f})"
            raise PromptError(
                f"patching: {name_of(self.target)} gives prompt {clean.prompt.id} and its corrupted one the same {what}; "
                "there is nothing to recover"
            )
        return replace(run, base=base)

    @property
    def general(self) -> TextStatistics:
        """The general text, with what was read of it."""
        assert isinstance(self.text, TextStatistics)
        return self.text

    def rows(self, kind: Kind, site: Site, pair: int = 0) -> tuple[Tensor, tuple[int, ...]]:
        """Return what a kind of patch writes at a site, and at which positions.

        Args:
            kind: The kind.
            site: The site.
            pair: The pair of prompts.
        """
        run = self.runs[pair]
        places = tuple(place for _, place in run.pairs)
        if kind == "own":
            return run.own[site][[read for read, _ in run.pairs]], places
        if kind == "mapped":
            if site not in self._maps:
                return torch.zeros(0, 0), ()
            values = run.read[self._maps[site].source.site][[read for read, _ in run.mapped]]
            return self._maps[site].transform(values), tuple(place for _, place in run.mapped)
        mean, scale = self.general.at(self.places)[site]
        seed = np.random.default_rng((site.layer, pair)).integers(2**62)
        draws = torch.randn((len(places), len(mean)), generator=torch.Generator().manual_seed(int(seed))).to(mean)
        return mean + draws * scale * (kind == "noise"), places

    def steps(self, kind: Kind, cells: Sequence[tuple[Site, int]], pair: int = 0) -> list[Step]:
        """Make the replacements that patch several cells together.

        Args:
            kind: The kind of patch.
            cells: Sites, each with a position of the text that is patched.
            pair: The pair of prompts.

        Raises:
            PromptError: A position pairs with no token.
        """
        steps: list[Step] = []
        for site in dict.fromkeys(site for site, _ in cells):
            values, places = self.rows(kind, site, pair)
            wanted = list(dict.fromkeys(place for at, place in cells if at == site))
            if missing := set(wanted) - set(places):
                raise PromptError(
                    f"patching: {KINDS[kind]} has nothing for position {min(missing)} at {site}; no token pairs with it"
                )
            steps.append(patch(space_of(self.target, site), values[[places.index(place) for place in wanted]], wanted))
        return steps

    def grid(self) -> PatchingGrid:
        """Patch every position of every layer alone."""
        grid = self.empty()
        with progress_bar(
            total=len(self.runs) * len(self.places), unit="layer", desc=f"patch {name_of(self.target)}"
        ) as bar:
            for _ in self.filling(grid):
                bar.update()
        return grid

    def empty(self) -> PatchingGrid:
        """Make the grid before anything is patched."""
        runs, maps = self.runs, [self._maps.get(site) for site in self.places]
        width = max(len(run.patched.ids) for run in runs)
        clean, corrupted = np.array([run.base for run in runs]).T
        return PatchingGrid(
            tuple(mapping.source if mapping else None for mapping in maps),
            tuple(space_of(self.target, site) for site in self.places),
            names_of(self.target, [run.patched.ids for run in runs]),
            {kind: np.full((len(runs), len(self.places), width), np.nan) for kind in self.kinds},
            clean,
            corrupted,
            "KL" if self.answers is None else "logit difference",
        )

    def filling(self, grid: PatchingGrid) -> Iterator[Site]:
        """Fill an empty grid in, and yield after each layer of each pair."""
        for i, run in enumerate(self.runs):
            offset = len(grid.tokens) - len(run.patched.ids)
            for k, space in enumerate(grid.targets):
                # All kinds in one batch: a few rows alone leave the processor waiting for weights.
                made: dict[Kind, tuple[Tensor, tuple[int, ...]]]
                made = {kind: self.rows(kind, space.site, i) for kind in grid.values}
                values = torch.cat([rows.float().cpu() for rows, places in made.values() if places])
                found = run.recovery(self.target, space, values, [p for _, places in made.values() for p in places])
                for kind, (_, places) in made.items():
                    own, found = found[: len(places)], found[len(places) :]
                    grid.values[kind][i, k, [offset + place for place in places]] = own
                yield space.site


def patching_grid(
    source: Any,
    target: Any,
    maps: Sequence[Map],
    clean: Prompts,
    corrupted: Prompts,
    answers: Sequence[tuple[str, str]] | None = None,
    **options: Any,
) -> PatchingGrid:
    """Patch mapped activations of clean prompts into runs on corrupted ones.

    Every layer and position is patched alone. Several pairs of prompts are averaged by position, counted from the last token.

    Args:
        source: The model whose activations are mapped; None for the target's own alone.
        target: The model that is patched.
        maps: Maps from sites of the source to sites of the target, one for each row of the grid.
        clean: Prompts whose right answer is the first of ``answers``.
        corrupted: A prompt for each of them, whose right answer is the second.
        answers: The two answers to each pair; see `Patching`.
        options: ``sites``, ``source_prompts``, ``text``, ``pairs`` and ``direction`` of `Patching`, which says what is refused.
    """
    return Patching(target, clean, corrupted, answers, source=source, maps=maps, **options).grid()

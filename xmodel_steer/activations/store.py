"""Activations of two models on disk, shard by shard: for maps that moments are not enough for, and for more text than memory.

Each model is harvested by itself, so that the two need never be in memory together. A shard is one
window of documents at one model: a safetensors file that is whole or not there, with what it was
made from in its header. Which rows pair is found when they are read, by the keys that tokens have in
both models: the character that they end on, or their role in the chat template.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from xmodel_steer.activations.collecting import Plan, window_size
from xmodel_steer.activations.shards import Document, Shard, align_documents, rows_name, unnamed
from xmodel_steer.core.alignment import check_coverage
from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import ArtifactError, SpaceMismatchError
from xmodel_steer.core.spaces import Site, SiteLike, Sites, Space, as_site, as_sites
from xmodel_steer.files.records import read_record
from xmodel_steer.maps.accumulator import MomentsAccumulator
from xmodel_steer.maps.moments import Moments
from xmodel_steer.maps.pairs import PARTS
from xmodel_steer.maps.rows import DocumentRows, PairedRows

ENDS = ("source", "target")


class ActivationStore:
    """Paired activations of two models on disk, as `harvest` wrote them.

    Args:
        folder: The store.

    Raises:
        ArtifactError: There is no store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not any((self.folder / end / "end.json").is_file() for end in ENDS):
            raise ArtifactError(f"{self.folder}: is not a store of activations; make one with xs.harvest")

    def __repr__(self) -> str:
        there = [
            end for end in ENDS if (self.folder / end / "end.json").is_file()
        ]  # nothing is read: it may be damaged
        return f"ActivationStore({str(self.folder)!r}, {' and '.join(there) or 'gone'})"

    def record(self, end: str) -> dict[str, Any]:
        """Read how one end was harvested: model, tokenizer, spaces, dtype and settings.

        Raises:
            ArtifactError: The end is missing or was not finished.
        """
        file = self.folder / end / "end.json"
        if not file.is_file():
            raise ArtifactError(f"{self.folder}: has no {end}; harvest the {end} model into it with end={end!r}")
        made = read_record(file)
        if "shards" not in made:
            raise ArtifactError(
                f"{self.folder / end}: was not finished; give the same harvest again and it goes on after the last whole shard"
            )
        return made

    def spaces(self, end: str) -> dict[Site, Space]:
        """Return the spaces that one end holds."""
        made = map(Space.from_dict, self.record(end)["spaces"])
        return {space.site: space for space in made}

    @cached_property
    def _shards(self) -> list[tuple[Shard, Shard]]:
        records = {end: self.record(end) for end in ENDS}
        one, two = (records[end]["settings"] for end in ENDS)
        if one != two:
            raise ArtifactError(
                f"{self.folder}: source and target were harvested with different settings ({one} and {two}); harvest one again"
            )
        counts = [records[end]["shards"] for end in ENDS]
        files = [
            [self.folder / end / f"{i:06d}.safetensors" for i in range(n)] for end, n in zip(ENDS, counts, strict=True)
        ]
        missing = [str(file) for own in files for file in own if not file.is_file()]
        if missing:
            raise ArtifactError(
                f"{missing[0]}: is missing ({len(missing)} in all); harvest again, what is there is kept"
            )
        found = [[Shard(file, file.stat().st_mtime_ns) for file in own] for own in files]
        pairs = list(zip(*found, strict=False))
        differ = counts[0] != counts[1] or any(a.header["texts"] != b.header["texts"] for a, b in pairs)
        if differ:
            raise ArtifactError(
                f"{self.folder}: source and target were harvested from different texts; harvest one again"
            )
        for end, own in zip(ENDS, found, strict=True):
            for shard in own:
                if unnamed(shard.header["spaces"]) != unnamed(records[end]["spaces"]):
                    raise ArtifactError(
                        f"{shard.file}: is of another model or other sites than its store; harvest again"
                    )
        return pairs

    @cached_property
    def _counts(self) -> list[list[tuple[int, int]]]:
        """For each document of each shard, how many rows pair and how many could."""
        return [[(len(a), a.eligible) for a in align_documents(*shards)] for shards in self._shards]

    def _coverage(self) -> float:
        """Share of the tokens that could pair that do; refuses too small a one."""
        every = [document for window in self._counts for document in window]
        return check_coverage(sum(paired for paired, _ in every), sum(possible for _, possible in every))

    def _require_site(self, end: str, site: Site) -> Space:
        spaces = self.spaces(end)
        if site not in spaces:
            raise SpaceMismatchError(
                f"{self.folder}: the {end} holds {', '.join(map(str, spaces))}, not {site}; harvest it into another folder"
            )
        return spaces[site]

    def pair(self, source: SiteLike, target: SiteLike) -> PairedRows:
        """Return the paired rows of one layer pair, read when they are needed.

        Args:
            source: Site of the source, or a layer by its number.
            target: The same of the target.

        Raises:
            ArtifactError: A shard is missing or damaged, or the ends do not match.
            SpaceMismatchError: The store does not hold the site.
            AlignmentError: Under 20 % of the tokens pair.
        """
        source, target = as_site(source), as_site(target)
        spaces = self._require_site("source", source), self._require_site("target", target)
        size = window_size(self.record("source")["settings"]["max_tokens"])
        documents = []
        for number, ((one, two), counts) in enumerate(zip(self._shards, self._counts, strict=True)):
            for i, ((count, _), part) in enumerate(zip(counts, one.rows("parts").tolist(), strict=True)):
                own = Document(one, two, (source, target), i)
                prompt = one.header["documents"][i]
                documents.append(DocumentRows(number * size + i, PARTS[part], count, own.load, prompt))
        return PairedRows(*spaces, tuple(documents), coverage=self._coverage(), window=size)

    def moments(
        self,
        *,
        source_sites: Sites | None = None,
        target_sites: Sites | None = None,
        pairs: Sequence[tuple[SiteLike, SiteLike]] | None = None,
        sketch: int | None = None,
        shuffled: bool = True,
    ) -> Moments:
        """Collect the moments of stored activations, as `collect_moments` would have.

        Args:
            source_sites: Sites of the source; all that are stored by default.
            target_sites: Sites of the target; all that are stored by default.
            pairs: Layer pairs to keep full cross moments of; see `collect_moments`.
            sketch: Number of target dimensions for all layer pairs; see `collect_moments`.
            shuffled: Keep the moments of the shuffled control.

        Raises:
            ArtifactError: A shard is missing or damaged, or the ends do not match.
        """
        spaces = {end: self.spaces(end) for end in ENDS}
        settings = self.record("source")["settings"]
        chosen = [
            tuple(spaces[end]) if s is None else as_sites(s)
            for end, s in zip(ENDS, (source_sites, target_sites), strict=True)
        ]
        widths = [next(iter(spaces[end].values())).width for end in ENDS]
        plan = Plan.of((widths[0], widths[1]), chosen[0], chosen[1], pairs, sketch, shuffled, settings["seed"])
        accumulator = MomentsAccumulator(
            {s: self._require_site("source", s) for s in plan.sources},
            {t: self._require_site("target", t) for t in plan.targets},
            plan.pairs,
            sketch=plan.sketch,
            shuffled=shuffled,
            settings=settings,
            seed=settings["seed"],
        )
        size = window_size(settings["max_tokens"])
        self._coverage()
        for number, (one, two) in enumerate(_counted(self._shards)):
            aligned, parts = align_documents(one, two), one.rows("parts").tolist()
            sides = [
                {site: shard.rows(rows_name(site)) for site in sites}
                for shard, sites in ((one, plan.sources), (two, plan.targets))
            ]
            for k in dict.fromkeys(parts):
                members = [i for i, part in enumerate(parts) if part == k]
                places = [
                    [shard.starts[i] + p for i in members for p in getattr(aligned[i], end)]
                    for shard, end in ((one, "source"), (two, "target"))
                ]
                accumulator.add(
                    PARTS[k],
                    {site: rows[places[0]] for site, rows in sides[0].items()},
                    {site: rows[places[1]] for site, rows in sides[1].items()},
                    [number * size + i for i in members for _ in range(len(aligned[i]))],
                    eligible=sum(aligned[i].eligible for i in members),
                )
        return accumulator.moments()

    def verify(self) -> int:
        """Read every shard whole and compare all checksums.

        Returns:
            Number of rows of the source and the target together.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        rows = 0
        for shard in (shard for pair in self._shards for shard in pair):
            for name in shard.header["checksums"]:
                shard.rows(name)  # nothing that is not finite was written
            rows += int(shard.rows("counts").sum())
        return rows


def _counted(shards: Sequence[tuple[Shard, Shard]]) -> Iterator[tuple[Shard, Shard]]:
    """Go through shards with a progress bar."""
    with progress_bar(len(shards), unit="shard", desc="moments from the store") as bar:
        for pair in shards:
            yield pair
            bar.update()

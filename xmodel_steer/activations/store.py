"""Activations of two models on disk, shard by shard: for maps that need single rows, and for more text than memory.

Each model is harvested alone, so that the two need never be in memory together. A shard is one window of documents at
one model: a safetensors file, whole or absent, whose header records its origin. Rows pair when they are read, by keys
that tokens have in both models: the character that they end on, or their role in the template.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from xmodel_steer.activations.collecting import Plan, accumulate, window_size
from xmodel_steer.activations.shards import Document, Shard, ShardPair, opener, require_settings
from xmodel_steer.core.alignment import check_coverage
from xmodel_steer.core.bars import progress_bar
from xmodel_steer.core.errors import ArtifactError, SpaceMismatchError
from xmodel_steer.core.spaces import Site, SiteLike, Sites, Space, as_site, as_sites, stacked
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
        ArtifactError: The folder is no store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not any((self.folder / end / "end.json").is_file() for end in ENDS):
            raise ArtifactError(f"{self.folder}: is not a store of activations; make one with xs.harvest")

    def __repr__(self) -> str:
        # No file is read: it may be damaged.
        there = [end for end in ENDS if (self.folder / end / "end.json").is_file()]
        return f"ActivationStore({str(self.folder)!r}, {' and '.join(there) or 'gone'})"

    def record(self, end: str) -> dict[str, Any]:
        """Read how one end was harvested: model, tokenizer, spaces, dtype and settings.

        Raises:
            ArtifactError: The end is missing or was not finished.
        """
        file = self.folder / end / "end.json"
        if not file.is_file():
            raise ArtifactError(f"{self.folder}: has no {end}; harvest the {end} model into it with end={end!r}")
        record = read_record(file)
        if "shards" not in record:
            raise ArtifactError(
                f"{self.folder / end}: was not finished; give the same harvest again, which continues after the last whole shard"
            )
        return record

    def spaces(self, end: str) -> dict[Site, Space]:
        """Return the spaces that one end holds."""
        return {space.site: space for space in map(Space.from_dict, self.record(end)["spaces"])}

    @cached_property
    def _shards(self) -> list[ShardPair]:
        records = {end: self.record(end) for end in ENDS}
        one, two = (records[end]["settings"] for end in ENDS)
        if one != two:
            raise ArtifactError(
                f"{self.folder}: source and target were harvested with different settings ({one} and {two}); harvest one again"
            )
        files = {
            end: [self.folder / end / f"{i:06d}.safetensors" for i in range(record["shards"])]
            for end, record in records.items()
        }
        missing = [str(file) for end in ENDS for file in files[end] if not file.is_file()]
        if missing:
            raise ArtifactError(
                f"{missing[0]}: is missing ({len(missing)} in all); harvest again, which keeps the other shards"
            )
        opened = opener()
        shards = {end: [Shard(file, file.stat().st_mtime_ns, opened) for file in files[end]] for end in ENDS}
        pairs = [ShardPair(a, b) for a, b in zip(*shards.values(), strict=False)]
        same = len(set(map(len, files.values()))) == 1 and all(
            pair.source.header["texts"] == pair.target.header["texts"] for pair in pairs
        )
        if not same:
            raise ArtifactError(
                f"{self.folder}: source and target were harvested from different texts; harvest one again"
            )
        for end in ENDS:
            for shard in shards[end]:
                require_settings(shard.file, shard.header, records[end])
        return pairs

    def _coverage(self) -> float:
        """Return the share of eligible tokens that pair; refuse too small a one."""
        paired, eligible = zip(*(document for shards in self._shards for document in shards.counts), strict=True)
        return check_coverage(sum(paired), sum(eligible))

    def _require_site(self, end: str, site: Site) -> Space:
        spaces = self.spaces(end)
        for member in site.members:
            if member not in spaces:
                raise SpaceMismatchError(
                    f"{self.folder}: the {end} holds {', '.join(map(str, spaces))}, not {member}; harvest it into another folder"
                )
        return stacked(site, [spaces[member] for member in site.members])

    def pair(self, source: SiteLike, target: SiteLike) -> PairedRows:
        """Return the paired rows of one layer pair, read when they are needed.

        Args:
            source: Site of the source, or a layer's number.
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
        for number, shards in enumerate(self._shards):
            parts = shards.source.rows("parts").tolist()
            for i, ((count, _), part) in enumerate(zip(shards.counts, parts, strict=True)):
                load = Document(shards, (source, target), i).load
                prompt = shards.source.header["documents"][i]
                documents.append(DocumentRows(number * size + i, PARTS[part], count, load, prompt))
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
        """Collect the moments of stored activations, equal to those of `collect_moments`.

        Args:
            source_sites: Sites of the source; by default all that are stored.
            target_sites: Sites of the target; by default all that are stored.
            pairs: Layer pairs to keep full cross moments of; see `collect_moments`.
            sketch: Number of target dimensions for all layer pairs; see `collect_moments`.
            shuffled: Keep the moments of the shuffled control.

        Raises:
            ArtifactError: A shard is missing or damaged, or the ends do not match.
            ValueError: The moments would take more memory than the machine has; see `collect_moments`.
        """
        stored = {end: self.spaces(end) for end in ENDS}
        settings = self.record("source")["settings"]
        chosen = [
            tuple(stored[end]) if s is None else as_sites(s)
            for end, s in zip(ENDS, (source_sites, target_sites), strict=True)
        ]
        source, target = (next(iter(stored[end].values())).width for end in ENDS)
        plan = Plan.of((source, target), chosen[0], chosen[1], pairs, sketch, shuffled, settings["seed"])
        plan.within_memory((source, target), shuffled)
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
        with progress_bar(len(self._shards), unit="shard", desc="moments from the store") as bar:
            for number, shards in enumerate(self._shards):
                aligned = shards.aligned
                parts = [PARTS[part] for part in shards.source.rows("parts").tolist()]
                rows = (
                    shard.documents(sites, [getattr(pairing, end) for pairing in aligned])
                    for shard, sites, end in (
                        (shards.source, plan.sources, "source"),
                        (shards.target, plan.targets, "target"),
                    )
                )
                accumulate(accumulator, parts, number * size, aligned, *rows)
                bar.update()
        return accumulator.moments()

    def verify(self) -> int:
        """Read every shard whole and compare all checksums.

        Returns:
            Number of rows of the source and the target together.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        rows = 0
        for shard in (shard for pair in self._shards for shard in (pair.source, pair.target)):
            for name in shard.checksums:
                shard.rows(name)  # every number was finite when it was written
            rows += int(shard.rows("counts").sum())
        return rows

"""Shards of a store: files with one model's rows of a window of documents."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmodel_steer.activations.collecting import rows_at
from xmodel_steer.core.alignment import Alignment, TokenEnds, align
from xmodel_steer.core.errors import ArtifactError
from xmodel_steer.core.finite import check_finite
from xmodel_steer.core.prompts import Prompt, text_digest
from xmodel_steer.core.spaces import Site
from xmodel_steer.files.records import TENSORS, digest_of, read_header, write_tensors
from xmodel_steer.maps.pairs import PARTS, part_of
from xmodel_steer.models.batching import encode
from xmodel_steer.models.facts import name_of
from xmodel_steer.models.recorder import joined
from xmodel_steer.models.tokens import Encoding

#: Files of a store that stay mapped into memory. Another file is mapped anew for each read (0.1 ms).
OPEN_FILES = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def hash_of(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unnamed(value: Any) -> Any:
    """Drop names of models from a record, since one model may have several."""
    if isinstance(value, list):
        return [unnamed(item) for item in value]
    return {key: item for key, item in value.items() if key != "model"} if isinstance(value, dict) else value


def shard_header(file: Path) -> dict[str, Any]:
    """Read the record of a shard without its tensors."""
    try:
        return read_header(file)
    except ArtifactError as error:
        raise ArtifactError(f"{file}: is not a whole shard ({error}); delete it and harvest again") from error


OTHER = {"spaces": "another model or other sites"}


def require_settings(file: Path, header: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse a shard of another model, other sites or other settings than its store's.

    Raises:
        ArtifactError: Names the setting that differs.
    """
    for key in record.keys() - {"schema", "kind", "model", "revision", "shards"}:
        if unnamed(header.get(key)) != unnamed(record[key]):
            raise ArtifactError(
                f"{file}: is of {OTHER.get(key, f'another {key}')} than its store ({str(header.get(key))[:120]}, not {str(record[key])[:120]}); "
                "delete it and harvest again"
            )


def write_shard(
    model: Any,
    window: Sequence[Prompt],
    number: int,
    file: Path,
    record: Mapping[str, Any],
    sites: Sequence[Site],
    dtype: torch.dtype | None,
    settings: Mapping[str, Any],
    batch_size: int,
) -> list[Encoding]:
    """Write a shard; return the prompts that the chat template does not show whole."""
    cut = {key: settings[key] for key in ("max_tokens", "truncation_side")}
    encodings = encode(model, window, **cut, warn=False)
    keys = [e.token_ends(template=settings["template"]).ends for e in encodings]
    positions = [tuple(i for i, key in enumerate(ends) if key != -1) for ends in keys]
    rows = rows_at(model, encodings, sites, positions, batch_size)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        values = torch.cat([document[site] for document in rows])
        check_finite(values, f"harvest {name_of(model)} {site}")
        tensors[rows_name(site)] = values.to(dtype)  # checked again, as it is written
    tensors["keys"] = torch.tensor([key for ends in keys for key in ends if key != -1], dtype=torch.int64)
    tensors["counts"] = torch.tensor(list(map(len, positions)), dtype=torch.int64)
    parts = [part_of(prompt.content_key(), seed=settings["seed"]) for prompt in window]
    tensors["parts"] = torch.tensor([PARTS.index(part) for part in parts], dtype=torch.int64)
    header = {
        **{key: value for key, value in record.items() if key not in ("schema", "kind")},
        "number": number,
        "texts": text_digest(window),
        "documents": [prompt.id for prompt in window],
    }
    write_tensors(file, "ActivationShard", tensors, header)
    return [encoding for encoding in encodings if encoding.missing]


def rows_name(site: Site) -> str:
    """Name the tensor that holds the rows of a site."""
    return f"rows/{site.key}"


def _former_checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


def opener() -> Callable[[Path], Any]:
    """Return a function that maps a shard's file into memory.

    It keeps many files mapped, for reads in any order. Each store has one of its own, so that files of a deleted store do not keep their place on the disk.
    """
    return lru_cache(maxsize=OPEN_FILES)(lambda file: safe_open(str(file), framework="pt"))


@dataclass(frozen=True)
class Shard:
    """One shard of one end, read when it is needed; a file that was written anew is another shard."""

    file: Path
    modified: int
    opened: Callable[[Path], Any] = field(compare=False, repr=False)

    @cached_property
    def header(self) -> dict[str, Any]:
        """The record of the shard."""
        return shard_header(self.file)

    @property
    def checksums(self) -> dict[str, str]:
        """The hash of each tensor."""
        return self.header.get(TENSORS) or self.header["checksums"]  # as shards of schema 1 have them

    def rows(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Read rows of a tensor; verify its checksum the first time."""
        try:
            if self.file.stat().st_mtime_ns != self.modified:
                raise ArtifactError(f"{self.file}: was written anew since the store was opened; open it again")
            opened = self.opened(self.file)
            if name not in self._verified:
                tensor, kept = opened.get_tensor(name), self.checksums[name]
                if kept != (digest_of(tensor) if TENSORS in self.header else _former_checksum(tensor)):
                    raise ArtifactError(f"{self.file}: {name} does not match its checksum; delete it and harvest again")
                self._verified.add(name)
            return opened.get_tensor(name) if start is None else opened.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.file}: cannot be read ({error}); delete it and harvest again") from error

    @cached_property
    def _verified(self) -> set[str]:
        return set()

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each document, and the number of rows."""
        return [0, *self.rows("counts").cumsum(0).tolist()]

    def at(self, site: Site, start: int | None = None, stop: int | None = None) -> Tensor:
        """Read rows at a site; a stack's members are joined."""
        return joined({member: self.rows(rows_name(member), start, stop) for member in site.members}, site)

    def documents(self, sites: Sequence[Site], places: Sequence[Sequence[int]]) -> list[dict[Site, Tensor]]:
        """Read some rows of every document, at each site."""
        rows = {site: self.at(site) for site in sites}
        return [
            {site: values[[start + place for place in chosen]] for site, values in rows.items()}
            for start, chosen in zip(self.starts, places, strict=False)
        ]

    def keys(self) -> list[tuple[int, ...]]:
        """Return the keys of each document's rows."""
        return [tuple(keys.tolist()) for keys in self.rows("keys").split(self.rows("counts").tolist())]


@dataclass(frozen=True)
class ShardPair:
    """The two shards of one window, with the pairing of their rows.

    All documents are aligned once, and the pairing is kept for as long as the store: 8 bytes a pair. A cache of few
    pairings would align a whole window again for almost every document that is read in shuffled order.
    """

    source: Shard
    target: Shard

    @cached_property
    def _pairing(self) -> tuple[Tensor, list[int], list[int]]:
        """Paired places ``(2, pairs)``, each document's first pair, and its eligible tokens."""
        aligned = [
            align(TokenEnds(a), TokenEnds(b)) for a, b in zip(self.source.keys(), self.target.keys(), strict=True)
        ]
        ends = ([place for a in aligned for place in getattr(a, end)] for end in ("source", "target"))
        places = torch.tensor(list(ends), dtype=torch.int32)
        return places, [0, *accumulate(map(len, aligned))], [a.eligible for a in aligned]

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Numbers of rows that pair, and that could, for each document."""
        _, starts, eligible = self._pairing
        return [(stop - start, possible) for start, stop, possible in zip(starts, starts[1:], eligible, strict=False)]

    @property
    def aligned(self) -> list[Alignment]:
        """The pairing of each document's rows."""
        sides = (self.places(i).tolist() for i in range(len(self.counts)))
        return [Alignment(tuple(a), tuple(b), count[1]) for (a, b), count in zip(sides, self.counts, strict=True)]

    def places(self, index: int) -> Tensor:
        """Return the paired places in one document, source and target."""
        places, starts, _ = self._pairing
        return places[:, starts[index] : starts[index + 1]].long()


@dataclass(frozen=True)
class Document:
    """The place of one document's paired rows; small, because there are many."""

    shards: ShardPair
    sites: tuple[Site, Site]
    index: int

    def load(self) -> tuple[Tensor, Tensor]:
        """Read the paired rows."""
        paired = []
        ends = (self.shards.source, self.shards.target)
        for shard, site, places in zip(ends, self.sites, self.shards.places(self.index), strict=True):
            start, stop = shard.starts[self.index : self.index + 2]
            paired.append(shard.at(site, start, stop)[places])
        return paired[0], paired[1]

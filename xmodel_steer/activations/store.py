"""Activations of two models on disk, shard by shard: for maps that moments are not enough for, and for more text than memory.

Each model is harvested by itself, so that the two need never be in memory together. A shard is one
window of documents at one model: a safetensors file that is whole or not there, with what it was
made from in its header. Which rows pair is found when they are read, by the keys that tokens have in
both models: the character that they end on, or their role in the chat template.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from xmodel_steer.activations.collecting import Plan, require_shard, rows_at, window_size, windows
from xmodel_steer.core.alignment import Alignment, TokenEnds, align, check_coverage
from xmodel_steer.core.errors import ArtifactError, PromptError, SpaceMismatchError
from xmodel_steer.core.prompts import Prompt, Prompts, as_prompts, items_of, text_digest
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import check_finite
from xmodel_steer.files.records import (
    KEY,
    SCHEMA,
    dump_json,
    parse_record,
    read_record,
    write_atomically,
    write_tensors,
)
from xmodel_steer.maps.moments import PARTS, Moments, MomentsAccumulator, part_of
from xmodel_steer.maps.rows import DocumentRows, PairedRows
from xmodel_steer.models.forward import (
    context_length,
    dtype_of,
    encode,
    name_of,
    revision_of,
    sites_of,
    space_of,
    tokenizer_of,
)
from xmodel_steer.models.tokens import Encoding, warn_of_missing

ENDS = ("source", "target")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def harvest(
    model: Any,
    texts: Prompts,
    folder: str | Path,
    *,
    end: str,
    sites: Sequence[Site] | Literal["all"],
    dtype: str = "model",
    max_tokens: int = 256,
    truncation_side: str = "right",
    template: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> "ActivationStore":
    """Write one model's activations over general text to a store, a shard at a time.

    Killed at any moment, the same call goes on after the last whole shard, and ends with the same
    bits as one that was not. Rows are those that can pair: no special tokens, no text position 0.

    Args:
        model: A TransformerLens model.
        texts: Documents; any iterable, read once, the same for both models.
        folder: The store; made if it is not there. Both models go into one.
        end: ``"source"`` or ``"target"``: which of the two models this is.
        sites: Sites to keep; ``"all"``: after every block.
        dtype: ``"float32"``, ``"bfloat16"`` (half the size, 0.2 % rounding), or ``"model"``: the model's.
        max_tokens: Longer documents are cut to this many tokens.
        truncation_side: Where they are cut, ``"right"`` or ``"left"``.
        template: Keep the tokens of chat templates that have a role; see `align`.
        batch_size: Documents per forward pass.
        seed: Seed of the split into train, validation and test documents.
        shard: ``(i, n)``: write every n-th shard, from the i-th: n jobs together fill the store.
        progress: Show a progress bar when it takes over two seconds.

    Returns:
        The store; it can be read once both models are in it.

    Raises:
        ArtifactError: The folder holds a store of another model, text or setting, or the disk is full.
        PromptError: There are no documents.
        NonFiniteError: An activation is NaN or infinite, also in the store's dtype.
    """
    if isinstance(texts, (str, Prompt)):
        raise PromptError("harvest: give a list of texts; for a single one, [text]")
    if end not in ENDS:
        raise ValueError(f"harvest: end must be 'source' or 'target', got {end!r}")
    sites = sites_of(model, sites)
    if not sites:
        raise ValueError("harvest: give at least one site, such as xs.Site(10)")
    part, parts = require_shard(shard, "harvest")
    kind = dtype_of(model) if dtype == "model" else _DTYPES.get(dtype)
    if kind not in _DTYPES.values():
        raise ValueError(f"harvest: dtype must be float32, bfloat16 or model, got {dtype!r} (float16 overflows)")
    settings = {"max_tokens": max_tokens, "truncation_side": truncation_side, "template": template, "seed": seed}
    if max_tokens > context_length(model):
        raise PromptError(f"harvest: max_tokens {max_tokens} is over the context of {name_of(model)}")
    texts = items_of(texts, "harvest")
    if isinstance(texts, Sequence):
        texts = as_prompts(texts, what="harvest")  # what cannot be a prompt is refused before the model runs
    place = Path(folder) / end
    record = _end_record(model, sites, kind, settings)
    _open_end(place, record)

    names: list[str] = []
    lacking: list[Encoding] = []
    total = len(texts) if isinstance(texts, Sequence) else None
    title = f"harvest {name_of(model)}" + (f", shard {part}/{parts}" if parts > 1 else "")
    with tqdm(total=total, unit="text", desc=title, disable=not progress, delay=2) as bar:
        for number, window in enumerate(windows(texts, window_size(max_tokens))):
            name = f"{number:06d}.safetensors"
            names.append(name)
            file = place / name
            if file.is_file():
                _require_same_texts(file, window)
            elif number % parts == part:
                lacking += _write_shard(model, window, number, file, record, sites, kind, settings, batch_size)
                del lacking[2:]
            bar.update(len(window))
    warn_of_missing(lacking, name_of(model))
    if not names:
        raise PromptError("harvest: no texts were given")
    if all((place / name).is_file() for name in names):  # other jobs may still be writing
        write_atomically(place / "end.json", dump_json({**record, "shards": len(names)}, place, indent=1))
    return ActivationStore(folder)


def _end_record(model: Any, sites: Sequence[Site], dtype: torch.dtype | None, settings: Mapping[str, Any]) -> dict:
    tokenizer = tokenizer_of(model)
    return {
        "schema": SCHEMA,
        "kind": "ActivationStore",
        "model": name_of(model),
        "revision": revision_of(model),
        "tokenizer": _hash(tokenizer.backend_tokenizer.to_str()),
        "chat_template": _hash(str(getattr(tokenizer, "chat_template", None) or "")),
        "spaces": [space_of(model, site).to_dict() for site in sites],
        "model_dtype": str(dtype_of(model)).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "settings": dict(settings),
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open_end(place: Path, record: Mapping[str, Any]) -> None:
    """Begin an end of a store, or find the same one begun."""
    file = place / "end.json"
    if not file.is_file():
        # What begins with a dot is a scratch file of a job that was killed.
        if place.exists() and any(not f.name.startswith(".") for f in place.iterdir()):
            raise ArtifactError(f"{place}: is not empty and not a store; choose another folder, nothing was written")
        write_atomically(file, dump_json(record, file, indent=1))
        return
    known = read_record(file)
    differing = [
        key
        for key in record
        if key != "model" and _unnamed(known.get(key)) != _unnamed(json.loads(json.dumps(record[key])))
    ]
    if differing:
        key = differing[0]
        raise ArtifactError(
            f"{place}: holds activations of {known.get('model')} with another {key} "
            f"({str(known.get(key))[:120]}, now {str(record[key])[:120]}); choose another folder, or harvest as before"
        )


def _unnamed(value: Any) -> Any:
    """A record without what models are called: the same weights may have been loaded by another name."""
    if isinstance(value, list):
        return [_unnamed(own) for own in value]
    return {key: own for key, own in value.items() if key != "model"} if isinstance(value, dict) else value


def _shard_header(file: Path) -> dict[str, Any]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return parse_record((opened.metadata() or {})[KEY], file)
    except (SafetensorError, OSError, KeyError) as error:
        raise ArtifactError(f"{file}: is not a whole shard ({error}); delete it and harvest again") from error


def _require_same_texts(file: Path, window: Sequence[Prompt]) -> None:
    if _shard_header(file)["texts"] != text_digest(window):
        raise ArtifactError(
            f"{file}: was harvested from other texts, or in another order; give the same texts, or choose another folder"
        )


def _write_shard(
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
    """Write the shard; returns the prompts that the chat template does not show whole."""
    cut = {key: settings[key] for key in ("max_tokens", "truncation_side")}
    encodings = encode(model, window, **cut, warn=False)
    keys = [e.token_ends(template=settings["template"]).ends for e in encodings]
    positions = [tuple(i for i, key in enumerate(own) if key != -1) for own in keys]
    rows = rows_at(model, encodings, sites, positions, batch_size)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        values = torch.cat([own[site] for own in rows])
        check_finite(values, f"harvest {name_of(model)} {site}")
        tensors[_rows_name(site)] = values.to(dtype)  # checked again, as it is written
    tensors["keys"] = torch.tensor([key for own in keys for key in own if key != -1], dtype=torch.int64)
    tensors["counts"] = torch.tensor([len(own) for own in positions], dtype=torch.int64)
    parts = [part_of(prompt.content_key(), seed=settings["seed"]) for prompt in window]
    tensors["parts"] = torch.tensor([PARTS.index(part) for part in parts], dtype=torch.int64)
    header = {
        **{key: value for key, value in record.items() if key not in ("schema", "kind")},
        "number": number,
        "texts": text_digest(window),
        "documents": [prompt.id for prompt in window],
        "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
    }
    write_tensors(file, "ActivationShard", tensors, header)
    return [encoding for encoding in encodings if encoding.missing]


def _rows_name(site: Site) -> str:
    return f"rows/{site.layer}.{site.stream}"


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]


@lru_cache(maxsize=64)
def _opened(file: Path, modified: int) -> Any:
    """A shard's file, mapped into memory; a few stay open, because documents are read in any order."""
    return safe_open(str(file), framework="pt")


@dataclass(frozen=True)
class _Shard:
    """One shard of one end, read when it is needed. What was written anew is another one."""

    file: Path
    modified: int

    @cached_property
    def header(self) -> dict[str, Any]:
        return _shard_header(self.file)

    def rows(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows of a tensor, whose checksum is verified when it is read first."""
        try:
            if self.file.stat().st_mtime_ns != self.modified:
                raise ArtifactError(f"{self.file}: was written anew since the store was opened; open it again")
            opened = _opened(self.file, self.modified)
            if name not in self._verified:
                if _checksum(opened.get_tensor(name)) != self.header["checksums"][name]:
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
        """First row of each document, and the number of rows."""
        return [0, *self.rows("counts").cumsum(0).tolist()]

    def keys(self) -> list[tuple[int, ...]]:
        """The keys of each document's rows."""
        return [tuple(own.tolist()) for own in self.rows("keys").split(self.rows("counts").tolist())]


@lru_cache(maxsize=64)
def _aligned(source: _Shard, target: _Shard) -> list[Alignment]:
    """Which rows of each document pair; computed again when it is needed again, because texts outgrow memory."""
    return [align(TokenEnds(a), TokenEnds(b)) for a, b in zip(source.keys(), target.keys(), strict=True)]


@dataclass(frozen=True)
class _Document:
    """Where one document's paired rows are; small, because there are many."""

    source: _Shard
    target: _Shard
    sites: tuple[Site, Site]
    index: int

    def load(self) -> tuple[Tensor, Tensor]:
        """The paired rows."""
        alignment = _aligned(self.source, self.target)[self.index]
        ends = ((self.source, self.sites[0], alignment.source), (self.target, self.sites[1], alignment.target))
        made = []
        for shard, site, places in ends:
            start, stop = shard.starts[self.index : self.index + 2]
            made.append(shard.rows(_rows_name(site), start, stop)[list(places)])
        return made[0], made[1]


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

    def record(self, end: str) -> dict[str, Any]:
        """What one end was harvested from: model, tokenizer, spaces, dtype and settings.

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
        """The spaces that one end holds."""
        made = map(Space.from_dict, self.record(end)["spaces"])
        return {space.site: space for space in made}

    @cached_property
    def _shards(self) -> list[tuple[_Shard, _Shard]]:
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
        found = [[_Shard(file, file.stat().st_mtime_ns) for file in own] for own in files]
        pairs = list(zip(*found, strict=False))
        differ = counts[0] != counts[1] or any(a.header["texts"] != b.header["texts"] for a, b in pairs)
        if differ:
            raise ArtifactError(
                f"{self.folder}: source and target were harvested from different texts; harvest one again"
            )
        for end, own in zip(ENDS, found, strict=True):
            for shard in own:
                if _unnamed(shard.header["spaces"]) != _unnamed(records[end]["spaces"]):
                    raise ArtifactError(
                        f"{shard.file}: is of another model or other sites than its store; harvest again"
                    )
        return pairs

    @cached_property
    def _counts(self) -> list[list[tuple[int, int]]]:
        """For each document of each shard, how many rows pair and how many could."""
        return [[(len(a), a.eligible) for a in _aligned(*shards)] for shards in self._shards]

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

    def pair(self, source: Site, target: Site) -> PairedRows:
        """The paired rows of one layer pair, read when they are needed.

        Args:
            source: Site of the source.
            target: Site of the target.

        Raises:
            ArtifactError: A shard is missing or damaged, or the ends do not match.
            SpaceMismatchError: The store does not hold the site.
            AlignmentError: Under 20 % of the tokens pair.
        """
        spaces = self._require_site("source", source), self._require_site("target", target)
        size = window_size(self.record("source")["settings"]["max_tokens"])
        documents = []
        for number, ((one, two), counts) in enumerate(zip(self._shards, self._counts, strict=True)):
            for i, ((count, _), part) in enumerate(zip(counts, one.rows("parts").tolist(), strict=True)):
                own = _Document(one, two, (source, target), i)
                prompt = one.header["documents"][i]
                documents.append(DocumentRows(number * size + i, PARTS[part], count, own.load, prompt))
        return PairedRows(*spaces, tuple(documents), coverage=self._coverage(), window=size)

    def moments(
        self,
        *,
        source_sites: Sequence[Site] | None = None,
        target_sites: Sequence[Site] | None = None,
        pairs: Sequence[tuple[Site, Site]] | None = None,
        sketch: int | None = None,
        shuffled: bool = True,
        progress: bool = True,
    ) -> Moments:
        """The moments of stored activations: those that `collect_moments` would have collected.

        Args:
            source_sites: Sites of the source; all that are stored by default.
            target_sites: Sites of the target; all that are stored by default.
            pairs: Layer pairs to keep full cross moments of; see `collect_moments`.
            sketch: Number of target dimensions for all layer pairs; see `collect_moments`.
            shuffled: Keep the moments of the shuffled control.
            progress: Show a progress bar when it takes over two seconds.

        Raises:
            ArtifactError: A shard is missing or damaged, or the ends do not match.
        """
        spaces = {end: self.spaces(end) for end in ENDS}
        settings = self.record("source")["settings"]
        chosen = [
            tuple(spaces[end]) if s is None else tuple(s)
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
        bar = tqdm(self._shards, desc="moments from the store", unit="shard", disable=not progress, delay=2)
        for number, (one, two) in enumerate(bar):
            aligned, parts = _aligned(one, two), one.rows("parts").tolist()
            sides = [
                {site: shard.rows(_rows_name(site)) for site in sites}
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

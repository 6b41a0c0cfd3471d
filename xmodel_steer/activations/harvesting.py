"""Harvesting of paired activations into a store, shard by shard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from xmodel_steer.activations.collecting import documents_of, require_shard, window_size, windows
from xmodel_steer.activations.shards import DTYPES, hash_of, require_settings, shard_header, unnamed, write_shard
from xmodel_steer.activations.store import ENDS, ActivationStore
from xmodel_steer.core.bars import progress_bar, with_progress
from xmodel_steer.core.errors import ArtifactError, PromptError
from xmodel_steer.core.prompts import Prompt, Prompts, text_digest
from xmodel_steer.core.spaces import Site, Sites
from xmodel_steer.files.claiming import claim
from xmodel_steer.files.places import locked
from xmodel_steer.files.records import read_record, write_record
from xmodel_steer.models.arguments import require_counts, require_side
from xmodel_steer.models.facts import context_length, dtype_of, facts_of, name_of, tokenizer_of
from xmodel_steer.models.sites import sites_of, space_of
from xmodel_steer.models.tokens import Encoding, warn_of_missing


@with_progress
def harvest(
    model: Any,
    texts: Prompts,
    folder: str | Path,
    *,
    end: str,
    sites: Sites | Literal["all"],
    dtype: str = "model",
    max_tokens: int = 256,
    truncation_side: str = "right",
    template: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> "ActivationStore":
    """Write one model's activations over general text to a store, shard by shard.

    After an interruption the same call continues after the last whole shard, and ends with the same bits. Only rows
    that can pair are kept: no special tokens, no text position 0.

    Args:
        model: A TransformerLens model.
        texts: Documents; any iterable, read once, the same for both models.
        folder: The store, which both models share; made if it is missing.
        end: ``"source"`` or ``"target"``: the role of this model.
        sites: Sites to keep; ``"all"``: after every block. Of a stack, its members; the store joins them when it is read.
        dtype: ``"float32"``, ``"bfloat16"`` (half the size, 0.2 % rounding), or ``"model"``: the model's.
        max_tokens: Longer documents are cut to this many tokens.
        truncation_side: The side on which they are cut, ``"right"`` or ``"left"``.
        template: Keep the tokens of chat templates that have a role; see `align`.
        batch_size: Documents per forward pass.
        seed: Seed of the split into train, validation and test documents.
        shard: ``(i, n)``: write every n-th shard, from the i-th; n jobs together fill the store.
        progress: Show progress bars; see `quiet`.

    Returns:
        The store, which can be read once both models are in it.

    Raises:
        ArtifactError: The folder holds a store of another model, text or setting, or the disk is full.
        PromptError: There are no documents.
        NonFiniteError: An activation is NaN or infinite, if only in the store's dtype.
    """
    require_counts(batch_size=batch_size, max_tokens=max_tokens)
    require_side(truncation_side=truncation_side)
    if end not in ENDS:
        raise ValueError(f"harvest: end must be 'source' or 'target', got {end!r}")
    if max_tokens > context_length(model):
        raise PromptError(f"harvest: max_tokens {max_tokens} is over the context of {name_of(model)}")
    kept = tuple(dict.fromkeys(member for site in sites_of(model, sites) for member in site.members))
    if not kept:
        raise ValueError("harvest: give at least one site, such as xs.Site(10)")
    part, parts = require_shard(shard, "harvest")
    kind = dtype_of(model) if dtype == "model" else DTYPES.get(dtype)
    if kind not in DTYPES.values():
        raise ValueError(f"harvest: dtype must be float32, bfloat16 or model, got {dtype!r} (float16 overflows)")
    settings = {"max_tokens": max_tokens, "truncation_side": truncation_side, "template": template, "seed": seed}
    texts = documents_of(texts, "harvest")
    place = Path(folder) / end
    record = _end_record(model, kept, kind, settings)
    _open_end(place, record)

    names: list[str] = []
    lacking: list[Encoding] = []
    total = len(texts) if isinstance(texts, Sequence) else None
    title = f"harvest {name_of(model)}" + (f", shard {part}/{parts}" if parts > 1 else "")
    with progress_bar(total=total, unit="text", desc=title) as bar:
        for number, window in enumerate(windows(texts, window_size(max_tokens))):
            name = f"{number:06d}.safetensors"
            names.append(name)
            file = place / name
            if file.is_file():
                _require_same(file, window, record)
            elif number % parts == part:
                lacking += write_shard(model, window, number, file, record, kept, kind, settings, batch_size)
                del lacking[2:]
            bar.update(len(window))
    warn_of_missing(lacking, name_of(model))
    if not names:
        raise PromptError("harvest: no texts were given")
    if all((place / name).is_file() for name in names):  # other jobs may still be writing
        write_record(place / "end.json", {**record, "shards": len(names)}, indent=1)
    return ActivationStore(folder)


def _end_record(model: Any, sites: Sequence[Site], dtype: torch.dtype | None, settings: Mapping[str, Any]) -> dict:
    tokenizer = tokenizer_of(model)
    record = {
        "kind": "ActivationStore",
        "model": name_of(model),
        "revision": facts_of(model).revision,
        "tokenizer": hash_of(tokenizer.backend_tokenizer.to_str()),
        "chat_template": hash_of(str(getattr(tokenizer, "chat_template", None) or "")),
        "spaces": [space_of(model, site).to_dict() for site in sites],
        "model_dtype": str(dtype_of(model)).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "settings": dict(settings),
    }
    return json.loads(json.dumps(record))  # as it is read, for comparisons


def _open_end(place: Path, record: Mapping[str, Any]) -> None:
    """Begin an end of a store, or continue the same one."""
    file = claim(place, "ActivationStore") / "end.json"
    with locked(file):  # two jobs may begin together
        if not file.is_file():
            write_record(file, record, indent=1)
            return
        known = read_record(file)
    differing = [key for key in record if key != "model" and unnamed(known.get(key)) != unnamed(record[key])]
    if differing:
        key = differing[0]
        raise ArtifactError(
            f"{place}: holds activations of {known.get('model')} with another {key} "
            f"({str(known.get(key))[:120]}, now {str(record[key])[:120]}); choose another folder, or harvest with the former settings"
        )


def _require_same(file: Path, window: Sequence[Prompt], record: Mapping[str, Any]) -> None:
    header = shard_header(file)
    require_settings(file, header, record)
    if header["texts"] != text_digest(window):
        raise ArtifactError(
            f"{file}: was harvested from other texts or in another order; give the same texts, or choose another folder"
        )

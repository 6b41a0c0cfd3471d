"""Files for hotwire-vllm, a steering plugin of vLLM: proved by the plugin's own loader, and by what it adds where."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from toys import TEXTS

from xmodel_steer import interop
from xmodel_steer.core.errors import ArtifactError, SiteError, SpaceMismatchError
from xmodel_steer.core.spaces import Site, Space, Stack
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.interventions.operators import Add

NO_PLUGIN = "hotwire-vllm is not installed: pip install hotwire-vllm (no vLLM is needed to read files), then run again"
DEPTH, WIDTH = 6, 5


def vector(layer: int = 3, seed: int = 0, **fields: Any) -> SteeringVector:
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    made = SteeringVector(direction, Space("small", Site(layer), WIDTH, "aaaa"), "joy", counts=(3, 5), origin="a test")
    return replace(made, **fields)


def plugin(store: Path, depth: int, width: int) -> Any:
    """The plugin's state as a vLLM worker has it, with the vectors of a file or a folder."""
    state = pytest.importorskip("hotwire._state", reason=NO_PLUGIN)
    made = state.SteerState(depth, width, max_tokens=64, device=torch.device("cpu"), dtype=torch.float32, n_slots=16)
    made.load_store(str(store))
    return made


def request(path: Path) -> list[dict[str, Any]]:
    """The entries of the request next to a file, parsed by the plugin."""
    state = pytest.importorskip("hotwire._state", reason=NO_PLUGIN)
    return state.parse_spec(json.loads(Path(f"{path}.json").read_text())["vllm_xargs"]["hotwire"])


def test_the_plugin_finds_each_vector_at_its_block_with_the_scale_of_the_request(tmp_path: Path) -> None:
    mine = [vector(4, 1), vector(0, 2)]
    path = interop.write_vllm_vector(mine, tmp_path / "joy.pt", strength=-1.5, layers=DEPTH)
    interop.write_vllm_vector(vector(2, 3), tmp_path / "calm.pt")
    state = plugin(tmp_path, DEPTH, WIDTH)  # the whole folder, where it passes over what is no .pt
    assert set(state.store) == {"joy", "calm"}
    assert {name: tuple(entry[0].shape) for name, entry in state.store.items()} == {"joy": (6, 5), "calm": (3, 5)}
    spec = request(path)
    assert [(entry["id"], entry["layer"]) for entry in spec] == [("joy", 0), ("joy", 4)]
    for entry, v in zip(spec, mine[::-1], strict=True):
        slot = state.slot_for(entry["id"], entry["layer"], entry["scale"])
        assert torch.equal(state.bank.bank[slot], v.direction)
        assert state.bank.scales[slot] == -1.5
        assert state.vector_norms["joy"][entry["layer"]] == pytest.approx(v.norm())
    assert state.vector_norms["joy"].count_nonzero() == 2


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_the_plugin_steers_as_this_library_does(bridge: toys.Toy, tmp_path: Path, positions: Any) -> None:
    """Its loader, its request and its numbering of blocks; its kernel's sum, written out here, for it needs a GPU."""
    mine = [bridge.vector(0, seed=1), bridge.vector(bridge.depth - 1, seed=2)]
    path = interop.write_vllm_vector(mine, tmp_path / "v.pt", strength=2.0, positions=positions, layers=bridge.depth)
    state, spec = plugin(path, bridge.depth, bridge.width), request(path)
    hooks = []
    for name, module in bridge.hf.named_modules():
        place = re.search(r"\.(\d+)$", name)  # as in _install_into_model; GPT-2's block is no *DecoderLayer there
        if place and re.search(r"(DecoderLayer|GPT2Block)$", type(module).__name__):

            def steer(_module: Any, _args: Any, out: Any, block: int = int(place[1])) -> Any:
                hidden = out[0] if isinstance(out, tuple) else out
                for entry in spec:
                    prefill = hidden.shape[1] > 1
                    if entry["layer"] == block and not (entry.get("decode_only") and prefill):
                        slot = state.slot_for(entry["id"], entry["layer"], entry["scale"])
                        hidden = hidden + state.bank.scales[slot] * state.bank.bank[slot]
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            hooks.append(module.register_forward_hook(steer))
    assert len(hooks) == bridge.depth
    ids = torch.tensor([bridge.ids(TEXTS[1])])

    def written() -> torch.Tensor:
        settings = dict(max_new_tokens=4, output_logits=True, return_dict_in_generate=True, do_sample=False)
        return torch.cat(
            bridge.hf.generate(ids, attention_mask=torch.ones_like(ids), **settings, **toys.NO_STOP).logits
        )

    theirs = written()
    for hook in hooks:
        hook.remove()
    with interop.steering_hf(bridge.hf, mine, operator=Add(2.0), positions=positions):
        torch.testing.assert_close(theirs, written(), rtol=1e-4, atol=2e-4)
    assert not torch.allclose(theirs, written(), atol=0.1)


def test_a_vector_comes_back_bit_exact_with_its_space_and_what_is_said_of_it_is_true(tmp_path: Path) -> None:
    mine = [vector(4, 1), vector(1, 2, direction=torch.arange(1, 6).to(torch.bfloat16) / 3)]
    path = interop.write_vllm_vector(mine, tmp_path / "deep" / "joy.pt")
    back = interop.read_vllm_vector(path)
    for old, new in zip(mine[::-1], back, strict=True):
        assert torch.equal(new.direction, old.direction.to(torch.float32))
        assert (new.space, new.space.model, new.label) == (old.space, "small", "joy")
        assert (new.counts, new.origin) == (old.counts, old.origin)
    facts = json.loads(Path(f"{path}.json").read_text())["vectors"]
    assert [fact["site"] for fact in facts] == ["resid_post[1]", "resid_post[4]"]
    assert [fact["norm"] for fact in facts] == [pytest.approx(v.norm()) for v in mine[::-1]]
    with path.open("rb") as file:  # a plain tensor: nothing else is in the pickle
        assert type(torch.load(file, weights_only=True)) is torch.Tensor


def test_the_vector_of_a_stack_has_a_row_for_each_member(tmp_path: Path) -> None:
    space = Space("small", Stack([1, 3]), 2 * WIDTH, "aaaa")
    stack = SteeringVector(torch.arange(1.0, 11.0), space, "joy")
    for write, read, name in (
        (interop.write_vllm_vector, interop.read_vllm_vector, "joy.pt"),
        (interop.write_control_vector, interop.read_control_vector, "joy.gguf"),
    ):
        first, second = read(write(stack, tmp_path / name))
        assert (first.direction.tolist(), second.direction.tolist()) == ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10])
        assert (first.space.site, second.space.site) == (Site(1), Site(3))


def test_files_of_others_take_the_space_of_the_model_they_are_read_for(bridge: toys.Toy, tmp_path: Path) -> None:
    rows = torch.zeros(bridge.depth, bridge.width)
    rows[1:] = torch.randn(bridge.depth - 1, bridge.width, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "calm.pt"
    for form in (rows, {"note": 1, "directions": rows, "more": rows + 1}):  # "the first tensor wins"
        torch.save(form, path)
        for model in (bridge.model, bridge.hf):
            vectors = interop.read_vllm_vector(path, model)
            assert [v.space.site for v in vectors] == [Site(k) for k in range(1, bridge.depth)]
            assert all(torch.equal(v.direction, rows[v.space.site.layer]) and v.label == "calm" for v in vectors)
    with pytest.raises(ArtifactError, match=r"calm.pt: .*which weights it is for; give the model: read_vllm_vector\("):
        interop.read_vllm_vector(path)
    torch.save(rows[:, 1:], path)
    with pytest.raises(SpaceMismatchError, match="reading calm.pt: .*is it another model's"):
        interop.read_vllm_vector(path, bridge.model)
    torch.save(torch.cat([rows, rows]), path)
    with pytest.raises(SiteError, match="has layers 0 to"):
        interop.read_vllm_vector(path, bridge.hf)


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_what_is_no_such_file_is_refused_and_never_run(
    llama: toys.Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "v.pt"
    with pytest.raises(ArtifactError, match="v.pt: no such file"):
        interop.read_vllm_vector(path, llama.model)
    for value, says in (
        (Evil(), "is damaged or foreign"),
        (
            torch.ones(llama.width),
            r"one row per block, got \(32,\); a vector \(d,\) names no block: .*from_steering_vec",
        ),
        ([torch.ones(3, 3)], "one row per block, got list"),
        (torch.ones(3, 3, dtype=torch.long), r"one row per block, got \(3, 3\)"),
        (torch.zeros(3, 3), "has no direction"),
        (torch.full((2, 32), torch.nan), "direction.0: .*has NaN or infinity"),
    ):
        torch.save(value, path)
        with pytest.raises(ArtifactError, match=f"v.pt: .*{says}"):
            interop.read_vllm_vector(path, llama.model)
    assert capsys.readouterr().out == ""
    path.write_bytes(b"not a file of PyTorch")
    with pytest.raises(ArtifactError, match="is damaged or foreign"):
        interop.read_vllm_vector(path, llama.model)


def test_a_file_next_to_which_another_ones_record_lies_is_refused(tmp_path: Path) -> None:
    path = interop.write_vllm_vector(vector(3, 1), tmp_path / "v.pt")
    whole = path.read_bytes()
    interop.write_vllm_vector(vector(3, 2), path)
    path.write_bytes(whole)
    with pytest.raises(ArtifactError, match="v.pt: .*direction.3"):
        interop.read_vllm_vector(path)
    interop.write_vllm_vector(vector(2, 2), path)
    path.write_bytes(whole)
    with pytest.raises(ArtifactError, match=r"record is about blocks \[2\], it holds \[3\]"):
        interop.read_vllm_vector(path)


def test_what_the_plugin_cannot_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    other = Space("large", Site(4), WIDTH, "bbbb")
    for given, options, kind, says in (
        ([vector(), vector(4, space=other)], {}, SpaceMismatchError, "needs vectors of one model"),
        (vector(space=Space("small", Site(3, "mlp_out"), WIDTH, "aaaa")), {}, SiteError, "acts after a block"),
        ([vector(), vector(seed=1)], {}, ValueError, "several of block 3; add them up"),
        (vector(), {"layers": 3}, SiteError, "a model of 3 blocks has no block 3, they count from 0"),
        (vector(), {"strength": float("nan")}, ValueError, "a finite strength, .*got 'v.pt', nan and 'all'"),
        (vector(), {"positions": "last"}, ValueError, "positions 'all' or 'generated', got 'v.pt', 1.0 and 'last'"),
        (vector(direction=torch.zeros(WIDTH)), {}, ValueError, "'joy' is a zero vector, .*leave it out"),
    ):
        with pytest.raises(kind, match=says):
            interop.write_vllm_vector(given, tmp_path / "v.pt", **options)
    with pytest.raises(ValueError, match="a path that ends in .pt"):
        interop.write_vllm_vector(vector(), tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())

"""The store of activations: what it gives back is what was collected, whatever happened while it was written."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from toys import CONTEXT, CORPUS, TEXTS, chunk_tokenizer

from xmodel_steer.activations import harvesting
from xmodel_steer.activations.collecting import collect_moments
from xmodel_steer.activations.harvesting import harvest
from xmodel_steer.activations.reading import capture
from xmodel_steer.activations.store import ActivationStore
from xmodel_steer.core.errors import (
    AlignmentError,
    AlignmentWarning,
    ArtifactError,
    NonFiniteError,
    PromptError,
    SpaceMismatchError,
)
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.files.records import read_record, write_record
from xmodel_steer.maps.anchors import RelativeAnchors
from xmodel_steer.maps.controls import ShuffledPairs
from xmodel_steer.maps.pairs import PARTS, part_of
from xmodel_steer.maps.ridge import Ridge
from xmodel_steer.maps.training import SGDAffine
from xmodel_steer.models.registry import register

SITES = {"source": [Site(0), Site(2)], "target": [Site(1)]}
DOCUMENTS = [text[start:] for text in CORPUS for start in (0, 7, 15, 24)] + TEXTS
CHAT = [{"role": "user", "content": "Call me Ishmael."}, {"role": "assistant", "content": "the clocks"}]
SETTINGS = dict(max_tokens=24)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(sys.modules["xmodel_steer.activations.collecting"], "WINDOW", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlignmentWarning)
        yield


@pytest.fixture
def models(llama, toy_named):
    return {"source": llama.model, "target": toy_named("qwen").model}


def filled(models, folder, texts=DOCUMENTS, **kwargs):
    for end, model in models.items():
        harvest(model, texts, folder, end=end, sites=SITES[end], **(SETTINGS | kwargs))
    return ActivationStore(folder)


def same(one, two):
    for part, (s, t) in product(PARTS, product(SITES["source"], SITES["target"])):
        a, b = (m.pair(s, t) for m in (one, two))
        for x, y in ((a, b), (a.control, b.control)):
            for name, value in vars(getattr(x, part)).items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(getattr(y, part), name))), name


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# --- laws ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, how",
    [
        (("llama", "gemma"), dict(seed=3, truncation_side="left")),
        (("gpt2", "qwen"), dict()),
        (("hooked", "llama"), dict()),
    ],
    ids=str,
)
def test_its_moments_are_those_that_would_have_been_collected(toy_named, tmp_path, names, how):
    models = dict(zip(SITES, (toy_named(name).model for name in names), strict=True))
    store = filled(models, tmp_path / "store", **how)
    keep = dict(pairs=list(product(*SITES.values())), sketch=5)
    direct = collect_moments(
        *models.values(),
        DOCUMENTS,
        source_sites=SITES["source"],
        target_sites=SITES["target"],
        **(SETTINGS | how | keep),
    )
    made = store.moments(**keep)
    same(made, direct)
    assert (made.paired, made.eligible, dict(made.settings)) == (direct.paired, direct.eligible, dict(direct.settings))
    assert made.sketch == direct.sketch
    rows = store.pair(Site(2), Site(1))
    assert [d.part for d in rows.documents] == [part_of(text, seed=how.get("seed", 0)) for text in DOCUMENTS]


def test_its_coverage_is_that_of_the_text_and_too_little_is_refused(llama, toy_named, tmp_path):
    toys = dict(zip(SITES, (llama, toy_named("qwen")), strict=True))
    models = {end: toy.model for end, toy in toys.items()}
    sites = dict(source_sites=SITES["source"], target_sites=SITES["target"])
    try:
        for sizes, texts in (((3, 2), DOCUMENTS), ((7, 6), [" ".join(CORPUS)])):
            for toy, size in zip(toys.values(), sizes, strict=True):
                register(toy.model, name=toy.name, tokenizer=chunk_tokenizer(tmp_path / str(size), size))
            store = filled(models, tmp_path / f"{sizes}", texts, max_tokens=CONTEXT)
            if sizes == (3, 2):
                direct = collect_moments(*models.values(), texts, **sites, **(SETTINGS | dict(max_tokens=CONTEXT)))
                made, rows = store.moments(), store.pair(Site(2), Site(1))
                assert 0.2 < direct.coverage < 0.6
                assert direct.coverage == made.coverage == rows.coverage == rows.moments().coverage
                assert (made.paired, made.eligible) == (direct.paired, direct.eligible)
            else:
                with pytest.raises(AlignmentError, match=r"only 1\d% of the tokens pair"):
                    store.moments()
                with pytest.raises(AlignmentError, match=r"only 1\d% of the tokens pair"):
                    store.pair(Site(2), Site(1))
    finally:
        for toy in toys.values():
            register(toy.model, name=toy.name, tokenizer=toy.tokenizer)


def test_rows_of_a_pair_are_those_that_capture_gives(models, tmp_path):
    rows = filled(models, tmp_path / "store").pair(Site(2), Site(1))
    for document, text in zip(rows.documents, DOCUMENTS, strict=True):
        kept = [
            capture(model, [Prompt(text=text)], [site], tokens="all", max_tokens=24)[site]
            for model, site in zip(models.values(), (Site(2), Site(1)), strict=True)
        ]
        last = sorted({end: i for i, (_, end) in enumerate(kept[0].rows)}.values())  # of one character's bytes
        assert document.count == len(last)  # these two split words at the same places
        for x, y in zip(document.load(), kept, strict=True):
            torch.testing.assert_close(x, y.values[last], rtol=1e-4, atol=1e-4)
    assert [d.number for d in rows.documents] == list(range(len(DOCUMENTS)))


def test_moments_of_the_rows_of_a_pair_are_the_stores(models, tmp_path):
    store = filled(models, tmp_path / "store")
    rows, whole = store.pair(Site(2), Site(1)), store.moments().pair(Site(2), Site(1))
    made = rows.moments()
    for part in PARTS:
        for x, y in ((made, whole), (made.control, whole.control)):
            torch.testing.assert_close(getattr(x, part).cross_scatter, getattr(y, part).cross_scatter)
    assert made.coverage == whole.coverage == rows.coverage
    control = ShuffledPairs(Ridge(penalties=(0.1,))).fit(rows)
    torch.testing.assert_close(control.weight, Ridge(penalties=(0.1,)).fit(whole.control).weight)
    assert control.info["shuffled_pairs"]
    turned = rows.inverse().moments()
    torch.testing.assert_close(turned.train.cross_scatter, made.train.cross_scatter.T)


def test_chats_keep_their_template_tokens(models, tmp_path):
    chats = [[CHAT[0], {"role": "assistant", "content": text}] for text in TEXTS if len(text) < 40]
    stored = filled(models, tmp_path / "a", chats, max_tokens=CONTEXT).moments()
    direct = collect_moments(
        *models.values(),
        chats,
        source_sites=SITES["source"],
        target_sites=SITES["target"],
        max_tokens=CONTEXT,
    )
    assert stored.paired == direct.paired
    without = filled(models, tmp_path / "b", chats, max_tokens=CONTEXT, template=False).moments()
    assert without.paired == stored.paired - 4 * len(chats)


def test_a_narrower_dtype_rounds_and_says_so(models, tmp_path):
    wide, narrow = filled(models, tmp_path / "a"), filled(models, tmp_path / "b", dtype="bfloat16")
    x, y = (store.pair(Site(2), Site(1)).documents[0].load()[0] for store in (wide, narrow))
    assert (x.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(x.bfloat16(), y)
    assert (narrow.record("source")["dtype"], narrow.record("source")["model_dtype"]) == ("bfloat16", "float32")


def test_every_shard_says_what_it_was_made_from(models, tmp_path):
    store = filled(models, tmp_path / "store")
    shard = store._shards[1].source
    assert shard.header["model"] == "llama" and shard.header["number"] == 1
    assert len(shard.header["documents"]) == 5 and shard.header["documents"][0] == Prompt(text=DOCUMENTS[5]).id
    assert {"revision", "tokenizer", "chat_template", "spaces", "dtype", "settings", "texts", "tensors"} <= set(
        shard.header
    )
    assert (
        store.verify()
        == sum(len(shard.rows("keys")) for pair in store._shards for shard in (pair.source, pair.target))
        > 100
    )


def test_work_on_a_store_grows_with_its_text_alone(models, tmp_path, monkeypatch):
    """Beyond 64 shards, a cache of 64 pairings and files once did a whole shard's work for each document."""
    module, work = sys.modules["xmodel_steer.activations.shards"], Counter()
    for name in ("align", "safe_open"):

        def counted(*args, name=name, real=getattr(module, name), **kwargs):
            work[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    texts = [text[i:][:12] for i in range(59) for text in CORPUS]
    rows = filled(models, tmp_path / "store", texts).pair(Site(2), Site(1))
    shards = -(-len(texts) // 5)
    assert shards > 70
    SGDAffine(epochs=3, hidden=4).fit(rows)
    assert work == {"align": len(texts), "safe_open": 2 * shards}
    monkeypatch.setattr(module, "OPEN_FILES", 6)  # more files than stay mapped: each read maps its own at most
    few = ActivationStore(tmp_path / "store").pair(Site(2), Site(1))
    work.clear()
    read = [few.documents[i].load() for i in torch.randperm(len(texts)).tolist()]
    assert work["align"] == 0 and work["safe_open"] <= 2 * len(read)
    for one, two in zip(rows.documents[::40], few.documents[::40], strict=True):
        assert all(map(torch.equal, one.load(), two.load()))


def test_a_stores_files_are_closed_with_it(models, tmp_path):
    store = filled(models, tmp_path / "store")
    assert len(store.pair(Site(2), Site(1)).documents[0].load()) == 2
    files = weakref.ref(store._shards[0].source.opened)
    assert files().cache_info().currsize
    del store
    gc.collect()
    assert files() is None


# --- interruption ----------------------------------------------------------------------------


def test_a_stopped_harvest_goes_on_and_ends_with_the_same_bits(models, tmp_path, monkeypatch):
    filled(models, tmp_path / "whole")
    module, written = sys.modules["xmodel_steer.activations.shards"], []
    real = module.write_tensors

    def stopping(file, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        real(file, *args)

    monkeypatch.setattr(module, "write_tensors", stopping)
    with pytest.raises(KeyboardInterrupt):
        filled(models, tmp_path / "cut")
    with pytest.raises(ArtifactError, match="was not finished; give the same harvest again"):
        ActivationStore(tmp_path / "cut").record("source")
    kept = {name: (tmp_path / "cut" / "source" / name).stat().st_mtime_ns for name in written}
    monkeypatch.setattr(module, "write_tensors", real)
    filled(models, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert kept == {name: (tmp_path / "cut" / "source" / name).stat().st_mtime_ns for name in written}


#: One process imports, and a child of it does each run: what is slow is done once.
KILLED = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch, toys, transformer_lens.model_bridge.sources, xmodel_steer as xs
torch.set_num_threads(1)
sys.modules["xmodel_steer.activations.collecting"].WINDOW = 5
texts = [t[k:] for t in toys.CORPUS for k in (0, 7, 15, 24)]

def harvest(folder, after):
    done, replace = [], os.replace
    model = toys.toy("llama", toys.byte_level_tokenizer(folder / "tokenizer")).model
    def killed(a, b):
        if len(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a write: the scratch file is there
        done.append(b)
        replace(a, b)
    os.replace = killed
    xs.harvest(model, texts, folder / "store", end="source", sites=[xs.Site(2)], max_tokens=24, progress=False)

for name, after in json.loads(sys.argv[1]):
    folder = Path({folder!r}) / name
    folder.mkdir(exist_ok=True)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = [f for f in (folder / "store").rglob("*.safetensors") if not f.name.startswith(".")]
        print(code, len(left), flush=True)
        continue
    try:
        harvest(folder, after)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
"""


def test_killed_in_the_middle_of_a_write(tmp_path):
    kills = (0, 1, 3)
    runs = [("whole", 99), *((f"{after}", n) for after in kills for n in (after, 99))]
    script = KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    command = [sys.executable, "-c", script, json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stdout.splitlines() if line]  # the training of tokenizers prints empty lines
    (whole, files), *found = [tuple(map(int, line.split())) for line in said]
    assert whole == 0 and files > 3 and len(found) == 2 * len(kills), done.stderr
    for after, killed, again in zip(kills, found[::2], found[1::2], strict=True):
        assert killed == (-signal.SIGKILL, max(0, after - 1))  # end.json is the first
        assert again == (0, files), done.stderr
        one, two = (contents(tmp_path / name / "store") for name in (f"{after}", "whole"))
        assert {n: v for n, v in one.items() if "/." not in n} == two


def test_jobs_fill_a_store_together(models, tmp_path):
    filled(models, tmp_path / "whole")
    for end, model in models.items():
        for k in (2, 0, 1):
            harvest(model, DOCUMENTS, tmp_path / "jobs", end=end, sites=SITES[end], shard=(k, 3), **SETTINGS)
            assert ("shards" in json.loads((tmp_path / "jobs" / end / "end.json").read_text())) == (k == 1)
    assert contents(tmp_path / "jobs") == contents(tmp_path / "whole")


def test_a_full_disk_loses_nothing(models, tmp_path, monkeypatch):
    real, calls = os.replace, []

    def full(a, b):
        calls.append(b)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match=r"000001.safetensors: no space left on the device, nothing was written"):
        filled(models, tmp_path / "store")
    assert sorted(f.name for f in (tmp_path / "store").rglob("*") if f.is_file()) == ["000000.safetensors", "end.json"]
    monkeypatch.setattr(os, "replace", real)
    filled(models, tmp_path / "store").verify()


def test_a_store_that_was_made_anew_is_read_anew(models, tmp_path):
    one = filled(models, tmp_path / "store")
    held = one.pair(Site(2), Site(1)).documents[0]
    shutil.rmtree(tmp_path / "store")
    two = filled(models, tmp_path / "store", DOCUMENTS[::-1])
    same(two.moments(), filled(models, tmp_path / "other", DOCUMENTS[::-1]).moments())
    with pytest.raises(ArtifactError, match=r"000000.safetensors: was written anew since the store was opened; open"):
        held.load()


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(max_tokens=16), "with another settings"),
        (dict(dtype="bfloat16"), "with another dtype"),
        (dict(seed=3), "with another settings"),
        (dict(texts=DOCUMENTS[::-1]), "harvested from other texts or in another order"),
        (dict(template=False), "with another settings"),
    ],
    ids=str,
)
def test_a_store_of_something_else_is_left_alone(models, tmp_path, change, says):
    filled(models, tmp_path / "store")
    before = contents(tmp_path / "store")
    with pytest.raises(ArtifactError, match=says):
        filled(models, tmp_path / "store", **change)
    assert contents(tmp_path / "store") == before


def test_a_store_of_another_model_sites_or_template_is_refused(models, llama, tmp_path):
    filled(models, tmp_path / "store")
    with pytest.raises(ArtifactError, match="holds activations of llama with another tokenizer|with another spaces"):
        harvest(models["target"], DOCUMENTS, tmp_path / "store", end="source", sites=[Site(0), Site(2)], **SETTINGS)
    with pytest.raises(ArtifactError, match="with another spaces"):
        harvest(models["source"], DOCUMENTS, tmp_path / "store", end="source", sites=[Site(0)], **SETTINGS)
    other = type(llama.tokenizer).from_pretrained(llama.tokenizer.name_or_path)
    other.chat_template = "{{ messages }}"
    try:
        register(llama.model, name="llama", tokenizer=other)
        with pytest.raises(ArtifactError, match="with another chat_template"):
            harvest(llama.model, DOCUMENTS, tmp_path / "store", end="source", sites=SITES["source"], **SETTINGS)
    finally:
        register(llama.model, name="llama", tokenizer=llama.tokenizer)


def test_ends_that_do_not_match_are_refused(models, tmp_path):
    for name, change, says in (
        ("settings", dict(max_tokens=16), "harvested with different settings"),
        ("texts", dict(texts=DOCUMENTS[::-1]), "harvested from different texts"),
        ("fewer", dict(texts=DOCUMENTS[:7]), "harvested from different texts"),
    ):
        harvest(models["source"], DOCUMENTS, tmp_path / name, end="source", sites=SITES["source"], **SETTINGS)
        arguments = dict(texts=DOCUMENTS, end="target", sites=SITES["target"]) | SETTINGS | change
        harvest(models["target"], folder=tmp_path / name, **arguments)
        with pytest.raises(ArtifactError, match=says):
            ActivationStore(tmp_path / name).pair(Site(2), Site(1))
    shutil.rmtree(tmp_path / "texts" / "target")
    with pytest.raises(ArtifactError, match="has no target; harvest the target model into it with end='target'"):
        ActivationStore(tmp_path / "texts").pair(Site(2), Site(1))


def test_missing_truncated_and_altered_shards_are_refused_by_name(models, tmp_path):
    filled(models, tmp_path / "store")
    file = tmp_path / "store" / "target" / "000002.safetensors"
    good = file.read_bytes()
    file.unlink()
    with pytest.raises(ArtifactError, match=r"000002.safetensors: is missing \(1 in all\); harvest again"):
        ActivationStore(tmp_path / "store").moments()
    file.write_bytes(good[:-40])
    with pytest.raises(ArtifactError, match=r"000002.safetensors: is not a whole shard .* delete it and harvest again"):
        ActivationStore(tmp_path / "store").moments()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    file.write_bytes(bytes(flipped))
    for reader in (
        lambda store: store.verify(),
        lambda store: store.moments(),
        lambda store: store.pair(Site(2), Site(1)).moments(),
    ):
        with pytest.raises(ArtifactError, match=r"000002.safetensors: .* does not match its checksum"):
            reader(ActivationStore(tmp_path / "store"))
    save_file(load_file(str(file)), str(file))  # no header of ours
    with pytest.raises(ArtifactError, match=r"000002.safetensors: is not a whole shard"):
        ActivationStore(tmp_path / "store").verify()
    file.unlink()
    filled(models, tmp_path / "store").verify()  # only what is missing is harvested


def test_a_model_that_is_called_otherwise_goes_on(models, tmp_path, monkeypatch):
    filled(models, tmp_path / "store")
    file = tmp_path / "store" / "source" / "000001.safetensors"
    before = file.read_bytes()
    file.unlink()
    end = tmp_path / "store" / "source" / "end.json"
    record = read_record(end)
    for space in record["spaces"]:
        space["model"] = "as it was called"
    write_record(end, record | {"model": "as it was called"})
    filled(models, tmp_path / "store").verify()
    assert file.read_bytes() == before


def test_a_shard_of_another_store_is_refused(models, tmp_path):
    filled(models, tmp_path / "store")
    harvest(models["source"], DOCUMENTS, tmp_path / "other", end="source", sites=[Site(0), Site(1)], **SETTINGS)
    shutil.copy(*(tmp_path / name / "source" / "000001.safetensors" for name in ("other", "store")))
    with pytest.raises(ArtifactError, match=r"000001.safetensors: is of another model or other sites than its store"):
        ActivationStore(tmp_path / "store").moments()


@pytest.mark.parametrize(
    ("changed", "key"),
    [(dict(max_tokens=12), "settings"), (dict(seed=3), "settings"), (dict(dtype="bfloat16"), "dtype")],
)
def test_a_shard_of_other_settings_is_refused(models, changed, key, tmp_path):
    """Also one that lies where a harvest would continue, and when two jobs begin together."""
    filled(models, tmp_path / "store")
    harvest(
        models["source"], DOCUMENTS, tmp_path / "other", end="source", sites=SITES["source"], **(SETTINGS | changed)
    )
    shutil.copy(*(tmp_path / name / "source" / "000001.safetensors" for name in ("other", "store")))
    with pytest.raises(ArtifactError, match=f"000001.safetensors: is of another {key} than its store"):
        ActivationStore(tmp_path / "store").moments()
    with pytest.raises(ArtifactError, match=f"000001.safetensors: is of another {key} than its store"):
        filled(models, tmp_path / "store")


def test_of_two_jobs_that_begin_together_one_is_refused(models, tmp_path, monkeypatch):
    began = threading.Barrier(2, timeout=30)
    real = harvesting.claim

    def claim(*args, **kwargs):
        place = real(*args, **kwargs)
        began.wait()  # both have found an empty place
        return place

    monkeypatch.setattr(harvesting, "claim", claim)

    def run(tokens):
        try:
            harvest(models["source"], DOCUMENTS, tmp_path / "s", end="source", sites=SITES["source"], max_tokens=tokens)
        except ArtifactError as error:
            return str(error)
        return tokens

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run, (12, 24)))
    (refused,) = [words for words in ended if isinstance(words, str)]
    (tokens,) = [words for words in ended if isinstance(words, int)]
    assert "another settings" in refused
    assert ActivationStore(tmp_path / "s").record("source")["settings"]["max_tokens"] == tokens


def test_nan_is_refused_before_it_is_written(llama, tmp_path):
    weight = [p for p in llama.model.blocks[2].parameters() if p.ndim > 1][-1]
    good = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=r"harvest llama resid_post\[2\]"):
            harvest(llama.model, DOCUMENTS, tmp_path / "s", end="source", sites=[Site(2)], **SETTINGS)
        assert [f.name for f in (tmp_path / "s" / "source").iterdir()] == ["end.json"]
    finally:
        with torch.no_grad():
            weight.copy_(good)


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(texts=[]), PromptError, "no texts were given"),
        (dict(texts="one"), PromptError, r"for a single one, \[prompt\]"),
        (dict(end="middle"), ValueError, "end must be 'source' or 'target'"),
        (dict(sites=[]), ValueError, "at least one site"),
        (dict(dtype="float16"), ValueError, "float16 overflows"),
        (dict(shard=(2, 2)), ValueError, "shard must be"),
        (dict(max_tokens=CONTEXT + 1), PromptError, "over the context of llama"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict) else "",
)
def test_bad_arguments_are_refused(llama, tmp_path, change, error, says):
    arguments = dict(texts=DOCUMENTS, end="source", sites=[Site(0)]) | SETTINGS | change
    with pytest.raises(error, match=says):
        harvest(llama.model, folder=tmp_path / "s", **arguments)


def test_a_text_that_is_none_is_found_before_the_model_runs(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("xmodel_steer.activations.shards.rows_at", None)
    with pytest.raises(PromptError, match="the text is empty"):
        harvest(llama.model, [*DOCUMENTS, ""], tmp_path / "s", end="source", sites=[Site(0)], **SETTINGS)
    assert not (tmp_path / "s").exists()


def test_a_folder_of_other_things_is_left_alone(llama, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and holds something else, no ActivationStore"):
        harvest(llama.model, DOCUMENTS, tmp_path, end="source", sites=[Site(0)], **SETTINGS)
    with pytest.raises(ArtifactError, match=r"is not a store of activations; make one with xs.harvest"):
        ActivationStore(tmp_path)


def test_sites_that_are_not_stored_are_named(models, tmp_path):
    store = filled(models, tmp_path / "store")
    with pytest.raises(
        SpaceMismatchError, match=r"the source holds resid_post\[0\], resid_post\[2\], not resid_post\[1\]"
    ):
        store.pair(Site(1), Site(1))
    with pytest.raises(PromptError, match="needs the rows of single texts, not moments"):
        RelativeAnchors().fit(store.moments().pair(Site(2), Site(1)))


def test_anchors_between_equal_spaces_are_the_identity(llama, tmp_path):
    texts = [f"{a[i:][:30]} {b[i:]}" for a in CORPUS for b in CORPUS for i in (0, 9, 17)]
    for end in SITES:
        harvest(llama.model, texts, tmp_path / "s", end=end, sites=[Site(1)], max_tokens=40)
    rows = ActivationStore(tmp_path / "s").pair(Site(1), Site(1))
    made = RelativeAnchors(60, tolerance=1e-9).fit(rows)
    assert made.info["anchors"] == sum(d.part == "train" for d in rows.documents) or made.info["anchors"] == 60
    assert made.score_test.mean_r2 > 0.999
    assert (made.weight - torch.eye(llama.width, dtype=torch.float64)).norm() < 1e-3
    few = RelativeAnchors(5, tolerance=1e-9).fit(rows)
    assert torch.linalg.matrix_rank(few.weight, tol=1e-6) == 5
    assert RelativeAnchors(60, tolerance=0.5).fit(rows).weight.norm() < made.weight.norm()


def test_anchor_texts_are_the_documents_that_are_named(llama, tmp_path):
    texts = [f"{a} {b}" for a in CORPUS for b in CORPUS]
    for end in SITES:
        harvest(llama.model, texts, tmp_path / "s", end=end, sites=[Site(1)], max_tokens=40)
    rows = ActivationStore(tmp_path / "s").pair(Site(1), Site(1))
    train = [d.prompt for d in rows.part("train")]
    of = {Prompt(text=text).id: text for text in texts}
    every, some = (tuple(of[i] for i in ids) for ids in (train, train[3:8]))
    whole = RelativeAnchors(len(train), tolerance=1e-9).fit(rows)
    named = RelativeAnchors(every[::-1], tolerance=1e-9).fit(rows)  # the order of anchors does not matter
    torch.testing.assert_close(named.weight, whole.weight, rtol=1e-4, atol=1e-6)
    made = RelativeAnchors(some, tolerance=1e-9).fit(rows)
    assert made.info["anchors"] == 5
    kept = replace(rows, documents=tuple(d for d in rows.documents if d.part != "train" or of[d.prompt] in some))
    means = torch.stack([torch.as_tensor(d.load()[0]).double().mean(0) for d in kept.part("train")])
    scale, mean = made.source_scale.double(), rows.moments().train.source_mean
    anchors = torch.nn.functional.normalize((means - mean) / scale, dim=-1)
    basis = torch.from_numpy(scipy.linalg.orth(anchors.T.numpy(), rcond=1e-9))  # cut texts may be equal
    standard = made.weight * scale[:, None] / scale
    torch.testing.assert_close(standard, basis @ basis.T, rtol=1e-4, atol=1e-5)  # a projection onto them
    held_out = next(of[d.prompt] for d in rows.part("test"))
    with pytest.raises(
        PromptError, match=r"1 of 2 anchor texts are not among the \d+ training documents .* harvest them"
    ):
        RelativeAnchors((every[0], held_out)).fit(rows)
    with pytest.raises(PromptError, match="0 of 0 anchor texts"):
        RelativeAnchors(()).fit(rows)

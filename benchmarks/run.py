"""Ratios of running times and memory, each from one run on one machine: ``python benchmarks/run.py``.

    python benchmarks/run.py --only harvest_over_forwards     # one figure
    python benchmarks/run.py --shape 1b-3b --device cuda      # random weights in the shape of a 1B → 3B pair

Every ratio is the median over repeats that alternate both sides, with the smallest and the largest, and goes
into results.json. Absolute times of a shared machine mean nothing, and no test asserts one.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import xmodel_steer as xs
from xmodel_steer.evaluation import Patching
from xmodel_steer.files.wheels import general_text
from xmodel_steer.maps.rows import DocumentRows, PairedRows
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import device_of
from xmodel_steer.models.passes import forward
from xmodel_steer.models.sites import all_sites
from xmodel_steer.notebook.patching import maps_by_depth
from xmodel_steer.studies.demo import SOURCE, TARGET

RESULTS = Path(__file__).parent / "results.json"
MAX_TOKENS, BATCH = 192, 32
HERE, THERE = xs.Site(18), xs.Site(10)
STACK = [9, 12, 15, 18, 21, 24, 27]


def hardware(device: str) -> str:
    """The machine in a few words."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{torch.get_num_threads()} threads, {model}, torch {torch.__version__}"


def keep(name: str, ratios: Sequence[float], must: str, command: str, on: str, **more: Any) -> None:
    """Write a figure into results.json: median, smallest and largest."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[name] = shown = {
        "ratio": round(float(np.median(ratios)), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "must": must,
        "repeats": len(ratios),
        **more,
        "command": command,
        "hardware": on,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{name}: {shown['ratio']} ({shown['low']} to {shown['high']}), must be {must}; {more}", flush=True)


class Bench:
    """Two models, a text, and what was measured with them."""

    def __init__(self, device: str, shape: str, documents: int, repeats: int) -> None:
        self.device, self.shape, self.repeats, self.figure = device, shape, repeats, ""
        self.sketch = 0
        self.small, self.large = _random_pair(device) if shape == "1b-3b" else (
            xs.load(name, device=device, dtype="auto", progress=False) for name in (SOURCE, TARGET)
        )  # fmt: skip
        self.texts = general_text()[:documents]

    def record(self, name: str, ratios: Sequence[float], must: str, **more: Any) -> None:
        """Keep a figure of these models."""
        key = name if self.shape == "packaged" else f"{name}_{self.shape}"
        keep(key, ratios, must, f"python benchmarks/run.py --only {self.figure}", hardware(self.device), **more)

    def forwards(self) -> int:
        """Two plain forward passes over the text, no logits, nothing kept."""
        tokens = 0
        for model in (self.small, self.large):
            for i in range(0, len(self.texts), 64):
                for batch in batches(model, encode(model, self.texts[i : i + 64], max_tokens=MAX_TOKENS), BATCH):
                    forward(model, batch.ids, batch.mask, logits="none")
                    tokens += int(batch.mask.sum())
        return tokens

    def grid(self, **kwargs: Any) -> None:
        """Moments and penalty path of every layer pair."""
        moments = xs.collect_moments(
            self.small, self.large, self.texts, source_sites="all", target_sites="all",
            max_tokens=MAX_TOKENS, batch_size=BATCH, device=device_of(self.large), progress=False, **kwargs,
        )  # fmt: skip
        xs.maps.layer_grid(moments)
        self.sketch = len(moments.sketch)

    def pair(self, folder: str, documents: int | None = None) -> PairedRows:
        """Stored rows of one layer pair."""
        texts = general_text()[:documents] if documents else self.texts
        for model, end, site in ((self.small, "source", HERE), (self.large, "target", THERE)):
            xs.harvest(
                model, texts, folder, end=end, sites=[site], max_tokens=MAX_TOKENS, batch_size=BATCH, progress=False
            )
        return xs.ActivationStore(folder).pair(HERE, THERE)


def _random_pair(device: str) -> tuple[Any, Any]:
    """Models in the shape of Llama-3.2 1B and 3B, weights random: for times alone."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = xs.load(SOURCE, progress=False)
    from xmodel_steer.models.facts import tokenizer_of

    made = []
    for name, width, layers, heads, inner in (("1b", 2048, 16, 32, 8192), ("3b", 3072, 28, 24, 8192)):
        config = LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, vocab_size=49152, max_position_embeddings=2048,
        )  # fmt: skip
        with torch.device(device):
            hf = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        model = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config, model_name=name)
        xs.register(model, name=name, tokenizer=tokenizer_of(tokenizer))
        made.append(model)
    return made[0], made[1]


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def worked(call: Callable[[], Any]) -> float:
    """Seconds of processor time that a call takes, all threads together."""
    start = time.process_time()
    call()
    return time.process_time() - start


def grid_over_two_forwards(bench: Bench) -> None:
    """Moments and penalty path of all layer pairs over two plain forward passes of the same text."""
    bench.forwards()  # warm
    pairs = [(timed(bench.grid), timed(bench.forwards)) for _ in range(bench.repeats)]
    bench.record(
        "grid_over_two_forwards", [a / b for a, b in pairs], "<= 2.0", documents=len(bench.texts), sketch=bench.sketch
    )


def stacked_moments_over_two_forwards(bench: Bench) -> None:
    """Moments of seven source layers read together and one target layer over two plain forward passes of the same text."""

    def collect() -> None:
        xs.collect_moments(
            bench.small, bench.large, bench.texts, source_sites=[STACK], target_sites=[THERE], max_tokens=MAX_TOKENS,
            batch_size=BATCH, device=device_of(bench.large), progress=False,
        )  # fmt: skip

    bench.forwards()  # warm
    pairs = [(worked(collect), worked(bench.forwards)) for _ in range(bench.repeats)]
    added = {} if bench.shape != "packaged" else {"megabytes_added": round(peak_of(128, [STACK], [THERE.layer]) / 1024)}
    bench.record(
        "stacked_moments_over_two_forwards",
        [a / b for a, b in pairs],
        "<= 2.5",
        documents=len(bench.texts),
        layers=len(STACK),
        **added,
    )


def patching_grid_over_forwards(bench: Bench) -> None:
    """A grid of own and mapped patches over plain forward passes of as many prompts, in batches of 64.

    A pass of the grid patches one layer, at 11 positions and in 2 kinds.
    """
    sides = [f"Everyone who lives in the old city of {city} speaks" for city in ("Rome", "Paris")]
    maps, answers = maps_by_depth(bench.small, bench.large), [(" Italian", " French")]
    asked = Patching(bench.large, sides[:1], sides[1:], answers, source=bench.small, maps=maps)
    grid = asked.empty()
    cells = len(grid.values) * len(grid.targets) * len(grid.tokens)

    def fill() -> None:
        for _ in asked.filling(grid):
            pass

    def plain() -> None:
        for batch in batches(bench.large, encode(bench.large, [xs.Prompt.of(sides[1])]) * cells, 64):
            forward(bench.large, batch.ids, batch.mask, logits="last")

    plain()  # warm
    pairs = [(worked(fill), worked(plain), timed(fill)) for _ in range(bench.repeats)]
    ratios, seconds = [a / b for a, b, _ in pairs], float(np.median([s for *_, s in pairs]))
    bench.record("patching_grid_over_forwards", ratios, "<= 1.5", cells=cells, seconds=round(seconds, 1))


def exact_grid_over_two_forwards(bench: Bench) -> None:
    """The same without a sketch: full cross moments of all layer pairs."""
    every = [(s, t) for s in all_sites(bench.small) for t in all_sites(bench.large)]
    bench.forwards()
    ratio = timed(lambda: bench.grid(pairs=every, shuffled=False)) / timed(bench.forwards)
    bench.record("exact_grid_over_two_forwards", [ratio], "stated", documents=len(bench.texts))


def grid_speedup_over_ridgecv(bench: Bench, sample: int = 3) -> None:
    """All layer pairs from moments against scikit-learn's RidgeCV on stored activations, pair by pair."""
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    from xmodel_steer.maps.fitting import PENALTIES

    pairs = len(all_sites(bench.small)) * len(all_sites(bench.large))
    with tempfile.TemporaryDirectory() as folder:
        x, y = arrays(bench.pair(folder), "train")
    ratios, with_forwards = [], []
    for _ in range(sample):
        theirs = timed(
            lambda: RidgeCV(alphas=[p * len(x) for p in PENALTIES]).fit(StandardScaler().fit_transform(x), y)
        )
        whole, forwards = timed(bench.grid), timed(bench.forwards)
        ratios.append(theirs * pairs / (whole - forwards))
        with_forwards.append(theirs * pairs / whole)
    bench.record(
        "grid_speedup_over_ridgecv",
        ratios,
        ">= 30",
        extrapolation=f"one pair timed {sample} times, times {pairs} pairs; {len(x)} rows, all {y.shape[1]} target dimensions; "
        "ours: what collecting and the grid (sketch of 64 target dimensions) take beyond the forward passes, which RidgeCV is not charged with either",
        ratio_with_our_forwards=round(float(np.median(with_forwards)), 1),
    )


MEMORY = """
import json
import sys
from pathlib import Path
import xmodel_steer as xs
from xmodel_steer.studies.demo import SOURCE, TARGET
from xmodel_steer.files.wheels import general_text

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))

small, large = (xs.load(name, device="cpu", dtype="auto", progress=False) for name in (SOURCE, TARGET))
texts = general_text()
sites = json.loads(sys.argv[2])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading
text = (texts[i % 64] for i in range(int(sys.argv[1])))  # the same window again and again
xs.collect_moments(small, large, text, **sites, max_tokens=192, batch_size=32, progress=False)
print(before, memory("VmHWM"))
"""


def peak_of(documents: int, source_sites: Sequence[Any] = (3, 5), target_sites: Sequence[Any] = (2, 3)) -> int:
    """Kilobytes that collecting moments adds at its peak to the memory of loaded models."""
    sites = {"source_sites": source_sites, "target_sites": target_sites}
    # glibc must give freed blocks back at once: the peak is then of what was in use, not of what it hoarded.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(documents), json.dumps(sites)], capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    before, peak = map(int, done.stdout.split()[-2:])
    return peak - before


def moments_memory_at_4x_text(bench: Bench) -> None:
    """What collecting moments adds to the memory of loaded models at its peak, at four times the text (Linux)."""
    added = [(peak_of(128), peak_of(512)) for _ in range(bench.repeats)]
    bench.record(
        "moments_memory_at_4x_text", [b / a for a, b in added], "<= 1.05", kilobytes_added=added, documents=[128, 512]
    )


def repeated(folder: Path, shards: int) -> PairedRows:
    """The store in a folder with its shards over and over, so many in all: for times alone."""
    for end in ("source", "target"):
        record = json.loads((folder / end / "end.json").read_text())
        for number in range(record["shards"], shards):
            shutil.copy(
                folder / end / f"{number % record['shards']:06d}.safetensors",
                folder / end / f"{number:06d}.safetensors",
            )
        (folder / end / "end.json").write_text(json.dumps({**record, "shards": shards}))
    return xs.ActivationStore(folder).pair(HERE, THERE)


def autoencoder_epoch_speedup(bench: Bench, shards: int = 96) -> None:
    """An epoch from a store of many shards against the paper's way, which computes the activations in every epoch.

    By processor time: an epoch is a difference of two times, which other work on the machine would drown.
    """
    from xmodel_steer.models.recorder import residuals

    def recompute() -> None:
        for model, site in ((bench.small, HERE), (bench.large, THERE)):
            for i in range(0, len(bench.texts), 16):
                for batch in batches(model, encode(model, bench.texts[i : i + 16], max_tokens=MAX_TOKENS), 16):
                    residuals(model, batch, [site])

    with tempfile.TemporaryDirectory() as folder:
        bench.pair(folder)
        every = repeated(Path(folder), shards)
        rows = replace(every, documents=every.documents[::15])  # of every shard, so that an epoch takes seconds

        def epochs(count: int) -> float:
            return worked(lambda: xs.Autoencoder(epochs=count, patience=count).fit(rows))

        epochs(1)
        ratios = []
        for _ in range(bench.repeats):
            epoch = (epochs(4) - epochs(1)) / 3
            ratios.append((worked(recompute) * len(rows.documents) / len(bench.texts) + epoch) / epoch)
    bench.record(
        "autoencoder_epoch_speedup", ratios, ">= 8", documents=len(rows.documents), shards=shards,
        extrapolation=f"the passes over {len(bench.texts)} documents were timed, times {len(rows.documents) / len(bench.texts):.2f}; "
        f"the store holds {len(every.documents)} documents in {shards} shards, copies of the first ones; an epoch reads every 15th document",
    )  # fmt: skip


def epoch_at_4x_shards(bench: Bench) -> None:
    """Processor time of reading all rows in shuffled order, at four times the text."""
    with tempfile.TemporaryDirectory() as folder:
        bench.pair(folder)
        stores = [repeated(Path(folder), shards).documents for shards in (48, 192)]  # the first one's files stay

        def read(seed: int, documents: tuple[DocumentRows, ...]) -> float:
            order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
            start = time.process_time()
            for i in order:
                documents[i].load()
            return time.process_time() - start

        for documents in stores:
            read(0, documents)  # the checksums
        seconds = [[read(repeat + 1, documents) for documents in stores] for repeat in range(bench.repeats)]
    bench.record(
        "epoch_at_4x_shards",
        [b / a for a, b in seconds],
        "<= 4.8",
        documents=[len(d) for d in stores],
        shards=[48, 192],
    )


def harvest_over_forwards(bench: Bench) -> None:
    """Writing every layer of both models to a store against the plain forward passes."""

    def harvest() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for model, end in ((bench.small, "source"), (bench.large, "target")):
                xs.harvest(
                    model, bench.texts, folder, end=end, sites="all", max_tokens=MAX_TOKENS,
                    batch_size=BATCH, progress=False,
                )  # fmt: skip

    bench.forwards()
    pairs = [(timed(harvest), timed(bench.forwards)) for _ in range(bench.repeats)]
    bench.record("harvest_over_forwards", [a / b for a, b in pairs], "<= 1.2", documents=len(bench.texts))


def arrays(rows: PairedRows, part: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a part."""
    sides = zip(*(d.load() for d in rows.part(part)), strict=True)
    x, y = (torch.cat(side).to(torch.float64).numpy() for side in sides)
    return x, y


def ridge_over_best_other_r2(bench: Bench) -> None:
    """Held-out R² per dimension at 500, 4,000 and 50,000 training tokens: every fitter, scikit-learn, latentis."""
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score

    training = {"learning_rate": 1e-3, "batch_documents": 4, "accumulation": 1, "epochs": 15, "patience": 4}
    fitters = {
        "Ridge": xs.Ridge(), "ReducedRank(64)": xs.maps.ReducedRank(64), "Procrustes": xs.Procrustes(),
        "RelativeAnchors": xs.maps.RelativeAnchors(), "Identity": xs.maps.Identity(), "RandomMap": xs.maps.RandomMap(),
        "Autoencoder": xs.Autoencoder(**training), "SGDAffine": xs.maps.SGDAffine(**training),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = bench.pair(folder, documents=500)
        total = sum(d.count for d in rows.part("train"))
        vx, vy = arrays(rows, "test")
        for n in (500, 4000, min(50_000, total)):
            table: dict[str, list[float]] = {}
            for seed in range(1 if n > 10_000 else 3):
                order = np.random.default_rng(seed).permutation(len(rows.documents))
                subset = replace(rows, documents=tuple(rows.documents[i] for i in order)).first(n)
                subset = replace(subset, documents=tuple(sorted(subset.documents, key=lambda d: d.number)))
                for name, fitter in fitters.items():
                    score = fitter.fit(subset).score_test
                    assert score is not None
                    table.setdefault(name, []).append(score.mean_r2)
                x, y = arrays(subset, "train")
                for name, scale in (
                    ("scikit-learn RidgeCV", np.ones(x.shape[1])),
                    ("scikit-learn RidgeCV, standardised", x.std(0)),
                ):
                    alphas = np.logspace(-5, 1, 13) * len(x) * (1 if name.endswith("standardised") else float(x.var()))
                    theirs = RidgeCV(alphas=alphas).fit(x / scale, y)
                    table.setdefault(name, []).append(float(r2_score(vy, theirs.predict(vx / scale))))
                _latentis(table, x, y, vx, vy)
            ridge, *others = table.values()
            best = max(others, key=np.mean)
            bench.record(
                f"ridge_over_best_other_r2_at_{500 if n == 500 else 4000 if n == 4000 else 50000}",
                [a / b for a, b in zip(ridge, best, strict=True)],
                ">= 1, or said where not",
                tokens=n,
                r2={name: round(float(np.mean(values)), 4) for name, values in table.items()},
            )


def _latentis(table: dict[str, list[float]], x: np.ndarray, y: np.ndarray, vx: np.ndarray, vy: np.ndarray) -> None:
    """Latentis' Procrustes and least squares, where it is installed."""
    try:
        from latentis.transform.translate import Procrustes  # type: ignore[import-not-found]
        from latentis.transform.translate.functional import lstsq_align_state  # type: ignore[import-not-found]
    except ImportError:
        return
    from sklearn.metrics import r2_score

    own, theirs, held_out = map(torch.from_numpy, (x, y, vx))
    procrustes = Procrustes()
    procrustes.fit(own, theirs)
    matrix = lstsq_align_state(own - own.mean(0), theirs - theirs.mean(0))["matrix"]
    for name, made in (
        ("latentis Procrustes", procrustes.transform(held_out, None)[0]),
        ("latentis least squares", (held_out - own.mean(0)) @ matrix + theirs.mean(0)),
    ):
        table.setdefault(name, []).append(float(r2_score(vy, made.numpy())))


def store_formats(bench: Bench) -> None:
    """Zarr 3 and Arrow against safetensors: writing a shard, and reading one document of one layer of it."""
    import pyarrow as pa
    from safetensors import safe_open
    from safetensors.torch import save_file

    rows, width, sites, document = 12_000, 640, 12, 150
    draw = torch.randn(rows, sites * width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values = {f"rows/{k}": draw[:, k * width : (k + 1) * width].contiguous() for k in range(sites)}
    bits = {name: tensor.view(torch.int16).numpy() for name, tensor in values.items()}  # neither knows bfloat16
    starts = np.random.default_rng(0).integers(0, rows - document, 200)

    def safetensors(folder: Path) -> tuple[float, float]:
        file = folder / "shard.safetensors"
        written = timed(lambda: save_file(values, file))
        opened = safe_open(str(file), framework="pt")
        return written, timed(lambda: [opened.get_slice("rows/5")[i : i + document].clone() for i in map(int, starts)])

    def arrow(folder: Path) -> tuple[float, float]:
        file = str(folder / "shard.arrow")

        def write() -> None:
            columns = {n: pa.FixedSizeListArray.from_arrays(pa.array(b.reshape(-1)), width) for n, b in bits.items()}
            table = pa.table(columns)
            with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

        written = timed(write)
        column = pa.ipc.open_file(pa.memory_map(file)).read_all().column("rows/5")

        def read(i: int) -> np.ndarray:
            return column.slice(i, document).combine_chunks().flatten().to_numpy().reshape(document, width).copy()

        return written, timed(lambda: [read(i) for i in map(int, starts)])

    def zarr_3(folder: Path) -> tuple[float, float]:
        import zarr

        group = zarr.open_group(folder / "shard.zarr", mode="w")

        def write() -> None:
            for name, own in bits.items():
                array = group.create_array(name, shape=own.shape, chunks=(1024, width), dtype="int16")
                array[:] = own

        written = timed(write)
        array = zarr.open_group(folder / "shard.zarr", mode="r")["rows/5"]
        return written, timed(lambda: [array[i : i + document] for i in map(int, starts)])

    formats = {"arrow": arrow, "zarr": zarr_3}
    ratios: dict[str, list[float]] = {}
    for _ in range(bench.repeats):
        with tempfile.TemporaryDirectory() as folder:
            ours = safetensors(Path(folder))
            for name, measure in formats.items():
                try:
                    theirs = measure(Path(folder))
                except ImportError:
                    print(f"{name} is not installed", flush=True)
                    continue
                for what, a, b in zip(("write", "read"), theirs, ours, strict=True):
                    ratios.setdefault(f"{name}_{what}_over_safetensors", []).append(a / b)
    for name, values_ in ratios.items():
        bench.record(name, values_, "stated")


FIGURES = {
    f.__name__: f
    for f in (
        store_formats,
        harvest_over_forwards,
        autoencoder_epoch_speedup,
        epoch_at_4x_shards,
        moments_memory_at_4x_text,
        grid_over_two_forwards,
        grid_speedup_over_ridgecv,
        exact_grid_over_two_forwards,
        stacked_moments_over_two_forwards,
        patching_grid_over_forwards,
        ridge_over_best_other_r2,
    )
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FIGURES, help="one figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=("packaged", "1b-3b"), default="packaged")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    bench = Bench(given.device, given.shape, given.documents, given.repeats)
    for name, figure in FIGURES.items():
        if given.only in (None, name):
            bench.figure = name
            figure(bench)


if __name__ == "__main__":
    main()

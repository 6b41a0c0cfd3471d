"""Ratios of running times and memory: ``python benchmarks/run.py``.

    python benchmarks/run.py --only harvest_over_forwards     # one figure
    python benchmarks/run.py --shape 1b-3b --device cuda      # random weights in the shape of a 1B → 3B pair

Both sides of a ratio take turns, on one thread. It is kept by processor time and by wall time, each as the median over the
turns with the lowest and the highest, in results.json; ``python benchmarks/page.py`` writes them into docs/performance.md.
Nothing is kept that was measured while other programs used the machine.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import compare, finish, in_turn, keep, peak_of, random_model, take

import xmodel_steer as xs
from xmodel_steer.evaluation import Patching
from xmodel_steer.files.records import read_record, write_record
from xmodel_steer.files.wheels import general_text
from xmodel_steer.maps.rows import DocumentRows, PairedRows
from xmodel_steer.models.batching import batches, encode
from xmodel_steer.models.facts import device_of, tokenizer_of
from xmodel_steer.models.passes import forward
from xmodel_steer.models.sites import all_sites
from xmodel_steer.notebook.patching import maps_by_depth
from xmodel_steer.studies.demo import SOURCE, TARGET

MAX_TOKENS, BATCH = 192, 32
HERE, THERE = xs.Site(18), xs.Site(10)
STACK = [9, 12, 15, 18, 21, 24, 27]


class Bench:
    """Two models, a text, and what was measured with them."""

    def __init__(self, device: str, shape: str, documents: int, repeats: int, dtype: str) -> None:
        self.device, self.shape, self.repeats, self.dtype = device, shape, repeats, dtype
        self.sketch = 0
        self.small, self.large = _random_pair(device) if shape == "1b-3b" else (
            xs.load(name, device=device, dtype=dtype, progress=False) for name in (SOURCE, TARGET)
        )  # fmt: skip
        self.texts = general_text()[:documents]

    def compare(
        self, figure: Callable[..., None], ours: Callable[[], Any], theirs: Callable[[], Any], must: str, **more: Any
    ) -> None:
        """Keep a ratio of two calls of these models; the figure's docstring says what it is."""
        name, what = self.named(figure)
        compare(name, what, ours, theirs, must, repeats=self.repeats, device=self.device, **more)

    def named(self, figure: Callable[..., None], variant: str = "") -> tuple[str, str]:
        """The name of a figure of these models, and what it says."""
        parts = [
            figure.__name__,
            variant,
            *(own for own in (self.shape, self.dtype) if own not in ("packaged", "auto")),
        ]
        said = " ".join((figure.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
        return "/".join(filter(None, parts)), f"{said}, in {str(self.large.cfg.dtype).removeprefix('torch.')}"

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
    more: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return random_model("1b", 2048, 16, 32, 8, 8192, **more), random_model("3b", 3072, 28, 24, 8, 8192, **more)


def grid_over_two_forwards(bench: Bench) -> None:
    """Moments and penalty path of all layer pairs, over two plain forward passes of the same text."""
    bench.grid()
    bench.compare(
        grid_over_two_forwards, bench.grid, bench.forwards, "<= 1.5", documents=len(bench.texts), sketch=bench.sketch
    )


def exact_grid_over_two_forwards(bench: Bench) -> None:
    """Full cross moments and penalty path of all layer pairs, without a sketch, over two plain forward passes."""
    every = [(s, t) for s in all_sites(bench.small) for t in all_sites(bench.large)]
    bench.compare(
        exact_grid_over_two_forwards, lambda: bench.grid(pairs=every, shuffled=False), bench.forwards, "<= 2.5",
        documents=len(bench.texts),
    )  # fmt: skip


def stacked_moments_over_two_forwards(bench: Bench) -> None:
    """Moments of seven source layers read together and one target layer, over two plain forward passes of the same text."""

    def collect() -> None:
        xs.collect_moments(
            bench.small, bench.large, bench.texts, source_sites=[STACK], target_sites=[THERE], max_tokens=MAX_TOKENS,
            batch_size=BATCH, device=device_of(bench.large), progress=False,
        )  # fmt: skip

    added = (
        {}
        if bench.shape != "packaged"
        else {"megabytes_added": round(moments_peak(128, [STACK], [THERE.layer]) / 1024)}
    )
    bench.compare(
        stacked_moments_over_two_forwards, collect, bench.forwards, "<= 2.5", documents=len(bench.texts),
        layers=len(STACK), **added,
    )  # fmt: skip


def capture_over_bare_hook(bench: Bench) -> None:
    """Capture of the last tokens at one deep layer, over a bare hook on the Hugging Face model that stops the pass there."""
    from transformers import AutoModelForCausalLM

    layer, folder = 14, tokenizer_of(bench.large).name_or_path
    inner = AutoModelForCausalLM.from_pretrained(folder, dtype=bench.large.cfg.dtype).to(bench.device).eval()

    class Stop(Exception):
        pass

    def bare() -> None:
        kept: list[torch.Tensor] = []

        def read(_module: Any, _inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)
            raise Stop

        handle = inner.model.layers[layer].register_forward_hook(read)
        ends = []
        with torch.no_grad():
            for batch in batches(bench.large, encode(bench.large, bench.texts, max_tokens=MAX_TOKENS), BATCH):
                with suppress(Stop):
                    inner(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
                last = batch.mask.sum(-1) - 1
                ends.append(kept.pop()[torch.arange(len(last)), last].float())
        handle.remove()
        torch.cat(ends)

    def capture() -> None:
        xs.capture(
            bench.large,
            bench.texts,
            [xs.Site(layer)],
            tokens="last",
            max_tokens=MAX_TOKENS,
            batch_size=BATCH,
            progress=False,
        )

    bench.compare(capture_over_bare_hook, capture, bare, "<= 1.05", documents=len(bench.texts), layer=layer)


def load_over_from_pretrained(bench: Bench) -> None:
    """Loading a packaged model from the cache, over `from_pretrained` of the same folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tokenizer_of(bench.large).name_or_path

    def plain() -> None:
        AutoTokenizer.from_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder, dtype=bench.large.cfg.dtype)

    bench.compare(
        load_over_from_pretrained,
        lambda: xs.load(TARGET, dtype=bench.dtype, progress=False),
        plain,
        "<= 1.3",
        model=TARGET,
    )


def patching_grid_over_forwards(bench: Bench) -> None:
    """A grid of own and mapped patches, over plain forward passes of as many prompts in batches of 64.

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

    bench.compare(patching_grid_over_forwards, fill, plain, "<= 1.5", cells=cells)


def grid_speedup_over_ridgecv(bench: Bench) -> None:
    """scikit-learn's RidgeCV on stored activations of all layer pairs, over our moments and grid, both without the forward passes.

    One pair is timed, times all pairs.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    from xmodel_steer.maps.fitting import PENALTIES

    pairs = len(all_sites(bench.small)) * len(all_sites(bench.large))
    with tempfile.TemporaryDirectory() as folder:
        x, y = arrays(bench.pair(folder), "train")
    sides = {
        "RidgeCV": lambda: RidgeCV(alphas=[p * len(x) for p in PENALTIES]).fit(StandardScaler().fit_transform(x), y),
        "grid": bench.grid,
        "forwards": bench.forwards,
    }
    taken = in_turn({name: lambda call=call: take(call) for name, call in sides.items()}, bench.repeats)
    turns = list(zip(*(taken[name] for name in sides), strict=True))
    name, what = bench.named(grid_speedup_over_ridgecv)
    figures = {
        "processor": [a.processor * pairs / (b.processor - c.processor) for a, b, c in turns],
        "with_our_forwards": [a.processor * pairs / b.processor for a, b, _ in turns],
    }
    keep(
        name, what, figures, must=">= 30", taken=taken.values(), device=bench.device, pairs=pairs, rows=len(x),
        sketch=f"{bench.sketch} of {y.shape[1]} target dimensions, RidgeCV all of them",
    )  # fmt: skip


LOADED = """
import json
import xmodel_steer as xs
from xmodel_steer.studies.demo import SOURCE, TARGET
from xmodel_steer.files.records import read_record, write_record
from xmodel_steer.files.wheels import general_text
small, large = (xs.load(name, device="cpu", dtype="auto", progress=False) for name in (SOURCE, TARGET))
texts = general_text()
sites = json.loads(sys.argv[2])
"""
COLLECTED = """
text = (texts[i % 64] for i in range(int(sys.argv[1])))  # the same window again and again
xs.collect_moments(small, large, text, **sites, max_tokens=192, batch_size=32, progress=False)
"""


def moments_peak(documents: int, source_sites: Sequence[Any] = (3, 5), target_sites: Sequence[Any] = (2, 3)) -> int:
    """Kilobytes that collecting moments adds at its peak to the memory of loaded models."""
    sites = {"source_sites": source_sites, "target_sites": target_sites}
    return peak_of(LOADED, COLLECTED, documents, json.dumps(sites))


def moments_memory_at_4x_text(bench: Bench) -> None:
    """What collecting moments adds to the memory of loaded models at its peak, at four times the text (Linux)."""
    added = [(moments_peak(128), moments_peak(512)) for _ in range(bench.repeats)]
    name, what = bench.named(moments_memory_at_4x_text)
    figures = {"ratio": [b / a for a, b in added], "megabytes_added": [a / 1024 for a, _ in added]}
    keep(name, what, figures, must="<= 1.05", documents=[128, 512])


def repeated(folder: Path, shards: int) -> PairedRows:
    """The store in a folder with its shards over and over, so many in all: for times alone."""
    for end in ("source", "target"):
        record = read_record(folder / end / "end.json")
        for number in range(record["shards"], shards):
            shutil.copy(
                folder / end / f"{number % record['shards']:06d}.safetensors",
                folder / end / f"{number:06d}.safetensors",
            )
        write_record(folder / end / "end.json", {**record, "shards": shards})
    return xs.ActivationStore(folder).pair(HERE, THERE)


def autoencoder_epoch_speedup(bench: Bench, shards: int = 96) -> None:
    """An epoch of the autoencoder that computes the activations anew, as the paper's code does, over one from a store of 96 shards.

    An epoch reads every 15th document, of all shards. The passes over the bench's documents are timed and scaled.
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
        rows = replace(every, documents=every.documents[::15])

        def epochs(count: int) -> None:
            xs.Autoencoder(epochs=count, patience=count).fit(rows)

        sides = {"passes": recompute, "one epoch": lambda: epochs(1), "four": lambda: epochs(4)}
        taken = in_turn({name: lambda call=call: take(call) for name, call in sides.items()}, bench.repeats)
    times = len(rows.documents) / len(bench.texts)
    turns = [[one.processor for one in turn] for turn in zip(*taken.values(), strict=True)]
    name, what = bench.named(autoencoder_epoch_speedup)
    keep(
        name, what, {"processor": [1 + passes * times / ((four - one) / 3) for passes, one, four in turns]}, must=">= 8",
        taken=taken.values(), device=bench.device, documents=len(rows.documents), shards=shards,
    )  # fmt: skip


def epoch_at_4x_shards(bench: Bench) -> None:
    """Reading all rows of a store in shuffled order, at four times the text."""
    with tempfile.TemporaryDirectory() as folder:
        bench.pair(folder)
        few, many = (repeated(Path(folder), shards).documents for shards in (48, 192))  # the first one's files stay
        draws = torch.Generator().manual_seed(0)

        def read(documents: tuple[DocumentRows, ...]) -> None:
            for i in torch.randperm(len(documents), generator=draws).tolist():
                documents[i].load()

        bench.compare(
            epoch_at_4x_shards, lambda: read(many), lambda: read(few), "<= 4.8", documents=[len(few), len(many)]
        )


def harvest_over_forwards(bench: Bench) -> None:
    """Writing every layer of both models to a store, over the plain forward passes."""

    def harvest() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for model, end in ((bench.small, "source"), (bench.large, "target")):
                xs.harvest(
                    model, bench.texts, folder, end=end, sites="all", max_tokens=MAX_TOKENS,
                    batch_size=BATCH, progress=False,
                )  # fmt: skip

    bench.compare(harvest_over_forwards, harvest, bench.forwards, "<= 1.2", documents=len(bench.texts))


def arrays(rows: PairedRows, part: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a part."""
    sides = zip(*(d.load() for d in rows.part(part)), strict=True)
    x, y = (torch.cat(side).to(torch.float64).numpy() for side in sides)
    return x, y


def ridge_over_best_other_r2(bench: Bench) -> None:
    """Held-out R² of our ridge map over the best of all other fitters, ours, scikit-learn's and latentis'."""
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
            name, what = bench.named(ridge_over_best_other_r2, str(round(n, -3) or n))
            keep(
                name, what, {"ratio": [a / b for a, b in zip(ridge, best, strict=True)]}, must=">= 1", tokens=n,
                r2={name: round(float(np.mean(values)), 4) for name, values in table.items()},
            )  # fmt: skip


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


FIGURES = {
    f.__name__: f
    for f in (
        load_over_from_pretrained,
        capture_over_bare_hook,
        harvest_over_forwards,
        autoencoder_epoch_speedup,
        epoch_at_4x_shards,
        moments_memory_at_4x_text,
        grid_over_two_forwards,
        exact_grid_over_two_forwards,
        grid_speedup_over_ridgecv,
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
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.device, given.shape, given.documents, given.repeats, given.dtype)
    for name, figure in FIGURES.items():
        if given.only in (None, name):
            figure(bench)
    finish()


if __name__ == "__main__":
    main()

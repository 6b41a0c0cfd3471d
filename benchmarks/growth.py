"""How time and memory grow: ``python benchmarks/growth.py``.

    python benchmarks/growth.py --only growth/moments by width

Models of random weights, in float32 on one thread. Sizes take turns. The slope of log seconds over log size, by least
squares, is 1 where the time is in proportion.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import IMPORTED, Taken, busy, finish, in_turn, keep, peak_of, random_model, spread, take

import xmodel_steer as xs
from xmodel_steer.evaluation.behaviours.generated import GeneratedText
from xmodel_steer.files.wheels import general_text
from xmodel_steer.recipe.settings import GeneralText
from xmodel_steer.studies.concepts import concept, openings

WIDTH, LAYERS, DOCUMENTS = 256, 4, 64
SIZES = {
    "documents": (32, 64, 128, 256),
    "layers": (2, 4, 8, 16),
    "width": (64, 128, 256, 512),
    "prompts": (36, 72, 144, 288),
    "random vectors": (2, 4, 8, 16),
}


def model(width: int = WIDTH, layers: int = LAYERS, name: str = "toy") -> Any:
    """A model of random weights."""
    torch.manual_seed(len(name))
    return random_model(name, width, layers, width // 32, width // 64, 4 * width)


def moments(documents: int = DOCUMENTS, layers: int = LAYERS, width: int = WIDTH) -> Callable[[], Any]:
    """Moments of all layer pairs, with both models' passes."""
    ends = [model(width, layers, name) for name in ("small", "large")]
    settings = {"source_sites": "all", "target_sites": "all", "max_tokens": 192, "progress": False}
    return lambda: xs.collect_moments(*ends, general_text()[:documents], **settings)  # type: ignore[arg-type]


def harvest(documents: int = DOCUMENTS, layers: int = LAYERS, width: int = WIDTH) -> Callable[[], Any]:
    """Harvest of all layers, with the model's passes."""
    read = model(width, layers)

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            xs.harvest(
                read, general_text()[:documents], folder, end="source", sites="all", max_tokens=192, progress=False
            )

    return call


def transfer(**size: int) -> Callable[[], Any]:
    """Transfer with all arms at equal KL."""
    prompts, vectors = size.get("prompts", 36), size.get("random vectors", 2)
    ends = [model(64, 4, name) for name in ("small", "large")]
    asked = GeneratedText(openings(prompts), lambda text: sum(c in "aeiou" for c in text) / 99, 8, 64)
    text = GeneralText(general_text()[:48], general_text()[-12:])
    budget = xs.Budget((-1.0, 1.0), False, vectors, map_tokens=64)
    contrast = concept("sentiment").contrast
    return lambda: xs.transfer(*ends, contrast, text, behaviour=asked, budget=budget, progress=False)


def grown(name: str, what: str, calls: dict[int, Callable[[], Taken]], repeats: int) -> None:
    """Measure every size in turn, and keep the slope."""
    taken = in_turn({str(size): call for size, call in calls.items()}, repeats)
    turns = np.log([[one.processor for one in turn] for turn in zip(*taken.values(), strict=True)])
    slopes = np.polyfit(np.log(list(calls)), turns.T, 1)[0]
    seconds = {size: spread([one.processor for one in ones]) for size, ones in taken.items()}
    keep(f"growth/{name}", what, {"slope": slopes}, taken=taken.values(), sizes=seconds, unit="s")


def curve(what: Callable[..., Callable[[], Any]], by: str, repeats: int) -> None:
    """Keep how a call's time grows with one of its sizes."""
    calls = {size: what(**{by: size}) for size in SIZES[by]}
    doc = " ".join((what.__doc__ or "").split()).rstrip(".")
    measures = {size: lambda call=call: take(call) for size, call in calls.items()}
    grown(f"{what.__name__} by {by}", f"{doc}, by {by}", measures, repeats)


MADE = """
import growth
import xmodel_steer as xs
ends = [growth.model(64, 2, name) for name in ("small", "large")]
words = "the river rises in hills north of a town and flows south".split()
texts = (" ".join(words[(i * k) % len(words)] for k in range(2, 14)) + f" {i}" for i in range(int(sys.argv[1])))
"""
COLLECTED = "xs.collect_moments(*ends, texts, source_sites=[0, 1], target_sites=[0, 1], max_tokens=32, progress=False)"


def memory(documents: Sequence[int] = (1000, 10_000, 100_000)) -> None:
    """Keep what collecting moments from a generator adds to the memory of loaded models, at its peak."""
    added = {}
    for count in documents:
        added[str(count)] = spread([round(peak_of(MADE, COLLECTED, count) / 1024, 1)])
        print(f"  {count} documents: {added[str(count)][0]} MB", flush=True)
    slope = np.polyfit(np.log(documents), np.log([values[0] for values in added.values()]), 1)[0]
    keep("growth/memory by documents", "Memory that moments add at their peak, by documents from a generator",
         {"slope": [slope]}, sizes=added, unit="MB")  # fmt: skip


SHARED = """
import sys, time
import torch
torch.set_num_threads(1)
import growth
from growth import xs
from xmodel_steer.activations.distributed import all_reduced, process_group

with process_group() as (rank, size):
    small, large = (growth.model(name=name) for name in ("small", "large"))
    texts, start = growth.general_text()[:256], time.process_time()
    settings = {"max_tokens": 192, "progress": False, "shard": (rank, size)}
    if sys.argv[1] == "moments":
        found = xs.collect_moments(small, large, texts, source_sites="all", target_sites="all", **settings)
        found = all_reduced(found) if size > 1 else found
    else:
        xs.harvest(small, texts, "store", end="source", sites="all", **settings)
    print(f"took {time.process_time() - start}", flush=True)
"""


def shared(what: str, count: int) -> Taken:
    """Let torchrun's processes share a text; the processor time is of all of them, without their start."""

    def used() -> float:
        of = resource.getrusage(resource.RUSAGE_CHILDREN)
        return of.ru_utime + of.ru_stime

    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(SHARED)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        before = used(), time.perf_counter(), busy()
        done = subprocess.run(
            [*torchrun, str(script), what], cwd=folder, env=os.environ | {"PYTHONPATH": IMPORTED}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        children, wall, everything = used() - before[0], time.perf_counter() - before[1], busy() - before[2]
    took = [float(seconds) for seconds in re.findall(r"took ([\d.]+)", done.stdout)]
    assert len(took) == count, done.stdout
    return Taken(sum(took), wall, sum(took) + everything - children)


def processes(what: str, repeats: int) -> None:
    """Keep what processes that share a text take together."""
    calls = {count: lambda count=count: shared(what, count) for count in (1, 2, 4)}
    doc = f"{what.capitalize()} of 256 documents, all processes of torchrun together, by their number"
    grown(f"{what} by processes", doc, calls, repeats)


CURVES: dict[str, Callable[[int], None]] = {
    f"growth/{what.__name__} by {by}": lambda repeats, what=what, by=by: curve(what, by, repeats)
    for what, sizes in (
        (moments, ("documents", "layers", "width")),
        (harvest, ("documents", "layers", "width")),
        (transfer, ("prompts", "random vectors")),
    )
    for by in sizes
} | {
    "growth/memory by documents": lambda repeats: memory(),
    **{
        f"growth/{what} by processes": lambda repeats, what=what: processes(what, repeats)
        for what in ("moments", "harvest")
    },
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CURVES, "growth"], help="one curve")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, measure in CURVES.items():
        if given.only in (None, "growth", name):
            measure(given.repeats)
    finish()


if __name__ == "__main__":
    main()

"""How fast steering and finding a vector are beside other programs: ``python benchmarks/peers.py``.

    python benchmarks/peers.py --only generation --model packaged:gemma-3-270m --dtype bfloat16 --batch 8 --new-tokens 48

Without settings, `generation` measures a list of them. Every other program runs in a virtual environment of its own (made
on first use, under the user's cache folder), on the same checkpoint, in the same dtype, on one thread. What they make is
compared before anything is timed: the same texts, the same vector. Then they take turns, as in `run.py`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Taken, busy, finish, in_turn, keep, keep_ratio, take

import xmodel_steer as xs
from xmodel_steer.files.cache import cache_folder
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.studies.concepts import concept
from xmodel_steer.studies.demo import SOURCE, TARGET

LARGER = "packaged:qwen2.5-coder-1.5b-instruct"

HERE = Path(__file__).parent
OWN_ENVIRONMENT = {"steering_vectors": "steering-vectors==0.12.2", "repeng": "repeng==0.4.0"}
#: Model, dtype, batch, new tokens.
EVERY = [
    (model, dtype, batch, new)
    for model in (SOURCE, TARGET)
    for dtype in ("float32", "bfloat16")
    for batch, new in ((1, 48), (8, 48), (32, 48))
] + [(TARGET, "bfloat16", 8, 256), (LARGER, "bfloat16", 8, 48)]
LAYERS = {SOURCE: 18, TARGET: 12, LARGER: 14}


def interpreter(program: str) -> str:
    """Python with the program, and the torch and transformers that run here.

    steering-vectors asks for transformers before 5; it runs with 5, and only so are the models' own times the same.
    repeng needs NumPy 1.
    """
    if program not in OWN_ENVIRONMENT:
        return sys.executable
    folder = cache_folder() / "benchmarks" / program
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "complete").is_file():
        print(f"making an environment for {OWN_ENVIRONMENT[program]}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        needs = [
            f"{package}=={version(package).split('+')[0]}" for package in ("torch", "transformers", "scikit-learn")
        ]
        for what in (["gguf", "numpy<2", *needs], ["--no-deps", OWN_ENVIRONMENT[program]]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True)
        (folder / "complete").touch()
    return str(python)


class Program:
    """A running `programs.py`."""

    def __init__(self, name: str, folder: str, job: Path) -> None:
        self.name, self.log = name, job.with_name(f"{name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [interpreter(name), str(HERE / "programs.py"), name, folder, str(job)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._line()  # it is ready

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self.log.read_text()[-1500:]}")
        return json.loads(line)

    def ask(self, what: str) -> Any:
        """Return what the program makes."""
        self._ask(what)
        return self._line()["made"]

    def take(self, what: str) -> Taken:
        """Measure what it takes the program."""
        before = busy()
        self._ask(what)
        answer = self._line()
        return Taken(answer["processor"], answer["wall"], busy() - before)

    def _ask(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()


@contextmanager
def programs(
    names: Sequence[str], folder: str, job: dict[str, Any], vector: xs.SteeringVector
) -> Iterator[dict[str, Program]]:
    """Start programs on one checkpoint; idle ones wait for input and use no processor."""
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "job.json"
        xs.save(vector, file.with_name("vector.safetensors"))
        direction = {"vector": str(file.with_name("vector.safetensors")), "direction": vector.direction.tolist()}
        file.write_text(json.dumps(job | direction))
        started = {}
        for name in names:
            started[name] = Program(name, folder, file)
            stack.callback(started[name].process.kill)
        yield started


def sentiment(model: Any, layer: int, pairs: int) -> xs.SteeringVector:
    """A vector with an effect."""
    contrast = concept("sentiment").contrast
    site = xs.Site(layer)
    positive, negative = (
        xs.capture(model, side[:pairs], [site], tokens="mean", progress=False)[site]
        for side in (contrast.positive, contrast.negative)
    )
    return xs.difference_of_means(positive, negative)


def job_for(layer: int, device: str, dtype: str) -> dict[str, Any]:
    """Prompts, and pairs of mixed lengths."""
    own = concept("sentiment")
    contrast, prompts = own.contrast, own.prompts
    texts = [(p.text or "", n.text or "") for p, n in zip(contrast.positive, contrast.negative, strict=True)]
    filler = " ".join(p.text or "" for p in prompts).split()
    lengths = np.random.default_rng(0).integers(0, 24, 256)  # words before a pair's own text
    pairs = [(" ".join(filler[i : i + k]), *texts[i % len(texts)]) for i, k in enumerate(lengths.tolist())]
    return {
        "layer": layer,
        "dtype": dtype,
        "device": device,
        "positive": [f"{before} {positive}".strip() for before, positive, _ in pairs],
        "negative": [f"{before} {negative}".strip() for before, _, negative in pairs],
        "batch": 8,
    }


def generation(name: str, dtype: str, batch: int, new_tokens: int, device: str, repeats: int) -> None:
    """Tokens for each processor second of greedy generation, over those of Hugging Face's own, unsteered."""
    model, layer = xs.load(name, progress=False), LAYERS[name]
    folder, vector = tokenizer_of(model).name_or_path, sentiment(model, layer, 40)
    del model  # the programs have their own
    prompts = [p.text for p in concept("sentiment").prompts[:batch]]
    job = job_for(layer, device, dtype) | {"prompts": prompts, "new_tokens": new_tokens}
    peers = ["steering_vectors", "repeng", "transformer_lens"] if name != LARGER else []  # for memory
    with programs(["hugging_face", "xmodel_steer", "steering_hf", *peers], folder, job, vector) as started:
        made = {own: program.ask("generate") for own, program in started.items()}
        same = {own: sum(map(str.__eq__, texts, made["xmodel_steer"])) for own, texts in made.items()}
        del same["hugging_face"]
        sides = {own: partial(program.take, "generate") for own, program in started.items()}
        sides["xmodel_steer_unsteered"] = partial(started["xmodel_steer"].take, "unsteered")
        taken = in_turn(sides, repeats)
    plain = taken.pop("hugging_face")
    figures = {
        own: [b.processor / a.processor for a, b in zip(turns, plain, strict=True)] for own, turns in taken.items()
    }
    keep(
        f"generation/{name} {dtype} {batch}x{new_tokens}", "", figures, must=">= 0.97", taken=[plain, *taken.values()],
        device=device, model=name, dtype=dtype, batch=batch, new_tokens=new_tokens, texts_equal_to_ours=same,
    )  # fmt: skip


def difference(name: str, dtype: str, device: str, repeats: int) -> None:
    """A difference of means over last tokens at one deep layer."""
    model, layer = xs.load(name, progress=False), LAYERS[name]
    folder, vector = tokenizer_of(model).name_or_path, sentiment(model, layer, 8)
    del model
    job = job_for(layer, device, dtype) | {"prompts": [], "new_tokens": 0}
    with programs(["xmodel_steer", "hugging_face", "steering_vectors"], folder, job, vector) as started:
        made = {own: np.asarray(program.ask("difference")) for own, program in started.items()}
        ours = made["xmodel_steer"]
        cosines = {own: float(v @ ours / np.linalg.norm(v) / np.linalg.norm(ours)) for own, v in made.items()}
        if min(cosines.values()) < 0.9999:
            raise SystemExit(f"the vectors differ, nothing was timed: {cosines}")
        taken = in_turn({own: partial(program.take, "difference") for own, program in started.items()}, repeats)
    for other, what, must in (
        ("steering_vectors", "steering-vectors'", "<= 0.4"),
        ("hugging_face", "a bare hook's, in batches as the pairs come", "<= 0.6"),
    ):
        keep_ratio(
            f"difference/{other} {name}", f"The time of a difference of means at one layer, over {what}",
            taken["xmodel_steer"], taken[other], must, device=device, model=name, dtype=dtype, layer=layer,
            pairs=len(job["positive"]), batch=job["batch"], cosine=round(cosines[other], 6),
        )  # fmt: skip


def _children() -> float:
    """Processor seconds of the programs that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imports(repeats: int) -> None:
    """What importing takes, in new interpreters."""
    # As pip leaves a package: compiled.
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def importing(module: str) -> Taken:
        code = (
            "import time; t, p = time.perf_counter(), time.process_time(); "
            f"import {module}; print(time.process_time() - p, time.perf_counter() - t)"
        )
        before = busy() - _children()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=compiled)
        processor, wall = map(float, done.stdout.split())
        return Taken(processor, wall, processor + busy() - _children() - before)

    taken = in_turn({module: partial(importing, module) for module in ("xmodel_steer", "torch")}, max(7, repeats))
    what = "The time of `import xmodel_steer`, over that of `import torch`, each in a new interpreter"
    keep_ratio("imports", what, taken["xmodel_steer"], taken["torch"], "<= 1.1")


def clicks(repeats: int) -> None:
    """Seconds from a click to the first thing seen, in the kernel, warm, on two threads: both explorers."""
    torch.set_num_threads(2)
    source, target = (xs.load(name, dtype="auto", progress=False) for name in (SOURCE, TARGET))
    steered = xs.explore(
        target, sentiment(target, 10, 8), prompt=concept("sentiment").prompts[0].text or "", max_new_tokens=4
    )
    patching = xs.explore_patching(
        target, source, clean="Everyone who lives in the old city of Rome speaks",
        corrupted="Everyone who lives in the old city of Paris speaks", answers=(" Italian", " French"), max_new_tokens=4,
    )  # fmt: skip
    filled = [take(patching.fill.click) for _ in range(repeats)]
    keep(
        "clicks/filling", "Seconds to fill the grid of `explore_patching`: 18 layers × 11 positions, in 4 kinds",
        {"seconds": [one.wall for one in filled]}, must="<= 20", taken=[filled], model=TARGET,
    )  # fmt: skip

    def steer(turn: int) -> None:
        steered.strength.value = 1.0 + turn / 10  # no text is the one before
        steered.generate.click()

    def patch(turn: int) -> None:
        patching.cells.selected = {"kind": "mapped", "cells": [[turn + 3, patching.cells.pairs[-1][1]]]}

    for name, click, seen in (("explore", steer, steered.steered), ("explore_patching", patch, patching.next_tokens)):
        times: list[float] = []
        seen.observe(lambda change, times=times: times.append(time.perf_counter()) if change.new else None, "value")
        taken = []
        for turn in range(repeats + 2):
            times.clear()
            start, worked, before = time.perf_counter(), time.process_time(), busy()
            click(turn)
            taken.append(Taken(time.process_time() - worked, times[0] - start, busy() - before))
        figures = {"seconds": [one.wall for one in taken[2:]]}
        keep(
            f"clicks/{name}", f"Seconds from a click in `{name}` to the first token seen, in the kernel, warm", figures,
            must="<= 0.5", taken=[taken], model=TARGET,
        )  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("generation", "difference", "imports", "clicks"))
    parser.add_argument("--model", choices=tuple(LAYERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only in (None, "imports"):
        imports(given.repeats)
    if given.only in (None, "difference"):
        for model in [given.model] if given.model else [SOURCE, TARGET]:
            difference(model, given.dtype, given.device, given.repeats)
    if given.only in (None, "generation"):
        one = (given.model, given.dtype, given.batch, given.new_tokens)
        for settings in [one] if given.model else EVERY:
            generation(*settings, given.device, given.repeats)
    if given.only in (None, "clicks"):
        clicks(given.repeats)
    finish()


if __name__ == "__main__":
    main()

"""How fast steering and finding a vector are beside other programs: ``python benchmarks/peers.py``.

Every other program runs in a virtual environment of its own (made on first use, under the user's cache folder), on the same
checkpoint, in the same dtype. What they make is compared before anything is timed: the same texts, the same vector. Then
they take turns; a figure is the median over the turns of the ratio within one, with the smallest and the largest.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import hardware, keep

import xmodel_steer as xs
from xmodel_steer.files.cache import cache_folder
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.studies.concepts import concept
from xmodel_steer.studies.demo import SOURCE, TARGET

HERE = Path(__file__).parent
OWN_ENVIRONMENT = {"steering_vectors": "steering-vectors==0.12.2", "repeng": "repeng==0.4.0"}
NEW_TOKENS = 48


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

    def ask(self, what: str) -> dict[str, Any]:
        """Seconds, and what was made."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._line()


@contextmanager
def programs(names: Sequence[str], folder: str, job: dict[str, Any]) -> Iterator[dict[str, Program]]:
    """Start programs on one checkpoint; idle ones wait for input and use no processor."""
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "job.json"
        file.write_text(json.dumps(job))
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


def job_for(model: Any, layer: int, device: str, dtype: str) -> dict[str, Any]:
    """Prompts, pairs of mixed lengths, and a vector with an effect."""
    own = concept("sentiment")
    contrast, prompts = own.contrast, own.prompts
    texts = [(p.text or "", n.text or "") for p, n in zip(contrast.positive, contrast.negative, strict=True)]
    filler = " ".join(p.text or "" for p in prompts).split()
    lengths = np.random.default_rng(0).integers(0, 24, 256)  # words before a pair's own text
    pairs = [(" ".join(filler[i : i + k]), *texts[i % len(texts)]) for i, k in enumerate(lengths.tolist())]
    return {
        "layer": layer,
        "direction": sentiment(model, layer, 40).direction.tolist(),
        "dtype": dtype,
        "device": device,
        "new_tokens": NEW_TOKENS,
        "prompts": [p.text for p in prompts[:8]],
        "positive": [f"{before} {positive}".strip() for before, positive, _ in pairs],
        "negative": [f"{before} {negative}".strip() for before, _, negative in pairs],
        "batch": 8,
    }


def turns(started: dict[str, Program], what: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every program, in turn; the order changes so that none always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in started}
    order = list(started)
    for turn in range(repeats):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds[name].append(started[name].ask(what)["seconds"])
            print(f"  {what}, turn {turn + 1}, {name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds


def steered_generation(name: str, tokenizer: Any, job: dict[str, Any], repeats: int, suffix: str) -> None:
    """Tokens per second of steered greedy generation, over those of every other program."""
    names = ["xmodel_steer", "hugging_face", "steering_vectors", "repeng", "transformer_lens"]
    with programs(names, tokenizer.name_or_path, job) as started:
        made = {own: program.ask("generate")["made"] for own, program in started.items()}
        tokens = {own: sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in made[own]) for own in made}
        same = {own: sum(a == b for a, b in zip(made[own], made["xmodel_steer"], strict=True)) for own in names}
        print(f"texts equal to ours, of {len(job['prompts'])}: {same}; tokens {tokens}", flush=True)
        seconds = turns(started, "generate", repeats)
    figures = {
        "hugging_face": ("steered_over_unsteered_tokens", ">= 0.97"),
        "steering_vectors": ("steered_over_steering_vectors", ">= 1"),
        "repeng": ("steered_over_repeng", ">= 1"),
        "transformer_lens": ("steered_over_transformer_lens", ">= 1"),
    }
    for other, (figure, must) in figures.items():
        ratios = [b / a for a, b in zip(seconds["xmodel_steer"], seconds[other], strict=True)]
        keep(
            figure + suffix, ratios, must, command="python benchmarks/peers.py", on=hardware(job["device"]), model=name,
            dtype=job["dtype"], batch=len(job["prompts"]), new_tokens=NEW_TOKENS, texts_equal=same[other],
        )  # fmt: skip


def difference_of_means(name: str, folder: str, job: dict[str, Any], repeats: int, suffix: str) -> None:
    """Time of a difference of means over last tokens at one deep layer, over that of the others."""
    with programs(["xmodel_steer", "hugging_face", "steering_vectors"], folder, job) as started:
        made = {own: np.asarray(program.ask("difference")["made"]) for own, program in started.items()}
        ours = made["xmodel_steer"]
        cosines = {own: float(v @ ours / np.linalg.norm(v) / np.linalg.norm(ours)) for own, v in made.items()}
        print(f"cosines with ours: {cosines}", flush=True)
        if min(cosines.values()) < 0.9999:
            raise SystemExit("the vectors differ: nothing was timed")
        seconds = turns(started, "difference", repeats)
    for other, figure in (
        ("steering_vectors", "dom_time_over_steering_vectors"),
        ("hugging_face", "dom_time_over_hugging_face"),
    ):
        ratios = [a / b for a, b in zip(seconds["xmodel_steer"], seconds[other], strict=True)]
        keep(
            figure + suffix, ratios, "<= 0.6", command="python benchmarks/peers.py", on=hardware(job["device"]),
            model=name, dtype=job["dtype"], layer=job["layer"], pairs=len(job["positive"]), batch=job["batch"],
            cosine=round(cosines[other], 6),
        )  # fmt: skip


def import_over_torch(repeats: int) -> None:
    """Time of ``import xmodel_steer`` over that of ``import torch``, each in a new interpreter."""
    # As pip leaves a package: compiled.
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def seconds(module: str) -> float:
        code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=compiled)
        return float(done.stdout)

    pairs = [(seconds("xmodel_steer"), seconds("torch")) for _ in range(max(7, repeats) + 1)][1:]
    keep(
        "import_over_torch", [a / b for a, b in pairs], "<= 1.1", command="python benchmarks/peers.py",
        on=hardware("cpu"), seconds=round(float(np.median([a for a, _ in pairs])), 2),
    )  # fmt: skip


def explore_first_token_seconds(repeats: int) -> None:
    """Seconds from a click on "Generate" to the first steered token on the screen, in the kernel, warm."""
    model = xs.load(TARGET, dtype="auto", progress=False)
    prompts = concept("sentiment").prompts
    explorer = xs.explore(model, sentiment(model, 10, 8), prompt=prompts[0].text or "", max_new_tokens=4)
    seen: list[float] = []

    def look(change: Any) -> None:
        if re.search('class="xs-text">[^<]', change.new):
            seen.append(time.perf_counter())

    explorer.steered.observe(look, "value")
    seconds = []
    for turn in range(repeats + 2):
        explorer.strength.value = 1.0 + turn / 10  # no text is the one before
        seen.clear()
        start = time.perf_counter()
        explorer.generate.click()
        seconds.append(seen[0] - start)
    keep(
        "explore_first_token_seconds", seconds[2:], "<= 0.5", command="python benchmarks/peers.py --only explore",
        on=hardware("cpu"), model=TARGET,
    )  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("generation", "difference", "import", "explore"))
    parser.add_argument("--model", choices=("source", "target"), default="target")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.only in (None, "import"):
        import_over_torch(given.repeats)
    if given.only in (None, "explore"):
        explore_first_token_seconds(given.repeats)
    if given.only in ("import", "explore"):
        return
    name, layer = (SOURCE, 18) if given.model == "source" else (TARGET, 12)
    suffix = ("_smollm2" if given.model == "source" else "") + ("" if given.dtype == "float32" else f"_{given.dtype}")
    model = xs.load(name, progress=False)
    job, tokenizer = job_for(model, layer, given.device, given.dtype), tokenizer_of(model)
    del model  # the programs have their own
    if given.only in (None, "generation"):
        steered_generation(name, tokenizer, job, given.repeats, suffix)
    if given.only in (None, "difference"):
        difference_of_means(name, tokenizer.name_or_path, job, given.repeats, suffix)


if __name__ == "__main__":
    main()

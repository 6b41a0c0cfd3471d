"""Times side by side: processor seconds beside wall time, and how much else the machine did meanwhile."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

import xmodel_steer as xs
from xmodel_steer.models.facts import tokenizer_of
from xmodel_steer.studies.demo import SOURCE

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
IMPORTED = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))  # by programs that are started
MOST = 0.1  # processors that others may use while a figure is measured
TICK = 0.02  # seconds by which the kernel's count may be late
VERSIONS = ("torch", "transformers", "transformer-lens")
refused: list[str] = []  # figures that were measured on a loaded machine, and so not written


@dataclass(frozen=True)
class Taken:
    """What a call took: processor seconds of its program, seconds, and processor seconds of everything on the machine."""

    processor: float
    wall: float
    everything: float = 0.0


def busy() -> float:
    """Processor seconds that everything on the machine has used since it began; 0 where that is not told."""
    with suppress(OSError):
        user, nice, system, _idle, _waiting, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def take(call: Callable[[], Any]) -> Taken:
    """Measure a call in this process, all its threads together."""
    _wait()
    before = time.process_time(), time.perf_counter(), busy()
    call()
    _wait()
    return Taken(
        *(now - then for now, then in zip((time.process_time(), time.perf_counter(), busy()), before, strict=True))
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(sides: Mapping[str, Callable[[], Taken]], repeats: int) -> dict[str, list[Taken]]:
    """Measure each side once a turn, after a turn that does not count; the order changes, so that none always follows the same one."""
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(repeats + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            one = sides[name]()
            if turn:
                taken[name].append(one)
            print(
                f"  {name}: {one.processor:.2f} s of processor, {one.wall:.2f} s{'' if turn else ' (warm-up)'}",
                flush=True,
            )
    return taken


def random_model(
    name: str, width: int, layers: int, heads: int, groups: int, inner: int, *, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """A model of random weights with a packaged model's tokenizer: for times alone."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=49152, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device(device):
        hf = LlamaForCausalLM(config).to(dtype).eval()
    made = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config, model_name=name)
    xs.register(made, name=name, tokenizer=_tokenizer())
    return made


@cache
def _tokenizer() -> Any:
    return tokenizer_of(xs.load(SOURCE, progress=False))


MEMORY = """
import sys
from pathlib import Path

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))

{before}
start = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading
{call}
print(start, memory("VmHWM"))
"""


def peak_of(before: str, call: str, *arguments: Any) -> int:
    """Kilobytes that a call adds at its peak to the memory of what was made before it, both as code (Linux)."""
    # glibc must give freed blocks back at once: the peak is then of what was in use, not of what it hoarded.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(before=before, call=call), *map(str, arguments)], capture_output=True,
        text=True, check=True, env={
            **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": IMPORTED,
        },
    )  # fmt: skip
    start, peak = map(int, done.stdout.split()[-2:])
    return peak - start


def hardware(device: str) -> str:
    """The machine in a few words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    kinds = [kind for kind in ("amx_bf16", "avx512_bf16", "avx2") if torch.cpu.get_capabilities().get(kind)]
    return f"{model} ({kinds[0]})" if kinds else model


def _settings(name: str) -> str:
    """What the program was given; where that is nothing, what gives this figure alone."""
    return shlex.join(sys.argv[1:] if "--only" in sys.argv else ["--only", name.partition("/")[0], *sys.argv[1:]])


def _commit() -> str:
    """The commit, with a plus where files differ from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = [line for line in git("status", "--porcelain").splitlines() if not line.endswith(".json")]
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest, highest."""
    return [round(float(f(values)), 4) for f in (np.median, np.min, np.max)]


def keep(
    name: str,
    what: str,
    figures: Mapping[str, Sequence[float]],
    *,
    must: str = "",
    taken: Iterable[Sequence[Taken]] = (),
    device: str = "cpu",
    **more: Any,
) -> None:
    """Write a figure into results.json, unless the machine was busy with something else.

    Args:
        name: Name of the figure.
        what: What is compared, in words.
        figures: The values of all repeats, by name. The first one is held to ``must``.
        must: The target, such as ``<= 1.5``; empty for none.
        taken: All that was measured for it, side by side.
        device: Where models ran.
        more: Settings.
    """
    every = list(chain.from_iterable(taken))
    wall = sum(one.wall for one in every)
    beyond = sum(max(0.0, one.everything - one.processor - TICK) for one in every)
    others = beyond / wall if wall else 0.0
    row = {
        "what": what,
        **{key: spread(values) for key, values in figures.items()},
        "must": must,
        "repeats": len(next(iter(figures.values()))),
        **more,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {_settings(name)}",
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "others": round(others, 2),
        "commit": _commit(),
        "versions": {package: version(package).split("+")[0] for package in VERSIONS},
    }
    print(f"{name}: {json.dumps(row)}", flush=True)
    if others > MOST:
        refused.append(name)
        print(f"{name}: not written, for other programs used {others:.2f} processors meanwhile", flush=True)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[name] = row
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def compare(
    name: str,
    what: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    must: str,
    *,
    repeats: int,
    device: str = "cpu",
    **more: Any,
) -> None:
    """Measure two calls in turn, and keep the ratio of their processor times; on a GPU, of their times."""
    taken = in_turn({"ours": lambda: take(ours), "theirs": lambda: take(theirs)}, repeats)
    keep_ratio(name, what, taken["ours"], taken["theirs"], must, device=device, **more)


def keep_ratio(
    name: str, what: str, ours: Sequence[Taken], theirs: Sequence[Taken], must: str, *, device: str = "cpu", **more: Any
) -> None:
    """Keep the ratio of two sides, turn by turn."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios = {
        "processor": [a.processor / b.processor for a, b in pairs],
        "wall": [a.wall / b.wall for a, b in pairs],
    }
    if device.startswith("cuda"):
        ratios = {"wall": ratios["wall"]}  # the processor waits
    keep(name, what, ratios, must=must, taken=[ours, theirs], device=device, **more)


def finish() -> None:
    """End the program; with an error where figures were refused."""
    if refused:
        sys.exit(f"not written, for the machine was busy: {', '.join(refused)}")

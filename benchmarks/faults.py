"""Faults, tried: damaged files, two callers on one model, killed work, races: ``python benchmarks/faults.py``.

    python benchmarks/faults.py                        # all of it, about 20 minutes; writes benchmarks/faults.json
    python benchmarks/faults.py --only files --count 100

Tiny random models, no network. Each try ends as one of: *refused* (an error of this library, in words), *equal* (what
would have been without the fault), *silently wrong* (another value, and no error) or *crash* (another exception). Of
killed work, *lost* is a result that the same call does not bring to the same bits. Where no checksum can tell, in texts
and in forged records, another valid value is *other value*.
"""

import argparse
import asyncio
import copy
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import xmodel_steer as xs
from xmodel_steer.activations.cached import cached_moments
from xmodel_steer.core.bars import quiet
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.files.records import KEY, read_record, write_record
from xmodel_steer.files.resume import once, resumable
from xmodel_steer.interop.hugging_face import steering_hf

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import sample_results as samples
import toys

TABLE = Path(__file__).parent / "faults.json"
OUTCOMES = ("equal", "refused", "other value", "silently wrong", "crash", "lost")
BAD = OUTCOMES[3:]


# --- damaged files ----------------------------------------------------------------------------
def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one accident: bits flipped, cut, repeated, lost, overwritten, or of another place."""
    whole = bytearray(data)
    at, end = sorted(rng.randrange(len(data)) for _ in range(2))
    kind = rng.randrange(7)
    if kind <= 1:
        whole[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del whole[at:]
    elif kind == 3:
        del whole[at : at + rng.randrange(1, 9)]
    elif kind == 4:
        whole[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 5:
        whole[at : at + 16] = whole[end : end + 16]
    else:
        whole[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b'"}]{', b"null", b"1e99"])
    return bytes(whole)


ODD = (None, True, -1, 0, 1e308, 10**30, "", "../../planted", "x", [], {}, [[]], [None], {"a": 1}, 0.5, "\ud800")


def forged(record: Any, rng: random.Random) -> Any:
    """Return a record with one value, anywhere, replaced or removed."""
    record = copy.deepcopy(record)
    places = list(_places(record))
    parent, key = rng.choice(places)
    if rng.random() < 0.15:
        del parent[key]
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return record


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def resealed(file: Path, rng: random.Random) -> None:
    """Forge a file's record, and give it the checksum that fits."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(str(file), "pt") as opened:
            record = json.loads(opened.metadata()[KEY])
        text = _sealed(forged(record, rng))
        save_file(load_file(file), file, metadata={KEY: text})
    else:
        file.write_text(_sealed(forged(json.loads(file.read_text()), rng)), encoding="utf-8", errors="surrogatepass")


def _sealed(record: dict[str, Any]) -> str:
    if isinstance(record, dict):
        record["sha256"] = "0" * 64
    text = json.dumps(record)
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1)


def outcome(read: Callable[[], Any], before: Any, same: Callable[[Any, Any], bool], any_value: bool = False) -> str:
    """Name how a read ended; ``any_value``: no checksum can tell another valid value."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = read()
        return "equal" if same(value, before) else "other value" if any_value else "silently wrong"
    except xs.errors.XModelSteerError as error:
        return "refused" if len(str(error)) < 2000 else "crash"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"crash: {type(error).__name__}: {str(error)[:150]} ({where.filename}:{where.lineno})", file=sys.stderr)
        return "crash"


def _same(a: Any, b: Any) -> bool:
    return samples.same(a, b) if not isinstance(a, tuple) else repr(a) == repr(b)


def files(count: int, seed: int) -> dict[str, Counter[str]]:
    """Damage and forge files of every format."""
    rng = random.Random(seed)
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table["vectors, maps, moments"] = _accidents(_tensor_files(folder), count, rng)
        table["vectors, maps, moments, forged with fitting checksums"] = _forgeries(_tensor_files(folder), count, rng)
        table["runs"] = _run_accidents(folder / "run", count, rng)
        table["runs, forged with fitting checksums"] = _run_forgeries(folder / "run", count, rng)
        table["prompts and contrast sets"] = _text_accidents(folder, count, rng)
        table["control vectors (GGUF)"] = _accidents(_control_vectors(folder), count, rng)
        table["stores"] = _store_accidents(folder / "store", count, rng)
    return table


def _tensor_files(folder: Path) -> list[tuple[Path, Callable[[Path], Any]]]:
    values = {"vector": samples.vector(), "map": samples.mapping(), "moments": samples.moments()}
    return [(xs.save(value, folder / f"{name}.safetensors"), xs.read) for name, value in values.items()]


def _control_vectors(folder: Path) -> list[tuple[Path, Callable[[Path], Any]]]:
    from xmodel_steer import interop

    vector = samples.vector(replace(samples.SMALL, processing="none"))
    return [(interop.write_control_vector(vector, folder / "v.gguf"), interop.read_control_vector)]


def _accidents(kinds: Sequence[tuple[Path, Callable[[Path], Any]]], count: int, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    wholes = [(file, read, file.read_bytes(), read(file)) for file, read in kinds]
    for i in range(count):
        file, read, whole, before = wholes[i % len(wholes)]
        file.write_bytes(damaged(whole, rng))
        seen[outcome(partial(read, file), before, _same)] += 1
        file.write_bytes(whole)
    return seen


def _forgeries(kinds: Sequence[tuple[Path, Callable[[Path], Any]]], count: int, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    wholes = [(file, read, file.read_bytes(), read(file)) for file, read in kinds]
    for i in range(count):
        file, read, whole, before = wholes[i % len(wholes)]
        resealed(file, rng)
        seen[outcome(partial(read, file), before, _shown_alike, any_value=True)] += 1
        file.write_bytes(whole)
    return seen


def _shown_alike(a: Any, b: Any) -> bool:
    return repr(a) == repr(b) and _same(a, b)


def _used(run: Path) -> Any:
    """Read a run and use all of it."""
    from xmodel_steer.figures.report import write_report

    result = xs.read(run)
    write_report(result, run.parent / "report.html")
    return repr(result), result.to_frame(), result.conclusions, result


def _used_alike(a: Any, b: Any) -> bool:
    return a[0] == b[0] and a[1].equals(b[1]) and a[2] == b[2] and _same(a[3], b[3])


def _run_accidents(run: Path, count: int, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    xs.save(samples.result(), run)
    before = xs.read(run)
    for i in range(count):
        inside = sorted(file for file in run.rglob("*") if file.is_file())
        file = inside[i % len(inside)]
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, rng))
        seen[outcome(lambda: xs.read(run), before, _same)] += 1
        file.write_bytes(whole)
    return seen


def _run_forgeries(run: Path, count: int, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    whole = (run / "result.json").read_bytes()
    before = _used(run)
    around = sorted(run.parent.iterdir())
    for _ in range(count):
        resealed(run / "result.json", rng)
        ended = outcome(lambda: _used(run), before, _used_alike, any_value=True)
        outside = [f for f in run.parent.iterdir() if f not in around and f.name != "report.html"]
        seen["silently wrong" if outside else ended] += 1
        (run / "result.json").write_bytes(whole)
    return seen


def _text_accidents(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    """Damaged texts may be read as other texts: nothing tells; they must not crash."""
    rows = [{"positive": f"good {i} ∆", "negative": f"bad {i}"} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = ("positive,negative\n" + "".join(f'"good, {i}","bad ""{i}"""\n' for i in range(5))).encode()
    kinds = {
        "a.jsonl": (lines, xs.read_contrast), "a.csv": (table, xs.read_contrast),
        "a.jsonl.gz": (gzip.compress(lines), xs.read_contrast), "a.txt": (b"One.\n\nTwo.\n\nThree.", xs.read_prompts),
        "b.csv.gz": (gzip.compress(b"text\nOne\nTwo\n"), xs.read_prompts),
    }  # fmt: skip
    seen: Counter[str] = Counter()
    whole = {}
    for name, (data, read) in kinds.items():
        (folder / name).write_bytes(data)
        whole[name] = repr(read(folder / name))
    for i in range(count):
        name = list(kinds)[i % len(kinds)]
        data, read = kinds[name]
        (folder / name).write_bytes(b"[" * 200_000 + b"\n" if rng.random() < 0.01 else damaged(data, rng))
        seen[
            outcome(lambda name=name, read=read: repr(read(folder / name)), whole[name], str.__eq__, any_value=True)
        ] += 1
    return seen


@contextmanager
def models() -> Iterator[tuple[Any, Any]]:
    """Make two tiny models."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizers = toys.byte_level_tokenizer(Path(folder) / "one"), toys.metaspace_tokenizer(Path(folder) / "two")
        yield toys.toy("llama", tokenizers[0]), toys.toy("gemma", tokenizers[1])


def _harvested(source: Any, target: Any, store: Path, texts: Sequence[str]) -> Any:
    for end, toy in (("source", source), ("target", target)):
        xs.harvest(toy.model, texts, store, end=end, sites=[1], max_tokens=4096 // 64, batch_size=8)
    return xs.ActivationStore(store)


def _store_accidents(store: Path, count: int, rng: random.Random) -> Counter[str]:
    seen: Counter[str] = Counter()
    with models() as (source, target):
        _harvested(source, target, store, toys.sentences(130, seed=0))

        def read() -> Any:
            opened = xs.ActivationStore(store)
            opened.verify()
            return opened.moments(pairs=[(1, 1)])

        before = read()
        for _ in range(count):
            file = rng.choice(sorted(file for file in store.rglob("*") if file.is_file()))
            whole = file.read_bytes()
            file.write_bytes(damaged(whole, rng))
            seen[outcome(read, before, _same)] += 1
            file.write_bytes(whole)
    return seen


# --- two callers ------------------------------------------------------------------------------
def callers(count: int, seed: int) -> dict[str, Counter[str]]:
    """Run every pair of uses of one model in two threads, and in two tasks that wait inside their blocks."""
    threads: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with models() as (toy, _):
            uses = _uses(toy)
            alone = {name: use() for name, use in uses.items()}
            pairs = list(itertools.product(uses, uses))
            random.Random(seed).shuffle(pairs)
            with ThreadPoolExecutor(2) as pool:
                for pair in itertools.islice(itertools.cycle(pairs), count):
                    gate = threading.Barrier(2)

                    def use(name: str, gate: threading.Barrier = gate) -> Any:
                        gate.wait()
                        return uses[name]()

                    wanted = [alone[name] for name in pair]
                    threads[outcome(lambda pair=pair: list(pool.map(use, pair)), wanted, lambda a, b: a == b)] += 1
            for up, down in itertools.islice(itertools.cycle([(4.0, -4.0), (8.0, 0.0), (-8.0, 8.0)]), count):
                wanted = [_steered(toy, size)() for size in (up, down)]
                tasks[
                    outcome(lambda up=up, down=down: asyncio.run(_both(toy, up, down)), wanted, lambda a, b: a == b)
                ] += 1
    finally:
        sys.setswitchinterval(before)
    return {"two threads on one model": threads, "two tasks that wait inside their blocks": tasks}


def _texts(toy: Any) -> list[str]:
    return xs.generate(toy.model, toys.TEXTS[:3], max_new_tokens=4)


def _steered(toy: Any, size: float, run: Callable[[Any], Any] = _texts, **kwargs: Any) -> Callable[[], Any]:
    def use() -> Any:
        with xs.steering(toy.model, toy.vector(1, size=size), **kwargs):
            return run(toy)

    return use


async def _both(toy: Any, *sizes: float) -> list[Any]:
    async def one(size: float) -> Any:
        with xs.steering(toy.model, toy.vector(1, size=size)):
            await asyncio.sleep(0)
            first = _texts(toy)
            await asyncio.sleep(0)
            return _texts(toy) if _texts(toy) == first else None

    return await asyncio.gather(*map(one, sizes))


def _uses(toy: Any) -> dict[str, Callable[[], Any]]:
    def read(toy: Any) -> Any:
        rows = xs.capture(toy.model, toys.TEXTS[:3], [0, 1], tokens="all")
        return [rows[site].values.tolist() for site in rows]

    def called(toy: Any) -> Any:
        with torch.no_grad():
            return toy.model(torch.tensor([toy.ids(toys.TEXTS[1])]), return_type="logits").tolist()

    def hugging_face() -> Any:
        ids = torch.tensor([toy.ids(toys.TEXTS[0])])
        inner = toy.model.original_model
        with steering_hf(inner, toy.vector(1, size=6.0), positions="generated"):
            return inner.generate(ids, max_new_tokens=4, do_sample=False, **toys.NO_STOP).tolist()

    return {
        "plain": lambda: _texts(toy),
        "up": _steered(toy, 8.0),
        "down": _steered(toy, -8.0),
        "generated": _steered(toy, 8.0, positions="generated"),
        "capture": lambda: read(toy),
        "steered capture": _steered(toy, 8.0, read),
        "call": lambda: called(toy),
        "steered call": _steered(toy, -8.0, called),
        "hugging face": hugging_face,
    }


# --- killed work ------------------------------------------------------------------------------
def _work(source: Any, target: Any) -> dict[str, Callable[[Path], Any]]:
    """List kinds of work, each a function of the place that it writes."""
    texts = toys.sentences(400, seed=0)
    settings = {"source_sites": [1], "target_sites": [1], "max_tokens": 32, "batch_size": 4}
    pairs = _harvested(source, target, Path(tempfile.mkdtemp()) / "store", texts).pair(1, 1)

    def saved(out: Path) -> None:
        for _ in range(15):
            xs.save(samples.result(), out)

    def kept(out: Path) -> None:
        with resumable(out.parent / "kept"):
            written = [
                once(partial(str, text), partial(xs.generate, source.model, [text], max_new_tokens=4))
                for text in texts[:40]
            ]
        write_record(out, {"kind": "texts", "texts": written})

    return {
        "harvest": lambda out: _harvested(source, target, out, texts).moments(pairs=[(1, 1)]),
        "moments": lambda out: xs.save(xs.collect_moments(source.model, target.model, texts[:200], **settings), out),
        "cached moments": lambda out: cached_moments(source.model, target.model, as_prompts(texts[:200]), **settings),
        "training": lambda out: xs.Autoencoder(hidden=64, epochs=6).fit(pairs, checkpoint=out),
        "runs": saved,
        "kept results": kept,
    }


def kills(count: int, seed: int) -> dict[str, Counter[str]]:
    """Kill work at random moments, give the same call again, and compare the files with those of undisturbed work."""
    rng = random.Random(seed)
    table = {}
    with models() as (source, target), tempfile.TemporaryDirectory() as scratch:
        for kind, run in _work(source, target).items():
            seen: Counter[str] = Counter()
            took, whole = _child(run, Path(scratch) / f"{kind} whole", None)
            for i in range(count):
                place = Path(scratch) / f"{kind} {i}"
                for _ in range(rng.randrange(1, 3)):
                    _child(run, place, rng.uniform(0, took))
                _, again = _child(run, place, None)
                seen["equal" if again == whole else "lost"] += 1
                shutil.rmtree(place, ignore_errors=True)
            table[f"killed and started again: {kind}"] = seen
    return table


def _child(run: Callable[[Path], Any], place: Path, after: float | None) -> tuple[float, dict[str, str]]:
    """Run work in a child, kill it ``after`` so many seconds; return its time, and the hashes of all files, scratch too."""
    place.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.environ["XMODEL_STEER_CACHE"] = str(place / "cache")
        code = 1
        try:
            run(place / "out" / "work")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if after is None and status:
        raise RuntimeError(f"undisturbed work failed with status {status}")
    took = time.perf_counter() - start
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return took, {str(f.relative_to(place)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# --- races ------------------------------------------------------------------------------------
def races(count: int, seed: int) -> dict[str, Counter[str]]:
    """Let several processes replace, read and begin the same places; the windows are widened by a slow fsync."""
    table = {}
    for kind in ("a run is replaced while it is read", "two harvests of other settings begin together"):
        seen: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as scratch:
            for i in range(count):
                place = Path(scratch) / str(i)
                writers = [_racer(kind, place, k) for k in (seed + 2 * i, seed + 2 * i + 1)]
                codes = [writer.wait() for writer in writers]
                seen[_race_ended(kind, place, codes)] += 1
        table[kind] = seen
    return table


def _racer(kind: str, place: Path, seed: int) -> Any:
    command = [sys.executable, __file__, "--race", kind, "--out", str(place), "--seed", str(seed)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def race(kind: str, place: Path, seed: int) -> None:
    """Do one side of a race."""
    real = os.fsync
    rng = random.Random(seed)

    def slow(handle: int) -> None:
        time.sleep(rng.uniform(0, 0.02))
        real(handle)

    os.fsync = slow
    if kind.startswith("a run"):
        place.mkdir(parents=True, exist_ok=True)
        for i in range(6):
            xs.save(samples.result(), place / "run")
            (place / "run" / f"notes-{seed}-{i}").write_text("mine")
            assert _same(xs.read(place / "run"), samples.result())
    else:
        with models() as (source, _):
            tokens = (32, 64)[seed % 2]
            xs.harvest(source.model, toys.sentences(130, seed=0), place, end="source", sites=[1], max_tokens=tokens)


def _race_ended(kind: str, place: Path, codes: Sequence[int]) -> str:
    if kind.startswith("a run"):
        notes = len(list((place / "run").glob("notes-*")))
        return "equal" if codes == [0, 0] and notes == 12 else "lost"
    settings = read_record(place / "source" / "end.json")["settings"]
    shards = [json.loads(_metadata(f))["settings"] for f in (place / "source").glob("*.safetensors")]
    if sorted(map(bool, codes)) != [False, True]:
        return "lost"
    return "refused" if all(s == settings for s in shards) else "silently wrong"


def _metadata(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        return opened.metadata()[KEY]


def markdown(table: dict[str, dict[str, int]]) -> str:
    """Return the table of docs/reliability.md."""
    lines = [f"| fault | tried | {' | '.join(OUTCOMES)} |", "|---" * (2 + len(OUTCOMES)) + "|"]
    lines += [
        f"| {row} | {' | '.join(str(seen.get(k, 0)) for k in ('tried', *OUTCOMES))} |" for row, seen in table.items()
    ]
    return "\n".join(lines)


FAMILIES = {"files": (files, 1500), "callers": (callers, 240), "kills": (kills, 50), "races": (races, 50)}


def main() -> None:
    """Try all families, or one, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=FAMILIES)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--race")
    parser.add_argument("--table", action="store_true", help="print the recorded table for docs/reliability.md")
    options = parser.parse_args()
    if options.table:
        return print(markdown(json.loads(TABLE.read_text())))
    if options.race:
        return race(options.race, options.out, options.seed)
    table: dict[str, dict[str, int]] = {}
    for name, (family, count) in FAMILIES.items():
        if options.only in (None, name):
            with quiet():
                rows = family(options.count or count, options.seed)
            table |= {
                row: {k: seen[k] for k in OUTCOMES if seen[k]} | {"tried": seen.total()} for row, seen in rows.items()
            }
            for row in rows:
                print(f"{row}: {table[row]}", flush=True)
    if options.count is None:
        former = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
        TABLE.write_text(json.dumps(dict(sorted((former | table).items())), indent=1) + "\n")
    bad = [row for row, seen in table.items() if any(seen.get(k) for k in BAD)]
    sys.exit(f"not as promised: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()

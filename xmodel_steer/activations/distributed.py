"""Moments over several processes: each reads its share of the text, and each gets the sum.

``torchrun`` starts one process per GPU or per machine. Each rank reads its share of the text's windows, so that any
number of ranks gives the same moments up to the rounding of sums in float64.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xmodel_steer.core.errors import PromptError, RankError, SpaceMismatchError, XModelSteerError
from xmodel_steer.core.prompts import Prompt, text_digest
from xmodel_steer.maps.moments import Moments, PartMoments, recentred
from xmodel_steer.maps.pairs import PARTS, PRODUCTS

#: Seconds that the processes wait for one another: shares of the text differ in length, machines in speed.
PATIENCE = 1800.0
#: The seconds of the present group: PyTorch does not use them in `monitored_barrier`.
_TIMEOUT: ContextVar[float] = ContextVar("xmodel_steer_timeout", default=PATIENCE)


@contextmanager
def process_group(device: str | None = None, *, timeout: float = PATIENCE) -> Iterator[tuple[int, int]]:
    """Yield the rank of this process and the number of processes; one without torchrun.

    Args:
        device: Device of the tensors; ``nccl`` connects CUDA devices, ``gloo`` CPUs.
        timeout: Seconds that a process waits for another one.

    Raises:
        RankError: Another process did not answer in time. With ``gloo`` the error names its rank. ``nccl`` does not tell
            it, and may end this process instead of raising.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield 0, 1
        return
    cuda = device is not None and device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    token = _TIMEOUT.set(timeout)
    try:
        yield dist.get_rank(), dist.get_world_size()
        _wait_for_all()  # a process that leaves while another still talks to it may abort gloo's threads
    finally:
        _TIMEOUT.reset(token)
        dist.destroy_process_group()


def _wait_for_all() -> None:
    """Wait until every process has come here.

    Raises:
        RankError: Names the ranks that have not come within the group's time.
    """
    with _answered():
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=timedelta(seconds=_TIMEOUT.get()), wait_all_ranks=True)
        else:
            dist.barrier()


@contextmanager
def _answered() -> Iterator[None]:
    """Tell in one line which process did not answer."""
    try:
        yield
    except RuntimeError as error:  # dist's own errors among them
        if isinstance(error, XModelSteerError):
            raise
        here, text = dist.get_rank(), str(error)
        if ranks := re.search(r"Ranks? ([\d, ]+) failed to pass", text):
            which = f"rank {ranks[1].strip(' ,')} did not answer in time: it hangs, or has ended"
        elif here and "monitoredBarrier" in text:
            which = (
                "rank 0 did not answer: it hangs or has ended, or waits for another rank, which its own message names"
            )
        else:
            which = "another rank stopped answering"
        raise RankError(
            f"rank {here}: {which}; look at its output, start all processes again, and harvest into a store to continue "
            f"where they stopped ({text[:200]})"
        ) from error


def require_same_texts(texts: Sequence[Prompt]) -> None:
    """Refuse, in every process, texts that differ between processes.

    Raises:
        PromptError: They differ.
        RankError: A process did not answer in time.
    """
    here = (len(texts), text_digest(texts))
    for rank, there in enumerate(_gathered(here)):
        if there != here:
            raise PromptError(
                f"harvest: rank {rank} reads other texts ({there[0]} documents, hash {there[1]}) than rank "
                f"{dist.get_rank()} ({here[0]}, {here[1]}); give every process the same file"
            )


def _gathered(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    _wait_for_all()
    values: list[Any] = [None] * dist.get_world_size()
    with _answered():
        dist.all_gather_object(values, value)
    return values


def all_reduced(moments: Moments) -> Moments:
    """Sum the moments of all processes' shards, in every process.

    Means first, then scatters about the common mean (Chan, Golub & LeVeque 1979), tensor by tensor.

    Raises:
        SpaceMismatchError: The processes used different models, sites or pairs.
        RankError: A process did not answer in time.
    """
    if not dist.is_initialized():
        return moments
    identity = (
        [str(s) for s in (*moments.source.values(), *moments.target.values())],
        [f"{s} {t}" for s, t in moments.pairs],
        moments.sketch,
        dict(moments.settings),
    )
    if any(other != identity for other in _gathered(identity)):
        raise SpaceMismatchError(
            "all_reduced: the processes collected moments of different models, sites or settings; start all with the same arguments"
        )
    counts = _gathered((moments.paired, moments.eligible, moments.shards))
    return replace(
        moments,
        parts={name: _reduced(moments.parts[name], moments.sketch) for name in PARTS},
        paired=sum(c[0] for c in counts),
        eligible=sum(c[1] for c in counts),
        settings={key: value for key, value in moments.settings.items() if key != "texts"},
        shards=(),  # the sum lacks none
    )


def _sum(tensor: Tensor) -> Tensor:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = tensor.detach().to(device, copy=True)
    with _answered():
        dist.all_reduce(total)
    return total.cpu()


def _reduced(part: PartMoments, sketch: tuple[int, ...]) -> PartMoments:
    counts = _sum(torch.tensor([part.count, part.documents], dtype=torch.int64))
    n = int(counts[0])
    if n == 0:
        return part
    source, target = (
        {site: _sum(mean * (part.count / n)) for site, mean in means.items()}
        for means in (part.source_means, part.target_means)
    )
    centred = recentred(part, source, target, sketch)
    sums = {kind: {key: _sum(m) for key, m in getattr(centred, kind).items()} for kind in PRODUCTS}
    return replace(centred, count=n, documents=int(counts[1]), **sums)

"""Compiles kernels on all cores into Triton's disk cache, so that tuning and capture find them ready.

It knows launches, not why they are wanted.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache

import torch

from kernels import branch, skinny, stream
from kernels.batch import LoraError
from kernels.launch import Launch

PATIENCE_S = 3.0
"""As long as a dozen kernels take to compile, or some hundreds to be found in the cache; processes take longer to start."""


def compile_one(kernel: str, *resolved) -> str:
    """Compile one launch of a kernel of the operator; the error's text where it does not fit the device, else nothing."""
    try:
        module = next(module for module in (branch, skinny, stream) if kernel in vars(module))
        Launch(getattr(module, kernel), *resolved).compile()
    except Exception as error:  # a tile that does not fit is an answer to the search, whatever the compiler raised
        return f"{type(error).__name__}: {error}"
    return ""


def _resolved(launch: Launch) -> tuple:
    return launch.grid, launch.constants, launch.types, launch.warps


def compile_all(launches: list[Launch]) -> dict[str, str]:
    """Compile every distinct launch in parallel; {Launch.code: error} of those that failed."""
    distinct = {launch.code: launch for launch in launches}
    jobs = [(launch.kernel.__name__, *_resolved(launch)) for launch in distinct.values()]
    return {code: error for code, error in zip(distinct, in_parallel(compile_one, jobs), strict=True) if error}


def make_ready(launches: list[Launch]) -> None:
    """Compile every distinct launch that Triton's disk cache lacks: here while that goes quickly, else on all cores.

    The processes are gone afterwards, and with them their memory on the GPU. A launch that does not fit the device is left
    to whoever calls it.
    """
    left, began = list({launch.code: launch for launch in launches}.values()), time.monotonic()
    while left and time.monotonic() - began < PATIENCE_S:
        compile_one(left[-1].kernel.__name__, *_resolved(left.pop()))
    if left:
        compile_all(left)
        _workers().shutdown()
        _workers.cache_clear()


def in_parallel(work: Callable, jobs: list[tuple]) -> list:
    """work(*job) of every job, in order, each core a process of its own with its own view of the GPU.

    LoraError where a process ended before its work, as one does that finds no memory left on the GPU.
    """
    if not jobs:
        return []
    try:
        return list(_workers().map(work, *zip(*jobs, strict=True), chunksize=2 if len(jobs) > 64 else 1))
    except BrokenProcessPool as error:
        _workers.cache_clear()
        raise LoraError(
            f"a process that compiles ended early ({error}); each takes about half a GiB of the GPU's memory: leave that "
            "much free, as with fewer KV pages or a shorter --context, or give this process fewer cores (taskset)"
        ) from error


@cache
def _workers() -> ProcessPoolExecutor:
    """Started once, for each has torch to import; they end with this process. On this process's GPU, and as many as the
    cores that it may use, or its share of them where torchrun started several."""
    count = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _take_device, (device,))


def _take_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)

"""Compiles kernels on all cores into Triton's disk cache, so that tuning and capture find them ready.

It knows launches, not why they are wanted.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache

from kernels import branch, stream
from kernels.launch import Launch


def compile_one(kernel: str, *resolved) -> str:
    """Compile one launch of a kernel of the operator; the error's text where it does not fit the device, else nothing."""
    try:
        module = next(module for module in (branch, stream) if kernel in vars(module))
        Launch(getattr(module, kernel), *resolved).compile()
    except Exception as error:  # a tile that does not fit is an answer to the search, whatever the compiler raised
        return f"{type(error).__name__}: {error}"
    return ""


def compile_all(launches: list[Launch]) -> dict[str, str]:
    """Compile every distinct launch in parallel; {Launch.code: error} of those that failed."""
    distinct = {launch.code: launch for launch in launches}
    jobs = [(j.kernel.__name__, j.grid, j.constants, j.types, j.warps) for j in distinct.values()]
    return {code: error for code, error in zip(distinct, in_parallel(compile_one, jobs), strict=True) if error}


def in_parallel(work: Callable, jobs: list[tuple]) -> list:
    """work(*job) of every job, in order, each core a process of its own with its own view of the GPU."""
    if not jobs:
        return []
    return list(_workers().map(work, *zip(*jobs, strict=True), chunksize=2 if len(jobs) > 64 else 1))


@cache
def _workers() -> ProcessPoolExecutor:
    """Started once, for each has torch to import; they end with this process."""
    return ProcessPoolExecutor(os.cpu_count() or 1, mp_context=multiprocessing.get_context("spawn"))

"""Compiles kernels on all cores into Triton's disk cache, so that tuning and capture find them ready.

It knows launches, not why they are wanted.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch

from kernels import branch
from kernels.atmm import Launch

TENSORS = {"v": torch.float32, "route": torch.int32, "perm": torch.int32}
INTEGERS = ("positions", "pool_rows")


def compile_one(kernel: str, grid: tuple[int, int], constants: dict, warps: int, dtype: torch.dtype) -> str:
    """Compile one launch for this device; the error's text where it does not fit, else an empty string."""
    launch = Launch(getattr(branch, kernel), grid, constants, warps)
    args = [
        16 if name in INTEGERS else TENSORS.get(name, dtype)
        for name in launch.kernel.arg_names
        if name not in launch.constants
    ]
    try:
        launch.kernel.warmup(*args, grid=launch.grid, **launch.constants, **launch.options)
    except Exception as error:  # a tile that does not fit is an answer to the search, whatever the compiler raised
        return f"{type(error).__name__}: {error}"
    return ""


def compile_all(launches: list[Launch], dtype: torch.dtype, workers: int | None = None) -> dict[str, str]:
    """Compile every distinct launch in parallel; {identity: error} of those that failed. See `identity`."""
    distinct = {identity(launch): launch for launch in launches}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        jobs = [(j.kernel.__name__, j.grid, j.constants, j.warps, dtype) for j in distinct.values()]
        results = pool.map(compile_one, *zip(*jobs, strict=True), chunksize=2)
        return {name: error for name, error in zip(distinct, results, strict=True) if error}


def identity(launch: Launch) -> str:
    """A launch without its grid: what decides its code."""
    return f"{launch.kernel.__name__} {sorted(launch.constants.items())} {launch.warps}"

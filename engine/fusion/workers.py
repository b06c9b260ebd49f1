"""Independent jobs side by side: a small model's training leaves most of a GPU, or all but one core, to others.

A job is a function of `Runs` and of plain values, and what it makes lies in files of its own, so that results depend neither
on the number of workers nor on who comes first; two jobs that want the same run take turns (`checkpoint.locked`). Each
worker is a process (spawned, one CUDA context each) that opens the base model once. One worker means this process.
Workers end with their parent, however it ends; where one dies, the jobs go on in this process, which is said. It knows
nothing of what the jobs do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

import torch

from engine.fusion.graphed import SMALL
from engine.fusion.workbench import Workbench

MOST_WORKERS = 8
Job = tuple[Callable, tuple]
"""(function, what it is given after the `Runs`)."""
_kept: dict[str, Any] = {}


def default_workers(bench: Workbench) -> int:
    """Processes that a machine carries: one for a model that fills the device, else one for every two cores of a GPU's host,
    or for every core."""
    cores = len(os.sched_getaffinity(0))
    if bench.device.type == "cuda":
        return 1 if bench.model.shape.hidden >= SMALL else max(1, min(MOST_WORKERS, cores // 2))
    return min(MOST_WORKERS, cores)


def repeatable_arithmetic() -> None:
    """Ask torch for kernels that give the same result each time. Before the first one runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # else every new tensor is filled first, by a kernel more


class Workers:
    """A context that runs jobs. here: what they are given in this process. open_again(log): the same in another process."""

    def __init__(self, here: Any, open_again: Callable, count: int):
        self._here, self._open, self._count = here, open_again, count
        self._pool: ProcessPoolExecutor | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Workers:
        if self._count > 1:
            context = get_context("spawn")
            self._lines = context.SimpleQueue()
            settings = (self._open, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), self._lines)
            self._pool = ProcessPoolExecutor(self._count, context, _start, settings)
            self._reader = threading.Thread(target=self._say, daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._reader is not None:
            self._lines.put(None)
            self._reader.join()

    def _say(self) -> None:
        while (line := self._lines.get()) is not None:
            self._here.bench.log(line)

    def each(self, jobs: Sequence[Job]) -> list:
        """The jobs' results, in their order. The first error, once those under way have ended."""
        if self._pool is not None:
            try:
                return self._side_by_side(self._pool, jobs)
            except BrokenProcessPool:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None
                self._here.bench.log("a worker process died, perhaps for lack of memory; all goes on in one process "
                                     "(fewer --workers may fit)")  # fmt: skip
        return [function(self._here, *given) for function, given in jobs]

    def _side_by_side(self, pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> list:
        futures = [pool.submit(_do, function, given) for function, given in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _start(open_again: Callable, threads: int, repeatable: bool, lines) -> None:
    """In a worker: the same arithmetic as its parent, and an end when that ends."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    if repeatable:
        repeatable_arithmetic()
    _kept["runs"] = open_again(log=lines.put)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _do(function: Callable, given: tuple):
    return function(_kept["runs"], *given)

"""Runs side by side: in processes of this machine (joblib's loky) or as tasks of a Ray cluster.

Both hand out a few runs at a time and give each back as it ends, so that memory does not grow with their number. It knows
nothing of what a run is.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What became of one run: its summary, or None and the error."""

    summary: dict | None
    error: str


Work = Callable[[Iterable[tuple[Any, Any]]], Iterator[tuple[Any, Outcome]]]
"""From (label, arguments) pairs to (label, outcome) pairs, in the order in which runs end."""


def in_processes(task: Callable[[Any], Outcome], jobs: int) -> Work:
    """Work for `jobs` processes; one runs in this process."""

    def work(items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Outcome]]:
        if jobs == 1:
            for label, arguments in items:
                yield label, task(arguments)
            return
        from joblib import Parallel, delayed

        parent = os.getpid()
        pool = Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered", pre_dispatch=2 * jobs, batch_size=1)
        yield from pool(delayed(_labelled)(task, label, arguments, parent) for label, arguments in items)

    return work


def _labelled(task: Callable[[Any], Outcome], label: Any, arguments: Any, parent: int) -> tuple[Any, Outcome]:
    _die_with(parent)
    return label, task(arguments)


@cache
def _die_with(parent: int) -> None:
    """End this worker soon after `parent` was killed: loky's would work off their queue first, for nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_ray(task: Callable[[Any, Any], Outcome], address: str, shared: Callable[[Any], Any]) -> Work:
    """Work for the Ray cluster at `address`. shared: what is read here and goes to the cluster once for all arguments that
    give the same object (the trace file). Raises ValueError where Ray is absent or does not answer."""
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs the package ray: pip install 'valora[ray]', or leave --ray out") from None
    import policies
    import sim
    import traces

    _reach(address)
    try:
        # The cluster runs this version of the program, whatever is installed there.
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING,
                 runtime_env={"py_modules": [traces, policies, sim]})  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"--ray {address}: no cluster answers ({error}); start one with `ray start --head`") from None
    remote = ray.remote(max_retries=2)(task)

    def work(items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Outcome]]:
        room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        sent: dict[int, Any] = {}  # id of a shared object -> (it, its reference)
        running: dict[Any, Any] = {}
        for label, arguments in items:
            thing = shared(arguments)
            if id(thing) not in sent:
                sent[id(thing)] = (thing, ray.put(thing))
            running[remote.remote(arguments, sent[id(thing)][1])] = label
            if len(running) >= room:
                yield _ended(ray, running)
        while running:
            yield _ended(ray, running)

    return work


def _reach(address: str) -> None:
    """Fail at once where nobody listens at HOST:PORT: Ray would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise ValueError(f"--ray {address}: nobody answers ({error}); start a cluster with `ray start --head`") from None


def _ended(ray, running: dict[Any, Any]) -> tuple[Any, Outcome]:
    ready, _ = ray.wait(list(running), num_returns=1)
    label = running.pop(ready[0])
    try:
        return label, ray.get(ready[0])
    except ray.exceptions.RayError as error:
        return label, Outcome(None, f"{type(error).__name__}: {str(error).splitlines()[0]}")

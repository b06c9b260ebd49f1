"""Data parallel: one engine a process, as `torchrun --nproc-per-node G -m engine replay` starts them, under one router.

Every process reads the whole trace and walks it in order. Whoever is the first to see that a request has come asks the
router (`policies.routing`, the simulator's) and writes the answer into the store that torchrun keeps; the others read it
there. What the router looks at (who holds which adapter, what is unfinished) each process reports between two leases; what
was routed since a report counts with it, as the simulator's ledgers would show it. The clocks start together at a barrier,
so that the processes must run on one machine. At the end process 0 gets all journals. It knows messages, no model.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace

import torch
from torch import distributed

from engine.arrivals import ByTrace
from engine.replay import INTERRUPTED, Driver, Part
from policies import faults
from policies.journal import Journal
from policies.ledger import Ledger
from policies.routing import make_router
from traces.request import Request, Trace

WITHOUT_REPORTS = ("round-robin",)
"""Routers that look at no replica."""
PART_BYTES = 4 << 20
"""torchrun's store takes values of up to 8 MiB."""
PATIENCE = timedelta(days=1)
"""One process may still serve while another has nothing left."""


class ParallelError(ValueError):
    """An environment or option that does not go with several processes. The message names the way out."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and the store that they share.

    Messages go through the store alone. A process group's threads may still let go of tensors while the interpreter ends,
    and then abort a process whose work is done.
    """

    rank: int
    size: int
    store: distributed.Store
    _turns: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def largest(self, value: int) -> int:
        """The largest of all processes' values, once all are here."""
        turn = next(self._turns)
        self.store.set(f"turn {turn} {self.rank}", str(int(value)))
        return max(int(self._awaited(f"turn {turn} {rank}")) for rank in range(self.size))

    def gathered(self, data: bytes) -> list[bytes] | None:
        """Everybody's bytes, in process 0; None in the others."""
        turn = next(self._turns)
        if self.rank:
            parts = range(0, len(data), PART_BYTES)
            for number, start in enumerate(parts):
                self.store.set(f"turn {turn} {self.rank} part {number}", data[start : start + PART_BYTES])
            self.store.set(f"turn {turn} {self.rank}", str(len(parts)))
            return None
        found = [data]
        for rank in range(1, self.size):
            keys = [f"turn {turn} {rank} part {number}" for number in range(int(self._awaited(f"turn {turn} {rank}")))]
            found.append(b"".join(self.store.get(key) for key in keys))
            for key in keys:
                self.store.delete_key(key)
        return found

    def _awaited(self, key: str) -> bytes:
        """The value, once it is there. torchrun ends those that wait for a process that died."""
        self.store.wait([key], PATIENCE)
        return self.store.get(key)


def world() -> World | None:
    """The processes that torchrun started; None if it did not, or only one. Takes this process's GPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        return None
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise ParallelError(f"{size} processes on several machines: their clocks do not start together; use one machine")
    if torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ParallelError(f"process {local} finds {there} GPUs; start at most as many: --nproc-per-node {there}")
        torch.cuda.set_device(local)
    store, rank, size = next(distributed.rendezvous("env://"))
    return World(rank, size, distributed.PrefixStore("engine", store))


class Shared(ByTrace):
    """This process's part of a trace, as `Driver` takes arrivals; the next arrival is the next of any, as in the simulator.

    name: of the run, so that runs do not mix.
    A request's number in the trace is its key; `walked` have been routed as far as this process knows.
    """

    def __init__(self, world: World, trace: Trace, router: str, ledger: Ledger, name: str):
        super().__init__(trace)
        self._world, self._ledger = world, ledger
        self._store = distributed.PrefixStore(name, world.store)
        self._route = make_router(router)
        self._reports = router not in WITHOUT_REPORTS
        self._routed: list[deque[Request]] = [deque() for _ in range(world.size)]  # what a report may not hold yet
        self._reported = ""
        self.walked = 0
        self.report()

    def take(self, now_ps: int, in_flight: int) -> Request | None:
        while self.next_ps() <= now_ps:
            request = self._routed_next()
            if request is not None:
                return request
        return None

    def left_behind(self, walked: int) -> list[Request]:
        """Requests up to number `walked` that went to this process and were never taken, after it stopped."""
        found = []
        while self.walked < walked:
            request = self._routed_next()
            if request is not None:
                found.append(request)
        return found

    # -- who gets it --------------------------------------------------------------------------------------------------
    def _routed_next(self) -> Request | None:
        """Walk past the next request of the trace; itself where it goes to this process."""
        request = self._next
        mine = self._replica_of(request) == self._world.rank
        self._pop()
        self.walked += 1
        return request if mine else None

    def _replica_of(self, request: Request) -> int:
        if not self._reports:
            return self._route(request, range(self._world.size), self.walked)
        key = f"route {request.id}"
        if self._store.check([key]):
            number = int(self._store.get(key))
        else:
            number = self._route(request, [self._replica(rank) for rank in range(self._world.size)], self.walked)
            number = int(self._store.compare_set(key, "", str(number)))  # another may have been quicker
        self._routed[number].append(request)
        return number

    def _replica(self, rank: int) -> SimpleNamespace | Ledger:
        """As much of a ledger as a router looks at."""
        if rank == self._world.rank:
            return self._ledger
        told = json.loads(self._store.get(f"state {rank}"))
        routed = self._routed[rank]
        while routed and routed[0].id < told["walked"]:
            routed.popleft()
        prompts = [*told["prompts"], *(request.prompt_tokens for request in routed)]
        mine = self._ledger.pool
        pool = SimpleNamespace(
            page_tokens=mine.page_tokens, pages=told["pages"], adapter_pages=mine.adapter_pages, adapter_room=told["room"],
            resident=told["resident"], loading=told["loading"],
        )  # fmt: skip
        entries = {number: SimpleNamespace(prompt_tokens=prompt) for number, prompt in enumerate(prompts)}
        unfinished = {*told["unfinished"], *(request.adapter for request in routed)}
        return SimpleNamespace(entries=entries, limits=self._ledger.limits, pool=pool, unfinished=unfinished)

    def report(self) -> None:
        """Tell the others what stands here, between two leases."""
        if not self._reports:
            return
        pool = self._ledger.pool
        text = json.dumps({
            "walked": self.walked, "prompts": [entry.prompt_tokens for entry in self._ledger.entries.values()],
            "unfinished": list(self._ledger.unfinished), "resident": list(pool.resident), "loading": list(pool.loading),
            "pages": pool.pages, "room": pool.adapter_room,
        })  # fmt: skip
        if text != self._reported:
            self._store.set(f"state {self._world.rank}", text)
            self._reported = text


def together(world: World, driver: Driver, shared: Shared) -> list[Part] | None:
    """After the run of every process: all parts, in process 0. Requests left behind by an interruption fail."""
    for request in shared.left_behind(world.largest(shared.walked)):
        driver.reasons[request.id] = INTERRUPTED
        faults.refuse(driver.ledger, request)
    part = Part.of(driver)
    facts = {"end_ns": part.end_ns, "peak_pages": part.peak_pages, "reasons": list(part.reasons.items())}
    text = json.dumps(facts).encode()
    found = world.gathered(len(text).to_bytes(8, "little") + text + part.journal.packed())
    if found is None:
        return None
    parts = []
    for data in found:
        start = 8 + int.from_bytes(data[:8], "little")
        told = json.loads(data[8:start])
        parts.append(Part(Journal.unpacked(data[start:]), told["end_ns"], told["peak_pages"], dict(told["reasons"])))
    return parts

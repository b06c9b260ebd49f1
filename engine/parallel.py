"""Data parallel: one engine a process, as `torchrun --nproc-per-node G -m engine replay` starts them, under one router.

Every process reads the whole trace and walks it in order. Whoever is the first to see that a request has come asks the
router (`policies.routing`, the simulator's) and writes the answer into the store that torchrun keeps; the others read it
there. What the router looks at (who holds which adapter, what is unfinished) each process reports between two leases; what
was routed since a report counts with it, as the simulator's ledgers would show it. The clocks start together at a barrier,
so that the processes must run on one machine. At the end process 0 gets all journals. It knows messages, no model.
"""

from __future__ import annotations

import json
import os
from collections import deque
from dataclasses import dataclass
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


class ParallelError(ValueError):
    """An environment or option that does not go with several processes. The message names the way out."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and the store that they share."""

    rank: int
    size: int
    store: distributed.Store

    def largest(self, value: int) -> int:
        """The largest of all processes' values, once all are here."""
        held = torch.tensor([value], dtype=torch.int64)
        distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
        return int(held)

    def gathered(self, data: bytes) -> list[bytes] | None:
        """Everybody's bytes, in process 0; None in the others."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64))
        most = int(max(sizes))
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.size)] if self.rank == 0 else None
        distributed.gather(padded, parts, dst=0)
        if parts is None:
            return None
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


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
    distributed.init_process_group("gloo", store=distributed.PrefixStore("group", store), rank=rank, world_size=size)
    return World(rank, size, distributed.PrefixStore("engine", store))


def leave(world: World | None) -> None:
    """After the last message."""
    if world is not None:
        distributed.destroy_process_group()


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
            resident=told["resident"], loading=told["loading"], users=told["users"],
        )  # fmt: skip
        entries = {number: SimpleNamespace(prompt_tokens=prompt) for number, prompt in enumerate(prompts)}
        return SimpleNamespace(entries=entries, limits=self._ledger.limits, pool=pool)

    def report(self) -> None:
        """Tell the others what stands here, between two leases."""
        if not self._reports:
            return
        pool = self._ledger.pool
        text = json.dumps({
            "walked": self.walked, "prompts": [entry.prompt_tokens for entry in self._ledger.entries.values()],
            "resident": list(pool.resident), "loading": list(pool.loading), "users": list(pool.users), "pages": pool.pages,
            "room": pool.adapter_room,
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

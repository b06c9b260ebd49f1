"""A simulation: a trace, a policy, one or more GPUs, to a RunResult.

`simulate` is the whole of it. It builds one ledger, pool and server a GPU, delivers each request at its arrival to the GPU
that the router names, and collects the journals. It knows nothing of files and command lines.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import simpy

from policies import Policy, faults, residency
from policies.cost import Cost
from policies.invariants import InvariantError
from policies.journal import Journal, result
from policies.ledger import Ledger
from policies.placement import put_in_order, withdraw
from policies.pool import Pool
from policies.profile import Profile, ProfileError
from policies.routing import make_router, moves
from policies.view import Limits
from sim.server import FOREVER_PS, PS_PER_NS, Clock, Server, at
from traces.record import STATUS, RunResult
from traces.request import NO_ADAPTER, Request, Trace


@dataclass(frozen=True)
class SimConfig:
    """What a simulation depends on beside trace, policy and profile.

    operator, switch: None for the policy's own. page_tokens: KV tokens a page. memory_share: of the pool that may be used.
    pages: of the pool, where an engine's are known (None: what the profile's memory holds). gpus,
    router: replicas and who sends them requests. leap: jump over runs of decode steps (False: step singly, same result).
    keep_steps: record one row a lease. check_invariants: prove the ledger after every step. adapter_bytes: memory that holds
    adapters and nothing else, taken from the pool (None: adapters lie among its pages). pins: adapters by name that are
    resident from the start and never evicted. closed_loop: requests in flight over all GPUs, each arriving when one ends
    (0: they arrive by the trace). drain_s: the run ends so many seconds after the last arrival (None: with its last
    request).
    """

    limits: Limits = field(default_factory=Limits)
    operator: str | None = None
    page_tokens: int = 16
    memory_share: float = 1.0
    switch: str | None = None
    pages: int | None = None
    prefix_cache: bool = True
    gpus: int = 1
    router: str = "least-outstanding"
    leap: bool = True
    keep_steps: bool = True
    check_invariants: bool = False
    adapter_bytes: int | None = None
    pins: tuple[str, ...] = ()
    closed_loop: int = 0
    drain_s: float | None = None

    def end_ps(self, trace: Trace) -> int:
        """When a replay of `trace` ends, whoever is unfinished then."""
        if self.drain_s is None or not len(trace):
            return FOREVER_PS
        return faults.end_ps(trace, self.drain_s)


def simulate(trace: Trace, policy: Policy, profile: Profile, config: SimConfig,
             progress: Callable[[int], None] | None = None) -> RunResult:
    """Replay `trace` under `policy`; `progress` is called with the number of finished requests now and then.

    Raises PlanError or InvariantError if the policy or the simulator is wrong, ProfileError if the profile cannot serve.
    """
    if getattr(policy, "strips_adapters", False):
        trace = trace.with_(adapter=np.full(len(trace), NO_ADAPTER, np.int32))
    env = Clock()
    operator = config.operator or policy.operator
    cost = Cost(profile, operator, config.switch or policy.switch, trace.adapters, policy.name)
    page_bytes = config.page_tokens * profile.kv_bytes_per_token
    pages = config.pages or int(profile.pool_bytes(golden=policy.merges) * config.memory_share) // page_bytes
    room = None if config.adapter_bytes is None else config.adapter_bytes // page_bytes
    if room is not None and config.pages is None:
        pages -= room
    if pages < 1:
        taken = "" if room is None else f" beside {config.adapter_bytes} bytes of --adapter-memory"
        raise ProfileError(f"memory share {config.memory_share}{taken} leaves no page of {page_bytes} bytes in the pool")
    adapter_pages = tuple(-(-profile.adapter_bytes(adapter.rank) // page_bytes) for adapter in trace.adapters)
    dispatcher = Dispatcher(env, trace, config.router, progress, config.closed_loop)
    pins = () if getattr(policy, "strips_adapters", False) else residency.numbers_of(config.pins, trace.adapters)
    leap = config.leap and not (config.closed_loop and config.gpus > 1)  # else nobody knows when the next one comes
    for number in range(config.gpus):
        journal = Journal(number, keep_steps=config.keep_steps)
        pool = Pool(
            pages, config.page_tokens, trace.adapters, adapter_pages, prefix_cache=config.prefix_cache, adapter_room=room
        )  # fmt: skip
        ledger = Ledger(pool, config.limits, journal, cost, oracle=policy.oracle)
        residency.hold(ledger, pins)
        dispatcher.servers.append(
            Server(env, ledger, policy, cost, journal, dispatcher.next_arrival_ps, leap=leap,
                   check_invariants=config.check_invariants, top_up=dispatcher.top_up if config.closed_loop else None,
                   end_ps=config.end_ps(trace))
        )  # fmt: skip
    _without_gc(env.run)
    servers = dispatcher.servers
    left = sum(len(server.ledger.entries) for server in servers)
    ended = sum(server.journal.ended for server in servers)
    if left or ended != len(trace):
        raise InvariantError(f"{len(trace)} requests in, {ended} ended, {left} unfinished when nothing more can happen")
    arrivals_ns = [] if config.closed_loop else trace.arrival_ns.tolist()
    counters = {
        "gpus": config.gpus,
        "end_ns": max([server.last_ps // PS_PER_NS for server in servers] + arrivals_ns[-1:]),
        "peak_pages": max(server.ledger.pool.peak for server in servers),
        "pool_pages": pages,
        "page_bytes": page_bytes,
    }
    if room is not None:
        counters["adapter_room_pages"] = room
    record = result([s.journal for s in servers], policy=policy.name, operator=operator, counters=counters,
                    config=_resolved(trace, policy, profile, config, cost))  # fmt: skip
    record.config["notes"] += _endings(record, config)
    record.requests["task"] = trace.task.astype(np.int64)
    return record


def _endings(record: RunResult, config: SimConfig) -> list[str]:
    """What the reader must know of requests that were not served."""
    table = record.requests
    refused, unfinished = (table["status"] == STATUS.index(how) for how in ("unservable", "unfinished"))
    long = refused & (table["prompt_tokens"] + table["output_tokens"] > config.limits.max_context)
    large, unfinished = int((refused & ~long).sum()), int(unfinished.sum())
    notes = []
    if long.any():
        notes.append(
            f"{long.sum()} requests pass the model's context of {config.limits.max_context} tokens and were refused as "
            "unservable; --clip shortens them"
        )
    if large:
        why = "the memory pool" if config.adapter_bytes is None else "the pages of keys and values, or --adapter-memory,"
        notes.append(f"{large} requests, with their adapters, do not fit {why} and were refused as unservable")
    if unfinished:
        notes.append(faults.note_on_cut_off(unfinished, len(record.requests["id"]), config.drain_s))
    return notes


class Dispatcher:
    """Delivers the requests of a trace to the server that the router names: each at its arrival, or, in a closed loop, as
    soon as fewer than `closed` are in flight."""

    def __init__(self, env: simpy.Environment, trace: Trace, router: str, progress: Callable[[int], None] | None,
                 closed: int = 0):
        self.servers: list[Server] = []
        self._env = env
        self._requests = trace.requests()
        self._route = make_router(router)
        self._progress = progress
        self._routed = 0
        self._next = next(self._requests, None)
        self._next_ps = FOREVER_PS
        self._closed = closed
        if not closed:
            self._schedule()

    def next_arrival_ps(self) -> int:
        """When the next request arrives anywhere; FOREVER_PS after the last."""
        return self._next_ps

    def _schedule(self) -> None:
        if self._next is None:
            self._next_ps = FOREVER_PS
        else:
            self._next_ps = self._next.arrival_ns * PS_PER_NS
            at(self._env, self._next_ps, self._deliver)

    def top_up(self) -> None:
        """Closed loop: what may arrive now does."""
        while self._next is not None and sum(len(server.ledger.entries) for server in self.servers) < self._closed:
            request, self._next = self._next, next(self._requests, None)
            self._send(request._replace(arrival_ns=self._env.now // PS_PER_NS))

    def _deliver(self, _event) -> None:
        request, self._next = self._next, next(self._requests, None)
        self._schedule()
        self._send(request)

    def _send(self, request: Request) -> None:
        servers = self.servers
        self._routed += 1
        if len(servers) == 1:
            servers[0].arrive(request)
        else:
            ledgers = [server.ledger for server in servers]
            servers[self._route(request, ledgers, self._routed - 1)].arrive(request)
            for moving, source, target in moves(self._route, ledgers):
                servers[target].arrive(withdraw(ledgers[source], moving))
                put_in_order(ledgers[target], moving)
        if self._progress is not None and self._routed % 256 == 0:
            self._progress(sum(server.journal.ended for server in servers))


def _without_gc(action: Callable[[], None]) -> None:
    """The run makes no reference cycles and many live objects, so collecting would only cost time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        action()
    finally:
        if enabled:
            gc.enable()


def _resolved(trace: Trace, policy: Policy, profile: Profile, config: SimConfig, cost: Cost) -> dict:
    notes = [*trace.notes]
    if config.closed_loop:
        notes.append(f"closed loop: {config.closed_loop} requests in flight, the trace's arrival times are not used")
    if profile.kind != "measured":
        notes.append(f"profile {profile.name} is {profile.kind}, not measured")
    if cost.outside:
        notes.append(f"look-ups beyond the profile's range, extrapolated: {', '.join(sorted(cost.outside))}")
    return {
        "trace": {"source": trace.source, "sha256": trace.sha256, "format": trace.format, "settings": trace.settings},
        "profile": {"name": profile.name, "sha256": profile.sha256, "kind": profile.kind, "provenance": profile.provenance},
        "model": profile.model,
        "policy": {"name": policy.name, **asdict(policy)},
        "simulator": asdict(replace(config, operator=config.operator or policy.operator)),
        "adapters": [{"name": adapter.name, "rank": adapter.rank} for adapter in trace.adapters],
        "seed": trace.settings.get("seed"),
        "notes": notes,
    }

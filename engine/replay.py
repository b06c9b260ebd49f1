"""The loop over ledger and policy with a real model where the simulator has a latency model, from a trace to a RunResult.

Requests arrive by the clock; a plan stands as a lease of decode steps until something arrives, ends, loads or falls due, and
the next step is launched while the last one runs. A request that cannot be served ends alone with its reason; a step for
which there is no memory is called off and the batch shrinks. It knows no command line and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from engine.arrivals import Arrivals, ByTrace
from engine.clock import FOREVER_PS, PS_PER_NS, Clock
from engine.commands import Commands
from engine.prompts import Prompt, RequestError
from engine.runner import Runner
from policies import Policy, faults
from policies.cost import Cost
from policies.invariants import InvariantError, check, check_idle
from policies.journal import Journal, result
from policies.ledger import Ledger
from policies.plan import Plan, Work
from policies.view import Limits
from traces.record import STATUS, RunResult
from traces.request import NO_ADAPTER, Request, Trace

INTERRUPTED = "the replay was interrupted"
MOST_TURNS = 1_000_000
"""Decisions in a row that compute nothing. While a copy is under way there may be thousands a second, none of them wrong."""


@dataclass(frozen=True)
class EngineConfig:
    """What a replay depends on beside trace, policy and model.

    pages: KV pages of the pool, None: what the memory holds, times memory_share. adapter_bytes: memory of the adapters,
    None: what all of them need, up to a share of the memory. spare_adapters: how many may be added at run time. pins: names
    of adapters that are there from the start and never evicted. operator: None for the policy's own. targets: projections
    that adapters may touch. graphs: CUDA graphs of the steps. closed_loop: requests in flight, 0: they arrive by the trace.
    drain_s: the run ends so many seconds after the last arrival, None: with its last request.
    """

    limits: Limits = field(default_factory=Limits)
    operator: str | None = None
    page_tokens: int = 16
    pages: int | None = None
    memory_share: float = 1.0
    prefix_cache: bool = True
    adapter_bytes: int | None = None
    spare_adapters: int = 0
    pins: tuple[str, ...] = ()
    closed_loop: int = 0
    drain_s: float | None = None
    targets: tuple[str, ...] = ("qkv", "o")
    graphs: bool = True
    seed: int = 0
    keep_steps: bool = True
    check_invariants: bool = False


class Driver:
    """One run. runner None: nothing is computed, only decided (under a mocked clock).

    prompts: what requests say, by id; made up for the others. arrivals: where requests come from; by the trace's times if
    absent. drain_s: the run ends so long after the trace's last arrival. reasons: why requests failed, by id. stop: set it
    to end the run at the next step boundary. commands: done between two leases, soon; watchers: what to call between any
    two (`engine.residents`). gone: adapters taken out.
    """

    def __init__(self, trace: Trace, policy: Policy, ledger: Ledger, cost: Cost | None, journal: Journal, clock: Clock,
                 runner: Runner | None = None, *, prompts: dict[int, Prompt] | None = None, check_invariants: bool = False,
                 progress: Callable[[int, int], None] | None = None, arrivals: Arrivals | None = None,
                 drain_s: float | None = None):
        self.policy, self.ledger, self.cost, self.journal, self.clock = policy, ledger, cost, journal, clock
        self.runner = runner
        self.reasons: dict[int, str] = {}
        self.stop = False
        self.commands = Commands()
        self.watchers: list[Callable[[], None]] = []
        self.gone: set[int] = set()
        self.last_ps = 0  # when the last step ended
        self.last_arrival_ns = 0  # by the trace
        self.arrived = 0
        self._turns = 0  # decisions in a row that computed nothing
        self._prompts = prompts or {}
        self._check = check_invariants
        self._progress = progress
        self._arrivals = arrivals or ByTrace(trace)
        self._end_ps = FOREVER_PS
        if drain_s is not None and len(trace):
            self._end_ps = faults.end_ps(trace, drain_s)

    # -- what reaches it from outside -----------------------------------------------------------------------------------
    def _receive(self, *, between: bool = True) -> None:
        """Requests and adapters that have come by now. between: no lease is under way."""
        now_ps = self.clock.now_ps()
        if between or self._arrivals.by_time:
            while (request := self._arrivals.take(now_ps, len(self.ledger.entries))) is not None:
                self.arrived += 1
                if self._arrivals.by_time:
                    self.last_arrival_ns = request.arrival_ns
                self._arrive(request, now_ps // PS_PER_NS)
        for adapter in self.clock.loaded():
            self.ledger.loaded(adapter)
            if self.runner is not None:
                self.runner.lora.installed(adapter)

    def _arrive(self, request: Request, now_ns: int) -> None:
        reason = None
        if request.adapter >= len(self.ledger.pool.adapters) or request.adapter in self.gone:
            why = "was taken out" if request.adapter in self.gone else "does not exist"
            self.reasons[request.id] = f"its adapter {why}"
            faults.refuse(self.ledger, request)
            return
        if self.runner is not None:
            try:
                self.runner.admit(request, self._prompts.get(request.id))
            except RequestError as error:
                reason = str(error)
        if not self.ledger.enqueue(request):
            if self.runner is not None:
                self.runner.drop(request.id)
        elif reason is not None:
            self._fail(request.id, reason, now_ns)

    def fail(self, request: int, reason: str) -> None:
        """End one unfinished request, between two leases."""
        self._fail(request, reason, self.clock.now_ps() // PS_PER_NS)

    def _fail(self, request: int, reason: str, now_ns: int) -> None:
        self.reasons[request] = reason
        faults.fail(self.ledger, request, now_ns)
        if self.runner is not None:
            self.runner.drop(request)

    # -- the loop -------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Until every request has ended, or `stop`. Raises PlanError or InvariantError if the policy or engine is wrong."""
        try:
            self._loop()
        finally:
            self.commands.end()

    def _loop(self) -> None:
        while not self.stop:
            self.commands.do()
            for watch in self.watchers:
                watch()
            self._receive()
            if not self.ledger.has_work():
                if self._arrivals.done:
                    break
                self.clock.sleep(self._arrivals.next_ps())
                continue
            start_ps = self.clock.now_ps()
            if start_ps >= self._end_ps:
                self._cut_off(start_ps // PS_PER_NS)
                continue
            plan = self.policy.decide(self.ledger.view(start_ps // PS_PER_NS))
            if self._check:
                check_idle(self.ledger, plan)
            work = self.ledger.begin(plan, start_ps // PS_PER_NS)
            try:
                self._execute(plan, work, start_ps)
            except RequestError as error:
                self._call_off()
                self._fail(error.request, str(error), self.clock.now_ps() // PS_PER_NS)
            except torch.OutOfMemoryError:
                self._call_off()
                self._shrink(plan)
            if self._check:
                check(self.ledger, self.journal.ended)
                if self.runner is not None:
                    tables = {i: s.table for i, s in self.runner.sequences.items() if s.table is not None}
                    self.runner.cache.check(self.ledger, tables)
        for request in list(self.ledger.entries):
            self._fail(request, INTERRUPTED, self.clock.now_ps() // PS_PER_NS)

    def _execute(self, plan: Plan, work: Work, start_ps: int) -> None:
        for adapter in plan.loads:
            self.journal.counters["load_bytes"] += self._bytes_of(adapter)
            self.clock.start_load(adapter)
        if self.runner is not None:
            self.runner.begin(plan, self.ledger)
        if plan.decodes or plan.prefills:
            self._turns = 0
            self._lease(plan, work, start_ps)
            return
        self._turns += 1
        if self._turns > MOST_TURNS:
            raise InvariantError(f"policy {self.policy.name} decided {self._turns} times in a row and computed nothing")
        if not (plan.preempts or plan.aborts or plan.evicts):
            self._refuse_deadlock(plan)
            until_ps = self._until_ps(plan)
            self.clock.sleep(min(until_ps, self._arrivals.next_ps()))

    def _until_ps(self, plan: Plan) -> int:
        """When `plan` ends if nothing happens before."""
        return self._end_ps if plan.until_ns is None else min(self._end_ps, plan.until_ns * PS_PER_NS)

    def _cut_off(self, now_ns: int) -> None:
        for request in faults.cut_off(self.ledger, now_ns):
            if self.runner is not None:
                self.runner.drop(request)

    def _bytes_of(self, adapter: int) -> int:
        if self.runner is not None:
            return self.runner.loader.adapters[adapter].nbytes
        return self.cost.adapter_bytes(adapter)

    def _lease(self, plan: Plan, work: Work, start_ps: int) -> None:
        """Run the plan's steps up to the first boundary at or after the next event; then commit them."""
        ledger, runner, clock = self.ledger, self.runner, self.clock
        most = 1 if plan.prefills else ledger.lease_steps()
        until_ps = min(self._until_ps(plan), self._arrivals.next_ps())
        ends: list[int] = []
        launched, enqueued_ps, halt, loading = 0, start_ps, False, clock.loading()
        while True:
            while launched < most and launched - len(ends) < clock.depth and not halt:
                halt = not self._launched(launched)
                launched += not halt
                if launched == 1 and not ends and clock.depth > 1:  # else a launch is the step itself
                    enqueued_ps = clock.now_ps()
            if len(ends) == launched:
                break
            ends.append(clock.finish_step(work, len(ends)))
            halt = halt or self.stop or bool(self.commands) or clock.interrupted(until_ps)
        self._receive(between=False)  # before the commit, since it came before the end: the order of last use depends on it
        ledger.commit(launched, ends[0] // PS_PER_NS, ends[-1] // PS_PER_NS)
        self.last_ps = ends[-1]
        if runner is not None:
            runner.settle(ledger, launched)
        for begin_ps, end_ps in pairwise(ends):
            self.journal.gap_run(begin_ps, end_ps - begin_ps, 0, 1, work.decodes)
        self._write_step(plan, work, launched, start_ps, enqueued_ps)
        self.journal.detail(work, start_ps, ends[0] - start_ps, len(plan.loads), loading)
        if self._progress is not None:
            self._progress(self.journal.ended, launched * work.decodes + work.outputs - work.decodes)

    def _launched(self, number: int) -> bool:
        """Put step `number` of the lease on the device. False if there was no memory for it, unless it is the first."""
        if self.runner is None:
            return True
        try:
            self.runner.launch(self.ledger, number)
        except torch.OutOfMemoryError:
            if not number:
                raise
            return False  # the steps before it count
        return True

    def _write_step(self, plan: Plan, work: Work, steps: int, start_ps: int, enqueued_ps: int) -> None:
        """One row a lease. Where the time went is known as far as: vision and switch by the GPU's clock; host, what is left
        of the time until the first step was on the device; all else is under linear, the forward pass as a whole."""
        places = self.runner.places_ps() if self.runner is not None else {}
        duration_ps = self.last_ps - start_ps
        vision_ps = min(places.get("vision", 0), duration_ps)
        switch_ps = min(places.get("switch", 0), duration_ps - vision_ps)
        host_ps = max(0, min(enqueued_ps - start_ps, duration_ps) - vision_ps - switch_ps)
        linear_ps = duration_ps - vision_ps - switch_ps - host_ps
        self.journal.step((
            self.journal.server, start_ps, duration_ps, steps, plan.mode, plan.merged, work.decodes, len(work.prefills),
            work.prefill_tokens, work.images, work.adapters, work.context_tokens, linear_ps, 0, vision_ps, 0, host_ps,
            switch_ps,
        ))  # fmt: skip

    # -- faults -----------------------------------------------------------------------------------------------------------
    def _call_off(self) -> None:
        faults.call_off(self.ledger, self.clock.now_ps() // PS_PER_NS)
        self.runner.call_off()

    def _shrink(self, plan: Plan) -> None:
        """There was no memory for this step: smaller ones from now on; if they cannot be smaller, its requests fail."""
        if self.runner.last_tokens.is_cuda:
            torch.cuda.empty_cache()
        if not faults.shrink(self.ledger):
            for request in [*(request for request, _ in plan.prefills), *plan.decodes]:
                if request in self.ledger.entries:
                    self._fail(request, "no memory even for the smallest step", self.clock.now_ps() // PS_PER_NS)

    def _refuse_deadlock(self, plan: Plan) -> None:
        if not self.clock.loading() and plan.until_ns is None and self._arrivals.done:
            raise InvariantError(
                f"policy {self.policy.name} stands still with {len(self.ledger.entries)} unfinished requests, no copy under "
                f"way and no arrival to come"
            )


@dataclass(frozen=True)
class Part:
    """What one engine leaves for the record. end_ns: its last step, or the last arrival. reasons: by request."""

    journal: Journal
    end_ns: int
    peak_pages: int
    reasons: dict[int, str]

    @staticmethod
    def of(driver: Driver) -> Part:
        """That of a driver whose run is over."""
        end_ns = max(driver.last_ps // PS_PER_NS, driver.last_arrival_ns)
        return Part(driver.journal, end_ns, driver.ledger.pool.peak, driver.reasons)


def record(driver: Driver, trace: Trace, config: dict, *, operator: str, page_bytes: int,
           parts: list[Part] | None = None) -> RunResult:  # fmt: skip
    """What a run left behind, in the simulator's form. After an interruption only the requests that had arrived count.

    parts: of all engines of the run, where there were several.
    """
    pool = driver.ledger.pool
    parts = parts or [Part.of(driver)]
    counters = {
        "gpus": len(parts), "end_ns": max(part.end_ns for part in parts),
        "peak_pages": max(part.peak_pages for part in parts), "pool_pages": pool.pages, "page_bytes": page_bytes,
    }  # fmt: skip
    if pool.adapter_room is not None:
        counters["adapter_room_pages"] = pool.adapter_room
    notes = list(config["notes"])
    if config.get("engine", {}).get("closed_loop"):
        most = config["engine"]["closed_loop"]
        notes.append(f"closed loop: {most} requests in flight, the trace's arrival times are not used")
    arrived = sum(part.journal.ended for part in parts)
    if arrived < len(trace):
        notes.append(f"interrupted: {arrived} of {len(trace)} requests had arrived")
    reasons = sorted((request, reason) for part in parts for request, reason in part.reasons.items())
    notes += [f"request {request} failed: {reason}" for request, reason in reasons[:20]]
    if len(reasons) > 20:
        notes.append(f"{len(reasons) - 20} more requests failed")
    run = result([part.journal for part in parts], policy=driver.policy.name, operator=operator, counters=counters,
                 config=config | {"notes": notes})  # fmt: skip
    unfinished = int((run.requests["status"] == STATUS.index("unfinished")).sum())
    if unfinished:
        run.config["notes"].append(faults.note_on_cut_off(unfinished, len(trace), config["engine"]["drain_s"]))
    run.requests["task"] = trace.task[:arrived].astype(np.int64)
    return run


def resolved(trace: Trace, policy: Policy, config: EngineConfig, cost: Cost, model: dict, device: dict) -> dict:
    """The configuration as the record keeps it. model, device: facts for the reader."""
    profile = cost.profile
    return {
        "trace": {"source": trace.source, "sha256": trace.sha256, "format": trace.format, "settings": trace.settings},
        "profile": {"name": profile.name, "sha256": profile.sha256, "kind": profile.kind, "provenance": profile.provenance},
        "model": model["name"],
        "policy": {"name": policy.name, **asdict(policy)},
        "engine": asdict(replace(config, operator=config.operator or policy.operator)) | {"model": model, "device": device},
        "adapters": [{"name": adapter.name, "rank": adapter.rank} for adapter in trace.adapters],
        "seed": trace.settings.get("seed"),
        "notes": list(trace.notes),
    }


def stripped(trace: Trace, policy: Policy) -> Trace:
    """The trace as the policy serves it: without adapters for the base model."""
    if getattr(policy, "strips_adapters", False):
        return trace.with_(adapter=np.full(len(trace), NO_ADAPTER, np.int32))
    return trace

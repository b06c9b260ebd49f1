"""One simulated GPU: the shared loop over ledger and policy, with a latency model where the engine has a GPU.

A SimPy process; time is integer picoseconds. Adapter copies run beside the steps, one after another on one link. A lease is
jumped over in one go, up to the first step boundary at or after the next arrival anywhere, the next finished copy, or the
time the policy named; `leap=False` takes and decides every step singly, which must give the same result.

What the host does at the boundary of a lease is charged once a lease, in either way: a lease ends when its steps are used
up, something happened here (an arrival, a finished copy), or the policy's time came. With an engine's profile one more step
is under way by then; it still belongs to the lease.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import simpy
from simpy.events import URGENT, Event, Timeout

from policies import Policy, faults
from policies.boost import GpuClock
from policies.cost import Cost
from policies.invariants import InvariantError, check, check_idle, snapshot
from policies.journal import Journal
from policies.ledger import Ledger
from policies.plan import Plan, Work
from sim.latency import FOREVER_PS, Run, run
from traces.request import Request

PS_PER_NS = 1000
MOST_TURNS = 20_000  # decisions in a row at one instant that compute nothing; far more than requests run together


def at(env: Clock, time_ps: int, action: Callable[[Event], None]) -> None:
    """Call `action` at `time_ps`, before any step that ends at the same time: who decides then knows of it."""
    event = Event(env)
    event._ok, event._value = True, None
    event.callbacks.append(action)
    env.schedule(event, URGENT, time_ps - env.now)


class Clock(simpy.Environment):
    """SimPy's, for processes that know how long they are busy; all must have begun before one uses it."""

    def pass_to(self, time_ps: int) -> bool:
        """Move the clock to `time_ps` as a Timeout would, without one; what `at` ordered for before then happens meanwhile.
        False, and the clock perhaps on its way, where it takes a Timeout: another process goes on, or something happens at
        that very time."""
        queue = self._queue
        while queue and queue[0][0] <= time_ps:
            if queue[0][0] == time_ps or queue[0][1] != URGENT:
                return False
            self.step()
        self._now = time_ps
        return True


@dataclass(slots=True)
class Lease:
    """The plan that stands. left: steps of it that may still be taken. until_ps: when it ends if nothing happens before.
    slow_ps: what its steps take longer than the tables say, because of a copy under way or the clock. last_ps: when the last
    step taken began; -1 for the first, before which nothing is noticed."""

    plan: Plan
    left: int
    until_ps: int
    slow_ps: int
    last_ps: int


class Server:
    """One GPU under one policy. next_arrival_ps tells when anything arrives next anywhere (FOREVER_PS: never); top_up is
    called between two leases, and may let something arrive. end_ps: when the run ends, whoever is unfinished then."""

    def __init__(self, env: Clock, ledger: Ledger, policy: Policy, cost: Cost, journal: Journal,
                 next_arrival_ps: Callable[[], int], *, leap: bool = True, check_invariants: bool = False,
                 top_up: Callable[[], None] | None = None, end_ps: int = FOREVER_PS):
        self.env = env
        self.ledger = ledger
        self.policy = policy
        self.cost = cost
        self.journal = journal
        self.leap = leap
        self.check_invariants = check_invariants
        self.last_ps = 0  # when the last step ended
        self._next_arrival_ps = next_arrival_ps
        self._top_up = top_up
        self._end_ps = end_ps
        self._asleep: Event | None = None
        self._ahead = cost.profile.steps_ahead
        self._turns = (-1, 0)  # (time of the last decision that computed nothing, how many in a row at that time)
        self._link_free_ps = 0
        self._next_load_ps = FOREVER_PS
        self._loads: list[int] = []  # times at which copies end, ascending
        self._started = 0  # copies since the last lease began
        self._lease: Lease | None = None
        self._busy_ps = -1  # until when steps were computed
        self._stirred_ps = FOREVER_PS  # when something first happened here since the lease began
        self._clock = GpuClock(cost.profile.boost)
        self.process = env.process(self._serve())
        if end_ps < FOREVER_PS:
            at(env, end_ps, lambda _: self._wake())

    # -- what reaches it from outside -----------------------------------------------------------------------------------
    def arrive(self, request: Request) -> None:
        """A request is routed here, now."""
        self._stirred_ps = min(self._stirred_ps, self.env.now)
        if self.ledger.enqueue(request):
            self._wake()

    def _loaded(self, adapter: int) -> None:
        self._stirred_ps = min(self._stirred_ps, self.env.now)
        self.ledger.loaded(adapter)
        self._loads.pop(0)
        self._next_load_ps = self._loads[0] if self._loads else FOREVER_PS
        self._wake()

    def _wake(self) -> None:
        if self._asleep is not None:
            asleep, self._asleep = self._asleep, None
            asleep.succeed()

    # -- the loop -------------------------------------------------------------------------------------------------------
    def _serve(self):
        env, ledger, policy, ahead = self.env, self.ledger, self.policy, self._ahead
        entries = ledger.entries
        yield Timeout(env, 0)  # what arrives at time 0 comes first, as at any other time
        while True:
            if self._top_up is not None:
                self._top_up()
            while not entries:  # a copy that arrives late wakes it, too
                yield self._sleep(None)
            start_ps = env.now
            now_ns = start_ps // PS_PER_NS
            lease, trailing = self._lease, False
            if lease is not None:
                event_ps = min(self._stirred_ps, lease.until_ps)
                trailing = ahead > 0 and lease.last_ps < event_ps <= start_ps
                if event_ps <= start_ps and not trailing:
                    lease = self._lease = None
            if trailing:
                plan = lease.plan  # the step was under way when it happened
            elif start_ps >= self._end_ps:
                faults.cut_off(ledger, now_ns)
                continue
            else:
                plan = self._decide_watched(now_ns) if self.check_invariants else policy.decide(ledger.view(now_ns))
            work = ledger.begin(plan, now_ns)
            if plan.loads:
                self._start_loads(plan.loads)
            if not plan.decodes and not plan.prefills:
                self._refuse_standstill(start_ps)
                moved = plan.preempts or plan.aborts or plan.evicts
                if not moved:
                    self._refuse_deadlock(plan)
                    yield self._sleep(plan.until_ns)
                continue
            jump = self._run(plan, work, lease, trailing, start_ps)
            end_ps = start_ps + jump.total_ps
            if not env.pass_to(end_ps):
                yield Timeout(env, end_ps - env.now)
            self._commit(plan, work, jump, start_ps, end_ps)

    def _run(self, plan: Plan, work: Work, lease: Lease | None, trailing: bool, start_ps: int) -> Run:
        """Model what comes next, of a new lease where there is none, else of that one; note what is left of it."""
        cost, boundary_ps, steps = self.cost, 0, self.ledger.lease_steps()
        if lease is None:
            if cost.has_host:
                idle = self._busy_ps != start_ps
                boundary_ps = cost.lease_ps(work, self._started, idle=idle)
            copies_ps = self._link_free_ps - start_ps if self._loads else 0
            slow_ps = self._clock.slow_ps(cost, work, start_ps + boundary_ps, copies_ps)
            self._stirred_ps, self._started = FOREVER_PS, 0
            until_ps = self._end_ps if plan.until_ns is None else min(self._end_ps, plan.until_ns * PS_PER_NS)
        else:
            steps, until_ps, slow_ps = min(steps, lease.left), lease.until_ps, lease.slow_ps
        if trailing or not self.leap:
            jump = run(cost, work, 1, 0, boundary_ps, slow_ps)
        else:
            wake_ps = min(until_ps, self._next_arrival_ps(), self._next_load_ps)
            jump = run(cost, work, steps, wake_ps - start_ps, boundary_ps, slow_ps, self._ahead)
        self._lease = None
        if jump.steps < steps:
            last_ps = -1 if lease is None and jump.steps == 1 else start_ps + jump.total_ps - jump.last_ps
            self._lease = Lease(plan, steps - jump.steps, until_ps, slow_ps, last_ps)
        return jump

    def _decide_watched(self, now_ns: int) -> Plan:
        """A decision that is proved to change nothing, and to leave nothing idle that could run."""
        before = snapshot(self.ledger)
        plan = self.policy.decide(self.ledger.view(now_ns))
        if snapshot(self.ledger) != before:
            raise InvariantError(f"policy {self.policy.name} changed the ledger while it decided")
        if self.last_ps > self.env.now:
            raise InvariantError(f"the clock went back from {self.last_ps} ps to {self.env.now} ps")
        check_idle(self.ledger, plan)
        return plan

    def _commit(self, plan: Plan, work: Work, jump: Run, start_ps: int, end_ps: int) -> None:
        journal = self.journal
        self.last_ps = self._busy_ps = end_ps
        self.ledger.commit(jump.steps, (start_ps + jump.first_ps) // PS_PER_NS, end_ps // PS_PER_NS)
        decodes = work.decodes
        for begin_ps, first_ps, growth_ps, steps in jump.pieces:
            journal.gap_run(start_ps + begin_ps, first_ps, growth_ps, steps, decodes)
        journal.step((
            journal.server, start_ps, jump.total_ps, jump.steps, plan.mode, plan.merged, decodes, len(work.prefills),
            work.prefill_tokens, work.images, work.adapters, work.context_tokens, *jump.parts,
        ))  # fmt: skip
        if self.check_invariants:
            check(self.ledger, journal.ended)

    def _start_loads(self, adapters: tuple[int, ...]) -> None:
        self._started += len(adapters)
        for adapter in adapters:
            begin_ps = max(self._link_free_ps, self.env.now)
            self._link_free_ps = begin_ps + self.cost.load_ns(adapter) * PS_PER_NS
            self._loads.append(self._link_free_ps)
            self.journal.counters["load_bytes"] += self.cost.adapter_bytes(adapter)
            at(self.env, self._link_free_ps, lambda _, adapter=adapter: self._loaded(adapter))
        self._next_load_ps = self._loads[0]

    def _sleep(self, until_ns: int | None) -> Event:
        self._asleep = Event(self.env)
        if until_ns is not None:
            asleep = self._asleep
            at(self.env, max(until_ns * PS_PER_NS, self.env.now), lambda _: self._wake() if asleep is self._asleep else None)
        return self._asleep

    def _refuse_standstill(self, now_ps: int) -> None:
        since_ps, turns = self._turns
        self._turns = (now_ps, turns + 1 if since_ps == now_ps else 1)
        if turns > MOST_TURNS:
            raise InvariantError(
                f"policy {self.policy.name} decides again and again at {now_ps // PS_PER_NS} ns and computes nothing"
            )

    def _refuse_deadlock(self, plan: Plan) -> None:
        if not self._loads and plan.until_ns is None and self._next_arrival_ps() == FOREVER_PS:
            raise InvariantError(
                f"policy {self.policy.name} stands still with {len(self.ledger.entries)} unfinished requests, no copy under "
                f"way and no arrival to come"
            )

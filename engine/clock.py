"""Two clocks for one loop: the wall's, on which the GPU works, and a mocked one that a cost table moves.

Under the mocked clock the engine takes exactly the decisions that the simulator takes for the same trace, policy and table;
with a runner it also computes, at leisure. Times are integer picoseconds from the start. Neither knows a policy.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from engine.runner import Runner
from policies.boost import GpuClock
from policies.cost import Cost
from policies.plan import Work

PS_PER_NS = 1000
FOREVER_PS = 1 << 62
NAP_S = 0.0001
"""While a copy is under way and nothing else can be done, look again after this."""


class Clock(Protocol):
    """depth: steps that may be under way at once."""

    depth: int

    def now_ps(self) -> int:
        """The time."""

    def start_load(self, adapter: int) -> None:
        """The copy of an adapter begins now."""

    def loaded(self) -> list[int]:
        """Adapters whose copies have finished since the last call, in order."""

    def loading(self) -> bool:
        """True while a copy is under way."""

    def interrupted(self, until_ps: int) -> bool:
        """True if it is `until_ps` or later, or a copy has finished."""

    def finish_step(self, work: Work, number: int) -> int:
        """Wait for step `number` of a lease (0 the first); the time it ended."""

    def sleep(self, until_ps: int) -> None:
        """Let time pass until `until_ps` or, sooner, until a copy has finished."""


class WallClock:
    """Real time, from when it is made; `runner` does the work."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.depth = 2 if runner.last_tokens.is_cuda else 1
        self._zero_ns = time.perf_counter_ns()

    def now_ps(self) -> int:
        return (time.perf_counter_ns() - self._zero_ns) * PS_PER_NS

    def start_load(self, adapter: int) -> None:
        """`Runner.begin` started it."""

    def loaded(self) -> list[int]:
        return self._runner.loader.ready()

    def loading(self) -> bool:
        return self._runner.loader.busy()

    def interrupted(self, until_ps: int) -> bool:
        return self.now_ps() >= until_ps or self._runner.loader.any_ready()

    def finish_step(self, work: Work, number: int) -> int:
        self._runner.collect()
        return self.now_ps()

    def sleep(self, until_ps: int) -> None:
        left_s = (until_ps - self.now_ps()) / 1e12
        if self.loading():
            left_s = min(left_s, NAP_S)
        if left_s > 0:
            time.sleep(min(left_s, 0.1))  # a signal must not wait for the next arrival


class MockedClock:
    """Time moves by what `cost` says a step, a lease's boundary and a copy take, as in the simulator. runner: None, or what
    computes the steps meanwhile."""

    def __init__(self, cost: Cost, runner: Runner | None = None):
        self.depth = 1 + cost.profile.steps_ahead
        self._cost = cost
        self._runner = runner
        self._now_ps = 0
        self._end_ps = -1  # of the last step
        self._started = 0  # copies since the last lease began
        self._slow_ps = 0  # what each step of the lease takes longer because of a copy or the clock
        self._clock = GpuClock(cost.profile.boost)
        self._link_free_ps = 0
        self._loads: deque[tuple[int, int]] = deque()  # (end, adapter)

    def now_ps(self) -> int:
        return self._now_ps

    def start_load(self, adapter: int) -> None:
        self._started += 1
        begin_ps = max(self._link_free_ps, self._now_ps)
        self._link_free_ps = begin_ps + self._cost.load_ns(adapter) * PS_PER_NS
        self._loads.append((self._link_free_ps, adapter))

    def loaded(self) -> list[int]:
        done = []
        while self._loads and self._loads[0][0] <= self._now_ps:
            done.append(self._loads.popleft()[1])
        if self._runner is not None and done:
            self._runner.loader.drain()
        return done

    def loading(self) -> bool:
        return bool(self._loads)

    def interrupted(self, until_ps: int) -> bool:
        return self._now_ps >= min(until_ps, self._next_load_ps())

    def finish_step(self, work: Work, number: int) -> int:
        if self._runner is not None:
            self._runner.collect()
        cost = self._cost
        if number == 0:
            copies_ps = self._link_free_ps - self._now_ps if self._loads else 0
            idle = self._end_ps != self._now_ps
            self._now_ps += cost.lease_ps(work, self._started, idle=idle)
            self._slow_ps = self._clock.slow_ps(cost, work, self._now_ps, copies_ps)
            self._started = 0
        self._now_ps += cost.step_ps(work, number, self._slow_ps)
        self._end_ps = self._now_ps
        return self._now_ps

    def sleep(self, until_ps: int) -> None:
        self._now_ps = max(self._now_ps, min(until_ps, self._next_load_ps()))

    def _next_load_ps(self) -> int:
        return self._loads[0][0] if self._loads else FOREVER_PS

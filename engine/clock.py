"""Two clocks for one loop: the wall's, on which the GPU works, and a mocked one that a cost table moves.

Under the mocked clock the engine takes exactly the decisions that the simulator takes for the same trace, policy and table;
with a runner it also computes, at leisure. Times are integer picoseconds from the start. Neither knows a policy.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from engine.runner import Runner
from policies.cost import Cost
from policies.plan import Work

PS_PER_NS = 1000
FOREVER_PS = 1 << 62
NAP_S = 0.0005
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
    """Real time; `runner` does the work. Starts at the first call of `start`."""

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
    """Time moves by what `cost` says a step and a copy take. runner: None, or what computes the steps meanwhile."""

    depth = 1

    def __init__(self, cost: Cost, runner: Runner | None = None):
        self._cost = cost
        self._runner = runner
        self._now_ps = 0
        self._link_free_ps = 0
        self._loads: deque[tuple[int, int]] = deque()  # (end, adapter)

    def now_ps(self) -> int:
        return self._now_ps

    def start_load(self, adapter: int) -> None:
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
        linear, attention, vision, lora, host, switch = self._cost.fixed(work)
        step = linear + lora + host + (attention + vision + switch if number == 0 else 0)
        if work.decodes:
            step += self._cost.attention_at(work.decodes, work.context_tokens + number * work.decodes)
        self._now_ps += step
        return self._now_ps

    def sleep(self, until_ps: int) -> None:
        self._now_ps = max(self._now_ps, min(until_ps, self._next_load_ps()))

    def _next_load_ps(self) -> int:
        return self._loads[0][0] if self._loads else FOREVER_PS

"""Where a replay's requests come from: at the trace's times, or one when another ends.

`Driver` asks `take` for what has come; `engine.parallel` has a third source, a share of the trace. It knows times and
counts, no ledger.
"""

from __future__ import annotations

from typing import Protocol

from engine.clock import FOREVER_PS, PS_PER_NS
from traces.request import Request, Trace


class Arrivals(Protocol):
    """by_time: requests may come while steps run; else only between two leases. done: nothing more will come."""

    by_time: bool
    done: bool

    def next_ps(self) -> int:
        """When to look again, at the latest."""

    def take(self, now_ps: int, in_flight: int) -> Request | None:
        """The next request that has come by now, where there is one. in_flight: requests that are not finished."""


class ByTrace:
    """Each request at its time (an open loop)."""

    by_time = True

    def __init__(self, trace: Trace):
        self._requests = trace.requests()
        self._next = next(self._requests, None)

    @property
    def done(self) -> bool:
        return self._next is None

    def next_ps(self) -> int:
        return FOREVER_PS if self._next is None else self._next.arrival_ns * PS_PER_NS

    def take(self, now_ps: int, in_flight: int) -> Request | None:
        return self._pop() if self.next_ps() <= now_ps else None

    def _pop(self) -> Request:
        request, self._next = self._next, next(self._requests, None)
        return request


class ClosedLoop(ByTrace):
    """Always `most` requests in flight, in the trace's order; the trace's times are not used. A request arrives between the
    leases before and after it, as in the simulator."""

    by_time = False

    def __init__(self, trace: Trace, most: int):
        if most < 1:
            raise ValueError(f"--closed-loop {most} keeps no request in flight; at least 1")
        super().__init__(trace)
        self._most = most

    def next_ps(self) -> int:
        return FOREVER_PS

    def take(self, now_ps: int, in_flight: int) -> Request | None:
        if self._next is None or in_flight >= self._most:
            return None
        return self._pop()._replace(arrival_ns=now_ps // PS_PER_NS)

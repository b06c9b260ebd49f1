"""How much faster than its tables a GPU computes prompts before its clock has settled.

A GPU at its limit of power lowers its clock within tens of milliseconds, and raises it again when there is less to compute.
Tables are measured step after step, so at the lower clock; in a replay a step of prompts often comes after decodes, which
wait for memory and draw less. The state is one number, 1 when settled: it goes to 1 exponentially while prompts are
computed and to 0 otherwise, with a time constant each way (an H200 settles in 64 to 90 ms and rests in 23). What a step's
products of matrices take is their tables' time times a factor between `rested` and `settled`, by the mean of the state while
it lasts. Branches of adapters and the attention of decodes, which wait for memory or for each other, keep their time, and
the clock rests for as long. The vision tower is nothing but such products, with factors of its own; its smaller matrices
draw less, so that it counts as VISION_LOAD of a load.

The state moves only with steps of prompts, so that it does not depend on how a run of decodes is cut into pieces. Simulator
and engine's mocked clock share it. It knows nothing of watts: decodes count as rest, however many.
"""

from __future__ import annotations

from bisect import bisect_right
from math import exp

from policies.cost import PS_PER_US, Cost
from policies.plan import Work
from policies.profile import Boost, Points

VISION_LOAD = 0.5
"""With which, of 0 to 1 in quarters, the steps of three models' profiles on an H200 were reproduced best."""


def factor_at(points: Points, tokens: float) -> float:
    """A factor, linear between its points and constant beyond them."""
    if tokens <= points[0][0]:
        return points[0][1]
    if tokens >= points[-1][0]:
        return points[-1][1]
    i = bisect_right(points, (tokens, float("inf")))
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    return y0 + (tokens - x0) / (x1 - x0) * (y1 - y0)


class GpuClock:
    """One GPU's clock. boost: what a profile says of it, None where it says nothing: then tables hold as they are."""

    def __init__(self, boost: Boost | None):
        self._boost = boost
        taus_us = (boost.settle_us, boost.rest_us) if boost else (1.0, 1.0)
        self._settle_ps, self._rest_ps = (tau_us * PS_PER_US for tau_us in taus_us)
        self._state, self._at_ps = 0.0, 0  # when the last step of prompts ended

    def state(self, start_ps: float) -> float:
        """At a time after the last step of prompts."""
        return self._state * exp(min(0.0, (self._at_ps - start_ps) / self._rest_ps))

    def mean(self, start_ps: float, took_ps: float, share: float = 1.0) -> float:
        """Of the state over a step that computes hard for `share` of its time."""
        away, lasts = self._way(start_ps, took_ps, share)
        return share + away * ((1 - exp(-lasts)) / lasts if lasts > 0 else 1)

    def ran(self, start_ps: float, took_ps: float, share: float = 1.0) -> None:
        """Such a step was computed."""
        away, lasts = self._way(start_ps, took_ps, share)
        self._state = share + away * exp(-lasts)
        self._at_ps = start_ps + took_ps

    def _way(self, start_ps: float, took_ps: float, share: float) -> tuple[float, float]:
        """How far the state is from where such a step takes it, and the step's time in time constants of that way."""
        away = self.state(start_ps) - share
        return away, took_ps / (self._settle_ps if away < 0 else self._rest_ps)

    def slow_ps(self, cost: Cost, work: Work, begin_ps: int, copies_ps: int = 0) -> int:
        """What the first step of `work`, on the GPU from begin_ps on, takes more (below 0: less) than its tables say: by its
        clock, and beside copies of adapters that go on for copies_ps, which slow it down only as long as they do."""
        slowdown = cost.profile.load_slowdown
        beside = round(min(cost.step_ps(work), copies_ps) * slowdown) if slowdown and copies_ps > 0 else 0
        return beside + self.extra_ps(cost, work, begin_ps)

    def extra_ps(self, cost: Cost, work: Work, start_ps: int) -> int:
        """`slow_ps` of the clock alone."""
        boost = self._boost
        if boost is None or not work.prefills:
            return 0
        _, _, vision_ps, _, _, switch_ps = cost.fixed(work)
        tower = self._hard(start_ps + switch_ps, vision_ps, 0, boost.vision_rested, boost.vision_settled, VISION_LOAD)
        hard_ps, rest_ps = cost.forward_ps(work)
        tokens = work.decodes + work.prefill_tokens
        rested, settled = (factor_at(points, tokens) for points in (boost.rested, boost.settled))
        return tower + self._hard(start_ps + switch_ps + vision_ps + tower, hard_ps, rest_ps, rested, settled)

    def _hard(self, start_ps: int, hard_ps: int, rest_ps: int, rested: float, settled: float, load: float = 1.0) -> int:
        """What something that computes hard for hard_ps, and for rest_ps not, takes more than that; it has then run."""
        table_ps = hard_ps + rest_ps
        if hard_ps <= 0:
            return 0
        share = load * hard_ps / table_ps
        extra = round(hard_ps * (rested + (settled - rested) * self.mean(start_ps, table_ps, share) - 1))
        self.ran(start_ps, table_ps + extra, share)
        return extra

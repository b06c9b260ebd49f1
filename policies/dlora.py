"""dLoRA: merged or unmerged by credits and adaptive thresholds (OSDI 2024, section 4).

Each iteration compares the requests of the most common adapter with an FCFS batch: unmerged turns to merged when they
reach merge_right x |FCFS batch|, merged turns back when they fall under merge_left x |FCFS batch| or when another
adapter starves. Every change of mode adapts both thresholds by AIMD, by which mode's estimated throughput was better.
Starving adapters (credit over a threshold) are served first, in unmerged batches.

Simplified: an adapter's credit is the time that its requests went without progress, instead of the iterations' time
transferred from the adapters that ran; the paper's threshold of credits becomes `credit_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from policies.batching import Batch, by_urgency, lease_end, most_common, prefetch, starving
from policies.plan import MERGED, UNMERGED, Plan
from policies.view import View


class Thresholds(NamedTuple):
    """Shares of the FCFS batch at which the mode turns."""

    merge_right: float
    merge_left: float


@dataclass(frozen=True)
class DLora:
    """credit_s: seconds without progress after which an adapter starves. merge_right, merge_left: initial thresholds."""

    credit_s: float = 0.5
    merge_right: float = 1.0
    merge_left: float = 0.556

    name = "dlora"
    operator = "dlora"
    switch = "addmm"
    merges = True
    oracle = False

    def decide(self, view: View) -> Plan:
        """One iteration of the credit-based batching."""
        thresholds = view.memo or Thresholds(self.merge_right, self.merge_left)
        fcfs = min(view.limits.max_batch, view.total)
        most = most_common(view)
        count = min(view.unfinished.get(most, 0), view.limits.max_batch)
        waited_long, until_ns = starving(view, int(self.credit_s * 1e9), most, 0)
        urgent = [entry for entry in waited_long if entry.adapter != most]
        merged = view.mode == MERGED and view.merged == most
        threshold = thresholds.merge_left if merged else thresholds.merge_right
        merge = most >= 0 and view.is_resident(most) and not urgent and count >= threshold * fcfs
        if merge:
            batch = Batch(view, by_urgency(view, waited_long, view.decoding_of(most)), MERGED, most)
            batch.fill(view.queue_of(most))
        if not merge or batch.is_empty:  # empty: the others, paused, hold the memory
            batch = Batch(view, by_urgency(view, waited_long, view.decoding)).fill(view.queue())
        if batch.is_empty:  # whom it made room for could not start
            batch = Batch(view, view.decoding).fill(view.queue())
        prefetch(batch, urgent, len(urgent))  # a full batch reaches nobody who waits, and so loads nothing for them
        if (batch.mode == MERGED) != (view.mode == MERGED) and not batch.is_empty:
            thresholds = self._adapt(view, thresholds, most, count, fcfs)
        return batch.plan(until_ns=lease_end(batch, until_ns), memo=thresholds)

    @staticmethod
    def _adapt(view: View, thresholds: Thresholds, most: int, count: int, fcfs: int) -> Thresholds:
        """AIMD: make the mode with the higher estimated tokens per second easier to reach and the other one harder."""
        adapters = min(len(view.unfinished), fcfs)
        merged_rate = count / max(1, view.cost.step_ns(count, mode=MERGED))
        unmerged_rate = fcfs / max(1, view.cost.step_ns(fcfs, adapters, mode=UNMERGED))
        if merged_rate > unmerged_rate:
            return Thresholds(max(0.0, thresholds.merge_right - 0.05), thresholds.merge_left / 1.1)
        return Thresholds(min(1.0, thresholds.merge_right * 1.1), min(1.0, thresholds.merge_left + 0.05))

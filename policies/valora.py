"""VaLoRA: merged, unmerged and mixture modes by Algorithm 1 (EuroSys 2025, section 4).

credit(r) = time waited + estimated execution time in the current mode + switch latency where one is needed;
R_starve = requests whose credit exceeds theta; R_merge = requests of the most common adapter m. If at most half of MaxBS
starve and R_merge fills more than half of it: merged on m, or mixture (R_starve first, then R_merge) where somebody
starves. Otherwise unmerged: R_starve first, then the rest in order.

Our reading under continuous batching: R is every unfinished request, waiting or running. Time waited runs since a request
last made progress; one that mixture mode took up goes on until it ends. In merged mode the others pause with their KV
kept, and so do the newest of a full batch for the few that starve for their prefill. Simplified: the estimated execution
time is that of one decode step, since output lengths are hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.batching import Batch, by_urgency, lease_end, most_common, only_decode, prefetch, starving, unmerged
from policies.plan import MERGED, MIXTURE, Plan
from policies.view import DECODING, Entry, View


@dataclass(frozen=True)
class Valora:
    """theta_s: credit in seconds above which a request starves. prefetch: waiting requests whose adapters load ahead.

    For ablations: merge, mixture: whether these modes are used (without mixture a batch with cold requests runs unmerged);
    switch: how it folds adapters in.
    """

    theta_s: float = 0.5
    prefetch: int = 32
    merge: bool = True
    mixture: bool = True
    switch: str = "fused"

    name = "valora"
    operator = "atmm"
    merges = True
    oracle = False

    def decide(self, view: View) -> Plan:
        """Algorithm 1."""
        half = view.limits.max_batch / 2
        if view.total <= half or not self.merge:
            return self._unmerged(view)
        most = most_common(view)
        if most < 0 or view.unfinished[most] <= half or not view.is_resident(most):
            return self._unmerged(view)
        waited_long, until_ns = starving(view, self._patience_ns(view), most, half)
        taken_up = set()
        if view.mode == MIXTURE and view.merged == most:
            taken_up = {r for r in view.decoding if not view.is_paused(r)}.difference(view.decoding_of(most))
        cold = taken_up.union(entry.id for entry in waited_long if entry.adapter != most)
        fold = len(cold) <= half and (self.mixture or not cold)
        batch = self._folded(view, most, cold, waited_long) if fold else None
        if batch is None or batch.is_empty:  # empty: the others, paused, hold the memory
            batch = unmerged(view, waited_long)
        prefetch(batch, view.waiting, self.prefetch)
        return batch.plan(until_ns=lease_end(batch, until_ns))

    @staticmethod
    def _folded(view: View, most: int, cold: set[int], waited_long: list[Entry]) -> Batch:
        """Merged on `most`; mixture, the cold first, where there are any."""
        if not cold:
            batch = Batch(view, by_urgency(view, waited_long, view.decoding_of(most)), MERGED, most)
            return batch.fill(view.queue_of(most))
        cold_decodes = tuple(request for request in view.decoding if request in cold)
        first = [*map(view.entry, cold_decodes), *waited_long]
        batch = Batch(view, by_urgency(view, first, cold_decodes + view.decoding_of(most)), MIXTURE, most)
        urgent = {entry.id: entry for entry in waited_long if entry.state != DECODING}
        return batch.fill(urgent.values()).fill(entry for entry in view.queue_of(most) if entry.id not in urgent)

    def _unmerged(self, view: View) -> Plan:
        if len(view.decoding) + view.queued <= view.limits.max_batch:
            if not view.queued:
                return only_decode(view)
            batch, until_ns = Batch(view, view.decoding).fill(view.queue()), None
        else:
            urgent, until_ns = starving(view, self._patience_ns(view))
            batch = unmerged(view, urgent)
            until_ns = lease_end(batch, until_ns)
        prefetch(batch, view.waiting, self.prefetch)
        return batch.plan(until_ns=until_ns)

    def _patience_ns(self, view: View) -> int:
        """Time without progress after which credit exceeds theta."""
        switch_ns = view.cost.switch_ns(view.merged) if view.merged >= 0 else 0
        return max(0, int(self.theta_s * 1e9) - view.cost.step_ns(1, mode=view.mode) - switch_ns)

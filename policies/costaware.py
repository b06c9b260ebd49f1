"""Cost-aware: ours. VaLoRA's modes, chosen by what the cost tables predict instead of by counts, and nobody ever pauses.

Algorithm 1 of VaLoRA merges when one adapter fills half a batch and lets the others wait until they starve. That pays where
the LoRA branch is dear. With a cheap branch a paused request loses more than the others gain, so here every request runs in
every step, first come, first served; the only question is which weights make that step cheapest: unmerged, or the most
common adapter folded in and the others' branches paid twice (mixture; merged when all ask for it). A fold is taken up when
it saves more than its switch costs within `horizon_s`, and kept as long as it saves anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.batching import Batch, lease_end, most_common, prefetch
from policies.plan import MERGED, MIXTURE, UNMERGED, Plan
from policies.view import View


@dataclass(frozen=True)
class CostAware:
    """horizon_s: seconds within which a switch has to pay. prefetch: waiting requests whose adapters load ahead."""

    horizon_s: float = 0.25
    prefetch: int = 32

    name = "cost-aware"
    operator = "atmm"
    switch = "fused"
    merges = True
    oracle = False

    def decide(self, view: View) -> Plan:
        """The cheapest weights for serving everybody."""
        mode, merged = self._weights(view)
        batch = Batch(view, view.decoding, mode, merged).fill(view.queue())
        if batch.is_empty:  # the folded adapter holds the memory that somebody else needs
            batch = Batch(view, view.decoding).fill(view.queue())
        prefetch(batch, view.waiting, self.prefetch)
        return batch.plan(until_ns=lease_end(batch, None))

    def _weights(self, view: View) -> tuple[int, int]:
        """(mode, folded adapter) with the least predicted time of a step, counting a switch over the horizon."""
        best = most_common(view)
        if best < 0 or not view.is_resident(best):
            return UNMERGED, -1
        batch = min(view.total, view.limits.max_batch)
        cold = round(batch * (1 - view.unfinished[best] / view.total))
        folded = MIXTURE if view.total > view.unfinished[best] else MERGED
        adapters = len(view.unfinished) - (-1 in view.unfinished)
        unmerged_ns = view.cost.step_ns(batch, adapters, mode=UNMERGED)
        folded_ns = view.cost.step_ns(batch, adapters, mode=folded, cold=cold)
        saved = 1 - folded_ns / unmerged_ns
        switch_ns = 0 if view.merged == best else view.cost.switch_ns(best)
        if saved > 0 and saved * self.horizon_s * 1e9 > switch_ns:
            return folded, best
        return UNMERGED, -1

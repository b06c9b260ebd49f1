"""Merged only: one adapter at a time, folded into the weights; whole adapters are swapped, first come, first served.

What serving LoRA without any batching operator comes to (PEFT's merge_adapter, done well). The adapter of the oldest
unfinished request is folded in and serves all its requests, new ones too, until that oldest request has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.batching import Batch, prefetch
from policies.plan import MERGED, UNMERGED, Plan
from policies.view import View


@dataclass(frozen=True)
class MergedOnly:
    """prefetch: waiting requests whose adapters load ahead."""

    prefetch: int = 8

    name = "merged-only"
    operator = "none"
    switch = "addmm"
    merges = True
    oracle = False

    def decide(self, view: View) -> Plan:
        """Serve the adapter of the oldest request."""
        oldest = view.oldest
        adapter = oldest.adapter
        if adapter < 0:  # requests of the base model run on restored weights, and alone like any other adapter's
            batch = Batch(view, view.decoding_of(-1), UNMERGED).fill(view.queue_of(-1))
        elif view.is_resident(adapter):
            batch = Batch(view, view.decoding_of(adapter), MERGED, adapter).fill(view.queue_of(adapter))
        else:
            batch = Batch(view, ())
            batch.load(adapter)
        prefetch(batch, view.waiting, self.prefetch)
        return batch.plan()

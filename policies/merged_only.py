"""Merged only: one adapter at a time, folded into the weights; whole adapters are swapped, first come, first served.

What serving LoRA without any batching operator comes to (PEFT's merge_adapter, done well). The adapter of the oldest
unfinished request is folded in and serves all its requests, new ones too, until that oldest request has ended; while its
copy is under way another adapter goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.batching import Batch, prefetch
from policies.plan import MERGED, Plan
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
        adapter = view.oldest.adapter
        batch = self._serve(view, adapter) if view.is_resident(adapter) else None
        if batch is None or batch.is_empty:  # its copy is under way, or the others, paused, hold the memory
            batch = self._meanwhile(view, adapter)
        prefetch(batch, view.waiting, self.prefetch)
        return batch.plan()

    @staticmethod
    def _serve(view: View, adapter: int, first: int = -1) -> Batch:
        """Everything of `adapter`, and a copy of `first` started if there is one to come. Requests of the base model run on
        restored weights, and alone like any other adapter's."""
        decodes = view.decoding_of(adapter)
        batch = Batch(view, decodes, MERGED, adapter) if adapter >= 0 else Batch(view, decodes)
        if first < 0 or batch.load(first):
            return batch.fill(view.queue_of(adapter))
        return batch.fill(entry for entry in view.prefilling if entry.adapter == adapter)

    def _meanwhile(self, view: View, first: int) -> Batch:
        """Another adapter goes on: the folded one, else the most common. None starts anew while `first` lacks memory."""
        for adapter in sorted(view.unfinished, key=lambda m: (m != view.merged, -view.unfinished[m], m)):
            if adapter != first and view.is_resident(adapter):
                batch = self._serve(view, adapter, first)
                if not batch.is_empty:
                    return batch
        batch = Batch(view, ())
        batch.load(first)
        return batch

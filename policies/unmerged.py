"""The policies that never merge: S-LoRA, Punica, vLLM's adapter slots, and the base model.

All serve first come, first served with continuous batching and chunked prefill; they differ in what they do about
adapters. S-LoRA (MLSys 2024): adapters of waiting requests are prefetched into the unified pool; under an SLO it aborts
early the requests that can no longer meet it. Punica (MLSys 2024): an adapter's copy starts when the request's turn comes,
overlapped with the running batch. vLLM: at most `max_loras` adapters in a step; the scheduler looks past requests whose
adapter finds no slot. Simplified: S-LoRA's adapter clustering is off (it trades latency for throughput).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from policies.batching import Batch, only_decode, prefetch
from policies.plan import BASE, Plan
from policies.view import Entry, View


@dataclass(frozen=True)
class SLora:
    """prefetch: waiting requests whose adapters load ahead."""

    prefetch: int = 32

    name = "slora"
    operator = "slora"
    switch = "fused"
    merges = False
    oracle = False

    def decide(self, view: View) -> Plan:
        """FCFS, admission by early abort, prefetch."""
        if not view.queued:
            return only_decode(view)
        batch = Batch(view, view.decoding)
        last_ns: list[int] = []
        batch.fill(self._hopeful(view, batch, last_ns))
        prefetch(batch, (entry for entry in view.waiting if entry.id not in batch.aborts), self.prefetch)
        return batch.plan(until_ns=min(last_ns) + 1 if last_ns else None)

    @staticmethod
    def _hopeful(view: View, batch: Batch, last_ns: list[int]) -> Iterator[Entry]:
        """The queue without the waiting requests whose first token would come after their SLO even if they ran now.
        last_ns: filled with the last moments at which those that are left can start."""
        started = {entry.id for entry in view.prefilling}
        for entry in view.queue():
            if entry.ttft_slo_ns and entry.id not in started and not entry.preemptions:
                start_ns = entry.arrival_ns + entry.ttft_slo_ns - view.cost.prefill_ns(*view.left_to_compute(entry))
                if view.now_ns > start_ns:
                    batch.aborts.append(entry.id)
                    continue
                last_ns.append(start_ns)
            yield entry


@dataclass(frozen=True)
class Punica:
    """No parameters."""

    name = "punica"
    operator = "punica"
    switch = "fused"
    merges = False
    oracle = False

    def decide(self, view: View) -> Plan:
        """FCFS; `Batch` loads on demand."""
        if not view.queued:
            return only_decode(view)
        return Batch(view, view.decoding).fill(view.queue()).plan()


@dataclass(frozen=True)
class Fcfs:
    """vLLM with LoRA. max_loras: distinct adapters in one step."""

    max_loras: int = 16

    name = "fcfs"
    operator = "vllm"
    switch = "fused"
    merges = False
    oracle = False

    def __post_init__(self):
        if self.max_loras < 1:
            raise ValueError(f"policy fcfs: max_loras={self.max_loras} serves no adapter; at least 1")

    def decide(self, view: View) -> Plan:
        """FCFS within the slots."""
        if not view.queued:
            return only_decode(view)
        batch = Batch(view, view.decoding)
        return batch.fill(self._slotted(view, batch)).plan()

    def _slotted(self, view: View, batch: Batch) -> Iterator[Entry]:
        """The queue without those whose adapter finds no slot beside those of the running and of what `batch` took."""
        slots = {view.entry(request).adapter for request in view.decoding}
        slots.update(entry.adapter for entry in view.prefilling)
        slots.discard(-1)
        for entry in view.queue():
            if entry.adapter < 0 or entry.adapter in slots or len(slots) < self.max_loras:
                yield entry
                if entry.adapter >= 0 and batch.prefills and batch.prefills[-1][0] == entry.id:  # else a copy is under way
                    slots.add(entry.adapter)


@dataclass(frozen=True)
class Base:
    """The base model without LoRA, the yardstick for what adapters cost: every request's adapter is ignored."""

    name = "base"
    operator = "none"
    switch = "fused"
    merges = False
    oracle = False
    strips_adapters = True

    def decide(self, view: View) -> Plan:
        """FCFS."""
        if not view.queued:
            return only_decode(view, BASE)
        return Batch(view, view.decoding, BASE).fill(view.queue()).plan()


@dataclass(frozen=True)
class Oracle:
    """Not a real policy but a bound to hold the others against: it knows output lengths, and LoRA costs it nothing.

    Shortest remaining service first, which is what minimises the mean latency on one non-preemptive server; loads and
    memory are real. A true optimum under batching is not computed.
    """

    prefetch: int = 32

    name = "oracle"
    operator = "none"
    switch = "fused"
    merges = False
    oracle = True

    def decide(self, view: View) -> Plan:
        """Waiting requests by the work they bring, the least first."""
        if not view.queued:
            return only_decode(view)
        queue = sorted(view.waiting, key=lambda e: (e.target + 8 * (view.output_tokens(e.id) - e.generated), e.id))
        batch = Batch(view, view.decoding).fill(view.prefilling).fill(queue)
        prefetch(batch, queue, self.prefetch)
        return batch.plan()

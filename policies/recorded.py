"""The work of every lease of a run, read back from an engine's record, so that a latency model can be held against it.

It knows the record's columns and nothing of where a record lies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.plan import Work
from traces.record import RunResult


class Lease(NamedTuple):
    """One lease as it went; times in ns. free_ns: when the GPU had nothing to do before it any more, which is the end of the
    lease before or, idle (nothing was unfinished), the arrival that began it. first_ns, end_ns: ends of its first and last
    step. vision_ns, switch_ns: by the GPU's clock. host_ns: what the first step's preparation took longer than those. known:
    False where what it waited for before is not in the record (a copy)."""

    work: Work
    steps: int
    start_ns: int
    free_ns: int
    first_ns: int
    end_ns: int
    loads: int
    loading: bool
    idle: bool
    known: bool
    vision_ns: int
    switch_ns: int
    host_ns: int


BETWEEN_NS, AWAKE_NS = 900_000, 6_000_000
"""Between two leases that follow each other at once, and from an arrival to a lease, the host needs less."""


def leases(run: RunResult) -> list[Lease]:
    """All leases of one server in order. ValueError for a record without the details that an engine writes."""
    if run.steps is None or not run.details:
        raise ValueError(f"the record of {run.policy} tells nothing of its leases; take an engine's replay with --output")
    steps, extra = run.steps, run.details["leases"]
    if not np.array_equal(steps["start_ns"], extra["start_ns"]):
        raise ValueError(f"the record of {run.policy} holds other leases than its steps; write it again")
    chunks: dict[int, list[tuple[int, int]]] = {}
    table = run.details["chunks"]
    for start, tokens, context in zip(*(table[name].tolist() for name in ("start_ns", "tokens", "context")), strict=True):
        chunks.setdefault(start, []).append((tokens, context))
    names = ("start_ns", "duration_ns", "steps", "mode", "decodes", "context_tokens", "prefill_tokens", "images",
             "vision_ns", "switch_ns", "host_ns")  # fmt: skip
    own = zip(*(steps[name].tolist() for name in names), strict=True)
    more = ("first_ns", "lora_tokens", "lora_adapters", "rank", "lora_ranks", "switch_rank", "outputs", "loads", "loading",
            "largest")  # fmt: skip
    details = zip(*(extra[name].tolist() for name in more), strict=True)
    arrivals, finishes = np.sort(run.requests["arrival_ns"]), np.sort(run.requests["finish_ns"])
    found, end = [], 0
    for lease, row in zip(own, details, strict=True):
        start, took, count, mode, decodes, context, tokens, images, vision, switch, host = lease
        first, rows, adapters, rank, ranks, switch_rank, outputs, loads, loading, largest = row
        work = Work(mode, decodes, context, tuple(chunks.get(start, ())), tokens, images, rows, adapters, rank, ranks,
                    switch_rank, outputs, largest)  # fmt: skip
        at = int(np.searchsorted(arrivals, end, side="right"))
        idle = at == int(np.searchsorted(finishes, end, side="right")) and at < len(arrivals)
        free = min(start, int(arrivals[at])) if idle else end
        known = start - free < (AWAKE_NS if idle else BETWEEN_NS)
        end = start + took
        found.append(Lease(work, count, start, free, start + first, end, loads, bool(loading), idle, known, vision, switch,
                           host))  # fmt: skip
    return found

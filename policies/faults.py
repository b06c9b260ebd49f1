"""What an executor tells the ledger when a step cannot be done: call it off, end one request, live with a smaller batch.

A simulated GPU does not fail; it meets the end of a run (`cut_off`) alone. Each leaves the ledger's books in order
(`invariants.check`). It knows nothing of why something failed; reasons stay with the driver.
"""

from __future__ import annotations

from dataclasses import replace

from policies.ledger import FAILED, UNFINISHED, Ledger
from policies.view import PREFILLING, WAITING, Entry
from traces.request import Request, Trace


def call_off(ledger: Ledger, now_ns: int) -> None:
    """The plan just begun was not executed and there will be no commit: its prefills are preempted, its decodes wait.

    What it evicted, loaded, aborted and preempted stays so, and so does its mode, which the next plan sets anew.
    """
    for request, _ in ledger._plan.prefills:
        entry = ledger.entries.get(request)
        if entry is not None and entry.state == PREFILLING:
            ledger._preempt(entry, now_ns)
    for entry in ledger._fresh:  # they joined with this plan; back to where `begin` found them
        ledger.cohort.leave(entry)
    ledger._cohort_ids = None


def fail(ledger: Ledger, request: int, now_ns: int, status: int = FAILED) -> None:
    """End one unfinished request between two plans, whatever it was doing; everybody else is untouched."""
    entry = ledger.entries[request]
    if entry.state != WAITING:
        ledger._preempt(entry, now_ns)
        ledger._unqueue(entry)
        entry.preemptions -= 1  # it ended; nobody preempted it
        ledger.journal.counters["preemptions"] -= 1
    else:
        ledger._unqueue(entry)
    ledger.queued -= 1
    ledger._end(entry, status, now_ns)


def cut_off(ledger: Ledger, now_ns: int) -> list[int]:
    """The run ends here, between two plans: what has not ended is unfinished. Ids of those requests."""
    left = list(ledger.entries)
    for request in left:
        fail(ledger, request, now_ns, UNFINISHED)
    return left


def end_ps(trace: Trace, drain_s: float) -> int:
    """When a run ends that goes on for `drain_s` after the last arrival of `trace`, which has one."""
    return int(trace.arrival_ns[-1]) * 1000 + round(drain_s * 1e12)


def note_on_cut_off(requests: int, of: int, drain_s: float) -> str:
    """What a record says where requests were cut off."""
    return f"ended {drain_s:g} s after the last arrival: {requests} of {of} requests were cut off unfinished (--drain)"


def refuse(ledger: Ledger, request: Request) -> None:
    """A request that arrives and asks for what is not there ends before it is queued."""
    ledger.injected += 1
    ledger._write(Entry(request), request, FAILED, request.arrival_ns)


def shrink(ledger: Ledger) -> bool:
    """Halve the tokens of a step, then its requests: there was no memory for more. False if nothing is left to give."""
    limits = ledger.limits
    floor = limits.max_batch + 16
    if limits.max_batch_tokens > floor:
        limits = replace(limits, max_batch_tokens=max(floor, limits.max_batch_tokens // 2))
    elif limits.max_batch > 1:
        limits = replace(limits, max_batch=limits.max_batch // 2)
    else:
        return False
    ledger.limits = ledger._view.limits = limits
    return True

"""The invariants that hold after every step, proved from scratch; the run stops at the first that does not.

Conservation of requests and of memory, a legal life cycle, no adapter evicted while in use, no idle GPU with runnable work.
(The list follows the one that BLIS keeps for its simulator.) O(unfinished requests): always on in tests, a flag elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from policies.plan import MODES, Plan
from policies.view import DECODING, PREFILLING, WAITING, Entry

if TYPE_CHECKING:
    from policies.ledger import Ledger


class InvariantError(AssertionError):
    """The run is wrong, not the input. The message lists what does not hold."""


def check(ledger: Ledger, ended: int) -> None:
    """Raise InvariantError unless the ledger adds up. ended: rows of finished requests written so far."""
    wrong = ledger.pool.check()
    entries = ledger.entries
    if ledger.injected != ended + len(entries):
        wrong.append(f"requests: {ledger.injected} injected, {ended} ended + {len(entries)} unfinished")
    places = (
        ("waiting", ledger.waiting, WAITING), ("preempted", ledger.preempted, WAITING),
        ("prefilling", ledger.prefilling, PREFILLING), ("decoding", ledger.decoding, DECODING),
    )  # fmt: skip
    if sum(len(place) for _, place, _ in places) != len(entries):
        wrong.append(f"{len(entries)} unfinished requests stand in {sum(len(place) for _, place, _ in places)} places")
    for name, place, state in places:
        wrong += [f"request {e.id} is in {name} with state {e.state}" for e in place.values() if e.state != state]
    if ledger.queued != len(ledger.waiting) + len(ledger.preempted) + len(ledger.prefilling):
        wrong.append(f"{ledger.queued} requests counted as queued")
    counts: dict[int, int] = {}
    for entry in entries.values():
        counts[entry.adapter] = counts.get(entry.adapter, 0) + 1
    if counts != ledger.unfinished:
        wrong.append(f"unfinished per adapter {ledger.unfinished} is not {counts}")
    wrong += _memory(ledger)
    if wrong:
        raise InvariantError("; ".join(wrong))


def snapshot(ledger: Ledger) -> tuple:
    """All that a decision must leave as it is, as one comparable value. O(unfinished requests)."""
    pool, cohort = ledger.pool, ledger.cohort
    places = (ledger.entries, ledger.waiting, ledger.preempted, ledger.prefilling, ledger.decoding, ledger.paused,
              pool.resident, pool.loading, cohort.members)  # fmt: skip
    return (
        [tuple(getattr(entry, name) for name in Entry.__slots__) for entry in ledger.entries.values()],
        [tuple(place) for place in places],
        [{adapter: tuple(part) for adapter, part in parts.items()} for parts in (ledger.waiting_by, ledger.decoding_by)],
        (dict(ledger.unfinished), dict(pool.users), dict(ledger.journal.counters)),
        (ledger.mode, ledger.merged, ledger.queued, ledger.injected, cohort.tick, cohort.context),
        (pool.unused, pool.kv, pool.cached, pool.reclaimable, pool.peak, pool.room_left, tuple(pool.pinned)),
    )  # fmt: skip


def _memory(ledger: Ledger) -> list[str]:
    wrong, pool, page = [], ledger.pool, ledger.pool.page_tokens
    held = 0
    users: dict[int, int] = {}
    for entry in ledger.entries.values():
        kv = ledger.kv_tokens(entry)
        shared = entry.node.tokens // page if entry.node else 0
        pages = ledger.held_pages(entry)
        held += pages
        expected = 0 if entry.state == WAITING else -(-kv // page) - shared
        if pages != expected:
            wrong.append(f"request {entry.id} holds {pages} pages for {kv} tokens, expected {expected}")
        if entry.adapter >= 0 and entry.state != WAITING:
            users[entry.adapter] = users.get(entry.adapter, 0) + 1
    if held != pool.kv:
        wrong.append(f"requests hold {held} KV pages, the pool counts {pool.kv}")
    if users != pool.users:
        wrong.append(f"adapters in use {pool.users}, requests need {users}")
    context = sum(ledger.kv_tokens(entry) for entry in ledger.cohort.members.values())
    if context != ledger.cohort.context:
        wrong.append(f"the cohort counts {ledger.cohort.context} KV tokens, its members have {context}")
    merged = ledger._plan.merged  # what a former plan folded in may have been evicted by now: the weights do not need it
    if merged >= 0 and merged not in pool.resident:
        wrong.append(f"the plan runs on adapter {merged}, which was evicted")
    return wrong


def check_idle(ledger: Ledger, plan: Plan) -> None:
    """Raise InvariantError if `plan` computes nothing although something could run now: a decode can if its next page is
    free, a waiting request if its adapter is resident and its prompt fits."""
    if type(plan) is not Plan or plan.decodes or plan.prefills or plan.preempts:
        return  # of what is no plan `judge` says so
    pool = ledger.pool
    room = pool.free
    if pool.adapter_room is None:
        room -= sum(pool.adapter_pages[adapter] for adapter in plan.loads)
        room += sum(pool.adapter_pages[adapter] for adapter in plan.evicts)
    if any(ledger.next_pages((request,)) <= room for request in ledger.decoding):
        raise InvariantError(f"idle in mode {MODES[plan.mode]} with {len(ledger.decoding)} requests to decode")
    for entry in (*ledger.prefilling.values(), *ledger.preempted.values(), *ledger.waiting.values()):
        here = entry.adapter < 0 or (entry.adapter in pool.resident and entry.adapter not in plan.evicts)
        if here and entry.id not in plan.aborts and -(-entry.target // pool.page_tokens) <= room:
            raise InvariantError(f"idle although request {entry.id} could start")

"""What an operator may ask of the adapters between two plans: hold one for good, bring one in, take one out, add a new one.

Policies decide about residence inside a plan; these are for whoever runs the server (vLLM's users call it pinning, and
loading and unloading at run time). Each leaves the ledger's books in order (`invariants.check`). It moves no bytes and knows
no files; the caller copies what `bring` reserves.
"""

from __future__ import annotations

from policies.ledger import Ledger
from traces.request import Adapter


class ResidencyError(ValueError):
    """Something that the memory or the running requests do not allow. The message names the adapter and the way out."""


def pin(ledger: Ledger, adapter: int) -> None:
    """Never evict `adapter` from now on. ResidencyError, with nothing changed, if what is left would not hold a request
    that is under way."""
    pool = ledger.pool
    if adapter in pool.pinned:
        return
    pool.pinned[adapter] = None
    name, reason = pool.adapters[adapter].name, None
    if not pool.fits(0, -1):
        reason = "the pinned adapters alone exceed the memory"
    for entry in ledger.entries.values():
        tokens = entry.prompt_tokens + ledger.output_tokens(entry.id)
        if reason is None and not pool.fits(-(-(tokens - 1) // pool.page_tokens), entry.adapter):
            reason = f"request {entry.id} would not fit beside it"
    if reason is not None:
        del pool.pinned[adapter]
        raise ResidencyError(f"adapter {name!r} cannot be pinned: {reason}; unpin another")


def unpin(ledger: Ledger, adapter: int) -> None:
    """`adapter` may be evicted again."""
    ledger.pool.pinned.pop(adapter, None)


def hold(ledger: Ledger, adapters: tuple[int, ...]) -> None:
    """Before the first request: these are resident and pinned. Their copies belong to the start and are not counted."""
    for adapter in adapters:
        pin(ledger, adapter)
        ledger.pool.start_load(adapter)
        ledger.pool.finish_load(adapter)


def bring(ledger: Ledger, adapter: int) -> tuple[int, ...]:
    """Reserve the memory of an adapter whose copy the caller starts now; those that were evicted for it, idle ones and the
    least recently used first. ResidencyError, with nothing changed, if it does not fit now."""
    pool = ledger.pool
    victims: list[int] = []
    free = pool.adapter_free
    for other in pool.resident:
        if free >= pool.adapter_pages[adapter]:
            break
        if other not in pool.users and other not in pool.pinned and other not in (ledger.merged, ledger._plan.merged):
            victims.append(other)
            free += pool.adapter_pages[other]
    if free < pool.adapter_pages[adapter]:
        name = pool.adapters[adapter].name
        raise ResidencyError(f"adapter {name!r} does not fit beside what is in use; it will load when a request asks for it")
    for other in victims:
        take_out(ledger, other)
    pool.start_load(adapter)
    ledger.journal.counters["adapter_loads"] += 1
    return tuple(victims)


def take_out(ledger: Ledger, adapter: int) -> None:
    """Evict a resident adapter that `may_leave`."""
    ledger.pool.evict(adapter)
    ledger.journal.counters["adapter_evictions"] += 1


def may_leave(ledger: Ledger, adapter: int) -> bool:
    """True if nobody wants the adapter any more, no copy of it is under way, and no standing plan runs on it."""
    folded = adapter == ledger._plan.merged and ledger.has_work()
    return adapter not in ledger.unfinished and adapter not in ledger.pool.loading and not folded


def abandoned(ledger: Ledger, adapter: int) -> list[int]:
    """Requests that wait for `adapter` and never ran, in order of arrival."""
    return list(ledger.waiting_by.get(adapter, ()))


def extend(ledger: Ledger, adapter: Adapter, pages: int) -> int:
    """Know a new adapter of `pages` pages; its number. ResidencyError where no request could ever have it."""
    pool = ledger.pool
    room = pool.pages if pool.adapter_room is None else pool.adapter_room
    if pages + sum(pool.adapter_pages[number] for number in pool.pinned) > room:
        raise ResidencyError(
            f"adapter {adapter.name!r} takes {pages} pages, the adapters' memory has {room} and pinned ones their part of "
            "them; unpin some, or start with a larger --adapter-memory"
        )
    pool.extend((adapter,), (pages,))
    if ledger._view.cost is not None:
        ledger._view.cost.know(pool.adapters)
    return len(ledger.pool.adapters) - 1


def numbers_of(names: tuple[str, ...], adapters: tuple[Adapter, ...]) -> tuple[int, ...]:
    """The adapters of --pin NAME[,NAME...], by number. ResidencyError for a name that is not there."""
    known = {adapter.name: number for number, adapter in enumerate(adapters)}
    wanted = dict.fromkeys(names)
    for name in wanted:
        if name not in known:
            there = ", ".join(list(known)[:8]) + (" ..." if len(known) > 8 else "")
            raise ResidencyError(f"--pin {name}: the trace has no such adapter; there are {there or 'none'}")
    return tuple(known[name] for name in wanted)

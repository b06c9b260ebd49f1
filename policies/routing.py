"""Which GPU a new request goes to: functions of the request and of what each replica reports, and dLoRA's, with a memory.

A router sees the state that its replicas had committed when the request arrived; a running lease is not looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from policies.ledger import Ledger
from policies.placement import DLoraRouter, Move
from traces.request import Request

Router = Callable[[Request, Sequence[Ledger], int], int]
"""(request, the replicas' ledgers, requests routed so far) -> number of the replica. Must not change the ledgers."""


def make_router(name: str) -> Router:
    """The router called `name`, for one run."""
    router = ROUTERS[name]
    return router() if isinstance(router, type) else router


def moves(router: Router, replicas: Sequence[Ledger]) -> list[Move]:
    """Waiting requests that change their replica after an arrival; none unless the router migrates."""
    migrate = getattr(router, "migrate", None)
    return migrate(replicas) if migrate is not None else []


def round_robin(request: Request, replicas: Sequence[Ledger], routed: int) -> int:
    """In turn."""
    return routed % len(replicas)


def least_outstanding(request: Request, replicas: Sequence[Ledger], routed: int) -> int:
    """Fewest unfinished requests; the lowest number among equals."""
    return min(range(len(replicas)), key=lambda i: (len(replicas[i].entries), i))


def adapter_affinity(request: Request, replicas: Sequence[Ledger], routed: int) -> int:
    """A replica that holds the adapter, unless it has `1.5 x the fewest + 4` unfinished requests or more; the least loaded
    of those, else the least loaded of all."""
    loads = [len(replica.entries) for replica in replicas]
    bound = 1.5 * min(loads) + 4
    holders = [i for i, replica in enumerate(replicas) if _holds(replica, request.adapter) and loads[i] < bound]
    return min(holders or range(len(replicas)), key=lambda i: (loads[i], i))


def consolidate(request: Request, replicas: Sequence[Ledger], routed: int) -> int:
    """Punica (MLSys 2024, section 5): the replica with the largest working set that still has room for the request; the
    least loaded if none has."""
    roomy = [i for i, replica in enumerate(replicas) if _has_room(request, replica)]
    if not roomy:
        return least_outstanding(request, replicas, routed)
    return max(roomy, key=lambda i: (len(replicas[i].entries), -i))


def _has_room(request: Request, replica: Ledger) -> bool:
    """True if the batch has a slot, and the prompts of all unfinished requests fit beside their adapters. Answers
    are not counted: their lengths are unknown, and what a running lease has written is not booked yet."""
    if len(replica.entries) >= replica.limits.max_batch:
        return False
    pool = replica.pool
    prompts = sum(-(-entry.prompt_tokens // pool.page_tokens) for entry in (*replica.entries.values(), request))
    adapters = sum(pool.adapter_pages[adapter] for adapter in {*replica.unfinished, request.adapter} if adapter >= 0)
    if pool.adapter_room is not None:
        return prompts <= pool.pages and adapters <= pool.adapter_room
    return prompts + adapters <= pool.pages


def _holds(replica: Ledger, adapter: int) -> bool:
    return adapter < 0 or adapter in replica.pool.resident or adapter in replica.pool.loading


ROUTERS: dict[str, Router | type] = {
    "least-outstanding": least_outstanding,
    "round-robin": round_robin,
    "affinity": adapter_affinity,
    "consolidate": consolidate,
    "dlora": DLoraRouter,
}
"""A router, or the class of one that keeps a memory (`make_router`)."""

"""The rules that a plan must keep, judged against the ledger before anything changes.

Each broken rule raises PlanError with the rule and the offending value. Reading only; it knows no latencies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from policies.plan import BASE, MERGED, MIXTURE, MODES, UNMERGED, Plan, PlanError
from policies.view import DECODING, PREFILLING, STATES, WAITING

if TYPE_CHECKING:
    from policies.ledger import Ledger


def judge(ledger: Ledger, plan: Plan) -> None:
    """Raise PlanError if `plan` breaks a rule. O(1) for a plan that only decodes what `view.decoding` named."""
    if type(plan) is not Plan:
        raise PlanError(f"decide() of the policy returned {str(plan)[:60]}; it must return a policies.plan.Plan")
    pool, limits = ledger.pool, ledger.limits
    mode, merged, prefills, decodes, loads, evicts, preempts, aborts, _, _ = plan
    if merged >= 0 or mode not in (BASE, UNMERGED):
        if mode not in (BASE, UNMERGED, MERGED, MIXTURE):
            raise PlanError(f"mode {mode} is none of {', '.join(MODES)}")
        if (mode in (MERGED, MIXTURE)) != (merged >= 0):
            raise PlanError(f"mode {MODES[mode]} with merged adapter {merged}: merged and mixture name one, others none")
        if merged not in pool.resident:
            raise PlanError(f"adapter {merged} cannot be folded in: it is not resident")
    if aborts or preempts or evicts or loads:
        _judge_moves(ledger, plan)
    if mode == BASE and any(adapter >= 0 for adapter in ledger.unfinished):
        raise PlanError("mode base while a request asks for an adapter; strip the adapters or run unmerged")
    if decodes and (preempts or decodes is not ledger.known_ids(merged if mode == MERGED else None)):
        _judge_decodes(ledger, plan)
    tokens = batch = len(decodes)
    pages = 0
    if prefills:
        chunk_tokens, pages = _judge_prefills(ledger, plan)
        tokens += chunk_tokens
        batch += len(prefills)
    if batch > limits.max_batch:
        raise PlanError(f"{len(decodes)} decodes and {len(prefills)} prefills exceed max_batch {limits.max_batch}")
    if tokens > limits.max_batch_tokens:
        raise PlanError(f"{tokens} tokens in one step exceed max_batch_tokens {limits.max_batch_tokens}")
    free = pool.unused + pool.reclaimable
    if len(decodes) + pages > free or loads:
        need = pages + ledger.next_pages(decodes)
        free += sum(ledger.held_pages(ledger.entries[request]) for request in preempts)
        coming = sum(pool.adapter_pages[adapter] for adapter in loads)
        going = sum(pool.adapter_pages[adapter] for adapter in evicts)
        if pool.adapter_room is None:
            need, free = need + coming, free + going
        elif coming > pool.room_left + going:
            room = pool.room_left + going
            raise PlanError(f"the plan loads {coming} pages of adapters and {room} of theirs are free after its evictions")
        if need > free:
            raise PlanError(f"the plan needs {need} pages and {free} are free after its evictions and preemptions")


def _judge_decodes(ledger: Ledger, plan: Plan) -> None:
    decodes, mode, merged = plan.decodes, plan.mode, plan.merged
    if len(set(decodes)) != len(decodes):
        raise PlanError("a request stands twice among the decodes")
    for request in decodes:
        entry = ledger.decoding.get(request)
        if entry is None:
            raise PlanError(f"request {request} cannot decode: it is {_state(ledger, request)}")
        if mode == MERGED and entry.adapter != merged:
            raise PlanError(f"request {request} asks for adapter {entry.adapter} while {merged} is merged")
    if plan.preempts and not set(plan.preempts).isdisjoint(decodes):
        raise PlanError("a request is preempted and decoded by the same plan")


def _judge_prefills(ledger: Ledger, plan: Plan) -> tuple[int, int]:
    """(tokens, pages) of all chunks."""
    pool, page = ledger.pool, ledger.pool.page_tokens
    seen, total, pages = set(), 0, 0
    for request, tokens in plan.prefills:
        entry = ledger.entries.get(request)
        if entry is None or entry.state not in (WAITING, PREFILLING) or request in seen:
            raise PlanError(f"request {request} cannot prefill: it is {_state(ledger, request)}, or named twice")
        seen.add(request)
        done = entry.kv if entry.state == PREFILLING else ledger.reusable_tokens(entry)
        if not 1 <= tokens <= entry.target - done:
            raise PlanError(f"request {request}: a chunk of {tokens} tokens, {entry.target - done} are left")
        adapter = entry.adapter
        if adapter != plan.merged:
            if plan.mode == MERGED:
                raise PlanError(f"request {request} asks for adapter {adapter} while {plan.merged} is merged")
            if adapter >= 0 and (adapter not in pool.resident or adapter in plan.evicts):
                raise PlanError(f"request {request} needs adapter {adapter}, which is not resident")
        if request in plan.preempts or request in plan.aborts:
            raise PlanError(f"request {request} is preempted or aborted and prefilled by the same plan")
        total += tokens
        # Pages reused from idle prefixes stop being free, so a waiting request counts whole.
        pages += -(-(done + tokens) // page) + (-done // page if entry.state == PREFILLING else 0)
    return total, pages


def _judge_moves(ledger: Ledger, plan: Plan) -> None:
    pool = ledger.pool
    for name in ("aborts", "preempts", "evicts", "loads"):
        ids = getattr(plan, name)
        if len(set(ids)) != len(ids):
            raise PlanError(f"{name} names something twice: {ids}")
    for request in plan.aborts:
        entry = ledger.entries.get(request)
        if entry is None or entry.state != WAITING:
            raise PlanError(f"request {request} cannot be aborted: it is {_state(ledger, request)}")
    for request in plan.preempts:
        entry = ledger.entries.get(request)
        if entry is None or entry.state not in (PREFILLING, DECODING):
            raise PlanError(f"request {request} cannot be preempted: it is {_state(ledger, request)}")
    for adapter in plan.evicts:
        if adapter not in pool.resident:
            raise PlanError(f"adapter {adapter} cannot be evicted: it is not resident")
        if adapter in pool.users or adapter == plan.merged or adapter in pool.pinned:
            raise PlanError(f"adapter {adapter} cannot be evicted: it is {'pinned' if adapter in pool.pinned else 'in use'}")
    for adapter in plan.loads:
        if not 0 <= adapter < len(pool.adapters):
            raise PlanError(f"adapter {adapter} does not exist; there are {len(pool.adapters)}")
        if adapter in pool.resident or adapter in pool.loading:
            raise PlanError(f"adapter {adapter} cannot be loaded: it is resident or on its way")


def _state(ledger: Ledger, request: int) -> str:
    entry = ledger.entries.get(request)
    return STATES[entry.state] if entry is not None else "unknown or ended"

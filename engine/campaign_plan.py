"""What a campaign will take before it runs: each cell under a mocked clock, by the profile that policies predict with.

A replay takes its trace's time, and what it drains; how long that is the profile says, whose engine is not this one's to the
last digit. Loading models is not in the plan. It needs no GPU and computes no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.arrivals import ClosedLoop
from engine.campaign_file import Cell, engine_key
from engine.clock import PS_PER_NS, MockedClock
from engine.replay import Driver, stripped
from engine.serve import MOST_CONTEXT, profile_for
from policies.cost import Cost
from policies.journal import Journal, result
from policies.ledger import Ledger
from policies.pool import Pool
from policies.profile import Profile
from policies.view import Limits
from traces.options import load_trace, with_slo
from traces.record import STATUS, parse_goodput
from traces.request import Trace


def expected_s(cell: Cell, trace: Trace, profile: Profile) -> float:
    """Seconds from the start of a replay's clock to its end, at most: where nothing ends it (`--drain`), as simulated."""
    if cell.args.drain is not None and len(trace):
        return int(trace.arrival_ns[-1]) / 1e9 + cell.args.drain
    return simulated(cell, trace, profile)[0]


def simulated(cell: Cell, trace: Trace, profile: Profile) -> tuple[float, int, float]:
    """(seconds, requests cut off, requests in flight on average) of a cell, by a profile."""
    args, policy = cell.args, cell.policy
    trace = stripped(trace, policy)
    cost = Cost(profile, args.operator or policy.operator, "fused", trace.adapters, policy.name)
    page_bytes = args.page_tokens * profile.kv_bytes_per_token
    pages = int(profile.pool_bytes(golden=policy.merges) * min(args.memory_share, 1.0)) // page_bytes
    adapter_pages = tuple(-(-profile.adapter_bytes(adapter.rank) // page_bytes) for adapter in trace.adapters)
    pool = Pool(pages, args.page_tokens, trace.adapters, adapter_pages, prefix_cache=not args.no_prefix_cache)
    limits = Limits(args.max_batch, args.max_batch_tokens, args.max_context or min(MOST_CONTEXT, profile.max_context))
    journal = Journal()
    ledger = Ledger(pool, limits, journal, cost, oracle=policy.oracle)
    arrivals = ClosedLoop(trace, args.closed_loop) if args.closed_loop else None
    driver = Driver(trace, policy, ledger, cost, journal, MockedClock(cost), arrivals=arrivals, drain_s=args.drain)
    driver.run()
    end_s = max(driver.last_ps // PS_PER_NS, driver.last_arrival_ns) / 1e9
    run = result([journal], policy=policy.name, operator="", counters={"end_ns": 0}, config={})
    cut = int((run.requests["status"] == STATUS.index("unfinished")).sum())
    inside = float((run.requests["finish_ns"] - run.requests["arrival_ns"]).sum()) / 1e9
    return end_s, cut, inside / end_s if end_s else 0.0


def plan_of(cells: Sequence[Cell], setup_s: tuple[float, float]) -> str:
    """The table of `--dry-run`, in the order in which cells would run. setup_s: of a new engine, of one that is there."""
    rows = [("replay/policy", "requests", "span (s)", "replay (s)", "cut off", "in flight", "with setup (s)")]
    total, models, before = 0.0, [], None
    for cell in cells:
        args = cell.args
        profile = profile_for(args.profile, args.model)
        context = args.max_context or min(MOST_CONTEXT, profile.max_context)
        trace = with_slo(load_trace(args, replace(profile, max_context=context)), parse_goodput(args.goodput))
        seconds, cut, inside = simulated(cell, trace, profile)
        whole = seconds + setup_s[before == engine_key(cell)]
        before, total = engine_key(cell), total + whole
        if cell.model not in models:
            models.append(cell.model)
        span = int(trace.arrival_ns[-1]) / 1e9 if len(trace) else 0.0
        rows.append((cell.name, f"{len(trace)}", f"{span:.1f}", f"{seconds:.1f}", f"{cut}", f"{inside:.1f}", f"{whole:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    named = ", ".join(model[0] for model in models)
    return "\n".join([*lines, f"{len(cells)} cells, {total:.0f} s beside loading {named}"])

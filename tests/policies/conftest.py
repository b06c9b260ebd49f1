"""Tiny ledgers for the tests of policies: pages of 4 tokens, an adapter of rank r takes r / 4 pages.

The fixtures hand out functions, because test files do not import each other.
"""

from __future__ import annotations

import pytest

from policies.cost import Cost
from policies.invariants import check
from policies.journal import Journal
from policies.ledger import Ledger
from policies.pool import Pool
from policies.view import Limits
from traces.request import Adapter, Request

PAGE = 4


@pytest.fixture(scope="session")
def make_ledger(tiny_profile):
    """Function: (pool_pages, ranks, limits, **) -> Ledger. resident: adapters that are loaded from the start."""

    def make(pool_pages=1000, ranks=(8, 8, 16), limits=None, *, resident=(), oracle=False, prefix_cache=True,
             adapter_room=None, **profile):  # fmt: skip
        adapters = tuple(Adapter(f"a{i}", rank) for i, rank in enumerate(ranks))
        pool = Pool(pool_pages, PAGE, adapters, tuple(rank // 4 for rank in ranks), prefix_cache=prefix_cache,
                    adapter_room=adapter_room)  # fmt: skip
        cost = Cost(tiny_profile(pool_pages, **profile), "slora", "fused", adapters)
        ledger = Ledger(pool, limits or Limits(8, 64, 4096), Journal(), cost, oracle=oracle)
        for adapter in resident:
            pool.start_load(adapter)
            pool.finish_load(adapter)
        return ledger

    return make


@pytest.fixture(scope="session")
def ask():
    """Function: (ledger, id, adapter, **Request fields) enqueues a request of 4 prompt and 4 output tokens, arrived at 0."""

    def enqueue(ledger, number, adapter=-1, **fields):
        request = {"id": number, "arrival_ns": 0, "prompt_tokens": 4, "output_tokens": 4, "adapter": adapter} | fields
        return ledger.enqueue(Request(**request))

    return enqueue


@pytest.fixture(scope="session")
def execute():
    """Function: (ledger, plan, now_ns, steps, step_ns) begins and commits a plan, proves the books; returns the end."""

    def run(ledger, plan, now_ns=0, steps=1, step_ns=1000):
        work = ledger.begin(plan, now_ns)
        end_ns = now_ns
        if work.decodes or work.prefills:
            end_ns = now_ns + steps * step_ns
            ledger.commit(steps, now_ns + step_ns, end_ns)
        check(ledger, ledger.journal.ended)
        return end_ns

    return run

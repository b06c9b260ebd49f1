"""Adapters in pages of their own, pinned, brought in and taken out: the books add up and the rules hold."""

from __future__ import annotations

import pytest

from policies import POLICIES, make_policy, residency
from policies.invariants import check
from policies.plan import Plan, PlanError
from policies.view import Limits
from traces.request import Adapter


def run_to_the_end(ledger, policy, execute, most=2000):
    """Decide and execute until nothing is left; copies finish between two leases."""
    now_ns = 0
    for _ in range(most):
        if not ledger.has_work():
            return
        for adapter in list(ledger.pool.loading):
            ledger.loaded(adapter)
        now_ns = execute(ledger, policy.decide(ledger.view(now_ns)), now_ns) + 1
    raise AssertionError(f"{len(ledger.entries)} requests are left after {most} decisions")


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"base"}))
def test_every_policy_serves_more_adapters_than_their_memory_holds(name, make_ledger, ask, execute):
    policy = make_policy(name)
    ledger = make_ledger(40, (8, 8, 16, 32, 8, 16), Limits(4, 32), oracle=policy.oracle, adapter_room=10)
    for number in range(24):
        assert ask(ledger, number, number % 7 - 1, prompt_tokens=6 + number % 5, output_tokens=1 + number % 9)
    run_to_the_end(ledger, policy, execute)
    assert ledger.journal.ended == 24
    assert ledger.journal.counters["adapter_evictions"] > 0
    assert ledger.pool.unused + ledger.pool.cached == 40, "no adapter ever took a page of keys and values"


@pytest.mark.parametrize("room", [None, 10])
@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"base"}))
def test_a_pinned_adapter_stays_under_every_policy(name, room, make_ledger, ask, execute):
    policy = make_policy(name)
    ledger = make_ledger(20, (8, 8, 16, 8, 8, 16), Limits(4, 32), oracle=policy.oracle, adapter_room=room)
    residency.hold(ledger, (2,))
    evict, gone = ledger.pool.evict, []
    ledger.pool.evict = lambda adapter: (gone.append(adapter), evict(adapter))
    for number in range(24):
        ask(ledger, number, number % 7 - 1, prompt_tokens=6 + number % 5, output_tokens=1 + number % 9)
    run_to_the_end(ledger, policy, execute)
    assert 2 in ledger.pool.resident
    assert gone
    assert 2 not in gone


def test_a_load_beyond_the_adapters_memory_breaks_a_rule(make_ledger):
    ledger = make_ledger(1000, (8, 8, 16), adapter_room=5, resident=(0,))
    with pytest.raises(PlanError, match="loads 4 pages of adapters and 3 of theirs are free"):
        ledger.begin(Plan(loads=(2,)), 0)
    ledger.begin(Plan(loads=(2,), evicts=(0,)), 0)
    assert (ledger.pool.room_left, ledger.pool.unused) == (1, 1000)


def test_evicting_what_is_pinned_breaks_a_rule(make_ledger):
    ledger = make_ledger(resident=(0,))
    residency.pin(ledger, 0)
    with pytest.raises(PlanError, match="adapter 0 cannot be evicted: it is pinned"):
        ledger.begin(Plan(evicts=(0,)), 0)
    residency.unpin(ledger, 0)
    ledger.begin(Plan(evicts=(0,)), 0)


def test_requests_that_pins_leave_no_room_for_are_unservable(make_ledger, ask):
    ledger = make_ledger(8, (8, 16, 16))
    residency.hold(ledger, (1,))
    assert ask(ledger, 0, 1, prompt_tokens=8, output_tokens=9)
    assert not ask(ledger, 1, 0, prompt_tokens=8, output_tokens=9)
    assert ask(ledger, 2, 0, prompt_tokens=4, output_tokens=5)
    check(ledger, 1)


def test_a_pin_that_would_starve_a_request_is_refused(make_ledger, ask):
    ledger = make_ledger(8, (8, 16, 16))
    assert ask(ledger, 0, 0, prompt_tokens=12, output_tokens=8)
    with pytest.raises(residency.ResidencyError, match="'a1' cannot be pinned: request 0 would not fit beside it"):
        residency.pin(ledger, 1)
    assert not ledger.pool.pinned
    residency.pin(ledger, 0)
    with pytest.raises(residency.ResidencyError, match="the pinned adapters alone exceed the memory"):
        residency.hold(make_ledger(8, (8, 16, 16), adapter_room=5), (1, 0))


def test_bringing_in_evicts_the_idle_ones_that_are_not_pinned(make_ledger):
    ledger = make_ledger(100, (8, 8, 8, 16), adapter_room=6, resident=(0, 1, 2))
    residency.pin(ledger, 0)
    assert residency.bring(ledger, 3) == (1, 2)
    assert list(ledger.pool.loading) == [3]
    with pytest.raises(residency.ResidencyError, match="'a1' does not fit beside what is in use"):
        residency.bring(ledger, 1)
    assert ledger.pool.check() == []


def test_a_new_adapter_gets_the_next_number(make_ledger, ask):
    ledger = make_ledger(ranks=(8, 8))
    assert ledger.pool.uniform_rank == 8
    assert residency.extend(ledger, Adapter("late", 16), 4) == 2
    assert (ledger.pool.uniform_rank, ledger.pool.adapter_pages) == (0, (2, 2, 4))
    assert ledger.view(0).adapters[2].name == "late"
    assert ask(ledger, 0, 2)


def test_unknown_names_are_refused_with_those_that_there_are():
    adapters = (Adapter("cats"), Adapter("dogs"))
    assert residency.numbers_of(("dogs", "cats", "dogs"), adapters) == (1, 0)
    with pytest.raises(residency.ResidencyError, match="--pin birds: the trace has no such adapter; there are cats, dogs"):
        residency.numbers_of(("birds",), adapters)

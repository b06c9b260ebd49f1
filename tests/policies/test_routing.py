"""Who gets a request: the routers on hand-made replicas, dLoRA's integer programs against brute force, and moves that lose
nothing."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import make_policy
from policies.invariants import check
from policies.journal import Journal
from policies.ledger import Ledger
from policies.placement import COPY_COST, LOAD_COST, MOVE_COST, DLoraRouter, comigrate, place, put_in_order, withdraw
from policies.plan import Plan
from policies.pool import Pool
from policies.routing import ROUTERS, make_router, moves
from policies.view import Limits
from sim.cluster import SimConfig, simulate
from sim.experiment import find_profile
from traces.assign import make_adapters
from traces.request import Request, Trace

ADAPTERS = make_adapters(4, (8,))


def replica(unfinished: int = 0, resident: tuple[int, ...] = (), pages: int = 100, max_batch: int = 8):
    """As much of a ledger as a router looks at."""
    pool = SimpleNamespace(page_tokens=4, pages=pages, resident=dict.fromkeys(resident), loading={},
                           users={}, adapter_pages=(2, 2, 2, 2), adapter_room=None)  # fmt: skip
    entry = SimpleNamespace(prompt_tokens=8)
    return SimpleNamespace(entries=dict.fromkeys(range(unfinished), entry), pool=pool, limits=Limits(max_batch, 100),
                           waiting_by={}, unfinished={0: unfinished})  # fmt: skip


def ask(adapter: int = 0, number: int = 0, prompt: int = 8) -> Request:
    return Request(number, 0, prompt, 4, adapter)


def ledger() -> Ledger:
    return Ledger(Pool(100, 4, ADAPTERS, (2, 2, 2, 2)), Limits(8, 100), Journal(), None)


# -- routers ------------------------------------------------------------------------------------------------------------
def test_round_robin_and_least_outstanding():
    three = [replica(2), replica(1), replica(1)]
    assert [make_router("round-robin")(ask(), three, n) for n in range(4)] == [0, 1, 2, 0]
    assert make_router("least-outstanding")(ask(), three, 0) == 1


def test_affinity_prefers_who_holds_the_adapter_until_it_is_behind():
    route = make_router("affinity")
    assert route(ask(0), [replica(0), replica(3, (0,))], 0) == 1
    assert route(ask(0), [replica(0), replica(9, (0,))], 0) == 0
    assert route(ask(-1), [replica(2), replica(1)], 0) == 1, "everybody holds the base model"


def test_consolidation_fills_the_fullest_that_has_room():
    route = make_router("consolidate")
    assert route(ask(), [replica(2), replica(5), replica(0)], 0) == 1
    assert route(ask(), [replica(2), replica(8), replica(0)], 0) == 0, "a full batch has no room"
    assert route(ask(prompt=80), [replica(2, pages=20), replica(1, pages=50)], 0) == 1, "no room for the prompt"


def test_consolidation_counts_the_adapters_of_those_that_wait():
    one, other = (Ledger(Pool(9, 4, ADAPTERS, (2, 2, 2, 2)), Limits(8, 100), Journal(), None) for _ in range(2))
    route = make_router("consolidate")
    for number in range(2):  # 2 pages of keys and values and an adapter of 2 each
        assert route(ask(number, number), [one, other], number) == 0
        one.enqueue(ask(number, number))
    assert route(ask(2, 2), [one, other], 2) == 1
    assert route(ask(1, 2, prompt=4), [one, other], 2) == 0, "its adapter is counted already"


def test_a_router_with_a_memory_is_made_anew_for_each_run():
    assert make_router("dlora") is not make_router("dlora")
    assert moves(make_router("affinity"), [replica(), replica()]) == []


# -- placement ----------------------------------------------------------------------------------------------------------
def expected_loads(loads: dict[int, float], homes: dict[int, tuple[int, ...]], replicas: int) -> float:
    """The largest load if every adapter's requests are split over its homes as well as possible (by linear program)."""
    from scipy.optimize import linprog

    cells = [(a, r) for a in loads for r in homes[a]]
    rows = [[loads[a] if r == one else 0.0 for a, r in cells] + [-1.0] for one in range(replicas)]
    sums = [[1.0 if a == one else 0.0 for a, _ in cells] + [0.0] for one in loads]
    found = linprog([0.0] * len(cells) + [1.0], rows, [0.0] * replicas, sums, [1.0] * len(loads))
    return found.fun


@settings(max_examples=10)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=3), st.integers(2, 3))
def test_placement_is_as_good_as_trying_everything(counts, replicas):
    loads = {a: float(n) for a, n in enumerate(counts)}
    price = COPY_COST * sum(counts) / replicas
    subsets = [c for n in range(1, replicas + 1) for c in itertools.combinations(range(replicas), n)]

    def value(homes):
        return expected_loads(loads, homes, replicas) + price * sum(map(len, homes.values()))

    best = min(value(dict(enumerate(choice))) for choice in itertools.product(subsets, repeat=len(counts)))
    placed = place(loads, dict.fromkeys(loads, 1), [100] * replicas, {})
    assert value(placed) <= 1.02 * best + 1e-6, "within the gap asked for"


def test_hot_adapters_get_several_homes_and_homes_stay():
    loads = {0: 90.0, 1: 10.0, 2: 10.0, 3: 10.0}
    homes = place(loads, dict.fromkeys(loads, 1), [10] * 4, {})
    assert len(homes[0]) >= 3
    assert expected_loads(loads, homes, 4) <= 1.05 * 30
    assert place(loads, dict.fromkeys(loads, 1), [10] * 4, homes) == homes


def test_placement_keeps_to_the_room_there_is():
    loads = dict.fromkeys(range(4), 10.0)
    homes = place(loads, dict.fromkeys(loads, 5), [10, 10], {})
    assert sorted(len([a for a in loads if r in homes[a]]) for r in range(2)) == [2, 2]
    assert place(loads, dict.fromkeys(loads, 50), [10, 10], {}) == {}, "nothing fits: no homes"


def test_adapters_beyond_the_program_go_to_the_emptiest():
    loads = {a: 1.0 + (a < 30) for a in range(60)}
    homes = place(loads, dict.fromkeys(loads, 1), [1000] * 2, {})
    assert set(homes) == set(loads)
    assert expected_loads(loads, homes, 2) <= 1.02 * sum(loads.values()) / 2


# -- co-migration -------------------------------------------------------------------------------------------------------
@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4)), min_size=2, max_size=3))
def test_moves_are_as_good_as_trying_everything(rows):
    """rows: (waiting for adapter 0, waiting for adapter 1, running) of each replica; replica 0 alone holds adapter 0."""
    waiting = [
        {a: [100 * r + 10 * a + i for i in range(n)] for a, n in enumerate(row[:2]) if n} for r, row in enumerate(rows)
    ]
    loads = [sum(row) for row in rows]
    here = [{-1, 0} if not r else {-1} for r in range(len(rows))]
    found = comigrate(loads, waiting, here)
    after = list(loads)
    for _, source, target in found:
        after[source] -= 1
        after[target] += 1
    ids = [move.request for move in found]
    assert len(set(ids)) == len(ids)
    assert all(move.request in waiting[move.source].get(move.request // 10 % 10, ()) for move in found)
    copies = {(m.request // 10 % 10, m.target) for m in found if m.request // 10 % 10 not in here[m.target]}
    value = max(after) + MOVE_COST * len(found) + LOAD_COST * len(copies)
    assert value <= max(loads) + 1e-9, "never worse than staying"
    if len(rows) == 2:
        source, target = (0, 1) if loads[0] > loads[1] else (1, 0)
        most = [len(waiting[source].get(a, ())) for a in (0, 1)]
        best = min(
            max(loads[source] - x - y, loads[target] + x + y) + MOVE_COST * (x + y)
            + LOAD_COST * (bool(x and 0 not in here[target]) + bool(y and 1 not in here[target]))
            for x in range(most[0] + 1) for y in range(most[1] + 1)
        )  # fmt: skip
        assert value <= 1.02 * best + 1e-6


def test_the_router_moves_only_what_is_out_of_balance():
    router = DLoraRouter()
    even = [replica(5), replica(6)]
    uneven = [replica(20), replica(2)]
    uneven[0].waiting_by = {0: dict.fromkeys(range(15))}
    for number in range(16):
        router(ask(number=number), even, number)
    assert router.migrate(even) == []
    moved = router.migrate(uneven)
    assert 7 <= len(moved) <= 9
    assert {(move.source, move.target) for move in moved} == {(0, 1)}
    router(ask(), even, 0)
    assert router.migrate(uneven) == [], "it looks only now and then"


# -- moving -------------------------------------------------------------------------------------------------------------
def test_withdrawing_undoes_enqueuing():
    one, other = ledger(), ledger()
    for number, adapter in enumerate((0, 1, 0, -1)):
        one.enqueue(ask(adapter, number))
    request = withdraw(one, 2)
    assert (request.id, one.unfinished, one.queued) == (2, {0: 1, 1: 1, -1: 1}, 3)
    assert other.enqueue(request)
    check(one, 0)
    check(other, 0)
    withdraw(one, 0)
    assert 0 not in one.unfinished
    check(one, 0)


def test_a_request_that_moved_stands_where_its_arrival_puts_it():
    one, other = ledger(), ledger()
    one.enqueue(Request(1, 10, 8, 4, 0))
    for number, arrival_ns in ((0, 0), (2, 20), (3, 30)):
        other.enqueue(Request(number, arrival_ns, 8, 4, 0))
    other.enqueue(withdraw(one, 1))
    put_in_order(other, 1)
    view = other.view(40)
    assert [entry.id for entry in view.waiting] == [entry.id for entry in view.queue_of(0)] == [0, 1, 2, 3]
    withdraw(other, 0)
    assert view.oldest.id == 1
    put_in_order(other, 7)
    check(other, 0)


def test_a_request_that_ran_does_not_move():
    one = ledger()
    one.enqueue(ask(-1))
    one.begin(Plan(prefills=((0, 4),)), 0)
    with pytest.raises(ValueError, match="has run here"):
        withdraw(one, 0)
    with pytest.raises(ValueError, match="it ended"):
        withdraw(one, 7)


@pytest.mark.parametrize("policy", ["valora", "merged-only", "slora"])
@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_serves_everybody_and_leaps_as_it_steps(policy, router):
    rng = np.random.default_rng(3)
    count = 400
    trace = Trace.build(
        np.sort(rng.integers(0, 4_000_000_000, count)), rng.integers(20, 600, count), rng.integers(1, 40, count),
        adapter=np.where(rng.random(count) < 0.5, 0, rng.integers(-1, 8, count)).astype(np.int32),
        adapters=make_adapters(8, (64,)),
    )  # fmt: skip
    profile = find_profile("analytic-h200", "llava-1.5-7b")
    runs = [
        simulate(trace, make_policy(policy), profile, SimConfig(gpus=3, router=router, leap=leap, check_invariants=True))
        for leap in (True, False)
    ]
    runs[0].check()
    assert not runs[0].requests["status"].any()
    assert len(set(runs[0].requests["server"].tolist())) == (2 if router == "consolidate" and policy != "merged-only" else 3)
    for name, column in runs[0].requests.items():
        assert (column == runs[1].requests[name]).all(), name


def test_the_solver_keeps_off_stdout(capfd):
    """HiGHS prints a stray line for some programs; stdout is for results."""
    rng = np.random.default_rng(1)
    homes = {}
    for _ in range(8):
        loads = {a: 256 * (a + 1) ** -0.9 * rng.uniform(0.7, 1.4) for a in range(16)}
        homes = place(loads, dict.fromkeys(loads, 20), [10_000] * 4, homes)
        print("homes", len(homes))
    assert capfd.readouterr().out == "homes 16\n" * 8

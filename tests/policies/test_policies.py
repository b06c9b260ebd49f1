"""Each policy's rule on a world small enough to read: who runs, in which mode, and which adapters move."""

from __future__ import annotations

import pytest

from policies import POLICIES, PolicyError, make_policy
from policies.costaware import CostAware
from policies.dlora import DLora, Thresholds
from policies.merged_only import MergedOnly
from policies.plan import BASE, MERGED, MIXTURE, UNMERGED, PeekError, Plan
from policies.unmerged import Base, Fcfs, Oracle, Punica, SLora
from policies.valora import Valora
from policies.view import Entry, Limits

FOUR = Limits(4, 64, 4096)
S = 1_000_000_000


def decide(policy, ledger, now_ns=0) -> Plan:
    return policy.decide(ledger.view(now_ns))


def ids(plan: Plan) -> list[int]:
    """Requests that the plan computes, in its order."""
    return [*plan.decodes, *(request for request, _ in plan.prefills)]


# -- VaLoRA, Algorithm 1 --------------------------------------------------------------------------------------------------


@pytest.fixture
def three_and_one(make_ledger, ask):
    """Three requests of adapter 0, more than half of MaxBS = 4, and one of adapter 1 that came first."""
    ledger = make_ledger(limits=FOUR, resident=(0, 1, 2))
    for number, adapter in enumerate((1, 0, 0, 0)):
        ask(ledger, number, adapter)
    return ledger


def test_valora_merges_what_fills_more_than_half_of_the_batch(three_and_one):
    plan = decide(Valora(), three_and_one)
    assert (plan.mode, plan.merged, ids(plan)) == (MERGED, 0, [1, 2, 3])


def test_valora_stays_unmerged_at_half_of_the_batch(make_ledger, ask):
    ledger = make_ledger(limits=FOUR, resident=(0, 1))
    for number, adapter in enumerate((1, 0, 0)):
        ask(ledger, number, adapter)
    plan = decide(Valora(), ledger)
    assert (plan.mode, plan.merged, ids(plan)) == (UNMERGED, -1, [0, 1, 2])


def test_valora_takes_the_starving_into_a_mixture(three_and_one):
    """Credit is the wait plus one step: at theta less a step nobody starves, a nanosecond later the cold request does."""
    policy = Valora(theta_s=1.0)
    last_ns = S - three_and_one.view(0).cost.step_ns(1, mode=UNMERGED)
    assert decide(policy, three_and_one, last_ns).mode == MERGED
    plan = decide(policy, three_and_one, last_ns + 1)
    assert (plan.mode, plan.merged, ids(plan)) == (MIXTURE, 0, [0, 1, 2, 3])


def test_valora_without_mixture_runs_unmerged_instead(three_and_one):
    assert decide(Valora(theta_s=1.0, mixture=False), three_and_one, 2 * S).mode == UNMERGED
    assert decide(Valora(theta_s=1.0, merge=False), three_and_one).mode == UNMERGED


@pytest.mark.parametrize(("cold", "mode"), [(2, MIXTURE), (3, UNMERGED)])
def test_valora_runs_unmerged_when_more_than_half_starve(make_ledger, ask, cold, mode):
    ledger = make_ledger(limits=FOUR, resident=(0, 1, 2))
    for number in range(cold):
        ask(ledger, number, 1)
    for number in range(cold, cold + 4):
        ask(ledger, number, 0)
    plan = decide(Valora(theta_s=1.0), ledger, 2 * S)
    assert plan.mode == mode
    assert ids(plan) == [0, 1, 2, 3]  # the starving first


def test_valora_says_when_the_next_one_will_starve(three_and_one, ask, execute):
    policy = Valora(theta_s=1.0)
    now_ns = execute(three_and_one, decide(policy, three_and_one))
    ask(three_and_one, 4, 2, arrival_ns=now_ns)
    plan = decide(policy, three_and_one, now_ns)
    cost = three_and_one.view(now_ns).cost
    assert plan.mode == MERGED
    assert plan.until_ns == S - cost.step_ns(1, mode=MERGED) - cost.switch_ns(0) + 1  # request 0, which came at 0


def test_valora_looks_again_after_a_change_of_mode(three_and_one):
    assert decide(Valora(), three_and_one, 7).until_ns == 7


def test_valora_goes_on_with_whom_it_took_up_until_they_end(three_and_one, execute):
    policy = Valora(theta_s=1.0)
    now_ns = execute(three_and_one, decide(policy, three_and_one, 2 * S), 2 * S)
    plan = decide(policy, three_and_one, now_ns)
    assert (plan.mode, plan.decodes) == (MIXTURE, (0, 1, 2, 3))
    now_ns = execute(three_and_one, plan, now_ns, steps=3)
    assert not three_and_one.entries


def test_valora_does_not_merge_an_absent_adapter_but_fetches_it(make_ledger, ask):
    ledger = make_ledger(limits=FOUR)
    for number in range(4):
        ask(ledger, number, 0)
    assert decide(Valora(), ledger)[:5] == (UNMERGED, -1, (), (), (0,))


def test_valora_runs_unmerged_where_paused_requests_hold_the_memory(make_ledger, ask, execute):
    """Adapter 1 has 14 of 16 free pages; four requests of adapter 0 could be merged, and none of them fits."""
    ledger = make_ledger(20, limits=FOUR, resident=(0, 1))
    ask(ledger, 0, 1, prompt_tokens=50, output_tokens=14)
    now_ns = execute(ledger, decide(Valora(), ledger))
    for number in range(1, 5):
        ask(ledger, number, 0, prompt_tokens=16)
    plan = decide(Valora(), ledger, now_ns)
    assert (plan.mode, ids(plan)) == (UNMERGED, [0])


# -- dLoRA ----------------------------------------------------------------------------------------------------------------


def test_dlora_merges_at_merge_right_of_the_fcfs_batch(three_and_one):
    assert decide(DLora(merge_right=0.76), three_and_one).mode == UNMERGED
    assert decide(DLora(merge_right=0.75), three_and_one)[:2] == (MERGED, 0)


def test_dlora_stays_merged_down_to_merge_left(three_and_one, ask, execute):
    now_ns = execute(three_and_one, decide(DLora(merge_right=0.75), three_and_one))
    three_and_one.view(now_ns).memo = None
    assert decide(DLora(merge_left=0.75), three_and_one, now_ns).mode == MERGED
    assert decide(DLora(merge_left=0.76), three_and_one, now_ns).mode == UNMERGED


def test_dlora_makes_the_better_mode_easier_to_reach(three_and_one, make_ledger, ask, execute):
    alone = make_ledger(limits=FOUR, resident=(0,))
    for number in range(4):
        ask(alone, number, 0)
    plan = decide(DLora(), alone)  # merged is faster for one adapter: to merge gets easier, to leave harder
    assert plan.mode == MERGED
    assert plan.memo == Thresholds(0.95, 0.556 / 1.1)

    now_ns = execute(three_and_one, decide(DLora(merge_right=0.75), three_and_one))
    three_and_one.view(now_ns).memo = None
    cost = three_and_one.view(now_ns).cost
    assert 3 / cost.step_ns(3, mode=MERGED) < 4 / cost.step_ns(4, 2, mode=UNMERGED)
    plan = decide(DLora(merge_right=0.8, merge_left=0.9), three_and_one, now_ns)  # unmerged is faster for the four
    assert plan.mode == UNMERGED
    assert plan.memo == Thresholds(pytest.approx(0.88), pytest.approx(0.95))


def test_dlora_serves_starving_adapters_unmerged(three_and_one):
    policy = DLora(credit_s=1.0, merge_right=0.75)
    assert decide(policy, three_and_one, S).mode == MERGED
    plan = decide(policy, three_and_one, S + 1)
    assert (plan.mode, ids(plan)[0]) == (UNMERGED, 0)


# -- those that never merge -----------------------------------------------------------------------------------------------


@pytest.fixture
def full(make_ledger, ask, execute):
    """One slot, taken by a request of adapter 0 that decodes; requests of adapters 1 and 2 wait, which are not loaded."""
    ledger = make_ledger(limits=Limits(1, 64, 4096), resident=(0,))
    for number, adapter in enumerate((0, 1, 2)):
        ask(ledger, number, adapter)
    execute(ledger, Plan(prefills=((0, 4),)))
    return ledger


def test_slora_prefetches_and_punica_does_not(full):
    assert decide(SLora(), full)[3:5] == ((0,), (1, 2))
    assert decide(SLora(prefetch=1), full)[3:5] == ((0,), (1,))
    assert decide(Punica(), full)[3:5] == ((0,), ())


def test_punica_loads_on_demand_and_does_not_hold_up_others(make_ledger, ask):
    ledger = make_ledger(limits=FOUR, resident=(0,))
    ask(ledger, 0, 1)
    ask(ledger, 1, 0)
    plan = decide(Punica(), ledger)
    assert (ids(plan), plan.loads) == ([1], (1,))


def test_slora_aborts_what_cannot_meet_its_deadline(make_ledger, ask):
    ledger = make_ledger(limits=Limits(1, 64, 4096), resident=(0,))
    need_ns = ledger.view(0).cost.prefill_ns(4)
    ask(ledger, 0, 0, ttft_slo_ns=need_ns + 99)
    ask(ledger, 1, 0, ttft_slo_ns=need_ns + 200)
    ask(ledger, 2, 0)
    assert decide(SLora(), ledger, 99)[2] == ((0, 4),)
    plan = decide(SLora(), ledger, 100)
    assert (plan.aborts, ids(plan)) == ((0,), [1])
    assert decide(Punica(), ledger, 10**9).aborts == ()


def test_slora_says_when_the_next_deadline_passes(make_ledger, ask, execute):
    ledger = make_ledger(10, limits=FOUR)
    ask(ledger, 0, prompt_tokens=30, output_tokens=8)
    now_ns = execute(ledger, decide(SLora(), ledger))
    last_ns = 50_000
    ask(ledger, 1, prompt_tokens=12, ttft_slo_ns=ledger.view(0).cost.prefill_ns(12) + last_ns)  # no memory for it now
    plan = decide(SLora(), ledger, now_ns)
    assert (ids(plan), plan.until_ns) == ([0], last_ns + 1)
    assert decide(SLora(), ledger, last_ns).aborts == ()
    assert decide(SLora(), ledger, last_ns + 1).aborts == (1,)


def test_fcfs_looks_past_adapters_without_a_slot(make_ledger, ask, execute):
    ledger = make_ledger(limits=FOUR, resident=(0, 1))
    ask(ledger, 0, 0)
    execute(ledger, Plan(prefills=((0, 4),)))
    ask(ledger, 1, 1)
    ask(ledger, 2, 0)
    ask(ledger, 3, -1)
    assert ids(decide(Fcfs(max_loras=1), ledger)) == [0, 2, 3]
    assert ids(decide(Fcfs(max_loras=2), ledger)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="max_loras=0"):
        Fcfs(max_loras=0)


def test_fcfs_gives_no_slot_to_an_adapter_that_leaves_with_the_plan(make_ledger, ask):
    """Two adapters fit, 1 and 2 are here: the load of 0 pushes 1 out, and whose turn it is then is 2."""
    ledger = make_ledger(ranks=(8, 8, 8), limits=FOUR, resident=(1, 2), adapter_room=4)
    for number, adapter in enumerate((0, 1, 2)):
        ask(ledger, number, adapter)
    plan = decide(Fcfs(max_loras=1), ledger)
    assert (plan.loads, plan.evicts, ids(plan)) == ((0,), (1,), [2])


def test_slora_does_not_give_up_what_the_prefix_cache_makes_fast(make_ledger, ask, execute):
    ledger = make_ledger(limits=FOUR, resident=(0,))
    prefix = ((7, 36),)
    ask(ledger, 0, 0, prompt_tokens=40, output_tokens=1, prefix=prefix)
    now_ns = execute(ledger, decide(SLora(), ledger))
    cost = ledger.view(now_ns).cost
    slo_ns = (cost.prefill_ns(40) + cost.prefill_ns(4)) // 2
    ask(ledger, 1, 0, prompt_tokens=40, prefix=prefix, ttft_slo_ns=now_ns + slo_ns)
    ask(ledger, 2, 0, prompt_tokens=40, prefix=((8, 36),), ttft_slo_ns=now_ns + slo_ns)
    plan = decide(SLora(), ledger, now_ns)
    assert (plan.aborts, ids(plan)) == ((2,), [1])


def test_base_ignores_adapters(make_ledger, ask):
    ledger = make_ledger(limits=FOUR)
    ask(ledger, 0)
    assert decide(Base(), ledger)[:3] == (BASE, -1, ((0, 4),))
    assert Base.strips_adapters


def test_merged_only_swaps_whole_adapters_first_come_first_served(make_ledger, ask, execute):
    ledger = make_ledger(limits=FOUR, resident=(0, 1))
    for number, adapter in enumerate((0, 1, 0, 1)):
        ask(ledger, number, adapter, output_tokens=2)
    log, now_ns = [], 0
    while ledger.has_work():
        plan = decide(MergedOnly(), ledger, now_ns)
        log.append((plan.mode, plan.merged, ids(plan)))
        now_ns = execute(ledger, plan, now_ns)
    assert log == [(MERGED, 0, [0, 2]), (MERGED, 0, [0, 2]), (MERGED, 1, [1, 3]), (MERGED, 1, [1, 3])]
    assert ledger.journal.counters["switches"] == 2


def test_merged_only_goes_on_with_another_adapter_while_a_copy_is_under_way(make_ledger, ask):
    ledger = make_ledger(limits=FOUR, resident=(1,))
    for number, adapter in enumerate((0, 1, -1)):
        ask(ledger, number, adapter)
    plan = decide(MergedOnly(), ledger)
    assert plan.loads == (0,)
    assert ids(plan) in ([1], [2])


# -- what may be known ------------------------------------------------------------------------------------------------------


def test_the_oracle_serves_the_least_work_first(make_ledger, ask):
    ledger = make_ledger(limits=Limits(2, 64, 4096), oracle=True)
    for number, output in enumerate((50, 3, 9)):
        ask(ledger, number, output_tokens=output)
    assert ids(decide(Oracle(), ledger)) == [1, 2]


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"oracle"}))
def test_nobody_else_sees_an_output_length(name, make_ledger, ask):
    policy = make_policy(name)
    ledger = make_ledger(oracle=policy.oracle)
    ask(ledger, 0, output_tokens=1234)
    view = ledger.view(0)
    with pytest.raises(PermissionError, match="request 0"):
        view.output_tokens(0)
    entry = view.entry(0)
    assert not any("output" in slot for slot in Entry.__slots__)
    assert 1234 not in [getattr(entry, slot) for slot in Entry.__slots__]
    assert not hasattr(entry, "__dict__")


def test_peeking_breaks_a_rule():
    from policies.plan import PlanError

    assert issubclass(PeekError, PlanError)


# -- the registry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_made_by_name(name):
    policy = make_policy(name)
    assert policy.name == name
    assert make_policy(name) == policy


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slroa", {}, "did you mean 'slora'"),
        ("valora", {"theta": "1"}, "did you mean 'theta_s'"),
        ("valora", {"theta_s": "soon"}, "'soon' is not a float"),
        ("valora", {"theta_s": "-1"}, "not negative"),
        ("valora", {"theta_s": "inf"}, "finite"),
        ("valora", {"mixture": "maybe"}, "neither true nor false"),
        ("punica", {"prefetch": "1"}, "it has none"),
    ],
)
def test_unknown_names_and_values_are_refused(name, options, message):
    with pytest.raises(PolicyError, match=message):
        make_policy(name, options)


# -- cost-aware -----------------------------------------------------------------------------------------------------------


def test_cost_aware_folds_what_all_ask_for_once_that_pays(make_ledger, ask):
    ledger = make_ledger(limits=FOUR, resident=(0, 1))
    ask(ledger, 0, 0)
    assert decide(CostAware(horizon_s=10.0), ledger)[:2] == (MERGED, 0)
    assert decide(CostAware(horizon_s=0.0), ledger)[:2] == (UNMERGED, -1)


def test_cost_aware_lets_nobody_wait_whatever_the_weights(three_and_one):
    for horizon_s in (0.0, 10.0):
        assert sorted(ids(decide(CostAware(horizon_s=horizon_s), three_and_one))) == [0, 1, 2, 3]

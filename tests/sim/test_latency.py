"""A run of steps in closed form against the sum of its steps, in exact integers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cost import Cost
from policies.plan import UNMERGED, Work
from sim.latency import _steps_until, run
from traces.request import Adapter


def work_of(decodes: int, context: int, switch_rank: int = 0) -> Work:
    """A first step of `decodes` requests that read `context` tokens of KV."""
    return Work(UNMERGED, decodes, context, (), 0, 0, decodes, 1, 8, 8, switch_rank, decodes)


def stepped(cost: Cost, work: Work, max_steps: int, until_ps: int, boundary_ps: int, slow_ps: int, ahead: int) -> list[int]:
    """Durations of single steps until the first boundary at or after until_ps, and of `ahead` more."""
    durations: list[int] = []
    while len(durations) < max_steps:
        if durations and sum(durations) >= until_ps:
            if not ahead:
                break
            ahead -= 1
        linear, attention, vision, lora, host, switch = cost.fixed(work)
        gpu = linear + attention + vision + lora + switch + cost.attention_at(work.decodes, work.context_tokens)
        durations.append(max(gpu + slow_ps, host) + (0 if durations else boundary_ps))
        work = work._replace(context_tokens=work.context_tokens + work.decodes, switch_rank=0)
    return durations


POINTS = st.lists(st.floats(0, 60, allow_nan=False), min_size=1, max_size=5)


@st.composite
def tables(draw):
    """Decode attention with up to five points a batch, rising, falling or flat."""
    table = {}
    for batch in draw(st.lists(st.sampled_from((1, 2, 5, 9)), min_size=1, max_size=3, unique=True)):
        times = draw(POINTS)
        xs = draw(st.lists(st.integers(0, 80), min_size=len(times), max_size=len(times), unique=True))
        table[batch] = sorted(zip(map(float, xs), times, strict=True))
    return table


@settings(max_examples=300)
@given(table=tables(), decodes=st.integers(1, 12), mean=st.integers(0, 100), switch=st.sampled_from((0, 8)),
       max_steps=st.integers(1, 150), until_us=st.floats(0, 6000), host_us=st.sampled_from((0, 1.7, 26, 31.7, 80)),
       boundary_us=st.sampled_from((0, 70)), slow_us=st.sampled_from((0, 3)), ahead=st.integers(0, 2))  # fmt: skip
def test_jump_equals_the_sum_of_steps(tiny_profile, table, decodes, mean, switch, max_steps, until_us, host_us, boundary_us,
                                      slow_us, ahead):  # fmt: skip
    # Where the last slope falls, a cost below zero would follow from going on; real attention does not get cheaper.
    for points in table.values():
        if len(points) > 1 and points[-1][1] < points[-2][1]:
            points[-1] = (points[-1][0], points[-2][1])
    cost = Cost(tiny_profile(decode_attention=table, host_step_us=host_us), "slora", "fused", (Adapter("a", 8),))
    work = work_of(decodes, decodes * mean, switch)
    until_ps, boundary_ps, slow_ps = (round(us * 1_000_000) for us in (until_us, boundary_us, slow_us))
    durations = stepped(cost, work, max_steps, until_ps, boundary_ps, slow_ps, ahead)
    jump = run(cost, work, max_steps, until_ps, boundary_ps=boundary_ps, slow_ps=slow_ps, ahead=ahead)
    assert (jump.steps, jump.first_ps, jump.total_ps) == (len(durations), durations[0], sum(durations))
    assert jump.last_ps == durations[-1] - (boundary_ps if len(durations) == 1 else 0)
    assert min(jump.parts) >= 0
    assert sum(jump.parts) == jump.total_ps
    behind = [first + i * growth for _, first, growth, steps in jump.pieces for i in range(steps)]
    assert behind == durations[1:]
    taken = 1
    for begin_ps, _, _, steps in jump.pieces:
        assert begin_ps == sum(durations[:taken])
        taken += steps


@settings(max_examples=400)
@given(step=st.integers(0, 50), growth=st.integers(-5, 50), wanted=st.integers(1, 3000), most=st.integers(1, 60))
def test_steps_until_is_the_fewest_that_reach(step, growth, wanted, most):
    step = max(step, -growth * (most - 1))  # a step never takes less than no time
    total = count = 0
    while count < most and total < wanted:
        total += step + growth * count
        count += 1
    assert _steps_until(step, growth, wanted, most) == count


def test_a_prefill_is_one_step(tiny_profile):
    cost = Cost(tiny_profile(), "none", "fused", ())
    work = Work(UNMERGED, 0, 0, ((8, 0),), 8, 1, 0, 0, 0, 0, 0, 1)
    jump = run(cost, work, 99, 1 << 62)
    attention = 0.1 + (9.0 - 0.1) * 7 / 63
    assert jump.steps == 1
    assert abs(jump.total_ps - 1_000_000 * (21.5 + 1.3 + attention + 12.0)) < 5
    slow_host = Cost(tiny_profile(host_step_us=70.0), "none", "fused", ())
    assert run(slow_host, work, 99, 1 << 62).parts[4] == 70_230_000 - jump.total_ps  # what the GPU waits for the host


def test_a_tower_may_be_faster_by_more_than_the_rest_takes(tiny_profile):
    work = Work(UNMERGED, 0, 0, ((1, 0),), 1, 64, 0, 0, 0, 0, 0, 1)
    cost = Cost(tiny_profile(), "none", "fused", ())
    slow_ps = -(cost.fixed(work)[0] + 5_000_000)
    jump = run(cost, work, 1, 0, slow_ps=slow_ps)
    assert jump.total_ps == cost.step_ps(work) + slow_ps == sum(jump.parts)
    assert min(jump.parts) == jump.parts[0] == 0


def test_a_boundary_is_paid_for_what_the_lease_holds(tiny_profile):
    lease_us = {"base": 50.0, "load": 13.0, "wake": 40.0, "launch": 10.0, "request": 2.0, "prompts": 20.0, "chunk": 7.0}
    profile = tiny_profile(lease_us=lease_us, decide_us={"valora": 5.0})
    costs = [Cost(profile, "slora", "fused", (), policy) for policy in ("valora", "slora")]
    work = Work(UNMERGED, 3, 30, ((5, 0), (2, 0)), 7, 0, 0, 0, 0, 0, 0, 5)
    assert [cost.lease_ps(work, 1, idle=False) for cost in costs] == [118_000_000, 113_000_000]
    vision_us = costs[1].fixed(work._replace(images=1))[2] / 1e6
    assert costs[1].lease_ps(work._replace(images=1), 0, idle=True) == round(1e6 * (90 + 50 - vision_us)), "hidden behind it"
    assert costs[1].lease_ps(work._replace(images=99), 0, idle=True) == 90_000_000
    assert costs[1].lease_ps(work._replace(prefills=(), prefill_tokens=0, switch_rank=8), 0, idle=False) == round(
        1e6 * (50 + max(0, 16 - costs[1].fixed(work._replace(switch_rank=8))[5] / 1e6)))  # fmt: skip
    assert Cost(tiny_profile(), "slora", "fused", ()).lease_ps(work, 1, idle=True) == 0


def test_steps_with_prompts_have_tables_of_their_own(tiny_profile):
    work = Work(UNMERGED, 4, 52, ((8, 0),), 8, 0, 0, 0, 0, 0, 0, 1)
    plain, apart = (Cost(tiny_profile(**tables), "none", "fused", ()) for tables in (
        {}, {"prefill_linear": [(1.0, 100.0), (64.0, 100.0)], "mixed_attention": {4: [(0.0, 30.0)]}}))
    difference = (100 - (21.5 + 4 * 18.5 / 56)) + (30 - 5.9)
    assert (apart.step_ps(work) - plain.step_ps(work)) / 1e6 == pytest.approx(difference, abs=1e-4)
    assert apart.step_ps(work._replace(prefills=(), prefill_tokens=0)) == plain.step_ps(
        work._replace(prefills=(), prefill_tokens=0))

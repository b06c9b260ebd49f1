"""A run of steps in closed form against the sum of its steps, in exact integers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cost import Cost
from policies.plan import UNMERGED, Work
from sim.latency import _steps_until, run
from traces.request import Adapter


def work_of(decodes: int, context: int, switch_rank: int = 0) -> Work:
    """A first step of `decodes` requests that read `context` tokens of KV."""
    return Work(UNMERGED, decodes, context, (), 0, 0, decodes, 1, 8, 8, switch_rank, decodes)


def stepped(cost: Cost, work: Work, max_steps: int, until_ps: int) -> list[int]:
    """Durations of single steps until the first boundary at or after until_ps."""
    durations = []
    while len(durations) < max_steps and (not durations or sum(durations) < until_ps):
        durations.append(sum(cost.fixed(work)) + cost.attention_at(work.decodes, work.context_tokens))
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
       max_steps=st.integers(1, 150), until_us=st.floats(0, 6000))  # fmt: skip
def test_jump_equals_the_sum_of_steps(tiny_profile, table, decodes, mean, switch, max_steps, until_us):
    # Where the last slope falls, a cost below zero would follow from going on; real attention does not get cheaper.
    for points in table.values():
        if len(points) > 1 and points[-1][1] < points[-2][1]:
            points[-1] = (points[-1][0], points[-2][1])
    cost = Cost(tiny_profile(decode_attention=table), "slora", "fused", (Adapter("a", 8),))
    work = work_of(decodes, decodes * mean, switch)
    until_ps = round(until_us * 1_000_000)
    durations = stepped(cost, work, max_steps, until_ps)
    jump = run(cost, work, max_steps, until_ps)
    assert (jump.steps, jump.first_ps, jump.total_ps) == (len(durations), durations[0], sum(durations))
    assert sum(jump.parts) == jump.total_ps
    behind = [first + i * growth for first, growth, steps in jump.pieces for i in range(steps)]
    assert behind == durations[1:]


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
    assert abs(jump.total_ps - 1_000_000 * (21.5 + 1.3 + attention + 12.0 + 1.7 + 0.23)) < 5

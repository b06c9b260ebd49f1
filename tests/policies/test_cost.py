"""Costs: linear between points, flat below the first, the last slope beyond the last, and counted when outside."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import Cost, Curve
from policies.plan import BASE, MERGED, MIXTURE, UNMERGED, Work
from policies.profile import ProfileError
from traces.request import Adapter

ADAPTERS = (Adapter("a", 8), Adapter("b", 16))


@pytest.fixture(scope="module")
def cost(tiny_profile):
    return Cost(tiny_profile(), "slora", "fused", ADAPTERS)


def test_curve():
    outside: set[str] = set()
    curve = Curve([(2.0, 10.0), (4.0, 30.0), (5.0, 31.0)], "name", outside)
    us = {x: curve(x) / 1e6 for x in (0, 2, 3, 4, 4.5, 5)}
    assert us == {0: 10, 2: 10, 3: 20, 4: 30, 4.5: 30.5, 5: 31}
    assert not outside
    assert curve(7) / 1e6 == 33
    assert outside == {"name"}
    assert Curve([(2.0, 10.0)], "name", outside)(100) / 1e6 == 10


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=6), st.lists(st.floats(0, 50), min_size=2, max_size=8))
def test_a_curve_that_rises_at_its_points_rises_between_them(times, xs):
    curve = Curve([(float(3 * i), y) for i, y in enumerate(sorted(times))], "name", set())
    values = [curve(x) for x in sorted(xs)]
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(values))


def test_attention_is_interpolated_over_batch_and_context(cost):
    assert cost.attention_at(1, 7) == 3_300_000
    assert cost.attention_at(4, 4 * 13) == 5_900_000
    assert cost.attention_at(4, 4 * 40) == 11_200_000
    between = cost.attention_at(10, 10 * 13) / 1e6  # half way between a batch of 4 and one of 16
    assert between == pytest.approx((5.9 + 9.0 + 3 / 90 * 68.7) / 2, rel=1e-3)
    assert cost.attention_at(32, 32 * 10) == 2 * 9_000_000  # beyond the largest batch in proportion
    assert "decode_attention batch" in cost.outside


def test_lora_is_interpolated_over_tokens_adapters_and_rank(cost):
    assert cost.lora_ps(1, 1, 8, "decode") == 4_000_000
    assert cost.lora_ps(64, 4, 16, "prefill") == 18_000_000
    assert cost.lora_ps(1, 1, 12, "decode") == 4_500_000
    assert cost.lora_ps(1, 2, 8, "decode") == pytest.approx((4 + 1 / 3) * 1e6, abs=1)
    assert cost.lora_ps(1, 8, 8, "decode") == 2 * 5_000_000
    assert cost.lora_ps(1, 1, 32, "decode") == 2 * 5_000_000
    assert {"lora adapters", "lora rank"} <= cost.outside
    assert cost.lora_ps(0, 0, 0, "decode") == 0


def test_padded_operators_pay_for_the_largest_rank(tiny_profile):
    work = Work(UNMERGED, 2, 8, (), 0, 0, 2, 2, 16, 24, 0, 2)
    profile = tiny_profile()
    lora = {name: Cost(profile, name, "fused", ADAPTERS).fixed(work)[3] for name in ("slora", "vllm", "none")}
    fair = Cost(profile, "slora", "fused", ADAPTERS).lora_ps(2, 2, 12, "decode")
    padded = Cost(profile, "vllm", "fused", ADAPTERS).lora_ps(2, 2, 16, "decode")
    assert lora == {"slora": fair, "vllm": padded, "none": 0}


def test_an_adapter_with_more_than_its_share_is_waited_for(tiny_profile):
    """Even: the table; one with most rows: as if alone, and the others' beside it, launched once; between: between."""
    lora = {"slora": {phase: {8: {1: [(1, 2.0), (64, 65.0)], 4: [(1, 2.0), (64, 18.0)]}} for phase in ("decode", "prefill")}}
    cost = Cost(tiny_profile(lora=lora), "slora", "fused", ADAPTERS)
    work = Work(UNMERGED, 0, 0, ((40, 0),), 40, 0, 40, 4, 8, 32, 0, 1)
    took = {largest: cost.fixed(work._replace(largest=largest))[3] for largest in (0, 10, 12, 20, 37, 40)}
    even = cost.lora_ps(40, 4, 8, "prefill")
    assert took[0] == took[10] == even
    alone = {n: cost.lora_ps(n, 1, 8, "prefill") for n in (1, 12, 20, 37, 40)}
    apart = {n: alone[n] + cost.lora_ps(40 - n, 3, 8, "prefill") - alone[1] for n in (12, 20, 37)}
    assert took[20] == apart[20]
    assert took[37] == apart[37] > took[20] > took[12] > even
    assert took[12] == even + (apart[12] - even) * 8 // 40
    assert took[40] == alone[40], "nobody else has rows"


def test_a_step_is_the_sum_of_its_parts(cost):
    work = Work(MIXTURE, 3, 30, ((5, 0), (2, 32)), 7, 2, 4, 2, 16, 24, 8, 4)
    linear, attention, vision, lora, host, switch = cost.fixed(work)
    assert linear == cost.linear_ps(10) + cost.output_ps(4)
    assert attention == cost.prefill_attention_ps(5, 0) + cost.prefill_attention_ps(2, 32)
    assert vision == pytest.approx((12 + 19 / 7) * 1e6, abs=1)
    assert lora == cost.lora_ps(4, 2, 12, "prefill")
    assert host == 1_700_000 + 5 * 230_000
    assert switch == 15_000_000
    gpu = linear + attention + vision + lora + switch + cost.attention_at(3, 30)
    assert cost.step_ps(work) == gpu  # the host's part is hidden behind it
    assert cost.step_ps(work, 1) == linear + lora + cost.attention_at(3, 33)


def test_predictions(cost):
    step = {mode: cost.step_ns(4, 2, context=13, mode=mode) for mode in (BASE, UNMERGED, MERGED, MIXTURE)}
    assert step[BASE] == step[MERGED] < step[UNMERGED] < step[MIXTURE]
    assert cost.step_ns(0) == 0
    assert cost.switch_ns(0) == 15_000
    assert cost.adapter_bytes(1) == 256
    assert cost.load_ns(1) == 10_000 + round(256 / 0.003)


def test_unknown_operator_and_switch_name_the_near_one(tiny_profile):
    with pytest.raises(ProfileError, match="no lora table 'slor'; did you mean 'slora'"):
        Cost(tiny_profile(), "slor", "fused", ADAPTERS)
    with pytest.raises(ProfileError, match="no switch table 'fusd'; did you mean 'fused'"):
        Cost(tiny_profile(), "slora", "fusd", ADAPTERS)

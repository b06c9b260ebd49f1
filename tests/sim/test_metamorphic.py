"""What must not matter does not matter, and what must, does: relations between two runs, where no single number is known."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from policies import POLICIES, make_policy
from sim.cluster import simulate
from traces.request import NO_ADAPTER

TIMES = ("scheduled_ns", "first_token_ns", "finish_ns")
UNMERGED = ("slora", "punica", "fcfs", "oracle")
FREE = {"switch": {"fused": [(8.0, 0.0)], "addmm": [(8.0, 0.0)]}, "load_latency_us": 0.0, "load_gb_per_s": 1e15}


def rows_of(seed: int, count: int = 60, gap_us: int = 120, adapters: int = 3) -> list[dict]:
    """A loaded hour in miniature: exponential gaps, prompts and answers of mixed length, three adapters, few favourites."""
    rng = random.Random(seed)
    arrivals = itertools.accumulate(round(rng.expovariate(1 / gap_us)) for _ in range(count))
    return [
        {"at_us": at, "prompt": rng.randint(1, 40), "output": rng.randint(1, 30),
         "adapter": min(rng.randrange(adapters), rng.randrange(adapters))}
        for at in arrivals
    ]  # fmt: skip


def latencies(result) -> dict[str, list[int]]:
    """Every time of every request from its arrival, -1 where it never happened."""
    rows = result.requests
    since = {name: np.where(rows[name] < 0, -1, rows[name] - rows["arrival_ns"]) for name in TIMES}
    return {name: values.tolist() for name, values in since.items()} | {"status": rows["status"].tolist()}


@pytest.mark.parametrize("name", POLICIES)
def test_a_shift_in_time_changes_nothing(name, worlds):
    @settings(max_examples=25, phases=(Phase.generate,))
    @given(worlds, st.integers(1, 10**9))
    def check(world, shift_us):
        trace, profile, config = world
        later = trace.with_(arrival_ns=trace.arrival_ns + shift_us * 1000)
        early, late = (simulate(which, make_policy(name), profile, config) for which in (trace, later))
        assert latencies(early) == latencies(late)
        assert dict(zip(*early.itl, strict=True)) == dict(zip(*late.itl, strict=True))

    check()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("name", UNMERGED)
def test_the_names_of_adapters_do_not_matter(name, order, make_trace, replay):
    rows = rows_of(seed=1)
    renamed = [row | {"adapter": order[row["adapter"]]} for row in rows]
    one, other = (
        replay(make_trace(which, ranks=(8, 8, 8)), make_policy(name), pool_pages=60) for which in (rows, renamed)
    )
    assert latencies(one) == latencies(other)


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"oracle"}))
def test_without_adapters_every_policy_is_the_base_model(name, make_trace, replay):
    """All are first come, first served then; the oracle alone knows better."""
    trace = make_trace([row | {"adapter": NO_ADAPTER} for row in rows_of(seed=2)])
    assert latencies(replay(trace, make_policy(name), pool_pages=60)) == latencies(
        replay(trace, make_policy("base"), pool_pages=60)
    )


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"oracle", "base"}))
def test_one_adapter_whose_operator_copy_and_switch_are_free_costs_nothing(name, make_trace, replay, tiny_profile):
    trace = make_trace([row | {"adapter": 0} for row in rows_of(seed=3)], ranks=(8,))
    free = {"profile": tiny_profile(1000, **FREE), "operator": "none"}
    result, base = (replay(trace, make_policy(which), **free) for which in (name, "base"))
    assert latencies(result) == latencies(base)
    assert result.requests["adapter"].tolist() != base.requests["adapter"].tolist()


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"merged-only"}))
def test_twice_the_rate_is_not_faster(name, make_trace, replay):
    """Not so for merged-only: where more wait, more are served between two swaps, and fewer swaps can win."""
    rows = rows_of(seed=4, count=150, gap_us=300)
    slow = replay(make_trace(rows), make_policy(name))
    fast = replay(make_trace([row | {"at_us": row["at_us"] // 2} for row in rows]), make_policy(name))
    ttft = [np.percentile(r.requests["first_token_ns"] - r.requests["arrival_ns"], 99) for r in (slow, fast)]
    assert ttft[0] <= ttft[1]


@pytest.mark.parametrize("name", UNMERGED)
def test_a_dearer_operator_is_not_faster(name, make_trace, replay):
    trace = make_trace(rows_of(seed=5))
    free, dear = (replay(trace, make_policy(name), operator=operator) for operator in ("none", "vllm"))
    assert free.requests["finish_ns"].sum() < dear.requests["finish_ns"].sum()
    assert free.time_ns["where"]["lora"] == 0 < dear.time_ns["where"]["lora"]


@pytest.mark.parametrize("name", POLICIES)
def test_two_gpus_share_the_work(name, make_trace, replay):
    trace = make_trace(rows_of(seed=6))
    one, two = (replay(trace, make_policy(name), gpus=gpus) for gpus in (1, 2))
    assert set(two.requests["server"].tolist()) == {0, 1}
    assert two.requests["finish_ns"].sum() < one.requests["finish_ns"].sum()
    for result in (one, two):
        busy_ns = sum(ns for place, ns in result.time_ns["where"].items() if place != "idle")
        assert busy_ns == sum(result.time_ns["mode"].values())


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_seed_gives_the_same_record(name, make_trace, replay):
    one, other = (replay(make_trace(rows_of(seed=7)), make_policy(name), pool_pages=60) for _ in range(2))
    for column in one.requests:
        assert one.requests[column].tolist() == other.requests[column].tolist()
    for column in one.steps:
        assert one.steps[column].tolist() == other.steps[column].tolist()
    assert one.counters == other.counters
    assert dataclasses.asdict(one)["config"] == dataclasses.asdict(other)["config"]

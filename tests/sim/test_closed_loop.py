"""A closed loop, adapters in a memory of their own, and pinned ones: jumping equals stepping, nothing is lost, under every
policy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import POLICIES, make_policy
from policies.residency import ResidencyError
from sim.cluster import SimConfig, simulate
from traces.record import REQUEST_COLUMNS, STATUS


def assert_equal(one, other):
    for column in REQUEST_COLUMNS:
        assert (one.requests[column] == other.requests[column]).all(), column
    assert (one.itl[0] == other.itl[0]).all()
    assert (one.itl[1] == other.itl[1]).all()


@pytest.mark.parametrize("name", POLICIES)
def test_jumping_equals_stepping_and_nothing_is_lost(name, worlds):
    @settings(max_examples=60)
    @given(worlds, st.sampled_from((0, 0, 1, 3, 9)), st.sampled_from((None, 512, 1024)), st.booleans())
    def check(world, closed_loop, adapter_bytes, pinned):
        trace, profile, config = world
        pins = (trace.adapters[0].name,) if pinned else ()
        config = dataclasses.replace(config, closed_loop=closed_loop, adapter_bytes=adapter_bytes, pins=pins)
        policy = make_policy(name)
        result = simulate(trace, policy, profile, config)
        result.check()
        rows = result.requests
        done = rows["status"] == STATUS.index("completed")
        assert len(rows["id"]) == len(trace)
        assert (rows["generated_tokens"][done] == trace.output_tokens[done]).all()
        if not closed_loop:
            assert (rows["arrival_ns"] == trace.arrival_ns).all()
        assert_equal(result, simulate(trace, policy, profile, dataclasses.replace(config, leap=False)))

    check()


@pytest.mark.parametrize("gpus", [1, 2])
def test_so_many_are_in_flight_until_the_trace_ends(gpus, make_trace, tiny_profile):
    trace = make_trace([{"at_us": 10**6 * i, "prompt": 9, "output": 5 + i % 7, "adapter": i % 3} for i in range(40)])
    result = simulate(trace, make_policy("slora"), tiny_profile(), SimConfig(page_tokens=4, closed_loop=6, gpus=gpus))
    arrival, finish = result.requests["arrival_ns"], result.requests["finish_ns"]
    assert (arrival[:6] == 0).all(), "at once, whatever the trace says"
    assert sorted(arrival[6:].tolist()) == sorted(finish)[:34], "one arrives at the moment when one ends"
    assert (np.diff(arrival) >= 0).all()
    assert result.counters["end_ns"] == finish.max()
    assert len(set(result.requests["server"].tolist())) == gpus


def test_more_pins_than_the_memory_holds_are_refused(make_trace, tiny_profile):
    trace = make_trace([{"at_us": 0, "adapter": 0}])
    config = SimConfig(page_tokens=4, adapter_bytes=300, pins=("a0", "a2"))
    with pytest.raises(ResidencyError, match="'a2' cannot be pinned: the pinned adapters alone exceed the memory"):
        simulate(trace, make_policy("slora"), tiny_profile(), config)

"""Jumping over a run of decode steps gives exactly what stepping gives, and nothing is ever lost, under every policy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import POLICIES, make_policy
from sim.cluster import simulate
from traces.record import REQUEST_COLUMNS, STATUS

OPTIONS = {
    "valora": st.fixed_dictionaries({
        "theta_s": st.sampled_from(("0", "0.00005", "0.0003", "0.5")), "prefetch": st.sampled_from(("0", "2")),
        "mixture": st.sampled_from(("true", "true", "false")),
    }),
    "dlora": st.fixed_dictionaries({
        "credit_s": st.sampled_from(("0", "0.0002", "0.5")), "merge_right": st.sampled_from(("0.4", "1.0")),
    }),
    "fcfs": st.fixed_dictionaries({"max_loras": st.sampled_from(("1", "2"))}),
}


def assert_nothing_lost(result, trace):
    """One row a request, each with an end; every token of a completed request counted once, every gap between tokens too."""
    result.check()
    rows = result.requests
    done = rows["status"] == STATUS.index("completed")
    assert len(rows["id"]) == len(trace)
    assert (rows["generated_tokens"][done] == trace.output_tokens[done]).all()
    assert (rows["arrival_ns"] == trace.arrival_ns).all()
    assert result.itl[1].sum() == np.maximum(rows["generated_tokens"] - 1, 0).sum()


@pytest.mark.parametrize("name", POLICIES)
def test_leap_equals_step(name, worlds):
    @settings(max_examples=60)
    @given(worlds, OPTIONS.get(name, st.just({})))
    def check(world, options):
        trace, profile, config = world
        policy = make_policy(name, options)
        leap = simulate(trace, policy, profile, config)
        step = simulate(trace, policy, profile, dataclasses.replace(config, leap=False))
        assert_nothing_lost(leap, trace)
        assert_nothing_lost(step, trace)
        for column in REQUEST_COLUMNS:
            assert leap.requests[column].tolist() == step.requests[column].tolist(), column
        assert dict(zip(*leap.itl, strict=True)) == dict(zip(*step.itl, strict=True))
        assert leap.time_ns["mode"] == step.time_ns["mode"]
        assert leap.counters | {"plans": 0} == step.counters | {"plans": 0}

    check()

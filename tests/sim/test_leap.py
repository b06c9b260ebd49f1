"""Jumping over a run of decode steps gives exactly what stepping gives, and nothing is ever lost, under every policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import POLICIES, make_policy
from policies.profile import load_profile
from policies.view import Limits
from sim.cluster import SimConfig, simulate
from traces.options import SuggestingParser, add_trace_arguments, load_trace
from traces.record import REQUEST_COLUMNS, STATUS

PROFILES = Path(__file__).parents[2] / "sim" / "profiles"
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


def assert_leap_equals_step(trace, policy, profile, config):
    """All that a run tells is the same both ways, but for how often the policy was asked."""
    leap = simulate(trace, policy, profile, config)
    step = simulate(trace, policy, profile, dataclasses.replace(config, leap=False))
    assert_nothing_lost(leap, trace)
    assert_nothing_lost(step, trace)
    for column in REQUEST_COLUMNS:
        assert leap.requests[column].tolist() == step.requests[column].tolist(), column
    assert dict(zip(*leap.itl, strict=True)) == dict(zip(*step.itl, strict=True))
    assert leap.time_ns["mode"] == step.time_ns["mode"]
    assert leap.counters | {"plans": 0} == step.counters | {"plans": 0}
    return leap, step


@pytest.mark.parametrize("name", POLICIES)
def test_leap_equals_step(name, worlds):
    @settings(max_examples=80)
    @given(worlds, OPTIONS.get(name, st.just({})))
    def check(world, options):
        trace, profile, config = world
        assert_leap_equals_step(trace, make_policy(name, options), profile, config)

    check()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_leap_equals_step_under_a_shipped_profile(name, seed):
    """Retrieval on LLaVA-1.5-7B faster than one GPU keeps up with, in a pool so small that it preempts and evicts."""
    words = ["--max-requests", "60", "--rate", "25", "--workload", "retrieval", "--adapters", "6", "--ranks", "64,32",
             "--repeat-images", "0.4", "--adapter-assign", "zipf:1.2", "--seed", str(seed)]  # fmt: skip
    parser = SuggestingParser()
    add_trace_arguments(parser)
    profile = load_profile(PROFILES / "analytic-h200-llava-1.5-7b.json")
    trace = load_trace(parser.parse_args(words), profile)
    config = SimConfig(limits=Limits(12, 1024, profile.max_context), memory_share=0.022, check_invariants=True)
    policy = make_policy(name, {"theta_s": "0.3"} if name == "valora" else {})
    leap, step = assert_leap_equals_step(trace, policy, profile, config)
    assert leap.counters["preemptions"] > 0
    assert leap.counters["adapter_evictions"] > 0 or name == "base"
    assert (name, seed) != ("valora", 1) or min(leap.time_ns["mode"][mode] for mode in ("unmerged", "merged", "mixture")) > 0
    assert leap.counters["plans"] < step.counters["plans"] == step.counters["steps"]

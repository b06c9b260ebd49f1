"""`--drain`: a run ends so long after its last arrival, and what has not ended by then is told apart."""

from dataclasses import replace

import numpy as np
import pytest

from policies import make_policy
from sim.__main__ import build_parser, find_profile, main, sim_config
from sim.cluster import simulate
from traces.options import load_trace
from traces.record import REQUEST_COLUMNS, STATUS, summarize

UNFINISHED = STATUS.index("unfinished")
WORDS = ["--workload", "retrieval", "--max-requests", "200", "--rate", "80", "--drain", "1.5"]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("policy", ["valora", "merged-only"])
def test_an_overloaded_run_ends_after_its_drain_and_jumping_equals_stepping(policy, ahead):
    args = build_parser().parse_args([*WORDS, "--policy", policy])
    profile = replace(find_profile(None, args.model), steps_ahead=ahead)
    trace, config = load_trace(args, profile), sim_config(args, profile)
    jumped = simulate(trace, make_policy(policy), profile, config)
    stepped = simulate(trace, make_policy(policy), profile, replace(config, leap=False, check_invariants=True))
    whole = simulate(trace, make_policy(policy), profile, replace(config, drain_s=None))
    assert all((jumped.requests[name] == stepped.requests[name]).all() for name in REQUEST_COLUMNS)
    status, end_ns = jumped.requests["status"], int(trace.arrival_ns[-1]) + 1_500_000_000
    cut = status == UNFINISHED
    assert 0 < cut.sum() < len(trace)
    assert (jumped.requests["finish_ns"][cut] >= end_ns).all()
    assert jumped.counters["end_ns"] < end_ns + 200_000_000  # the steps under way end
    before = ~cut
    assert (jumped.requests["finish_ns"][before] == whole.requests["finish_ns"][before]).all(), "nothing else changes"
    assert np.array_equal(cut, whole.requests["finish_ns"] > jumped.counters["end_ns"])
    summary = summarize(jumped)
    assert summary["unfinished"] == summary["failed"] == cut.sum()
    assert any(f"{cut.sum()} of 200 requests were cut off unfinished (--drain)" in note for note in jumped.config["notes"])


def test_a_closed_loop_has_no_last_arrival(capsys):
    with pytest.raises(SystemExit):
        main(["--drain", "3", "--closed-loop", "4"])
    assert "--drain counts from the last arrival" in capsys.readouterr().err

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


def test_the_table_says_how_many_were_cut_off(capsys):
    assert main([*WORDS, "--policy", "merged-only", "--no-error-bars"]) == 0
    printed = capsys.readouterr().out
    failed, cut = (int(printed.split(name)[1].split()[0].strip("*")) for name in ("Failed requests:", "of them cut off:"))
    assert 0 < failed == cut


def test_notes_say_why_requests_were_refused(capsys):
    assert main(["--max-requests", "60", "--adapters", "4", "--adapter-memory", "0.01", "--clip", "--no-error-bars"]) == 0
    printed = capsys.readouterr().out
    assert "requests, with their adapters, do not fit the pages of keys and values, or --adapter-memory, and" in printed
    assert "were refused as unservable; --clip" not in printed
    with pytest.raises(SystemExit):
        main(["--max-requests", "60", "--adapter-memory", "500"])
    assert "beside 536870912000 bytes of --adapter-memory leaves no page" in capsys.readouterr().err


def test_the_note_on_what_was_extrapolated_is_that_of_single_steps(capsys):
    """And names only what lay beyond: 30 contexts of at most 4,096 tokens do not."""
    said = []
    for more in ([], ["--no-leap"]):
        words = ["--policy", "valora", "--policy-option", "theta_s=0.3", "--max-batch", "16", "--workload", "retrieval"]
        words += ["--ranks", "256", "--adapters", "2", "--max-requests", "100", "--rate", "25", "--no-error-bars"]
        assert main([*words, "--profile", "analytic-h200-llava-1.5-7b", *more]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "beyond the profile's range" in line])
    assert said[0] == said[1]
    assert len(said[0]) == 1
    assert "lora rank" in said[0][0]
    assert "attention" not in said[0][0]

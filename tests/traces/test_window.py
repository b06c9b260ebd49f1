"""Parts and paces of a trace: exact in nanoseconds, each with its note; the artefact's sampling as measured."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import window
from traces.readers import read_trace
from traces.request import Trace, TraceError

CODE = Path(__file__).parents[3] / "shared" / "traces" / "azure" / "AzureLLMInferenceTrace_code.csv"
S = 1_000_000_000


def world(*arrivals_s, **settings):
    n = len(arrivals_s)
    return Trace.build([round(a * S) for a in arrivals_s], range(1, n + 1), [1] * n, settings=settings)


def ids(trace):
    return trace.prompt_tokens.tolist()


def test_window_takes_its_first_instant_and_not_its_last():
    part = window.window(world(0, 1, 1.5, 2, 3, first_stamp_ns=7 * S), 1, 1)
    assert (ids(part), part.arrival_ns.tolist()) == ([2, 3], [0, S // 2])
    assert part.notes == ("window from 1 s to 2 s: 2 of 5 requests",)
    assert part.settings == {"first_stamp_ns": 8 * S}


def test_window_to_the_end_and_past_it():
    assert ids(window.window(world(0, 1, 2), 1)) == [2, 3]
    with pytest.raises(TraceError, match=r"nothing in the window at 3 s; the last arrives at 2\.000 s"):
        window.window(world(0, 1, 2), 3)
    with pytest.raises(TraceError, match="--start"):
        window.window(world(0, 1), float("nan"))


def test_first_requests():
    assert ids(window.first_requests(world(0, 1, 2), 2)) == [1, 2]
    assert window.first_requests(world(0, 1, 2), 3).notes == ()
    with pytest.raises(TraceError, match="--max-requests 0"):
        window.first_requests(world(0), 0)


def test_rate_is_the_mean_rate_of_the_gaps():
    trace = world(10, 11, 13, 14)
    assert window.mean_rate(trace) == 0.75
    fast = window.set_rate(trace, 3.0)
    assert window.mean_rate(fast) == pytest.approx(3.0, rel=1e-9)
    assert fast.arrival_ns.tolist() == [2.5 * S, 2.75 * S, 3.25 * S, 3.5 * S]
    for still in (world(1), world(1, 1)):
        with pytest.raises(TraceError, match="at one instant"):
            window.set_rate(still, 1.0)


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_scaling_keeps_order_and_ties(arrivals, factor):
    trace = Trace.build(sorted(arrivals), [1] * len(arrivals), [1] * len(arrivals))
    scaled = window.time_scale(trace, factor)
    scaled.check()
    assert np.abs(scaled.arrival_ns - trace.arrival_ns.astype(np.float64) * factor).max() <= 0.5 + 1e18 * 2**-52
    assert ((np.diff(trace.arrival_ns) != 0) | (np.diff(scaled.arrival_ns) == 0)).all()


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan"), 1e300])
def test_bad_scales(factor):
    with pytest.raises(TraceError):
        window.time_scale(world(0, 1), factor)


def test_thinning_keeps_a_fraction_and_repeats_with_the_seed():
    trace = world(*range(4000))
    kept = window.thin(trace, 0.25, seed=3)
    assert abs(len(kept) - 1000) < 3 * np.sqrt(4000 * 0.25 * 0.75)
    assert ids(kept) == ids(window.thin(trace, 0.25, seed=3))
    assert ids(kept) != ids(window.thin(trace, 0.25, seed=4))
    for bad in (0, 1.1, float("nan")):
        with pytest.raises(TraceError, match="--sample"):
            window.thin(trace, bad, seed=3)


def test_valora_sample_takes_exactly_r_of_each_second_that_has_them():
    trace = world(0.2, 0.3, 0.4, 1.0, 2.1, 2.2, 2.9, 3.0, 3.5, first_stamp_ns=0)
    part = window.valora_sample(trace, 2, seed=0)
    seconds = (part.arrival_ns + part.settings["first_stamp_ns"]) // S
    assert seconds.tolist() == [0, 0, 2, 2, 3, 3]
    assert part.arrival_ns[0] == 0
    few = window.valora_sample(trace, 2, seed=0, busy_seconds=2)
    assert len(few) == 2
    with pytest.raises(TraceError, match=r"has 9 requests \(the most is 3\)"):
        window.valora_sample(trace, 9, seed=0)


def test_valora_sample_cuts_at_wall_clock_seconds():
    trace = world(0.0, 0.3, first_stamp_ns=S - 200_000_000)  # 0.8 s and 1.1 s past the second
    with pytest.raises(TraceError, match="the most is 1"):
        window.valora_sample(trace, 2, seed=0)


def test_valora_sample_of_the_real_trace_delivers_what_was_measured():
    if not CODE.exists():
        pytest.skip("the Azure traces are not part of the project")
    trace = read_trace(CODE)
    counts = [len(window.valora_sample(trace, r, seed=0)) for r in (2, 4, 6, 8, 16)]
    assert counts == [586, 1060, 1362, 1256, 832]

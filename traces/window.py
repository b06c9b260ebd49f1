"""Parts and paces of a trace: time windows, the first n, thinning, a set rate, and the VaLoRA artefact's sampling.

Every function returns a new Trace with a note. It knows nothing of tokens, adapters or workloads.
`settings["first_stamp_ns"]`, where present, is the wall-clock time of arrival 0; scaling time removes it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from traces.request import Trace, TraceError

SECOND_NS = 1_000_000_000
SAMPLE_STREAM = 1
"""Second word of the seed here; each module has its own, so that one seed gives independent draws."""


def window(trace: Trace, start_s: float = 0.0, duration_s: float | None = None) -> Trace:
    """Requests that arrive in [start_s, start_s + duration_s); time starts anew at start_s."""
    start_ns = _nanoseconds("--start", start_s)
    end_ns = 2**62 if duration_s is None else start_ns + _nanoseconds("--duration", duration_s)
    first, last = np.searchsorted(trace.arrival_ns, [start_ns, end_ns])
    if first >= last:
        last_s = trace.arrival_ns[-1] / SECOND_NS if len(trace) else 0
        raise TraceError(f"{trace.source}: nothing in the window at {start_s:g} s; the last arrives at {last_s:.3f} s")
    part = trace.take(np.arange(first, last))
    until = "the end" if duration_s is None else f"{start_s + duration_s:g} s"
    note = f"window from {start_s:g} s to {until}: {len(part)} of {len(trace)} requests"
    settings = {}
    if "first_stamp_ns" in trace.settings:
        settings["first_stamp_ns"] = trace.settings["first_stamp_ns"] + start_ns
    return part.with_(note=note, settings=settings, arrival_ns=part.arrival_ns - start_ns)


def first_requests(trace: Trace, count: int) -> Trace:
    """The first `count` requests."""
    if count < 1:
        raise TraceError(f"--max-requests {count}: at least 1")
    if count >= len(trace):
        return trace
    return trace.take(np.arange(count)).with_(note=f"the first {count} of {len(trace)} requests")


def thin(trace: Trace, fraction: float, seed: int) -> Trace:
    """Each request kept independently with probability `fraction`; a Poisson process stays one."""
    if not 0 < fraction <= 1:
        raise TraceError(f"--sample {fraction:g}: a fraction in (0, 1]")
    kept = np.random.default_rng([seed, SAMPLE_STREAM]).random(len(trace)) < fraction
    if not kept.any():
        raise TraceError(f"{trace.source}: --sample {fraction:g} keeps none of {len(trace)} requests; raise it")
    note = f"sampled {fraction:g} of the requests at random (seed {seed}): {kept.sum()} of {len(trace)}"
    return trace.take(kept).with_(note=note)


def time_scale(trace: Trace, factor: float) -> Trace:
    """Every arrival time multiplied by `factor`: 2 halves the rate, 0.5 doubles it. Whole nanoseconds."""
    if not (math.isfinite(factor) and factor > 0):
        raise TraceError(f"--time-scale {factor:g}: a number above 0")
    return _stretched(trace, factor, f"arrival times multiplied by {factor:g}")


def set_rate(trace: Trace, rate: float) -> Trace:
    """Time rescaled so that the mean rate, (n - 1) / (last - first arrival), is `rate` requests per second."""
    if not (math.isfinite(rate) and rate > 0):
        raise TraceError(f"--rate {rate:g}: requests per second, above 0")
    now = mean_rate(trace)
    if now == 0 or math.isinf(now):
        raise TraceError(f"{trace.source}: all {len(trace)} requests arrive at one instant; no --rate can be set")
    return _stretched(trace, now / rate, f"time rescaled from {now:.4g} to {rate:g} requests/s")


def mean_rate(trace: Trace) -> float:
    """(n - 1) / (last - first arrival) in requests per second; 0 for one request, inf for one instant."""
    if len(trace) < 2:
        return 0.0
    span_ns = int(trace.arrival_ns[-1] - trace.arrival_ns[0])
    return (len(trace) - 1) / (span_ns / SECOND_NS) if span_ns else math.inf


def valora_sample(trace: Trace, per_second: int, seed: int, busy_seconds: int = 300) -> Trace:
    """The VaLoRA artefact's arrivals: of each wall-clock second with >= r rows, exactly r, drawn at random.

    Only the first `busy_seconds` seconds that have any row are looked at (benchmarks/run_exp.py). Left out: its final
    `[:5]`, a debugging left-over, and its unseeded draw. The delivered rate is not r: quiet seconds stay in the
    time line but deliver nothing, and seconds with fewer than r rows are dropped. It is a capped sample, no replay.
    """
    if per_second < 1:
        raise TraceError(f"--arrivals valora-sample:{per_second}: at least 1 request a second")
    wall = (trace.arrival_ns + trace.settings.get("first_stamp_ns", 0)) // SECOND_NS
    _, second, rows = np.unique(wall, return_inverse=True, return_counts=True)
    busy = (rows >= per_second) & (np.arange(len(rows)) < busy_seconds)
    draw = np.random.default_rng([seed, SAMPLE_STREAM]).random(len(trace))
    order = np.lexsort((draw, second))
    place = np.empty(len(trace), np.int64)  # place of each request among those of its second, in random order
    place[order] = np.arange(len(trace)) - (np.cumsum(rows) - rows)[second[order]]
    kept = busy[second] & (place < per_second)
    if not kept.any():
        raise TraceError(
            f"{trace.source}: --arrivals valora-sample:{per_second} keeps nothing: none of the first {busy_seconds} "
            f"busy seconds has {per_second} requests (the most is {rows[:busy_seconds].max()})"
        )
    part = trace.take(kept)
    start_ns = int(part.arrival_ns[0])
    part = part.with_(arrival_ns=part.arrival_ns - start_ns)
    note = (
        f"VaLoRA artefact sampling, {per_second} of each second with as many, from the first {busy_seconds} busy "
        f"seconds: {len(part)} of {len(trace)} requests, {mean_rate(part):.3g} requests/s delivered"
    )
    settings = {}
    if "first_stamp_ns" in trace.settings:
        settings["first_stamp_ns"] = trace.settings["first_stamp_ns"] + start_ns
    return part.with_(note=note, settings=settings)


def _stretched(trace: Trace, factor: float, note: str) -> Trace:
    last_ns = float(trace.arrival_ns[-1]) * factor if len(trace) else 0.0
    if last_ns > 2**62:
        raise TraceError(f"{trace.source}: {note} would reach past {2**62} ns (146 years)")
    # A float holds whole nanoseconds exactly up to 104 days; past that the error is below one part in 10^15.
    stretched = np.rint(trace.arrival_ns * factor).astype(np.int64)
    settings = {name: value for name, value in trace.settings.items() if name != "first_stamp_ns"}
    return replace(trace, settings=settings).with_(note=note, arrival_ns=stretched)


def _nanoseconds(name: str, seconds: float) -> int:
    if not (math.isfinite(seconds) and 0 <= seconds < 2**62 / SECOND_NS):
        raise TraceError(f"{name} {seconds:g}: seconds, at least 0")
    return round(seconds * SECOND_NS)

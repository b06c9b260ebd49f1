"""The steps of a run as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

One process a server, its leases as slices named by mode, and two counters: requests running (in the batch) and waiting.
Waiting counts requests that are scheduled later: those that never were leave no time at which they stopped waiting, and
preempted ones are in neither count. Format: Trace Event Format (Google), the "JSON object" flavour; times in
microseconds. It knows nothing of directories and atomicity (`result_files`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from traces.record import MODES, RunResult

MAX_LEASES = 100_000
"""Leases shown, two events each: viewers in a browser become slow beyond a few hundred thousand events."""

# Reserved names of chrome://tracing's palette; Perfetto picks a colour from the name of the slice.
_COLOURS = {"base": "grey", "unmerged": "thread_state_runnable", "merged": "good", "mixture": "yellow"}

_SLICE = (
    '{"name":"%s","cat":"step","ph":"X","pid":%d,"tid":0,"ts":%.3f,"dur":%.3f,"cname":"%s","args":{"steps":%d,'
    '"merged":%d,"decodes":%d,"prefills":%d,"prefill_tokens":%d,"images":%d,"adapters":%d,"context_tokens":%d}}'
)
_COUNTER = '{"name":"requests","ph":"C","pid":%d,"ts":%.3f,"args":{"running":%d,"waiting":%d}}'
_ARGUMENTS = ("steps", "merged", "decodes", "prefills", "prefill_tokens", "images", "adapters", "context_tokens")


def write_chrome_trace(result: RunResult, adapters: tuple[str, ...], file: TextIO) -> str:
    """Write the events; returns a note for the reader where leases were left out, otherwise ''.

    A run without recorded steps gives a valid trace with no slices.
    """
    leases = 0 if result.steps is None else len(result.steps["start_ns"])
    shown = np.zeros(0, np.int64)
    note = ""
    if leases:
        shown = np.argsort(result.steps["start_ns"], kind="stable")[:MAX_LEASES]
    if leases > len(shown):
        until_s = int(result.steps["start_ns"][shown[-1]]) / 1e9
        note = f"trace.json shows the first {len(shown):,} of {leases:,} leases (up to {until_s:.3f} s)"
    about = {"policy": result.policy, "operator": result.operator, "note": note, "adapters": list(adapters)}
    file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps(about) + ',"traceEvents":[')
    separator = "\n"
    for event in _events(result, shown):
        file.write(separator + event)
        separator = ",\n"
    file.write("\n]}\n")
    return note


def _events(result: RunResult, shown: np.ndarray) -> Iterator[str]:
    if not len(shown):
        return
    steps = {name: column[shown] for name, column in result.steps.items()}
    for server in np.unique(steps["server"]).tolist():
        name = json.dumps(f"server {server} ({result.policy})")
        yield f'{{"name":"process_name","ph":"M","pid":{server},"args":{{"name":{name}}}}}'
    waiting = _waiting(result.requests, steps["server"], steps["start_ns"])
    start_us, duration_us = steps["start_ns"] / 1e3, steps["duration_ns"] / 1e3
    columns = [steps["server"], steps["mode"], start_us, duration_us, *(steps[name] for name in _ARGUMENTS), waiting]
    for server, mode, start, duration, *arguments, queue in zip(*(c.tolist() for c in columns), strict=True):
        yield _SLICE % (MODES[mode], server, start, duration, _COLOURS[MODES[mode]], *arguments)
        yield _COUNTER % (server, start, arguments[2] + arguments[3], queue)


def _waiting(requests: dict[str, np.ndarray], server: np.ndarray, time_ns: np.ndarray) -> np.ndarray:
    """Requests of the lease's server that have arrived by its start and are scheduled after it. Shape (leases,)."""
    waiting = np.zeros(len(time_ns), np.int64)
    scheduled = requests["scheduled_ns"] >= 0
    for each in np.unique(server):
        rows, leases = scheduled & (requests["server"] == each), server == each
        arrived = np.searchsorted(np.sort(requests["arrival_ns"][rows]), time_ns[leases], side="right")
        begun = np.searchsorted(np.sort(requests["scheduled_ns"][rows]), time_ns[leases], side="right")
        waiting[leases] = arrived - begun
    return waiting

"""Figures over the time of a run, from its steps: modes and switches over time, and a Gantt chart of the steps.

It needs results whose steps were recorded; it draws nothing for the others and says so. One function a figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from analysis.style import GRID, MODE_FILLS, footer, legend, provenance, save, sheet
from traces.record import MODES, RunResult, summarize
from traces.result_files import ResultError

BINS = 120
MOST_ROWS = 8


def _with_steps(results: Mapping[str, RunResult]) -> dict[str, RunResult]:
    found = {label: result for label, result in results.items() if result.steps is not None and len(result.steps["mode"])}
    if not found:
        raise ResultError("no steps were recorded in these results; write them with `python -m sim --output DIR`")
    return dict(list(found.items())[:MOST_ROWS])


def modes_over_time(results: Mapping[str, RunResult], directory: str | Path) -> list[Path]:
    """The share of the GPUs' time in each mode, and switches per second, in BINS equal parts of the run.

    Writes modes.{png,svg,csv} (policy, second, base, unmerged, merged, mixture, idle in percent, switches per s).
    """
    results = _with_steps(results)
    numbers = []
    with sheet(9.6, 0.9 + 1.7 * len(results), len(results), 1, sharex=True) as (figure, axes):
        end_s = max(float(np.max(r.steps["start_ns"] + r.steps["duration_ns"])) / 1e9 for r in results.values())
        edges = np.linspace(0, end_s, BINS + 1)
        width = edges[1] - edges[0]
        for (panel,), (label, result) in zip(axes, results.items(), strict=True):
            gpus = int(result.counters.get("gpus") or 1)
            shares = _shares(result, edges) / (gpus * width) * 100
            shares = np.vstack([shares, np.maximum(0, 100 - shares.sum(axis=0))])
            base = np.zeros(BINS)
            for mode, share in zip((*MODES, "idle"), shares, strict=True):
                colour, hatch = MODE_FILLS[mode]
                style = {"facecolor": colour, "hatch": hatch, "edgecolor": "#555555", "linewidth": 0.3, "step": "post"}
                panel.fill_between(edges, np.append(base, base[-1]), np.append(base + share, (base + share)[-1]),
                                   label=mode, **style)  # fmt: skip
                base += share
            rate = np.histogram(_switches_s(result), edges)[0] / width
            twin = panel.twinx()
            twin.plot(edges[:-1] + width / 2, rate, color="#D55E00", linewidth=1.1, label="switches")
            twin.set(ylim=(0, max(1.0, float(rate.max()) * 1.15)), ylabel="Switches (1/s)" if rate.any() else "")
            twin.yaxis.label.set_color("#D55E00")
            twin.spines["right"].set_visible(bool(rate.any()))
            twin.tick_params(right=bool(rate.any()), labelright=bool(rate.any()))
            panel.set(ylim=(0, 100), xlim=(0, end_s), ylabel="GPU time (%)")
            panel.set_title(label if rate.any() else f"{label}: no switch", loc="left")
            columns = [edges[:-1], *shares, rate]
            numbers += [(label, *map(float, row)) for row in zip(*columns, strict=True)]
        axes[-1, 0].set_xlabel("Time (s)")
        legend(figure, [axes[0, 0], twin])
        footer(figure, provenance(summarize(result)["run"] for result in results.values()))
        header = ("policy", "second", *(f"{mode}_percent" for mode in (*MODES, "idle")), "switches_per_s")
        return save(figure, numbers, header, Path(directory) / "modes")


def _shares(result: RunResult, edges: np.ndarray) -> np.ndarray:
    """Seconds of all GPUs in each mode and bin, shape (modes, bins): each lease is spread over the bins it spans."""
    start, length = result.steps["start_ns"] / 1e9, result.steps["duration_ns"] / 1e9
    shares = np.zeros((len(MODES), len(edges) - 1))
    for number in range(len(MODES)):
        own = result.steps["mode"] == number
        begin, end = np.sort(start[own]), np.sort(start[own] + length[own])
        # Seconds spent up to each edge: all that began before it, less what still runs beyond it.
        begun = np.searchsorted(begin, edges)
        ended = np.searchsorted(end, edges)
        before = (edges * begun - np.append(0, np.cumsum(begin))[begun]) - (
            edges * ended - np.append(0, np.cumsum(end))[ended]
        )
        shares[number] = np.diff(before)
    return shares


def _switches_s(result: RunResult) -> np.ndarray:
    """When the folded adapter changed, in seconds, over all GPUs."""
    steps, times = result.steps, []
    for server in np.unique(steps["server"]):
        own = np.flatnonzero(steps["server"] == server)
        own = own[np.argsort(steps["start_ns"][own], kind="stable")]
        changed = np.diff(steps["merged"][own], prepend=-1) != 0
        times.append(steps["start_ns"][own][changed] / 1e9)
    return np.concatenate(times)


def gantt(results: Mapping[str, RunResult], directory: str | Path, window: tuple[float, float] | None = None) -> list[Path]:
    """Steps of every GPU in a window of time: mode by fill, prefills above decodes, switches as orange marks.

    window: (first second, seconds); by default two seconds around a switch, or where the most arrive. Writes
    gantt.{png,svg,csv} (policy, server, start, duration in s, mode, merged, decodes, prefill tokens).
    """
    results = _with_steps(results)
    first_s, length_s = window or (_interesting_s(results), 2.0)
    rows = [(label, server) for label, r in results.items() for server in np.unique(r.steps["server"]).tolist()][:12]
    numbers = []
    with sheet(10.5, 1.0 + 0.55 * len(rows)) as (figure, ((axes,),)):
        for y, (label, server) in enumerate(rows):
            steps = results[label].steps
            start = steps["start_ns"] / 1e9
            end = start + steps["duration_ns"] / 1e9
            shown = np.flatnonzero((steps["server"] == server) & (end > first_s) & (start < first_s + length_s))
            for mode in MODES:
                for prefill in (False, True):
                    own = shown[(steps["mode"][shown] == MODES.index(mode)) & ((steps["prefills"][shown] > 0) == prefill)]
                    spans = list(zip(start[own], end[own] - start[own], strict=True))
                    colour, hatch = MODE_FILLS[mode]
                    style = {"facecolor": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.25}
                    axes.broken_barh(spans, (y - 0.05, 0.4) if prefill else (y - 0.4, 0.35), **style)
            switched = shown[(steps["switch_ns"][shown] > 0) & (start[shown] >= first_s)]
            axes.plot(start[switched], np.full(len(switched), y - 0.46), "v", color="#D55E00", markersize=4, clip_on=False)
            columns = ("mode", "merged", "decodes", "prefill_tokens")
            for i in shown.tolist():
                mode, *others = (int(steps[name][i]) for name in columns)
                numbers.append((label, server, float(start[i]), float(end[i] - start[i]), MODES[mode], *others))
        _label_gantt(axes, rows, first_s, length_s)
        legend(figure, axes)
        footer(figure, provenance(summarize(result)["run"] for result in results.values()))
        header = ("policy", "server", "start_s", "duration_s", "mode", *columns[1:])
        return save(figure, numbers, header, Path(directory) / "gantt")


def _label_gantt(axes, rows: list[tuple[str, int]], first_s: float, length_s: float) -> None:
    several = any(server for _, server in rows)
    axes.set_yticks(range(len(rows)), [f"{label}, GPU {server}" if several else label for label, server in rows])
    axes.set(xlim=(first_s, first_s + length_s), ylim=(len(rows) - 0.4, -0.6), xlabel="Time (s)")
    axes.grid(axis="x", **GRID)
    for mode in MODES[1:]:
        colour, hatch = MODE_FILLS[mode]
        axes.fill([], [], facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.6, label=mode)
    axes.plot([], [], "v", color="#D55E00", markersize=4, linestyle="none", label="switch")
    axes.plot([], [], " ", label="upper half: decodes only, lower half: with a prefill")


def _interesting_s(results: Mapping[str, RunResult]) -> float:
    """Half a second before the middle one of the first result's switches that has any; else the busiest time."""
    for result in results.values():
        switches_s = np.sort(_switches_s(result))
        if len(switches_s):
            return max(0.0, float(switches_s[len(switches_s) // 2]) - 0.5)
    result = next(iter(results.values()))
    arrival_s = result.requests["arrival_ns"] / 1e9
    counts, edges = np.histogram(arrival_s, np.arange(0, arrival_s.max() + 4, 2.0))
    return float(edges[np.argmax(counts)])

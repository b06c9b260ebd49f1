"""Simulator against engine: what two results of the same trace and policies say, side by side.

The first result is the reference of the differences. It reads results only and knows neither program.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from analysis.figures import PERCENTS
from analysis.style import DASHES, GRID, HATCHES, PALETTE, footer, legend, places, plain_log, provenance, save, sheet
from traces.record import STATUS, RunResult, latencies_ms, summarize
from traces.result_files import ResultError

METRICS = {
    "avg_token_latency_s": "avg token latency", "mean_ttft_ms": "mean TTFT", "p99_ttft_ms": "p99 TTFT",
    "mean_tpot_ms": "mean TPOT", "p99_tpot_ms": "p99 TPOT", "mean_e2el_ms": "mean E2EL", "output_throughput": "throughput",
}  # fmt: skip


def agreement(first: Mapping[str, RunResult], second: Mapping[str, RunResult], directory: str | Path,
              names: tuple[str, str] = ("simulator", "engine")) -> list[Path]:  # fmt: skip
    """How far `first` is from `second`, by metric and policy, and both distributions of the end-to-end latency.

    Results by policy; those that only one has are left out. Writes agreement.{png,svg,csv} (policy, metric, first, second,
    difference in percent of second). Raises ResultError if they share no policy.
    """
    common = [policy for policy in first if policy in second]
    if not common:
        raise ResultError(f"the two results share no policy: {', '.join(first)} against {', '.join(second)}")
    numbers = []
    with sheet(10.5, 4.4, 1, 2) as (figure, ((bars, curves),)):
        width = 0.8 / len(common)
        for i, (policy, place) in enumerate(places(common).items()):
            pair = summarize(first[policy]), summarize(second[policy])
            for x, metric in enumerate(METRICS):
                ours, theirs = (summary[metric] for summary in pair)
                difference = 100 * (ours / theirs - 1) if ours and theirs else None
                numbers.append((policy, metric, ours, theirs, difference))
                if difference is not None:
                    at = x + (i - (len(common) - 1) / 2) * width
                    bars.bar(at, difference, width, color=PALETTE[place], hatch=HATCHES[place], edgecolor="black",
                             linewidth=0.6, label=policy if not x else None)  # fmt: skip
            for result, dash in zip((first[policy], second[policy]), DASHES, strict=False):
                done = np.flatnonzero(result.requests["status"] == STATUS.index("completed"))
                if len(done):
                    values = np.percentile(latencies_ms(result.requests, done)["e2el"], PERCENTS) / 1e3
                    curves.plot(values, PERCENTS, color=PALETTE[place], linestyle=dash, linewidth=1.5)
        bars.axhline(0, color="black", linewidth=0.8)
        bars.set_xticks(range(len(METRICS)), METRICS.values(), rotation=30, ha="right")
        bars.set_ylabel(f"{names[0]} against {names[1]} (%)")
        bars.grid(axis="y", **GRID)
        for name, dash in zip(names, DASHES, strict=False):
            curves.plot([], [], color="#555555", linestyle=dash, linewidth=1.5, label=name)
        curves.set(xscale="log", xlabel="End-to-end latency (s)", ylabel="Requests (%)", ylim=(0, 101))
        plain_log(curves.xaxis)
        curves.grid(**GRID)
        legend(figure, [bars, curves], columns=8)
        footer(figure, provenance(summarize(r[policy])["run"] for r in (first, second) for policy in common))
        header = ("policy", "metric", names[0], names[1], "difference_percent")
        return save(figure, numbers, header, Path(directory) / "agreement")

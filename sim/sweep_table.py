"""The table of a sweep: one line a point of the grid, mean and 95 % confidence interval over its seeds; as text and CSV.

It reads the log row by row, in the order of the grid, so that it depends on neither the order in which runs ended nor
their number. It runs nothing.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from sim.experiment import code_sha256, key_of
from sim.grid import Grid
from traces.record import LATENCIES, STATISTICS
from traces.replication import mean_ci95
from traces.result_log import ResultLog
from traces.suggest import near
from traces.whole_file import replace_text

METRICS = ("avg_token_latency_s", "mean_ttft_ms", "p99_ttft_ms", "p99_tpot_ms", "request_throughput", "failed")
OTHERS = (
    "completed", "aborted", "unservable", "duration", "total_input_tokens", "total_output_tokens", "request_goodput",
    "output_throughput", "total_token_throughput", "adapter_hit_rate", "prefix_hit_rate", "adapter_loads",
    "adapter_evictions", "switches", "preemptions",
)  # fmt: skip
KNOWN = (*dict.fromkeys((*METRICS, *(f"{s}_{name}_ms" for name in LATENCIES for s in STATISTICS), *OTHERS)),)


def check_metrics(text: str) -> tuple[str, ...]:
    """Names of metrics with commas between. Raises ValueError, naming the near one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in KNOWN:
            raise ValueError(f"--metrics: unknown {name!r}{near(name, KNOWN)}; one of {', '.join(KNOWN)}")
    if not names:
        raise ValueError("--metrics names nothing")
    return names


class Table:
    """Rows of a grid's points from its log; points of which no run has ended are left out and counted."""

    def __init__(self, grid: Grid, log: ResultLog, metrics: Sequence[str]):
        self._grid, self._log = grid, log
        self._metrics = tuple(metrics)
        self._axes = [*(["variant"] if len(grid.variants) > 1 else []), *(axis for axis in grid.axes if axis != "seed")]
        self.notes: dict[str, None] = {}
        self.missing = 0
        self.foreign = 0  # rows that another version of the program made

    def _points(self) -> Iterator[tuple[dict[str, str], list[dict]]]:
        """(place on the axes, summaries of the seeds) in the order of the grid."""
        self.notes, self.missing, self.foreign = {}, 0, 0

        def place(cell) -> tuple:
            return cell.variant, tuple(value for axis, value in cell.axes.items() if axis != "seed")

        for _, cells in itertools.groupby(self._grid.cells(), place):
            found = []
            for cell in cells:
                key = key_of(cell.args, cell.variant)
                if key not in self._log:
                    self.missing += 1
                    continue
                row = self._log.read(key)
                self.foreign += row["code"] != code_sha256()
                self.notes |= dict.fromkeys(row["summary"]["run"]["notes"])
                found.append(row["summary"])
            if found:
                yield {"variant": cell.variant} | cell.axes, found

    def _statistics(self, summaries: list[dict], names: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
        means = {}
        for name in names:
            values = [summary[name] for summary in summaries if summary.get(name) is not None]
            means[name] = mean_ci95(values) if values else (None, None)
        return means

    def text(self) -> str:
        """The table with `mean +- half width of the interval`, and what the reader has to know."""
        lines = [[*self._axes, "seeds", *self._metrics]]
        fewest = most = None
        for place, summaries in self._points():
            means = self._statistics(summaries, self._metrics)
            seeds = len(summaries)
            fewest, most = min(fewest or seeds, seeds), max(most or seeds, seeds)
            cells = ["-" if m is None else _pair(m, half) for m, half in means.values()]
            lines.append([*(place[axis] for axis in self._axes), str(seeds), *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = len(self._axes)
        text = []
        for line in lines:
            cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            text.append("  ".join(cells).rstrip())
        if most and most > 1:
            text.append("+-: half width of the 95 % confidence interval over the seeds (Student's t)")
            text.append("a seed draws adapters, workloads and samples anew; arrivals are the trace's")
        text += [f"note  {note}" for note in list(self.notes)[:8]]
        if len(self.notes) > 8:
            text.append(f"note  and {len(self.notes) - 8} more notes, which the log holds")
        if self.missing:
            text.append(f"{self.missing} of {len(self._grid)} runs are missing")
        if self.foreign:
            text.append(f"{self.foreign} runs were made by another version of the program; remove the log to run them again")
        return "\n".join(text) + "\n"

    def write_csv(self, path: Path) -> None:
        """All metrics by point: <metric> and <metric>_ci95 (empty where there is one seed); written in one piece."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow([*self._axes, "seeds", *(column for name in KNOWN for column in (name, f"{name}_ci95"))])
        for place, summaries in self._points():
            means = self._statistics(summaries, KNOWN)
            numbers = ["" if x is None else format(x, ".10g") for pair in means.values() for x in pair]
            rows.writerow([*(place[axis] for axis in self._axes), len(summaries), *numbers])
        replace_text(path, text.getvalue())


def _pair(mean: float, half: float | None) -> str:
    """The mean to four figures, its half width to two."""
    shown = f"{mean:.4g}"
    return shown if half is None else f"{shown} +- {half:.2g}"

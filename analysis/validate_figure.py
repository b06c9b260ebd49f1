"""Both distributions of every latency, engine and simulator, one row a policy: what `validate` draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.figures import PERCENTS
from analysis.style import DASHES, GRID, PALETTE, footer, legend, places, plain_log, provenance, save, sheet
from analysis.validate import LATENCIES, Pair
from traces.record import STATUS, RunResult, latencies_ms, summarize


def curves(run: RunResult) -> dict[str, np.ndarray]:
    """Percentiles (at PERCENTS) of each latency in ms; tpot without requests of one token."""
    done = np.flatnonzero(run.requests["status"] == STATUS.index("completed"))
    found = latencies_ms(run.requests, done)
    found["tpot"] = found["tpot"][run.requests["generated_tokens"][done] > 1]
    return {name: np.percentile(found[name], PERCENTS) for name in LATENCIES if len(found[name])}


def draw(group: Sequence[Pair], stem: Path) -> list[Path]:
    """Write `stem`.{png,svg,csv} of one replay's policies. Returns the paths."""
    numbers = []
    with sheet(10.5, 0.8 + 2.3 * len(group), len(group), len(LATENCIES)) as (figure, rows):
        for (policy, place), pair, axes in zip(places([p.engine.policy for p in group]).items(), group, rows, strict=True):
            for name, run, dash in (("engine", pair.engine, DASHES[0]), ("simulator", pair.simulated, DASHES[1])):
                for latency, values in curves(run).items():
                    cell = axes[LATENCIES.index(latency)]
                    color = PALETTE[place % len(PALETTE)] if name == "engine" else "black"
                    cell.plot(values, PERCENTS, color=color, linestyle=dash, linewidth=1.6)
                    numbers += [(policy, latency, name, float(p), float(v)) for p, v in zip(PERCENTS, values, strict=True)]
            for cell, latency in zip(axes, LATENCIES, strict=True):
                cell.set(xscale="log", xlabel=f"{latency.upper()} (ms)", ylim=(0, 101), title=policy)
                plain_log(cell.xaxis)
                cell.grid(**GRID)
            axes[0].set_ylabel("Requests (%)")
        for name, dash in (("engine", DASHES[0]), ("simulator", DASHES[1])):
            rows[0][0].plot([], [], color="#555555", linestyle=dash, linewidth=1.6, label=name)
        legend(figure, [rows[0][0]])
        footer(figure, provenance(summarize(pair.simulated)["run"] for pair in group))
        return save(figure, numbers, ("policy", "latency", "of", "percent", "ms"), stem)

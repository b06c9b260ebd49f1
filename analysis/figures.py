"""Figures of results directories that show what requests met: policies compared, distributions, fairness among adapters.

One function a figure; each takes results by label and writes PNG, SVG and CSV. It draws what `traces.record` computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.style import (
    GRID,
    MODE_FILLS,
    bar,
    footer,
    legend,
    line,
    name_ticks,
    places,
    plain_log,
    provenance,
    save,
    sheet,
)
from traces.record import MODES, STATUS, RunResult, latencies_ms, per_adapter, summarize

# Every half percent, and every tenth in the tail, where the policies differ.
PERCENTS = np.concatenate([np.arange(0, 99, 0.5), np.arange(990, 1001) / 10])


def policies(results: Mapping[str, RunResult], directory: str | Path) -> list[Path]:
    """Policies compared: distributions of TTFT and E2EL, average token latency, and the GPUs' time in each mode.

    results by label. Writes policies.png, policies.svg and policies.csv (panel, policy, x, value, unit) into
    `directory`; returns their paths.
    """
    numbers: list[tuple] = []
    with sheet(9.6, 7.2, 2, 2) as (figure, ((left, right), (bars, modes))):
        numbers += _draw_distribution(left, results, "ttft", "Time to first token (s)", 1e-3)
        numbers += _draw_distribution(right, results, "e2el", "End-to-end latency (s)", 1e-3)
        summaries = {label: summarize(result) for label, result in results.items()}
        numbers += _draw_token_latency(bars, summaries)
        numbers += _draw_modes(modes, summaries)
        legend(figure, left)
        footer(figure, provenance(summary["run"] for summary in summaries.values()))
        return save(figure, numbers, ("panel", "policy", "x", "value", "unit"), Path(directory) / "policies")


def distributions(results: Mapping[str, RunResult], directory: str | Path) -> list[Path]:
    """Cumulative distributions of TTFT, TPOT and E2EL over the completed requests.

    Writes distributions.{png,svg,csv} (panel, policy, x in percent, value, unit).
    """
    numbers: list[tuple] = []
    with sheet(10.5, 3.6, 1, 3, sharey=True) as (figure, ((ttft, tpot, e2el),)):
        numbers += _draw_distribution(ttft, results, "ttft", "Time to first token (s)", 1e-3)
        numbers += _draw_distribution(tpot, results, "tpot", "Time per output token (ms)", 1.0)
        numbers += _draw_distribution(e2el, results, "e2el", "End-to-end latency (s)", 1e-3)
        tpot.set_ylabel("")
        e2el.set_ylabel("")
        legend(figure, ttft)
        footer(figure, provenance(summarize(result)["run"] for result in results.values()))
        return save(figure, numbers, ("panel", "policy", "x", "value", "unit"), Path(directory) / "distributions")


def fairness(results: Mapping[str, RunResult], directory: str | Path, names: Sequence[str] = ()) -> list[Path]:
    """What each adapter's requests waited: mean normalised latency by adapter, the busiest adapter first.

    The legend gives Jain's index over the adapters' means (1: all alike, 1/n: one has it all). names: of the adapters by
    index. Writes fairness.{png,svg,csv} (panel, policy, adapter, value, unit).
    """
    numbers, tables = [], {}
    for label, result in results.items():
        count = int(result.requests["adapter"].max(initial=-1)) + 1
        known = list(names) if len(names) >= count else [f"adapter {i}" for i in range(count)]
        tables[label] = {row["adapter"]: row for row in per_adapter(result, known)}
    first = next(iter(tables.values()))
    order = sorted(first, key=lambda name: -first[name]["requests"])[:64]
    with sheet(9.6, 5.2, 2, 1, sharex=True, height_ratios=(3, 1)) as (figure, ((top,), (bottom,))):
        for label, place in places(tables).items():
            means = [tables[label].get(name, {}).get("mean_ntpot_ms") for name in order]
            met = [mean for mean in means if mean]
            jain = sum(met) ** 2 / (len(met) * sum(mean**2 for mean in met)) if met else 0.0
            style = line(place) | {"linestyle": "none", "markersize": 5.5}
            drawn = [np.nan if mean is None else mean for mean in means]
            top.plot(range(len(order)), drawn, label=f"{label} (Jain {jain:.3f})", **style)
            numbers += [("mean_ntpot", label, name, m, "ms/token") for name, m in zip(order, means, strict=True)]
        shares = [100 * first[name]["requests"] / max(1, sum(row["requests"] for row in first.values())) for name in order]
        bottom.bar(range(len(order)), shares, color="#BBBBBB", edgecolor="black", linewidth=0.6)
        numbers += [("requests", "", name, share, "%") for name, share in zip(order, shares, strict=True)]
        top.set(ylabel="Latency per output token (ms)", yscale="log")
        plain_log(top.yaxis)
        top.grid(**GRID)
        bottom.set(ylabel="Requests (%)", xlabel="Adapter, busiest first")
        step = max(1, len(order) // 16)
        bottom.set_xticks(range(0, len(order), step), [name.removeprefix("adapter-") for name in order[::step]])
        legend(figure, top, columns=4)
        footer(figure, provenance(summarize(result)["run"] for result in results.values()))
        return save(figure, numbers, ("panel", "policy", "adapter", "value", "unit"), Path(directory) / "fairness")


def _draw_distribution(axes, results: Mapping[str, RunResult], metric: str, title: str, scale: float) -> list[tuple]:
    """One panel; `scale` turns milliseconds into the unit of the title."""
    numbers, unit = [], title[title.rindex("(") + 1 : -1]
    for label, place in places(results).items():
        requests = results[label].requests
        done = requests["status"] == STATUS.index("completed")
        if metric == "tpot":
            done &= requests["generated_tokens"] > 1
        rows = np.flatnonzero(done)
        if not len(rows):
            continue
        values = np.percentile(latencies_ms(requests, rows)[metric], PERCENTS) * scale
        axes.plot(values, PERCENTS, label=label, **line(place, marker=False))
        numbers += [(f"{metric}_cdf", label, x, value, unit) for x, value in zip(PERCENTS, values, strict=True)]
    if any(value > 0 for *_, value, _ in numbers):
        axes.set_xscale("log")
        plain_log(axes.xaxis)
    axes.set(xlabel=title, ylabel="Requests (%)", ylim=(0, 101))
    axes.grid(**GRID)
    return numbers


def _draw_token_latency(axes, summaries: Mapping[str, Mapping]) -> list[tuple]:
    values = [(summary["avg_token_latency_s"] or 0) * 1e3 for summary in summaries.values()]
    for i, (label, place) in enumerate(places(summaries).items()):
        axes.bar(i, values[i], width=0.7, **bar(place))
        text = "none\ncompleted" if summaries[label]["avg_token_latency_s"] is None else f"{values[i]:.3g}"
        axes.annotate(text, (i, values[i]), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(y=0.12)
    axes.set_ylabel("Average token latency (ms/token)")
    name_ticks(axes, list(summaries))
    unit = "ms/token"
    return [
        ("avg_token_latency", label, "", summary["avg_token_latency_s"] and value, unit)
        for (label, summary), value in zip(summaries.items(), values, strict=True)
    ]


def _draw_modes(axes, summaries: Mapping[str, Mapping]) -> list[tuple]:
    numbers = []
    totals = np.array([sum(summary["time_where_s"].values()) for summary in summaries.values()])
    base = np.zeros(len(summaries))
    for mode in (*MODES, "idle"):
        table = "time_where_s" if mode == "idle" else "time_in_mode_s"
        seconds = [summary[table][mode] for summary in summaries.values()]
        share = 100 * np.divide(seconds, totals, out=np.zeros(len(totals)), where=totals > 0)
        colour, hatch = MODE_FILLS[mode]
        style = {"color": colour, "edgecolor": "black", "linewidth": 0.8, "hatch": hatch, "width": 0.7}
        axes.bar(range(len(share)), share, bottom=base, label=mode, **style)
        base += share
        numbers += [("time_in_mode", label, mode, x, "%") for label, x in zip(summaries, share, strict=True)]
    axes.set(ylabel="GPU time (%)", ylim=(0, 101))
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 5}
    axes.legend(**place, frameon=False, columnspacing=1, handlelength=1.4)
    name_ticks(axes, list(summaries))
    return numbers

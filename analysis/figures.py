"""Figures of results, one function a figure: PNG and SVG, and the numbers that are drawn as CSV beside them.

Okabe and Ito's colours (safe for the colour-blind); lines differ in dashes and bars in hatches, so that a figure reads
in greyscale too. Equal results give equal files. It draws what `traces.record` computes.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from traces.record import MODES, STATUS, RunResult, latencies_ms, summarize

# Okabe & Ito, "Color Universal Design" (2008); yellow stands last, it is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)), (0, (10, 3)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++", "---", "ooo")
MODE_FILLS = {
    "base": ("#EEEEEE", "xxx"),
    "unmerged": ("#C8C8C8", "///"),
    "merged": ("#3A3A3A", ""),
    "mixture": ("#8C8C8C", "..."),
    "idle": ("#FFFFFF", ""),
}
"""Greys, so that a mode is not taken for a policy of the same colour."""
# Every half percent, and every tenth in the tail, where the policies differ.
PERCENTS = np.concatenate([np.arange(0, 99, 0.5), np.arange(990, 1001) / 10])
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "results",  # ids in the SVG do not change from run to run
    "svg.fonttype": "none",
}


def policies(results: Mapping[str, RunResult], directory: str | Path) -> list[Path]:
    """Policies compared: distributions of TTFT and E2EL, average token latency, and the GPUs' time in each mode.

    results by label. Writes policies.png, policies.svg and policies.csv (panel, policy, x, value, unit) into
    `directory`; returns their paths.
    """
    import matplotlib
    from matplotlib.figure import Figure

    numbers: list[tuple] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        (left, right), (bars, modes) = figure.subplots(2, 2)
        numbers += _draw_distributions(left, results, "ttft", "Time to first token (s)")
        numbers += _draw_distributions(right, results, "e2el", "End-to-end latency (s)")
        summaries = {label: summarize(result) for label, result in results.items()}
        numbers += _draw_token_latency(bars, summaries)
        numbers += _draw_modes(modes, summaries)
        handles, names = left.get_legend_handles_labels()
        if handles:
            figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False)
        figure.text(0.995, 0.002, _provenance(summaries), ha="right", va="bottom", fontsize=7, color="#555555")
        figure.get_layout_engine().set(rect=(0, 0.025, 1, 0.975))
        return _write(figure, numbers, ("panel", "policy", "x", "value", "unit"), Path(directory) / "policies")


def _provenance(summaries: Mapping[str, Mapping]) -> str:
    """Trace, model and profile, and whether the latter was measured."""
    facts = []
    for summary in summaries.values():
        run = summary["run"]
        kind = {"analytic": "analytic, not measured", "measured": "measured"}.get(run["profile_kind"], "unknown")
        trace = Path(run["trace"] or "-").name
        facts.append(f"{trace}, {run['model'] or '-'}, profile {run['profile'] or '-'} ({kind})")
    return "; ".join(dict.fromkeys(facts))


def _draw_distributions(axes, results: Mapping[str, RunResult], metric: str, title: str) -> list[tuple]:
    numbers = []
    for i, (label, result) in enumerate(results.items()):
        rows = np.flatnonzero(result.requests["status"] == STATUS.index("completed"))
        if not len(rows):
            continue
        values_s = np.percentile(latencies_ms(result.requests, rows)[metric], PERCENTS) / 1e3
        style = {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}
        axes.plot(values_s, PERCENTS, label=label, **style)
        numbers += [(f"{metric}_cdf", label, x, value, "s") for x, value in zip(PERCENTS, values_s, strict=True)]
    if any(value > 0 for *_, value, _ in numbers):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=title, ylabel="Requests (%)", ylim=(0, 101))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    return numbers


def _draw_token_latency(axes, summaries: Mapping[str, Mapping]) -> list[tuple]:
    values = [(summary["avg_token_latency_s"] or 0) * 1e3 for summary in summaries.values()]
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(values))]
    bars = axes.bar(range(len(values)), values, color=colours, edgecolor="black", linewidth=0.8, width=0.7)
    for i, (bar, summary) in enumerate(zip(bars, summaries.values(), strict=True)):
        bar.set_hatch(HATCHES[i % len(HATCHES)])
        text = "none\ncompleted" if summary["avg_token_latency_s"] is None else f"{values[i]:.3g}"
        axes.annotate(text, (i, values[i]), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(y=0.12)
    axes.set_ylabel("Average token latency (ms/token)")
    _name_ticks(axes, list(summaries))
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
    _name_ticks(axes, list(summaries))
    return numbers


def _name_ticks(axes, names: Sequence[str]) -> None:
    crowded = sum(map(len, names)) > 38
    axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")


def _write(figure, numbers: Iterable[tuple], header: tuple[str, ...], stem: Path) -> list[Path]:
    """Write PNG, SVG and CSV, each in one piece. Returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        image = io.BytesIO()
        figure.savefig(image, format=suffix[1:], dpi=160, metadata=metadata)
        paths.append(_replace(stem.with_suffix(suffix), image.getvalue()))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(header)
    rows.writerows(tuple(format(x, ".10g") if isinstance(x, float) else x for x in row) for row in numbers)
    paths.append(_replace(stem.with_suffix(".csv"), text.getvalue().encode()))
    return paths


def _replace(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path

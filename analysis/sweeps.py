"""Figures of sweeps: average token latency against request rate (VaLoRA, figure 14, with the paper's numbers beside ours),
skewness, adapters and ranks; and ablations. One function a figure; error bars are 95 % confidence intervals over the seeds.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.style import (
    GRID,
    HATCHES,
    PALETTE,
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
from analysis.sweep_data import Panel, Series, number, panels
from traces.result_files import ResultError

PAPER = Path(__file__).with_name("paper_fig14.csv")
PAPER_MODELS = {"qwen2-vl-7b": "qwen-vl-7b"}
"""Our model -> the paper's where it is not the same one; its panel is titled with its own name."""
METRIC = "avg_token_latency_s"
HEADER = ("panel", "series", "x", "mean", "ci95_half_width", "seeds", "unit")
TITLES = {
    "rate": "Request rate (requests/s)",
    "adapter-assign": "Skewness (--adapter-assign)",
    "adapters": "Adapters",
    "ranks": "Rank of the adapters",
}
UNIT = "ms/token"


def rate(rows: Sequence[dict], directory: str | Path) -> list[Path]:
    """Average token latency against request rate per policy, a panel a model and workload; the paper's below where it has
    them. Writes rate.{png,svg,csv}."""
    found = panels(rows, "rate", METRIC)
    beside = [paper_panel(panel) for panel in found]
    return _lines(found, beside, "rate", Path(directory) / "rate")


def skewness(rows: Sequence[dict], directory: str | Path) -> list[Path]:
    """Average token latency against how unevenly requests ask for adapters. Writes skewness.{png,svg,csv}."""
    return _lines(panels(rows, "adapter-assign", METRIC), [], "adapter-assign", Path(directory) / "skewness")


def adapters(rows: Sequence[dict], directory: str | Path) -> list[Path]:
    """Average token latency against the number of adapters. Writes adapters.{png,svg,csv}."""
    return _lines(panels(rows, "adapters", METRIC), [], "adapters", Path(directory) / "adapters")


def ranks(rows: Sequence[dict], directory: str | Path) -> list[Path]:
    """Average token latency against the adapters' rank. Writes ranks.{png,svg,csv}."""
    return _lines(panels(rows, "ranks", METRIC), [], "ranks", Path(directory) / "ranks")


def ablations(rows: Sequence[dict], directory: str | Path) -> list[Path]:
    """What each part is worth: average token latency of every variant over that of the first, seed by seed.

    The interval is that of the ratio, the seeds paired: both variants saw the same requests. Writes
    ablations.{png,svg,csv}.
    """
    found = panels(rows, "variant", METRIC)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    ratios = _paired(rows, names[0], found)
    numbers = []
    with sheet(1.2 + 4.2 * len(found), 1.4 + 0.42 * len(names), 1, len(found), sharey=True) as (figure, (axes,)):
        for panel, cells, ratio in zip(found, axes, ratios, strict=True):
            for y, name in enumerate(names):
                if name not in ratio:
                    continue
                mean, half, seeds = ratio[name]
                change = 100 * (mean - 1)
                style = {"color": PALETTE[0] if y else "#BBBBBB", "hatch": HATCHES[0 if y else 1], "height": 0.62}
                cells.barh(y, change, xerr=None if half is None else 100 * half, edgecolor="black", linewidth=0.8,
                           error_kw={"elinewidth": 1.0, "capsize": 2}, **style)  # fmt: skip
                shown = "reference" if not y else f"{round(change, 1) + 0.0:+.1f} %"
                reach = 100 * (half or 0.0)
                right = change + reach if change >= 0 else max(0.0, change + reach)
                cells.annotate(shown, (right, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
                numbers.append((panel.title, name, "", change, None if half is None else 100 * half, seeds, "%"))
            cells.axvline(0, color="black", linewidth=0.8)
            cells.set(xlabel="Average token latency,\nchange against the first (%)", title=panel.title)
            cells.margins(x=0.22)
            cells.grid(axis="x", **GRID)
            cells.set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        seeds = max((n for ratio in ratios for *_, n in ratio.values()), default=0)
        note = f"mean over {seeds} seeds, each against itself, bars: 95\u00a0% confidence"
        footer(figure, f"{provenance(run for panel in found for run in panel.runs)}; {note}")
        return save(figure, numbers, HEADER, Path(directory) / "ablations")


def _paired(rows: Sequence[dict], first: str, found: Sequence[Panel]) -> list[dict[str, tuple[float, float | None, int]]]:
    """By panel: variant -> (mean ratio to the first variant of the same seed, half width, seeds)."""
    from analysis.sweep_data import text
    from traces.replication import mean_ci95

    answers = []
    for panel in found:
        own = [r for r in rows if all(text(r["settings"][name]) == value for name, value in panel.fixed.items())]
        base = {r["settings"]["seed"]: r["summary"][METRIC] for r in own if r["variant"] == first}
        ratios: dict[str, list[float]] = {}
        for row in own:
            value, reference = row["summary"][METRIC], base.get(row["settings"]["seed"])
            if value and reference:
                ratios.setdefault(row["variant"], []).append(value / reference)
        answers.append({name: (*mean_ci95(values), len(values)) for name, values in ratios.items()})
    return answers


def paper_panel(panel: Panel) -> Panel | None:
    """The paper's panel beside one of ours; None where the paper has none."""
    model, workload = panel.settings["model"], panel.settings["workload"]
    with PAPER.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    model = PAPER_MODELS.get(model, model)
    series: dict[str, Series] = {}
    for row in rows:
        if row["model"] == model and row["workload"] == workload:
            one = series.setdefault(row["system"], Series(row["system"]))
            one.x.append(row["rate_rps"])
            one.mean.append(float(row["avg_token_latency_s"]))
            one.half.append(None)
            one.seeds.append(1)
    about = {"model": model, "workload": workload}
    return Panel(about, list(series.values()), [], about) if series else None


def _lines(found: Sequence[Panel], beside: Sequence[Panel | None], x: str, stem: Path) -> list[Path]:
    """Panels of lines: those that have the same panel `beside` them (or none) in a column, with it at the foot."""
    if not found:
        raise ResultError("the sweeps have no row")
    columns = _columns(found, beside)
    paper = any(beside)
    high = max(len(column) for column in columns)
    wide = min(3, len(columns))
    rows = high * -(-len(columns) // wide)
    place = places(dict.fromkeys(series.label for panel in (*found, *filter(None, beside)) for series in panel.series))
    numbers = []
    with sheet(1.0 + 3.2 * wide if wide > 1 else 5.6, 0.9 + (2.7 if high < 3 else 2.3) * rows, rows, wide) as (figure, axes):
        for empty in axes.flat:
            empty.set_visible(False)
        for i, column in enumerate(columns):
            for j, panel in enumerate(column):
                cell = axes[high * (i // wide) + j, i % wide]
                cell.set_visible(True)
                if j < len(column) - paper:
                    title = f"Ours: {panel.title}" if paper else panel.title
                    numbers += _draw(cell, panel, x, title, place, f"ours: {panel.title}")
                else:
                    _draw_beside(cell, panel, x, place, numbers)
                    cell.set_xlim(axes[high * (i // wide), i % wide].get_xlim())
        for row in axes:
            _share_y([one for one in row if one.get_visible()])
        for column in axes.T:
            [one for one in column if one.get_visible()][-1].set_xlabel(TITLES[x])
        legend(figure, list(axes.flat))
        seeds = {n for panel in found for series in panel.series for n in series.seeds}
        note = f"mean over {min(seeds)}{f' to {max(seeds)}' if len(seeds) > 1 else ''} seeds, bars: 95\u00a0% confidence"
        about = "paper: VaLoRA (EuroSys 2025), figure 14, A100-80GB; " if paper else ""
        footer(figure, f"{about}{provenance(run for panel in found for run in panel.runs)}; {note}")
        return save(figure, numbers, HEADER, stem)


def _columns(found: Sequence[Panel], beside: Sequence[Panel | None]) -> list[list[Panel | None]]:
    """What stands above one another: a panel a column, or all panels of a model and workload over the paper's of them."""
    if not any(beside):
        return [[panel] for panel in found]
    columns: dict[tuple, list[Panel | None]] = {}
    for panel, paper in zip(found, beside, strict=True):
        column = columns.setdefault((panel.settings["model"], panel.settings["workload"]), [paper])
        column.insert(len(column) - 1, panel)
    return list(columns.values())


def _share_y(row: Sequence) -> None:
    """One scale for the axes of a row, labelled at its left."""
    limits = [one.get_ylim() for one in row]
    for one in row:
        one.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        plain_log(one.yaxis)
        one.tick_params(labelleft=one is row[0])
    row[0].set_ylabel("Avg. token latency (ms/token)")


def _draw_beside(axes, panel: Panel | None, x: str, place: dict[str, int], numbers: list[tuple]) -> None:
    if panel is None:
        axes.set_yscale("log")
        axes.text(0.5, 0.5, "not in the paper", ha="center", va="center", transform=axes.transAxes, color="#777777")
        axes.set_xticks([])
        return
    numbers += _draw(axes, panel, x, f"Paper, A100: {panel.title}", place, f"paper: {panel.title}")


def _draw(axes, panel: Panel, x: str, title: str, place: dict[str, int], name: str) -> list[tuple]:
    numbers = []
    order = list(dict.fromkeys(at for series in panel.series for at in series.x))
    numeric = all(number(at) is not None for at in order) and len({at.split(":")[0] for at in order if ":" in at}) < 2
    order = sorted(order, key=lambda at: (number(at) is None, number(at) or 0.0)) if numeric or x == "ranks" else order
    spots = {at: number(at) if numeric and x == "rate" else i for i, at in enumerate(order)}
    for series in panel.series:
        at = np.array([spots[value] for value in series.x])
        mean = 1e3 * np.array(series.mean)
        half = np.array([1e3 * (width or 0.0) for width in series.half])
        low = np.minimum(half, 0.95 * mean)  # on a logarithmic axis an interval may not reach zero
        joined = np.array([numeric or number(value) is not None for value in series.x])
        for own, style in ((joined, {"label": series.label}), (~joined, {"linestyle": "none"})):
            look = line(place[series.label]) | {"capsize": 2, "elinewidth": 0.9} | style
            axes.errorbar(at[own], mean[own], yerr=[low[own], half[own]], **look)
        numbers += [
            (name, series.label, value, m, None if width is None else 1e3 * width, n, UNIT)
            for value, m, width, n in zip(series.x, mean.tolist(), series.half, series.seeds, strict=True)
        ]
    axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(**GRID)
    if x == "rate":
        axes.set_xlim(left=0)
        axes.set_xticks([spots[at] for at in order], order)
    else:
        name_ticks(axes, order, room=44)
    return numbers

"""A sweep over request rates held against the paper's figure 14: which of its claims about VaLoRA hold in it, by how much.

It judges means that `analysis.sweep_data` made; it knows neither why a claim fails nor how the paper measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from analysis.sweep_data import Panel, panels, spell
from analysis.sweeps import METRIC, paper_panel
from traces.result_files import ResultError

OWN = "valora"
HEADER = ("VaLoRA's latency below that of", "Model, application", "Paper, A100", "Here", "Profile")


class Beside(NamedTuple):
    """One panel of the sweep and the paper's: series -> rate -> average token latency in s, at the rates that both have."""

    panel: Panel
    ours: dict[str, dict[str, float]]
    paper: dict[str, dict[str, float]]


def beside(rows: Sequence[dict]) -> list[Beside]:
    """Every panel over the rate that the paper has too, with VaLoRA and at least one rival in both; else an empty list."""
    try:
        found = panels(rows, "rate", METRIC, most=1000)
    except ResultError:  # the rate does not vary
        return []
    pairs = []
    for panel in found:
        paper = paper_panel(panel)
        if paper is None:
            continue
        ours, theirs = (
            {series.label: dict(zip(series.x, series.mean, strict=True)) for series in one.series} for one in (panel, paper)
        )
        common = [name for name in theirs if name in ours]
        rates = [rate for rate in theirs.get(OWN, ()) if all(rate in ours[name] for name in common)]
        if OWN in common and len(common) > 1 and rates:
            cut = [{name: {rate: lines[name][rate] for rate in rates} for name in common} for lines in (ours, theirs)]
            pairs.append(Beside(panel, *cut))
    return pairs


def below_percent(lines: dict[str, dict[str, float]], rival: str) -> list[float]:
    """How far VaLoRA's latency lies below a rival's, in percent, by rate; negative where it lies above."""
    return [100 * (1 - lines[OWN][rate] / lines[rival][rate]) for rate in lines[OWN]]


def table(pairs: Sequence[Beside]) -> list[tuple[str, ...]]:
    """Rows under HEADER: ranges over the rates."""
    rows = []
    for panel, ours, paper in pairs:
        profile = (panel.runs[0]["profile"] or "-").removesuffix(f"-{panel.settings['model']}")
        others = [spell(name, value) for name, value in panel.fixed.items() if name not in ("model", "workload", "profile")]
        where = ", ".join((panel.settings["model"], panel.settings["workload"], *others))
        rows += [
            (rival, where, _range(below_percent(paper, rival)), _range(below_percent(ours, rival)), profile)
            for rival in ours if rival != OWN
        ]  # fmt: skip
    return sorted(rows, key=lambda row: (row[0], row[1], row[4]))


def _range(percents: Sequence[float]) -> str:
    return f"{min(percents):.0f} to {max(percents):.0f} %"


def sentences(pairs: Sequence[Beside]) -> list[str]:
    """The verdict on each claim, over all panels."""
    lowest = total = alike = orders = 0
    ours, theirs = [], []
    for _, lines, paper in pairs:
        rivals = [name for name in lines if name != OWN]
        for rate in lines[OWN]:
            total += 1
            lowest += all(lines[OWN][rate] < lines[name][rate] for name in rivals)
            for one, two in itertools.combinations(rivals, 2):
                orders += 1
                alike += (lines[one][rate] < lines[two][rate]) == (paper[one][rate] < paper[two][rate])
        for name in rivals:
            ours += below_percent(lines, name)
            theirs += below_percent(paper, name)
    if not total:
        return []
    there, here = (f"{_range(percents)} (median {median(percents):.0f} %)" for percents in (theirs, ours))
    said = [
        "The paper's claim that VaLoRA has the lowest average token latency (figure 14) holds at "
        f"{lowest} of {total} points. There it lies {there} below its rivals, here {here}."
    ]
    if orders:
        said.append(f"Two rivals stand in the paper's order in {alike} of {orders} comparisons at the same rate.")
    return said

"""Rows of sweeps (the JSONL that `python -m sim sweep` writes) as series with means and confidence intervals.

It picks and averages; it draws nothing and computes no metric.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from traces.replication import mean_ci95
from traces.result_files import ResultError
from traces.result_log import read_log
from traces.suggest import near


@dataclass
class Series:
    """One line of a panel: x values as they stand in the settings, means, half widths (None for one seed), seeds."""

    label: str
    x: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    half: list[float | None] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@dataclass
class Panel:
    """What one pair of axes shows: series over one setting, all other settings alike.

    fixed: settings that differ between panels. runs: `run` of the summaries. settings: of the first row.
    """

    fixed: dict[str, str]
    series: list[Series]
    runs: list[dict]
    settings: dict

    @property
    def title(self) -> str:
        """The fixed settings in words; model and workload where there is one panel."""
        if not self.fixed:
            return f"{self.settings['model']}, {self.settings['workload']}"
        return ", ".join(spell(name, value).removesuffix(f"-{self.settings['model']}") for name, value in self.fixed.items())


def read_rows(paths: Iterable[str | Path]) -> list[dict]:
    """Rows of all logs, of each setting (the seed is one) the last: one that ran again, because its trace or profile
    changed, takes the place of the former, with which it must not be averaged. Raises ResultError."""
    rows = [row for path in paths for row in read_log(path)]
    last = {json.dumps([row["variant"], row["settings"]], sort_keys=True): row for row in rows}
    return list(last.values())


def pick(rows: Sequence[dict], name: str, value: str) -> list[dict]:
    """Rows whose setting (or variant) has this value, as `text` writes it. Raises ResultError where none has."""
    own = [text(row["variant"] if name == "variant" else row["settings"].get(name)) for row in rows]
    if value not in own:
        known = sorted({*(rows[0]["settings"] if rows else ()), "variant"})
        if name not in known:
            raise ResultError(f"no option {name!r} in these sweeps{near(name, known)}; options are {', '.join(known)}")
        raise ResultError(f"no run with {name} {value!r} in these sweeps; there is {', '.join(dict.fromkeys(own))}")
    return [row for row, its in zip(rows, own, strict=True) if its == value]


def text(value) -> str:
    """A setting as one would write it: `4`, `share:0.8`, `64,128`."""
    if isinstance(value, list):
        return ",".join(map(text, value))
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    return str(value)


def spell(name: str, value: str) -> str:
    """A setting in a title."""
    alone = ("model", "workload", "variant", "policy")
    units = {"gpus": "GPU", "rate": "request/s", "adapters": "adapter"}
    if name in alone:
        return value
    if name in units:
        return f"{value} {units[name].replace('/', 's/') if name == 'rate' else units[name] + 's' * (value != '1')}"
    if name == "adapter-assign":
        return f"adapters {value}"
    if name == "profile":
        return Path(value).name.removesuffix(".json")
    return f"{name} {Path(value).name if name == 'trace' else value}"


def number(value: str) -> float | None:
    """The number in a setting: 8, 0.8 of `share:0.8`, 64 of `64`; None where there is not exactly one."""
    found = re.findall(r"\d+(?:\.\d+)?", value)
    return float(found[-1]) if len(found) == 1 else None


def varying(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Settings that differ among the rows (the seed apart) -> their values, in the order they appear."""
    values: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in {**row["settings"], "variant": row["variant"]}.items():
            values.setdefault(name, {})[text(value)] = None
    return {name: list(found) for name, found in values.items() if len(found) > 1 and name != "seed"}


def _of_variants(rows: Sequence[dict], names: Iterable[str]) -> list[str]:
    """Those of the settings that differ between variants and never within one: the variants are made of them."""
    values: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name in names:
            values.setdefault((name, row["variant"]), set()).add(text(row["settings"].get(name)))
    if len({variant for _, variant in values}) < 2:
        return []
    return [name for name in names if all(len(found) == 1 for (key, _), found in values.items() if key == name)]


def label_of(row: dict) -> str:
    """What a row's line is called: its policy, and its variant if it has one."""
    policy, variant = row["settings"]["policy"], row["variant"]
    return policy if not variant or variant == policy else f"{policy}, {variant}"


def panels(rows: Sequence[dict], x: str, metric: str, *, most: int = 6) -> list[Panel]:
    """Panels over the setting `x`: one line a policy and variant; any other setting that varies opens a panel.

    Raises ResultError if `x` does not vary or too many panels would open.
    """
    changing = varying(rows)
    if x not in changing:
        raise ResultError(f"{x} does not vary in these sweeps; what varies: {', '.join(changing) or 'nothing'}")
    owned = _of_variants(rows, changing)
    others = [name for name in changing if name not in (x, "policy", "variant", "policy-option", *owned)]
    points: dict[tuple, dict[str, dict[str, list[float]]]] = {}
    runs: dict[tuple, list[dict]] = {}
    settings: dict[tuple, dict] = {}
    for row in rows:
        place = tuple(text(row["settings"][name]) for name in others)
        at = row["variant"] if x == "variant" else text(row["settings"][x])
        value = row["summary"].get(metric)
        settings.setdefault(place, row["settings"])
        runs.setdefault(place, []).append(row["summary"]["run"])
        cell = points.setdefault(place, {}).setdefault(label_of(row) if x != "variant" else row["settings"]["policy"], {})
        if value is not None:
            cell.setdefault(at, []).append(value)
    if len(points) > most:
        raise ResultError(f"{x}: {len(points)} panels, at most {most}; pick one value of {', '.join(others)} with --where")
    found = []
    for place, lines in sorted(points.items(), key=lambda item: _last_first(item[0], others, changing)):
        series = [_series(label, cells) for label, cells in lines.items() if cells]
        found.append(Panel(dict(zip(others, place, strict=True)), series, runs[place], settings[place]))
    return found


def _last_first(place: tuple[str, ...], names: Sequence[str], changing: dict[str, list[str]]) -> list[int]:
    """Orders panels so that those with the same value of the last setting (workload) stand side by side."""
    return [changing[name].index(value) for name, value in zip(names[::-1], place[::-1], strict=True)]


def _series(label: str, cells: dict[str, list[float]]) -> Series:
    series = Series(label)
    order = list(cells)
    if all(number(at) is not None for at in order) or not any(":" in at for at in order):
        order.sort(key=lambda at: (number(at) is None, number(at) or 0.0))  # stable: names stay as they came
    for at in order:
        mean, half = mean_ci95(cells[at])
        series.x.append(at)
        series.mean.append(mean)
        series.half.append(half)
        series.seeds.append(len(cells[at]))
    return series

"""Service-level objectives over the metrics of a summary: `p99_ttft<1s,p99_tpot<50ms`, and whether a run holds them.

Names are the keys of `traces.record.summarize`, with or without the unit behind them. It knows nothing of how a run came
about.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import NamedTuple

from sim.sweep_table import KNOWN
from traces.record import LATENCIES, STATISTICS
from traces.suggest import near

_FORM = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]*?)\s*(ms|s|%)?\s*")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_SCALE = {("_ms", "ms"): 1.0, ("_ms", "s"): 1e3, ("_s", "s"): 1.0, ("_s", "ms"): 1e-3, ("", "%"): 0.01, ("", None): 1.0}


class Objective(NamedTuple):
    """One condition on a summary. key: of the summary, limit in its unit. text: as it was written."""

    key: str
    sign: str
    limit: float
    text: str

    def holds(self, summary: Mapping) -> bool:
        """False where the summary has no value: nothing completed."""
        value = summary.get(self.key)
        return value is not None and _COMPARE[self.sign](value, self.limit)


def parse_slo(text: str) -> tuple[Objective, ...]:
    """Objectives with commas between. Raises ValueError with the part that is wrong and the way out."""
    found = tuple(_objective(part) for part in text.split(",") if part.strip())
    if not found:
        raise ValueError(f"--slo {text!r}: no objective; write for instance 'p99_ttft<1s,p99_tpot<50ms'")
    return found


def _objective(part: str) -> Objective:
    match = _FORM.fullmatch(part)
    if match is None:
        raise ValueError(f"--slo {part.strip()!r}: expected METRIC<NUMBER with a unit, as in p99_ttft<1s")
    name, sign, number, unit = match.groups()
    keys = [key for key in (name, f"{name}_ms", f"{name}_s") if key in KNOWN]
    if not keys:
        statistic, _, latency = name.rpartition("_")
        if latency in LATENCIES:
            kind = f"statistic {statistic!r} is none of" if statistic else "which statistic?"
            there = ", ".join(f"{known}_{latency}" for known in STATISTICS)
            raise ValueError(f"--slo {part.strip()!r}: {kind} {there}")
        names = [*KNOWN, *(key.removesuffix("_ms") for key in KNOWN)]
        raise ValueError(f"--slo {part.strip()!r}: unknown metric {name!r}{near(name, names)}; one of {', '.join(KNOWN)}")
    key = keys[0]
    kind = next((suffix for suffix in ("_ms", "_s") if key.endswith(suffix)), "")
    scale = _SCALE.get((kind, unit))
    if scale is None:
        units = "s or ms" if kind else "none, or %"
        raise ValueError(f"--slo {part.strip()!r}: {name} needs a unit: {units}, not {unit or 'none'}")
    try:
        limit = float(number) * scale
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit) or limit < 0:
        raise ValueError(f"--slo {part.strip()!r}: {number!r} is not a finite number of at least 0")
    return Objective(key, sign, limit, part.strip())


class Judgement(NamedTuple):
    """What one run says. broken: the objectives that it broke, as written, and what else was wrong (saturated, gave up)."""

    broken: tuple[str, ...]
    values: dict[str, float | None]


SATURATED = "saturated"


def judge(summary: Mapping, objectives: tuple[Objective, ...], span_s: float, drain_s: float) -> Judgement:
    """Whether a run holds its objectives, and keeps up with its arrivals at all.

    span_s: from the first to the last arrival; drain_s: from there to the end. A run that needs more than a tenth of the
    span and its own median latency to work off what was left is saturated: a longer trace would have broken any
    objective. Requests that were given up count as broken too; those that no load could serve (unservable) do not.
    """
    broken = [objective.text for objective in objectives if not objective.holds(summary)]
    median_s = (summary["median_e2el_ms"] or 0.0) / 1e3
    if drain_s > 0.1 * span_s + median_s:
        broken.append(SATURATED)
    given_up = summary["failed"] - summary["unservable"]
    if given_up:
        broken.append(f"{given_up} requests given up")
    return Judgement(tuple(broken), {objective.key: summary.get(objective.key) for objective in objectives})

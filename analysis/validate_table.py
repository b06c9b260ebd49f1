"""The errors of a simulator over many replays as one table, a row a replay and policy: for a terminal, Markdown, and CSV.

Below it the largest error of each column, what it should stay below, and in how many rows it does; then, of each replay,
whether the simulator puts the policies in the engine's order. It computes no error (`validate`, `step_errors`).
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from analysis.step_errors import load_of, step_errors
from analysis.validate import (
    LATENCIES,
    METRICS,
    STATISTICS,
    STEP_TARGET,
    Pair,
    aligned,
    errors,
    order,
    swapped,
    target_of,
)
from traces.record import RunResult, duration_s, summarize

STEPS = ("step_median", "step_p95")
"""Sizes of single steps' errors; like METRICS in percent."""
FACTS = ("replay", "model", "policy", "busy", "in flight", "requests", "cut off")
HEADS = (*(f"{name} {statistic}" for name in LATENCIES for statistic in STATISTICS), "avg tok", "req/s", "tok/s",
         "step median", "step p95")  # fmt: skip


class Row(NamedTuple):
    """One replay under one policy. busy: share of the time that the engine computed; in_flight: requests in the system, mean
    over the time. errors: by METRICS and STEPS, percent, signed; None where either side has no value."""

    pair: Pair
    busy: float
    in_flight: float
    requests: int
    unfinished: int
    errors: dict[str, float | None]

    @property
    def facts(self) -> list[str]:
        """The cells before the errors, under FACTS."""
        engine = self.pair.engine
        return [self.pair.replay, str(engine.config["model"]), engine.policy, f"{self.busy:.2f}", f"{self.in_flight:.1f}",
                str(self.requests), str(self.unfinished)]  # fmt: skip


def rows_of(found: Sequence[Pair]) -> list[Row]:
    """The rows of all pairs, in their order. ResultError where a record lacks what steps are judged by."""
    rows = []
    for pair in found:
        summary = summarize(pair.engine)
        every = [row for row in step_errors(pair.engine, pair.simulated) if row.kind == "all"]
        steps = dict(zip(STEPS, (every[0].median, every[0].p95) if every else (None, None), strict=True))
        load = load_of(pair.engine), in_flight(pair.engine)
        rows.append(Row(pair, *load, summary["requests"], summary["unfinished"], errors(pair) | steps))
    return rows


def in_flight(run: RunResult) -> float:
    """Requests that had arrived and not ended, mean over the run: few in a light load, the whole batch near saturation."""
    table, seconds = run.requests, duration_s(run)
    return float((table["finish_ns"] - table["arrival_ns"]).sum()) / 1e9 / seconds if seconds else 0.0


def goal_of(column: str) -> float:
    """What the size of a column's errors should stay below, percent."""
    return STEP_TARGET[STEPS.index(column)] if column in STEPS else target_of(column)


def worst(rows: Sequence[Row], column: str) -> float | None:
    """The error of the largest size in a column, with its sign."""
    known = [row.errors[column] for row in rows if row.errors[column] is not None]
    return max(known, key=abs) if known else None


def table(rows: Sequence[Row], mark: str = "!") -> list[list[str]]:
    """Head, rows, and three more: worst, goal, share of rows within it. mark: behind errors beyond their goal."""
    columns = (*METRICS, *STEPS)
    lines = [[*FACTS, *HEADS]]
    lines += [[*row.facts, *(_cell(row.errors[column], column, mark) for column in columns)] for row in rows]
    blank = [""] * (len(FACTS) - 1)
    lines.append(["worst", *blank, *(_cell(worst(rows, column), column, mark) for column in columns)])
    lines.append(["goal (%)", *blank, *(f"{goal_of(column):g}" for column in columns)])
    within = []
    for column in columns:
        known = [abs(row.errors[column]) for row in rows if row.errors[column] is not None]
        within.append(f"{sum(error <= goal_of(column) for error in known)}/{len(known)}" if known else "-")
    return [*lines, ["within", *blank, *within]]


def _cell(error: float | None, column: str, mark: str) -> str:
    if error is None:
        return "-"
    shown = f"{error:.1f}" if column in STEPS else f"{error:+.1f}"
    return f"{shown}{mark}" if abs(error) > goal_of(column) else shown


def orders(found: Sequence[Pair]) -> Iterator[tuple[str, str, str, str]]:
    """(replay, engine's order, simulator's order, verdict) of each replay with several policies."""
    for (_, replay), group in itertools.groupby(found, key=lambda pair: (pair.place, pair.replay)):
        pairs = list(group)
        if len(pairs) > 1:
            ours, theirs = (order({p.engine.policy: getattr(p, side) for p in pairs}) for side in ("simulated", "engine"))
            wrong = ", ".join(f"{a} and {b} the other way round" for a, b in swapped(pairs))
            yield replay, " < ".join(theirs), " < ".join(ours), wrong or "right"


def text(rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = ["Error of the simulator (%); ! beyond its goal", *aligned(table(rows)), ""]
    return "\n".join([*lines, *aligned([["replay", "engine's order", "simulator's", "verdict"],
                                        *map(list, orders([row.pair for row in rows]))])]) + "\n"  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The same for a page."""
    ranked = [["replay", "engine's order", "simulator's", "verdict"], *map(list, orders([row.pair for row in rows]))]
    about = "Error of the simulator in percent of the engine's value; **bold**: beyond its goal."
    return f"{about}\n\n{as_markdown(_bold(table(rows)))}\n\n{as_markdown(ranked)}\n"


def _bold(lines: list[list[str]]) -> list[list[str]]:
    return [[f"**{cell[:-1]}**" if cell.endswith("!") else cell for cell in line] for line in lines]


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *body = (f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def as_csv(rows: Sequence[Row]) -> str:
    """One line a replay, policy and metric: both values, the error and its goal in percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("replay", "model", "policy", "busy", "in_flight", "requests", "unfinished", "metric", "engine",
                     "simulator", "error_percent", "goal_percent"))  # fmt: skip
    for row in rows:
        theirs, ours = summarize(row.pair.engine), summarize(row.pair.simulated)
        for column in (*METRICS, *STEPS):
            error = row.errors[column]
            values = (theirs.get(column), ours.get(column))
            writer.writerow((*row.facts, column, *("" if value is None else f"{value:.9g}" for value in values),
                             "" if error is None else f"{error:.4f}", f"{goal_of(column):g}"))  # fmt: skip
    return out.getvalue()

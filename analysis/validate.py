"""`python -m analysis validate ENGINE_DIR...`: the simulator held against engine replays of the same traces and policies.

For each replay and policy: the signed errors of latencies and throughput, the order of the policies in both, the errors of
single steps by kind, and from which kinds of steps the error comes (`report`); of many replays, one table
(`validate_table`). It reads results only: the simulated partner is made by `python -m sim replicate`, and where it is
missing, that command is printed.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from analysis.step_errors import StepError, load_of, step_errors
from traces.record import RunResult, summarize
from traces.result_files import ResultError, read_results, results_below
from traces.result_tables import TIE

STATISTICS = ("mean", "median", "p90", "p99")
LATENCIES = ("ttft", "tpot", "e2el")
METRICS = (*(f"{statistic}_{name}_ms" for name in LATENCIES for statistic in STATISTICS), "avg_token_latency_s",
           "request_throughput", "output_throughput")  # fmt: skip
TARGET = {"mean": 3.0, "median": 3.0, "p90": 5.0, "p99": 5.0}
"""Errors in percent that the project wants to stay below; of avg_token_latency and throughput as of a mean."""
STEP_TARGET = (2.0, 6.0)
"""Of single steps: median and 95th percentile."""


class Pair(NamedTuple):
    """An engine's run and its simulation. place: the directory of the engine's results. replay: its name among others."""

    place: str
    engine: RunResult
    simulated: RunResult
    replay: str


def pairs(engines: Sequence[str], simulations: Sequence[str]) -> list[Pair]:
    """Each engine's run with its partner: in `simulations`, one for each of `engines`, or else in ENGINE_DIR-sim. A
    directory may hold one replay or, as a campaign's, one in each folder; then so does its partner.

    ResultError, with the commands that make them, where partners are missing.
    """
    if simulations and len(simulations) != len(engines):
        raise ResultError(f"--sim names {len(simulations)} directories for {len(engines)}; name one for each, or none")
    found, missing = [], []
    for engine, partner in zip(engines, simulations or [f"{place.rstrip('/')}-sim" for place in engines], strict=True):
        for place in results_below(engine):
            other = Path(partner) if place == Path(engine) else Path(partner) / place.name
            own = read_results(other) if (other / "summary.json").exists() else []
            for run in read_results(place):
                if "engine" not in run.config:
                    raise ResultError(f"{place}: is no engine's result; name what engine replay or campaign wrote")
                match = next((candidate for candidate in own if _same(run, candidate)), None)
                if match is None:
                    missing.append((engine, partner, place == Path(engine)))
                else:
                    found.append(Pair(str(place), run, match, place.name))
    if missing:
        commands = [
            shlex.join(["python", "-m", "sim", "replicate", place, "--output", out, *(["--overwrite"] if alone else [])])
            for place, out, alone in dict.fromkeys(missing)
        ]
        raise ResultError("replays without a simulated partner; make them with\n  " + "\n  ".join(commands))
    return found


def _same(engine: RunResult, other: RunResult) -> bool:
    """The same policy with the same parameters, the same requests."""
    keys = ("arrival_ns", "prompt_tokens", "output_tokens", "adapter", "images")
    return (
        engine.policy == other.policy
        and "simulator" in other.config
        and engine.config["policy"] == other.config["policy"]
        and all(engine.requests[key].tolist() == other.requests[key].tolist() for key in keys)
    )


def errors(pair: Pair) -> dict[str, float | None]:
    """Signed errors in percent of the engine's value, by METRICS; None where either side has none."""
    ours, theirs = summarize(pair.simulated), summarize(pair.engine)
    return {name: 100 * (ours[name] / theirs[name] - 1) if ours[name] and theirs[name] else None for name in METRICS}


def target_of(metric: str) -> float:
    """What the error of a metric should stay below."""
    return TARGET.get(metric.split("_", maxsplit=1)[0], TARGET["mean"])


def order(runs: dict[str, RunResult]) -> list[str]:
    """Policies from the lowest avg_token_latency up."""
    scores = {name: summarize(run)["avg_token_latency_s"] for name, run in runs.items()}
    return sorted((name for name, score in scores.items() if score), key=lambda name: scores[name])


def swapped(group: Sequence[Pair]) -> list[tuple[str, str]]:
    """Pairs of policies that the simulator puts the other way round, unless the engine has them within 1 % of each other."""
    score = lambda run: summarize(run)["avg_token_latency_s"]  # noqa: E731
    scores = {pair.engine.policy: (score(pair.engine), score(pair.simulated)) for pair in group}
    wrong = []
    for first, second in itertools.combinations(sorted(scores), 2):
        (ours, simulated), (other, other_simulated) = scores[first], scores[second]
        if None in (ours, other, simulated, other_simulated) or max(ours, other) <= TIE * min(ours, other):
            continue
        if (ours < other) != (simulated < other_simulated):
            wrong.append((first, second))
    return wrong


def report(found: Sequence[Pair]) -> str:
    """All tables as text."""
    lines = []
    for place, group in itertools.groupby(found, key=lambda pair: pair.place):
        lines += [*_replay(place, list(group)), ""]
    return "\n".join([*lines, *verdict(found)]) + "\n"


def _replay(place: str, group: list[Pair]) -> list[str]:
    first = group[0]
    settings = first.engine.config["trace"]["settings"]
    shown = ("workload", "rate", "start_s", "duration_s", "adapters", "ranks", "adapter_assign", "seed")
    facts = ", ".join(f"{name} {settings[name]}" for name in shown if settings.get(name) is not None)
    profile = first.simulated.config["profile"]
    notes = [note for pair in group for note in pair.simulated.config["notes"] if note.startswith("the engine's")]
    lines = [
        f"replay   {place}: {len(first.engine.requests['id'])} requests of {first.engine.config['trace']['source']}",
        f"settings {first.engine.config['model']}; {facts}",
        f"profile  {profile['name']} ({profile['kind']})",
        *(f"note     {note}" for note in dict.fromkeys(notes)),
        "", " Error of the simulator (%) ".center(100, "="),
    ]  # fmt: skip
    names = [f"{statistic} {name}" for name in LATENCIES for statistic in STATISTICS]
    table = [["policy", "load", *names, "avg tok", "req/s", "tok/s"]]
    for pair in group:
        cells = [_signed(value, target_of(name)) for name, value in errors(pair).items()]
        table.append([pair.engine.policy, f"{load_of(pair.engine):.2f}", *cells])
    lines += aligned(table)
    ours, theirs = (order({pair.engine.policy: getattr(pair, side) for pair in group}) for side in ("simulated", "engine"))
    if len(group) > 1:
        lines += ["", f"order    engine: {' < '.join(theirs)}; simulator: {' < '.join(ours)}"]
        lines += [f"order    {a} and {b} are the other way round" for a, b in swapped(group)]
    for pair in group:
        lines += ["", *_steps(pair.engine.policy, step_errors(pair.engine, pair.simulated))]
    return lines


def _signed(value: float | None, target: float) -> str:
    return "-" if value is None else f"{value:+.1f}{'!' if abs(value) > target else ' '}"


def _steps(policy: str, found: Sequence[StepError]) -> list[str]:
    total = next((row.measured_ms for row in found if row.kind == "all"), 0.0)
    head = ("count", "measured (ms)", "modelled (ms)", "median |e| (%)", "p95 |e| (%)", "mean e (%)", "of all time (%)")
    table = [[f"{policy}: steps", *head]]
    for row in found:
        share = 100 * (row.modelled_ms - row.measured_ms) / total if total else 0.0
        table.append([row.kind, f"{row.steps:,}", f"{row.measured_ms:.1f}", f"{row.modelled_ms:.1f}", f"{row.median:.2f}",
                      f"{row.p95:.2f}", f"{row.mean:+.2f}", f"{share:+.2f}"])  # fmt: skip
    return aligned(table)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is flush left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def verdict(found: Sequence[Pair]) -> list[str]:
    """One sentence for each target: what was reached, in how many cases, and where it was missed the most."""
    lines = []
    for title, names in (("means and medians", [m for m in METRICS if target_of(m) == TARGET["mean"]]),
                         ("p90 and p99", [m for m in METRICS if target_of(m) == TARGET["p99"]])):  # fmt: skip
        cases = []
        for pair in found:
            own = {name: value for name, value in errors(pair).items() if name in names and value is not None}
            cases += [(abs(value), f"{name} of {pair.engine.policy} in {pair.replay}") for name, value in own.items()]
        if cases:
            target = target_of(names[0])
            good = sum(value <= target for value, _ in cases)
            worst, where = max(cases)
            lines.append(f"{title}: {good} of {len(cases)} within {target:g} %; the largest {worst:.1f} %, {where}")
    steps = [row for pair in found for row in step_errors(pair.engine, pair.simulated) if row.kind == "all"]
    if steps:
        median, p95 = max(row.median for row in steps), max(row.p95 for row in steps)
        lines.append(f"steps: median error up to {median:.2f} % (wanted {STEP_TARGET[0]:g}), p95 up to {p95:.2f} % "
                     f"(wanted {STEP_TARGET[1]:g})")  # fmt: skip
    wrong = [pair for _, group in itertools.groupby(found, key=lambda p: p.place) for pair in swapped(list(group))]
    return [*lines, f"order of policies: {'right everywhere' if not wrong else f'{len(wrong)} pairs the wrong way round'}"]

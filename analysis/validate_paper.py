"""What VaLoRA gains over each rival on the engine, by replay, beside what the paper reports for its two applications.

The paper's figures are of an A100-80GB, a code trace of one week, and its own implementation of the rivals; ours are of one
engine under all policies. Latencies count completed requests only: where a run was ended with requests unfinished, its
average is a lower bound and marked so. It knows results and three numbers an application, no policy.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence

from analysis.validate import Pair, aligned
from analysis.validate_table import as_markdown
from traces.record import summarize

OURS = "valora"
PAPER = {"retrieval": {"dlora": -72, "punica": -50, "slora": -20}, "video": {"dlora": -89, "punica": -83, "slora": -71}}
"""Reduction of the average token latency in percent (VaLoRA, EuroSys 2025, section 6, over its models and rates)."""
HEAD = ("replay", "model", "policy", "avg tok (ms)", "ttft (ms)", "tpot (ms)", "req/s", "tok/s", "cut off",
        "valora's reduction (%)", "the paper's (%)")  # fmt: skip


def comparison(found: Sequence[Pair]) -> list[list[str]]:
    """Head and a row a replay and policy, of the engine's records."""
    lines = [list(HEAD)]
    for (_, replay), group in itertools.groupby(found, key=lambda pair: (pair.place, pair.replay)):
        runs = [pair.engine for pair in group]
        summaries = {run.policy: summarize(run) for run in runs}
        ours = summaries.get(OURS)
        for run in runs:
            summary = summaries[run.policy]
            workload = run.config["trace"]["settings"].get("workload", "trace")
            paper = PAPER.get(workload, {}).get(run.policy)
            lines.append([
                replay, str(run.config["model"]), run.policy, _bound(summary), _number(summary["mean_ttft_ms"], 1),
                _number(summary["mean_tpot_ms"], 2), _number(summary["request_throughput"], 2),
                _number(summary["output_throughput"], 1), str(summary["unfinished"]),
                _reduction(ours, summary) if ours is not None and run.policy != OURS else "",
                "" if paper is None else str(paper),
            ])  # fmt: skip
    return lines


def _reduction(ours: dict, rival: dict) -> str:
    """By how much our average token latency is below the rival's; a bound where either has requests cut off."""
    mine, theirs = ours["avg_token_latency_s"], rival["avg_token_latency_s"]
    if not mine or not theirs:
        return "-"
    sign = {(False, True): "<= ", (True, False): ">= ", (True, True): "about "}
    bound = sign.get((bool(ours["unfinished"]), bool(rival["unfinished"])), "")
    return f"{bound}{100 * (mine / theirs - 1):+.0f}"


def _bound(summary: dict) -> str:
    value = summary["avg_token_latency_s"]
    return "-" if value is None else f"{'>= ' if summary['unfinished'] else ''}{1e3 * value:.4f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def text(found: Sequence[Pair]) -> str:
    """For a terminal."""
    return "\n".join(["The policies on the engine, and what the paper reports", *aligned(comparison(found))]) + "\n"


def markdown(found: Sequence[Pair]) -> str:
    """For a page."""
    return f"The policies on the engine; latencies of completed requests, means.\n\n{as_markdown(comparison(found))}\n"


def as_csv(found: Sequence[Pair]) -> str:
    """The same cells."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(comparison(found))
    return out.getvalue()

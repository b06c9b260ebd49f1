"""Summaries as plain text: one policy as a block like vLLM's benchmark, several side by side, and a verdict.

Fixed formatting, so that equal summaries give equal bytes. It computes no metric (`record` does) and reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from traces.record import LATENCIES, MODES, PLACES, overhead_vs_base

REFERENCES = {"base": "runs without adapters", "oracle": "is told what no real policy knows"}
"""Policies that bound the others: shown beside them, never marked as best and never the winner."""

TIE = 1.01
"""Average token latencies closer than this ratio are a tie: a smaller lead says nothing."""

_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "ntpot": "Normalized Time per Output Token",
    "queue": "Time in Queue",
}
_PLACE = {place: place.capitalize() for place in (*PLACES, "idle")} | {"linear": "Linear layers", "lora": "LoRA"}
_LABELS = {"mean": "Mean", "median": "Median", "std": "Std", "p90": "P90", "p99": "P99"}
_BARS = {
    "avg_token_latency": "avg_token_latency_s", "Mean TTFT": "mean_ttft_ms", "P99 TTFT": "p99_ttft_ms",
    "Mean TPOT": "mean_tpot_ms", "P99 TPOT": "p99_tpot_ms", "Mean E2EL": "mean_e2el_ms", "P99 E2EL": "p99_e2el_ms",
    "Request throughput": "request_throughput", "Output token throughput": "output_throughput",
}  # fmt: skip


class Row(NamedTuple):
    """One row: label with unit, how to read it from a summary, its format, and which end is better (0: neither)."""

    label: str
    value: Callable[[Mapping], float | str | None]
    format: str
    better: int = 0


LOWER, HIGHER = -1, 1


def _key(label: str, name: str, form: str, better: int = 0, scale: float = 1) -> Row:
    def value(summary: Mapping):
        number = summary.get(name)
        return number if number is None or scale == 1 else number * scale

    return Row(label, value, form, better)


def _gpu_time(label: str, table: str, name: str, better: int = 0) -> Row:
    """Share of the GPUs' time, idle included."""

    def value(summary: Mapping):
        total = sum(summary["time_where_s"].values())
        return 100 * summary[table][name] / total if total else None

    return Row(label, value, ".2f", better)


def _error_bar(name: str) -> Callable[[Mapping], float | None]:
    """The larger half of the bar, in percent of the value."""

    def value(summary: Mapping):
        bar, number = (summary.get("error_bars") or {}).get(name), summary.get(name)
        return 100 * max(bar[1] - number, number - bar[0]) / number if bar and number else None

    return value


def _pool_gib(name: str) -> Callable[[Mapping], float | None]:
    def value(summary: Mapping):
        pages, size = summary.get(name), summary.get("page_bytes")
        return None if pages is None or size is None else pages * size / 2**30

    return value


def _sections() -> list[tuple[str, list[Row]]]:
    sections = [
        (
            "Serving Benchmark Result",
            [
                Row("LoRA operator", lambda summary: summary["operator"], "s"),
                _key("Successful requests", "completed", ",d", HIGHER),
                _key("Failed requests", "failed", ",d", LOWER),
                _key("  of them aborted", "aborted", ",d"),
                _key("  of them unservable", "unservable", ",d"),
                _key("  of them cut off", "unfinished", ",d"),
                _key("Benchmark duration (s)", "duration", ".2f"),
                _key("Total input tokens", "total_input_tokens", ",d"),
                _key("Total generated tokens", "total_output_tokens", ",d"),
                _key("Request throughput (req/s)", "request_throughput", ".3f", HIGHER),
                _key("Request goodput (req/s)", "request_goodput", ".3f", HIGHER),
                _key("Output token throughput (tok/s)", "output_throughput", ".2f", HIGHER),
                _key("Total token throughput (tok/s)", "total_token_throughput", ".2f", HIGHER),
                _key("avg_token_latency (s/token)", "avg_token_latency_s", ".6f", LOWER),
            ],
        )
    ]
    for name in LATENCIES:
        title = "Queue" if name == "queue" else name.upper()
        shown = ("mean", "median", "p90", "p99") if name in ("ttft", "tpot", "itl", "e2el") else ("mean", "p99")
        rows = [_key(f"{_LABELS[stat]} {title} (ms)", f"{stat}_{name}_ms", ".2f", LOWER) for stat in shown]
        sections.append((_TITLES[name], rows))
    adapters = [
        _key("Adapter hit rate (%)", "adapter_hit_rate", ".2f", HIGHER, 100),
        _key("Adapter loads", "adapter_loads", ",d", LOWER),
        _key("Adapter bytes loaded (GiB)", "load_bytes", ".2f", LOWER, 1 / 2**30),
        _key("Adapter evictions", "adapter_evictions", ",d", LOWER),
        _key("Mode switches", "switches", ",d"),
        _key("Preemptions", "preemptions", ",d", LOWER),
        _key("Prompt tokens from prefix cache (%)", "prefix_hit_rate", ".2f", HIGHER, 100),
        Row("Peak memory pool use (GiB)", _pool_gib("peak_pages"), ".2f"),
        Row("Memory pool (GiB)", _pool_gib("pool_pages"), ".2f"),
    ]
    sections.append(("Adapters and Memory", adapters))
    modes = [_gpu_time(f"{mode.capitalize()} (% of GPU time)", "time_in_mode_s", mode) for mode in MODES]
    sections.append(("Time in Each Mode", modes))
    bars = [Row(f"{label} (+- %)", _error_bar(name), ".1f") for label, name in _BARS.items()]
    sections.append(("Error Bars: the Profile's Own Scatter", bars))
    places = [_gpu_time(f"{_PLACE[place]} (% of GPU time)", "time_where_s", place) for place in (*PLACES, "idle")]
    sections.append(("Where the Time Went", places))
    return sections


def _cell(row: Row, value) -> str:
    return "-" if value is None else format(value, row.format)


def _marked(row: Row, summaries: Sequence[Mapping]) -> list[str]:
    """The cells of a row, a star behind the best contenders; no star where all look alike or none can be better."""
    values = [row.value(summary) for summary in summaries]
    cells = [_cell(row, value) for value in values]
    stars = [" "] * len(cells)
    contenders = [i for i in _contenders(summaries) if values[i] is not None]
    if row.better and len({cells[i] for i in contenders}) > 1:
        best = max(contenders, key=lambda i: row.better * values[i])
        stars = ["*" if i in contenders and cell == cells[best] else " " for i, cell in enumerate(cells)]
    return [cell + star for cell, star in zip(cells, stars, strict=True)]


def _contenders(summaries: Sequence[Mapping]) -> list[int]:
    """Positions of the summaries that compete; references do so only among themselves."""
    chosen = [i for i, summary in enumerate(summaries) if summary["policy"] not in REFERENCES]
    return chosen or list(range(len(summaries)))


def _overhead_rows(summaries: Sequence[Mapping]) -> list[Row]:
    """Rows of ratios to the base run of the same trace and profile; none where nothing has such a run."""

    def base_of(summary: Mapping) -> Mapping | None:
        same = ("trace", "trace_sha256", "model", "profile", "profile_sha256", "seed")
        for other in summaries:
            if other["policy"] == "base" and all(other["run"][name] == summary["run"][name] for name in same):
                return other
        return None

    def ratio(name: str) -> Callable[[Mapping], float | None]:
        def value(summary: Mapping):
            base = base_of(summary)
            return overhead_vs_base(summary, base)[name] if base else None

        return value

    if not any(base_of(summary) for summary in summaries if summary["policy"] != "base"):
        return []
    return [
        Row("Mean E2EL (x of base)", ratio("mean_e2el_ms"), ".3f", LOWER),
        Row("Mean TPOT (x of base)", ratio("mean_tpot_ms"), ".3f", LOWER),
        Row("Output throughput (x of base)", ratio("output_throughput"), ".3f", HIGHER),
    ]


def _header(summaries: Mapping[str, Mapping]) -> list[str]:
    """What was run, each fact once; with the labels in front where the runs differ in it."""
    lines: dict[str, list[str]] = {}
    for label, summary in summaries.items():
        for line in _facts(summary):
            lines.setdefault(line, []).append(label)
    shared = [line for line, labels in lines.items() if len(labels) == len(summaries)]
    own = [f"{line}  [{', '.join(labels)}]" for line, labels in lines.items() if len(labels) < len(summaries)]
    return shared + own


def _facts(summary: Mapping) -> list[str]:
    run = summary["run"]
    trace_hash = f", sha256 {run['trace_sha256'][:12]}" if run["trace_sha256"] else ""
    kinds = {"analytic": " (analytic, not measured)", "measured": " (measured)",
             "extrapolated": " (extrapolated, not measured on this GPU)"}  # fmt: skip
    measured = kinds.get(run["profile_kind"], "")
    facts = [
        f"trace    {run['trace'] or '-'} ({summary['requests']:,} requests{trace_hash})",
        f"model    {run['model'] or '-'} on {summary['gpus'] or '-'} GPU",
        f"profile  {run['profile'] or '-'}{measured}",
        f"seed     {'-' if run['seed'] is None else run['seed']}",
    ]
    if summary["goodput_slo_ms"]:
        facts.append("goodput  " + ", ".join(f"{name} <= {ms:g} ms" for name, ms in summary["goodput_slo_ms"].items()))
    return facts + [f"note     {note}" for note in run["notes"]]


def verdict(summaries: Mapping[str, Mapping]) -> str:
    """One sentence: which policy has the lowest avg_token_latency, and how far above it each other one is."""
    labels, runs = list(summaries), list(summaries.values())
    contenders = [labels[i] for i in _contenders(runs)]
    scores = {label: summaries[label]["avg_token_latency_s"] for label in contenders}
    finished = sorted((score, label) for label, score in scores.items() if score is not None)
    idle = [label for label in contenders if scores[label] is None]
    if not finished:
        return "Nothing completed, so no policy has an avg_token_latency."
    lowest, winner = finished[0]
    if len(contenders) == 1:
        return f"{winner} has an avg_token_latency of {lowest:.6f} s/token."
    ties = [label for score, label in finished[1:] if score <= lowest * TIE]
    behind = [f"{label} is {100 * (score / lowest - 1):.1f} % above" for score, label in finished if label not in ties]
    behind = behind[1:] + [f"{label} completed nothing" for label in idle]
    if ties:
        others = " and ".join([", ".join([winner, *ties[:-1]]), ties[-1]])
        opening = f"{others} tie for the lowest avg_token_latency, {lowest:.6f} s/token (within 1 %)"
    else:
        opening = f"{winner} has the lowest avg_token_latency, {lowest:.6f} s/token"
    return f"{opening}{': ' if behind else ''}{', '.join(behind)}."


def _remarks(summaries: Mapping[str, Mapping]) -> list[str]:
    """What the reader must know to trust the marks."""
    remarks = []
    if len(summaries) > 1:
        remarks.append("* best of the row")
        for label, summary in summaries.items():
            if summary["policy"] in REFERENCES:
                remarks.append(f"{label} {REFERENCES[summary['policy']]}: a bound, not a competitor")
    for label, summary in summaries.items():
        if summary["failed"]:
            done, asked = summary["completed"], summary["requests"]
            remarks.append(f"{label} completed {done:,} of {asked:,} requests; latencies count only those")
    if len({(run["run"]["trace"], run["run"]["trace_sha256"], run["requests"]) for run in summaries.values()}) > 1:
        remarks.append("the runs replay different traces: their figures do not compare")
    return remarks


def render_table(summaries: Mapping[str, Mapping]) -> str:
    """The summaries as text, one column each under its label (the policy, unless runs of one policy are compared)."""
    runs = list(summaries.values())
    sections = _sections()
    overhead = _overhead_rows(runs)
    if overhead:
        sections.append(("Overhead Against Base", overhead))
    body = []
    for title, rows in sections:
        shown = [(row.label + ":", _marked(row, runs)) for row in rows]
        shown = [(label, cells) for label, cells in shown if any(cell.strip() != "-" for cell in cells)]
        if shown:
            body.append((title, shown))
    cells = [cell for _, rows in body for _, row in rows for cell in row]
    width = max(map(len, [*cells, *(label + " " for label in summaries)]))
    left = max(len(label) for _, rows in body for label, _ in rows)
    line = left + (width + 2) * len(runs)
    text = _header(summaries)
    for i, (title, rows) in enumerate(body):
        text.append(f" {title} ".center(line, "-" if i else "="))
        if not i:
            text.append("Policy:".ljust(left) + "".join("  " + f"{label} ".rjust(width) for label in summaries))
        text += [label.ljust(left) + "".join("  " + cell.rjust(width) for cell in row) for label, row in rows]
    text.append("=" * line)
    text += [*_remarks(summaries), verdict(summaries)]
    return "\n".join(line.rstrip() for line in text) + "\n"


_PER_ADAPTER = (
    ("requests", "requests", ",d"),
    ("completed", "completed", ",d"),
    ("input (tok)", "total_input_tokens", ",d"),
    ("output (tok)", "total_output_tokens", ",d"),
    ("avg_token_latency (s/tok)", "avg_token_latency_s", ".6f"),
    ("mean TTFT (ms)", "mean_ttft_ms", ".2f"),
    ("P99 TTFT (ms)", "p99_ttft_ms", ".2f"),
    ("mean TPOT (ms)", "mean_tpot_ms", ".2f"),
    ("mean E2EL (ms)", "mean_e2el_ms", ".2f"),
    ("P99 E2EL (ms)", "p99_e2el_ms", ".2f"),
)


def render_per_adapter(rows: Sequence[Mapping], policy: str = "") -> str:
    """The rows of `record.per_adapter` as text, one line an adapter."""
    table = [["adapter", *(title for title, *_ in _PER_ADAPTER)]]
    for row in rows:
        cells = ["-" if row[name] is None else format(row[name], form) for _, name, form in _PER_ADAPTER]
        table.append([row["adapter"], *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f" Per Adapter{': ' + policy if policy else ''} ".center(sum(widths) + 2 * len(widths) - 2, "=")]
    for name, *cells in table:
        lines.append("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines) + "\n"

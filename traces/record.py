"""What a run leaves behind, and what its numbers mean: shared by the simulator, the engine and the analysis.

One `RunResult` is one policy on one trace, all arrays and plain numbers. Each metric is one small function over arrays;
`summarize` puts them under the names that `vllm bench serve` writes. An empty set (nothing completed) gives None, never
NaN. It knows nothing of policies and latency models, nor of text (`result_tables`) and files (`result_files`).

Sources of the definitions: ttft, tpot, itl, e2el, goodput and throughput from vLLM's `benchmarks/serve.py`; ntpot
(normalized time per output token) from inference-perf; avg_token_latency from VaLoRA (EuroSys 2025), section 5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from traces.details import DETAIL_COLUMNS
from traces.request import NO_ADAPTER
from traces.suggest import near

STATUS = ("completed", "aborted", "unservable", "failed", "unfinished")
"""How a request ended; `requests["status"]` holds indices into this tuple.

completed: every token was delivered. aborted: given up by the policy (its SLO could not be met). unservable: larger
than the context of the model or the memory pool. unfinished: the run was ended before (`--drain`). failed: anything else.
"""

MODES = ("base", "unmerged", "merged", "mixture")
"""State of the weights during a step; `steps["mode"]` holds indices into this tuple."""

PLACES = ("linear", "attention", "vision", "lora", "host", "switch")
"""Where the time of a step goes; `steps` has one column `<place>_ns` for each."""

REQUEST_COLUMNS = (
    "id",
    "server",
    "adapter",
    "task",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "generated_tokens",
    "images",
    "arrival_ns",
    "scheduled_ns",
    "first_token_ns",
    "finish_ns",
    "preemptions",
    "status",
)
"""One row per request of the trace, in id order, int64.

adapter: index, -1 the base model | task: index into `traces.request.TASKS` | cached_tokens: of the prompt, served from
the prefix cache | output_tokens: asked for | generated_tokens: delivered | scheduled_ns (first time in a batch),
first_token_ns, finish_ns: -1 where it never happened | status: index into STATUS.
"""

STEP_COLUMNS = (
    "server",
    "start_ns",
    "duration_ns",
    "steps",
    "mode",
    "merged",
    "decodes",
    "prefills",
    "prefill_tokens",
    "images",
    "adapters",
    "context_tokens",
    *(f"{place}_ns" for place in PLACES),
)
"""One row per lease (a run of equal decode steps, or one step with prefill), int64.

steps: forward passes in the lease | merged: index of the adapter in the weights, or -1 | decodes, prefills: requests of
the batch in that phase | adapters: distinct in the batch | the last six, where the time went, sum to duration_ns.
"""

STATISTICS = ("mean", "median", "std", "p90", "p99")
LATENCIES = ("ttft", "tpot", "itl", "e2el", "ntpot", "queue")
SLO_NAMES = ("ttft", "tpot", "e2el")

HEADLINES = ("avg_token_latency_s", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_e2el_ms",
             "p99_e2el_ms", "request_throughput", "output_throughput")  # fmt: skip
"""Metrics that a simulator gives error bars, as [lowest, highest] in `error_bars` of the configuration and the summary."""

COUNTERS = (
    "adapter_loads",
    "adapter_evictions",
    "load_bytes",
    "switches",
    "preemptions",
    "prefix_hit_tokens",
    "plans",
    "steps",
    "peak_pages",
    "pool_pages",
    "page_bytes",
)
"""Counters that a summary repeats as they are; None where a driver does not count them."""


@dataclass
class RunResult:
    """One policy on one trace.

    requests: REQUEST_COLUMNS, arrays of shape (requests,). steps: STEP_COLUMNS, arrays of shape (leases,), or None when
    they were not recorded. itl: inter-token gaps as (value in microseconds, how many times), sorted by value. counters:
    plain numbers by name (switches, adapter_loads, gpus, end_ns ...). time_ns: {"mode": {mode: ns}, "where": {place or
    "idle": ns}}. config: the resolved configuration, JSON-able; its `notes` are sentences for the reader of the result.
    details: by the names of DETAIL_COLUMNS, those tables, where an engine wrote them.
    """

    policy: str
    operator: str
    requests: dict[str, np.ndarray]
    steps: dict[str, np.ndarray] | None
    itl: tuple[np.ndarray, np.ndarray]
    counters: dict
    time_ns: dict
    config: dict
    details: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError, naming column and row, unless the columns agree with each other and with the clock."""
        rows = len(self.requests.get("id", ()))
        _check_columns(self.policy, "requests", self.requests, REQUEST_COLUMNS, rows)
        table = self.requests
        done = table["status"] == STATUS.index("completed")
        rules = {
            "id counts up from 0": table["id"] == np.arange(rows),
            f"status is an index into {STATUS}": (table["status"] >= 0) & (table["status"] < len(STATUS)),
            "a completed request has arrival <= scheduled <= first token <= finish": ~done
            | (table["arrival_ns"] <= table["scheduled_ns"])
            & (table["scheduled_ns"] <= table["first_token_ns"])
            & (table["first_token_ns"] <= table["finish_ns"]),
            "a completed request has at least one token": ~done | (table["generated_tokens"] >= 1),
        }
        if self.steps is not None:
            leases = len(self.steps.get("server", ()))
            _check_columns(self.policy, "steps", self.steps, STEP_COLUMNS, leases)
            parts = sum(self.steps[f"{place}_ns"] for place in PLACES)
            rules["the breakdown of a step sums to duration_ns"] = parts == self.steps["duration_ns"]
            rules[f"mode is an index into {MODES}"] = (self.steps["mode"] >= 0) & (self.steps["mode"] < len(MODES))
        for name, table in self.details.items():
            _check_columns(self.policy, name, table, DETAIL_COLUMNS[name], len(table.get("server", ())))
        values, counts = self.itl
        if values.shape != counts.shape or values.ndim != 1:
            raise ValueError(f"{self.policy}: itl shapes {values.shape} and {counts.shape} are not two equal 1-d ones")
        rules["itl values are sorted and counts positive"] = (np.diff(values, prepend=values[:1]) >= 0) & (counts > 0)
        for rule, holds in rules.items():
            if not holds.all():
                raise ValueError(f"{self.policy}: row {int(np.argmin(holds))} breaks the rule: {rule}")


def _check_columns(policy: str, table: str, columns: Mapping, names: Iterable[str], rows: int) -> None:
    for name in names:
        if name not in columns:
            raise ValueError(f"{policy}: {table} lack the column {name!r}")
        if columns[name].shape != (rows,):
            raise ValueError(f"{policy}: {table} column {name!r} has shape {columns[name].shape}, expected ({rows},)")


def ttft_ms(arrival_ns: np.ndarray, first_token_ns: np.ndarray) -> np.ndarray:
    """Time to first token, from arrival. Shape (requests,)."""
    return (first_token_ns - arrival_ns) / 1e6


def e2el_ms(arrival_ns: np.ndarray, finish_ns: np.ndarray) -> np.ndarray:
    """End-to-end latency, from arrival to the last token. Shape (requests,)."""
    return (finish_ns - arrival_ns) / 1e6


def queue_ms(arrival_ns: np.ndarray, scheduled_ns: np.ndarray) -> np.ndarray:
    """Time from arrival to the first batch. Shape (requests,)."""
    return (scheduled_ns - arrival_ns) / 1e6


def tpot_ms(ttft: np.ndarray, e2el: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Time per output token after the first: (e2el - ttft) / (generated - 1). Shape (requests,).

    0 where one token was generated: vLLM counts it so for goodput and leaves it out of the mean and percentiles.
    """
    return np.where(generated > 1, (e2el - ttft) / np.maximum(generated - 1, 1), 0.0)


def ntpot_ms(e2el: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Normalized time per output token: e2el / generated. Shape (requests,)."""
    return e2el / generated


def avg_token_latency_s(e2el: np.ndarray, prompt_tokens: np.ndarray, generated: np.ndarray) -> float | None:
    """Sum of latencies over sum of (prompt + generated) tokens, s per token; image tokens are part of the prompt.

    VaLoRA, section 5. Over completed requests only: a policy that gives up its slowest requests looks better here.
    """
    tokens = int(prompt_tokens.sum() + generated.sum())
    return float(e2el.sum()) / 1e3 / tokens if tokens else None


def per_second(amount: float, duration_s: float) -> float | None:
    """A throughput; None where no time passed."""
    return amount / duration_s if duration_s > 0 else None


def good_requests(latencies_ms: Mapping[str, np.ndarray], slo_ms: Mapping[str, float]) -> int:
    """How many requests meet every SLO (`<=`), as vLLM counts request_goodput."""
    good = [latencies_ms[name] <= limit for name, limit in slo_ms.items()]
    return int(np.logical_and.reduce(good).sum()) if good else len(latencies_ms["e2el"])


def hit_rate(hits: float | None, misses: float | None) -> float | None:
    """hits / (hits + misses); None where nothing was looked up."""
    total = (hits or 0) + (misses or 0)
    return (hits or 0) / total if total else None


def statistics(values: np.ndarray) -> dict[str, float | None]:
    """STATISTICS of the values: population standard deviation, percentiles interpolated linearly (numpy's default)."""
    if not len(values):
        return dict.fromkeys(STATISTICS)
    median, p90, p99 = np.percentile(values, (50, 90, 99))
    results = (np.mean(values), median, np.std(values), p90, p99)
    return dict(zip(STATISTICS, map(float, results), strict=True))


def weighted_percentile(values: np.ndarray, counts: np.ndarray, percent: float) -> float:
    """np.percentile(np.repeat(values, counts), percent) without the repetition; `values` sorted and not empty."""
    ends = np.cumsum(counts)
    rank = (int(ends[-1]) - 1) * (percent / 100)  # in the order that numpy rounds
    below = math.floor(rank)
    low, high = values[np.searchsorted(ends, (below, math.ceil(rank)), side="right")].tolist()
    return low + (high - low) * (rank - below)


def weighted_statistics(values: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
    """`statistics` of np.repeat(values, counts), `values` sorted."""
    if not len(values):
        return dict.fromkeys(STATISTICS)
    mean = float(np.average(values, weights=counts))
    std = math.sqrt(np.average((values - mean) ** 2, weights=counts))
    median, p90, p99 = (weighted_percentile(values, counts, percent) for percent in (50, 90, 99))
    return dict(zip(STATISTICS, (mean, median, std, p90, p99), strict=True))


def latencies_ms(requests: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """ttft, tpot (0 where one token was generated), e2el, ntpot and queue of the completed requests at `rows`."""
    arrival, first, finish = (requests[name][rows] for name in ("arrival_ns", "first_token_ns", "finish_ns"))
    generated = requests["generated_tokens"][rows]
    ttft, e2el = ttft_ms(arrival, first), e2el_ms(arrival, finish)
    return {
        "ttft": ttft,
        "tpot": tpot_ms(ttft, e2el, generated),
        "e2el": e2el,
        "ntpot": ntpot_ms(e2el, generated),
        "queue": queue_ms(arrival, requests["scheduled_ns"][rows]),
    }


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """{"ttft": 200.0} from ["ttft:200"], milliseconds. ValueError names the pair that is not NAME:MILLISECONDS."""
    slo: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        if name not in SLO_NAMES:
            raise ValueError(f"goodput {pair!r}: {name!r} is none of {', '.join(SLO_NAMES)}{near(name, SLO_NAMES)}")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise ValueError(f"goodput {pair!r}: expected {name}:MILLISECONDS with a positive number, got {text!r}")
        slo[name] = limit
    return slo


def duration_s(result: RunResult) -> float:
    """From the first arrival to the end of the run (the `end_ns` counter, or the last finish where it is later)."""
    table = result.requests
    if not len(table["id"]):
        return 0.0
    end_ns = max(int(result.counters.get("end_ns", 0)), int(table["finish_ns"].max()))
    return max(end_ns - int(table["arrival_ns"].min()), 0) / 1e9


def summarize(result: RunResult, goodput: Mapping[str, float] | None = None) -> dict:
    """The metrics of a run as one JSON-able dict.

    Keys as in vLLM's benchmark: completed, failed (all that did not complete), duration (s), total_input_tokens,
    total_output_tokens, request_throughput, request_goodput (None unless `goodput`, SLOs in ms by name),
    output_throughput, total_token_throughput, {mean,median,std,p90,p99}_{ttft,tpot,itl,e2el}_ms. Ours: the same of
    ntpot and queue, avg_token_latency_s, rates of hits, COUNTERS, times summed over the GPUs; `run` says what was run.
    """
    table, counters = result.requests, result.counters
    rows = np.flatnonzero(table["status"] == STATUS.index("completed"))
    latencies = latencies_ms(table, rows)
    prompt, generated = table["prompt_tokens"][rows], table["generated_tokens"][rows]
    seconds, tokens_in, tokens_out = duration_s(result), int(prompt.sum()), int(generated.sum())
    summary = {
        "policy": result.policy,
        "operator": result.operator,
        "gpus": counters.get("gpus"),
        "requests": len(table["id"]),
        "completed": len(rows),
        "failed": len(table["id"]) - len(rows),
        **{name: int((table["status"] == STATUS.index(name)).sum()) for name in ("aborted", "unservable", "unfinished")},
        "duration": seconds,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": per_second(len(rows), seconds),
        "request_goodput": per_second(good_requests(latencies, goodput), seconds) if goodput else None,
        "output_throughput": per_second(tokens_out, seconds),
        "total_token_throughput": per_second(tokens_in + tokens_out, seconds),
        "avg_token_latency_s": avg_token_latency_s(latencies["e2el"], prompt, generated),
    }
    spread = {name: statistics(values) for name, values in latencies.items()}
    spread["tpot"] = statistics(latencies["tpot"][generated > 1])
    spread["itl"] = weighted_statistics(result.itl[0] / 1e3, result.itl[1])
    summary |= {f"{statistic}_{name}_ms": spread[name][statistic] for name in LATENCIES for statistic in STATISTICS}
    summary |= {
        "adapter_hit_rate": hit_rate(counters.get("adapter_hits"), counters.get("adapter_misses")),
        "prefix_hit_rate": int(table["cached_tokens"][rows].sum()) / tokens_in if tokens_in else None,
        **{name: counters.get(name) for name in COUNTERS},
        "time_in_mode_s": {mode: result.time_ns["mode"].get(mode, 0) / 1e9 for mode in MODES},
        "time_where_s": {place: result.time_ns["where"].get(place, 0) / 1e9 for place in (*PLACES, "idle")},
        "goodput_slo_ms": dict(goodput) if goodput else None,
        "run": _describe(result.config),
    }
    return summary | ({"error_bars": result.config["error_bars"]} if result.config.get("error_bars") else {})


def _describe(config: Mapping) -> dict:
    """What a reader has to know of the configuration: trace, model, profile, seed, notes."""
    trace, profile = config.get("trace") or {}, config.get("profile") or {}
    return {
        "trace": trace.get("source"),
        "trace_sha256": trace.get("sha256"),
        "model": config.get("model"),
        "profile": profile.get("name"),
        "profile_kind": profile.get("kind"),
        "profile_sha256": profile.get("sha256"),
        "seed": config.get("seed"),
        "notes": list(config.get("notes") or ()),
    }


def overhead_vs_base(summary: Mapping, base: Mapping) -> dict[str, float | None]:
    """What adapters cost: the run's value over that of the base model without adapters, on the same trace.

    Latencies above 1 and throughput below 1 are the price. None where either side has no value.
    """
    ratios = {}
    for name in ("mean_e2el_ms", "mean_tpot_ms", "output_throughput"):
        ratios[name] = summary[name] / base[name] if summary[name] is not None and base[name] else None
    return ratios


def per_adapter(result: RunResult, names: Sequence[str]) -> list[dict]:
    """One row per adapter in the order of `names`, the base model first if asked for: volumes and latencies."""
    table = result.requests
    order = np.argsort(table["adapter"], kind="stable")
    bounds = np.searchsorted(table["adapter"][order], np.arange(NO_ADAPTER, len(names) + 1))
    listing = []
    for index, (start, end) in enumerate(itertools.pairwise(bounds), NO_ADAPTER):
        if index == NO_ADAPTER and start == end:
            continue
        asked = order[start:end]
        rows = asked[table["status"][asked] == STATUS.index("completed")]
        latencies = latencies_ms(table, rows)
        prompt, generated = table["prompt_tokens"][rows], table["generated_tokens"][rows]
        row = {
            "adapter": "(base)" if index == NO_ADAPTER else names[index],
            "requests": len(asked),
            "completed": len(rows),
            "total_input_tokens": int(prompt.sum()),
            "total_output_tokens": int(generated.sum()),
            "avg_token_latency_s": avg_token_latency_s(latencies["e2el"], prompt, generated),
        }
        for name, values in (*latencies.items(), ("tpot", latencies["tpot"][generated > 1])):
            spread = statistics(values)
            row |= {f"mean_{name}_ms": spread["mean"], f"p99_{name}_ms": spread["p99"]}
        listing.append(row)
    return listing

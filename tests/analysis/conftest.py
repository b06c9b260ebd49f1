"""A small world of results for the figures and the report: two policies on two GPUs, a sweep, a search for capacity.

Made by hand, so that analysis is tested without the simulator; the rows obey the record's rules.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from traces.record import REQUEST_COLUMNS, STEP_COLUMNS, RunResult, summarize
from traces.result_files import write_results
from traces.result_log import ResultLog

MS = 1_000_000  # nanoseconds


def _result(policy: str, slower: float = 1.0, source: str = "simulator") -> RunResult:
    """Sixty requests of three adapters on two GPUs, forty steps each of 25 ms in all modes."""
    n = np.arange(60)
    requests = {name: np.zeros(60, np.int64) for name in REQUEST_COLUMNS}
    arrival = n * 30 * MS
    first = arrival + ((20 + n % 7) * slower * MS).astype(np.int64)
    requests |= {"id": n, "server": n % 2, "adapter": n % 3, "arrival_ns": arrival, "scheduled_ns": arrival}
    requests |= {"first_token_ns": first, "finish_ns": first + ((90 + n) * slower * MS).astype(np.int64)}
    requests |= {name: np.full(60, 10) for name in ("prompt_tokens", "output_tokens", "generated_tokens")}
    steps = {name: np.zeros(80, np.int64) for name in STEP_COLUMNS}
    number = np.arange(80)
    mode = 1 + number // 2 % 3 if policy == "valora" else np.ones(80, np.int64)
    steps |= {"server": number % 2, "start_ns": number // 2 * 50 * MS, "duration_ns": np.full(80, 25 * MS), "mode": mode}
    steps |= {"steps": np.ones(80, np.int64), "merged": np.where(mode > 1, 0, -1), "decodes": np.full(80, 4)}
    steps |= {"prefills": number % 2, "linear_ns": np.full(80, 20 * MS), "lora_ns": np.full(80, 5 * MS)}
    where = {"linear": 1600 * MS, "lora": 400 * MS, "idle": 2000 * MS}
    seconds = {"merged": 500 * MS} if policy == "valora" else {}
    config = {"trace": {"source": "tiny.csv", "sha256": "ab" * 32}, "model": "llava-1.5-7b", "seed": 0, source: {},
              "profile": {"name": "analytic-h200", "kind": "analytic", "sha256": "cd" * 32},
              "notes": ["time rescaled from 1 to 4 requests/s"]}  # fmt: skip
    return RunResult(
        policy=policy, operator="atmm", requests=requests, steps=steps, itl=(np.array([10_000]), np.array([540])),
        counters={"gpus": 2, "end_ns": 2000 * MS, "switches": 3, "adapter_loads": 3}, config=config,
        time_ns={"mode": {"unmerged": 1500 * MS} | seconds, "where": where},
    )  # fmt: skip


@pytest.fixture
def result():
    """Function: (policy, slower, source) -> RunResult."""
    return _result


@pytest.fixture
def results(tmp_path):
    """A directory with valora and slora, valora the faster."""
    runs = [_result("valora"), _result("slora", 1.5)]
    return write_results(tmp_path / "run", runs, {run.policy: summarize(run) for run in runs}, ["cat", "dog", "owl"])


@pytest.fixture
def sweep(tmp_path):
    """Function: (axes: option -> values, variants) -> a sweep's log over policies and two seeds.

    Token latency: 1 ms, times 2 for slora, times the place on every axis, plus a tenth of the seed.
    """

    def write(axes, variants=("",), name="sweep.jsonl"):
        path = tmp_path / name
        base = {"policy": "valora", "model": "llava-1.5-7b", "workload": "retrieval", "rate": 4.0, "seed": 0,
                "adapters": 16, "ranks": [64], "adapter-assign": "zipf:0.9", "operator": None, "trace": None}  # fmt: skip
        summary = summarize(_result("valora"))
        points = [base]
        for option, values in axes.items():
            points = [point | {option: value, "place": point.get("place", 1) * (i + 1)}
                      for point in points for i, value in enumerate(values)]  # fmt: skip
        with ResultLog(path) as log:
            for v, variant in enumerate(variants):
                for point in points:
                    for policy in ("valora", "slora"):
                        for seed in (0, 1):
                            settings = point | {"policy": policy, "seed": seed}
                            place = settings.pop("place", 1)
                            value = 1e-3 * place * (1 + (policy == "slora")) * (1 + v) + 1e-4 * seed
                            run = summary["run"] | {"model": settings["model"]}
                            row = summary | {"policy": policy, "avg_token_latency_s": value, "run": run}
                            key = f"{len(log._places)}"
                            log.append({"key": key, "variant": variant, "settings": settings, "code": "c", "summary": row})
        return path

    return write


@pytest.fixture
def capacity(tmp_path):
    """A search for capacity: one GPU, and four behind two routers."""

    def probe(rate, gpus, held, broken):
        facts = {"span_s": 60.0, "busiest": 1.3, "adapter_loads": 12, "switches": 0}
        return {"rate": rate, "gpus": gpus, "held": held, "seeds": 2, "holds": held == 2, "broken": broken, "worst": {},
                "facts": facts}  # fmt: skip

    def answer(gpus, router, rate):
        return {"policy": "valora", "router": router, "gpus": gpus, "low": probe(rate, gpus, 2, {}), "remark": "",
                "high": probe(rate * 1.02, gpus, 0, {"p99_ttft<1s": 2, "saturated": 1}), "probes": []}  # fmt: skip

    document = {
        "format": "lora-serving-capacity", "version": 1, "slo": "p99_ttft<1s", "confidence": 0.8, "seeds": 2,
        "tolerance": 0.02, "load": None, "settings": {"model": "llava-1.5-7b", "workload": "retrieval"},
        "trace_sha256": "ab", "profile": {"name": "analytic-h200", "kind": "analytic", "sha256": "cd"},
        "answers": [answer(1, "affinity", 10.0), answer(4, "affinity", 39.5), answer(4, "round-robin", 36.0)],
    }  # fmt: skip
    path = tmp_path / "capacity.json"
    path.write_text(json.dumps(document))
    return path

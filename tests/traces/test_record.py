"""Definitions of the metrics against sums done by hand, and results on disk: whole, or as they were."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import record, result_files
from traces.record import (
    PLACES,
    REQUEST_COLUMNS,
    STATUS,
    STEP_COLUMNS,
    RunResult,
    parse_goodput,
    per_adapter,
    summarize,
)
from traces.result_files import ResultError, check_target, read_results, read_summary, write_results
from traces.result_tables import render_per_adapter, render_table, verdict

MS = 1_000_000  # nanoseconds


def world(policy="valora", slower=1, status=("completed",) * 3 + ("aborted",), **counters) -> RunResult:
    """Four requests of two adapters and the base model, two leases. `slower` scales every latency."""
    columns = {name: np.zeros(4, np.int64) for name in REQUEST_COLUMNS}
    columns |= {
        "id": np.arange(4),
        "adapter": np.array([0, 1, -1, 1]),
        "prompt_tokens": np.array([100, 200, 300, 400]),
        "output_tokens": np.array([11, 1, 5, 9]),
        "generated_tokens": np.array([11, 1, 5, 0]),
        "arrival_ns": np.array([0, 1000, 2000, 3000]) * MS,
        "status": np.array([STATUS.index(name) for name in status]),
    }
    for name, after_ms in {"scheduled": (10, 20, 30), "first_token": (50, 60, 70), "finish": (250, 60, 110)}.items():
        times = columns["arrival_ns"] + (np.array([*after_ms, 0]) * slower * MS).astype(np.int64)
        columns[f"{name}_ns"] = np.where(columns["status"] == 0, times, -1)
    steps = {name: np.array([0, 1]) for name in STEP_COLUMNS}
    steps |= {f"{place}_ns": np.array([5, 7]) * MS for place in PLACES}
    steps |= {"start_ns": np.array([10, 1020]) * MS, "duration_ns": np.array([30, 42]) * MS}
    where = {"linear": 300 * MS, "lora": 100 * MS, "idle": 3600 * MS}
    return RunResult(
        policy=policy,
        operator="atmm",
        requests=columns,
        steps=steps,
        itl=(np.array([10_000, 20_000]), np.array([3, 1])),
        counters={"gpus": 1, "end_ns": 4000 * MS, "adapter_hits": 3, "adapter_misses": 1, "switches": 2} | counters,
        time_ns={"mode": {"merged": 300 * MS, "unmerged": 100 * MS}, "where": where},
        config={
            "trace": {"source": "tiny.csv", "sha256": "ab" * 32},
            "profile": {"name": "h200", "sha256": "cd" * 32, "kind": "analytic"},
            "model": "llava-1.5-7b",
            "seed": 0,
            "notes": ["images: sqrt"],
            "theta_s": math.inf,
        },
    )


def same(left: RunResult, right: RunResult) -> bool:
    tables = [(left.requests, right.requests), (left.steps, right.steps)]
    tables.append((dict(enumerate(left.itl)), dict(enumerate(right.itl))))
    equal = all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in tables)
    return equal and (left.policy, left.operator, left.counters, left.time_ns) == (
        right.policy,
        right.operator,
        right.counters,
        right.time_ns,
    )


def test_latencies_are_those_of_vllm_and_the_average_token_latency_that_of_the_paper():
    summary = summarize(world())
    assert (summary["completed"], summary["failed"], summary["aborted"], summary["unservable"]) == (3, 1, 1, 0)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (600, 17)
    assert summary["mean_ttft_ms"] == pytest.approx((50 + 60 + 70) / 3)
    assert summary["mean_e2el_ms"] == pytest.approx((250 + 60 + 110) / 3)
    assert summary["mean_tpot_ms"] == pytest.approx((200 / 10 + 40 / 4) / 2), "a single token has no TPOT"
    assert summary["mean_ntpot_ms"] == pytest.approx((250 / 11 + 60 / 1 + 110 / 5) / 3)
    assert summary["mean_queue_ms"] == pytest.approx(20)
    assert summary["avg_token_latency_s"] == pytest.approx((0.250 + 0.060 + 0.110) / (600 + 17))
    assert summary["median_itl_ms"] == 10
    assert summary["mean_itl_ms"] == pytest.approx(12.5)
    assert summary["std_itl_ms"] == pytest.approx(np.std([10, 10, 10, 20]))
    assert summary["p99_e2el_ms"] == pytest.approx(np.percentile([250, 60, 110], 99))


def test_throughput_is_over_the_time_from_the_first_arrival_to_the_end():
    summary = summarize(world())
    assert summary["duration"] == 4.0
    assert summary["request_throughput"] == pytest.approx(3 / 4)
    assert summary["output_throughput"] == pytest.approx(17 / 4)
    assert summary["total_token_throughput"] == pytest.approx(617 / 4)
    shifted = world(end_ns=14_000 * MS)
    for name in ("arrival_ns", "scheduled_ns", "first_token_ns", "finish_ns"):
        column = shifted.requests[name]
        shifted.requests[name] = np.where(column < 0, column, column + 10_000 * MS)
    assert summarize(shifted)["duration"] == 4.0


@pytest.mark.parametrize(
    ("slo", "good"),
    [({"ttft": 60}, 2), ({"ttft": 59.9}, 1), ({"tpot": 10}, 2), ({"e2el": 110, "ttft": 60}, 1), ({"tpot": 0.1}, 1)],
)
def test_goodput_counts_requests_that_meet_every_slo_and_a_single_token_meets_any_tpot(slo, good):
    assert summarize(world(), slo)["request_goodput"] == pytest.approx(good / 4)


def test_goodput_pairs_are_read_strictly():
    assert parse_goodput(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}
    for pair in ("ttff:200", "ttft", "ttft:", "ttft:nan", "ttft:-1", "ttft:0", "ttft:inf", ":5"):
        with pytest.raises(ValueError, match="goodput") as error:
            parse_goodput([pair])
        assert repr(pair) in str(error.value)
    with pytest.raises(ValueError, match="did you mean 'ttft'"):
        parse_goodput(["ttff:200"])


def test_rates_and_times():
    summary = summarize(world())
    assert summary["adapter_hit_rate"] == 0.75
    assert summary["time_in_mode_s"] == {"base": 0, "unmerged": 0.1, "merged": 0.3, "mixture": 0}
    assert summary["time_where_s"]["idle"] == 3.6


@pytest.mark.parametrize("result", [world(status=["unservable"] * 4), world(status=["failed"] * 4)])
def test_nothing_completed_gives_none_never_nan(result):
    result.itl = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    result.time_ns = {"mode": {}, "where": {}}
    result.counters = {}
    summary = summarize(result, {"ttft": 1})
    assert summary["completed"] == 0
    for name in ("mean_ttft_ms", "p99_itl_ms", "avg_token_latency_s", "adapter_hit_rate"):
        assert summary[name] is None
    json.dumps(summary, allow_nan=False)
    assert "Nothing completed" in render_table({"valora": summary})


def test_an_empty_trace_has_a_summary():
    result = world()
    result.requests = {name: column[:0] for name, column in result.requests.items()}
    result.counters = {}
    result.check()
    assert summarize(result)["request_throughput"] is None


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 40)), min_size=1, max_size=30), st.floats(0, 100))
def test_weighted_statistics_equal_numpy_on_the_expanded_data(histogram, percent):
    values, counts = map(np.array, zip(*sorted(histogram), strict=True))
    expanded = np.repeat(values, counts)
    assert record.weighted_percentile(values, counts, percent) == pytest.approx(np.percentile(expanded, percent))
    expected = record.statistics(expanded)
    assert record.weighted_statistics(values, counts) == pytest.approx(expected, abs=1e-3)


def test_adapters_are_listed_in_order_and_add_up():
    rows = per_adapter(world(), ["cat", "dog", "unused"])
    assert [row["adapter"] for row in rows] == ["(base)", "cat", "dog", "unused"]
    assert [(row["requests"], row["completed"]) for row in rows] == [(1, 1), (1, 1), (2, 1), (0, 0)]
    assert [row["mean_tpot_ms"] for row in rows] == [10, 20, None, None]
    assert rows[2]["avg_token_latency_s"] == pytest.approx(0.060 / 201)
    assert sum(row["total_output_tokens"] for row in rows) == 17
    assert render_per_adapter(rows).splitlines()[-1].split()[:4] == ["unused", "0", "0", "0"]


@pytest.mark.parametrize(
    ("table", "column", "value", "rule"),
    [
        ("requests", "id", 7, "counts up from 0"),
        ("requests", "finish_ns", 1, "first token <= finish"),
        ("requests", "status", 9, "status is an index"),
        ("requests", "generated_tokens", 0, "at least one token"),
        ("steps", "lora_ns", 1, "sums to duration_ns"),
        ("steps", "mode", 4, "mode is an index"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(table, column, value, rule):
    result = world()
    columns = getattr(result, table)
    columns[column] = columns[column].copy()
    columns[column][1] = value
    with pytest.raises(ValueError, match=rule):
        result.check()


def test_a_missing_or_short_column_is_named():
    result = world()
    result.requests["images"] = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="'images' has shape"):
        result.check()
    del result.steps["mode"]
    result.requests["images"] = np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="lack the column 'mode'"):
        result.check()


def test_one_policy_is_a_block_with_units_and_says_that_the_profile_is_not_measured():
    text = render_table({"valora": summarize(world(), {"ttft": 60})})
    assert text == render_table({"valora": summarize(world(), {"ttft": 60})})
    rows = dict(line.rsplit(maxsplit=1) for line in text.splitlines() if ":  " in line)
    assert rows["Median TTFT (ms):"] == "60.00"
    assert rows["Request goodput (req/s):"] == "0.500"
    assert rows["Merged (% of GPU time):"] == "7.50"
    assert "Overhead" not in text
    assert "h200 (analytic, not measured)" in text
    assert "note     images: sqrt" in text
    assert "valora completed 3 of 4 requests" in text


def test_a_comparison_marks_the_best_and_gives_the_verdict_last():
    worlds = {name: world(name, slower) for name, slower in {"slora": 2, "valora": 1, "dlora": 3, "base": 0.5}.items()}
    text = render_table({name: summarize(result) for name, result in worlds.items()})
    row = next(line for line in text.splitlines() if line.startswith("Mean E2EL (ms)"))
    assert row.split()[3:] == ["280.00", "140.00*", "420.00", "70.00"], "the base model is a bound, not the winner"
    overhead = next(line for line in text.splitlines() if line.startswith("Mean E2EL (x of base)"))
    assert overhead.split()[5:] == ["4.000", "2.000*", "6.000", "1.000"]
    assert text.splitlines()[-1] == (
        "valora has the lowest avg_token_latency, 0.000681 s/token: slora is 100.0 % above, dlora is 200.0 % above."
    )


def test_a_lead_within_one_percent_is_a_tie():
    runs = {"a": 1, "b": 1.005, "c": 1.02}
    summaries = {name: summarize(world(name, scale)) for name, scale in runs.items()}
    summaries["d"] = summarize(world("d", status=["failed"] * 4))
    sentence = verdict(summaries)
    assert sentence.startswith("a and b tie for the lowest avg_token_latency, 0.000681 s/token (within 1 %): c is 2.0")
    assert sentence.endswith("d completed nothing.")


def test_runs_of_different_traces_say_so():
    other = summarize(world("slora"))
    other["run"] = other["run"] | {"trace": "other.csv"}
    assert "different traces" in render_table({"valora": summarize(world()), "slora": other})


def written(folder: Path, *results: RunResult, overwrite=False) -> Path:
    results = results or (world(), world("slora", 2))
    return write_results(folder, results, {r.policy: summarize(r) for r in results}, ["cat", "dog"], overwrite)


def test_results_come_back_as_they_were_written(tmp_path):
    folder = written(tmp_path / "new" / "run")
    back = read_results(folder)
    assert [result.policy for result in back] == ["valora", "slora"]
    assert all(map(same, back, (world(), world("slora", 2))))
    assert back[0].config == world().config | {"theta_s": "inf"}
    assert summarize(back[0]) == summarize(world()) == read_summary(folder)["policies"]["valora"]["summary"]
    assert read_summary(folder)["adapters"] == ["cat", "dog"]
    assert [path.name for path in folder.parent.iterdir()] == ["run"], "nothing is left beside"


def test_equal_results_give_equal_bytes(tmp_path):
    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 9
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_steps_may_be_absent(tmp_path):
    result = world()
    result.steps = None
    folder = written(tmp_path / "run", result)
    assert read_results(folder)[0].steps is None
    assert json.loads((folder / "valora" / "trace.json").read_text())["traceEvents"] == []


def test_the_chrome_trace_shows_leases_by_mode_and_who_waits(tmp_path):
    result = world()
    result.steps = {name: np.zeros(2, np.int64) for name in STEP_COLUMNS}
    result.steps |= {"start_ns": np.array([5, 1020]) * MS, "mode": np.array([1, 2]), "decodes": np.array([0, 3])}
    result.steps |= {"linear_ns": np.array([4, 6]) * MS, "duration_ns": np.array([4, 6]) * MS}
    events = json.loads((written(tmp_path / "run", result) / "valora" / "trace.json").read_text())["traceEvents"]
    slices = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [("unmerged", 5000.0, 4000.0), ("merged", 1_020_000.0, 6000.0)]
    counters = [e["args"] for e in events if e["ph"] == "C"]
    assert counters == [{"running": 0, "waiting": 1}, {"running": 3, "waiting": 0}]


def test_a_long_trace_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("traces.chrome_trace.MAX_LEASES", 1)
    folder = written(tmp_path / "run", world())
    trace = json.loads((folder / "valora" / "trace.json").read_text())
    assert "first 1 of 2 leases" in trace["otherData"]["note"]
    assert read_summary(folder)["policies"]["valora"]["notes"] == [trace["otherData"]["note"]]
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 1


def test_former_results_are_refused_unless_they_may_go(tmp_path):
    folder = written(tmp_path / "run")
    with pytest.raises(ResultError, match="not empty"):
        written(folder, world("dlora"))
    (folder / "figures").mkdir()
    (folder / "figures" / "policies.png").write_bytes(b"old")
    written(folder, world("dlora"), overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["dlora", "summary.json"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "valora/thesis.tex", "slora/requests.parquet/x"])
def test_files_of_others_are_never_removed(tmp_path, foreign):
    folder = written(tmp_path / "run", world())
    (folder / foreign).parent.mkdir(parents=True, exist_ok=True)
    (folder / foreign).write_text("years of work")
    with pytest.raises(ResultError, match="not part of the results"):
        check_target(folder, overwrite=True)
    strangers = tmp_path / "home"
    strangers.mkdir()
    (strangers / "letter").write_text("dear")
    with pytest.raises(ResultError, match=r"summary\.json: does not exist"):
        written(strangers, overwrite=True)
    with pytest.raises(ResultError, match="is a file"):
        written(strangers / "letter", overwrite=True)
    assert (folder / foreign).read_text() == "years of work"


@pytest.mark.parametrize("victim", ["_write_parquet", "_fsync", "_put_in_place"])
def test_a_failure_while_writing_leaves_the_former_results(tmp_path, monkeypatch, victim):
    folder = written(tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_files, victim, full)
    with pytest.raises(OSError, match="No space left"):
        written(folder, world("dlora"), overwrite=True)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failed_rename_brings_the_former_results_back(tmp_path, monkeypatch):
    folder = written(tmp_path / "run")
    replace = result_files.os.replace

    def refuse(source, target):
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(result_files.os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        written(folder, world("dlora"), overwrite=True)
    monkeypatch.undo()
    assert [result.policy for result in read_results(folder)] == ["valora", "slora"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_nan_is_written(tmp_path):
    summary = summarize(world()) | {"duration": math.nan}
    with pytest.raises(ValueError, match="JSON"):
        write_results(tmp_path / "run", [world()], {"valora": summary}, ["cat", "dog"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "figures", "x" * 101])
def test_a_policy_that_cannot_name_a_folder_is_refused(tmp_path, name):
    with pytest.raises(ResultError, match="cannot name a folder"):
        written(tmp_path / "run", world(name))
    with pytest.raises(ResultError, match="two results"):
        written(tmp_path / "run", world(), world())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", b"{", "is not JSON"),
        ("summary.json", b"\xff\xfe", "is not JSON"),
        ("summary.json", b"[]", "is not a summary"),
        ("summary.json", b'{"format": "lora-serving-results", "version": 2}', "has version 2"),
        ("summary.json", b'{"format": "lora-serving-results", "version": 1, "policies": {"../x": {}}}', "misnamed"),
        ("summary.json", b'{"format": "lora-serving-results", "version": 1, "policies": {"x": 3}}', "'x' lacks"),
        ("valora/requests.parquet", b"PAR1", "requests.parquet: cannot be read"),
        ("valora/itl.parquet", b"", "itl.parquet: cannot be read"),
    ],
)
def test_damaged_results_name_the_file(tmp_path, name, content, message):
    folder = written(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(ResultError, match=message):
        read_results(folder)


def test_a_column_of_the_wrong_kind_is_named(tmp_path):
    folder = written(tmp_path / "run")
    result_files._write_parquet(folder / "valora" / "itl.parquet", {"gap_us": np.array(["x"]), "count": np.array([1])})
    with pytest.raises(ResultError, match="'gap_us' holds string"):
        read_results(folder)
    result_files._write_parquet(folder / "valora" / "itl.parquet", {"gap_us": np.array([1])})
    with pytest.raises(ResultError, match="lacks the column 'count'"):
        read_results(folder)

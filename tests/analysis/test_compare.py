"""The analysis commands over a directory of results: the same text as the simulator's, figures, and clear errors."""

import csv
from xml.etree import ElementTree

import numpy as np
import pytest

from analysis.__main__ import main
from traces.record import REQUEST_COLUMNS, RunResult, per_adapter, summarize
from traces.result_files import write_results
from traces.result_tables import render_per_adapter, render_table

MS = 1_000_000  # nanoseconds


def run_of(policy: str, slower: float, completed: bool = True) -> RunResult:
    """Fifty requests of two adapters on one GPU."""
    requests = {name: np.zeros(50, np.int64) for name in REQUEST_COLUMNS}
    arrival = np.arange(50) * 100 * MS
    first = arrival + (np.arange(1, 51) * slower * MS).astype(np.int64)
    requests |= {"id": np.arange(50), "adapter": np.arange(50) % 2, "arrival_ns": arrival, "scheduled_ns": arrival}
    requests |= {"first_token_ns": first, "finish_ns": first + 90 * MS, "status": np.full(50, 0 if completed else 2)}
    requests |= {name: np.full(50, 10) for name in ("prompt_tokens", "output_tokens", "generated_tokens")}
    return RunResult(
        policy=policy,
        operator="atmm",
        requests=requests,
        steps=None,
        itl=(np.array([10_000]), np.array([450])),
        counters={"gpus": 1, "end_ns": 6000 * MS},
        time_ns={"mode": {"merged": 2000 * MS}, "where": {"linear": 2000 * MS, "idle": 4000 * MS}},
        config={"trace": {"source": "tiny.csv"}, "profile": {"name": "h200", "kind": "analytic"}, "model": "llava"},
    )


@pytest.fixture
def results(tmp_path):
    runs = [run_of("valora", 1), run_of("slora", 2), run_of("stuck", 1, completed=False)]
    write_results(tmp_path / "out", runs, {run.policy: summarize(run) for run in runs}, ["cat", "dog"])
    return tmp_path / "out"


def test_compare_prints_what_the_simulator_prints(results, capsys):
    assert main(["compare", str(results), "--per-adapter"]) == 0
    runs = {run.policy: run for run in (run_of("valora", 1), run_of("slora", 2), run_of("stuck", 1, completed=False))}
    tables = [render_per_adapter(per_adapter(run, ["cat", "dog"]), policy) for policy, run in runs.items()]
    expected = [render_table({policy: summarize(run) for policy, run in runs.items()}), *tables]
    assert capsys.readouterr().out == "\n".join(expected)


def test_the_same_policy_in_two_directories_is_told_apart(results, tmp_path, capsys):
    run = run_of("valora", 4)
    write_results(tmp_path / "other", [run], {"valora": summarize(run)}, ["cat", "dog"])
    assert main(["compare", str(results), str(tmp_path / "other")]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(f"valora@{results} has the lowest")
    assert f"valora@{tmp_path / 'other'} is" in verdict


def test_plot_draws_png_svg_and_the_numbers(results, tmp_path, capsys):
    assert main(["compare", str(results), "--plot"]) == 0
    folder = results / "figures"
    assert (folder / "policies.png").read_bytes().startswith(b"\x89PNG")
    text = " ".join(ElementTree.parse(folder / "policies.svg").getroot().itertext())
    for word in ("Time to first token (s)", "Average token latency (ms/token)", "GPU time (%)", "not measured"):
        assert word in text
    rows = list(csv.DictReader((folder / "policies.csv").open()))
    drawn = {(row["panel"], row["policy"], row["x"]): row["value"] for row in rows}
    assert float(drawn["ttft_cdf", "slora", "50"]) == pytest.approx(0.051), "median of 2, 4 .. 100 ms"
    assert float(drawn["avg_token_latency", "valora", ""]) == pytest.approx((25.5 + 90) / 20)
    assert drawn["avg_token_latency", "stuck", ""] == ""
    assert float(drawn["time_in_mode", "valora", "idle"]) == pytest.approx(200 / 3)
    assert ("e2el_cdf", "stuck", "50") not in drawn
    assert capsys.readouterr().err.count("wrote ") == 3

    assert main(["figures", "--in", str(results), "--out", str(tmp_path / "again")]) == 0
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), "equal results, equal files"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "OUT", "--per-adaptr"], "did you mean '--per-adapter'"),
        (["compair", "OUT"], "did you mean 'compare'"),
        (["compare", "nowhere"], "summary.json: does not exist"),
        (["compare", "OUT/summary.json"], "compare takes directories; of a file `python -m analysis figures --in"),
        (["figures", "--in", "OUT/valora/requests.parquet", "--out", "x"], "neither a directory of results nor a .jsonl"),
        (["compare", "OUT", "nowhere", "--plot"], "needs --out"),
        (["compare", "OUT", "--out", "x"], "add --plot"),
        (["figures", "--in", "OUT", "--out", "OUT/summary.json"], "summary.json"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(results, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main([argument.replace("OUT", str(results)) for argument in arguments])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""

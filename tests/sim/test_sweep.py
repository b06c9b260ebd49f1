"""Sweeps: grids are strict, results survive any kill, and the table depends on nothing but the runs."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from sim.experiment import key_of, parse_options
from sim.grid import GridError, read_grid
from sim.sweep import default_log, main
from traces.replication import mean_ci95, student_t
from traces.result_files import ResultError
from traces.result_log import ResultLog, read_log

ROOT = Path(__file__).resolve().parents[2]
GRID = """
policy: [valora, slora]
rate: [4, 8]
seed: [0, 1, 2]
workload: retrieval
max-requests: 60
"""


@pytest.fixture
def grid(tmp_path):
    """Function: text -> path of a grid file."""

    def write(text=GRID, name="grid.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def run(*arguments) -> int:
    return main([*map(str, arguments), "--jobs", "1", "--progress", "off"])


# -- grids --------------------------------------------------------------------------------------------------------------
def test_a_grid_is_crossed_with_the_seed_last(grid):
    cells = list(read_grid(grid("seed: [1, 0]\npolicy: [slora, punica]\nrate: 1e1\n")).cells())
    assert [(cell.axes["policy"], cell.args.seed) for cell in cells] == [
        ("slora", 1), ("slora", 0), ("punica", 1), ("punica", 0)]  # fmt: skip
    assert {cell.args.rate for cell in cells} == {10.0}


def test_variants_are_one_more_axis(grid):
    text = "seed: [0, 1]\nvariants:\n- {name: full}\n- {name: no mixture, policy-option: mixture=false theta_s=2}\n"
    cells = list(read_grid(grid(text)).cells())
    assert [cell.variant for cell in cells] == ["full", "full", "no mixture", "no mixture"]
    assert cells[-1].args.policy_option == ["mixture=false", "theta_s=2"]


def test_files_are_relative_to_the_grid(grid, tmp_path):
    (tmp_path / "my.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,2\n1,12,3\n")
    cell = next(read_grid(grid("trace: my.csv\n")).cells())
    assert cell.args.trace == str(tmp_path / "my.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polcy: valora", ":1:1: unknown key 'polcy' in a grid (did you mean 'policy'?)"),
        ("rate: 4\npolicy: [valora, valorra]", ":2:18: unknown policy 'valorra'; did you mean 'valora'"),
        ("rate: [4, -1]", ":1:11: --rate: -1 is not above 0"),
        ("rate: [4, 4]", ":1:11: rate: 4 stands twice"),
        ("rate: 4\nrate: 5", ":2:1: rate stands twice"),
        ("rate: []", ":1:7: rate: an empty list leaves no run"),
        ("rate: {a: 1}", ":1:7: rate: expected one value"),
        ("rate: [[1]]", ":1:8: rate: expected one value"),
        ("output: x", ":1:1: unknown key 'output'"),
        ("no-head: maybe", "'maybe' is neither true nor false"),
        ("policy: 'valora,slora'", "one policy a run"),
        ("rate: 2\ntime-scale: 2", "not allowed with argument"),
        ("variants: [{policy: slora}]", "a variant needs a name of its own"),
        ("policy: [slora, valora]\nvariants: [{name: a, policy: slora}]", "an axis too"),
        ("policy: slora\npolicy-option: theta_s=1", "has no parameter 'theta_s'"),
        ("", "a grid must be a mapping"),
        ("[1, 2]", "a grid must be a mapping"),
        ("a: [", "not YAML"),
        ("max-batch: 5000", "max_batch_tokens 2048 leaves no room"),
    ],
)
def test_a_wrong_grid_says_where_and_why(grid, text, message):
    with pytest.raises(GridError) as error:
        list(read_grid(grid(text)).cells())
    assert message in str(error.value)
    assert "grid.yaml" in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "sim/grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_that_ship_can_be_run(path, tmp_path):
    cells = list(read_grid(path).cells())
    assert len(cells) > 10
    (tmp_path / "my.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,2\n1,12,3\n")
    grid = read_grid(path, {"trace": str(tmp_path / "my.csv")})
    assert next(grid.cells()).args.trace == str(tmp_path / "my.csv")


# -- keys ---------------------------------------------------------------------------------------------------------------
def test_a_key_knows_contents_and_not_places(tmp_path):
    rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,2\n"
    paths = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    for path, more in zip(paths, ("", "", "1,12,3\n"), strict=True):
        path.write_text(rows + more)
    keys = [key_of(parse_options({"trace": str(path)})) for path in paths]
    assert keys[0] == keys[1] != keys[2]
    assert key_of(parse_options({"rate": "4"})) == key_of(parse_options({"rate": "4.0"}))
    assert key_of(parse_options({"rate": "4"})) != key_of(parse_options({"rate": "4"}), "a variant")


def test_a_file_that_no_sweep_wrote_is_not_replaced(grid, tmp_path, capsys):
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,2\n")
    with pytest.raises(SystemExit):
        main([str(grid()), "--trace", str(trace), "--output", str(tmp_path / "azure.jsonl")])
    assert "azure.csv: is there already, and the table would replace it" in capsys.readouterr().err
    assert trace.read_text().endswith("0,10,2\n")


# -- runs ---------------------------------------------------------------------------------------------------------------
def test_a_sweep_prints_means_with_intervals_and_goes_on_where_it_stopped(grid, tmp_path, capsys):
    path = grid()
    assert run(path) == 0
    first = capsys.readouterr()
    assert "12 runs, 0 of them done before, 12 to do" in first.err
    lines = first.out.splitlines()
    assert lines[0].split() == ["policy", "rate", "seeds", "avg_token_latency_s", "mean_ttft_ms", "p99_ttft_ms",
                                "p99_tpot_ms", "request_throughput", "failed"]  # fmt: skip
    assert [line.split()[:3] for line in lines[1:5]] == [[p, r, "3"] for p in ("valora", "slora") for r in ("4", "8")]
    rows = list(csv.DictReader((tmp_path / "grid.csv").open()))
    log = read_log(tmp_path / "grid.jsonl")
    values = [r["summary"]["mean_ttft_ms"] for r in log if r["settings"]["policy"] == "slora" and r["settings"]["rate"] == 4]
    mean, half = mean_ci95(values)
    assert (float(rows[2]["mean_ttft_ms"]), float(rows[2]["mean_ttft_ms_ci95"])) == pytest.approx((mean, half))

    assert run(path) == 0
    second = capsys.readouterr()
    assert "12 of them done before, 0 to do" in second.err
    assert second.out == first.out

    assert run(grid(GRID.replace("[4, 8]", "[4, 8, 16]"))) == 0
    assert "18 runs, 12 of them done before" in capsys.readouterr().err


def test_processes_change_nothing(grid, capsys):
    assert run(grid()) == 0
    one = capsys.readouterr().out
    assert main([str(grid(name="other.yaml")), "--jobs", "2", "--progress", "off"]) == 0
    assert capsys.readouterr().out == one


def test_runs_that_fail_are_told_and_the_others_kept(grid, tmp_path, capsys):
    assert run(grid("start: [0, 100000]\nmax-requests: 20\n")) == 1
    said = capsys.readouterr()
    assert "failed: start=100000: TraceError: traces/sample.csv: nothing in the window" in said.err
    assert "1 of 2 runs are missing" in said.out
    assert len(read_log(tmp_path / "grid.jsonl")) == 1


def test_without_ray_a_cluster_is_refused_in_words(grid, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as code:
        run(grid(), "--ray", "auto")
    assert code.value.code == 2
    assert "pip install 'valora[ray]'" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_told_at_once(grid, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again when the block ends
    with pytest.raises(SystemExit) as code:
        run(grid(), "--ray", f"127.0.0.1:{port}")
    assert code.value.code == 2
    assert f"--ray 127.0.0.1:{port}: nobody answers" in capsys.readouterr().err


def test_the_programs_own_folder_stays_as_it_is(tmp_path):
    assert default_log(ROOT / "sim/grids/rate.yaml") == Path("results/rate.jsonl")
    assert default_log(tmp_path / "rate.yaml") == tmp_path / "rate.jsonl"


def test_set_gives_an_option_one_value(grid, tmp_path, capsys):
    assert run(grid(), "--set", "rate=8", "--set", "seed=0", "--set", "max_batch=8") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:3]] == [
        ["policy", "seeds"], ["valora", "1"], ["slora", "1"]]  # fmt: skip
    settings = [row["settings"] for row in read_log(tmp_path / "grid.jsonl")]
    assert {(s["rate"], s["seed"], s["max-batch"]) for s in settings} == {(8.0, 0, 8)}


@pytest.mark.parametrize(("pair", "message"), [
    ("rate", "--set 'rate': write OPTION=VALUE"),
    ("ratee=4", "unknown option 'ratee' (did you mean 'rate'?)"),
    ("rate=fast", "--rate: 'fast' is not a number"),
    ("operator=slora", "variant 'static' sets operator, so it cannot have one value"),
    ("profile=h2000", "unknown profile 'h2000'"),
])  # fmt: skip
def test_a_wrong_set_says_why(grid, pair, message, capsys):
    with pytest.raises(SystemExit) as code:
        run(grid("seed: [0, 1]\nvariants:\n- {name: static, operator: punica}\n"), "--set", pair)
    assert code.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_metrics_are_refused(grid, capsys):
    with pytest.raises(SystemExit):
        run(grid(), "--metrics", "p99_tft_ms")
    assert "did you mean 'p99_ttft_ms'" in capsys.readouterr().err


def test_killed_at_any_moment_it_ends_with_the_same_table(grid, tmp_path, capsys):
    """SIGKILL twice, at moments that depend on the machine; then the sweep runs to its end."""
    path = grid(GRID.replace("max-requests: 60", "max-requests: 300"))
    assert run(path, "--output", tmp_path / "whole.jsonl") == 0
    whole = capsys.readouterr().out
    log = tmp_path / "grid.jsonl"
    for kept in (2, 6):
        process = subprocess.Popen(
            [sys.executable, "-m", "sim", "sweep", path, "--jobs", "2"], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= kept:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert log.read_bytes().count(b"\n") >= kept
    with log.open("ab") as file:  # what a kill in the middle of a write would leave
        file.write(b'{"key":"half a ro')
    for line in log.read_bytes().splitlines()[:-1]:
        json.loads(line)
    assert run(path) == 0
    said = capsys.readouterr()
    assert said.out == whole
    assert "cut off the last 17 bytes" in said.err
    assert (tmp_path / "grid.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(read_log(log)) == 12


# -- the log ------------------------------------------------------------------------------------------------------------
ROW = {"key": "a", "variant": "", "settings": {}, "code": "c", "summary": {"x": 1}}


def test_a_log_is_written_by_one_process_at_a_time(tmp_path):
    path = tmp_path / "log.jsonl"
    with ResultLog(path) as log:
        log.append(ROW)
        log.append(ROW | {"key": "b"})
        log.append(ROW | {"summary": {"x": 2}})
        with pytest.raises(ResultError, match="another process is writing"):
            ResultLog(path)
        assert (log.read("a")["summary"], "b" in log, "z" in log) == ({"x": 2}, True, False)
    assert [(row["key"], row["summary"]["x"]) for row in read_log(path)] == [("a", 2), ("b", 1)]


@pytest.mark.parametrize("content", ["not a log", "[1]\n", '{"key": 1}\n', '{"key": "a"}\nx\n', "x,y\n1,2"])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ResultError, match="notes"):
        ResultLog(path)
    assert path.read_text() == content


# -- statistics ---------------------------------------------------------------------------------------------------------
def test_students_t_is_that_of_the_tables():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 7, 10, 29, 30, 99):
        assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_intervals():
    assert mean_ci95([5.0]) == (5.0, None)
    mean, half = mean_ci95([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302652729911275 / 3**0.5))
    assert mean_ci95([3.0, 1.0, 2.0]) == (mean, half)

"""`python -m engine campaign`: many replays in one command that goes on where it was killed, up to their table of errors."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.__main__ import main  # noqa: E402
from engine.campaign_file import FOLDER, CampaignError, chosen, in_order, read_campaign  # noqa: E402
from traces.options import SAMPLE  # noqa: E402
from traces.result_files import read_results, read_summary  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
AZURE = ROOT.parent / "shared" / "traces" / "azure"
TINY = """\
defaults:
  model: tiny-llava
  device: cpu
  profile: made-up.json
  policy: [slora, merged-only]
  adapters: 2
  ranks: [4, 8]
  adapter-assign: round-robin
  max-requests: 6
  clip: true
  max-context: 128
  max-batch: 4
  max-batch-tokens: 64
  warmup: 1
  time-scale: 0.001
"""


@pytest.fixture
def folder(tmp_path, profile):
    """A folder with a trace, a profile and, once written, a campaign."""
    values = dataclasses.asdict(profile)
    del values["name"], values["sha256"]
    (tmp_path / "made-up.json").write_text(json.dumps(values))
    shutil.copy(SAMPLE, tmp_path / "sample.csv")
    return tmp_path


@pytest.fixture
def campaign(folder, capsys):
    """campaign(replays, ...) -> (exit code, stdout, stderr) of a campaign of these lines under `replays:`."""

    def run(replays, *words):
        (folder / "c.yaml").write_text(TINY + "replays:\n" + replays)
        capsys.readouterr()
        code = main(["campaign", str(folder / "c.yaml"), "--traces", str(folder), "--output", str(folder / "out"), *words])
        return code, *capsys.readouterr()

    return run


def test_killed_in_the_middle_it_goes_on_and_ends_in_one_table_of_errors(folder, campaign, capsys):
    from analysis.__main__ import main as analyse
    from sim.__main__ import main as simulate

    replays = "  conv: {trace: sample.csv}\n  light: {rate: 8, drain: 0.5, policy: [slora, merged-only, valora], seed: 0}\n"
    (folder / "c.yaml").write_text(TINY + "replays:\n" + replays)
    command = [sys.executable, "-m", "engine", "campaign", "c.yaml", "--traces", ".", "--output", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          env=environment) as process:  # fmt: skip
        for line in process.stderr:
            if line.startswith("[3/5]"):  # a third cell has begun
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in (folder / "out").rglob("requests.parquet")}
    assert {str(path.relative_to(folder / "out").parent) for path in kept} == {"conv/slora", "light/slora"}

    code, out, err = campaign(replays)
    assert code == 0
    assert "[3/5] conv/merged-only: 6 requests" in err
    assert "slora: warmed up" not in err, "what was over is not run again"
    assert all(path.read_bytes() == before for path, before in kept.items())
    rows = [line.split()[0] for line in out.splitlines()[1:]]
    assert sorted(rows) == ["conv/merged-only", "conv/slora", "light/merged-only", "light/slora", "light/valora"]
    conv, light = (read_results(folder / "out" / name) for name in ("conv", "light"))
    assert [run.policy for run in conv] == ["slora", "merged-only"]
    assert [run.policy for run in light] == ["slora", "merged-only", "valora"]
    for run in (*conv, *light):
        assert run.steps is not None
        assert (run.requests["generated_tokens"][run.requests["status"] == 0] > 0).all()
    assert light[0].config["engine"]["drain_s"] == 0.5
    assert campaign(replays)[2] == "", "nothing is left to do"

    words = ["--profile", str(folder / "made-up.json"), "--no-error-bars", "--trace", str(folder)]
    assert simulate(["replicate", str(folder / "out"), *words]) == 0
    before = (folder / "out-sim" / "conv" / "summary.json").stat().st_mtime_ns
    assert simulate(["replicate", str(folder / "out"), *words]) == 0
    assert (folder / "out-sim" / "conv" / "summary.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert analyse(["validate", str(folder / "out"), "--out", str(folder / "figures")]) == 0
    printed = capsys.readouterr().out
    table = printed.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[2:]] == ["conv", "conv", "light", "light", "light", "worst", "goal", "within"]
    assert "The policies on the engine, and what the paper reports" in printed
    assert printed.splitlines()[-1].startswith("order of policies: ")
    lines = (folder / "figures" / "validate.csv").read_text().splitlines()
    assert len(lines) == 1 + 5 * (15 + 2)
    assert "| conv | tiny-llava | slora |" in (folder / "figures" / "validate.md").read_text()


def test_a_cell_that_fails_is_reported_and_the_others_run(campaign, folder):
    replays = "  gone: {trace: nothing.csv, policy: slora}\n  big: {adapter-memory: 1e-9, policy: slora}\n"
    replays += "  fine: {policy: slora}\n"
    code, out, err = campaign(replays)
    assert code == 1
    assert "failed   gone/slora: " in err
    assert "nothing.csv: No such file" in err
    assert "failed   big/slora: ModelError: adapters have 0 bytes" in err
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["fine/slora"]
    assert campaign("  fine: {policy: slora}\n")[0] == 0


def test_the_time_is_up_before_a_cell_that_may_not_fit(campaign, folder):
    replays = "  first: {policy: slora}\n  second: {policy: slora, rate: 1, drain: 600}\n"
    code, _, err = campaign(replays, "--stop-after", "60")
    assert code == 75
    assert "[2/2] second/slora: takes up to 60" in err
    assert "1 cells are left, the same command goes on" in err
    assert (folder / "out" / "first" / "summary.json").exists()
    assert not (folder / "out" / "second").exists()


def test_a_record_of_other_options_is_neither_taken_nor_lost(campaign, folder, capsys):
    assert campaign("  a: {policy: slora}\n")[0] == 0
    before = (folder / "out" / "a" / "summary.json").read_bytes()
    with pytest.raises(SystemExit):
        campaign("  a: {policy: [slora, merged-only], adapters: 3}\n", "--only", "a/merged-only")
    error = capsys.readouterr().err
    assert "a/slora: there is a record of other options (adapters 2 is now 3); name another --output" in error
    assert (folder / "out" / "a" / "summary.json").read_bytes() == before
    assert campaign("  a: {policy: slora, adapters: 3}\n", "--overwrite")[0] == 0
    (run,) = read_results(folder / "out" / "a")
    assert len(run.config["adapters"]) == 3
    stamp = read_summary(folder / "out" / "a")["policies"]["slora"]["config"]["campaign"]
    assert stamp["options"]["adapters"] == 3
    assert stamp["device"] == "cpu"


def test_what_a_killed_writer_left_is_put_right_and_one_process_fills_a_folder(campaign, folder, capsys):
    from engine.campaign_records import Records

    assert campaign("  a: {policy: slora}\n")[0] == 0
    out = folder / "out"
    os.replace(out / "a", out / ".a.0123456789ab.former")  # killed between two renames
    (out / ".a.ba9876543210.partial").mkdir()
    code, _, err = campaign("  a: {policy: slora}\n")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == [".lock", "a"]
    with Records(out), pytest.raises(SystemExit):
        campaign("  a: {policy: slora}\n")
    assert "another process fills it" in capsys.readouterr().err


def test_a_dry_run_says_how_long_it_takes(campaign, folder):
    code, out, _ = campaign("  a: {policy: slora, rate: 2}\n  b: {policy: valora, drain: 0}\n", "--dry-run")
    assert code == 0
    first, second = (line.split() for line in out.splitlines()[1:3])
    assert first[:2] == ["a/slora", "6"]
    assert float(first[3]) >= float(first[2]) == 2.5
    assert second[0] == "b/valora"
    assert int(second[4]) > 0, "cut off"
    assert out.splitlines()[-1].startswith("2 cells, ")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("replays: {a: {ratee: 3}}", r"c.yaml:1:15: unknown key 'ratee' in options of a replay \(did you mean 'rate'\?\)"),
        ("defaults: {output: x}\nreplays: {a: {}}", "c.yaml:1:12: unknown key 'output'"),
        ("default: {rate: 3}\nreplays: {a: {rate: 3}}", "c.yaml:1:1: unknown key 'default' in a campaign"),
        ("replays:\n  a: {rate: x}", "c.yaml:2:13: --rate: 'x' is not a number"),
        ("replays:\n  a: {rate: 3, rate: 4}", "c.yaml:2:16: rate stands twice"),
        ("replays:\n  a: {policy: valro}", "c.yaml:2:6: replay a: unknown policy 'valro'"),
        ("replays:\n  a/b: {rate: 3}", "c.yaml:2:8: replay 'a/b' cannot name a folder"),
        ("replays:\n  a: {clip: yes}", "c.yaml:2:13: clip: yes is neither true nor false"),
        ("replays: [a]", "c.yaml:1:10: replays must be a mapping"),
        ("replays:\n  a: {rate: {x: 3}}", "c.yaml:2:13: rate: expected one value"),
        ("defaults: {rate: 3}", "c.yaml:1:1: has no replays"),
        ("replays: {a: {rate: 3}", "c.yaml:2:1: not YAML"),
        ("replays:\n  a: {trace: x.csv}", "replay a: say with --traces in which folder x.csv lies"),
    ],
)
def test_a_campaign_with_an_error_names_file_line_and_value(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text + "\n")
    with pytest.raises(CampaignError, match=words):
        read_campaign(tmp_path / "c.yaml", None)


def test_replays_go_before_the_defaults_and_cells_of_one_engine_follow_each_other(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "defaults: {policy: [slora, valora], rate: 3, policy-option: [valora.theta_s=2], goodput: [ttft:200, tpot:50]}\n"
        "replays:\n  a: {trace: t.csv}\n  b: {time-scale: 0.5, adapters: 4, ranks: [8, 16]}\n"
        "  c: {seed: 0, workload: video}\n"
    )
    cells = read_campaign(tmp_path / "c.yaml", "traces")
    a, b = cells[0].args, cells[2].args
    assert (a.trace, a.rate, a.goodput) == ("traces/t.csv", 3.0, ["ttft:200", "tpot:50"])
    assert (b.rate, b.time_scale, b.ranks) == (None, 0.5, (8, 16))
    assert cells[1].policy.theta_s == 2
    assert [cell.name for cell in in_order(cells)] == ["a/slora", "c/slora", "a/valora", "c/valora", "b/slora", "b/valora"]
    assert [cell.name for cell in chosen(cells, "a, */valora")] == ["a/slora", "a/valora", "b/valora", "c/valora"]
    with pytest.raises(CampaignError, match=r"--only 'd' leaves nothing; replays are a, b, c"):
        chosen(cells, "d")


@pytest.mark.skipif(not AZURE.is_dir(), reason="the Azure traces are not at hand")
def test_the_campaigns_that_ship_fit_their_minutes():
    from engine.campaign import NEW_ENGINE_S, SAME_ENGINE_S
    from engine.campaign_plan import plan_of

    seconds = {}
    for name in ("llava-1.5-7b", "larger-models"):
        cells = in_order(read_campaign(name, AZURE))
        *lines, total = plan_of(cells, (NEW_ENGINE_S, SAME_ENGINE_S)).splitlines()
        seconds[name] = int(total.split()[2])
        rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
        assert all(float(cut) == 0 for cell, (_, _, _, cut, *_) in rows.items() if cell.endswith("/valora"))
        spans = np.array([float(row[1]) for row in rows.values()])
        assert (spans >= 29.5).all()
    assert seconds["llava-1.5-7b"] <= 1800
    assert seconds["larger-models"] <= 720
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(seconds)

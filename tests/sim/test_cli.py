"""`python -m sim` from outside: what it prints and writes, and how it says no, with code 2 (input) or 3 (a broken rule)."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import policies
from policies import POLICIES
from policies.plan import Plan
from policies.unmerged import Punica
from sim.__main__ import main
from traces.result_files import read_results

ROOT = Path(__file__).parents[2]
SMALL = ("--max-requests", "60", "--adapters", "4", "--check-invariants", "--progress", "off")
AZURE = ROOT.parent / "shared" / "traces" / "azure"


@pytest.fixture
def call(capsys):
    """Function: (arguments) -> (exit code, stdout, stderr) of `python -m sim`, in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def run_outside(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """`python -m sim` in a process of its own, with `path` on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(path or ""), str(ROOT))))}
    return subprocess.run([sys.executable, "-m", "sim", *arguments], cwd=ROOT, env=environment, capture_output=True,
                          timeout=120, check=False)  # fmt: skip


def test_one_policy(call):
    code, out, err = call(*SMALL)
    assert code == 0
    assert "valora" in out
    assert "h200-llava-1.5-7b (measured)" in out
    assert "replayed" in err
    assert "replayed" not in out


def test_several_policies_are_compared_and_written(call, tmp_path):
    code, out, _ = call("--policy", "valora,slora,base", *SMALL, "--output", str(tmp_path / "run"), "--per-adapter",
                        "--goodput", "ttft:500", "tpot:100")  # fmt: skip
    assert code == 0
    assert all(name in out for name in ("valora", "slora", "base", "goodput", "adapter-0"))
    results = read_results(tmp_path / "run")
    assert [result.policy for result in results] == ["valora", "slora", "base"]
    assert all(len(result.requests["id"]) == 60 and result.steps is not None for result in results)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    config = summary["policies"]["valora"]["config"]
    assert config["policy"]["theta_s"] == 0.5
    assert len(config["profile"]["sha256"]) == len(config["trace"]["sha256"]) == 64
    assert (tmp_path / "run" / "valora" / "trace.json").exists()
    assert call("--policy", "base", *SMALL, "--output", str(tmp_path / "run"))[0] == 2  # never over somebody's results


def test_leaping_and_stepping_print_the_same(call):
    words = ("--policy", "valora,dlora", *SMALL, "--rate", "8", "--memory-share", "0.1")
    _, leap, _ = call(*words)
    _, step, _ = call(*words, "--no-leap")
    skip = ("plans", "look-ups")  # how often it was decided is not the same, nor which shapes were looked up
    assert [line for line in leap.splitlines() if not any(word in line for word in skip)] == [
        line for line in step.splitlines() if not any(word in line for word in skip)
    ]


def test_same_seed_same_bytes():
    words = ("--policy", "valora,slora", *SMALL, "--adapter-assign", "zipf:1.0", "--workload", "retrieval")
    one, two, other = run_outside(*words), run_outside(*words), run_outside(*words, "--seed", "1")
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout != other.stdout


BAD = {
    "flag": (("--polcy", "valora"), "--policy"),
    "policy": (("--policy", "valroa"), "did you mean 'valora'"),
    "no policy": (("--policy", ","), "names no policy"),
    "option": (("--policy-option", "thetas=1"), "did you mean 'theta_s'"),
    "option's value": (("--policy-option", "theta_s=nan"), "theta_s='nan'"),
    "option's type": (("--policy-option", "prefetch=1.5"), "not a int"),
    "option of nobody": (("--policy-option", "slora.prefetch=1"), "expected POLICY.KEY=VALUE"),
    "option of whom": (("--policy", "valora,slora", "--policy-option", "prefetch=1"), "say which"),
    "no slots": (("--policy", "fcfs", "--policy-option", "max_loras=0"), "max_loras=0"),
    "choice": (("--model", "llava-7b"), "did you mean 'llava-1.5-7b'"),
    "router": (("--router", "afinity"), "did you mean 'affinity'"),
    "operator": (("--operator", "slra"), "did you mean 'slora'"),
    "profile": (("--profile", "analytic-h200-qwen"), "known profiles are"),
    "profile file": (("--profile", "absent.json"), "absent.json"),
    "goodput": (("--goodput", "tfft:3"), "ttft"),
    "goodput value": (("--goodput", "ttft:nan"), "nan"),
    "gpus": (("--gpus", "0"), "--gpus 0"),
    "so many gpus": (("--gpus", "999999999999"), "--gpus 999999999999"),
    "memory": (("--memory-share", "1.5"), "above 1"),
    "no memory": (("--memory-share", "0.0000001"), "memory share"),
    "batch": (("--max-batch", "0"), "max_batch 0"),
    "tokens": (("--max-batch-tokens", "64"), "max_batch_tokens 64"),
    "plot": (("--plot",), "--output"),
    "trace": (("--trace", "absent.csv"), "absent.csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2(name, call):
    words, message = BAD[name]
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_bad_row_is_named_with_file_and_line(call, tmp_path):
    trace = tmp_path / "bad.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
                     "2023-11-16 18:15:50.9951690,NaN,109\n")  # fmt: skip
    code, _, err = call("--trace", str(trace))
    assert code == 2
    assert "bad.csv:3" in err
    assert "NaN" in err


def test_an_empty_selection_is_an_empty_table(call):
    code, out, err = call("--max-requests", "0", "--policy", "valora,base")
    assert code in (0, 2), err
    assert "nan" not in out.lower()


def test_requests_too_long_are_counted(call, tmp_path):
    trace = tmp_path / "long.csv"
    rows = [f"2023-11-16 18:15:{second}.0000000,{tokens},4" for second, tokens in ((40, 100), (41, 9000), (42, 200))]
    trace.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *rows)))
    code, out, _ = call("--trace", str(trace), "--adapters", "1", "--output", str(tmp_path / "run"))
    assert code == 0
    assert "1 requests pass the model's context" in out
    (result,) = read_results(tmp_path / "run")
    assert result.requests["status"].tolist() == [0, 2, 0]
    code, _, _ = call("--trace", str(trace), "--adapters", "1", "--clip", "--output", str(tmp_path / "clipped"))
    (result,) = read_results(tmp_path / "clipped")
    assert (code, result.requests["status"].tolist()) == (0, [0, 0, 0])


@dataclasses.dataclass(frozen=True)
class Breaks(Punica):
    """Decodes a request that does not exist."""

    name = "breaks"

    def decide(self, view):
        return Plan(decodes=(10**6,))


@dataclasses.dataclass(frozen=True)
class Sleeps(Punica):
    """Never does anything."""

    name = "sleeps"

    def decide(self, view):
        return Plan()


@dataclasses.dataclass(frozen=True)
class Peeks(Punica):
    """Asks for what it must not know."""

    name = "peeks"

    def decide(self, view):
        view.output_tokens(view.oldest.id)


@dataclasses.dataclass(frozen=True)
class Meddles(Punica):
    """Changes what it is shown."""

    name = "meddles"

    def decide(self, view):
        view.oldest.prompt_tokens = 1
        return super().decide(view)


@dataclasses.dataclass(frozen=True)
class Spins(Punica):
    """Asks to be asked again at once."""

    name = "spins"

    def decide(self, view):
        return Plan(until_ns=view.now_ns)


RULES = {
    Breaks: "request 1000000 cannot decode",
    Peeks: "output length of request 0",
    Meddles: "changed the ledger",
    Sleeps: "idle although request 0 could start",
    Spins: "idle although request 0 could start",
}


@pytest.mark.parametrize("policy", RULES, ids=lambda policy: policy.name)
def test_a_policy_that_breaks_a_rule_is_code_3(policy, call, monkeypatch):
    monkeypatch.setitem(POLICIES, policy.name, policy)
    code, out, err = call("--policy", policy.name, *SMALL, "--adapters", "0")
    assert (code, out) == (3, "")
    assert RULES[policy] in err


@pytest.mark.parametrize(("policy", "message"), [(Sleeps, "stands still"), (Spins, "again and again")])
def test_a_standstill_ends_without_the_checks_too(policy, message, call, monkeypatch):
    monkeypatch.setitem(POLICIES, policy.name, policy)
    code, _, err = call("--policy", policy.name, "--max-requests", "3")
    assert code == 3
    assert message in err


STRANGER = '''
from dataclasses import dataclass
from policies.batching import Batch
from policies.plan import Plan
from policies.view import View

@dataclass(frozen=True)
class Newest:
    """Last come, first served."""
    depth: int = 4
    name = "newest"
    operator = "slora"
    switch = "fused"
    merges = False
    oracle = False

    def decide(self, view: View) -> Plan:
        batch = Batch(view, view.decoding).fill(view.prefilling)
        return batch.fill(sorted(view.waiting, key=lambda entry: -entry.id)).plan()
'''


def install(folder: Path, module: str, entry: str) -> Path:
    """A package of somebody else's, as pip leaves it: a module and a dist-info with its entry points."""
    (folder / "stranger.py").write_text(module)
    info = folder / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{policies.GROUP}]\n{entry}\n")
    return folder


def test_a_strangers_policy(tmp_path):
    install(tmp_path, STRANGER, "newest = stranger:Newest")
    done = run_outside("--policy", "newest,slora", "--policy-option", "newest.depth=2", *SMALL, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"newest" in done.stdout
    assert b"newest" in run_outside("--help", path=tmp_path).stdout


def test_a_strangers_policy_that_was_edited_runs_again_in_a_sweep(tmp_path):
    install(tmp_path, STRANGER, "newest = stranger:Newest")
    (tmp_path / "grid.yaml").write_text("policy: [newest, slora]\nmax-requests: 20\n")
    said = []
    for module in (STRANGER, STRANGER, STRANGER.replace("-entry.id", "entry.id")):
        (tmp_path / "stranger.py").write_text(module)
        words = ("--jobs", "1", "--progress", "off", "--output", str(tmp_path / "o.jsonl"))
        said.append(run_outside("sweep", str(tmp_path / "grid.yaml"), *words, path=tmp_path).stderr)
    for text, done in zip(said, (0, 2, 1), strict=True):
        assert f"2 runs, {done} of them done before".encode() in text, text


@pytest.mark.parametrize("more", [(), ("--check-invariants",)])
def test_a_policy_that_returns_no_plan_is_told_so(more, tmp_path):
    module = STRANGER.replace("        return batch.fill", "        batch.fill")
    done = run_outside("--policy", "newest", *SMALL, *more, path=install(tmp_path, module, "newest = stranger:Newest"))
    assert done.returncode == 3
    assert b"decide() of the policy returned None; it must return a policies.plan.Plan" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_profile_of_another_model_than_was_asked_for_is_refused(call):
    code, _, err = call("--model", "llava-1.5-13b", "--profile", "h200-llava-1.5-7b")
    assert code == 2
    assert "profile h200-llava-1.5-7b is of llava-1.5-7b, the model asked for is llava-1.5-13b" in err


def test_where_nothing_can_be_written_is_said_before_the_run(call, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = call(*SMALL, "--output", str(tmp_path / "file" / "x"))
    assert (code, out) == (2, "")
    assert f"nothing can be written in {tmp_path / 'file'}; name another directory" in err


STRANGE = {
    "taken": (STRANGER, "valora = stranger:Newest", b"'valora' is taken"),
    "absent": (STRANGER, "newest = stranger:Oldest", b"cannot be loaded"),
    "broken": ("import no_such_module_here", "newest = stranger:Newest", b"no_such_module_here"),
    "no dataclass": (STRANGER.replace("@dataclass(frozen=True)", ""), "newest = stranger:Newest", b"dataclass"),
    "lacks": (STRANGER.replace("    merges = False\n", ""), "newest = stranger:Newest", b"lacks merges"),
    "misnamed": (STRANGER, "latest = stranger:Newest", b"calls itself 'newest'"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_plug_in_that_is_none_is_code_2(name, tmp_path):
    module, entry, message = STRANGE[name]
    done = run_outside(*SMALL, path=install(tmp_path, module, entry))
    assert done.returncode == 2
    assert message in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not AZURE.exists(), reason="the real traces are not here")
def test_real_traces_under_all_policies(call, tmp_path):
    for name in ("code", "conv"):
        words = ("--trace", str(AZURE / f"AzureLLMInferenceTrace_{name}.csv"), "--clip", "--max-requests", "120")
        code, _, err = call("--policy", ",".join(POLICIES), *words, "--rate", "12", "--memory-share", "0.05",
                            "--check-invariants", "--output", str(tmp_path / name))  # fmt: skip
        assert code == 0, err
        for result in read_results(tmp_path / name):
            assert np.isin(result.requests["status"], (0, 2)).all()


def test_a_misspelt_command_is_answered(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["sweeep", "grid.yaml"])
    assert exit_.value.code == 2
    assert "unknown command 'sweeep' (did you mean 'sweep'?); commands are sweep, capacity" in capsys.readouterr().err

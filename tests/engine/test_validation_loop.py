"""The loop that `validate` closes: an engine's record, its simulation, their errors. Under a mocked clock the engine takes
what the tables say, so every error must be nil; with a slower clock the error must show, and where it comes from."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("simpy")

POLICIES = ("valora", "dlora", "slora", "base")
LIMITS = (8, 64, 256)
ENGINE = {
    "steps_ahead": 1, "load_slowdown": 0.02, "decide_us": {"valora": 41.0},
    "mixed_attention": {4: [(0.0, 5.0), (99.0, 70.0)]},
    "prefill_linear": [(1.0, 150.0), (16.0, 150.0), (17.0, 180.0), (64.0, 300.0)],
    "lease_us": {"base": 20.0, "load": 15.0, "wake": 20.0, "launch": 10.0, "request": 3.0, "prompts": 12.0, "chunk": 10.0},
    "scatter": {"linear": (0.99, 1.02)},
}  # fmt: skip


@pytest.fixture
def profile_file(profile, tmp_path):
    values = dataclasses.asdict(dataclasses.replace(profile, **ENGINE))
    del values["name"], values["sha256"]
    path = tmp_path / "made-up.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def engine_results(profile_file, tmp_path):
    """engine_results(slower): a directory as `engine replay --output` writes it, of an engine that takes `slower` times what
    the tables say for a step, on the sample trace."""

    def make(slower=1.0, boundary=1.0, closed=0, drain=None, words=("--max-requests", "60", "--rate", "400", "--seed", "3")):
        from engine.arrivals import ClosedLoop
        from engine.clock import MockedClock
        from engine.replay import Driver, EngineConfig, record, resolved, stripped
        from policies import make_policy
        from policies.cost import Cost
        from policies.journal import Journal
        from policies.ledger import Ledger
        from policies.pool import Pool
        from policies.profile import load_profile
        from policies.view import Limits
        from traces.options import SuggestingParser, add_trace_arguments, load_trace
        from traces.record import summarize
        from traces.result_files import write_results

        profile = load_profile(profile_file)
        parser = SuggestingParser()
        add_trace_arguments(parser)
        args = parser.parse_args([*words, "--clip", "--adapters", "3", "--ranks", "4,8"])
        trace = load_trace(args, dataclasses.replace(profile, max_context=LIMITS[2]))
        results = []
        for name in POLICIES:
            policy = make_policy(name, {"theta_s": "0.01"} if name == "valora" else {})
            served = stripped(trace, policy)
            cost = Cost(profile, policy.operator, "fused", served.adapters, policy.name)
            clock = MockedClock(cost)
            pages = [-(-profile.adapter_bytes(a.rank) // (16 * profile.kv_bytes_per_token)) for a in served.adapters]
            ledger = Ledger(Pool(150, 16, served.adapters, tuple(pages)), Limits(*LIMITS), Journal(), cost, oracle=False)
            steps, leases = cost.step_ps, cost.lease_ps
            if slower != 1 or boundary != 1:
                slow = Cost(profile, policy.operator, "fused", served.adapters, policy.name)
                slow.step_ps = lambda *a, steps=steps: round(slower * steps(*a))
                slow.lease_ps = lambda *a, leases=leases, **k: round(boundary * leases(*a, **k))
                clock._cost = slow
            arrivals = ClosedLoop(served, closed) if closed else None
            driver = Driver(served, policy, ledger, cost, ledger.journal, clock, arrivals=arrivals, drain_s=drain)
            driver.run()
            config = EngineConfig(limits=Limits(*LIMITS), closed_loop=closed, drain_s=drain)
            settings = resolved(served, policy, config, cost, {"name": "tiny"}, {})
            results.append(record(driver, served, settings, operator=policy.operator, page_bytes=16 * 1024))
        out = tmp_path / f"engine-{slower}-{boundary}{'-closed' if closed else ''}"
        write_results(out, results, {r.policy: summarize(r) for r in results}, [a.name for a in trace.adapters])
        return out

    return make


def replicate(engine, profile_file, *more):
    from sim.__main__ import main

    assert main(["replicate", str(engine), "--output", f"{engine}-sim", "--profile", str(profile_file), *more]) == 0


def test_a_mocked_engine_is_replicated_to_the_last_digit(engine_results, profile_file, capsys):
    from analysis.step_errors import step_errors
    from analysis.validate import pairs, report
    from traces.record import REQUEST_COLUMNS

    engine = engine_results()
    replicate(engine, profile_file)
    found = pairs([str(engine)], [])
    assert [pair.engine.policy for pair in found] == list(POLICIES)
    for pair in found:
        for column in REQUEST_COLUMNS:
            assert (pair.engine.requests[column] == pair.simulated.requests[column]).all(), (pair.engine.policy, column)
        (everything,) = [row for row in step_errors(pair.engine, pair.simulated) if row.kind == "all"]
        assert everything.p95 < 0.01
        assert everything.modelled_ms == pytest.approx(everything.measured_ms, rel=2e-4)  # ns are whole
        low, high = pair.simulated.config["error_bars"]["mean_tpot_ms"]
        assert low < high
    capsys.readouterr()
    text = report(found)
    assert "order of policies: right everywhere" in text
    assert "36 of 36 within 3 %" in text
    kinds = {row.kind for pair in found for row in step_errors(pair.engine, pair.simulated)}
    assert kinds >= {"decode, further steps", "decode, first of a lease", "with prompts", "with a switch"}


def test_another_gpu_than_the_profiles_is_told(engine_results, profile_file, capsys):
    from analysis.validate import pairs, report

    engine = engine_results()
    for gpu, told in (("0badcafe", False), ("feedface", True)):
        profile_file.write_text(json.dumps(json.loads(profile_file.read_text()) | {"provenance": {"gpu": "0badcafe"}}))
        document = json.loads((engine / "summary.json").read_text())
        for entry in document["policies"].values():
            entry["config"]["engine"]["device"] = {"name": "NVIDIA H200", "gpu": gpu}
        (engine / "summary.json").write_text(json.dumps(document))
        replicate(engine, profile_file, "--no-error-bars", "--overwrite")
        text = report(pairs([str(engine)], []))
        assert ("the engine's GPU, feedface, is not the profile's, 0badcafe" in text) is told
        assert "predicted with the profile" in text, "its provenance has changed"


def test_a_closed_loop_is_replicated_too(engine_results, profile_file):
    from analysis.validate import pairs
    from traces.record import REQUEST_COLUMNS

    engine = engine_results(closed=5)
    replicate(engine, profile_file, "--no-error-bars")
    for pair in pairs([str(engine)], []):
        assert all((pair.engine.requests[name] == pair.simulated.requests[name]).all() for name in REQUEST_COLUMNS)


def test_requests_that_were_cut_off_are_cut_off_in_the_replica_too(engine_results, profile_file):
    from analysis.validate import pairs
    from traces.record import REQUEST_COLUMNS, STATUS

    engine = engine_results(drain=0.01)
    replicate(engine, profile_file, "--no-error-bars")
    for pair in pairs([str(engine)], []):
        cut = (pair.engine.requests["status"] == STATUS.index("unfinished")).sum()
        assert 0 < cut < 60, pair.engine.policy
        assert all((pair.engine.requests[name] == pair.simulated.requests[name]).all() for name in REQUEST_COLUMNS)
        noted = f"ended 0.01 s after the last arrival: {cut} of 60"
        assert any(note.startswith(noted) for note in pair.engine.config["notes"])


def test_what_the_model_does_not_know_shows_and_says_where(engine_results, profile_file):
    from analysis.step_errors import step_errors
    from analysis.validate import errors, pairs

    slow, host = engine_results(slower=1.25), engine_results(boundary=6.0)
    for engine in (slow, host):
        replicate(engine, profile_file, "--no-error-bars")
    off = {row.kind: row for row in step_errors(*pairs([str(slow)], [])[2][1:3])}
    assert off["decode, further steps"].mean == pytest.approx(-20, abs=0.1)
    assert -20 < off["decode, first of a lease"].mean < -12
    (pair,) = [pair for pair in pairs([str(host)], []) if pair.engine.policy == "slora"]
    off = {row.kind: row for row in step_errors(pair.engine, pair.simulated)}
    assert off["decode, further steps"].p95 < 0.01
    assert off["decode, first of a lease"].mean < -20
    assert errors(pair)["mean_e2el_ms"] < -5


def test_the_command_says_what_is_missing_and_draws(engine_results, profile_file, tmp_path, capsys):
    from analysis.__main__ import main

    engine = str(engine_results())
    with pytest.raises(SystemExit) as ended:
        main(["validate", engine])
    assert ended.value.code == 2
    assert f"python -m sim replicate {engine} --output {engine}-sim --overwrite" in capsys.readouterr().err
    replicate(engine, profile_file, "--no-error-bars")
    capsys.readouterr()
    assert main(["validate", engine, "--sim", f"{engine}-sim", "--out", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr()
    assert "Error of the simulator (%)" in printed.out
    assert (tmp_path / "figures" / "validate-engine-1_0-1_0.png").stat().st_size > 10_000


def test_another_trace_is_refused(engine_results, profile_file, tmp_path, capsys):
    from traces.options import SAMPLE

    other = tmp_path / "other.csv"
    lines = SAMPLE.read_text().splitlines()
    other.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    with pytest.raises(SystemExit):
        replicate(engine_results(), profile_file, "--trace", str(other))
    assert "was made of other requests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trace": "a.csv", "start_s": 5.0, "rate": 0.1, "head": False, "adapter_assign": "zipf:1.2", "adapters": 4,
          "ranks": [8, 16]},
         "--trace a.csv --start 5 --rate 0.10000000000000001 --no-head --adapter-assign zipf:1.2 --adapters 4 --ranks 8,16"),
        ({"trace": "traces/sample.csv", "arrivals": "valora-sample:3", "columns": {"timestamp": "t"},
          "adapter_assign": "column", "adapters": 7, "clip": True},
         "--arrivals valora-sample:3 --columns timestamp=t --clip --adapter-assign column"),
    ],
)  # fmt: skip
def test_settings_become_options(settings, words):
    from sim.replicate import words_of

    assert words_of(settings) == words.split()


def test_a_setting_that_the_simulator_lacks_is_refused():
    from sim.replicate import words_of
    from traces.result_files import ResultError

    with pytest.raises(ResultError, match="no setting for closed_loop=8"):
        words_of({"trace": "a.csv", "closed_loop": 8, "adapter_assign": "none", "adapters": 0})


def test_leases_of_a_record_know_when_the_gpu_was_free(engine_results):
    from policies.recorded import leases
    from traces.result_files import read_results

    run = read_results(engine_results(words=("--max-requests", "12", "--rate", "30")))[2]
    found = leases(run)
    idle = [lease for lease in found if lease.idle]
    assert 3 <= len(idle) < len(found)
    arrivals = set(run.requests["arrival_ns"].tolist())
    assert all(lease.free_ns in arrivals for lease in idle)
    assert all(lease.free_ns == before.end_ns for before, lease in itertools.pairwise(found) if not lease.idle)
    assert sum(len(lease.work.prefills) for lease in found) == int(np.sum(run.steps["prefills"]))

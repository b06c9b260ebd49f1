"""Profiles of GPUs that nobody measured, and error bars from a profile's own scatter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from policies import make_policy
from policies.cost import Cost
from policies.profile import ProfileError, load_profile, shifted
from sim.__main__ import find_profile, main
from sim.cluster import SimConfig, simulate
from sim.errorbars import add_error_bars
from sim.extrapolate import SHEETS
from traces.record import HEADLINES, summarize

PROFILES = Path(__file__).parents[2] / "sim" / "profiles"
ENGINE = {
    "kind": "measured", "steps_ahead": 1, "mixed_attention": {"8": [[10, 5.0], [1000, 900.0]]},
    "prefill_linear": [[16, 5000.0], [2048, 40000.0]], "lease_us": {"base": 300.0}, "scatter": {"linear": [0.98, 1.03]},
}  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """A made-up measurement: the analytic profile of LLaVA-1.5-7B with what an engine adds, said to be of an H200."""
    data = json.loads((PROFILES / "analytic-h200-llava-1.5-7b.json").read_text())
    path = tmp_path / "h200-made-up.json"
    path.write_text(json.dumps(data | ENGINE | {"provenance": {"device": "NVIDIA H200"}}))
    return path


def test_each_table_is_scaled_by_what_bounds_it(measured, tmp_path, capsys):
    out = tmp_path / "a100.json"
    assert main(["extrapolate", str(measured), "--to", "a100-80gb", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    before, after = load_profile(measured), load_profile(out)
    memory, compute = 4.8 / 2.039, 989 / 312
    assert after.kind == "extrapolated"
    assert "extrapolated" in after.provenance["device"]
    assert before.sha256 in after.provenance["from"]
    assert after.device_bytes == SHEETS["a100-80gb"].device_bytes
    first, last = (dict(after.linear)[x] / dict(before.linear)[x] for x in (1, 8192))
    assert (first, last) == (pytest.approx(memory, rel=1e-3), pytest.approx(compute, rel=1e-3))
    ratios = [y / z for (_, y), (_, z) in zip(after.linear, before.linear, strict=True)]
    assert all(memory - 0.01 < ratio < compute + 0.01 for ratio in ratios)
    for table, ratio in (("decode_attention", memory), ("mixed_attention", memory), ("prefill_attention", compute)):
        for key, points in getattr(after, table).items():
            assert points[-1][1] == pytest.approx(getattr(before, table)[key][-1][1] * ratio, rel=1e-3), table
    ours, theirs = (profile.lora["atmm"]["decode"][64][1][0][1] for profile in (after, before))
    assert ours == pytest.approx(theirs * memory, rel=1e-3)
    assert after.load_gb_per_s == pytest.approx(before.load_gb_per_s / 2)
    assert (after.lease_us, after.steps_ahead) == (before.lease_us, 1), "the host is the same"


def test_what_is_extrapolated_says_so_wherever_it_is_printed(measured, tmp_path, capsys):
    out = tmp_path / "a100.json"
    main(["extrapolate", str(measured), "--out", str(out)])
    capsys.readouterr()
    assert main(["--policy", "valora", "--profile", str(out), "--max-requests", "5", "--no-error-bars"]) == 0
    printed = capsys.readouterr().out
    assert "(extrapolated, not measured on this GPU)" in printed
    assert "is extrapolated, not measured" in printed
    assert "Error Bars" not in printed


def test_a_gpu_stands_for_its_profile_of_any_model():
    assert find_profile("analytic-h200", "qwen2-vl-7b").model == "qwen2-vl-7b"
    with pytest.raises(ProfileError, match="unknown profile 'analytic-h20'"):
        find_profile("analytic-h20", "qwen2-vl-7b")


@pytest.mark.parametrize(("words", "message"), [
    (["--to", "a100-80"], "did you mean 'a100-80gb'"), (["--to", "tpu"], "--to 'tpu': unknown"),
])  # fmt: skip
def test_unknown_gpus_are_answered(measured, words, message, capsys):
    with pytest.raises(SystemExit):
        main(["extrapolate", str(measured), *words])
    assert message in capsys.readouterr().err


def test_what_is_extrapolated_is_not_extrapolated_again(measured, tmp_path, capsys):
    out, again = tmp_path / "a100.json", tmp_path / "again.json"
    main(["extrapolate", str(measured), "--out", str(out)])
    with pytest.raises(SystemExit):
        main(["extrapolate", str(out), "--to", "h100", "--out", str(again)])
    assert "is extrapolated itself; start from" in capsys.readouterr().err
    assert not again.exists()


def test_an_analytic_profile_is_extrapolated_and_says_where_it_comes_from(tmp_path):
    out = tmp_path / "a100.json"
    assert main(["extrapolate", "analytic-h200-llava-1.5-7b", "--out", str(out)]) == 0
    before, after = find_profile("analytic-h200", "llava-1.5-7b"), load_profile(out)
    assert "analytic-h200-llava-1.5-7b" in after.provenance["from"]
    assert ", analytic, of " in after.provenance["from"]
    ratio = Cost(after, "slora", "fused", ()).linear_ps(1) / Cost(before, "slora", "fused", ()).linear_ps(1)
    assert ratio == pytest.approx(4.8 / 2.039, rel=0.01), "one token reads all weights: memory bounds it"


def test_the_ends_of_the_scatter(tiny_profile):
    scatter = {"linear": (0.97, 1.04), "model": (0.96, 1.03), "load": (1.0, 1.5)}
    profile = tiny_profile(scatter=scatter)
    low, high = (Cost(shifted(profile, side), "slora", "fused", ()) for side in (0, 1))
    plain = Cost(profile, "slora", "fused", ())
    assert low.linear_ps(8) == pytest.approx(plain.linear_ps(8) * (1 - 0.05), rel=1e-6), "3 and 4 % are 5 % together"
    assert high.linear_ps(8) == pytest.approx(plain.linear_ps(8) * (1 + 0.05), rel=1e-6)
    assert high.attention_at(4, 52) == pytest.approx(plain.attention_at(4, 52) * 1.03, rel=1e-6)
    assert shifted(profile, 1).load_gb_per_s == pytest.approx(profile.load_gb_per_s / (1 + (0.5**2 + 0.03**2) ** 0.5))


def test_error_bars_hold_the_number_and_grow_with_the_scatter(tiny_profile, make_trace):
    trace = make_trace([{"at_us": 40 * i, "prompt": 20, "output": 15, "adapter": i % 3} for i in range(30)])
    policy, config, widths = make_policy("slora"), SimConfig(page_tokens=4), []
    for scatter in (0.01, 0.05):
        profile = tiny_profile(scatter={"linear": (1 - scatter, 1 + scatter), "model": (1 - scatter, 1 + scatter)})
        run = simulate(trace, policy, profile, config)
        add_error_bars(run, trace, policy, profile, config, {})
        summary = summarize(run)
        assert summary["error_bars"].keys() == set(HEADLINES)
        for name, (low, high) in summary["error_bars"].items():
            assert low <= summary[name] <= high, name
        low, high = summary["error_bars"]["mean_e2el_ms"]
        widths.append((high - low) / summary["mean_e2el_ms"])
    assert 0.01 < widths[0] < widths[1]


def test_without_a_scatter_there_is_no_bar(tiny_profile, make_trace):
    trace, policy, profile = make_trace([{"at_us": 0}]), make_policy("slora"), tiny_profile()
    run = simulate(trace, policy, profile, SimConfig(page_tokens=4))
    add_error_bars(run, trace, policy, profile, SimConfig(page_tokens=4), {})
    assert "error_bars" not in summarize(run)
    assert dataclasses.replace(profile, scatter={}) == profile


def test_no_profile_that_was_measured_and_no_other_file_is_replaced(measured, tmp_path, capsys):
    before = measured.read_bytes()
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP\n")
    for out in (measured, trace):
        with pytest.raises(SystemExit):
            main(["extrapolate", str(measured), "--out", str(out)])
        assert f"{out}: is there already and no extrapolated profile" in capsys.readouterr().err
    assert (measured.read_bytes(), trace.read_text()) == (before, "TIMESTAMP\n")
    out = tmp_path / "new.json"
    assert [main(["extrapolate", str(measured), "--out", str(out)]) for _ in range(2)] == [0, 0], "its own it makes anew"


def test_asking_for_help_writes_no_profile(monkeypatch, capsys):
    from sim import analytic

    monkeypatch.setattr("sys.argv", ["analytic", "--help"])
    monkeypatch.setattr(analytic, "analytic_profile", lambda model: pytest.fail("it writes"))
    with pytest.raises(SystemExit) as code:
        analytic.main()
    assert code.value.code == 0

"""The search for capacity, and the answers in words: SLOs are read strictly, brackets are true, saturation is said."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from policies.cost import Cost
from sim.capacity import Search, bracket, main
from sim.experiment import parse_options, profile_of, summary, trace_of
from sim.slo import SATURATED, judge, parse_slo
from sim.whatif import answer, cold_shares, merging, mix_of
from traces.request import Trace

ANALYTIC = "analytic-h200-llava-1.5-7b"
SMALL = ("--max-requests", "300", "--workload", "retrieval", "--jobs", "1", "--seeds", "2", "--tolerance", "0.1",
         "--profile", ANALYTIC)  # fmt: skip


# -- SLOs ---------------------------------------------------------------------------------------------------------------
def test_objectives_take_units():
    objectives = parse_slo(" p99_ttft<1s, p99_tpot_ms <= 50ms,avg_token_latency<20ms ,adapter_hit_rate>95%,failed<=0")
    assert [(o.key, o.sign, o.limit) for o in objectives] == [
        ("p99_ttft_ms", "<", 1000.0), ("p99_tpot_ms", "<=", 50.0), ("avg_token_latency_s", "<", 0.02),
        ("adapter_hit_rate", ">", pytest.approx(0.95)), ("failed", "<=", 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no objective"),
        ("p99_ttft", "expected METRIC<NUMBER"),
        ("p99_tft<1s", "did you mean 'p99_ttft'"),
        ("ttft<1s", "which statistic? mean_ttft, "),
        ("p95_tpot<50ms", "statistic 'p95' is none of mean_tpot, "),
        ("p99_ttft<1", "needs a unit: s or ms, not none"),
        ("p99_ttft<5%", "needs a unit: s or ms, not %"),
        ("failed<1s", "needs a unit: none, or %"),
        ("p99_ttft<-1s", "not a finite number"),
        ("p99_ttft<..s", "not a finite number"),
    ],
)
def test_a_wrong_objective_says_why(text, message):
    with pytest.raises(ValueError, match="--slo") as error:
        parse_slo(text)
    assert message in str(error.value)


def test_a_run_is_judged_by_its_objectives_its_backlog_and_who_was_given_up():
    objectives = parse_slo("p99_ttft<1s,p99_tpot<50ms")
    good = {"p99_ttft_ms": 900.0, "p99_tpot_ms": 49.0, "median_e2el_ms": 2000.0, "failed": 3, "unservable": 3}
    assert judge(good, objectives, span_s=100, drain_s=12).broken == ()
    assert judge(good, objectives, span_s=100, drain_s=12.1).broken == (SATURATED,)
    assert judge(good | {"failed": 5}, objectives, 100, 1).broken == ("2 requests given up",)
    assert judge(good | {"p99_ttft_ms": 1000.0}, objectives, 100, 1).broken == ("p99_ttft<1s",)
    assert judge(good | {"p99_tpot_ms": None}, objectives, 100, 1).broken == ("p99_tpot<50ms",)


# -- the search ---------------------------------------------------------------------------------------------------------
class Threshold:
    """A probe that holds below a limit."""

    def __init__(self, rate: float, limit: float):
        self.rate, self.holds = rate, rate < limit


@pytest.mark.parametrize("limit", [0.3, 1.0, 4.0, 5.0, 77.0, 1000.0])
def test_a_bracket_encloses_the_limit(limit):
    low, high = bracket(lambda rate: Threshold(rate, limit), 4.0, 1e6, 1e-3)
    assert low.rate < limit <= high.rate <= 2 * low.rate


def test_a_bracket_may_have_one_end():
    low, high = bracket(lambda rate: Threshold(rate, 1e9), 4.0, 100.0, 1e-3)
    assert (low.rate, high) == (100.0, None)
    low, high = bracket(lambda rate: Threshold(rate, 0.0), 4.0, 100.0, 1.0)
    assert (low, high.rate) == (None, 1.0)


def test_the_rate_found_holds_and_the_next_one_fails(tmp_path, capsys):
    slo = "p99_ttft<300ms"
    output = tmp_path / "capacity.json"
    assert main(["--slo", slo, "--policy", "valora,slora", *SMALL, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    document = json.loads(output.read_text())
    assert (document["slo"], document["profile"]["kind"]) == (slo, "analytic")
    for found in document["answers"]:
        low, high = found["low"], found["high"]
        assert low["rate"] < high["rate"] <= 1.1 * low["rate"]
        assert f"{low['rate']:.4g}" in out
        held = []
        for seed in ("0", "1"):
            options = {"policy": found["policy"], "rate": str(low["rate"]), "seed": seed, "max-requests": "300",
                       "workload": "retrieval", "profile": ANALYTIC}  # fmt: skip
            held.append(summary(parse_options(options))["p99_ttft_ms"])
        assert max(held) < 300
        assert max(held) == low["worst"]["p99_ttft_ms"]
        assert high["held"] < 2
    assert "not measured" in out
    best = max(document["answers"], key=lambda a: a["low"]["rate"])["policy"]
    assert f"On 1 GPU {best} sustains the most" in out


def test_saturation_is_said(capsys):
    assert main(["--slo", "p99_ttft<1000s", "--policy", "slora", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "saturated in 2" in out
    assert "Saturated at the bracket's end, whatever the SLO: slora on 1 GPU" in out


def test_an_impossible_slo_is_said(capsys):
    assert main(["--slo", "p99_ttft<1ms", "--policy", "slora", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "holds at no rate down to" in out
    assert "On 1 GPU no policy holds the SLO at any rate tried" in out


def test_the_fewest_gpus_hold_a_load(capsys, tmp_path):
    output = tmp_path / "load.json"
    arguments = ["--slo", "p99_ttft<300ms", "--policy", "slora", "--load", "40", *SMALL, "--output", str(output)]
    assert main(arguments) == 0
    (found,) = json.loads(output.read_text())["answers"]
    assert found["low"]["gpus"] == found["high"]["gpus"] + 1 > 1
    assert f"40 requests/s take {found['low']['gpus']} GPUs: slora." in capsys.readouterr().out
    assert main([*arguments, "--most-gpus", "1"]) == 0
    assert "No policy holds 40 requests/s with 1 GPUs." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "4"], "--rate and --time-scale are what is searched for"),
        (["--plot"], "--plot is for single runs"),
        (["--closed-loop", "4"], "--closed-loop has no rate that could be searched for"),
        (["--router", "afinity"], "did you mean 'affinity'"),
        (["--gpus", "1,0"], "at least 1 GPU"),
        (["--confidence", "1.5"], "--confidence at most 1"),
        (["--output", "x.csv"], "name a .json file"),
        (["--policy", "valorra"], "did you mean 'valora'"),
        (["--slos", "x"], "did you mean '--slo'"),
        (["--trace", "absent.csv"], "absent.csv"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as code:
        main(["--slo", "p99_ttft<1s", *arguments])
    assert code.value.code == 2
    assert message in capsys.readouterr().err


# -- what if ------------------------------------------------------------------------------------------------------------
def test_cold_shares_are_those_of_an_lru_cache():
    rng = np.random.default_rng(0)
    asked = rng.integers(-1, 6, 400).astype(np.int32)
    trace = Trace.build(np.arange(400), np.full(400, 5), np.full(400, 2), adapter=asked,
                        adapters=trace_of(parse_options({})).adapters[:6])  # fmt: skip
    for places, share in zip((1, 3, 6), cold_shares(trace, (1, 3, 6)), strict=True):
        cache, cold = [], 0
        for adapter in asked[asked >= 0].tolist():
            cold += adapter not in cache
            cache = [adapter, *(other for other in cache if other != adapter)][:places]
        assert share == cold / (asked >= 0).sum()


def test_folding_in_the_only_adapter_leaves_no_branch():
    args = parse_options({"adapters": "1", "profile": ANALYTIC})
    trace = trace_of(args)
    mix = mix_of(trace)
    cost = Cost(profile_of(args), "sglang", "fused", trace.adapters)
    found = merging(cost, mix, mix.shares, 0, 64, 64)
    assert (found.mixture_us, found.own) == (0.0, 64.0)
    assert found.unmerged_us == cost.lora_ps(64, 1, 64, "decode") / 1e6


def test_the_answer_is_in_words():
    text = answer(parse_options({"adapter-assign": "share:0.9", "workload": "retrieval", "profile": ANALYTIC}))
    words = " ".join(text.split())
    assert "analytic, not measured" in words
    assert "An adapter takes 128 MiB on average, as much as the KV of 256 tokens" in words
    assert "takes 2.44 ms at 55 GB/s" in words, "128 MiB over 55 GB/s"
    assert re.search(r"adapter-000 \(9\d % of the requests with an adapter\): merge it\.", words)
    uniform = " ".join(answer(parse_options({"adapter-assign": "uniform", "profile": ANALYTIC})).split())
    assert "So no adapter of this mix is worth folding in for mixed batches." in uniform
    assert "The trace asks for no adapter." in answer(parse_options({"adapters": "0"}))


@pytest.mark.parametrize(("seeds", "confidence", "needed"), [(25, 0.56, 14), (50, 0.14, 7), (3, 0.5, 2), (3, 1.0, 3)])
def test_so_many_seeds_must_hold(seeds, confidence, needed):
    args = SimpleNamespace(seeds=seeds, confidence=confidence)
    assert Search(args, "valora", "affinity", ()).needed == needed


def test_whatif_answers_for_the_options_it_takes_and_refuses_the_others():
    def words(**options):
        given = {"max-requests": "50", "adapters": "64", "profile": ANALYTIC} | options
        return " ".join(answer(parse_options(given)).split())

    assert "64 of the trace take 8.00 GiB, 200.0 % of the memory of adapters, in which 32 would fit." in words(
        **{"adapter-memory": "4"})  # fmt: skip
    assert words() != words(**{"policy-option": "switch=addmm"})
    with pytest.raises(ValueError, match=r"--adapter-memory 500: the memory for KV and adapters is"):
        words(**{"adapter-memory": "500"})
    run = {"gpus": "2", "pin": "adapter-000", "closed-loop": "3", "router": "affinity", "drain": "1"}
    for option, value in run.items():
        with pytest.raises(ValueError, match=f"--{option} changes nothing here"):
            words(**{option: value})


def test_a_policy_without_lora_has_nothing_to_merge():
    text = answer(parse_options({"policy": "base", "max-requests": "50"}))
    assert "Nothing to gain: with operator none no step pays for a LoRA branch." in " ".join(text.split())

"""`python -m engine profile`: what it measures on a tiny model, how it goes on after being stopped, and whether its tables
say again what they were made from. There the steps are not timed but told by a cost table, so that every row is exact."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine import profile_parts as parts  # noqa: E402
from engine import serve  # noqa: E402
from engine.__main__ import main  # noqa: E402
from engine.build import build, find_adapters  # noqa: E402
from engine.graphs import BRANCHED, MIXED, PLAIN  # noqa: E402
from engine.least_squares import non_negative, robust  # noqa: E402
from engine.profile_fit import (  # noqa: E402
    UnfinishedError,
    chunk_attention,
    host,
    mixed_attention,
    profile_of,
    steps_of,
)
from engine.profile_lora import PASS_ROWS, beside, capped, other_ranks, skews, stepped  # noqa: E402
from engine.replay import EngineConfig  # noqa: E402
from engine.rows_file import RowsError, RowsFile  # noqa: E402
from engine.stage import Stage, Timing  # noqa: E402
from policies import make_policy  # noqa: E402
from policies.cost import Cost  # noqa: E402
from policies.plan import MIXTURE, Work  # noqa: E402
from policies.profile import Boost, load_profile, parse_profile  # noqa: E402
from policies.view import Limits  # noqa: E402
from traces.assign import make_adapters  # noqa: E402

torch.set_num_threads(1)
US = 1_000_000  # ps
ALPHA, BETA = 0.004, 2.0


class Told(Stage):
    """A stage whose steps take what `cost` says, and are not computed."""

    cost: Cost

    def time(self, plan, steps=None, after=lambda: None):
        work = self.ledger.begin(plan, self.now_ns())
        self.runner.begin(plan, self.ledger)
        count = self._most(plan, 8)
        took = [self.cost.step_ps(work._replace(context_tokens=work.context_tokens + i * work.decodes)) / US
                for i in range(count)]  # fmt: skip
        self.ledger.commit(count, 0, 0)
        self.runner.settle(self.ledger, count)
        context = work.context_tokens / work.decodes + (count - 1) / 2 if work.decodes else 0.0
        return Timing([float(np.mean(took))], [], [3.0 + 0.5 * work.decodes], work, context, {}, [0, 1])


def truth(profile):
    """Tables with stairs, attention that grows, and operators; of the form that the fit can find."""
    none = [(t, ALPHA * t * t + BETA) for t in (1, 8, 16, 32, 64, 128)]
    over = [(t, ALPHA * t * t + BETA + 0.05 * t * 100) for t in (1, 8, 16, 32, 64, 128)]
    curve = {1: [(1.0, 20.0), (8.0, 30.0), (64.0, 90.0)], 4: [(1.0, 25.0), (8.0, 44.0), (64.0, 120.0)]}
    table = {"decode": {8: curve}, "prefill": {8: curve}, "pads": False}
    return dataclasses.replace(
        profile, linear=[(1, 500.0), (2, 520.0), (3, 600.0), (4, 600.0), (5, 700.0), (8, 700.0)],
        prefill_linear=[(1, 800.0), (16, 800.0), (17, 900.0), (32, 900.0), (33, 1200.0), (64, 1200.0)],
        decode_attention={1: [(0, 0.0), (200, 40.0)], 8: [(0, 0.0), (200, 200.0)]}, output=[(1, 0.0)],
        prefill_attention={0: none, 100: over}, mixed_attention={1: [(0, 0.0), (200, 60.0)], 8: [(0, 0.0), (200, 260.0)]},
        lora={"atmm": table, "slora": table}, host_step_us=0.0, host_request_us=0.0,
    )  # fmt: skip


@pytest.fixture
def stage(model, profile):
    """stage(kind, limits): on a tiny model with four adapters of rank 8; a Told one tells what `truth` says."""

    def make(kind, limits=(8, 64, 256), pages=400):
        built, decoder = model("tiny-llava")
        config = EngineConfig(limits=Limits(*limits), pages=pages)
        adapters, policy = make_adapters(4, (8,)), make_policy("valora")
        found = find_adapters(adapters, built, config.targets, None, 0)
        stage = kind(build(built, decoder, adapters, found, policy, profile, config), config, policy)
        stage.cost = Cost(truth(profile), "atmm", "fused", adapters)
        return stage

    return make


GRID = parts.Grid((1, 2, 4, 8), (16, 32, 64), (1, 8), (100, 180), (16, 64), (1, 4), (1, 2), stairs=True)


def told_rows(stage):
    rows = {}
    jobs = [*parts.linear_jobs(GRID), *parts.prefill_jobs(GRID), *parts.attention_jobs(GRID), *parts.check_jobs(GRID, 4),
            *parts.lora_jobs(GRID, "atmm", 8, 4, mixture=False, quick=False)]  # fmt: skip
    for job in jobs:
        row = parts.attempt(job, stage)
        if row is not None:
            rows[row["key"]] = row
    rows["vision 1"] = {"what": "vision", "images": 1, "us": 50.0, "p10": 49.0, "p90": 52.0}
    rows["switch fold 8"] = {"what": "switch", "rank": 8, "us": 90.0, "p10": 90.0, "p90": 90.0}
    rows["load 8"] = {"what": "load", "bytes": 8000, "us": 16.0, "slowdown": 0.03, "p10": 15.0, "p90": 17.0}
    return rows


FACTS = {
    "model": "tiny", "max_context": 256, "image_tokens": 16, "video_images": 3, "kv_bytes_per_token": 1024,
    "adapter_bytes_per_rank": 1000, "weights_bytes": 1, "golden_bytes": 0, "device_bytes": 10**6, "reserve_bytes": 0,
    "steps_ahead": 1, "rank_align": 16, "stairs": True, "adapters": 4, "rank": 8,
}  # fmt: skip


def test_tables_say_again_what_they_were_made_from(stage, profile, tmp_path):
    told = stage(Told)
    rows = told_rows(told)
    data, steps = profile_of(rows, FACTS, {"device": "nowhere"}, tmp_path / "x.json")
    found = Cost(parse_profile(tmp_path / "x.json", json.dumps(data).encode()), "atmm", "fused", make_adapters(4, (8,)))
    for n in range(1, 9):
        assert found.linear_ps(n) == pytest.approx(told.cost.linear_ps(n), rel=0.03), n
    for tokens in range(1, 65):
        assert found.prefill_linear_ps(tokens) == pytest.approx(told.cost.prefill_linear_ps(tokens), rel=0.01), tokens
    assert data["load_gb_per_s"] == pytest.approx(0.5)
    assert data["load_slowdown"] == 0.03
    assert (data["host_step_us"], data["host_request_us"]) == (3.0, 0.5)
    assert len(steps) >= 7
    for key, measured, predicted in steps:
        assert predicted == pytest.approx(measured, rel=0.05), key
    assert data["kind"] == "measured"
    assert data["scatter"]["vision"] == [0.98, 1.04]
    assert data["scatter"]["model"][0] <= 1.0 <= data["scatter"]["model"][1] + 0.04


def test_a_mixture_step_with_few_branches_takes_what_its_tokens_say(stage, profile, tmp_path):
    told, wide = stage(Told), {999_999: [(8.0, 60.0), (128.0, 300.0)]}
    plain = truth(profile)
    lora = plain.lora["atmm"] | {f"mixture_{kind}": {8: wide} for kind in ("decode", "prefill")}
    lora |= {"mixture_few": {8: {999_999: [(16.0, 110.0), (64.0, 350.0)]}}}
    both = dataclasses.replace(plain, lora=plain.lora | {"atmm": lora})
    told.cost = Cost(both, "atmm", "fused", make_adapters(4, (8,)))
    rows = told_rows(told)
    for job in parts.lora_jobs(GRID, "atmm", 8, 4, mixture=True, quick=False):
        rows |= {row["key"]: row for row in [parts.attempt(job, told)] if row}
    assert rows["few 8 64"]["work"][6] == 2 * (7 // 2), "two branches of each request that asks for another adapter"
    data, _ = profile_of(rows, FACTS, {"device": "nowhere"}, tmp_path / "x.json")
    found = Cost(parse_profile(tmp_path / "x.json", json.dumps(data).encode()), "atmm", "fused", make_adapters(4, (8,)))
    for rows, tokens in ((6, 64), (6, 32), (120, 64)):
        work = Work(MIXTURE, 4, 64, ((tokens - 4, 0),), tokens - 4, 0, rows, 2, 8, 16, 0, 5, 0)
        assert found.fixed(work)[3] == pytest.approx(told.cost.fixed(work)[3], rel=0.02), (rows, tokens)


def test_rows_that_lack_a_part_make_no_profile(stage, tmp_path):
    rows = told_rows(stage(Told))
    left = {key: row for key, row in rows.items() if row["what"] not in ("prefill", "load")}
    with pytest.raises(UnfinishedError, match="no row yet of load, prefill"):
        profile_of(left, FACTS, {}, tmp_path / "x.json")


def test_one_chunk_against_many_tells_attention_apart():
    rows = {}
    for tokens in (64, 128):
        for chunks in (1, 4, 8):
            sizes = [[tokens // chunks, 0]] * chunks
            us = 1000 + ALPHA * sum(t * t for t, _ in sizes) + BETA * chunks
            work = [0, 0, 0, sizes, tokens, 0, 0, 0, 0, 0, 0, 1]
            rows[f"{tokens} {chunks}"] = {"what": "prefill" if chunks == 1 else "pieces", "us": us, "work": work}
    assert chunk_attention(rows) == pytest.approx((ALPHA, BETA))
    assert chunk_attention({}) == (0.0, 0.0)


def test_contexts_that_memory_did_not_hold_are_filled_in_from_decodes_alone():
    row = {"requests": 8, "us": 130.0, "context": 20.0, "work": [0, 8, 160, [[24, 0]], 24]}
    decode = {"8": [[10.0, 0.0], [20.0, 5.0], [50.0, 25.0]], "64": [[10.0, 0.0], [90.0, 400.0]]}
    table = mixed_attention([row], [[1, 100.0], [64, 100.0]], lambda tokens: 2.0, decode, None)
    assert table == {"8": [[20.0, 28.0], [50.0, 48.0]]}, "behind what was measured it rises as theirs does"
    many = mixed_attention([{**row, "requests": 99}], [[1, 100.0], [999, 100.0]], lambda tokens: 2.0, decode, None)
    assert many == {"99": [[20.0, 28.0], [90.0, pytest.approx(28.0 + 350.0)]]}, "the largest batch's, where none is as large"


def test_beside_something_easier_products_of_matrices_take_less():
    clock = Boost(1.0, 1.0, [(1.0, 0.8)], [(1.0, 1.0)])
    assert beside(100.0, 60.0, 7, None) == 40.0
    assert beside(100.0, 60.0, 7, clock) == pytest.approx(100 - 60 * (0.8 + 0.2 * 0.6))
    assert beside(50.0, 60.0, 7, clock) == 0.0, "never below nothing"


def test_a_branch_does_not_get_dearer_by_the_row_once_there_are_many():
    points = [[16, 5.0], [512, 9.0], [1024, 20.0], [2048, 60.0], [4096, 70.0]]
    assert capped(points) == [[16, 5.0], [512, 9.0], [1024, 20.0], [2048, pytest.approx(44.0)], [4096, 70.0]]


def test_a_kernel_that_goes_over_rows_in_passes_is_level_within_each():
    points = [[16, 5.0], [256, 8.0], [1024, 20.0], [2048, 40.0]]
    assert stepped(points, 512) == [[16, 5.0], [256, 8.0], [512, 8.0], [513, 20.0], [1024, 20.0], [1025, 30.0], [1536, 30.0],
                                    [1537, 40.0], [2048, 40.0]]  # fmt: skip
    assert stepped(points[:2], 512) == points[:2]
    slora = pytest.importorskip("kernels.baselines.slora")
    inputs = pytest.importorskip("kernels.baselines.inputs")
    assert PASS_ROWS == {"slora": slora.MBGMM_ROWS * inputs.MOST_TILES}


def test_how_much_rows_of_one_adapter_cost_is_what_was_measured_of_them(profile):
    curves = {"decode": {8: {1: [(1.0, 1.0)]}}, "pads": False,
              "prefill": {8: {1: [(1.0, 0.0), (100.0, 100.0)], 4: [(1.0, 0.0), (100.0, 40.0)]}}}  # fmt: skip
    known, adapters = dataclasses.replace(profile, lora={"slora": curves}), make_adapters(4, (8,))
    work = [1, 20, 320, [[80, 0]], 80, 0, 100, 4, 8, 32, 0, 21, 80]
    even, apart = (Cost(known, "slora", "fused", adapters).fixed(Work(*work[:3], ((80, 0),), *work[4:-1], largest))[3] / US
                   for largest in (0, 80))  # fmt: skip
    assert even < apart
    row = {"what": "skew", "us": 500.0 + even + 0.25 * (apart - even), "plain_us": 500.0, "work": work}
    assert skews({"skew slora 8 20 80": row}, known, adapters) == {"slora": pytest.approx(0.25, abs=1e-6)}
    told = dataclasses.replace(known, lora={"slora": {**curves, "skew": 0.25}})
    assert Cost(told, "slora", "fused", adapters).fixed(Work(*work[:3], ((80, 0),), *work[4:]))[3] / US == pytest.approx(
        row["us"] - 500.0, abs=1e-4)  # fmt: skip


def test_ranks_that_were_not_timed_are_as_far_from_those_that_were_as_by_themselves(profile):
    alone = {"decode": {8: {1: [(1.0, 10.0), (9.0, 50.0)]}, 16: {1: [(1.0, 20.0), (9.0, 75.0)]}}, "pads": False}
    known = dataclasses.replace(profile, lora={"slora": alone | {"prefill": alone["decode"]}})
    table = {"decode": {"8": {"1": [[1, 7.0], [9, 20.0]]}}, "prefill": {"8": {"1": [[9, 30.0]]}}, "pads": False}
    more = other_ranks({"slora": table, "ours": table}, known, 8)
    assert more["ours"] == table, "nobody timed it by itself"
    assert more["slora"]["decode"] == {"8": table["decode"]["8"], "16": {"1": [[1, 14.0], [9, 30.0]]}}
    assert more["slora"]["prefill"]["16"] == {"1": [[9, 45.0]]}
    assert other_ranks({"slora": more["slora"]}, known, 8) == {"slora": more["slora"]}, "what is there stays"


def test_what_the_host_does_is_found_in_the_leases_again():
    rng, leases = np.random.default_rng(3), []
    for _ in range(200):
        decodes, chunks, loads, idle, images = (int(rng.integers(0, most)) for most in (30, 4, 2, 2, 2))
        work = [0, decodes, 0, [[5, 0]] * chunks, 5 * chunks, images, 0, 0, 0, 0, 0, 1]
        prepares = 400 + 3 * decodes + 50 * loads + (900 + 20 * chunks if chunks else 0)
        leases.append({"work": work, "known": 1, "idle": idle, "loads": loads, "gap_us": 150 + 170 * idle,
                       "host_us": 7 + (0 if images else prepares)})  # fmt: skip
    leases.append({**leases[0], "known": 0, "gap_us": 1e6})
    row = {"what": "host", "policy": "valora", "operator": "atmm", "decide": {"us": 7.0}, "leases": leases}
    told = host({"a": row}, hidden=False)
    assert told["lease_us"] == pytest.approx({"base": 150, "load": 50, "wake": 170, "launch": 400, "request": 3,
                                              "prompts": 900, "chunk": 20}, abs=0.01)  # fmt: skip
    assert told["decide_us"] == {"valora": 7.0}


def test_stairs_have_a_point_at_either_end():
    assert steps_of({1: 5.0, 4: 7.0, 5: 9.0}, True) == [[1, 5.0], [2, 7.0], [4, 7.0], [5, 9.0]]
    assert steps_of({4: 7.0, 1: 5.0}, False) == [[1, 5.0], [4, 7.0]]


def test_no_coefficient_is_negative_and_delayed_leases_do_not_count():
    left = [[1, n, n % 3] for n in range(40)]
    right = [100 + 2 * n - 5 * (n % 3) for n in range(40)]
    base, request, odd = non_negative(left, right)
    assert odd == 0
    assert (base, request) == (pytest.approx(95, abs=2), pytest.approx(2, abs=0.1))
    clean = [100 + 2 * n + 0.01 * (n % 5) for n in range(40)]
    clean[7] += 5000
    assert robust([[1, n] for n in range(40)], clean) == pytest.approx([100, 2], abs=0.1)


@pytest.fixture
def command(tmp_path, profile):
    values = dataclasses.asdict(profile)
    del values["name"], values["sha256"]
    made_up = tmp_path / "made-up.json"
    made_up.write_text(json.dumps(values))
    return [
        "profile", "--model", "tiny-llava", "--device", "cpu", "--profile", str(made_up),
        "--out", str(tmp_path / "tiny.json"), "--ranks", "8",
        "--adapters", "3", "--max-batch", "4", "--max-batch-tokens", "32", "--max-context", "256", "--quick",
        "--host-seconds", "0.2", "--operators", "atmm,slora",
    ]  # fmt: skip


def test_the_command_makes_a_profile_that_the_simulator_takes(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.stage.POINT_S", 0.005)
    monkeypatch.setattr("engine.profile.HOSTS", ("slora", "valora", "base"))
    parts_but_switch = "linear,prefill,attention,vision,load,host,lora,check"
    assert main([*command, "--parts", parts_but_switch]) == 75
    assert "no row yet of switch" in capsys.readouterr().err
    before = (tmp_path / "tiny.json.rows.jsonl").read_bytes()
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'tiny.json'}\n"
    assert " ms measured, predicted " in printed.err
    after = (tmp_path / "tiny.json.rows.jsonl").read_bytes()
    assert after.startswith(before), "nothing is measured twice"
    profile = load_profile(tmp_path / "tiny.json")
    assert profile.kind == "measured"
    assert set(profile.lora) == {"atmm", "slora"}
    assert set(profile.decide_us) == {"valora", "slora", "base"}
    assert profile.steps_ahead == 0
    assert profile.provenance["command"].startswith("python -m engine profile --model tiny-llava")
    assert {"linear", "vision", "model"} <= set(profile.scatter)
    assert main(command) == 0
    assert (tmp_path / "tiny.json.rows.jsonl").read_bytes() == after
    with pytest.raises(SystemExit):
        main([*command, "--max-batch", "3"])
    assert "was measured with limits" in capsys.readouterr().err


def test_time_that_is_up_ends_cleanly(command, capsys):
    assert main([*command, "--max-seconds", "0.000001"]) == 75
    assert "no engine was ready by then; give it more" in capsys.readouterr().err


class Graphs:
    """Graphs of which one sees what is captured."""

    def __init__(self, *buckets):
        self.buckets, self.captured = list(buckets), set()

    def capture(self, kinds=None, sizes=None):
        wanted = [size for size in self.buckets if sizes is None or size in sizes]
        self.captured |= {(kind, size) for kind in kinds or [None] for size in wanted}


@pytest.mark.parametrize("everything", [True, False])
def test_steps_that_are_timed_have_graphs_with_their_branch_and_without(everything):
    vision = Graphs(1)
    runner = SimpleNamespace(graphs=Graphs(1, 2, 4), packed_graphs=Graphs(16, 32, 64), vision=vision)
    parts.capture(SimpleNamespace(runner=runner), ([1, 4], [16, 64]), everything=everything)
    decodes, tokens = ((1, 2, 4), (16, 32, 64)) if everything else ((1, 4), (16, 64))
    for graphs, sizes, mixed in ((runner.graphs, decodes, (1, 4)), (runner.packed_graphs, tokens, (16, 64))):
        expected = {(kind, size) for kind in (PLAIN, BRANCHED) for size in sizes}
        assert graphs.captured == expected | ({(MIXED, size) for size in mixed} if everything else set())
        assert graphs.buckets == list(sizes)
    assert bool(vision.captured) == everything


@pytest.mark.long
def test_a_rival_that_cannot_run_is_left_out_and_the_others_are_measured(command, tmp_path, capsys, monkeypatch):
    from engine.profile import Run

    built = Run._built

    def fails(self, operator, rank):
        if operator == "slora":
            raise RuntimeError("its kernel does not compile")
        return built(self, operator, rank)

    monkeypatch.setattr("engine.stage.POINT_S", 0.005)
    monkeypatch.setattr("engine.profile.HOSTS", ("slora",))
    monkeypatch.setattr(Run, "_built", fails)
    assert main([*command[:-1], "atmm,slora,punica", "--parts", "linear,prefill,attention,vision,switch,load,lora"]) == 75
    error = capsys.readouterr().err
    assert "slora rank 8: left out: RuntimeError: its kernel does not compile" in error
    assert "measurements are left" in error
    assert set(load_profile(tmp_path / "tiny.json").lora) == {"atmm", "punica"}


@pytest.mark.parametrize(("words", "message"), [
    (["--parts", "linaer"], "did you mean 'linear'"), (["--operators", "slor"], "did you mean 'slora'"),
])  # fmt: skip
def test_misspelt_names_are_answered(command, words, message, capsys):
    with pytest.raises(SystemExit):
        main([*command, *words])
    assert message in capsys.readouterr().err


def test_a_profile_in_the_making_is_not_what_its_engines_predict_with(profile, tmp_path, monkeypatch):
    """What the first engine left of it has no table of the operators that come later."""
    monkeypatch.setattr(serve, "PROFILES", tmp_path)
    for name in ("h200-a", "analytic-h200-a"):
        data = dataclasses.asdict(profile)
        (tmp_path / f"{name}.json").write_text(json.dumps({key: data[key] for key in data if key not in ("name", "sha256")}))
    found = [serve.profile_for(None, "a", measured=measured).name for measured in (True, False)]
    assert found == ["h200-a", "analytic-h200-a"]


def test_rows_survive_a_torn_line_and_refuse_a_strange_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    file = RowsFile(path)
    file.begin({"model": "x"})
    file.keep({"key": "a", "us": 1.0})
    path.write_bytes(path.read_bytes() + b'{"key": "b", "u')
    again = RowsFile(path)
    assert (again.facts, list(again.rows)) == ({"model": "x"}, ["a"])
    again.keep({"key": "b", "us": 2.0})
    assert list(RowsFile(path).rows) == ["a", "b"]
    path.write_bytes(path.read_bytes() + b"[]\n")
    with pytest.raises(RowsError, match=r"rows\.jsonl:4: is no row"):
        RowsFile(path)

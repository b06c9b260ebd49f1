"""The engine on a GPU: kernels, graphs and asynchronous loads give what the CPU's plain torch gives."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def run(trace, profile):
    """run(name, policy, graphs, wall) -> (first logits by request, tokens by request) of one small trace in bfloat16."""

    def make(name, policy, *, graphs, wall=False, n=10, operator=None):
        from engine.build import build, find_adapters
        from engine.clock import MockedClock, WallClock
        from engine.decoder import Decoder
        from engine.models import random_model
        from engine.replay import Driver, EngineConfig, stripped
        from engine.serve import warm_up
        from policies import make_policy
        from policies.view import Limits

        model = random_model(name, dtype=torch.bfloat16, device="cuda", seed=1)
        policy = make_policy(policy)
        requests = stripped(trace(n, 3, image_tokens=model.shape.image_tokens, output=12), policy)
        config = EngineConfig(limits=Limits(6, 64, 256), pages=300, graphs=graphs, operator=operator)
        found = find_adapters(requests.adapters, model, config.targets, None, 0)
        engine = build(model, Decoder(model), requests.adapters, found, policy, profile, config)
        warm_up(engine, policy, requests, config, 4)
        seen = {}

        def observe(sequences, logits):
            for sequence, row in zip(sequences, logits, strict=True):
                seen.setdefault(sequence.id, row.float().cpu())

        engine.runner.observer = observe
        clock = WallClock(engine.runner) if wall else MockedClock(engine.cost, engine.runner)
        driver = Driver(
            requests, policy, engine.ledger, engine.cost, engine.journal, clock, engine.runner, check_invariants=not wall
        )
        driver.run()
        assert len(engine.runner.answers) == n
        return seen, {request: answer.tokens for request, answer in engine.runner.answers.items()}

    return make


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
@pytest.mark.parametrize("policy", ["base", "slora", "valora", "merged-only"])
def test_graphs_give_what_eager_steps_give(run, name, policy):
    _, eager = run(name, policy, graphs=False)
    _, graphed = run(name, policy, graphs=True)
    same = np.mean([a == b for request in eager for a, b in zip(eager[request], graphed[request], strict=True)])
    assert same > 0.8, "near ties may fall either way in bfloat16 and then all that follows differs; most may not"


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_the_first_logits_are_those_of_the_cpu(run, world, trace, model, name):
    seen, _ = run(name, "base", graphs=False)
    requests = trace(10, 3, image_tokens=model(name)[0].shape.image_tokens, output=12)
    w = world(name, requests, "base", limits=(6, 64, 256))
    from engine.models import random_model

    on_gpu = dict(random_model(name, dtype=torch.bfloat16, device="cuda", seed=1).hf.named_parameters())
    for key, parameter in w.model.hf.named_parameters():  # the same seed draws other numbers there
        parameter.copy_(on_gpu[key].float().cpu())
    first = {}

    def observe(sequences, logits):
        for sequence, row in zip(sequences, logits, strict=True):
            first.setdefault(sequence.id, row.clone())

    w.runner.observer = observe
    w.run()
    assert max(float((seen[request] - first[request]).abs().max()) for request in seen) < 0.05
    model.cache_clear()  # its weights were overwritten


@pytest.mark.parametrize("operator", [None, "slora", "vllm", "grouped"])
def test_a_replay_on_the_wall_clock_overlaps_loads_and_steps(run, operator):
    _, tokens = run("tiny-llava", "valora", graphs=True, wall=True, operator=operator)
    assert len(tokens) == 10


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_the_vision_tower_by_graphs_equals_transformers(name):
    from engine.models import random_model
    from engine.vision import VisionGraphs

    model = random_model(name, dtype=torch.bfloat16, device="cuda", seed=1)
    graphs = VisionGraphs(model)
    graphs.capture()
    assert graphs._graphs, "the tower cannot be captured"
    pixels = torch.randn(5, *model.shape.pixels, device="cuda").bfloat16()
    expected = torch.cat([model.encode_images(pixels[i : i + 1]) for i in range(5)]).float()
    assert float((graphs.encode(pixels).float() - expected).norm() / expected.norm()) < 1e-2


def test_adapters_that_move_together_while_others_load_stay_right(trace, profile):
    """Twelve adapters in rows for three: evicted, loaded on a stream of their own, and moved; as with rows for all."""
    from engine.build import build, find_adapters
    from engine.clock import MockedClock
    from engine.decoder import Decoder
    from engine.models import random_model
    from engine.replay import Driver, EngineConfig
    from policies import make_policy
    from policies.view import Limits
    from traces.request import Adapter

    model = random_model("tiny-llava", dtype=torch.bfloat16, device="cuda", seed=1)
    decoder = Decoder(model)
    adapters = tuple(Adapter(f"lora-{i}", (16, 48, 32)[i % 3]) for i in range(12))
    asked = np.arange(48, dtype=np.int32) * 7 % 12
    requests = trace(48, images=0, output=4, span_ns=100_000_000)
    requests = dataclasses.replace(requests, adapters=adapters, adapter=asked)
    seen, moves = {}, []
    for rows in (96, 12 * 48):
        policy = make_policy("valora")
        bytes_a_row = 2 * 2 * (3 * 64 + 192 + 128)
        config = EngineConfig(limits=Limits(6, 64, 256), pages=300, graphs=False, adapter_bytes=rows * bytes_a_row)
        found = find_adapters(adapters, model, config.targets, None, 0)
        engine = build(model, decoder, adapters, found, policy, profile, config)
        first = seen.setdefault(rows, {})
        compact = engine.runner.lora.compact
        engine.runner.lora.compact = lambda compact=compact: (moves.append(1), compact())

        def observe(sequences, logits, first=first):
            for sequence, row in zip(sequences, logits, strict=True):
                first.setdefault(sequence.id, row.float().cpu())

        engine.runner.observer = observe
        Driver(requests, policy, engine.ledger, engine.cost, engine.journal, MockedClock(engine.cost, engine.runner),
               engine.runner, check_invariants=True).run()  # fmt: skip
        engine.runner.lora.evict_all()
    assert moves
    assert max(float((seen[96][r] - row).abs().max()) for r, row in seen[12 * 48].items()) < 0.05


@pytest.fixture
def profile_file(tmp_path, profile):
    """What policies predict with meanwhile, as a file."""
    values = dataclasses.asdict(profile)
    del values["name"], values["sha256"]
    (tmp_path / "made-up.json").write_text(json.dumps(values))
    return tmp_path / "made-up.json"


def test_a_profile_of_all_operators_times_steps_by_graphs_only(profile_file, tmp_path, monkeypatch):
    from engine.__main__ import main
    from engine.rows_file import RowsFile
    from policies.profile import load_profile

    monkeypatch.setattr("engine.stage.POINT_S", 0.01)
    out = tmp_path / "tiny.json"
    assert main(["profile", "--model", "tiny-llava", "--out", str(out), "--profile", str(profile_file), "--ranks", "16",
                 "--adapters", "4", "--max-batch", "8", "--max-batch-tokens", "64", "--max-context", "256", "--quick",
                 "--host-seconds", "0.3", "--memory-share", "0.02"]) == 0  # fmt: skip
    assert set(load_profile(out).lora) == {"atmm", "slora", "punica", "dlora", "vllm"}
    rows = RowsFile(tmp_path / "tiny.json.rows.jsonl").rows
    assert not [key for key, row in rows.items() if row["what"] == "left out" and key.startswith(("lora", "mixture"))]
    plain = {key: row["plain_us"] for key, row in rows.items() if "plain_us" in row}
    for operator in ("slora", "punica", "dlora", "vllm"):
        ratios = [plain[key.replace("atmm", operator)] / us for key, us in plain.items() if key.startswith("lora atmm ")]
        assert np.median(ratios) < 3, f"{operator}: steps without its branch were launched kernel by kernel"


def test_a_campaign_builds_an_engine_once_and_serves_on(profile_file, tmp_path, capsys):
    from engine.__main__ import main
    from traces.result_files import read_results

    (tmp_path / "c.yaml").write_text(
        "defaults: {model: tiny-llava, memory-share: 0.02, policy: [valora, punica], adapters: 3, ranks: 16, "
        "max-requests: 24, rate: 60, "
        "clip: true, max-context: 256, max-batch: 8, max-batch-tokens: 64, profile: made-up.json}\n"
        "replays:\n  a: {adapter-assign: 'share:0.8'}\n  b: {adapter-assign: uniform, drain: 60}\n"
    )
    assert main(["campaign", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert said.count("valora: warmed up") == said.count("punica: warmed up") == 2
    for run in [run for name in "ab" for run in read_results(tmp_path / "out" / name)]:
        assert (run.requests["status"] == 0).all(), (run.policy, run.config["notes"])

"""A tiny world: a model of two layers in float32, a trace, a policy, a profile with made-up latencies, a mocked clock."""

import contextlib
import functools
from types import SimpleNamespace

import numpy as np
import pytest

with contextlib.suppress(ImportError):
    import kernels.target  # noqa: F401  (before triton, which peft imports: it may choose the interpreter)


@functools.cache
def tiny_model(name):
    import torch

    from engine.decoder import Decoder
    from engine.models import random_model

    torch.set_num_threads(1)  # tensors of a few numbers are slower on many
    model = random_model(name, dtype=torch.float32, device="cpu", seed=1)
    return model, Decoder(model)


def made_up_profile(**changes):
    """Latencies of the size of a small GPU's; nothing was measured."""
    from policies.profile import Profile

    line = [(1.0, 100.0), (100.0, 300.0)]
    table = {"decode": {4: {1: line}}, "prefill": {4: {1: line}}, "pads": False}
    operators = ("atmm", "slora", "punica", "vllm", "dlora")
    values = {
        "name": "made-up", "kind": "analytic", "sha256": "", "provenance": {}, "model": "tiny", "max_context": 256,
        "image_tokens": 16, "video_images": 2, "kv_bytes_per_token": 1024, "adapter_bytes_per_rank": 1024,
        "weights_bytes": 0, "golden_bytes": 0, "device_bytes": 200 * 16 * 1024, "reserve_bytes": 0, "linear": line,
        "decode_attention": {1: [(0.0, 10.0), (100.0, 50.0)], 8: [(0.0, 10.0), (100.0, 80.0)]},
        "prefill_attention": {0: line}, "vision": line, "output": line, "lora": dict.fromkeys(operators, table),
        "switch": {way: [(1.0, 200.0)] for way in ("fused", "addmm", "peft")}, "load_gb_per_s": 1.0,
        "load_latency_us": 10.0, "host_step_us": 50.0, "host_request_us": 1.0,
    }  # fmt: skip
    return Profile(**(values | changes))


@pytest.fixture
def profile():
    return made_up_profile()


@pytest.fixture
def model():
    """model(name) -> (Model, Decoder), built once a process."""
    return tiny_model


@pytest.fixture
def trace():
    """trace(n, ...) -> a random trace over three adapters of ranks 4, 8, 16 (and the base model)."""
    from traces.request import Adapter, Trace

    def make(n, seed=0, images=2, image_tokens=16, output=10, adapters=3, span_ns=5_000_000, **columns):
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, images + 1, n)
        prompt = counts * image_tokens + rng.integers(5, 40, n)
        filled = {"images": counts, "adapter": rng.integers(-1, adapters, n).astype(np.int32)} | columns
        names = tuple(Adapter(f"lora-{i}", 4 << i) for i in range(adapters))
        arrivals = np.sort(rng.integers(0, span_ns, n))
        return Trace.build(arrivals, prompt, rng.integers(1, output + 1, n), adapters=names, **filled)

    return make


@pytest.fixture
def world(model):
    """world(name, trace, policy, ...) -> what is needed to run it; `.run()` runs and returns the tokens by request,
    `.logits()` the logits of every one of them (tokens of random weights forgive much)."""

    def make(name, trace, policy="slora", *, pages=200, limits=(4, 32, 256), root=None, prompts=None, operator=None,
             seed=0, prefix_cache=True, targets=("qkv", "o"), options=None, adapters=None, arrivals=None,
             **config):  # fmt: skip
        from engine.build import build, find_adapters
        from engine.clock import MockedClock
        from engine.replay import Driver, EngineConfig, stripped
        from policies import make_policy
        from policies.view import Limits

        built, decoder = model(name)
        policy = make_policy(policy, options)
        trace = stripped(trace, policy)
        config = EngineConfig(
            limits=Limits(*limits), pages=pages, operator=operator, prefix_cache=prefix_cache, targets=targets, seed=seed,
            **config,
        )
        known = trace.adapters[:adapters]
        found = find_adapters(known, built, targets, root, seed)
        engine = build(built, decoder, known, found, policy, made_up_profile(), config)
        engine.hold(config.pins)
        clock = MockedClock(engine.cost, engine.runner)
        driver = Driver(
            trace, policy, engine.ledger, engine.cost, engine.journal, clock, engine.runner, prompts=prompts,
            check_invariants=True, arrivals=arrivals,
        )  # fmt: skip

        def run():
            driver.run()
            engine.runner.lora.evict_all()
            return {request: answer.tokens for request, answer in engine.runner.answers.items()}

        def logits():
            """Run; by request, the logits [tokens, vocab] of every token it got (of eager steps)."""
            import torch

            rows = {}

            def observe(sequences, found):
                for sequence, row in zip(sequences, found, strict=True):
                    rows.setdefault(sequence.id, []).append(row.clone())

            engine.runner.observer = observe
            run()
            return {request: torch.stack(got) for request, got in rows.items()}

        return SimpleNamespace(
            model=built, decoder=decoder, trace=trace, policy=policy, found=found, engine=engine, runner=engine.runner,
            ledger=engine.ledger, driver=driver, config=config, run=run,
            logits=logits,
        )  # fmt: skip

    return make

"""Every mode gives PEFT's result for the same request; every operator gives the reference's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 5e-5
FAMILIES = ("tiny-llava", "tiny-qwen2-vl")
TARGETS = ("qkv", "o", "gate_up", "down")


@pytest.fixture
def folders(tmp_path, trace, model):
    """Folders of adapters in PEFT's format for the adapters of `trace`, written by us, with effects that are easy to see."""
    from engine.peft_format import random_adapter, write_adapter

    def make(name, targets):
        shape = model(name)[0].shape
        rng = np.random.default_rng(7)
        for adapter in trace(1).adapters:
            weights = random_adapter(shape, adapter.name, adapter.rank, targets, rng)
            write_adapter(tmp_path, weights, name)
        return tmp_path

    return make


def peft_logits(name, root, adapter, sequence):
    """PEFT's logits [tokens, vocab] for a sequence without images."""
    from engine.models import random_model

    hf = random_model(name, dtype=torch.float32, device="cpu", seed=1).hf
    if adapter is not None:
        hf = peft.PeftModel.from_pretrained(hf, root / adapter).eval()
    ids = torch.from_numpy(np.concatenate([sequence.prompt.ids, np.array(sequence.generated[:-1], np.int32)])).long()
    with torch.inference_mode():
        return hf(input_ids=ids[None], use_cache=False).logits[0, len(sequence.prompt.ids) - 1 :]


class Script:
    """A policy that prefills everything at once and then decodes in one given mode."""

    name, operator, switch, merges, oracle = "script", "none", "fused", True, False

    def __init__(self, mode, merged):
        self.mode, self.merged = mode, merged

    def decide(self, view):
        from policies.plan import Plan

        mine = [e for e in view.waiting if self.mode != 2 or e.adapter == self.merged]
        missing = tuple(a for a in range(len(view.adapters)) if not view.is_resident(a) and not view.is_loading(a))
        if missing or any(view.is_loading(a) for a in range(len(view.adapters))):
            return Plan(loads=missing)
        prefills = tuple((e.id, e.target) for e in mine)
        decodes = () if prefills else view.decoding
        return Plan(self.mode, self.merged, prefills, decodes)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("mode", "merged"), [(1, -1), (2, 1), (3, 1)], ids=["unmerged", "merged", "mixture"])
def test_each_mode_equals_peft(world, trace, folders, name, mode, merged):
    root = folders(name, TARGETS)
    adapter = [1, 1, 1] if mode == 2 else [0, 1, 2, -1, 1]
    n = len(adapter)
    requests = trace(n, images=0, output=4, adapter=np.array(adapter, np.int32), span_ns=1)
    w = world(name, requests, "valora", limits=(8, 512, 256), root=root, targets=TARGETS)
    before = [w.decoder.weight((layer, "o")).clone() for layer in range(w.model.shape.layers)]
    w.driver.policy = Script(mode, merged)
    w.driver._check = False  # the script waits for all adapters, which is idle by the ledger's rule
    seen = {}

    def observe(sequences, logits):
        for sequence, row in zip(sequences, logits, strict=True):
            seen.setdefault(sequence.id, (sequence, []))[1].append(row.clone())

    w.runner.observer = observe
    w.run()
    assert len(seen) == n
    assert w.ledger.journal.counters["switches"] == (mode > 1)
    for sequence, rows in seen.values():
        named = None if sequence.adapter < 0 else requests.adapters[sequence.adapter].name
        expected = peft_logits(name, root, named, sequence)
        plain = peft_logits(name, root, None, sequence)
        assert float((torch.stack(rows) - expected).abs().max()) < TOLERANCE
        assert named is None or float((plain - expected).abs().max()) > 100 * TOLERANCE
    after = [w.decoder.weight((layer, "o")) for layer in range(w.model.shape.layers)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "unfolding must restore every bit"


def test_rslora_scales_by_the_root_of_the_rank(tmp_path, model):
    from engine.models import random_model
    from engine.peft_format import read_adapter

    hf = random_model("tiny-llava", dtype=torch.float32, device="cpu", seed=1).hf
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=r".*language_model.*\.(q_proj|o_proj)", init_lora_weights=False
    )
    peft.get_peft_model(hf, config, adapter_name="mine").save_pretrained(tmp_path)
    read = read_adapter(tmp_path, "mine", model("tiny-llava")[0].shape)
    assert read.scale == 3.0
    assert set(read.factors) == {(layer, name, 0) for layer in (0, 1) for name in ("qkv", "o")}


LAYERED = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_proj": 12, r"layers\.1\.mlp\.down_proj": 2}},
        {"alpha_pattern": {"k_proj": 1, "model.language_model.layers.0.self_attn.o_proj": 40}},
        {"rank_pattern": {r"layers\.\d\.self_attn\.v_proj": 3}, "alpha_pattern": {"v_proj|up_proj": 3}, "use_rslora": True},
        {"rank_pattern": {"^q_proj": 9, ".*mlp.*": 5}, "lora_alpha": 0, "alpha_pattern": {"mlp.up_proj": 11, "o_proj": 7}},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"], "layers_pattern": "language_model.layers"},
        {"exclude_modules": r".*layers\.0.*|.*(vision|visual).*"},
    ],
    ids=["ranks", "alphas", "both, rslora", "alpha 0", "layers", "excluded"],
)
@pytest.mark.parametrize("mode", [1, 2], ids=["unmerged", "merged"])
def test_configurations_of_peft_answer_as_in_peft(world, trace, tmp_path, settings, mode):
    """Saved by PEFT, with factors of PEFT's own, and answered by both."""
    from engine.models import random_model
    from traces.request import Adapter

    hf = random_model("tiny-llava", dtype=torch.float32, device="cpu", seed=1).hf
    options = {"r": 8, "lora_alpha": 24, "target_modules": LAYERED} | settings
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(hf, peft.LoraConfig(init_lora_weights=False, **options), adapter_name="mine")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    wrapped.save_pretrained(tmp_path)
    rank = max([8, *settings.get("rank_pattern", {}).values()])
    requests = trace(3, images=0, output=3, adapter=np.zeros(3, np.int32), span_ns=1, adapters=1)
    requests = requests.with_(adapters=(Adapter("mine", rank),))
    w = world("tiny-llava", requests, "valora", limits=(8, 512, 256), root=tmp_path, targets=TARGETS)
    assert not w.found.reasons
    w.driver.policy = Script(mode, 0 if mode == 2 else -1)
    w.driver._check = False
    seen = {}

    def observe(sequences, logits):
        for sequence, row in zip(sequences, logits, strict=True):
            seen.setdefault(sequence.id, (sequence, []))[1].append(row.clone())

    w.runner.observer = observe
    w.run()
    for sequence, rows in seen.values():
        expected = peft_logits("tiny-llava", tmp_path, "mine", sequence)
        plain = peft_logits("tiny-llava", tmp_path, None, sequence)
        assert float((torch.stack(rows) - expected).abs().max()) < 4 * TOLERANCE
        assert float((plain - expected).abs().max()) > 100 * TOLERANCE


@pytest.fixture
def logits_of(world, trace):
    """The logits of the first tokens of three short requests under one operator, by request."""

    def run(operator):
        requests = trace(3, images=0, output=2, adapter=np.array([0, 1, -1], np.int32), adapters=2, span_ns=1)
        requests = requests.with_(prompt_tokens=np.array([3, 4, 2]), output_tokens=np.array([2, 2, 2]))
        w = world("tiny-qwen2-vl", requests, operator=operator, targets=("o",))
        first = {}

        def observe(sequences, logits):
            for sequence, row in zip(sequences, logits, strict=True):
                first.setdefault(sequence.id, row.clone())

        w.runner.observer = observe
        w.run()
        return torch.stack([first[request] for request in range(3)])

    return run


@pytest.mark.parametrize("operator", ["atmm", "loop", "peft", "punica", "vllm", "slora", "dlora", "grouped"])
def test_every_operator_serves(logits_of, operator):
    """In Triton's interpreter, hence few and short requests."""
    expected, plain = logits_of(None), logits_of("none")
    got = logits_of(operator)
    assert float((got - expected).abs().max()) < TOLERANCE
    assert float((plain - expected)[:2].abs().max()) > 100 * TOLERANCE
    assert float((plain - expected)[2].abs().max()) < TOLERANCE, "the base model's request has no branch"


def test_mixture_mode_under_a_rival_takes_ours(world, trace):
    from engine.lora import Lora, operator_of

    assert operator_of(None, "atmm", torch.device("cuda")) == "atmm"
    assert operator_of(None, "slora", torch.device("cuda")) == "slora"
    assert operator_of(None, "slora", torch.device("cpu")) == "reference"
    w = world("tiny-llava", trace(1))
    lora = Lora(w.decoder, w.trace.adapters, "punica", merges=False, max_tokens=8)
    assert lora.bound(lora.batch, mixture=True) is not None
    assert lora._mixture_op is not lora._op


def test_warming_up_leaves_no_trace(world, trace):
    w = world("tiny-qwen2-vl", trace(1, adapters=2), "valora", operator="atmm", targets=("o",), limits=(1, 4, 256))
    lora = w.runner.lora
    before = [w.decoder.weight((layer, "o")).clone() for layer in range(2)]
    seen = set()
    lora._op = lora._mixture_op = lambda y, x, pool, batch, key: seen.add((len(y), batch.adapters, batch.merged >= 0))
    lora.warm(mixture=True)
    assert not any(lora.pool.ranks)
    assert lora.folded == -1
    assert all(torch.equal(w.decoder.weight((layer, "o")), golden) for layer, golden in enumerate(before))
    assert {rows for rows, _, _ in seen} == {1, 2, 4}
    assert {(adapters, mixture) for _, adapters, mixture in seen} >= {(1, False), (2, False), (1, True)}


def test_an_unknown_operator_is_named(world, trace):
    from kernels.batch import LoraError

    with pytest.raises(LoraError, match="unknown operator 'atm'; there are atmm"):
        world("tiny-llava", trace(1), operator="atm")


def test_the_yardstick_of_peft_runs():
    from engine.models import random_model
    from engine.peft_baseline import peft_step_us

    model = random_model("tiny-llava", dtype=torch.float32, device="cpu", seed=1)
    assert peft_step_us(model, requests=3, context=8, adapters=2, rank=4, repeats=2) > 0


@pytest.mark.parametrize("policy", ["slora", "valora"])
def test_hundreds_of_adapters_of_mixed_ranks_come_and_go(world, trace, policy):
    """More adapters than their memory holds at once: they are evicted, come back into other rows, and move together where
    rows are free but scattered; no answer changes."""
    import dataclasses

    from traces.request import Adapter

    adapters = tuple(Adapter(f"lora-{i:03d}", (8, 128, 17, 64, 33, 96)[i % 6]) for i in range(200))
    asked = np.random.default_rng(0).integers(0, 200, 60).astype(np.int32)
    asked[30:] = asked[:30]  # everybody comes twice
    requests = dataclasses.replace(trace(60, images=0, output=3, span_ns=60_000_000), adapters=adapters, adapter=asked)
    expected = world("tiny-llava", requests, pages=400).logits()
    rows = 320
    w = world("tiny-llava", requests, policy, pages=60, adapter_bytes=rows * 2 * 4 * (3 * 64 + 192 + 128))
    assert w.runner.lora.pool.rows == rows < sum(adapter.rank for adapter in adapters) / 30
    compact, moves = w.runner.lora.compact, []
    w.runner.lora.compact = lambda: (moves.append(1), compact())
    for request, got in w.logits().items():
        torch.testing.assert_close(got, expected[request], rtol=0, atol=2e-5)
    assert w.ledger.journal.counters["adapter_evictions"] > 10
    assert w.ledger.journal.counters["adapter_loads"] > len(set(asked.tolist()))
    assert moves


def test_adapters_move_together_without_memory_of_their_own(world, trace, monkeypatch):
    """By less than they are long, so that old and new rows overlap."""
    import dataclasses

    from traces.request import Adapter

    adapters = tuple(Adapter(f"lora-{i}", rank) for i, rank in enumerate((16, 64, 33)))
    w = world("tiny-llava", dataclasses.replace(trace(1), adapters=adapters), "slora")
    lora, loader, pool = w.runner.lora, w.runner.loader, w.runner.lora.pool
    for adapter in range(3):
        loader.start(adapter)
        lora.installed(adapter)
    loader.drain()

    def factors(adapter):
        a, b = zip(*(pool.views(adapter, key) for key in lora._keys), strict=True)
        return [view.clone() for views in (*a, *b) for view in views]

    expected = {adapter: factors(adapter) for adapter in (1, 2)}
    lora.evict(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", lambda *given, **options: pytest.fail("memory may run out here"))
        lora.compact()
    assert [pool.offsets[adapter] for adapter in (1, 2)] == [0, 64]
    for adapter, views in expected.items():
        assert all(map(torch.equal, factors(adapter), views))


def test_a_folded_adapter_that_moved_folds_in_again_right(world, trace):
    w = world("tiny-llava", trace(1), "valora", adapter_bytes=48 * 2 * 4 * (3 * 64 + 192 + 128))
    lora, loader = w.runner.lora, w.runner.loader
    loader.start(0), loader.start(1)
    loader.drain()
    lora.installed(0), lora.installed(1)
    plain = w.decoder.weight((0, "qkv")).clone()
    lora.fold(1)
    folded = w.decoder.weight((0, "qkv")).clone()
    before = lora.pool.offsets[1]
    lora.evict(0)
    lora.compact()
    assert lora.pool.offsets[1] != before
    assert torch.equal(w.decoder.weight((0, "qkv")), folded)
    loader.start(2)  # writes where the folded one lay
    loader.drain()
    lora.installed(2)
    for adapter, expected in ((2, None), (1, folded), (-1, plain)):
        lora.fold(adapter)
        if expected is not None:
            torch.testing.assert_close(w.decoder.weight((0, "qkv")), expected, rtol=0, atol=0)
    lora.evict_all()


def test_adapters_that_do_not_fit_their_memory_are_refused_by_name(world, trace):
    from engine.models import ModelError

    with pytest.raises(ModelError, match="the largest takes 65536; change --adapter-memory"):
        world("tiny-llava", trace(1), adapter_bytes=1000)
    assert world("tiny-llava", trace(1), adapter_bytes=1 << 40).runner.lora.pool.rows == 3 * 16, "no more than they need"

"""What a GPU will be asked to capture, as far as a CPU can tell: it never waits, computes in bf16, can be done without."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("yaml")
pytest.importorskip("scipy")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from engine.fusion import checkpoint, graphed, pretrain, train, workbench  # noqa: E402
from engine.fusion.domains import load_domains  # noqa: E402
from engine.fusion.evaluate import evaluate  # noqa: E402
from engine.fusion.graphed import Graphs  # noqa: E402
from engine.models import load_checkpoint  # noqa: E402

SIZE = pretrain.Size(32, 2, 64, 2, 4, steps=2, batch=4, drawings=24, checkpoint_every=2)
WORDS = ["what is shown is it red where is it yes no spot lava moss [ ] , ;"]
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "unique2", "item")
"""Operators whose result, or whose input, is on the host: a stream that is captured refuses them."""


class Seen(TorchDispatchMode):
    """Names of all operators that run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(base model, YAML of domains of classes, boxes, one box, and words)."""
    from PIL import Image

    root, lines = tmp_path_factory.mktemp("world"), ["domains:"]
    for name, task in (("ground", "classify"), ("spots", "detect"), ("spot", "refer"), ("red", "vqa")):
        (root / name).mkdir()
        rng, rows = np.random.default_rng(len(name)), []
        for number in range(18):
            label = ("lava", "moss")[number % 2]
            pixels = rng.integers(0, 90, (64, 64, 3)).astype(np.uint8)
            pixels[8:24, 8:24] = 255
            Image.fromarray(pixels).save(root / name / f"{number}.png")
            split = ("train", "decide", "heldout")[number // 6]
            row = {"image": f"{number}.png", "split": split, "question": "what is shown"}
            row |= {"boxes": [{"label": "spot", "box": [8, 8, 24, 24]}]} if "spot" in name else {"label": label}
            rows.append(json.dumps(row) + "\n")
        (root / name / "rows.jsonl").write_text("".join(rows))
        told = f"task: {task}, head: {str(task != 'vqa').lower()}, data: {name}/rows.jsonl, floor: {{relative: 0.7}}"
        lines.append(f"  - {{name: {name}, {told}}}")
    (root / "domains.yaml").write_text("\n".join(lines) + "\n")
    return pretrain.pretrain(root / "base", SIZE, WORDS, device="cpu"), root / "domains.yaml"


def bench_of(world, dtype=torch.float32, monkeypatch=None):
    base, yaml = world
    if monkeypatch is not None:
        load = load_checkpoint
        monkeypatch.setattr(workbench, "load_checkpoint", lambda *a, **k: load(*a, **(k | {"dtype": dtype})))
    return workbench.open_workbench(base, load_domains(yaml), rank=4, alpha=8.0, dropout=0.1, device="cpu")


@pytest.mark.parametrize("name", ["ground", "spots", "spot", "red"])
def test_a_step_trains_in_bf16_with_padded_batches_as_on_a_gpu(world, monkeypatch, name):
    """The adapter, its gradients and the head are float32 beside a bf16 model, and nothing meets in two types."""
    torch.manual_seed(0)  # dropout's, whatever tests ran before
    bench = bench_of(world, torch.bfloat16, monkeypatch)
    monkeypatch.setattr(workbench.Workbench, "graphed", True)
    assert bench.model.dtype == torch.bfloat16
    head = train.new_head(bench, [name], 0)
    parameters = bench.lora | dict(head.named_parameters())
    optimizer = checkpoint.optimizer_of(parameters, 1e-2, 0.0)
    losses = []
    with train.repeatable(bench):
        for _ in range(8):
            bench.peft.train()
            optimizer.zero_grad(set_to_none=True)
            loss = train.batch_loss(bench, head, name, range(6))
            loss.backward()
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in parameters.values())
            optimizer.step()
            losses.append(float(loss.detach()))
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]
        assert 0 <= evaluate(bench, name, "decide", head).value <= 1
        assert 0 <= evaluate(bench, name, "decide", None).value <= 1


def test_what_is_captured_of_a_training_step_never_waits_for_the_device(world, monkeypatch):
    bench = bench_of(world)
    monkeypatch.setattr(workbench.Workbench, "graphed", True)
    sample = bench.sample("red", "train")
    packed = bench.wording.pack([(sample.plain[i], sample.answers[i]) for i in range(4)], sample.answered_length)
    bench.peft.train()
    bench.training_hidden(sample, range(4), packed)  # makes the module
    (module,) = bench.graphs._kept.values()
    embedded = bench.embedded(sample, range(4), packed)
    with train.repeatable(bench), Seen() as seen:
        module(embedded).square().mean().backward()
    assert "native_dropout" in seen.names or "bernoulli_" in seen.names
    assert not seen.names & set(WAITS)


def test_what_is_captured_of_the_pre_training_never_waits_for_the_device(world):
    base, _ = world
    model = load_checkpoint(base, dtype=torch.float32, device="cpu").hf.requires_grad_(True).train()
    wording = SimpleNamespace(interleave=lambda words, features: torch.cat([words, *features.unbind(1)], 1))
    module = pretrain._Seeing(model, wording, 3 + 2 * 64)
    pixels, words = torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8), torch.randn(2, 3, 64, requires_grad=True)
    with Seen() as seen:
        module(pixels, words).square().mean().backward()
    assert words.grad is not None
    assert not seen.names & set(WAITS)


def test_the_ops_that_wait_are_seen():
    """The yardstick of the two tests above."""
    with Seen() as seen:
        float(torch.ones(2).sum())
        torch.ones(3).nonzero()
        torch.tensor([1.0])
    assert {"_local_scalar_dense", "nonzero", "lift_fresh"} <= seen.names


@pytest.fixture
def fake_gpu(monkeypatch):
    """`Graphs` on a machine without a GPU: what `torch.cuda` would do is noted. It returns (notes, a module, its inputs)."""
    notes = []
    for name in ("graph_pool_handle", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: name)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: notes.append(("stream", stream)))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    generator = SimpleNamespace(graphsafe_set_state=lambda state: notes.append(("generator", state)))
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(graphsafe_get_state=lambda: "fresh"))
    return notes, torch.nn.Linear(4, 4), (torch.randn(3, 4, requires_grad=True),)


def test_where_nothing_can_be_captured_steps_run_plainly_and_the_reason_is_said(fake_gpu, monkeypatch):
    notes, module, inputs = fake_gpu
    said = []
    graphs = Graphs(said.append)

    def fails(module, samples, **_):
        module.forward = None
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    graphs._captured((3,), module, inputs)
    assert said == ["no CUDA graph for (3,): operation not permitted when stream is capturing; steps run without"]
    assert notes == [("stream", "current_stream"), ("generator", "fresh")]
    assert not graphs._capture
    assert module(*inputs).shape == (3, 4)


@pytest.mark.parametrize("off", ["output", "gradients"])
def test_a_graph_that_computes_something_else_is_not_used(fake_gpu, monkeypatch, off):
    _, module, inputs = fake_gpu
    said = []
    graphs, right = Graphs(said.append), module(*inputs).detach()

    def garbage(module, samples, **_):
        plain = module.forward
        if off == "output":
            module.forward = lambda x: plain(x) * 1.5
        else:  # the right output of wrong inputs' gradients
            module.forward = lambda x: plain(x).detach() + 3 * (plain(x) - plain(x).detach())

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", garbage)
    graphs._captured((3,), module, inputs)
    assert f"its {off} differ" in said[0]
    assert torch.equal(module(*inputs), right)


def test_a_graph_that_computes_the_same_is_used(fake_gpu, monkeypatch):
    notes, module, inputs = fake_gpu
    calls, graphs = [], Graphs(pytest.fail)

    def faithful(module, samples, **_):
        plain = module.forward
        module.forward = lambda x: calls.append(1) or plain(x) + 1e-3

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", faithful)
    graphs._captured((3,), module, inputs)
    module(*inputs)
    assert len(calls) == 2
    assert not notes
    assert graphed.DIFFERENCE < 0.5

"""What graphs are fed: buckets, padding rows, folded slots. Without a GPU a `graph` here is its step, run anew."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.graphs import (  # noqa: E402
    BRANCHED,
    MIXED,
    PLAIN,
    DecodeGraphs,
    PackedGraphs,
    buckets_up_to,
    token_buckets_up_to,
)
from engine.vision import VisionGraphs  # noqa: E402


class Steps:
    """Steps instead of graphs; notes which kinds and buckets ran, and shows the logits to the runner's observer."""

    def __init__(self, w, **sizes):
        decoder = SimpleNamespace(
            embed=w.decoder.embed, forward=w.decoder.forward, head=w.decoder.head, shape=w.decoder.shape, logits=self._logits
        )
        super().__init__(decoder, w.runner.cache, w.runner.lora, w.runner.last_tokens, width=w.runner.width, **sizes)
        self._w, self.ran = w, set()

    def _logits(self, hidden):
        self._seen = self._w.decoder.logits(hidden)
        return self._seen

    def _record(self, step):
        return SimpleNamespace(replay=step)


class ReplayedDecodes(Steps, DecodeGraphs):
    def replay(self, mode, merged, decodes):
        n = len(decodes.sequences)
        self.ran.add((self._kind(mode), self._bucket(n)))
        tokens = super().replay(mode, merged, decodes).clone()
        self._w.runner.observer(decodes.sequences, self._seen[:n])
        return tokens


class ReplayedChunks(Steps, PackedGraphs):
    def replay(self, mode, merged, step):
        self.ran.add((self._kind(mode), self._bucket(len(step.ids))))
        tokens, final = super().replay(mode, merged, step)
        self._w.runner.observer(step.outputs, self._seen[: len(step.outputs)])
        return tokens.clone(), final


@pytest.mark.parametrize(
    ("name", "policy", "kinds"),
    [
        ("tiny-qwen2-vl", "base", {PLAIN}),
        ("tiny-llava", "slora", {BRANCHED}),
        ("tiny-qwen2-vl", "valora", {PLAIN, BRANCHED, MIXED}),
    ],
)
def test_padded_buckets_give_what_eager_steps_give(world, trace, model, monkeypatch, name, policy, kinds):
    adapter = np.array([0, 0, 1, 0, -1, 0, 0, 2, 0, 0, 1, 0, 0, -1], np.int32)
    tokens = model(name)[0].shape.image_tokens
    requests = trace(14, 3, image_tokens=tokens, output=20, span_ns=3_000_000, adapter=adapter)
    options = {"theta_s": "0.004"} if policy == "valora" else None
    expected = world(name, requests, policy, limits=(6, 64, 256), options=options).logits()
    w = world(name, requests, policy, limits=(6, 64, 256), options=options)
    monkeypatch.setattr(type(w.runner.lora), "capturable", lambda self, *, mixture: True)
    monkeypatch.setattr(type(w.runner.lora), "refresh", lambda self, batch, *, mixture: None)
    w.runner.graphs, w.runner.packed_graphs = ReplayedDecodes(w, max_batch=6), ReplayedChunks(w, max_batch=6, max_tokens=64)
    w.runner.graphs.capture()
    w.runner.packed_graphs.capture()
    got = w.logits()
    assert got.keys() == expected.keys()
    for request, rows in expected.items():
        torch.testing.assert_close(got[request], rows, rtol=0, atol=2e-5)
    assert {kind for kind, _ in w.runner.graphs.ran} == kinds
    assert any(bucket == 4 for _, bucket in w.runner.graphs.ran), "some batch of three was padded"
    assert {kind for kind, _ in w.runner.packed_graphs.ran} >= kinds - {PLAIN}
    assert {bucket for _, bucket in w.runner.packed_graphs.ran} >= {48, 64}


@pytest.mark.parametrize("images", [1, 3, 16, 21])
def test_padded_batches_of_images_give_their_features(model, images):
    class Encoded(VisionGraphs):
        def _record(self, step):
            return SimpleNamespace(replay=step)

    built, _ = model("tiny-llava")
    pixels = torch.randn(images, *built.shape.pixels, generator=torch.Generator().manual_seed(0))
    graphs = Encoded(built)
    assert not graphs._graphs
    plain = graphs.encode(pixels)
    graphs.capture()
    graphs.encode(torch.ones(16, *built.shape.pixels))  # leaves other pixels in every buffer
    torch.testing.assert_close(graphs.encode(pixels), plain, rtol=1e-5, atol=1e-5)
    assert plain.shape == (images, built.shape.image_tokens, built.shape.hidden)


def test_a_tower_that_no_graph_holds_is_launched_as_it_is(model, capsys):
    class Refused(VisionGraphs):
        def _record(self, step):
            raise RuntimeError("operation not permitted when stream is capturing")

    built, _ = model("tiny-llava")
    graphs = Refused(built)
    graphs.capture()
    assert "no graphs, launched kernel by kernel: operation not permitted" in capsys.readouterr().err
    assert graphs.encode(torch.zeros(2, *built.shape.pixels)).shape[0] == 2


def test_buckets():
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(6) == [1, 2, 4, 6]
    assert buckets_up_to(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert buckets_up_to(100)[-3:] == [80, 96, 100]
    assert token_buckets_up_to(50) == [16, 32, 48, 50]
    assert token_buckets_up_to(200)[-4:] == [128, 160, 192, 200]
    assert token_buckets_up_to(650)[-4:] == [512, 576, 640, 650]

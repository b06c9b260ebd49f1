"""The vision tower over many images at once: what transformers computes image by image, with graphs and without."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

FAMILIES = ("tiny-llava", "tiny-qwen2-vl")


@pytest.fixture
def pixels(model):
    def make(name, images, seed=0):
        size = model(name)[0].shape.pixels
        return torch.randn(images, *size, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def alone(model):
    """alone(name, pixels) -> features as transformers gives them, one image at a time."""

    def run(name, pixels):
        return torch.cat([model(name)[0].encode_images(pixels[i : i + 1]) for i in range(len(pixels))])

    return run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("images", [1, 3, 17])
def test_a_batch_of_images_equals_each_alone(model, pixels, alone, name, images):
    from engine.vision import VisionGraphs

    batch = pixels(name, images)
    got = VisionGraphs(model(name)[0]).encode(batch)
    torch.testing.assert_close(got, alone(name, batch), rtol=1e-5, atol=1e-5)
    assert got.shape == (images, model(name)[0].shape.image_tokens, model(name)[0].shape.hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_of_either_tower_leave_nothing_of_the_last_batch(model, pixels, alone, name):
    from engine.vision import BUCKETS, VisionGraphs

    class Encoded(VisionGraphs):
        def _record(self, step):
            return SimpleNamespace(replay=step)

    graphs = Encoded(model(name)[0])
    graphs.capture()
    assert set(graphs._graphs) == set(BUCKETS)
    graphs.encode(pixels(name, 16, seed=1))
    batch = pixels(name, 5)
    torch.testing.assert_close(graphs.encode(batch), alone(name, batch), rtol=1e-5, atol=1e-5)


def test_qwens_tower_attends_once_a_layer_and_asks_the_host_nothing(model, pixels, monkeypatch):
    from engine.qwen_vision import QwenVision

    built, _ = model("tiny-qwen2-vl")
    tower = QwenVision(built)
    tower(pixels("tiny-qwen2-vl", 1))
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *parts: (calls.append(len(parts[0])), attend(*parts))[1]
    )
    for ask in ("item", "tolist"):
        monkeypatch.setattr(torch.Tensor, ask, lambda *_: pytest.fail("a tensor was read on the host"))
    tower(pixels("tiny-qwen2-vl", 9))
    assert calls == [9] * len(built.hf.model.visual.blocks)

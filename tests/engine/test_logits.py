"""The engine's logits are transformers' own: in prefill, chunked prefill and decode, for text and images side by side."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.models import FAMILIES as CLASSES  # noqa: E402
from engine.models import config_of, shape_of  # noqa: E402
from engine.positions import prompt_positions  # noqa: E402

FAMILIES = ("tiny-llava", "tiny-qwen2-vl")
TOLERANCE = 2e-5


def truth(model, sequence, made_up):
    """transformers' logits [tokens, vocab] for a finished sequence, by itself and in one piece."""
    shape = model.shape
    ids = torch.from_numpy(np.concatenate([sequence.prompt.ids, np.array(sequence.generated[:-1], np.int32)])).long()[None]
    inputs = {}
    if sequence.prompt.images:
        pixels = torch.stack([made_up.pixels(key) for key in sequence.prompt.images])
        inputs["pixel_values"] = pixels
        if shape.mrope:
            inputs["pixel_values"] = pixels.flatten(0, 1)
            inputs["image_grid_thw"] = torch.tensor([[1, *(2 * side for side in shape.grid)]] * len(pixels))
    if shape.mrope:
        positions, _ = prompt_positions(shape, len(sequence.prompt.ids), sequence.prompt.image_starts)
        rest = np.arange(positions.shape[1], ids.shape[1], dtype=np.int32) + sequence.delta
        inputs["position_ids"] = torch.from_numpy(np.concatenate([positions, np.tile(rest, (3, 1))], axis=1)).long()[:, None]
    with torch.inference_mode():
        return model.hf(input_ids=ids, use_cache=False, **inputs).logits[0]


@pytest.fixture
def compared(world):
    """Run a world and return, by request, the largest difference from transformers over all tokens it got."""

    def run(w):
        seen = {}

        def observe(sequences, logits):
            for sequence, row in zip(sequences, logits, strict=True):
                seen.setdefault(sequence.id, (sequence, []))[1].append(row.clone())

        w.runner.observer = observe
        w.run()
        worst = {}
        for request, (sequence, rows) in seen.items():
            expected = truth(w.model, sequence, w.runner.made_up)[len(sequence.prompt.ids) - 1 :]
            assert len(rows) == len(expected) == len(sequence.generated)
            worst[request] = float((torch.stack(rows) - expected).abs().max())
        return worst

    return run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [24, 512], ids=["chunked", "whole"])
def test_logits_equal_transformers_for_a_mixed_batch(world, trace, compared, model, name, chunk):
    tokens = model(name)[0].shape.image_tokens
    requests = trace(8, image_tokens=tokens, output=5)
    worst = compared(world(name, requests, "base", limits=(4, chunk, 256)))
    assert len(worst) == 8
    assert requests.images.max() == 2
    assert max(worst.values()) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_weights_leave_transformers_forward_as_it_was(name):
    from engine.decoder import Decoder
    from engine.models import random_model

    model = random_model(name, dtype=torch.float32, device="cpu", seed=2)
    ids = torch.arange(5, 20)[None]
    with torch.inference_mode():
        before = model.hf(input_ids=ids, use_cache=False).logits
        decoder = Decoder(model)
        assert torch.equal(before, model.hf(input_ids=ids, use_cache=False).logits)
    attention = model.hf.model.language_model.layers[1].self_attn
    assert attention.k_proj.weight.data_ptr() == decoder.weight((1, "qkv"))[attention.q_proj.weight.shape[0] :].data_ptr()
    assert Decoder(model).weight((1, "qkv")).data_ptr() == decoder.weight((1, "qkv")).data_ptr()


def test_positions_are_those_of_transformers():
    model_config = config_of("tiny-qwen2-vl")
    shape = shape_of("tiny-qwen2-vl", model_config)
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    n = shape.image_tokens
    ids = [5, 6, *[shape.image_token_id] * n, 7, *[shape.image_token_id] * n, 8, 9]
    grid = torch.tensor([[1, 2 * shape.grid[0], 2 * shape.grid[1]]] * 2)
    kinds = (torch.tensor(ids) == shape.image_token_id).int()[None]
    rope = Qwen2VLModel._from_config(model_config).get_rope_index(torch.tensor(ids)[None], kinds, grid)
    positions, delta = prompt_positions(shape, len(ids), (2, 3 + n))
    assert (positions == rope[0][:, 0].numpy()).all()
    assert delta == int(rope[1])


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes", "image_tokens"),
    [
        ("llava-1.5-7b", 7.063e9, 524_288, 576),
        ("llava-1.5-13b", 13.351e9, 819_200, 576),
        ("qwen2-vl-7b", 8.291e9, 57_344, 256),
    ],
)
def test_configurations_are_those_of_the_published_models(name, parameters, kv_bytes, image_tokens):
    import transformers

    config = config_of(name)
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[config.model_type])(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    shape = shape_of(name, config)
    assert shape.kv_bytes_per_token(torch.bfloat16) == kv_bytes
    assert shape.image_tokens == image_tokens



@pytest.mark.parametrize("name", FAMILIES)
def test_made_up_prompts_agree_where_their_prefixes_do(model, name):
    from engine.prompts import MadeUp
    from traces.request import Request

    shape = model(name)[0].shape
    n = shape.image_tokens
    made_up, again = (MadeUp(shape, 3, dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    one = made_up.prompt(Request(1, 0, n + 30, 1, images=1, prefix=((5 << 16, n), (77, 20))))
    two = made_up.prompt(Request(2, 0, n + 40, 1, images=1, prefix=((5 << 16, n), (77, 20), (78, 5))))
    three = made_up.prompt(Request(3, 0, n + 30, 1, images=1))
    assert (one.ids[: n + 20] == two.ids[: n + 20]).all()
    assert not (one.ids[n + 20 :] == two.ids[n + 20 : n + 30]).all()
    assert not (one.ids[n:] == three.ids[n:]).all()
    assert (one.ids[:n] == shape.image_token_id).all()
    assert shape.image_token_id not in one.ids[n:]
    assert one.images == two.images != three.images
    assert made_up.pixels(one.images[0]).shape == shape.pixels
    assert torch.equal(made_up.pixels(one.images[0]), again.pixels(two.images[0]))
    assert not torch.equal(made_up.pixels(one.images[0]), made_up.pixels(three.images[0]))
    assert (again.prompt(Request(3, 0, n + 30, 1, images=1)).ids == three.ids).all()

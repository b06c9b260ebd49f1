"""Task heads end a request after its prefill; images are checked before they are decoded."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

from engine.heads import FILE, Detection, HeadError, random_head, read_head  # noqa: E402
from engine.images import ImageError, arranged, load_image  # noqa: E402
from engine.models import config_of, shape_of  # noqa: E402
from engine.peft_format import random_adapter, write_adapter  # noqa: E402

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def shape(model):
    return model("tiny-llava")[0].shape


@pytest.mark.parametrize("chunk", [5, 512], ids=["the queries fall into several chunks", "one chunk"])
@pytest.mark.parametrize("queries", [0, 3], ids=["classifier", "detector"])
def test_a_head_request_ends_after_its_prefill(world, trace, shape, tmp_path, queries, chunk):
    head = random_head(shape, 7, torch.Generator().manual_seed(0), queries)
    weights = random_adapter(shape, "lora-0", 4, ("qkv", "o"), np.random.default_rng(0))
    write_adapter(tmp_path, weights, "tiny-llava", head)
    requests = trace(2, images=0, output=1, adapters=1, adapter=np.zeros(2, np.int32), head=np.array([True, False]))
    w = world("tiny-llava", requests, root=tmp_path, limits=(4, chunk, 256))
    w.run()
    answer = w.runner.answers[0]
    assert answer.tokens == []
    assert len(w.runner.answers[1].tokens) == requests.output_tokens[1]
    assert w.runner.answers[1].head is None
    if queries:
        assert isinstance(answer.head, Detection)
        assert answer.head.boxes.shape == (queries, 4)
        assert 0 <= float(answer.head.boxes.min()) <= float(answer.head.boxes.max()) <= 1
        assert answer.head.classes.shape == answer.head.scores.shape == (queries,)
        assert 1 / 7 <= float(answer.head.scores.min()) <= float(answer.head.scores.max()) <= 1
    else:
        assert answer.head in range(7)


def test_chunks_do_not_change_what_a_detector_says(world, trace, shape, tmp_path):
    weights = random_adapter(shape, "lora-0", 4, ("qkv", "o"), np.random.default_rng(0))
    write_adapter(tmp_path, weights, "tiny-llava", random_head(shape, 7, torch.Generator().manual_seed(0), 4))
    requests = trace(1, images=0, adapters=1, output=1, adapter=np.zeros(1, np.int32), head=np.ones(1, bool))
    boxes = []
    for chunk in (5, 512):
        w = world("tiny-llava", requests, root=tmp_path, limits=(4, chunk, 256))
        w.run()
        boxes.append(w.runner.answers[0].head.boxes)
    torch.testing.assert_close(boxes[0], boxes[1], rtol=0, atol=1e-5)


DETECTS = {"boxes.weight": torch.zeros(4, 64), "boxes.bias": torch.zeros(4)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes.weight": torch.zeros(7, 63)}, "classes.weight has shape"),
        ({"classes.bias": torch.zeros(6)}, "classes.bias has shape"),
        ({"classes.bias": torch.full((7,), torch.inf)}, "not finite"),
        ({"other": torch.zeros(1)}, "expected classes"),
        ({"boxes.weight": torch.zeros(4, 64)}, "expected classes"),
        ({"classes.weight": torch.zeros(0, 64), "classes.bias": torch.zeros(0)}, r"1\.\.100000 classes"),
        ({"classes.bias": torch.zeros(7, dtype=torch.int32)}, "classes.bias is I32; expected one of F32, F16, BF16"),
        ({"classes.bias": torch.zeros(7, dtype=torch.float8_e4m3fn)}, "classes.bias is F8_E4M3"),
        ({"classes.bias": torch.full((7,), 1e30)}, "not finite in float16"),
        (DETECTS | {"queries": torch.tensor([2.7])}, "queries is F32; expected one of I64, I32"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path, shape, change, words):
    save_file(random_head(shape, 7, torch.Generator().manual_seed(0)) | change, tmp_path / FILE)
    with pytest.raises(HeadError, match=words):
        read_head(tmp_path, shape, torch.float16)


def test_no_head_is_no_error(tmp_path, shape):
    assert read_head(tmp_path, shape) is None
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(HeadError, match="cannot be read as safetensors"):
        read_head(tmp_path, shape)
    (tmp_path / FILE).rename(tmp_path / "elsewhere")
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HeadError, match="no file but a link or folder"):
        read_head(tmp_path, shape)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(HeadError, match="no file but a link or folder"):
        read_head(tmp_path, shape)


def test_an_image_file_becomes_pixels_of_the_model(tmp_path, shape):
    Image.new("RGB", (300, 100), (255, 0, 0)).save(tmp_path / "red.png")
    pixels = load_image(tmp_path / "red.png", shape)
    assert pixels.shape == (3, shape.image_size, shape.image_size)
    assert float(pixels[0].min()) == pytest.approx((1 - 0.48145466) / 0.26862954)
    assert float(pixels[2].max()) == pytest.approx((0 - 0.40821073) / 0.27577711)


def test_qwen2_vl_patches_are_those_of_transformers():
    from transformers import Qwen2VLImageProcessorPil

    shape = shape_of("tiny-qwen2-vl", config_of("tiny-qwen2-vl"))
    raw = np.random.default_rng(0).integers(0, 256, (3, shape.image_size, shape.image_size), np.uint8)
    processor = Qwen2VLImageProcessorPil(min_pixels=shape.image_size**2, max_pixels=shape.image_size**2)
    expected = processor(Image.fromarray(raw.transpose(1, 2, 0)), return_tensors="pt")["pixel_values"]
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    got = arranged((torch.from_numpy(raw).float() / 255 - mean) / deviation, shape)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def oriented(path, size, orientation=None):
    """A file of noise; with EXIF's orientation, where it is given."""
    grain = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    ("size", "orientation"),
    [((427, 640), None), ((640, 427), None), ((333, 500), None), ((57, 101), None), ((3, 4), None), ((336, 336), None)]
    + [((427, 640), orientation) for orientation in range(1, 9)],
)
def test_llava_s_pixels_are_those_of_transformers_bit_for_bit(tmp_path, shape, size, orientation):
    from transformers import CLIPImageProcessorPil
    from transformers.image_utils import load_image as loaded

    path, side = oriented(tmp_path / "x.png", size, orientation), shape.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    assert torch.equal(load_image(path, shape), processor(loaded(str(path)), return_tensors="pt")["pixel_values"][0])


def test_qwen2_vl_sees_an_image_upright(tmp_path):
    tiny = shape_of("tiny-qwen2-vl", config_of("tiny-qwen2-vl"))
    path = oriented(tmp_path / "x.png", (61, 90), 6)
    upright = tmp_path / "upright.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_270).save(upright)
    assert torch.equal(load_image(path, tiny), load_image(upright, tiny))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_boxes_are_of_the_upright_image(tmp_path, family):
    pytest.importorskip("peft")
    pytest.importorskip("scipy")
    from engine.fusion.metrics import Box
    from engine.fusion.workbench import Workbench

    bench = SimpleNamespace(model=SimpleNamespace(shape=SimpleNamespace(family=family)))
    path = oriented(tmp_path / "x.png", (90, 60), 6)  # 60 x 90 upright; LLaVA sees the rows 15 to 75
    (box,) = Workbench._scaled(bench, path, (Box("car", 15, 30, 45, 60),))
    assert box[1:5] == pytest.approx((0.25, 0.25, 0.75, 0.75) if family == "llava" else (0.25, 1 / 3, 0.75, 2 / 3))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"<svg/>"])
def test_what_is_no_image_is_refused_without_saying_what_the_decoder_met(tmp_path, shape, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png: is not one of JPEG, PNG, WEBP, BMP, GIF, or is damaged$"):
        load_image(tmp_path / "x.png", shape)


def test_a_truncated_image_is_refused(tmp_path, shape):
    Image.new("RGB", (200, 200), (9, 9, 9)).save(tmp_path / "x.bmp")
    data = (tmp_path / "x.bmp").read_bytes()
    (tmp_path / "x.bmp").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="is damaged"):
        load_image(tmp_path / "x.bmp", shape)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (9000, 9000)])
def test_too_small_and_too_large_images_are_refused(tmp_path, shape, size):
    Image.new("1", size).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match="pixels; from 2 a side to 64000000"):
        load_image(tmp_path / "x.png", shape)


def test_nothing_is_fetched(shape):
    with pytest.raises(ImageError, match="is a URL; images come from local files only"):
        load_image("https://example.org/x.png", shape)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("/no/such/file.png", shape)

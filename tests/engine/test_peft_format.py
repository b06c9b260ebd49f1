"""Adapters on disk: PEFT reads what we write, we read what PEFT writes, and whatever is wrong is refused by name."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from engine.adapters import packed  # noqa: E402
from engine.decoder import ALL_LINEAR, projections_of  # noqa: E402
from engine.peft_format import AdapterError, folder_of, random_adapter, read_adapter, write_adapter  # noqa: E402

TARGETS = ("qkv", "o", "gate_up", "down")


@pytest.fixture
def shape(model):
    return model("tiny-llava")[0].shape


@pytest.fixture
def root(tmp_path, shape):
    """A folder with one good adapter, `good`, of rank 4."""
    write_adapter(tmp_path, random_adapter(shape, "good", 4, TARGETS, np.random.default_rng(0)), "tiny-llava")
    return tmp_path


def change_config(root, **changes):
    path = root / "good" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(root, change):
    path = root / "good" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_what_is_written_is_read_back(root, shape):
    written = random_adapter(shape, "good", 4, TARGETS, np.random.default_rng(0))
    read = read_adapter(root, "good", shape)
    assert (read.rank, read.scale) == (4, 2.0)
    assert read.factors.keys() == written.factors.keys()
    assert len(read.factors) == 2 * 7
    for place, (a, b) in read.factors.items():
        assert torch.equal(a, written.factors[place][0])
        assert torch.equal(b, written.factors[place][1])


@pytest.mark.parametrize(
    "layout",
    [
        "base_model.model.language_model.model.layers.{}",  # LLaVA before transformers 5
        "base_model.model.model.layers.{}",  # Qwen2-VL before transformers 5
        "model.language_model.layers.{}",  # without PEFT's prefix
    ],
)
def test_older_key_layouts_are_read(root, shape, layout):
    before = read_adapter(root, "good", shape)
    old = "base_model.model.model.language_model.layers.{}"

    def renamed(tensors):
        for layer in range(shape.layers):
            tensors = {k.replace(old.format(layer), layout.format(layer)): v for k, v in tensors.items()}
        return tensors

    change_weights(root, renamed)
    after = read_adapter(root, "good", shape)
    assert all(torch.equal(after.factors[place][0], a) for place, (a, _) in before.factors.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora = true is not supported"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight has shape \[4, 64\], expected \[8, 64\]"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' 0 is not a whole number in 1..256"),
        ({"rank_pattern": ["q_proj"]}, r'rank_pattern \["q_proj"\] is not an object of patterns'),
        ({"rank_pattern": {"(": 4}}, "is no pattern"),
        ({"rank_pattern": {"(a+)+": 4}}, "without a repeated group"),
        ({"alpha_pattern": {".*a.*b.*c.*": 4}}, "at most 3 repetitions"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern 'q_proj' '8' is not a number"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"peft_type": "IA3"}, "only LORA is supported"),
        ({"r": 0}, "r 0 is not a whole number in 1..256"),
        ({"r": "4"}, "r '4' is not"),
        ({"r": 8}, r"lora_A.weight has shape \[4, 128\], expected \[8, 128\]"),
        ({"lora_alpha": None}, "lora_alpha None is not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan is not a number"),
        ({"lora_alpha": 1e300}, r"lora_alpha 1e\+300 is not a number that float32 holds"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000000000000000000000000000000000000000 is not a number"),
        ({"use_rslora": 1}, "use_rslora 1 is neither true nor false"),
        ({"use_rslora": "true"}, "use_rslora 'true' is neither"),
    ],
)
def test_a_configuration_that_would_change_the_result_is_refused(root, shape, changes, words):
    change_config(root, **changes)
    with pytest.raises(AdapterError, match=words):
        read_adapter(root, "good", shape)


def test_an_unexpected_rank_is_refused(root, shape):
    with pytest.raises(AdapterError, match="rank 4, but 8 was asked for"):
        read_adapter(root, "good", shape, rank=8)


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def with_key(key, tensor):
    return lambda tensors: tensors | {key: tensor}


PREFIX = "base_model.model.model.language_model.layers.0."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("layers.1.self_attn.k_proj.lora_B"), "layer 1 self_attn.k_proj has lora_A but not the other half"),
        (lambda tensors: {}, "holds no weights"),
        (with_key(PREFIX + "self_attn.q_proj.lora_A.weight", torch.zeros(4, 63)), r"expected \[4, 64\]"),
        (with_key(PREFIX + "self_attn.q_proj.lora_A.weight", torch.zeros(64)), r"has shape \[64\]"),
        (with_key(PREFIX + "self_attn.q_proj.lora_A.weight", torch.zeros(4, 64, dtype=torch.int32)), "is I32"),
        (with_key(PREFIX + "self_attn.q_proj.lora_A.weight", torch.full((4, 64), torch.nan)), "not finite"),
        (with_key(PREFIX + "self_attn.q_proj.lora_A.default.weight", torch.zeros(4, 64)), "a second time"),
        (with_key(PREFIX.replace("0.", "9.") + "mlp.up_proj.lora_A.weight", torch.zeros(4, 64)), "the model has 2 layers"),
        (with_key("model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(1)), "vision side"),
        (with_key("base_model.model.lm_head.weight", torch.zeros(1)), "no LoRA weight of the language model"),
    ],
)
def test_weights_that_do_not_fit_are_refused(root, shape, change, words):
    change_weights(root, change)
    with pytest.raises(AdapterError, match=words):
        read_adapter(root, "good", shape)


def test_values_that_the_engine_s_type_cannot_hold_are_refused(root, shape):
    """Finite in the file's float32, infinite in 16 bit."""
    change_weights(root, with_key(PREFIX + "self_attn.q_proj.lora_B.weight", torch.full((64, 4), 1e5)))
    weights = read_adapter(root, "good", shape)
    projections = projections_of(shape, ALL_LINEAR)
    packed(weights, projections, shape.layers, torch.bfloat16, pinned=False)
    with pytest.raises(AdapterError, match=r"adapter 'good': .* beyond the range of float16"):
        packed(weights, projections, shape.layers, torch.float16, pinned=False)


def test_projections_outside_the_targets_are_refused(root, shape):
    with pytest.raises(AdapterError, match="down is not among the targets qkv, o; add --targets all"):
        read_adapter(root, "good", shape, ("qkv", "o"))


def test_pickles_are_never_opened(root, shape):
    weights = root / "good" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle, which is never loaded"):
        read_adapter(root, "good", shape)


@pytest.mark.parametrize("content", [b"", b"\x00" * 16, b"\xff" * 64])
def test_a_damaged_file_is_refused(root, shape, content):
    (root / "good" / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="is not safetensors"):
        read_adapter(root, "good", shape)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 4}', "[" * 100_000])
def test_a_damaged_configuration_is_refused(root, shape, text):
    (root / "good" / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"cannot be read as JSON|only LORA"):
        read_adapter(root, "good", shape)


@pytest.mark.parametrize("name", ["../good", "a/b", "/etc", "", ".", "..", "a\0b", ".hidden", "x" * 101, "good\n"])
def test_a_name_is_an_id_and_never_a_path(root, name):
    with pytest.raises(AdapterError, match="a name has letters"):
        folder_of(root, name)


def test_a_link_out_of_the_root_is_refused(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (root / "link").symlink_to(outside)
    with pytest.raises(AdapterError, match="leads out of"):
        folder_of(root, "link")


def test_a_configuration_that_is_a_link_is_refused(root, shape):
    config = root / "good" / "adapter_config.json"
    config.rename(root / "good" / "other.json")
    config.symlink_to(root / "good" / "other.json")
    with pytest.raises(AdapterError, match="is a link"):
        read_adapter(root, "good", shape)


def test_eva_adapters_are_plain_lora(root, shape):
    change_config(root, init_lora_weights="eva", eva_config={"rho": 2.0})
    assert read_adapter(root, "good", shape).rank == 4


def test_a_write_that_failed_is_in_nobodys_way(root, shape, monkeypatch):
    from engine import peft_format

    weights = random_adapter(shape, "new", 4, TARGETS, np.random.default_rng(0))
    with monkeypatch.context() as patch:
        patch.setattr(peft_format.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="no space left"):
            write_adapter(root, weights, "tiny-llava")
    with pytest.raises(AdapterError):
        folder_of(root, "new")
    write_adapter(root, weights, "tiny-llava")
    assert read_adapter(root, "new", shape).rank == 4


def test_nothing_half_written_and_nothing_overwritten(root, shape):
    weights = random_adapter(shape, "good", 4, TARGETS, np.random.default_rng(0))
    with pytest.raises(AdapterError, match="exists already"):
        write_adapter(root, weights, "tiny-llava")
    assert sorted(path.name for path in root.iterdir()) == ["good"]


def test_the_same_seed_gives_the_same_bytes(tmp_path, shape):
    for folder in ("one", "two"):
        write_adapter(tmp_path / folder, random_adapter(shape, "a", 8, TARGETS, np.random.default_rng(5)), "m")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / "a" / name).read_bytes() == (tmp_path / "two" / "a" / name).read_bytes()

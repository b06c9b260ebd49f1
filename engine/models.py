"""The models: LLaVA-1.5 (7B, 13B) and Qwen2-VL-7B as transformers builds them, and a tiny one of each family for a CPU.

A model comes from a checkpoint directory on this machine (safetensors only, no code of the checkpoint is run, nothing is
fetched) or from its configuration with random weights. Vision tower and projector run as transformers wrote them; the
decoder's weights are read by `engine.decoder`. It knows nothing of batches, caches and adapters.

Qwen2-VL at 448 x 448 stands in for Qwen-VL (256 tokens an image), which transformers does not have.
"""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.options import MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FAMILIES = {"llava": "LlavaForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}
VIDEO_IMAGES = {"llava": 3, "qwen2_vl": 6}
"""Images of a video request: VaLoRA (EuroSys 2025) takes 6, 3 for LLaVA, whose images have more tokens."""
QWEN_IMAGE_SIZE = 448
TINY_IMAGE_SIZE = 56
INIT_STD = 0.02
SKIPPED = re.compile(r"(^|\.)(vision_tower|visual)\.")
"""Tensors of a checkpoint that may go unread: of the vision tower, whose last norm and pooling head nobody asks for."""
ALIGNMENT_BYTES = 16


class ModelError(ValueError):
    """A model that cannot be built or is not supported. The message names the path or the value and the way out."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that batches, caches and traces depend on.

    image_tokens: prompt tokens of an image of image_size x image_size pixels; grid: their (rows, columns).
    mrope: sections of the rotary frequencies by (time, height, width), empty for plain rotary positions.
    """

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_context: int
    image_token_id: int
    image_size: int
    grid: tuple[int, int]
    video_images: int
    mrope: tuple[int, ...]
    eos: tuple[int, ...]

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape of an image as the vision tower takes it (`engine.images`)."""
        if self.family == "llava":
            return (3, self.image_size, self.image_size)
        patches = 4 * self.image_tokens
        return (patches, 2 * 3 * self.image_size**2 // patches)

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that keys and values of one token take in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Model:
    """A transformers model in inference mode, its shape, and where it came from (a name of MODELS, or a directory)."""

    hf: PreTrainedModel
    shape: ModelShape
    source: str
    random: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.hf.lm_head.weight.device

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[images, image_tokens, hidden] in prompt order, all images in one pass of the vision tower.

        pixels: [images, 3, size, size] for LLaVA; [images, patches, patch values] for Qwen2-VL (`engine.images`).
        """
        images = len(pixels)
        if self.shape.family == "llava":
            config = self.hf.config
            found = self.hf.model.get_image_features(
                pixels, vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            )  # fmt: skip
        else:
            merge = self.hf.config.vision_config.spatial_merge_size
            grid = torch.tensor([[1, *(side * merge for side in self.shape.grid)]] * images, device=pixels.device)
            found = self.hf.model.get_image_features(pixels.flatten(0, 1), image_grid_thw=grid)
        return torch.stack(list(found.pooler_output)).view(images, self.shape.image_tokens, self.shape.hidden)


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a model of MODELS, parameter for parameter that of the published checkpoint."""
    if name not in MODELS:
        raise ModelError(f"unknown model {name!r}; there are {', '.join(MODELS)}, or name a checkpoint directory")
    return _qwen2_vl(name) if "qwen2" in name else _llava(name)


def _llava(name: str) -> PreTrainedConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    hidden, inner, layers, heads = {
        "llava-1.5-7b": (4096, 11008, 32, 32), "llava-1.5-13b": (5120, 13824, 40, 40), "tiny-llava": (64, 128, 2, 4),
    }[name]  # fmt: skip
    tiny = name.startswith("tiny")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if not tiny:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=320 if tiny else 32064, max_position_embeddings=512 if tiny else 4096,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        image_size=TINY_IMAGE_SIZE if tiny else 336, patch_size=14, projection_dim=32 if tiny else 768, **vision
    )
    return LlavaConfig(
        text_config=text, vision_config=tower, image_token_id=300 if tiny else 32000, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip


def _qwen2_vl(name: str) -> PreTrainedConfig:
    from transformers import Qwen2VLConfig

    tiny = name.startswith("tiny")
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
    sections = [16, 24, 24]
    ids = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    ids |= {"vision_end_token_id": 151653}
    if tiny:
        text = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512,
        }  # fmt: skip
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
        sections = [2, 3, 3]
        ids = dict(zip(ids, (300, 301, 302, 303), strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text |= {"rms_norm_eps": 1e-6, "rope_parameters": rope, "tie_word_embeddings": False, "use_sliding_window": False}
    text |= {"bos_token_id": 1 if tiny else 151643, "eos_token_id": 2 if tiny else 151645}
    vision |= {"mlp_ratio": 4, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def shape_of(name: str, config: PreTrainedConfig) -> ModelShape:
    """The shape of a supported configuration. ModelError for one that the engine would run wrongly."""
    family, text = config.model_type, config.get_text_config()
    inner = {"llava": ("llama",), "qwen2_vl": ("qwen2_vl_text", "qwen2_vl")}.get(family, ())
    if text.model_type not in inner:
        raise ModelError(f"{name}: a {family} model on {text.model_type}; supported are LLaVA-1.5 on Llama and Qwen2-VL")
    rope = text.rope_parameters
    if rope.get("rope_type", "default") not in ("default", "mrope"):
        raise ModelError(f"{name}: rotary type {rope['rope_type']!r} is not supported, only 'default'")
    if getattr(text, "use_sliding_window", False):
        raise ModelError(f"{name}: sliding window attention is not supported")
    if text.hidden_act != "silu" or getattr(text, "mlp_bias", False):
        raise ModelError(f"{name}: hidden_act {text.hidden_act!r} or mlp_bias is not supported, only silu without bias")
    if getattr(text, "attention_bias", False):  # Llama's, on o_proj too; Qwen2-VL has one on q, k, v and no such setting
        raise ModelError(f"{name}: attention_bias is not supported; take a checkpoint without, as LLaVA-1.5 is published")
    vision = config.vision_config
    if family == "llava":
        size, side = vision.image_size, vision.image_size // vision.patch_size
        if config.vision_feature_select_strategy != "default":
            strategy = config.vision_feature_select_strategy
            raise ModelError(f"{name}: vision_feature_select_strategy {strategy!r} is not supported, only 'default'")
    else:
        size = QWEN_IMAGE_SIZE if text.hidden_size > 512 else TINY_IMAGE_SIZE
        side = size // vision.patch_size // vision.spatial_merge_size
    eos = text.eos_token_id
    return ModelShape(
        name=name, family=family, layers=text.num_hidden_layers, hidden=text.hidden_size,
        heads=text.num_attention_heads, kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size, vocab=text.vocab_size, max_context=text.max_position_embeddings,
        image_token_id=config.image_token_id, image_size=size, grid=(side, side), video_images=VIDEO_IMAGES[family],
        mrope=tuple(rope["mrope_section"]) if family == "qwen2_vl" else (),
        eos=tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else (),
    )  # fmt: skip


def random_model(name: str, *, dtype: torch.dtype, device: str, seed: int = 0, attention: str = "sdpa") -> Model:
    """A model of MODELS with normal(0, 0.02) weights, the same for the same seed, device and torch."""
    import transformers

    config = config_of(name)
    shape = shape_of(name, config)
    kind = getattr(transformers, FAMILIES[shape.family])
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        # _from_config writes into the configuration it is given, hence the copy
        hf = kind._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    return Model(_frozen(hf), shape, name, True)


def load_checkpoint(directory: str | Path, *, dtype: torch.dtype, device: str, attention: str = "sdpa") -> Model:
    """The model in a local directory. ModelError where it is not a supported checkpoint in safetensors."""
    import transformers

    path = Path(directory)
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}/config.json cannot be read ({error}); name a directory with a checkpoint") from None
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in FAMILIES:
        raise ModelError(f"{path}/config.json: model_type {family!r}; supported are {', '.join(FAMILIES)}")
    if "auto_map" in raw:
        raise ModelError(f"{path}/config.json: auto_map asks to run code of the checkpoint; this is never done")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no .safetensors; convert the checkpoint (pickled weights are never loaded)")
    kind = getattr(transformers, FAMILIES[family])
    hf, info = kind.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, use_safetensors=True, local_files_only=True,
        trust_remote_code=False, output_loading_info=True,
    )  # fmt: skip
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}")
    unread = sorted(key for key in info["unexpected_keys"] if not SKIPPED.search(key))
    if unread:
        raise ModelError(
            f"{path}: {len(unread)} tensors have no place in {FAMILIES[family]} ({', '.join(unread[:3])}): without them its "
            "answers would be wrong; take a checkpoint of that model"
        )
    hf = hf.to(device)
    for weight in (weight for weight in hf.parameters() if weight.data_ptr() % ALIGNMENT_BYTES):
        weight.data = weight.data.clone()  # mapped from the file, where a weight may lie anywhere; folding needs it aligned
    return Model(_frozen(hf), shape_of(path.name, hf.config), str(path), False)


def load_model(name: str, *, dtype: torch.dtype, device: str, seed: int = 0) -> Model:
    """A name of MODELS with random weights, or a checkpoint directory (anything that is not such a name)."""
    if name not in MODELS and not Path(name).is_dir():
        raise ModelError(f"{name!r} is neither a directory nor one of {', '.join(MODELS)}; nothing is fetched")
    try:
        if name in MODELS:
            _refuse_beyond_memory(name, dtype, device)
            return random_model(name, dtype=dtype, device=device, seed=seed)
        return load_checkpoint(name, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise ModelError(f"{name} does not fit the memory of {device}") from None


def _refuse_beyond_memory(name: str, dtype: torch.dtype, device: str) -> None:
    """ModelError for random weights that a CPU's memory cannot hold: the system would kill the process without a word."""
    if device != "cpu" or name.startswith("tiny"):
        return
    import transformers

    config = config_of(name)
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[config.model_type])(config)
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * held:
        raise ModelError(f"{name} takes {needed} bytes in {dtype} and this machine has {held}; use a GPU, or try tiny-llava")


def _frozen(hf: PreTrainedModel) -> PreTrainedModel:
    return hf.eval().requires_grad_(False)

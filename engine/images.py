"""Images as the vision towers take them, from files, checked and capped.

Turned upright as EXIF says and resized to the model's one size: LLaVA-1.5 336 x 336 (short side, then the centre), bit for
bit as transformers does it on a CPU; Qwen2-VL 448 x 448 (both sides); CLIP's mean and deviation for both. Local files only,
nothing is fetched. It knows pixels, not prompts.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from engine.models import ModelShape

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 2
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
PATCH, TEMPORAL, MERGE = 14, 2, 2


class ImageError(ValueError):
    """An image that is not taken. The message says why, never what the decoder met."""


def load_image(path: str | Path, shape: ModelShape) -> torch.Tensor:
    """Pixels of an image file for the model. ImageError where it is too large, too small or not an image."""
    from PIL import Image, ImageOps

    if "://" in str(path):
        raise ImageError(f"{path}: is a URL; images come from local files only")
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ImageError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        width, height = image.size  # known before the pixels are decoded
        if width * height <= MAX_PIXELS and min(width, height) >= MIN_SIDE:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # whatever the decoder met; its text may quote memory
        raise ImageError(f"{path}: is not one of {', '.join(FORMATS)}, or is damaged") from None
    if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
        raise ImageError(f"{path}: {width} x {height} pixels; from {MIN_SIDE} a side to {MAX_PIXELS} in all are taken")
    size, (width, height) = shape.image_size, image.size
    if shape.family == "llava":
        short = min(width, height)
        image = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    scaled = torch.from_numpy(np.asarray(image, np.float32).copy()).permute(2, 0, 1) / 255
    return arranged((scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None], shape)


def arranged(pixels: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """[3, size, size] as the tower takes it: the same for LLaVA, [patches, patch values] for Qwen2-VL."""
    if shape.family == "llava":
        return pixels
    side = shape.image_size // PATCH // MERGE
    cut = pixels.reshape(3, side, MERGE, PATCH, side, MERGE, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
    doubled = cut[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)  # a still image is two equal frames
    return doubled.reshape(side * side * MERGE * MERGE, -1)

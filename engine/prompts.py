"""What a replayed request says: token ids and images made up from its numbers, the same for the same seed.

Images lead the prompt. Two requests whose prefix has a segment of one key get the same tokens and pixels there, so that
pages of the prefix cache hold what their key says. All is read from one block of random tokens and one of random pixels, at
a place that the key gives: nothing is drawn while requests wait. It knows requests and a model's shape, no batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.models import ModelShape
from traces.request import Request

MAX_IMAGES = 64
"""Images of one request; a trace may ask for thousands, which no context holds."""
FIRST_TOKEN = 3
"""Smaller ids are marks of begin, end and padding."""
TOKEN_BLOCK = 1 << 20
IMAGE_BLOCK = 4  # images
MASK = (1 << 64) - 1
OWN = 1 << 62
"""Keys of what a request shares with nobody begin here, above those of prefixes."""


class RequestError(ValueError):
    """One request that cannot be served. It ends by itself with this reason. request: its id, where that is not obvious."""

    def __init__(self, reason: str, request: int = -1):
        super().__init__(reason)
        self.request = request


@dataclass
class Prompt:
    """ids int32 [tokens], with the model's image token at image_starts[i] : + image_tokens; images in order.

    An image is a key, at which made-up pixels are read, or the pixels themselves (`engine.images`).
    """

    ids: np.ndarray
    image_starts: tuple[int, ...] = ()
    images: list[int | torch.Tensor] = field(default_factory=list)


def random_text(shape: ModelShape, rng: np.random.Generator, size: int | tuple[int, ...]) -> np.ndarray:
    """Ids int32 of text at random: the image token and the marks above it never stand in text."""
    return rng.integers(FIRST_TOKEN, min(shape.vocab, shape.image_token_id), size, dtype=np.int32)


class MadeUp:
    """Prompts and pixels for the requests of a trace. The pixels lie on `device` in the model's type."""

    def __init__(self, shape: ModelShape, seed: int, *, dtype: torch.dtype, device: torch.device):
        self._shape = shape
        rng = np.random.default_rng(seed)
        tokens = random_text(shape, rng, TOKEN_BLOCK)
        self._tokens = np.concatenate([tokens, tokens])
        pixels = rng.standard_normal(IMAGE_BLOCK * torch.Size(shape.pixels).numel(), np.float32)
        self._pixels = torch.from_numpy(pixels).to(device, dtype)

    def prompt(self, request: Request) -> Prompt:
        """The prompt of a request. RequestError where its images do not fit into it."""
        n, count, length = self._shape.image_tokens, request.images, request.prompt_tokens
        if count > MAX_IMAGES:
            raise RequestError(f"{count} images, at most {MAX_IMAGES} are served; read the counts with --images cap=N")
        if count * n >= length:
            raise RequestError(f"{length} prompt tokens do not hold {count} images of {n} and text")
        ids = np.empty(length, np.int32)
        keys = [OWN + (request.id << 8) + i for i in range(count)]
        done = 0
        for number, (key, tokens) in enumerate(request.prefix):
            stop = min(done + tokens, length)
            ids[done:stop] = self._text(key, stop - done)
            if number < count and tokens == n and done == number * n:
                keys[number] = key
            done = stop
        ids[done:] = self._text(OWN + request.id, length - done)
        ids[: count * n] = self._shape.image_token_id
        return Prompt(ids, tuple(i * n for i in range(count)), keys)

    def pixels(self, key: int) -> torch.Tensor:
        """Normalised random pixels [*shape.pixels] of the image of one key; a view."""
        size = torch.Size(self._shape.pixels)
        start = scattered(key) % (len(self._pixels) - size.numel()) // 8 * 8
        return self._pixels[start : start + size.numel()].view(size)

    def _text(self, key: int, tokens: int) -> np.ndarray:
        start = scattered(key) % TOKEN_BLOCK
        if tokens <= TOKEN_BLOCK:
            return self._tokens[start : start + tokens]
        return np.resize(self._tokens[start : start + TOKEN_BLOCK], tokens)


def scattered(key: int) -> int:
    """A 64-bit number in which every bit depends on every bit of `key` (SplitMix64's finisher, Steele et al. 2014)."""
    z = (key + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)

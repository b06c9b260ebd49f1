"""What a replayed request says: token ids and images made up from its numbers, the same for the same seed.

Images lead the prompt. Two requests whose prefix has a segment of one key get the same tokens and pixels there, so that
pages of the prefix cache hold what their key says. It knows requests and a model's shape, no batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.images import random_image
from engine.models import ModelShape
from traces.request import Request

MAX_IMAGES = 64
"""Images of one request; a trace may ask for thousands, which no context holds."""
FIRST_TOKEN = 3
"""Smaller ids are marks of begin, end and padding."""


class RequestError(ValueError):
    """One request that cannot be served. It ends by itself with this reason. request: its id, where that is not obvious."""

    def __init__(self, reason: str, request: int = -1):
        super().__init__(reason)
        self.request = request


@dataclass
class Prompt:
    """ids int32 [tokens], with the model's image token at image_starts[i] : + image_tokens; images in order.

    An image is a key, a number that random pixels are drawn from, or the pixels themselves (`engine.images`).
    """

    ids: np.ndarray
    image_starts: tuple[int, ...] = ()
    images: list[int | torch.Tensor] = field(default_factory=list)


def made_up(request: Request, shape: ModelShape, seed: int) -> Prompt:
    """The prompt of a request of a trace. RequestError where its images do not fit into it."""
    n = shape.image_tokens
    if request.images > MAX_IMAGES:
        raise RequestError(f"{request.images} images, at most {MAX_IMAGES} are served; read the counts with --images cap=N")
    if request.images * n >= request.prompt_tokens:
        raise RequestError(f"{request.prompt_tokens} prompt tokens do not hold {request.images} images of {n} and text")
    ids = np.empty(request.prompt_tokens, np.int32)
    keys = [((request.id << 8) + i) | 1 << 62 for i in range(request.images)]
    done = 0
    for number, (key, tokens) in enumerate(request.prefix):
        stop = min(done + tokens, request.prompt_tokens)
        ids[done:stop] = _text(shape, stop - done, seed, key)
        if number < request.images and tokens == n and done == number * n:
            keys[number] = key
        done = stop
    ids[done:] = _text(shape, request.prompt_tokens - done, seed, request.id | 1 << 62)
    ids[: request.images * n] = shape.image_token_id
    return Prompt(ids, tuple(i * n for i in range(request.images)), keys)


def pixels_of(prompt: Prompt, number: int, shape: ModelShape, seed: int) -> torch.Tensor:
    """float32 pixels of one image of a prompt, as the model's vision tower takes them."""
    image = prompt.images[number]
    return image if isinstance(image, torch.Tensor) else random_image(shape, np.random.default_rng([seed, image]))


def _text(shape: ModelShape, tokens: int, seed: int, key: int) -> np.ndarray:
    top = min(shape.vocab, shape.image_token_id)  # the image token and the marks above it never stand in text
    return np.random.default_rng([seed, key]).integers(FIRST_TOKEN, top, tokens, dtype=np.int32)

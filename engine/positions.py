"""Rotary positions of a prompt: plain, or Qwen2-VL's three rows of time, height and width, and the angles they give.

Knows where images lie in a prompt and nothing of batches. Source: Qwen2-VL (2024), section 2.1 (M-RoPE).
"""

from __future__ import annotations

import numpy as np
import torch

from engine.models import ModelShape


def prompt_positions(shape: ModelShape, tokens: int, image_starts: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """(int32 [3 or 1, tokens], delta): the position of generated token number i of the sequence is i + delta.

    image_starts: where each image's tokens begin in the prompt, ascending. Images may follow each other at once.
    """
    if not shape.mrope:
        return np.arange(tokens, dtype=np.int32)[None], 0
    rows, columns = shape.grid
    image = np.stack([np.zeros(rows * columns), *np.divmod(np.arange(rows * columns), columns)]).astype(np.int32)
    parts, done, position = [], 0, 0
    for start in image_starts:
        text = np.arange(start - done, dtype=np.int32) + position
        position += start - done
        parts += [np.broadcast_to(text, (3, len(text))), image + position]
        position += max(rows, columns)
        done = start + rows * columns
    text = np.arange(tokens - done, dtype=np.int32) + position
    parts.append(np.broadcast_to(text, (3, len(text))))
    return np.concatenate(parts, axis=1), position + len(text) - tokens


class Rotary:
    """cos and sin of a batch's positions. inv_freq float32 [head_dim / 2], as the model computed it."""

    def __init__(self, shape: ModelShape, inv_freq: torch.Tensor):
        self._inv_freq = inv_freq.float()
        self._row = None  # which of the three rows each frequency follows
        if shape.mrope:
            rows = [row for row, length in enumerate(shape.mrope) for _ in range(length)]
            self._row = torch.tensor(rows, device=inv_freq.device)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [T, head_dim / 2] each, contiguous, from integer positions [3 or 1, T]."""
        chosen = positions[0][:, None] if self._row is None else positions.T[:, self._row]
        angles = (chosen.float() * self._inv_freq).contiguous()
        return angles.cos(), angles.sin()

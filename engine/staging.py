"""Small integers from the host to the device: everything a step needs, in one copy.

On a GPU the source is pinned and used in turn, so that the copy of one step never overwrites that of the step before it. It
knows arrays, not what they mean.
"""

from __future__ import annotations

import numpy as np
import torch

ALIGN = 4  # int32: sections start on 16 bytes
RING = 4
"""Steps under way at once are at most two; a buffer comes round again after four."""


class Staging:
    """Copies int32 arrays to `device`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._ring: list[torch.Tensor] = [torch.empty(0, dtype=torch.int32)] * RING
        self._turn = 0

    def send(self, arrays: list[np.ndarray], into: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The arrays as int32 tensors on the device, of their shapes; all in one new tensor, or in `into`."""
        sizes = [-(-array.size // ALIGN) * ALIGN for array in arrays]
        total = sum(sizes)
        buffer = self._buffer(total)
        host, done = buffer.numpy(), 0
        for array, size in zip(arrays, sizes, strict=True):
            host[done : done + array.size] = array.reshape(-1)
            done += size
        if into is None:
            into = torch.empty(total, dtype=torch.int32, device=self._device)
        sent = into[:total].copy_(buffer[:total], non_blocking=True)
        return views(sent, [array.shape for array in arrays])

    def _buffer(self, total: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % RING
        buffer = self._ring[self._turn]
        if len(buffer) < total:
            buffer = torch.zeros(max(1024, 2 * total), dtype=torch.int32, pin_memory=self._device.type == "cuda")
            self._ring[self._turn] = buffer
        return buffer


def views(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Tensors of `shapes` one behind the other in `flat`, as `send` lays them out."""
    parts, done = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        parts.append(flat[done : done + count].view(shape))
        done += -(-count // ALIGN) * ALIGN
    return parts

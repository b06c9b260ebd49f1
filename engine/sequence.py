"""One request inside the engine: its tokens, positions, pages and pixels; and the rows that the decodes of a lease share.

It knows what to compute for which token, and computes nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.cache import PageCache, PageTable
from engine.heads import TaskHead
from engine.models import ModelShape
from engine.positions import prompt_positions
from engine.prompts import Prompt
from traces.request import Request


class Sequence:
    """prompt and generated tokens; kv: tokens in the cache; row: its place in the buffer of last tokens; table: its pages.

    features [tokens of the images from first_image on, hidden] while the prompt is computed; tail: the last hidden states
    for its head.
    """

    __slots__ = (
        "adapter", "delta", "features", "first_image", "generated", "head", "id", "image_rank", "kv", "positions", "prefix",
        "prompt", "row", "table", "tail",
    )  # fmt: skip

    def __init__(self, request: Request, prompt: Prompt, shape: ModelShape, head: TaskHead | None):
        self.id = request.id
        self.adapter = request.adapter
        self.prefix = request.prefix
        self.prompt = prompt
        self.head = head
        self.generated: list[int] = []
        self.positions, self.delta = prompt_positions(shape, len(prompt.ids), prompt.image_starts)
        is_image = np.zeros(len(prompt.ids), bool)
        for start in prompt.image_starts:
            is_image[start : start + shape.image_tokens] = True
        self.image_rank = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32) if prompt.image_starts else None
        self.reset()

    def reset(self) -> None:
        """Nothing is computed, nothing held; the generated tokens stay."""
        self.kv, self.row, self.first_image = 0, -1, 0
        self.table: PageTable | None = None
        self.features: torch.Tensor | None = None
        self.tail: torch.Tensor | None = None

    @property
    def target(self) -> int:
        """Tokens to compute before its next token."""
        return len(self.prompt.ids) + len(self.generated)

    def ids_at(self, start: int, stop: int) -> np.ndarray:
        """int32 token ids of positions start..stop of prompt and generated tokens."""
        prompt = self.prompt.ids
        if stop <= len(prompt):
            return prompt[start:stop]
        return np.concatenate([prompt, np.array(self.generated, np.int32)])[start:stop]

    def positions_at(self, start: int, stop: int) -> np.ndarray:
        """int32 [3 or 1, stop - start] rotary positions."""
        known = self.positions.shape[1]
        if stop <= known:
            return self.positions[:, start:stop]
        rest = np.arange(max(start, known), stop, dtype=np.int32) + self.delta
        rest = np.broadcast_to(rest, (len(self.positions), len(rest)))
        return np.concatenate([self.positions[:, start:known], rest], axis=1)

    def images_left(self, shape: ModelShape) -> list[int]:
        """Images with tokens that are not in the cache."""
        return [i for i, start in enumerate(self.prompt.image_starts) if start + shape.image_tokens > self.kv]

    def image_rows(self, start: int, stop: int, shape: ModelShape) -> tuple[np.ndarray, np.ndarray]:
        """(offsets within start..stop that are image tokens, their rows of `features`)."""
        rank = self.image_rank[start:stop]
        offsets = np.flatnonzero(rank >= 0).astype(np.int32)
        return offsets, rank[offsets] - self.first_image * shape.image_tokens


class Decodes:
    """The decoding sequences of one lease as arrays, moved on one token a step. tables int32 [n, width]."""

    def __init__(self, sequences: list[Sequence], cache: PageCache, width: int):
        self.sequences = sequences
        self._cache = cache
        n = len(sequences)
        self.kv = np.array([s.kv for s in sequences], np.int32)
        self.rows = np.array([s.row for s in sequences], np.int32)
        self.adapters = np.array([s.adapter for s in sequences], np.int32)
        self._delta = np.array([s.delta for s in sequences], np.int32)
        self.tables = np.full((n, width), cache.dummy, np.int32)
        for i, sequence in enumerate(sequences):
            self.tables[i, : len(sequence.table.pages)] = sequence.table.pages
        self._all = np.arange(n)

    def step(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(positions, slots, lengths) int32 [n] of the next step, after pages were found for it; moves on."""
        page = self._cache.page_tokens
        for i in np.flatnonzero(self.kv % page == 0):
            table = self.sequences[i].table
            self._cache.extend(table, int(self.kv[i]) + 1)
            self.tables[i, len(table.pages) - 1] = table.pages[-1]
        slots = self.tables[self._all, self.kv // page] * page + self.kv % page
        positions = self.kv + self._delta
        self.kv = self.kv + 1
        return positions, slots, self.kv

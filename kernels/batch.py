"""What a multi-LoRA operator is given: the pool of resident adapters and the batch of one step.

The calling convention of every operator of this package, ours and the rivals':

    op(y, x, pool, batch, key) -> None        y[t] += scale[j] * (x[t] @ A_j^T) @ B_j, in place, j = index[t]

x [T, d_in], y [T, sum(widths)], 16-bit (or float32), last dimension contiguous; key = (layer, projection name). A fused
projection (q, k, v) has one A per slice and one y: slice s owns `widths[s]` columns of it. A row with index -1 costs
nothing. Mixture mode (VaLoRA section 4): `batch.merged` = m says that m is folded into the base weights, so a row of m
is done, and any other row, the base model's too, gets its own branch plus and m's branch minus.

This module knows shapes, slots and rows; it knows no kernel, no tile, no model and no adapter file.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

RANK_ALIGN = 16
"""A slot's rank is padded with zero rows to a multiple of this: the smallest K of a tensor-core instruction."""
MAX_RANK = 256
MAX_SLOTS = 1023
TILE_ROWS = (16, 32, 64, 128)
"""Row-tile heights for which a batch keeps a route list."""
AT_ONCE = 1 << 14
"""int32 of pageable memory (64 KB) that the driver stages at once; for more it would wait until the stream gets there."""
STAGES = 4
"""Pinned buffers of a larger batch, so that the host may be some steps ahead of the GPU."""
LONG = 512
"""Rows from which steps of equal and of unequal shares are told apart."""
UNEVEN = 1.5
"""A LONG step is uneven where one adapter has more than this many times the mean of the adapters' rows."""
ROUTE_FIELDS = 8
"""int32 per tile: start in `perm`, rows (0: no tile), row offset, padded rank, bits of the scale; these three for m."""

Key = tuple[int, str]


class LoraError(ValueError):
    """An adapter, batch or projection that the operators cannot serve. The message names the value and the way out."""


@dataclass(frozen=True)
class Projection:
    """One (possibly fused) linear layer: d_in inputs, one entry of `widths` (output columns) a slice, at most three."""

    d_in: int
    widths: tuple[int, ...]

    def __post_init__(self):
        if not 1 <= len(self.widths) <= 3:
            raise LoraError(f"a projection has 1 to 3 fused slices, got widths {self.widths}; split it")
        for size in (self.d_in, *self.widths):
            if size < 16 or size % 8:
                raise LoraError(f"width {size} of {self.d_in} -> {self.widths} must be a multiple of 8, at least 16")

    @property
    def slices(self) -> int:
        return len(self.widths)

    @property
    def d_out(self) -> int:
        return sum(self.widths)


class LoraPool:
    """The A and B factors of all resident adapters, in pooled tensors, with a slot table on the device.

    a[name] [layers, slices, rows, d_in]; b[name] [layers, rows, d_out]: the adapter in slot j owns rows offset[j] :
    offset[j] + rank[j] of both, in every layer, slice and projection (rank padded to RANK_ALIGN with zero rows).
    offset, rank int32 [slots], scale float32 [slots] on the device; offsets, ranks (padded; 0: empty slot), true_ranks,
    scales on the host. Slots may be refilled between two replays of a CUDA graph: no tensor is ever reallocated.
    """

    def __init__(
        self,
        projections: dict[str, Projection],
        *,
        layers: int,
        slots: int,
        rows: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        if not 1 <= slots <= MAX_SLOTS:
            raise LoraError(f"slots {slots} is outside 1..{MAX_SLOTS}")
        if rows < RANK_ALIGN or rows % RANK_ALIGN:
            raise LoraError(f"rows {rows} of the pool must be a positive multiple of {RANK_ALIGN}")
        self.projections = dict(projections)
        self.layers, self.slots, self.rows, self.dtype = layers, slots, rows, dtype
        self.device = torch.device(device)
        place = {"dtype": dtype, "device": self.device}
        self.a = {name: torch.zeros(layers, p.slices, rows, p.d_in, **place) for name, p in projections.items()}
        self.b = {name: torch.zeros(layers, rows, p.d_out, **place) for name, p in projections.items()}
        self.offset = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.rank = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.scale = torch.zeros(slots, dtype=torch.float32, device=self.device)
        self.offsets, self.ranks, self.true_ranks, self.scales = [0] * slots, [0] * slots, [0] * slots, [0.0] * slots
        self._free = [(0, rows)]  # (first row, rows), sorted, never adjacent

    def factors(self, key: Key) -> tuple[torch.Tensor, torch.Tensor, Projection]:
        """A [slices, rows, d_in], B [rows, d_out] and the Projection of `key`. LoraError if there is none."""
        layer, name = key
        if name not in self.projections or not 0 <= layer < self.layers:
            raise LoraError(f"no projection {key}: there are layers 0..{self.layers - 1} of {sorted(self.projections)}")
        return self.a[name][layer], self.b[name][layer], self.projections[name]

    def reserve(self, slot: int, rank: int, scale: float = 1.0) -> slice:
        """Give `slot` room for an adapter of `rank` (1..256) and return its rows; fill `views(slot, key)` afterwards.

        LoraError where the slot does not exist or is taken, the rank is out of range, or no free run is long enough.
        """
        if not 0 <= slot < self.slots:
            raise LoraError(f"slot {slot} is outside 0..{self.slots - 1}")
        if self.ranks[slot]:
            raise LoraError(f"slot {slot} is taken; call release({slot}) first")
        if not 1 <= rank <= MAX_RANK:
            raise LoraError(f"rank {rank} of slot {slot} is outside 1..{MAX_RANK}")
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise LoraError(f"scale {scale} of slot {slot} is not a number that float32 holds")
        padded = -(-rank // RANK_ALIGN) * RANK_ALIGN
        fit = next((i for i, (_, length) in enumerate(self._free) if length >= padded), None)
        if fit is None:
            longest = max((length for _, length in self._free), default=0)
            raise LoraError(
                f"no run of {padded} free rows in a pool of {self.rows} (longest {longest}); evict or grow"
            )
        first, length = self._free.pop(fit)
        if length > padded:
            self._free.insert(fit, (first + padded, length - padded))
        self.true_ranks[slot] = rank
        self._set(slot, first, padded, scale)
        return slice(first, first + padded)

    def release(self, slot: int) -> None:
        """Empty `slot`; its rows may be reserved again at once. LoraError if it is empty."""
        if not 0 <= slot < self.slots or not self.ranks[slot]:
            raise LoraError(f"slot {slot} holds no adapter")
        first, length = self.offsets[slot], self.ranks[slot]
        self.true_ranks[slot] = 0
        self._set(slot, 0, 0, 0.0)
        insort(self._free, (first, length))
        merged: list[tuple[int, int]] = []
        for start, run in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + run)
            else:
                merged.append((start, run))
        self._free = merged

    def _set(self, slot: int, offset: int, rank: int, scale: float) -> None:
        self.offsets[slot], self.ranks[slot], self.scales[slot] = offset, rank, float(scale)
        for table, value in ((self.offset, offset), (self.rank, rank), (self.scale, scale)):
            table[slot : slot + 1].fill_(value)  # a kernel, not a copy from host memory: no synchronisation

    def views(self, slot: int, key: Key) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(A, B) of one adapter in one projection, one padded view a slice: A[s] [rank, d_in], B[s] [rank, width]."""
        a, b, projection = self.factors(key)
        rows = slice(self.offsets[slot], self.offsets[slot] + self.ranks[slot])
        return [a[s, rows] for s in range(projection.slices)], list(b[rows].split(projection.widths, dim=1))

    def put(self, slot: int, factors: dict[Key, list[tuple[torch.Tensor, torch.Tensor]]], scale: float = 1.0) -> None:
        """Load an adapter: per key one (A [rank, d_in], B [rank, width]) pair a slice; PEFT's lora_B.weight is B^T.

        Keys that are absent are zero (a projection that the adapter does not touch); a mixture of ranks is padded to
        the largest. Everything is checked before a row is written. Raises LoraError.
        """
        rank = max((a.shape[0] for pairs in factors.values() for a, _ in pairs), default=0)
        for key, pairs in factors.items():
            _, _, p = self.factors(key)
            if len(pairs) != p.slices:
                raise LoraError(f"{key} has {p.slices} slices, got {len(pairs)} pairs of factors")
            for s, (a, b) in enumerate(pairs):
                if a.shape[1] != p.d_in or tuple(b.shape) != (a.shape[0], p.widths[s]):
                    raise LoraError(
                        f"{key} {s}: A {tuple(a.shape)}, B {tuple(b.shape)}, not [r, {p.d_in}], [r, {p.widths[s]}]"
                    )
        rows = self.reserve(slot, rank, scale)
        for name in self.projections:
            self.a[name][:, :, rows].zero_()
            self.b[name][:, rows].zero_()
        for key, pairs in factors.items():
            for view_a, view_b, (a, b) in zip(*self.views(slot, key), pairs, strict=True):
                view_a[: len(a)].copy_(a, non_blocking=True)
                view_b[: len(b)].copy_(b, non_blocking=True)


class LoraBatch:
    """Which adapter each row of one step's packed batch asks for. Built once a step, read by every layer.

    Every tensor has a fixed size and place, so a CUDA graph captured over it replays with new contents after `update`:
    index int32 [max_tokens] (slot of each row, -1 none); perm int32 [max_tokens]: rows sorted by slot, stable, rows
    without a branch last; routes[BM] int32 [tiles, ROUTE_FIELDS] for BM in TILE_ROWS: row tiles packed without gaps;
    counts[BM] int32 [1]: how many; state int32 [2]: tokens in use, merged slot.
    tokens, adapters (distinct groups of rows that get a branch) and rank (largest padded rank) choose the kernel form
    and its grid; `fix()` pins them to capacities for a graph. expected: adapters that the form is chosen for, no more
    than `adapters`; uneven: whether it is chosen for unequal shares, as always in a graph of several adapters.
    host_index and segments serve operators that need lists.
    """

    def __init__(self, pool: LoraPool, max_tokens: int):
        if max_tokens < 1:
            raise LoraError(f"max_tokens {max_tokens} must be at least 1")
        self.pool, self.max_tokens = pool, max_tokens
        device = pool.device
        self._step = torch.full((2 + max_tokens,), -1, dtype=torch.int32, device=device)
        self._step[0] = 0
        self.state, self.index = self._step[:2], self._step[2:]
        pinned = device.type == "cuda" and 2 + max_tokens > AT_ONCE
        self._staged = torch.empty(STAGES if pinned else 0, 2 + max_tokens, dtype=torch.int32, pin_memory=pinned)
        self._arrived = [torch.cuda.Event() for _ in self._staged]
        self._turn = 0
        self.fence = torch.zeros(1, dtype=torch.int32, device=device)
        self.perm = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.routes = {
            rows: torch.zeros(bound, ROUTE_FIELDS, dtype=torch.int32, device=device)
            for rows in TILE_ROWS
            if (bound := self.tile_bound(rows, max_tokens, pool.slots + 1))
        }
        counts = torch.zeros(len(TILE_ROWS), dtype=torch.int32, device=device)
        self.counts = dict(zip(TILE_ROWS, counts.split(1), strict=True))
        self.tokens, self.adapters, self.rank, self.merged = 0, 0, RANK_ALIGN, -1
        self.expected = 0
        self.host_index = np.empty(0, np.int32)
        self.uneven = False
        self._fixed: tuple[int, int, int] | None = None
        self.plans: dict[tuple, object] = {}  # an operator's resolved launches by shape
        self._workspaces: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []

    def workspace(self, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scratch of at least numel, for the operators of one stream, never freed: graphs hold its address."""
        size = numel * dtype.itemsize
        if not self._workspaces or self._workspaces[-1].nbytes < size:
            self._workspaces.append(torch.empty(-(-size // 4), dtype=torch.float32, device=self.pool.device))
        return self._workspaces[-1].view(dtype)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, alive as long as this batch: graphs hold its address."""
        self._kept.append(tensor)
        return tensor

    @staticmethod
    def tile_bound(tile_rows: int, tokens: int, groups: int) -> int:
        """Most tiles of `tile_rows` that `tokens` rows in at most `groups` non-empty groups can need."""
        groups = min(groups, tokens)
        return (tokens - groups) // tile_rows + groups

    def fix(self, tokens: int, adapters: int, rank: int, expected: int | None = None) -> None:
        """Pin the shape that operators see (for the capture of a CUDA graph); `update` then rejects what exceeds it.

        expected: how many adapters a replay will usually have, which decides the tiling; default: the capacity. Any
        batch within the capacity is computed right; programs beyond its row tiles end at once.
        """
        if not 1 <= tokens <= self.max_tokens:
            raise LoraError(f"tokens {tokens} is outside 1..{self.max_tokens}, the batch's capacity")
        if expected is not None and not 1 <= expected <= adapters:
            raise LoraError(f"expected {expected} adapters is outside 1..{adapters}, the capacity asked for")
        self._fixed = (tokens, adapters, -(-rank // RANK_ALIGN) * RANK_ALIGN)
        self.tokens, self.adapters, self.rank = self._fixed
        self.expected = adapters if expected is None else expected
        self.uneven = self.expected > 1

    def update(self, index: np.ndarray, merged: int = -1, *, route: bool = True) -> None:
        """Take a new step: index int [T] on the host, -1 or an occupied slot. One small copy, no synchronisation.

        route=False leaves the route kernel to the caller, who has captured `route()` as the first node of a graph.
        LoraError, before anything is changed, for too many rows, a slot out of range or empty, or a shape over `fix`.
        """
        index = np.ascontiguousarray(index, dtype=np.int32)
        shape, counts = self._checked(index, merged)
        self.tokens, self.adapters, self.rank = self._fixed or shape
        if not self._fixed:
            self.expected = self.adapters
            self.uneven = len(index) >= LONG and bool(counts.max() * self.adapters > UNEVEN * counts.sum())
        self.merged, self.host_index = merged, index
        self.__dict__.pop("segments", None)
        self._send(index, merged)
        if route:
            self.route()

    def _send(self, index: np.ndarray, merged: int) -> None:
        """Copy a step to the device: at once, or a long one from the next of a few pinned buffers, once that is free."""
        size, arrived = 2 + len(index), None
        if size <= AT_ONCE or not self._arrived:
            staged = torch.from_numpy(np.empty(size, np.int32))
        else:
            self._turn = (self._turn + 1) % STAGES
            staged, arrived = self._staged[self._turn, :size], self._arrived[self._turn]
            arrived.synchronize()
        host = staged.numpy()
        host[:2], host[2:] = (len(index), merged), index
        self._step[:size].copy_(staged, non_blocking=True)
        if arrived:
            arrived.record()

    def _checked(self, index: np.ndarray, merged: int) -> tuple[tuple[int, int, int], np.ndarray]:
        """(tokens, adapters, rank) of a valid step, and the rows of each group with a branch; LoraError otherwise."""
        if index.ndim != 1 or len(index) > self.max_tokens:
            raise LoraError(f"index has shape {index.shape}, expected at most ({self.max_tokens},)")
        if not -1 <= merged < self.pool.slots:
            raise LoraError(f"merged slot {merged} is outside -1..{self.pool.slots - 1}")
        try:
            counts = np.bincount(index + 1, minlength=self.pool.slots + 1)
        except ValueError:  # one pass says whether any is negative
            counts = ()
        if len(counts) != self.pool.slots + 1:
            row = int(np.flatnonzero((index < -1) | (index >= self.pool.slots))[0])
            raise LoraError(f"row {row} asks for slot {index[row]}, outside -1..{self.pool.slots - 1}")
        used = np.flatnonzero(counts[1:]).tolist()
        ranks = [self.pool.ranks[slot] for slot in ([*used, merged] if merged >= 0 else used)]
        if not all(ranks):
            slot = next(slot for slot in (*used, merged) if not self.pool.ranks[slot])
            raise LoraError(f"slot {slot} holds no adapter; load one with put({slot}, ...) first")
        if merged >= 0:
            counts[merged + 1] = 0
        rows = counts[0 if merged >= 0 else 1 :]
        groups = int(np.count_nonzero(rows))
        rank = max(ranks, default=RANK_ALIGN)
        shape = (len(index), groups, rank)
        if self._fixed and any(have > room for have, room in zip(shape, self._fixed, strict=True)):
            raise LoraError(f"(tokens, adapters, rank) {shape} exceeds {self._fixed}, for which this batch was fixed")
        return shape, rows

    def route(self) -> None:
        """Sort and tile the rows on the device, without synchronisation; may be captured in a graph.

        It reads `index` and `state` (tokens, merged slot) as they are on the device: a kernel may have written them.
        """
        from kernels.route import build_routes

        build_routes(self)

    @cached_property
    def segments(self) -> list[tuple[int, np.ndarray]]:
        """(slot, rows int64) of every adapter in the batch, ascending by slot, on the host. Slot -1 is not listed."""
        order = np.argsort(self.host_index, kind="stable")
        slots, starts = np.unique(self.host_index[order], return_index=True)
        parts = np.split(order, starts[1:])
        return [(int(slot), rows) for slot, rows in zip(slots, parts, strict=True) if slot >= 0]

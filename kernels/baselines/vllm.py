"""vLLM's operators (its Triton `lora_shrink` and `lora_expand`, after Punica): zero-fill, split-K shrink, expand.

Both kernels run on a grid of (row tiles x column tiles, slices, adapters): every adapter gets the row tiles of the
whole batch, and those past its own rows leave at once, so the number of programs grows as tokens x adapters. The
shrink adds its splits of d_in into a zeroed float32 v by atomics. Tiles follow vLLM's default rule for a GPU without
a tuned file: one threshold, 128 rows.

Kinder than the original: the grid has the adapters of this batch, not `max_loras` + 1; splits that hold no part of
d_in (48 of 64 at 4,096) are not launched; the expand loads v through the rank that it needs in one step.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.baselines.inputs import (
    add_tile,
    checked,
    column_block,
    column_blocks,
    padded_rank,
    segments,
    shrunk_tile,
    width_constants,
)
from kernels.batch import Key, LoraBatch, LoraPool

CAPTURE = "free"
EXPAND_ROWS, EXPAND_COLUMNS = 64, 128


class ShrinkTile(NamedTuple):
    """Rows, rank columns, d_in and splits of d_in of one shrink program."""

    rows: int
    columns: int
    k: int
    split: int


def shrink_tile(tokens: int, d_in: int) -> ShrinkTile:
    """vLLM's default tile for so many tokens, without the splits that would be empty."""
    k, split = (256, 64) if tokens < 128 else (32, 8)
    return ShrinkTile(32, 16, k, min(split, triton.cdiv(d_in, k)))


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _shrink(
    x_ptr, a_ptr, v_ptr, perm_ptr, slot_ptr, start_ptr, stop_ptr, offset_ptr, rank_ptr, x_stride, a_slice, tokens,
    tiles,
    D_IN: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):
    split = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(1)
    slot = tl.load(slot_ptr + tl.program_id(2))
    first = tl.load(start_ptr + tl.program_id(2)) + (tile % tiles) * BM
    stop = tl.load(stop_ptr + tl.program_id(2))
    if first >= stop:
        return
    ranks = (tile // tiles) * BR + tl.arange(0, BR)
    valid = ranks < tl.load(rank_ptr + slot)
    here = first + tl.arange(0, BM)
    rows = tl.load(perm_ptr + here, mask=here < stop, other=0)
    a = a_ptr + part * a_slice + (tl.load(offset_ptr + slot) + ranks).to(tl.int64)[None, :] * D_IN
    total = shrunk_tile(x_ptr, x_stride, rows, here < stop, a, valid, split, D_IN, BM, BR, BK, SPLIT)
    v = v_ptr + (part * tokens + rows)[:, None] * R + ranks[None, :]
    tl.atomic_add(v, total, mask=(here[:, None] < stop) & valid[None, :], sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    y_ptr, v_ptr, b_ptr, perm_ptr, slot_ptr, start_ptr, stop_ptr, offset_ptr, rank_ptr, scale_ptr, y_stride, tokens,
    D_OUT: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    slot = tl.load(slot_ptr + tl.program_id(2))
    first = tl.load(start_ptr + tl.program_id(2)) + tl.program_id(0) * BM
    stop = tl.load(stop_ptr + tl.program_id(2))
    if first >= stop:
        return
    part, column, end = column_block(tl.program_id(1), W0, W1, W2, BN)
    columns = column + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    valid = ranks < tl.load(rank_ptr + slot)
    here = first + tl.arange(0, BM)
    rows = tl.load(perm_ptr + here, mask=here < stop, other=0)
    b = b_ptr + (tl.load(offset_ptr + slot) + ranks).to(tl.int64)[:, None] * D_OUT + columns[None, :]
    b_part = tl.load(b, mask=valid[:, None] & (columns[None, :] < end), other=0.0)
    v = v_ptr + (part * tokens + rows)[:, None] * R + ranks[None, :]
    v_part = tl.load(v, mask=(here[:, None] < stop) & valid[None, :], other=0.0)
    add_tile(y_ptr, y_stride, rows, here < stop, columns, end, v_part, b_part, tl.load(scale_ptr + slot))


def op(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """y [T, d_out] += the branches of x [T, d_in], in place. Raises LoraError for inputs that do not fit."""
    a, b, projection = checked(y, x, pool, batch, key)
    tokens, rank = batch.tokens, padded_rank(batch)
    if not tokens or not batch.adapters:
        return
    table = segments(batch)
    where = (batch.perm, table.slot, table.start, table.stop, pool.offset, pool.rank)
    v = torch.zeros((projection.slices, tokens, rank), dtype=torch.float32, device=x.device)
    tile = shrink_tile(tokens, projection.d_in)
    row_tiles = triton.cdiv(tokens, tile.rows)
    _shrink[(tile.split * row_tiles * triton.cdiv(rank, tile.columns), projection.slices, batch.adapters)](
        x, a, v, *where, x.stride(0), a.stride(0), tokens, row_tiles,
        D_IN=projection.d_in, R=rank, BM=tile.rows, BR=tile.columns, BK=tile.k, SPLIT=tile.split,
        num_warps=4, num_stages=2,
    )
    grid = (triton.cdiv(tokens, EXPAND_ROWS), column_blocks(projection, EXPAND_COLUMNS), batch.adapters)
    _expand[grid](
        y, v, b, *where, pool.scale, y.stride(0), tokens,
        D_OUT=projection.d_out, R=rank, BM=EXPAND_ROWS, BN=EXPAND_COLUMNS, num_warps=4, **width_constants(projection),
    )

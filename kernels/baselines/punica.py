"""Punica's operators (Chen et al., MLSys 2024): BGMV for a few rows, SGMV with static tiles for segments.

BGMV treats every row on its own, without tensor cores: one program per (row, block of rank columns, split of d_in)
adds its part of v = x A^T into a zeroed float32 v, another per (row, block of output columns) adds v B to y. SGMV
walks a segment (the rows of one adapter) in fixed row tiles: the shrink gives a program a block of rank columns, a
split of d_in and a whole segment; the expand is a grouped GEMM with one tile shape for all inputs.

Simplified: Triton instead of CUDA and CUTLASS; slices of a fused projection share a launch (Punica launches each);
the rank columns, like every pool of mixed ranks, are masked to each adapter's own. The split of d_in is always taken
(the original falls back to none at rank 64 and above where its occupancy query fails). Rows choose the form: BGMV up
to BGMV_ROWS tokens or one row an adapter, which is where the two cross on an H200. Kept from the original: tiles never
depend on the shape, so a long segment is one program's serial walk.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import torch
import triton
import triton.language as tl

from kernels.baselines.inputs import (
    add_tile,
    checked,
    column_block,
    column_blocks,
    padded_rank,
    row_tiles,
    segments,
    shrunk_tile,
    width_constants,
)
from kernels.batch import Key, LoraBatch, LoraPool

CAPTURE = "free"
BGMV_ROWS = 16
BGMV_SPLIT, BGMV_K, BGMV_RANK, BGMV_COLUMNS = 8, 256, 16, 128
SGMV_SPLIT, SGMV_ROWS, SGMV_K, SGMV_RANK = 8, 64, 64, 16
EXPAND_ROWS, EXPAND_COLUMNS = 32, 128


@triton.jit(do_not_specialize=["tokens"])
def _bgmv_shrink(
    x_ptr, a_ptr, v_ptr, index_ptr, state_ptr, offset_ptr, rank_ptr, x_stride, a_slice, tokens,
    D_IN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1) // SPLIT
    split = tl.program_id(1) % SPLIT
    part = tl.program_id(2)
    slot = tl.load(index_ptr + row)
    if (slot < 0) | (row >= tl.load(state_ptr)):
        return
    ranks = block * BR + tl.arange(0, BR)
    valid = ranks < tl.load(rank_ptr + slot)
    a = a_ptr + part * a_slice + (tl.load(offset_ptr + slot) + ranks).to(tl.int64)[:, None] * D_IN
    total = tl.zeros([BR, BK], tl.float32)
    for i in range((D_IN + BK * SPLIT - 1) // (BK * SPLIT)):
        ks = (i * SPLIT + split) * BK + tl.arange(0, BK)
        x_part = tl.load(x_ptr + row.to(tl.int64) * x_stride + ks, mask=ks < D_IN, other=0.0)
        a_part = tl.load(a + ks[None, :], mask=valid[:, None] & (ks[None, :] < D_IN), other=0.0)
        total += x_part.to(tl.float32)[None, :] * a_part.to(tl.float32)
    tl.atomic_add(v_ptr + (part * tokens + row) * R + ranks, tl.sum(total, 1), mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def bgmv_expand(
    y_ptr, v_ptr, b_ptr, index_ptr, state_ptr, offset_ptr, rank_ptr, scale_ptr, y_stride, tokens,
    D_OUT: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
):
    """y += scale * v B for one row and one block of columns."""
    row = tl.program_id(0)
    slot = tl.load(index_ptr + row)
    if (slot < 0) | (row >= tl.load(state_ptr)):
        return
    part, column, end = column_block(tl.program_id(1), W0, W1, W2, BN)
    columns = column + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    valid = ranks < tl.load(rank_ptr + slot)
    v = tl.load(v_ptr + (part * tokens + row) * R + ranks, mask=valid, other=0.0)
    b = b_ptr + (tl.load(offset_ptr + slot) + ranks).to(tl.int64)[:, None] * D_OUT + columns[None, :]
    b_part = tl.load(b, mask=valid[:, None] & (columns[None, :] < end), other=0.0)
    branch = tl.sum(v[:, None] * b_part.to(tl.float32), 0) * tl.load(scale_ptr + slot)
    y = y_ptr + row.to(tl.int64) * y_stride + columns
    old = tl.load(y, mask=columns < end, other=0.0)
    tl.store(y, (old.to(tl.float32) + branch).to(old.dtype), mask=columns < end)


@triton.jit(do_not_specialize=["tokens"])
def _sgmv_shrink(
    x_ptr, a_ptr, v_ptr, perm_ptr, slot_ptr, start_ptr, stop_ptr, offset_ptr, rank_ptr, x_stride, a_slice, tokens,
    D_IN: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):
    slot = tl.load(slot_ptr + tl.program_id(0))
    block = tl.program_id(1) // SPLIT
    split = tl.program_id(1) % SPLIT
    part = tl.program_id(2)
    if slot < 0:
        return
    ranks = block * BR + tl.arange(0, BR)
    valid = ranks < tl.load(rank_ptr + slot)
    a = a_ptr + part * a_slice + (tl.load(offset_ptr + slot) + ranks).to(tl.int64)[None, :] * D_IN
    first = tl.load(start_ptr + tl.program_id(0))
    stop = tl.load(stop_ptr + tl.program_id(0))
    while first < stop:
        here = first + tl.arange(0, BM)
        rows = tl.load(perm_ptr + here, mask=here < stop, other=0)
        total = shrunk_tile(x_ptr, x_stride, rows, here < stop, a, valid, split, D_IN, BM, BR, BK, SPLIT)
        v = v_ptr + (part * tokens + rows)[:, None] * R + ranks[None, :]
        tl.atomic_add(v, total, mask=(here[:, None] < stop) & valid[None, :], sem="relaxed")
        first += BM


@triton.jit(do_not_specialize=["tokens"])
def _sgmv_expand(
    y_ptr, v_ptr, b_ptr, perm_ptr, slot_ptr, start_ptr, stop_ptr, offset_ptr, rank_ptr, scale_ptr, y_stride, tokens,
    D_OUT: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    slot = tl.load(slot_ptr + tl.program_id(1))
    first = tl.load(start_ptr + tl.program_id(1)) + tl.program_id(2) * BM
    stop = tl.load(stop_ptr + tl.program_id(1))
    if first >= stop:
        return
    part, column, end = column_block(tl.program_id(0), W0, W1, W2, BN)
    columns = column + tl.arange(0, BN)
    ranks = tl.arange(0, R)
    valid = ranks < tl.load(rank_ptr + slot)
    b = b_ptr + (tl.load(offset_ptr + slot) + ranks).to(tl.int64)[:, None] * D_OUT + columns[None, :]
    b_part = tl.load(b, mask=valid[:, None] & (columns[None, :] < end), other=0.0)
    scale = tl.load(scale_ptr + slot)
    while first < stop:
        here = first + tl.arange(0, BM)
        rows = tl.load(perm_ptr + here, mask=here < stop, other=0)
        v = v_ptr + (part * tokens + rows)[:, None] * R + ranks[None, :]
        v_part = tl.load(v, mask=(here[:, None] < stop) & valid[None, :], other=0.0)
        add_tile(y_ptr, y_stride, rows, here < stop, columns, end, v_part, b_part, scale)
        first += BM * tl.num_programs(2)


def op(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """y [T, d_out] += the branches of x [T, d_in], in place. Raises LoraError for inputs that do not fit."""
    checked(y, x, pool, batch, key)
    if batch.tokens and batch.adapters:
        few = batch.tokens <= max(BGMV_ROWS, batch.adapters)
        (bgmv if few else sgmv)(y, x, pool, batch, key)


def bgmv(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """The form for a few rows."""
    a, b, projection = pool.factors(key)
    slices, tokens, rank = projection.slices, batch.tokens, padded_rank(batch)
    v = torch.zeros((slices, tokens, rank), dtype=torch.float32, device=x.device)
    split = min(BGMV_SPLIT, triton.cdiv(projection.d_in, BGMV_K))
    _bgmv_shrink[(tokens, triton.cdiv(rank, BGMV_RANK) * split, slices)](
        x, a, v, batch.index, batch.state, pool.offset, pool.rank, x.stride(0), a.stride(0), tokens,
        D_IN=projection.d_in, R=rank, BR=BGMV_RANK, BK=BGMV_K, SPLIT=split, num_warps=4,
    )
    bgmv_expand[(tokens, column_blocks(projection, BGMV_COLUMNS))](
        y, v, b, batch.index, batch.state, pool.offset, pool.rank, pool.scale, y.stride(0), tokens,
        D_OUT=projection.d_out, R=rank, BN=BGMV_COLUMNS, num_warps=4, **width_constants(projection),
    )


def sgmv(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """The form for segments."""
    a, b, projection = pool.factors(key)
    slices, tokens, rank = projection.slices, batch.tokens, padded_rank(batch)
    v = torch.zeros((slices, tokens, rank), dtype=torch.float32, device=x.device)
    table = segments(batch)
    where = (batch.perm, table.slot, table.start, table.stop, pool.offset, pool.rank)
    split = min(SGMV_SPLIT, triton.cdiv(projection.d_in, SGMV_K))
    _sgmv_shrink[(batch.adapters, triton.cdiv(rank, SGMV_RANK) * split, slices)](
        x, a, v, *where, x.stride(0), a.stride(0), tokens,
        D_IN=projection.d_in, R=rank, BM=SGMV_ROWS, BR=SGMV_RANK, BK=SGMV_K, SPLIT=split, num_warps=4,
    )
    tiles = row_tiles(batch, EXPAND_ROWS, triton.cdiv(tokens, batch.adapters))
    _sgmv_expand[(column_blocks(projection, EXPAND_COLUMNS), batch.adapters, tiles)](
        y, v, b, *where, pool.scale, y.stride(0), tokens,
        D_OUT=projection.d_out, R=rank, BM=EXPAND_ROWS, BN=EXPAND_COLUMNS, num_warps=4, **width_constants(projection),
    )

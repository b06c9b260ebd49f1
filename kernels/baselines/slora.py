"""S-LoRA's operators (Sheng et al., MLSys 2024): MBGMV for decode, MBGMM in static Triton tiles for prefill.

MBGMV gives every (row, rank column) a program that reads that whole row of A from the pool, adapters of any rank side
by side, with no tensor cores, no split and so no zeroed buffer; a second kernel gives every (row, block of output
columns) a program. Nothing is faster for a few rows, and the cost is linear in rows because each one reads its
adapter again. MBGMM is the Triton kernel for segments: tiles 32 x 16 x 128 (rows, rank columns, d_in) to shrink and
32 x 128 to expand, for every input, on a grid of segments x the longest segment.

Simplified: one segment an adapter rather than a request (kinder: fewer half-empty tiles); the slices of a fused
projection share a launch; the pool's rows are contiguous, so the paging indirection is one offset a slot. Up to
DECODE_ROWS tokens take MBGMV (S-LoRA asks whether the batch is a decode).
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
from kernels.baselines.punica import bgmv_expand
from kernels.batch import Key, LoraBatch, LoraPool

CAPTURE = "free"
DECODE_ROWS = 96  # where the two forms cross on an H200 at rank 64
MBGMV_K, MBGMV_COLUMNS = 4096, 64
MBGMM_ROWS, MBGMM_RANK, MBGMM_K, MBGMM_COLUMNS = 32, 16, 128, 128


@triton.jit(do_not_specialize=["tokens"])
def _mbgmv_shrink(
    x_ptr, a_ptr, v_ptr, index_ptr, state_ptr, offset_ptr, rank_ptr, x_stride, a_slice, tokens,
    D_IN: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.load(index_ptr + row)
    if (slot < 0) | (row >= tl.load(state_ptr)):
        return
    if column >= tl.load(rank_ptr + slot):
        return
    a = a_ptr + part * a_slice + (tl.load(offset_ptr + slot) + column).to(tl.int64) * D_IN
    total = tl.zeros([BK], tl.float32)
    for i in range((D_IN + BK - 1) // BK):
        ks = i * BK + tl.arange(0, BK)
        x_part = tl.load(x_ptr + row.to(tl.int64) * x_stride + ks, mask=ks < D_IN, other=0.0)
        a_part = tl.load(a + ks, mask=ks < D_IN, other=0.0)
        total += x_part.to(tl.float32) * a_part.to(tl.float32)
    tl.store(v_ptr + (part * tokens + row) * R + column, tl.sum(total, 0))


@triton.jit(do_not_specialize=["tokens"])
def _mbgmm_shrink(
    x_ptr, a_ptr, v_ptr, perm_ptr, slot_ptr, start_ptr, stop_ptr, offset_ptr, rank_ptr, x_stride, a_slice, tokens,
    BLOCKS: tl.constexpr,
    D_IN: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):
    part = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    slot = tl.load(slot_ptr + tl.program_id(1))
    first = tl.load(start_ptr + tl.program_id(1)) + tl.program_id(2) * BM
    stop = tl.load(stop_ptr + tl.program_id(1))
    if first >= stop:
        return
    ranks = block * BR + tl.arange(0, BR)
    valid = ranks < tl.load(rank_ptr + slot)
    a = a_ptr + part * a_slice + (tl.load(offset_ptr + slot) + ranks).to(tl.int64)[None, :] * D_IN
    while first < stop:
        here = first + tl.arange(0, BM)
        rows = tl.load(perm_ptr + here, mask=here < stop, other=0)
        total = shrunk_tile(x_ptr, x_stride, rows, here < stop, a, valid, 0, D_IN, BM, BR, BK, 1)
        v = v_ptr + (part * tokens + rows)[:, None] * R + ranks[None, :]
        tl.store(v, total, mask=(here[:, None] < stop) & valid[None, :])
        first += BM * tl.num_programs(2)  # where the grid was sized for shorter segments (a captured graph)


@triton.jit(do_not_specialize=["tokens"])
def _mbgmm_expand(
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
    while first < stop:
        here = first + tl.arange(0, BM)
        rows = tl.load(perm_ptr + here, mask=here < stop, other=0)
        b_part = tl.load(b, mask=valid[:, None] & (columns[None, :] < end), other=0.0)
        v = v_ptr + (part * tokens + rows)[:, None] * R + ranks[None, :]
        v_part = tl.load(v, mask=(here[:, None] < stop) & valid[None, :], other=0.0)
        add_tile(y_ptr, y_stride, rows, here < stop, columns, end, v_part, b_part, tl.load(scale_ptr + slot))
        first += BM * tl.num_programs(2)


def op(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """y [T, d_out] += the branches of x [T, d_in], in place. Raises LoraError for inputs that do not fit."""
    checked(y, x, pool, batch, key)
    if batch.tokens and batch.adapters:
        (mbgmv if batch.tokens <= DECODE_ROWS else mbgmm)(y, x, pool, batch, key)


def mbgmv(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """The form for decode."""
    a, b, projection = pool.factors(key)
    slices, tokens, rank = projection.slices, batch.tokens, padded_rank(batch)
    v = torch.empty((slices, tokens, rank), dtype=torch.float32, device=x.device)
    _mbgmv_shrink[(tokens, rank, slices)](
        x, a, v, batch.index, batch.state, pool.offset, pool.rank, x.stride(0), a.stride(0), tokens,
        D_IN=projection.d_in, R=rank, BK=min(MBGMV_K, triton.next_power_of_2(projection.d_in)), num_warps=4,
    )
    bgmv_expand[(tokens, column_blocks(projection, MBGMV_COLUMNS))](
        y, v, b, batch.index, batch.state, pool.offset, pool.rank, pool.scale, y.stride(0), tokens,
        D_OUT=projection.d_out, R=rank, BN=MBGMV_COLUMNS, num_warps=4, **width_constants(projection),
    )


def mbgmm(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """The form for prefill."""
    a, b, projection = pool.factors(key)
    slices, tokens, rank = projection.slices, batch.tokens, padded_rank(batch)
    v = torch.empty((slices, tokens, rank), dtype=torch.float32, device=x.device)
    table = segments(batch)
    where = (batch.perm, table.slot, table.start, table.stop, pool.offset, pool.rank)
    longest = max((len(rows) for _, rows in batch.segments), default=1)
    blocks, tiles = triton.cdiv(rank, MBGMM_RANK), row_tiles(batch, MBGMM_ROWS, longest)
    _mbgmm_shrink[(blocks * slices, batch.adapters, tiles)](
        x, a, v, *where, x.stride(0), a.stride(0), tokens, BLOCKS=blocks,
        D_IN=projection.d_in, R=rank, BM=MBGMM_ROWS, BR=MBGMM_RANK, BK=MBGMM_K, num_warps=4, num_stages=2,
    )
    _mbgmm_expand[(column_blocks(projection, MBGMM_COLUMNS), batch.adapters, tiles)](
        y, v, b, *where, pool.scale, y.stride(0), tokens,
        D_OUT=projection.d_out, R=rank, BM=MBGMM_ROWS, BN=MBGMM_COLUMNS, num_warps=4, **width_constants(projection),
    )

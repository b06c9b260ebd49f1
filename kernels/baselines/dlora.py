"""dLoRA's unmerged operator (Wu et al., OSDI 2024): einsum over the adapters, or gathered weights and a batched
matmul.

* einsum: every row meets every resident adapter, v = x [A_0; A_1; ...]^T, the entries of the other adapters are
  zeroed, and y += v [B_0; B_1; ...]. Two matmuls at the library's full speed, with as many times too much arithmetic
  as there are adapters, whatever the batch asks for. As in any einsum, a NaN in one adapter's B reaches the rows of
  all (0 x NaN).
* gather: each row's A and B are copied out of the pool, then two batched matmuls; taken where that costs less: three
  times the factors of each row and a few launches, against the whole pool once.

Simplified: the one-hot of the einsum is a kernel that zeroes in place, the scale folded in (the original einsum makes
six kernels); mixed ranks share the pool's rows, so nothing is padded to the largest rank except by the gather.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import torch
import triton
import triton.language as tl

from kernels.baselines.inputs import checked, padded_rank
from kernels.batch import Key, LoraBatch, LoraPool

CAPTURE = "free"
GATHER_RANK = 16  # rows that one gathering program copies
GATHER_TRAFFIC = 3  # read from the pool, written to the gathered copy, read by the batched matmul
GATHER_LAUNCH_ROWS = 2048  # its further launches cost what the einsum takes for so many rows of the pool (H200: 7 us)


@triton.jit
def _keep_own(
    v_ptr, index_ptr, state_ptr, offset_ptr, rank_ptr, scale_ptr, v_stride,
    GATHERED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):
    """v[row] = scale * v[row] in the columns of the row's own adapter, and 0 elsewhere, even where it was NaN.

    Those columns are the adapter's rows of the pool, or the first ones where v was made from gathered factors.
    """
    row = tl.program_id(0)
    slot = tl.load(index_ptr + row)
    live = (slot >= 0) & (row < tl.load(state_ptr))
    first = 0
    if not GATHERED:
        first = tl.load(offset_ptr + slot, mask=live, other=0)
    stop = first + tl.load(rank_ptr + slot, mask=live, other=0)
    scale = tl.load(scale_ptr + slot, mask=live, other=0.0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = (columns >= first) & (columns < stop)
    v = v_ptr + row.to(tl.int64) * v_stride + columns
    old = tl.load(v, mask=own & (columns < WIDTH), other=0.0)
    tl.store(v, (old.to(tl.float32) * scale).to(old.dtype), mask=columns < WIDTH)


@triton.jit
def _gather(
    source_ptr, out_ptr, index_ptr, state_ptr, offset_ptr, rank_ptr, source_stride,
    R: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):
    """out[row, j] = source[offset[slot] + j], zeros where the row has no adapter or its rank ends before j."""
    row = tl.program_id(0)
    slot = tl.load(index_ptr + row)
    live = (slot >= 0) & (row < tl.load(state_ptr))
    first = tl.load(offset_ptr + slot, mask=live, other=0)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = columns[None, :] < WIDTH
    own = live & (ranks < tl.load(rank_ptr + slot, mask=live, other=0))
    source = source_ptr + (first + ranks).to(tl.int64)[:, None] * source_stride + columns[None, :]
    value = tl.load(source, mask=own[:, None] & inside, other=0.0)
    out = out_ptr + (row.to(tl.int64) * R + ranks[:, None]) * WIDTH + columns[None, :]
    tl.store(out, value, mask=inside)


def op(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """y [T, d_out] += the branches of x [T, d_in], in place. Raises LoraError for inputs that do not fit."""
    checked(y, x, pool, batch, key)
    if not batch.tokens or not batch.adapters:
        return
    gathers = GATHER_LAUNCH_ROWS + GATHER_TRAFFIC * batch.tokens * padded_rank(batch) < pool.rows
    (gathered if gathers else einsum)(y, x, pool, batch, key)


def einsum(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """Every row with every adapter, the foreign ones zeroed."""
    a, b, projection = pool.factors(key)
    for a_slice, b_slice, y_slice in zip(a, *(t.split(projection.widths, dim=1) for t in (b, y)), strict=True):
        v = x @ a_slice.T
        _mask_and_scale(v, pool, batch, gathered_columns=False)
        y_slice.addmm_(v, b_slice)


def gathered(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """Each row with its own copy of its adapter."""
    a, b, projection = pool.factors(key)
    for a_slice, b_slice, y_slice in zip(a, *(t.split(projection.widths, dim=1) for t in (b, y)), strict=True):
        v = torch.bmm(_own(a_slice, pool, batch), x[:, :, None])[:, :, 0]
        _mask_and_scale(v, pool, batch, gathered_columns=True)
        y_slice[:, None].baddbmm_(v[:, None], _own(b_slice, pool, batch))


def _mask_and_scale(v: torch.Tensor, pool: LoraPool, batch: LoraBatch, *, gathered_columns: bool) -> None:
    width = v.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    _keep_own[(batch.tokens, triton.cdiv(width, block))](
        v, batch.index, batch.state, pool.offset, pool.rank, pool.scale, v.stride(0),
        GATHERED=gathered_columns, BLOCK=block, WIDTH=width,
    )


def _own(factor: torch.Tensor, pool: LoraPool, batch: LoraBatch) -> torch.Tensor:
    """[T, padded rank, width]: each row's rows of `factor` [pool rows, width]."""
    rank, width = padded_rank(batch), factor.shape[1]
    own = torch.empty((batch.tokens, rank, width), dtype=factor.dtype, device=factor.device)
    block = min(256, triton.next_power_of_2(width))
    _gather[(batch.tokens, rank // GATHER_RANK, triton.cdiv(width, block))](
        factor, own, batch.index, batch.state, pool.offset, pool.rank, factor.stride(0),
        R=rank, BR=GATHER_RANK, BLOCK=block, WIDTH=width,
    )
    return own

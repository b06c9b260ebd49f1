"""Grouped GEMM through torch: rows sorted by adapter, then `torch.nn.functional.grouped_mm` for each of the two
products.

One group a slot of the pool, empty ones included: the group ends, which lie on the device, are all that a batch changes.
The rows of y are added to by a kernel of our own, since the grouped product can neither accumulate nor scatter.

At its best where the pool's adapters all have one rank and lie evenly spaced: then the pool is read where it lies.
Else the factors are first copied into an evenly spaced stack, padded with zeros to the largest rank, at every call: a
system built on grouped GEMM would pad its whole pool instead. Which of the two it is, the largest rank and the spacing are
shapes and strides of the product, hence the host's: a captured graph would go on with them after another adapter came.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import torch
import triton
import triton.language as tl
from torch.nn import functional

from kernels.baselines.inputs import checked, lies_sorted, segments
from kernels.batch import Key, LoraBatch, LoraError, LoraPool

CAPTURE = "frozen"


@triton.jit(do_not_specialize=["last_slot"])
def _scatter_add(
    y_ptr, branch_ptr, perm_ptr, index_ptr, scale_ptr, ends_ptr, last_slot, y_stride,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):
    """y[perm[i]] += scale * branch[i] for the sorted rows that have an adapter."""
    i = tl.program_id(0)
    if i >= tl.load(ends_ptr + last_slot):
        return
    row = tl.load(perm_ptr + i)
    scale = tl.load(scale_ptr + tl.load(index_ptr + row))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    branch = tl.load(branch_ptr + i.to(tl.int64) * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    y = y_ptr + row.to(tl.int64) * y_stride + columns
    old = tl.load(y, mask=inside, other=0.0)
    tl.store(y, (old.to(tl.float32) + scale * branch).to(old.dtype), mask=inside)


def op(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """y [T, d_out] += the branches of x [T, d_in], in place. Raises LoraError for inputs that do not fit."""
    a, b, projection = checked(y, x, pool, batch, key)
    if not batch.tokens or not batch.adapters:
        return
    ends = segments(batch).ends
    x_sorted = x if lies_sorted(batch) else x.index_select(0, batch.perm[: batch.tokens])
    for a_slice, b_slice, y_slice in zip(a, *(t.split(projection.widths, dim=1) for t in (b, y)), strict=True):
        v = functional.grouped_mm(x_sorted, stacked(a_slice, pool).transpose(1, 2), offs=ends)
        branch = functional.grouped_mm(v, stacked(b_slice, pool), offs=ends)
        width = branch.shape[1]
        block = min(1024, triton.next_power_of_2(width))
        _scatter_add[(batch.tokens, triton.cdiv(width, block))](
            y_slice, branch, batch.perm, batch.index, pool.scale, ends, pool.slots - 1, y_slice.stride(0),
            BLOCK=block, WIDTH=width,
        )


def stacked(factor: torch.Tensor, pool: LoraPool) -> torch.Tensor:
    """[slots, rank, width] of `factor` [pool rows, width]: a view where the pool is even, else a zero-padded copy."""
    even = even_spacing(pool)
    rank = max(pool.ranks)
    if even is not None:
        first, spacing = even
        size, stride = (pool.slots, rank, factor.shape[1]), (spacing * factor.stride(0), factor.stride(0), 1)
        return factor.as_strided(size, stride, factor.storage_offset() + first * factor.stride(0))
    lane = torch.arange(rank, device=factor.device)
    rows = torch.where(lane < pool.rank[:, None], pool.offset[:, None] + lane, 0)
    copied = factor.index_select(0, rows.flatten()).view(pool.slots, rank, -1)
    return torch.where((lane < pool.rank[:, None])[:, :, None], copied, 0)


def even_spacing(pool: LoraPool) -> tuple[int, int] | None:
    """(first row, rows between slots) if all adapters have one rank and slot j starts at first + j * spacing, inside
    the pool for every slot; None otherwise. LoraError for a pool without an adapter, which has neither."""
    used = [slot for slot, rank in enumerate(pool.ranks) if rank]
    if not used:
        raise LoraError(f"none of the {pool.slots} slots holds an adapter, so grouped has no rank to compute with; load one "
                        "first, with put(0, ...)")  # fmt: skip
    rank = pool.ranks[used[0]]
    spacing = rank
    if len(used) > 1:
        spacing, left = divmod(pool.offsets[used[1]] - pool.offsets[used[0]], used[1] - used[0])
        if left or spacing < rank:
            return None
    first = pool.offsets[used[0]] - used[0] * spacing
    if first < 0 or first + (pool.slots - 1) * spacing + rank > pool.rows:
        return None
    even = all(pool.ranks[slot] == rank and pool.offsets[slot] == first + slot * spacing for slot in used)
    return (first, spacing) if even else None

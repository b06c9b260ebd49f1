"""What every rival checks and reads: the factors of a projection, and the rows of a batch as one segment per adapter.

The rivals' papers call a run of rows that share an adapter a segment. `segments` lists them on the device, from the
sorted rows that `LoraBatch` holds, with one small kernel a step; a CUDA graph that captures `refresh` before its first
operator replays with any other batch. It knows no tile and no rival.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from kernels.batch import Key, LoraBatch, LoraError, LoraPool, Projection

MOST_TILES = 16


class Segments(NamedTuple):
    """int32 tensors over the pool's slots. Segment i < adapters: rows perm[start[i]:stop[i]] ask for adapter slot[i].

    Unused entries have slot -1 and start = stop = 0. ends[j]: where the rows of slots 0..j end in perm.
    """

    slot: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    ends: torch.Tensor


@triton.jit
def _rows_up_to(index_ptr, perm_ptr, tokens, slot, HALVINGS: tl.constexpr):
    """How many sorted rows ask for a slot of 0..`slot`; every lane bisects. Rows without an adapter stand last."""
    low = slot * 0
    high = slot * 0 + tokens
    for _ in range(HALVINGS):
        open_ = low < high
        middle = (low + high) // 2
        row = tl.load(perm_ptr + middle, mask=open_, other=0)
        asked = tl.load(index_ptr + row, mask=open_, other=-1)
        inside = (asked >= 0) & (asked <= slot)
        low = tl.where(open_ & inside, middle + 1, low)
        high = tl.where(open_ & (inside == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["slots"])
def _segments_kernel(
    index_ptr, perm_ptr, state_ptr, slot_ptr, start_ptr, stop_ptr, ends_ptr, slots,
    SLOTS: tl.constexpr, HALVINGS: tl.constexpr,
):
    """One program, a slot in each lane; a scan packs the slots that have rows."""
    tokens = tl.load(state_ptr)
    lane = tl.arange(0, SLOTS)
    stop = _rows_up_to(index_ptr, perm_ptr, tokens, lane, HALVINGS)
    start = _rows_up_to(index_ptr, perm_ptr, tokens, lane - 1, HALVINGS)
    real = lane < slots
    used = real & (stop > start)
    place = tl.cumsum(used.to(tl.int32), 0) - 1
    spare = real & (lane >= tl.sum(used.to(tl.int32), 0))  # entries that no used slot is packed into
    tl.store(ends_ptr + lane, stop, mask=real)
    tl.store(slot_ptr + lane, lane * 0 - 1, mask=spare)
    tl.store(start_ptr + lane, lane * 0, mask=spare)
    tl.store(stop_ptr + lane, lane * 0, mask=spare)
    tl.store(slot_ptr + place, lane, mask=used)
    tl.store(start_ptr + place, start, mask=used)
    tl.store(stop_ptr + place, stop, mask=used)


_CACHE: WeakKeyDictionary[LoraBatch, tuple[list, Segments]] = WeakKeyDictionary()


def segments(batch: LoraBatch) -> Segments:
    """The batch's segments on the device, built at the first call of a step (`update` makes a new step)."""
    cached = _CACHE.get(batch)
    if cached is None or cached[0] is not batch.segments:  # a new list object after every update
        return refresh(batch)
    return cached[1]


def refresh(batch: LoraBatch) -> Segments:
    """Build the segments again, into the same tensors. One kernel, no synchronisation."""
    cached = _CACHE.get(batch)
    slots = batch.pool.slots
    table = cached[1] if cached else Segments(*torch.zeros((4, slots), dtype=torch.int32, device=batch.index.device))
    _segments_kernel[(1,)](
        batch.index, batch.perm, batch.state, *table, slots, SLOTS=max(16, triton.next_power_of_2(slots)),
        HALVINGS=batch.max_tokens.bit_length() + 1, num_warps=4,
    )
    _CACHE[batch] = (batch.segments, table)
    return table


def row_tiles(batch: LoraBatch, rows: int, longest: int) -> int:
    """Programs that share a segment, each `rows` rows at a time: as many as the `longest` needs. A batch that was fixed for
    a graph does not know its replays' segments: as many as one of all its rows needs, up to MOST_TILES, which fill a GPU
    while programs that find nothing to do still cost little."""
    if batch._fixed is None:
        return triton.cdiv(longest, rows)
    return min(triton.cdiv(batch.tokens, rows), MOST_TILES)


def lies_sorted(batch: LoraBatch) -> bool:
    """Whether the rows of this step already lie in the order of `perm`. Never for a batch that was fixed for a graph,
    whose replays bring other rows."""
    index = batch.host_index
    return batch._fixed is None and bool((index >= 0).all() and (index[1:] >= index[:-1]).all())


def checked(
    y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key
) -> tuple[torch.Tensor, torch.Tensor, Projection]:
    """A [slices, rows, d_in], B [rows, d_out] and the Projection of `key`.

    LoraError for shapes that do not fit, and in mixture mode, which none of the rivals has.
    """
    a, b, projection = pool.factors(key)
    if batch.merged >= 0:
        raise LoraError(f"slot {batch.merged} is merged: no rival subtracts a merged adapter; use the atmm operator")
    for name, tensor, width in (("x", x, projection.d_in), ("y", y, projection.d_out)):
        contiguous = tensor.stride(-1) == 1 or not tensor.numel()
        if tuple(tensor.shape) != (batch.tokens, width) or not contiguous or tensor.dtype != pool.dtype:
            raise LoraError(
                f"{name} of {key} is {tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}, "
                f"expected ({batch.tokens}, {width}) {pool.dtype} with contiguous rows"
            )
    return a, b, projection


def width_constants(projection: Projection) -> dict[str, int]:
    """W0, W1, W2 for `column_block`: the slices' widths, 0 where there is none."""
    widths = (*projection.widths, 0, 0)
    return {"W0": widths[0], "W1": widths[1], "W2": widths[2]}


def column_blocks(projection: Projection, block: int) -> int:
    """Blocks of `block` columns that cover every slice, none across two."""
    return sum(triton.cdiv(width, block) for width in projection.widths)


def padded_rank(batch: LoraBatch) -> int:
    """The batch's largest rank, padded to a power of two (at least 16)."""
    return max(16, triton.next_power_of_2(batch.rank))


@triton.jit
def column_block(block, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BLOCK: tl.constexpr):
    """(slice, first column in y, end of the slice in y) of the block-th block of columns; widths are multiples of 8."""
    blocks0: tl.constexpr = (W0 + BLOCK - 1) // BLOCK
    blocks1: tl.constexpr = (W1 + BLOCK - 1) // BLOCK
    part = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    skipped = tl.where(part == 0, 0, tl.where(part == 1, blocks0, blocks0 + blocks1))
    start = tl.where(part == 0, 0, tl.where(part == 1, W0, W0 + W1))
    end = tl.where(part == 0, W0, tl.where(part == 1, W0 + W1, W0 + W1 + W2))
    return part, tl.multiple_of(start + (block - skipped) * BLOCK, 8), end


@triton.jit
def shrunk_tile(
    x_ptr, x_stride, rows, live, a, valid, split, D_IN: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """float32 [BM, BR]: the live rows of x by the valid columns of A^T (a [1, BR]: where each begins); part of SPLIT."""
    total = tl.zeros([BM, BR], tl.float32)
    for i in range((D_IN + BK * SPLIT - 1) // (BK * SPLIT)):
        ks = (i * SPLIT + split) * BK + tl.arange(0, BK)
        x = x_ptr + rows.to(tl.int64)[:, None] * x_stride + ks[None, :]
        x_part = tl.load(x, mask=live[:, None] & (ks[None, :] < D_IN), other=0.0)
        a_part = tl.load(a + ks[:, None], mask=valid[None, :] & (ks[:, None] < D_IN), other=0.0)
        total += tl.dot(x_part, a_part, input_precision="ieee")
    return total


@triton.jit
def add_tile(y_ptr, y_stride, rows, live, columns, end, v, b, scale):
    """y[live rows, columns before end] += scale * v [BM, R] b [R, columns]."""
    branch = scale * tl.dot(v.to(b.dtype), b, input_precision="ieee")
    y = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    inside = live[:, None] & (columns[None, :] < end)
    old = tl.load(y, mask=inside, other=0.0)
    tl.store(y, (old.to(tl.float32) + branch).to(old.dtype), mask=inside)

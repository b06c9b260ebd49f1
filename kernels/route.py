"""Sorts the rows of a step by adapter and packs them into row tiles, on the device, in one launch.

Order within an adapter is kept (stable), tiles are packed without gaps, and all addresses are fixed, so the launch can
be the first node of a CUDA graph. It knows slots and rows, nothing of projections or of which kernel reads the tiles.
"""

from __future__ import annotations

from kernels.target import INTERPRETED  # isort: skip  (before triton: it may choose the interpreter)

from collections.abc import Callable

import triton
import triton.language as tl

from kernels.batch import ROUTE_FIELDS, TILE_ROWS, LoraBatch
from kernels.launch import Launch, argument

CHUNK = 16 if INTERPRETED else 1024


@triton.jit
def _group(index, merged, slots):
    """Group of a row: its slot; `slots`: a base row that owes m's branch (mixture); `slots` + 1: nothing to add."""
    base = tl.where(merged >= 0, slots, slots + 1)
    group = tl.where((index >= 0) & (index < slots), index, base)
    return tl.where((merged >= 0) & (index == merged), slots + 1, group)


@triton.jit
def _write_tiles(
    route, capacity, total, counts, bins, group, first, rows, mine, fields, slots,
    BM: tl.constexpr, MOST: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """The group's entries of the route list of tile height BM; the last group clears what lies behind, and counts."""
    tiles = tl.where(bins <= slots, (counts + BM - 1) // BM, 0)
    before = tl.sum(tl.where(bins < group, tiles, 0))
    i = tl.arange(0, MOST)
    live = mine & (i * BM < rows)
    at = route + (before + i) * FIELDS
    tl.store(at, first + i * BM, mask=live)
    tl.store(at + 1, tl.minimum(rows - i * BM, BM), mask=live)
    for f in tl.static_range(2, 8):
        tl.store(at + f, fields[f - 2] + tl.zeros_like(i), mask=live)
    if group == slots + 1:
        tl.store(total, tl.sum(tiles))
        for c in tl.static_range(0, 2):  # capacity is under MOST + slots + 1 tiles, and MOST >= slots + 2
            j = before + c * MOST + i
            tl.store(route + j * FIELDS + 1, tl.zeros_like(i), mask=j < capacity)


@triton.jit
def route_kernel(
    state, index, perm, slot_offset, slot_rank, slot_scale, totals, route0, route1, route2, route3,
    cap0: tl.constexpr, cap1: tl.constexpr, cap2: tl.constexpr, cap3: tl.constexpr, slots: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, FIELDS: tl.constexpr,
    BM0: tl.constexpr, BM1: tl.constexpr, BM2: tl.constexpr, BM3: tl.constexpr,
    MOST0: tl.constexpr, MOST1: tl.constexpr, MOST2: tl.constexpr, MOST3: tl.constexpr,
):  # fmt: skip
    """One program a group of rows. Every program counts all rows (L2 holds them), then places its own.

    Input read once per program: tokens x 4 bytes. `_group` numbers the groups; group slots + 1 gets no tile.
    """
    group = tl.program_id(0)
    tokens = tl.load(state)
    merged = tl.load(state + 1)
    lane = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for c in range(CHUNKS):
        row = c * CHUNK + lane
        g = _group(tl.load(index + row, mask=row < tokens, other=-1), merged, slots)
        counts += tl.histogram(tl.where(row < tokens, g, BINS - 1), BINS)
    counts = tl.where(bins <= slots + 1, counts, 0)
    first = tl.sum(tl.where(bins < group, counts, 0))
    rows = tl.sum(tl.where(bins == group, counts, 0))
    running = first
    for c in range(CHUNKS):
        row = c * CHUNK + lane
        g = _group(tl.load(index + row, mask=row < tokens, other=-1), merged, slots)
        hit = ((g == group) & (row < tokens)).to(tl.int32)
        tl.store(perm + running + tl.cumsum(hit) - 1, row, mask=hit > 0)
        running += tl.sum(hit)
    own = group < slots
    offset = tl.load(slot_offset + group, mask=own, other=0)
    rank = tl.load(slot_rank + group, mask=own, other=0)
    scale = tl.load(slot_scale + group, mask=own, other=0.0).to(tl.int32, bitcast=True)
    m_offset = tl.load(slot_offset + merged, mask=merged >= 0, other=0)
    m_rank = tl.load(slot_rank + merged, mask=merged >= 0, other=0)
    m_scale = (-tl.load(slot_scale + merged, mask=merged >= 0, other=0.0)).to(tl.int32, bitcast=True)
    fields = (offset, rank, scale, m_offset, m_rank, m_scale)
    mine = group <= slots
    _write_tiles(route0, cap0, totals + 0, counts, bins, group, first, rows, mine, fields, slots, BM0, MOST0, FIELDS)
    _write_tiles(route1, cap1, totals + 1, counts, bins, group, first, rows, mine, fields, slots, BM1, MOST1, FIELDS)
    _write_tiles(route2, cap2, totals + 2, counts, bins, group, first, rows, mine, fields, slots, BM2, MOST2, FIELDS)
    _write_tiles(route3, cap3, totals + 3, counts, bins, group, first, rows, mine, fields, slots, BM3, MOST3, FIELDS)


def build_routes(batch: LoraBatch) -> None:
    """Fill batch.perm and batch.routes from batch.index, batch.state and the pool's slots, without synchronisation.

    One launch and a memset. The memset orders: what follows it, even by dependent launch, may read the routes at once.
    """
    launch = batch.plans.get("route")
    if launch is None:
        launch = batch.plans["route"] = _launch(batch)
    launch()
    batch.fence.zero_()


def _launch(batch: LoraBatch) -> Callable:
    """The route kernel, resolved for one batch."""
    slots, most_slots = batch.pool.slots, triton.next_power_of_2(batch.pool.slots + 2)
    constants = {
        "slots": slots, "CHUNKS": -(-batch.max_tokens // CHUNK), "CHUNK": CHUNK, "FIELDS": ROUTE_FIELDS,
        "BINS": triton.next_power_of_2(slots + 3),  # one spare bin for lanes behind the last row
    }  # fmt: skip
    for i, rows in enumerate(TILE_ROWS):
        most = max(triton.next_power_of_2(-(-batch.max_tokens // rows)), most_slots)
        constants |= {f"BM{i}": rows, f"MOST{i}": most, f"cap{i}": len(batch.routes[rows])}
    pool = batch.pool
    tensors = [batch.state, batch.index, batch.perm, pool.offset, pool.rank, pool.scale, batch.counts[TILE_ROWS[0]]]
    tensors += batch.routes.values()
    types = dict(zip(route_kernel.arg_names, (tensor.dtype for tensor in tensors), strict=False))
    run = Launch(route_kernel, (slots + 2, 1), constants, types).bind(pool.device)
    arguments = [argument(tensor) for tensor in tensors]
    return lambda: run(*arguments)

"""The LoRA branch for many rows: a fixed number of programs that share the work of whatever row tiles the step has.

`shrink_stream` cuts all steps over d_in of all row tiles into equal runs, one a program (the stream-K schedule of Osama
et al., PPoPP 2023, without its fix-up: partial sums go to planes, which the expand adds); `expand_stream` cuts all
column blocks likewise. So uneven adapters leave no program without work, and a graph's grid needs no room for the worst
case: the number of tiles is read on the device. Mixture mode is left to `kernels.branch`.
"""

from __future__ import annotations

from kernels.target import INTERPRETED  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import triton
import triton.language as tl

from kernels.branch import _dot, entry, number, pin
from kernels.dependent import trigger, wait


@triton.jit
def _share(steps, programs, least):
    """Steps that each of the programs takes: an equal share, but no less than `least`."""
    return tl.maximum((steps + programs - 1) // programs, least)


@triton.jit
def shrink_stream(
    x, a, v, route, perm, counts, positions, pool_rows, least,
    XS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """v[part, slice, position, R] = scale * x[perm[position], part's columns] A^T, in v's type; grid (programs, 1).

    counts: row tiles of height BM. Each program takes at least `least` steps of BK columns, so a tile of a slice has at
    most ceil(steps of d_in / least) + 1 parts, numbered from its first program on.
    """
    if PDL:
        trigger()
    NK: tl.constexpr = (K + BK - 1) // BK
    EVEN: tl.constexpr = K % BK == 0
    tasks = tl.load(counts) * SLICES
    share = _share(tasks * NK, tl.num_programs(0), least)
    at = tl.program_id(0) * share
    end = tl.minimum(at + share, tasks * NK)
    m = tl.arange(0, BM)
    r = tl.arange(0, R)
    if PDL:
        wait()
    while at < end:
        task = at // NK
        s = task % SLICES
        steps = tl.minimum((task + 1) * NK, end) - at
        k = (at - task * NK) * BK + tl.arange(0, BK)
        first, rows, offset, rank, scale = entry(route, task // SLICES, 0)
        live = m < rows
        token = tl.load(perm + first + m, mask=live, other=0).to(tl.int64)
        x_at = x + token[:, None] * XS + k[None, :]
        a_at = a + (s * pool_rows + offset + r).to(tl.int64)[:, None] * K + k[None, :]
        a_live = (r < rank)[:, None]
        acc = tl.zeros([BM, R], tl.float32)
        for i in tl.range(0, number(steps), num_stages=STAGES):
            inside = (k + i * BK < K)[None, :]
            a_tile = tl.load(a_at + i * BK, mask=a_live if EVEN else a_live & inside, other=0.0)
            x_tile = tl.load(x_at + i * BK, mask=live[:, None] if EVEN else live[:, None] & inside, other=0.0)
            acc = _dot(x_tile, tl.trans(a_tile), acc, IEEE)
        plane = (tl.program_id(0) - task * NK // share) * SLICES + s
        v_at = v + (plane.to(tl.int64) * positions + first) * R + m[:, None] * R + r[None, :]
        tl.store(v_at, acc * scale, mask=live[:, None])
        at += steps


@triton.jit
def expand_stream(
    y, b, v, route, perm, counts, positions, least, former, span,
    YS: tl.constexpr, D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, R: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, NK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """y[perm[position], columns] += (sum of v's parts) B; grid (programs, 1), each at least `span` blocks of BN columns.

    NK, least, former: the shrink's steps of d_in, least share and programs; a tile has at most SPLIT + 1 parts.
    """
    if PDL:
        trigger()
    N0: tl.constexpr = (W0 + BN - 1) // BN
    N1: tl.constexpr = N0 + (W1 + BN - 1) // BN
    NN: tl.constexpr = N1 + (W2 + BN - 1) // BN
    EVEN: tl.constexpr = W0 % BN == 0 and W1 % BN == 0 and W2 % BN == 0
    tiles = tl.load(counts)
    share = _share(tiles * SLICES * NK, former, least)
    own = _share(tiles * NN, tl.num_programs(0), span)
    at = tl.program_id(0) * own
    end = tl.minimum(at + own, tiles * NN)
    m = tl.arange(0, BM)
    r = tl.arange(0, R)
    dtype: tl.constexpr = b.dtype.element_ty
    if PDL:
        wait()
    while at < end:
        tile = at // NN
        block = at - tile * NN
        s = (block >= N0).to(tl.int32) + (block >= N1).to(tl.int32)
        start = tl.where(s == 0, 0, tl.where(s == 1, N0, N1))
        stop = tl.where(s == 0, N0, tl.where(s == 1, N1, NN))
        width = tl.where(s == 0, W0, tl.where(s == 1, W1, W2))
        base = tl.where(s == 0, 0, tl.where(s == 1, W0, W0 + W1))
        steps = tl.minimum(stop - block, end - at)
        first, rows, offset, rank, _ = entry(route, tile, 0)
        live = m < rows
        token = tl.load(perm + first + m, mask=live, other=0).to(tl.int64)
        task = tile * SLICES + s
        parts = ((task + 1) * NK - 1) // share - task * NK // share + 1
        v_at = v + ((s * positions + first + m).to(tl.int64) * R)[:, None] + r[None, :]
        v_live = live[:, None] & (r < rank)[None, :]
        total = tl.load(v_at, mask=v_live, other=0.0, cache_modifier=".cg").to(tl.float32)
        for p in tl.static_range(1, SPLIT + 1):
            mask = v_live & (p < parts)
            total += tl.load(v_at + p * SLICES * positions * R, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        v_tile = pin(total).to(dtype)
        n = (block - start) * BN + tl.arange(0, BN)
        b_at = b + (offset + r).to(tl.int64)[:, None] * D + (base + n)[None, :]
        y_at = y + token[:, None] * YS + (base + n)[None, :]
        b_live = (r < rank)[:, None]
        for i in tl.range(0, number(steps), num_stages=STAGES):
            inside = (n + i * BN < width)[None, :]
            b_tile = tl.load(b_at + i * BN, mask=b_live if EVEN else b_live & inside, other=0.0)
            y_live = live[:, None] if EVEN else live[:, None] & inside
            acc = tl.load(y_at + i * BN, mask=y_live, other=0.0).to(tl.float32)
            acc = _dot(v_tile, b_tile, acc, IEEE)
            tl.store(y_at + i * BN, acc.to(y.dtype.element_ty), mask=y_live)
        at += steps

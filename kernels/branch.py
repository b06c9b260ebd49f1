"""The Triton kernels of the LoRA branch: shrink (x A^T), expand (y += v B), and both in one for few and for very many rows.

One program of `shrink` and `expand` works on a row tile, rows of one adapter gathered through `perm`; a tile's entry in
the route list says where its rows, its A and B rows and its scale are, so nothing depends on the host. The kernels know
no table and no default: every tile size is an argument.

With dependent launch (PDL) every kernel lets its successor start at once, and the successor reads what no kernel of the
step writes (factors, routes) before it waits for its predecessor's results; x, y and v are read after the wait. So
factors and routes must be complete before the step's first launch: `LoraBatch.update` sees to it, for factors loaded
before it too. A program of a tile without rows (a graph's grid has room for the worst case) ends at once; the first
tile's programs wait even so, because a launch that waits for nothing could end before its predecessor does.
"""

from __future__ import annotations

from kernels.target import INTERPRETED  # isort: skip  (before triton: it may choose the interpreter)

import triton
import triton.language as tl

from kernels.dependent import all_stored, trigger, until, wait

if INTERPRETED:

    @triton.jit
    def pin(value):
        return value

    def number(value):
        """A scalar as the interpreter's range() takes it."""
        return value.handle.data.item()

else:

    @triton.jit
    def pin(value):
        """The same float32 value, behind an opaque instruction.

        Without it the compiler moves the conversion to the dot's layout above a sum of loads, and then each load takes
        its own turn through shared memory, barriers included (seen in SASS, Triton 3.6: 16 planes, 16 turns).
        """
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=False, pack=1)

    @triton.jit
    def number(value):
        return value


@triton.jit
def _dot(a, b, acc, IEEE: tl.constexpr):
    """acc + a b in float32; true float32 products for float32 operands (tests), tensor cores otherwise."""
    if IEEE:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def entry(route, tile, M: tl.constexpr):
    """(first, rows, A/B row offset, rank, scale) of a tile; M: of the merged adapter, whose scale is negative."""
    at = route + tile * 8
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2 + 3 * M),
        tl.load(at + 3 + 3 * M) // 16 * 16,  # ranks are padded to 16; saying so lets masked loads stay 16 bytes wide
        tl.load(at + 4 + 3 * M).to(tl.float32, bitcast=True),
    )


@triton.jit
def _shrink(
    x, a, v, route, perm, tile, program, first, rows, offset, rank, scale, positions, pool_rows, split,
    XS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, PASSES: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr, STAGES: tl.constexpr,
    READY: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """What one program of `shrink` does, the program-th of a tile whose entry is first .. scale."""
    part = program % split
    plane = program // split // (R // BR)
    r = program // split % (R // BR) * BR + tl.arange(0, BR)
    M: tl.constexpr = PASSES - 1
    if M:
        _, _, m_offset, m_rank, m_scale = entry(route, tile, 1)
        is_m = plane >= SLICES
        offset = tl.where(is_m, m_offset, offset)
        rank = tl.where(is_m, m_rank, rank)
        scale = tl.where(is_m, m_scale, scale)
    NK: tl.constexpr = (K + BK - 1) // BK
    EVEN: tl.constexpr = K % BK == 0
    share = 1 if ONCE else (NK + split - 1) // split
    m = tl.arange(0, BM)
    k = part * share * BK + tl.arange(0, BK)
    live = m < rows
    a_at = a + ((plane % SLICES) * pool_rows + offset + r).to(tl.int64)[:, None] * K + k[None, :]
    a_live = (r < tl.where(rows > 0, rank, 0))[:, None]
    if ONCE:
        a_tile = tl.load(a_at, mask=a_live if EVEN else a_live & (k < K)[None, :], other=0.0)
    token = tl.load(perm + first + m, mask=live, other=0).to(tl.int64)
    if PDL and not READY:
        wait()
    CACHE: tl.constexpr = ".cg" if READY else ""  # what this multiprocessor has of x may be of an earlier kernel
    x_at = x + token[:, None] * XS + k[None, :]
    acc = tl.zeros([BM, BR], tl.float32)
    if ONCE:
        inside = (k < K)[None, :]
        x_tile = tl.load(x_at, mask=live[:, None] if EVEN else live[:, None] & inside, other=0.0, cache_modifier=CACHE)
        acc = _dot(x_tile, tl.trans(a_tile), acc, IEEE)
    else:
        steps = tl.where(rows > 0, tl.minimum(NK - part * share, share), 0)
        for i in tl.range(0, number(steps), num_stages=STAGES):
            inside = (k + i * BK < K)[None, :]
            a_tile = tl.load(a_at + i * BK, mask=a_live if EVEN else a_live & inside, other=0.0)
            x_live = live[:, None] if EVEN else live[:, None] & inside
            x_tile = tl.load(x_at + i * BK, mask=x_live, other=0.0, cache_modifier=CACHE)
            acc = _dot(x_tile, tl.trans(a_tile), acc, IEEE)
    v_at = v + ((part * SLICES * PASSES + plane).to(tl.int64) * positions + first) * R + m[:, None] * R + r[None, :]
    tl.store(v_at, acc * scale, mask=live[:, None])


@triton.jit
def shrink(
    x, a, v, route, perm, positions, pool_rows, split,
    XS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, PASSES: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr, STAGES: tl.constexpr,
    READY: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """v[part, pass x slice, position, R] = scale * x[perm[position], K / split columns] A^T, in v's type.

    Grid (split * R / BR * SLICES * PASSES, tiles): a program does BR columns of v, over one of `split` parts of d_in.
    a [SLICES, pool_rows, K] of one layer. `positions`: rows of a plane. ONCE: BK columns are a whole part. READY: x is
    complete when the kernel starts, and nobody reads v any more; one program waits for the kernel before, at its end.
    """
    if PDL:
        trigger()
    tile = tl.program_id(1)
    first, rows, offset, rank, scale = entry(route, tile, 0)
    if (rows == 0) & (tile > 0):
        return
    _shrink(x, a, v, route, perm, tile, tl.program_id(0), first, rows, offset, rank, scale, positions, pool_rows, split,
            XS, K, R, SLICES, PASSES, BR, BM, BK, ONCE, STAGES, READY, PDL, IEEE)  # fmt: skip
    if PDL and READY:
        one = (tl.program_id(0) == 0) & (tile == 0)
        if one:
            wait()


@triton.jit
def _planes(
    v, plane, position, live, r, rank, positions, R: tl.constexpr, PLANES: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Sum over splits of one v tile [BM, R] in float32; columns behind the rank are zero whatever they hold."""
    at = v + (plane.to(tl.int64) * positions + position)[:, None] * R + r[None, :]
    mask = live[:, None] & (r < rank)[None, :]
    total = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    for s in tl.static_range(1, SPLIT):
        total += tl.load(at + s * PLANES * positions * R, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return pin(total)


@triton.jit
def _slice(pid, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, STEP: tl.constexpr):
    """(slice, first column within it, its width, its first column in y) of the pid-th run of STEP columns."""
    N0: tl.constexpr = (W0 + STEP - 1) // STEP
    N1: tl.constexpr = (W1 + STEP - 1) // STEP
    s = (pid >= N0).to(tl.int32) + (pid >= N0 + N1).to(tl.int32)
    start = tl.where(s == 0, 0, tl.where(s == 1, N0, N0 + N1))
    width = tl.where(s == 0, W0, tl.where(s == 1, W1, W2))
    base = tl.where(s == 0, 0, tl.where(s == 1, W0, W0 + W1))
    return s, (pid - start) * STEP, width, base


@triton.jit
def expand(
    y, b, v, route, perm, positions,
    YS: tl.constexpr, D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, R: tl.constexpr,
    SLICES: tl.constexpr, PASSES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """y[perm[position], columns] += (sum of v's planes) B [pool rows, D]; grid (runs of SPAN * BN columns, tiles)."""
    if PDL:
        trigger()
    M: tl.constexpr = PASSES - 1
    first, rows, offset, rank, _ = entry(route, tl.program_id(1), 0)
    if (rows == 0) & (tl.program_id(1) > 0):
        return
    s, column, width, base = _slice(tl.program_id(0), W0, W1, W2, BN * SPAN)
    EVEN: tl.constexpr = W0 % (BN * SPAN) == 0 and W1 % (BN * SPAN) == 0 and W2 % (BN * SPAN) == 0
    m = tl.arange(0, BM)
    r = tl.arange(0, R)
    n = column + tl.arange(0, BN)
    live = m < rows
    token = tl.load(perm + first + m, mask=live, other=0).to(tl.int64)
    b_at = b + (offset + r).to(tl.int64)[:, None] * D + (base + n)[None, :]
    b_live = (r < tl.where(rows > 0, rank, 0))[:, None]
    y_at = y + token[:, None] * YS + (base + n)[None, :]
    if M:
        _, _, m_offset, m_rank, _ = entry(route, tl.program_id(1), 1)
        bm_at = b + (m_offset + r).to(tl.int64)[:, None] * D + (base + n)[None, :]
        bm_live = (r < tl.where(rows > 0, m_rank, 0))[:, None]
    if SPAN == 1:
        inside = (n < width)[None, :]
        b_tile = tl.load(b_at, mask=b_live if EVEN else b_live & inside, other=0.0)
        if M:
            bm_tile = tl.load(bm_at, mask=bm_live if EVEN else bm_live & inside, other=0.0)
    if PDL:
        wait()
    if rows == 0:
        return
    if SPAN == 1:
        y_live = live[:, None] if EVEN else live[:, None] & inside
        y_tile = tl.load(y_at, mask=y_live, other=0.0)
    PLANES: tl.constexpr = SLICES * PASSES
    v_tile = _planes(v, s, first + m, live, r, rank, positions, R, PLANES, SPLIT).to(b.dtype.element_ty)
    if M:
        vm_tile = _planes(v, s + SLICES, first + m, live, r, m_rank, positions, R, PLANES, SPLIT).to(b.dtype.element_ty)
    if SPAN == 1:
        acc = _dot(v_tile, b_tile, tl.zeros([BM, BN], tl.float32), IEEE)
        if M:
            acc = _dot(vm_tile, bm_tile, acc, IEEE)
        tl.store(y_at, (acc + y_tile).to(y.dtype.element_ty), mask=y_live)
    else:
        for i in tl.range(0, SPAN, num_stages=STAGES):
            inside = (n + i * BN < width)[None, :]
            b_tile = tl.load(b_at + i * BN, mask=b_live if EVEN else b_live & inside, other=0.0)
            y_live = live[:, None] if EVEN else live[:, None] & inside
            # y is the accumulator's start: a load that feeds the dot is what the compiler pipelines
            acc = tl.load(y_at + i * BN, mask=y_live, other=0.0).to(tl.float32)
            acc = _dot(v_tile, b_tile, acc, IEEE)
            if M:
                bm_tile = tl.load(bm_at + i * BN, mask=bm_live if EVEN else bm_live & inside, other=0.0)
                acc = _dot(vm_tile, bm_tile, acc, IEEE)
            tl.store(y_at + i * BN, acc.to(y.dtype.element_ty), mask=y_live)


@triton.jit
def _add_met(
    y, b, v, came, went, route, perm, tile, run, first, rows, offset, rank, positions,
    PARTS: tl.constexpr, RUNS: tl.constexpr, YS: tl.constexpr, D: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, PASSES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, READY: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """The run-th of RUNS programs of a tile whose entry is first .. rank: waits for its PARTS, and adds to y."""
    s, column, width, base = _slice(run, W0, W1, W2, BN)
    EVEN: tl.constexpr = W0 % BN == 0 and W1 % BN == 0 and W2 % BN == 0
    PLANES: tl.constexpr = SLICES * PASSES
    M: tl.constexpr = PASSES - 1
    m = tl.arange(0, BM)
    r = tl.arange(0, R)
    n = column + tl.arange(0, BN)
    live = m < rows
    inside = (n < width)[None, :]
    token = tl.load(perm + first + m, mask=live, other=0).to(tl.int64)
    b_at = b + (offset + r).to(tl.int64)[:, None] * D + (base + n)[None, :]
    b_live = (r < rank)[:, None]
    b_tile = tl.load(b_at, mask=b_live if EVEN else b_live & inside, other=0.0)
    if M:
        _, _, m_offset, m_rank, _ = entry(route, tile, 1)
        bm_at = b + (m_offset + r).to(tl.int64)[:, None] * D + (base + n)[None, :]
        bm_live = (r < m_rank)[:, None]
        bm_tile = tl.load(bm_at, mask=bm_live if EVEN else bm_live & inside, other=0.0)
    if PDL and not READY:
        wait()  # the kernel before may be of the same plan, and still count
    until(came + tile, PARTS)
    dtype: tl.constexpr = b.dtype.element_ty
    v_tile = _planes(v, s, first + m, live, r, rank, positions, R, PLANES, SPLIT).to(dtype)
    acc = _dot(v_tile, b_tile, tl.zeros([BM, BN], tl.float32), IEEE)
    if M:
        vm_tile = _planes(v, s + SLICES, first + m, live, r, m_rank, positions, R, PLANES, SPLIT).to(dtype)
        acc = _dot(vm_tile, bm_tile, acc, IEEE)
    if tl.atomic_add(went + tile, 1, sem="relaxed") == RUNS - 1:
        tl.store(came + tile, 0)
        tl.store(went + tile, 0)
    y_at = y + token[:, None] * YS + (base + n)[None, :]
    y_live = live[:, None] if EVEN else live[:, None] & inside
    if PDL and READY:
        wait()
    y_tile = tl.load(y_at, mask=y_live, other=0.0)
    tl.store(y_at, (acc + y_tile).to(y.dtype.element_ty), mask=y_live)


@triton.jit
def under(
    y, x, a, b, v, came, went, route, perm, positions, pool_rows, shrinkers,
    XS: tl.constexpr, YS: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr, PASSES: tl.constexpr,
    BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, ONCE: tl.constexpr,
    STAGES: tl.constexpr, READY: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """`shrink` and `expand` of few rows in one launch, all but the last sum while the linear that writes y still runs.

    Grid (shrinkers + tiles * runs of BN columns): the first programs do v's parts, the others wait for those of their tile,
    multiply by B, wait for the kernel before, and add. Programs start in their order, so those waited for run already.
    came, went int32 [tiles]: programs of either kind that are through with a tile, zero before and after. READY: `shrink`.
    """
    if PDL:
        trigger()
    PARTS: tl.constexpr = SPLIT * (R // BR) * SLICES * PASSES
    RUNS: tl.constexpr = (W0 + BN - 1) // BN + (W1 + BN - 1) // BN + (W2 + BN - 1) // BN
    pid = tl.program_id(0)
    if pid < shrinkers:
        tile = pid // PARTS
        first, rows, offset, rank, scale = entry(route, tile, 0)
        if rows > 0:
            _shrink(x, a, v, route, perm, tile, pid % PARTS, first, rows, offset, rank, scale, positions, pool_rows, SPLIT,
                    XS, K, R, SLICES, PASSES, BR, BM, BK, ONCE, STAGES, READY, PDL, IEEE)  # fmt: skip
            all_stored()  # every thread's stores come before the one thread's release
            tl.atomic_add(came + tile, 1, sem="release")
        elif PDL:
            none = tile == 0  # no tile has rows: then this is what the end of the kernel waits for
            if none:
                wait()
    else:
        tile = (pid - shrinkers) // RUNS
        first, rows, offset, rank, _ = entry(route, tile, 0)
        if rows > 0:
            _add_met(y, b, v, came, went, route, perm, tile, (pid - shrinkers) % RUNS, first, rows, offset, rank, positions,
                     PARTS, RUNS, YS, D, W0, W1, W2, R, SLICES, PASSES, BM, BN, SPLIT, READY, PDL, IEEE)  # fmt: skip


@triton.jit
def _walk(
    y, b, v_tile, token, live, offset, rank, base, YS: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """y[token, one slice's columns (this part of PARTS)] += v_tile B."""
    r = tl.arange(0, R)
    NN: tl.constexpr = (W + PARTS * BN - 1) // (PARTS * BN)
    EVEN: tl.constexpr = W % (PARTS * BN) == 0
    n = tl.program_id(0) * (NN * BN) + tl.arange(0, BN)
    b_at = b + (offset + r).to(tl.int64)[:, None] * D + (base + n)[None, :]
    y_at = y + token[:, None] * YS + (base + n)[None, :]
    b_live = (r < rank)[:, None]
    for i in tl.range(0, NN, num_stages=STAGES):
        inside = (n + i * BN < W)[None, :]
        b_tile = tl.load(b_at + i * BN, mask=b_live if EVEN else b_live & inside, other=0.0)
        y_live = live[:, None] if EVEN else live[:, None] & inside
        acc = tl.load(y_at + i * BN, mask=y_live, other=0.0).to(tl.float32)
        acc = _dot(v_tile, b_tile, acc, IEEE)
        tl.store(y_at + i * BN, acc.to(y.dtype.element_ty), mask=y_live)


@triton.jit
def fused(
    y, x, a, b, route, perm, pool_rows,
    XS: tl.constexpr, YS: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, STAGES2: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Both halves for one row tile: x is streamed once, v stays in registers, then y's columns are walked.

    Grid (PARTS, tiles): PARTS programs share a tile's columns and repeat its shrink (x then comes from L2).
    """
    if PDL:
        trigger()
    first, rows, offset, rank, scale = entry(route, tl.program_id(1), 0)
    if (rows == 0) & (tl.program_id(1) > 0):
        return
    m = tl.arange(0, BM)
    r = tl.arange(0, R)
    k = tl.arange(0, BK)
    live = m < rows
    token = tl.load(perm + first + m, mask=live, other=0).to(tl.int64)
    if PDL:
        wait()
    if rows == 0:
        return
    NK: tl.constexpr = (K + BK - 1) // BK
    EVEN: tl.constexpr = K % BK == 0
    x_at = x + token[:, None] * XS + k[None, :]
    a_at = a + (offset + r).to(tl.int64)[:, None] * K + k[None, :]
    slice_step = pool_rows.to(tl.int64) * K
    a_live = (r < rank)[:, None]
    acc0 = tl.zeros([BM, R], tl.float32)
    acc1 = acc0
    acc2 = acc0
    for i in tl.range(0, NK, num_stages=STAGES):
        inside = (k + i * BK < K)[None, :]
        mask = a_live if EVEN else a_live & inside
        x_tile = tl.load(x_at + i * BK, mask=live[:, None] if EVEN else live[:, None] & inside, other=0.0)
        acc0 = _dot(x_tile, tl.trans(tl.load(a_at + i * BK, mask=mask, other=0.0)), acc0, IEEE)
        if SLICES > 1:
            acc1 = _dot(x_tile, tl.trans(tl.load(a_at + slice_step + i * BK, mask=mask, other=0.0)), acc1, IEEE)
        if SLICES > 2:
            acc2 = _dot(x_tile, tl.trans(tl.load(a_at + 2 * slice_step + i * BK, mask=mask, other=0.0)), acc2, IEEE)
    dtype = b.dtype.element_ty
    v_tile = (acc0 * scale).to(dtype)
    _walk(y, b, v_tile, token, live, offset, rank, 0, YS, D, W0, R, BN, PARTS, STAGES2, IEEE)
    if SLICES > 1:
        v_tile = (acc1 * scale).to(dtype)
        _walk(y, b, v_tile, token, live, offset, rank, W0, YS, D, W1, R, BN, PARTS, STAGES2, IEEE)
    if SLICES > 2:
        v_tile = (acc2 * scale).to(dtype)
        _walk(y, b, v_tile, token, live, offset, rank, W0 + W1, YS, D, W2, R, BN, PARTS, STAGES2, IEEE)

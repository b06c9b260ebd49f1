"""Decode attention over a paged KV cache: one query token a request, multi-head and grouped-query.

torch has no paged attention for these shapes, and its flash kernel does not split the keys of multi-head models, so that few
requests leave most of the GPU idle. Two kernels. `_partial`: the keys of all requests and KV heads, cut into tiles and laid
end to end, are shared evenly among a fixed number of programs, so that neither few requests nor one long one leaves some of
them idle (the schedule of Stream-K, Osama et al., PPoPP 2023); a program walks the (request, head) pairs in its share, and
writes a pair's result if all of its keys are there. `_combine` puts the pieces of the other pairs together by their
log-sum-exp (Flash-Decoding, 2023), in order. Every program finds its share from the lengths, so a captured graph serves any
lengths and pages, and a request of length 0 costs nothing. It knows no model, no scheduler and no prefill.

With dependent launch the programs read lengths and tables before they wait for the kernel before: those must be complete
before the step's first launch. Keys, values and queries need not be.
"""

from __future__ import annotations

from kernels.target import INTERPRETED  # isort: skip  (before triton: it may choose the interpreter)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.dependent import chained, trigger, wait

LOG2_E = 1.4426950408889634
KEYS = 32
"""Keys of one tile; a multiple of the page."""
GROUP_ROWS = 16
"""Query heads of a KV head are padded to this, the smallest tensor-core tile."""
REQUESTS = 64
"""Requests are padded to this, or to a power of two beyond."""
PIECES = 16
"""Pieces that are put together in one go."""
FEW_PAIRS = 256


@dataclass(frozen=True)
class Shares:
    """programs: among which the tiles are shared. stages, warps: of each."""

    programs: int
    stages: int
    warps: int


FEW, MANY, GROUPED = Shares(528, 4, 1), Shares(1056, 2, 1), Shares(528, 2, 4)
"""Shares of multi-head models with up to FEW_PAIRS (request, head) pairs, with more, and of grouped-query models.

NVIDIA H200, 2026-11-24, torch 2.11.0, Triton 3.6.0, bf16, head_dim 128, CUDA graph, cold keys; microseconds of rotary + KV
write (1.1 to 2.1) and attention together, requests x keys; "mixed": 8 x 4,000, 48 x 500, 7 x 100; memory at 4.4 TB/s:

    32 heads             1 x 1,000   8 x 1,000   32 x 1,000   64 x 1,000   mixed
    FEW                       11.4        40.3
    MANY                      12.4        39.9        135.5        249.4   226.6
    memory                     3.7        29.8        119.2        238.3   211.1

    28 heads, 4 of KV    1 x 1,000   8 x 1,000   64 x 1,000
    GROUPED                    7.3        12.7         44.2
    memory                     0.5         3.7         29.8

A single warp needs no barrier to share a tile's scores, and so many programs fit on a multiprocessor that they hide each
other's waits; grouped queries keep it busier, and four warps win.
"""


def shares_for(requests: int, heads: int, kv_heads: int) -> Shares:
    """How a batch's keys are shared; its lengths do not matter."""
    if heads != kv_heads:
        return GROUPED
    return FEW if requests * kv_heads <= FEW_PAIRS else MANY


@triton.jit
def _ends(lengths_ptr, requests, BP: tl.constexpr, HK: tl.constexpr, KEYS: tl.constexpr):
    """int32 [BP]: tiles of requests 0 .. i, over all KV heads."""
    i = tl.arange(0, BP)
    lengths = tl.load(lengths_ptr + i, mask=i < requests, other=0)
    return tl.cumsum(HK * ((lengths + KEYS - 1) // KEYS), 0)


@triton.jit
def _share(total, program, programs):
    """(first tile, end) of a program's share."""
    wide = total.to(tl.int64)
    return (wide * program // programs).to(tl.int32), (wide * (program + 1) // programs).to(tl.int32)


@triton.jit
def _pair_of(tile, ends, lengths_ptr, requests, KEYS: tl.constexpr):
    """(request, KV head, its first tile, its tiles, keys) of the pair that a tile belongs to; behind the last, anything."""
    request = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= tile, ends, 0), 0)
    length = tl.load(lengths_ptr + request, mask=request < requests, other=KEYS)
    tiles = tl.maximum((length + KEYS - 1) // KEYS, 1)
    head = (tile - before) // tiles
    return request, head, before + head * tiles, tiles, length


@triton.jit
def _pages(table, start, last, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """int32 [KEYS]: page of each key from `start` on."""
    at = start + tl.arange(0, KEYS)
    return tl.load(table + at // PAGE, mask=at < last, other=0)


@triton.jit
def _step(
    q, k_ptr, v_ptr, page, start, last, best, total, acc,
    STRIDE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One tile for a group of query heads: q [M, D], page [KEYS], acc [M, D], best and total [M]."""
    at = start + tl.arange(0, KEYS)
    live = at < last
    offset = (page.to(tl.int64) * STRIDE + at % PAGE * D)[:, None] + tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + offset, mask=live[:, None], other=0.0)
    v = tl.load(v_ptr + offset, mask=live[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None)
    scores = tl.where(live[None, :], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    share = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(best - higher)
    if IEEE:
        acc = tl.dot(share, v, acc * fade[:, None], input_precision="ieee")
    else:
        acc = tl.dot(share.to(v.dtype), v, acc * fade[:, None])
    return higher, total * fade + tl.sum(share, 1), acc


@triton.jit
def _walk(
    q, k_ptr, v_ptr, table, page, first, last, M: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """(largest score [M], sum [M], weighted values [M, D]) over keys first .. last - 1 of a pair; page: `_pages(first)`."""
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if LOOP:
        for start in tl.range(first, last, KEYS, num_stages=STAGES):
            # page ids one tile ahead: keys and values are then asked for as early as the stages allow
            following = _pages(table, start + KEYS, last, PAGE, KEYS)
            best, total, acc = _step(q, k_ptr, v_ptr, page, start, last, best, total, acc, STRIDE, D, PAGE, KEYS, IEEE)
            page = following
    else:  # the interpreter's range() wants numbers of Python
        start = first
        while start < last:
            following = _pages(table, start + KEYS, last, PAGE, KEYS)
            best, total, acc = _step(q, k_ptr, v_ptr, page, start, last, best, total, acc, STRIDE, D, PAGE, KEYS, IEEE)
            page = following
            start += KEYS
    return best, total, acc


@triton.jit(do_not_specialize=["requests"])
def _partial(
    q_ptr, k_ptr, v_ptr, tables_ptr, lengths_ptr, out_ptr, acc_ptr, sums_ptr, scale, requests, q_stride, table_stride,
    out_stride, BP: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr, LOOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, HQ * D] of the pairs that lie in one program's share; of the others, pieces.

    A program has at most two pieces: of the pair that its share begins with, and of the one that it ends with. acc float32
    [2 programs, GROUP, D], not normalised; sums float32 [2 programs, GROUP, 2]: (largest score, sum), base 2.
    """
    if PDL:
        trigger()
    GROUP: tl.constexpr = HQ // HK
    STRIDE: tl.constexpr = HK * PAGE * D
    ends = _ends(lengths_ptr, requests, BP, HK, KEYS)
    tiles_in_all = tl.max(ends, 0)
    programs = tl.minimum(tl.num_programs(0), tiles_in_all)
    program = tl.program_id(0)
    first, end = _share(tiles_in_all, program, tl.maximum(programs, 1))
    if program >= programs:
        end = first
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    inside = (m < GROUP)[:, None]
    request, head, begin, tiles, length = _pair_of(first, ends, lengths_ptr, requests, KEYS)
    table = tables_ptr + request.to(tl.int64) * table_stride
    start = (first - begin) * KEYS
    last = tl.where(first < end, tl.minimum((end - begin) * KEYS, length), start)
    page = _pages(table, start, last, PAGE, KEYS)
    if PDL:
        wait()
    tile = first
    while tile < end:
        stop = tl.minimum(begin + tiles, end)
        row = request.to(tl.int64)
        at = (head * GROUP + m)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + row * q_stride + at, mask=inside, other=0.0)
        q = (q.to(tl.float32) * scale).to(q.dtype)
        best, total, acc = _walk(
            q, k_ptr + head * PAGE * D, v_ptr + head * PAGE * D, table, page, start, last, M, STRIDE, D, PAGE, KEYS, STAGES,
            IEEE, LOOP,
        )  # fmt: skip
        if stop - tile == tiles:
            value = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * out_stride + at, value, mask=inside)
        else:
            slot = (2 * program + (tile != first)) * GROUP + m
            tl.store(acc_ptr + slot[:, None] * D + d[None, :], acc, mask=inside)
            tl.store(sums_ptr + slot * 2, best, mask=m < GROUP)
            tl.store(sums_ptr + slot * 2 + 1, total, mask=m < GROUP)
        tile = stop
        request, head, begin, tiles, length = _pair_of(tile, ends, lengths_ptr, requests, KEYS)
        table = tables_ptr + request.to(tl.int64) * table_stride
        start = tile * 0
        last = tl.where(tile < end, tl.minimum((end - begin) * KEYS, length), 0)
        page = _pages(table, start, last, PAGE, KEYS)


@triton.jit(do_not_specialize=["requests"])
def _combine(
    lengths_ptr, out_ptr, acc_ptr, sums_ptr, requests, out_stride, BP: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
    D: tl.constexpr, KEYS: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs of `_partial`, GROUP): the pair that begins in a program's share and goes on behind it, if one does."""
    if PDL:
        trigger()
    GROUP: tl.constexpr = HQ // HK
    ends = _ends(lengths_ptr, requests, BP, HK, KEYS)
    tiles_in_all = tl.max(ends, 0)
    programs = tl.minimum(tl.num_programs(0), tiles_in_all)
    program = tl.program_id(0)
    first, end = _share(tiles_in_all, program, tl.maximum(programs, 1))
    request, head, begin, tiles, _ = _pair_of(end - 1, ends, lengths_ptr, requests, KEYS)
    if PDL:
        wait()
    if (program < programs) & (begin + tiles > end) & (begin >= first):
        more = (((begin + tiles).to(tl.int64) * programs - 1) // tiles_in_all).to(tl.int32) - program
        d = tl.arange(0, D)
        best = float("-inf")
        total = 0.0
        acc = tl.zeros([D], tl.float32)
        start = program * 0
        while start <= more:
            piece = start + tl.arange(0, PIECES)
            slot = 2 * (program + piece) + tl.where((piece == 0) & (begin > first), 1, 0)
            at = slot * GROUP + tl.program_id(1)
            live = piece <= more
            score = tl.load(sums_ptr + at * 2, mask=live, other=float("-inf"))
            weight = tl.load(sums_ptr + at * 2 + 1, mask=live, other=0.0)
            part = tl.load(acc_ptr + at[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
            higher = tl.maximum(best, tl.max(score, 0))
            fade = tl.exp2(best - higher)
            share = tl.exp2(score - higher)
            total = total * fade + tl.sum(weight * share, 0)
            acc = acc * fade + tl.sum(part * share[:, None], 0)
            best = higher
            start += PIECES
        at = request.to(tl.int64) * out_stride + (head * GROUP + tl.program_id(1)) * D + d
        tl.store(out_ptr + at, (acc / total).to(out_ptr.dtype.element_ty))


def paged_decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor,
                 out: torch.Tensor, scale: float) -> None:
    """out[b] = attention of the one query of request b over its first lengths[b] keys; untouched where that is 0.

    q [B, heads * D] and out the same (rows may be strided); caches [pages, kv_heads, page_tokens, D], contiguous;
    tables int32 [B, pages of a request]; lengths int32 [B]. D a power of two, at least 16. ValueError for other shapes.
    """
    _, kv_heads, page, width = k_cache.shape
    requests, heads = len(q), q.shape[1] // width
    if q.shape[1] != heads * width or heads % kv_heads or heads // kv_heads > GROUP_ROWS or KEYS % page:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache {tuple(k_cache.shape)}; groups of up to {GROUP_ROWS}")
    if width < 16 or width & (width - 1):
        raise ValueError(f"head_dim {width} must be a power of two of at least 16")
    if not requests:
        return
    shares, group, wide = shares_for(requests, heads, kv_heads), heads // kv_heads, q.dtype is torch.float32
    programs = min(shares.programs, requests * kv_heads * triton.cdiv(tables.shape[1] * page, KEYS))
    acc = torch.empty(2 * programs, group, width, dtype=torch.float32, device=q.device)
    sums = torch.empty(2 * programs, group, 2, dtype=torch.float32, device=q.device)
    sizes = {"BP": max(REQUESTS, triton.next_power_of_2(requests)), "HQ": heads, "HK": kv_heads, "D": width, "KEYS": KEYS}
    _partial[(programs,)](
        q, k_cache, v_cache, tables, lengths, out, acc, sums, scale * LOG2_E, requests, q.stride(0), tables.stride(0),
        out.stride(0), **sizes, PAGE=page, M=GROUP_ROWS, STAGES=2 if wide else shares.stages, IEEE=wide,
        LOOP=not INTERPRETED, num_warps=shares.warps, **chained(),
    )
    if programs > 1:
        _combine[(programs, group)](
            lengths, out, acc, sums, requests, out.stride(0), **sizes, PIECES=PIECES, num_warps=1, **chained()
        )

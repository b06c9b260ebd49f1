"""Decode attention over a paged KV cache: one query token a request, split over the keys, multi-head and grouped-query.

torch has no paged attention for these shapes, and its flash kernel does not split the keys of multi-head models, so that few
requests leave most of the GPU idle. Two kernels: `_partial` reads each key and value once, one program a (request, KV head,
split); `_combine` puts the splits together by their log-sum-exp (Flash-Decoding, 2023). Nothing depends on the host, so a
captured graph serves any lengths and pages. It knows no model, no scheduler and no prefill.
"""

from __future__ import annotations

from kernels.target import INTERPRETED  # isort: skip  (before triton: it may choose the interpreter)

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
KEYS = 64
"""Keys of one step of a program's loop; a multiple of the page."""
GROUP_ROWS = 16
"""Query heads of a KV head are padded to this, the smallest tensor-core tile."""
PROGRAMS = 512
MAX_SPLITS = 32


def splits_for(requests: int, kv_heads: int) -> int:
    """Splits of the keys that fill the GPU: a power of two, for about PROGRAMS programs in all."""
    return max(1, min(MAX_SPLITS, triton.next_power_of_2(-(-PROGRAMS // (requests * kv_heads)))))


@triton.jit
def _tile(k_ptr, v_ptr, table, start, last, head, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """(keys, values) [KEYS, D] from position `start` on, and which of them count."""
    at = start + tl.arange(0, KEYS)
    live = at < last
    page = tl.load(table + at // PAGE, mask=live, other=0).to(tl.int64)
    offset = ((page * HK + head) * PAGE + at % PAGE)[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + offset, mask=live[:, None], other=0.0)
    v = tl.load(v_ptr + offset, mask=live[:, None], other=0.0)
    return k, v, live


@triton.jit
def _step_one(q, k, v, live, best, total, acc):
    """One tile for one query head: q float32 [D], acc [D], best and total scalars."""
    scores = tl.where(live, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 0))
    share = tl.exp2(scores - higher)
    fade = tl.exp2(best - higher)
    return higher, total * fade + tl.sum(share, 0), acc * fade + tl.sum(share[:, None] * v.to(tl.float32), 0)


@triton.jit
def _step_group(q, k, v, live, best, total, acc, IEEE: tl.constexpr):
    """One tile for a group of query heads: q [M, D], acc [M, D], best and total [M]."""
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
def _step(q, k, v, live, best, total, acc, M: tl.constexpr, IEEE: tl.constexpr):
    if M == 1:
        best, total, acc = _step_one(q, k, v, live, best, total, acc)
    else:
        best, total, acc = _step_group(q, k, v, live, best, total, acc, IEEE)
    return best, total, acc


@triton.jit
def _partial(
    q_ptr, k_ptr, v_ptr, tables_ptr, lengths_ptr, out_ptr, acc_ptr, sums_ptr, scale, q_stride, table_stride, out_stride,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, IEEE: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """acc float32 [B, HQ, SPLITS, D], not normalised; sums float32 [B, HQ, SPLITS, 2]: (largest score, sum), base 2.

    With one split the result itself goes to out [B, HQ * D], and neither is written.
    """
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = HQ // HK
    length = tl.load(lengths_ptr + request)
    share = (length + SPLITS * KEYS - 1) // (SPLITS * KEYS) * KEYS
    first = split * share
    last = tl.minimum(first + share, length)
    table = tables_ptr + request * table_stride
    d = tl.arange(0, D)
    if M == 1:
        q = tl.load(q_ptr + request * q_stride + head * D + d).to(tl.float32) * scale
        best = float("-inf")
        total = 0.0
        acc = tl.zeros([D], tl.float32)
    else:
        m = tl.arange(0, M)
        q_at = q_ptr + request * q_stride + (head * GROUP + m)[:, None] * D + d[None, :]
        q = tl.load(q_at, mask=(m < GROUP)[:, None], other=0.0)
        q = (q.to(tl.float32) * scale).to(q.dtype)
        best = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
    if LOOP:
        for start in tl.range(first, last, KEYS, num_stages=3):
            k, v, live = _tile(k_ptr, v_ptr, table, start, last, head, HK, D, PAGE, KEYS)
            best, total, acc = _step(q, k, v, live, best, total, acc, M, IEEE)
    else:  # the interpreter's range() wants numbers of Python
        start = first
        while start < last:
            k, v, live = _tile(k_ptr, v_ptr, table, start, last, head, HK, D, PAGE, KEYS)
            best, total, acc = _step(q, k, v, live, best, total, acc, M, IEEE)
            start += KEYS
    if SPLITS == 1:
        at = out_ptr + request * out_stride + head * GROUP * D
        if M == 1:
            tl.store(at + d, (acc / total).to(out_ptr.dtype.element_ty))
        else:
            value = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(at + m[:, None] * D + d[None, :], value, mask=(m < GROUP)[:, None])
    elif M == 1:
        at = (request * HQ + head) * SPLITS + split
        tl.store(acc_ptr + at * D + d, acc)
        tl.store(sums_ptr + at * 2, best)
        tl.store(sums_ptr + at * 2 + 1, total)
    else:
        at = (request * HQ + head * GROUP + m) * SPLITS + split
        tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, mask=(m < GROUP)[:, None])
        tl.store(sums_ptr + at * 2, best, mask=m < GROUP)
        tl.store(sums_ptr + at * 2 + 1, total, mask=m < GROUP)


@triton.jit
def _combine(acc_ptr, sums_ptr, out_ptr, out_stride, HQ: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """out [B, HQ * D]. A split without keys has the score -inf and counts nothing."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, D)
    s = tl.arange(0, SPLITS)
    at = (request * HQ + head) * SPLITS + s
    best = tl.load(sums_ptr + at * 2)
    total = tl.load(sums_ptr + at * 2 + 1)
    weight = tl.exp2(best - tl.max(best, 0))
    acc = tl.load(acc_ptr + at[:, None] * D + d[None, :])
    value = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + request * out_stride + head * D + d, value.to(out_ptr.dtype.element_ty))


def paged_decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor,
                 out: torch.Tensor, scale: float, splits: int | None = None) -> None:
    """out[b] = attention of the one query of request b over its first lengths[b] >= 1 keys.

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
    splits = splits or splits_for(requests, kv_heads)
    acc = sums = out
    if splits > 1:
        acc = torch.empty(requests, heads, splits, width, dtype=torch.float32, device=q.device)
        sums = torch.empty(requests, heads, splits, 2, dtype=torch.float32, device=q.device)
    rows = 1 if heads == kv_heads else GROUP_ROWS
    _partial[(requests, kv_heads, splits)](
        q, k_cache, v_cache, tables, lengths, out, acc, sums, scale * LOG2_E, q.stride(0), tables.stride(0), out.stride(0),
        HQ=heads, HK=kv_heads, D=width, PAGE=page, M=rows, KEYS=KEYS, SPLITS=splits, IEEE=q.dtype is torch.float32,
        LOOP=not INTERPRETED, num_warps=4,
    )
    if splits > 1:
        _combine[(requests, heads)](acc, sums, out, out.stride(0), HQ=heads, D=width, SPLITS=splits, num_warps=1)

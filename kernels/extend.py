"""Attention of chunks of prompts over a paged KV cache: many requests of any lengths and contexts in one launch.

Each program takes one block of a chunk's query rows and one head, and walks the request's pages up to the block's last row
(causal, aligned at the end of the keys). Which block belongs to whom is a small list made on the host, the longest first;
surplus entries of the list end at once, so a captured graph serves any chunks that fit it. torch's varlen attention wants
contiguous keys and host-side sizes, which a graph cannot have. It knows no model and no scheduler.
"""

from __future__ import annotations

from kernels.target import INTERPRETED  # isort: skip  (before triton: it may choose the interpreter)

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
ROWS = 64
"""Query rows of a block. With KEYS, STAGES and four warps the fastest or near it of 20 tilings on an H200, for chunks of 128
to 2,048 tokens (torch 2.11, Triton 3.6): 33 us for 1,024 tokens of 32 heads, where torch's varlen kernel takes 57."""
KEYS = 64
"""Keys of one step of a program's loop; a multiple of the page."""
STAGES = 3
BLOCK_FIELDS = 4


def blocks_of(chunks: Sequence[tuple[int, int]], first_row: int, first_table: int) -> np.ndarray:
    """int32 [blocks, 4]: (first row, rows, keys before the first row, table) of the blocks of the chunks.

    chunks: (tokens, context) of each, rows one behind the other from `first_row` on, tables from `first_table` on. Those
    with the most keys come first, so that no long one starts when the others end.
    """
    blocks, row = [], first_row
    for table, (tokens, context) in enumerate(chunks, first_table):
        starts = range(0, tokens, ROWS)
        blocks += [(row + start, min(ROWS, tokens - start), context + start, table) for start in starts]
        row += tokens
    blocks.sort(key=lambda block: block[1] + block[2], reverse=True)
    return np.array(blocks, np.int32).reshape(-1, BLOCK_FIELDS)


def most_blocks(tokens: int, chunks: int) -> int:
    """Blocks that `tokens` rows in at most `chunks` chunks can need."""
    chunks = min(chunks, tokens)
    return (tokens - chunks) // ROWS + chunks


@triton.jit
def _tile(
    q, best, total, acc, k_ptr, v_ptr, table, start, last, seen, head, scale,
    HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One step over KEYS keys: q [M, D], acc [M, D], best and total [M]; `seen` [M]: keys that each row may see."""
    at = start + tl.arange(0, KEYS)
    page = tl.load(table + at // PAGE, mask=at < last, other=0).to(tl.int64)
    offset = ((page * HK + head) * PAGE + at % PAGE)[:, None] * D + tl.arange(0, D)[None, :]
    if MASKED:
        k = tl.load(k_ptr + offset, mask=(at < last)[:, None], other=0.0)
        v = tl.load(v_ptr + offset, mask=(at < last)[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + offset)
        v = tl.load(v_ptr + offset)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else None) * scale
    if MASKED:
        scores = tl.where(at[None, :] < seen[:, None], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    share = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(best - higher)
    acc = tl.dot(share.to(v.dtype), v, acc * fade[:, None], input_precision="ieee" if IEEE else None)
    return higher, total * fade + tl.sum(share, 1), acc


@triton.jit
def _extend(
    q_ptr, k_ptr, v_ptr, tables_ptr, blocks_ptr, out_ptr, scale, q_stride, table_stride, out_stride,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
    IEEE: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (heads, blocks). A block without rows does nothing. Every row sees its first tile, so no sum is empty."""
    head = tl.program_id(0)
    block = blocks_ptr + tl.program_id(1) * 4
    rows = tl.load(block + 1)
    if rows == 0:
        return
    first_row = tl.load(block).to(tl.int64)
    context = tl.load(block + 2)
    table = tables_ptr + tl.load(block + 3).to(tl.int64) * table_stride
    kv_head = head // (HQ // HK)
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    inside = (m < rows)[:, None]
    q = tl.load(q_ptr + (first_row + m)[:, None] * q_stride + head * D + d[None, :], mask=inside, other=0.0)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    seen = context + 1 + m
    last = context + rows
    whole = (context + 1) // KEYS * KEYS  # up to here every row sees every key
    if LOOP:
        for start in tl.range(0, whole, KEYS, num_stages=STAGES):
            best, total, acc = _tile(q, best, total, acc, k_ptr, v_ptr, table, start, last, seen, kv_head, scale,
                                     HK, D, PAGE, KEYS, False, IEEE)  # fmt: skip
        for start in tl.range(whole, last, KEYS, num_stages=STAGES):
            best, total, acc = _tile(q, best, total, acc, k_ptr, v_ptr, table, start, last, seen, kv_head, scale,
                                     HK, D, PAGE, KEYS, True, IEEE)  # fmt: skip
    else:  # the interpreter's range() wants numbers of Python
        start = whole * 0
        while start < last:
            best, total, acc = _tile(q, best, total, acc, k_ptr, v_ptr, table, start, last, seen, kv_head, scale,
                                     HK, D, PAGE, KEYS, True, IEEE)  # fmt: skip
            start += KEYS
    value = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (first_row + m)[:, None] * out_stride + head * D + d[None, :], value, mask=inside)


def extend(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: torch.Tensor, blocks: torch.Tensor,
           out: torch.Tensor, scale: float) -> None:
    """out[t] = attention of row t over the keys of its request up to its own, for the rows of `blocks`; others are left.

    q [T, heads * D] and out the same (rows may be strided); caches [pages, kv_heads, page_tokens, D], contiguous, with the
    chunks' own keys in them; tables int32 [requests, pages of a request]; blocks int32 [n, 4] as `blocks_of` makes them
    (rows 0: nothing to do). D a power of two, at least 16. ValueError for other shapes.
    """
    _, kv_heads, page, width = k_cache.shape
    heads = q.shape[1] // width
    if q.shape[1] != heads * width or heads % kv_heads or KEYS % page:
        raise ValueError(f"q {tuple(q.shape)} does not fit a cache {tuple(k_cache.shape)}")
    if width < 16 or width & (width - 1):
        raise ValueError(f"head_dim {width} must be a power of two of at least 16")
    if not len(blocks):
        return
    _extend[(heads, len(blocks))](
        q, k_cache, v_cache, tables, blocks, out, scale * LOG2_E, q.stride(0), tables.stride(0), out.stride(0),
        HQ=heads, HK=kv_heads, D=width, PAGE=page, M=ROWS, KEYS=KEYS, IEEE=q.dtype is torch.float32, LOOP=not INTERPRETED,
        STAGES=STAGES, num_warps=4,
    )

"""Attention of one packed step over the paged cache: decodes first, one token each, then the chunks of prompts.

On a GPU decodes go through `kernels.attention` and chunks through torch's flash kernel (causal, aligned at the end of the
keys); elsewhere plain torch computes each request by itself, which is the reference. It knows where keys lie, not why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from kernels.attention import paged_decode, splits_for

flash = torch.ops.aten._flash_attention_forward
"""(q, k, v [tokens, heads, D], cu_q, cu_k, longest q, longest k, dropout, causal, debug) -> (out, ...), end-aligned."""


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


@dataclass
class Layout:
    """Where the keys of a step's rows lie.

    decodes: rows 0..decodes-1, one token each: tables int32 [decodes, pages], lengths int32 [decodes] (the new token
    included). chunks: (tokens, context before them) of the rows that follow; chunk_pages: int64 page ids of each chunk's
    request on the device. cu_q, cu_k int32 [chunks + 1]: cumulative tokens and keys. The sizes are the host's copy.
    """

    decodes: int = 0
    tables: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    chunks: list[tuple[int, int]] = field(default_factory=list)
    chunk_pages: list[torch.Tensor] = field(default_factory=list)
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    splits: int | None = None


def attend(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, heads: int, layout: Layout) -> torch.Tensor:
    """[T, heads * D] from qkv [T, (heads + 2 kv_heads) * D], whose keys and values are in the caches already."""
    width = k_cache.shape[-1]
    q = qkv[:, : heads * width]
    scale = width**-0.5
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    n = layout.decodes
    if not _fused(q):
        return _reference(q, k_cache, v_cache, layout, scale, out)
    if n:
        paged_decode(q[:n], k_cache, v_cache, layout.tables, layout.lengths, out[:n], scale, layout.splits)
    if layout.chunks:
        out[n:] = _flash_chunks(qkv[n:], k_cache, v_cache, heads, layout, scale)
    return out


def warm(k_cache: torch.Tensor, v_cache: torch.Tensor, heads: int, width: int, max_batch: int) -> None:
    """Compile the decode kernel for every number of splits that batches of up to `max_batch` take. On a GPU."""
    _, kv_heads, page, d = k_cache.shape
    sizes = {splits_for(n, kv_heads): n for n in range(max_batch, 0, -1)}
    for n in sizes.values():
        qkv = k_cache.new_zeros(n, (heads + 2 * kv_heads) * d)
        tables = torch.zeros(n, width, dtype=torch.int32, device=k_cache.device)
        lengths = torch.full((n,), page, dtype=torch.int32, device=k_cache.device)
        out = k_cache.new_empty(n, heads * d)
        paged_decode(qkv[:, : heads * d], k_cache, v_cache, tables, lengths, out, d**-0.5)


def _flash_chunks(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, heads: int, layout: Layout,
                  scale: float) -> torch.Tensor:
    _, kv_heads, _, width = k_cache.shape
    q, k, v = (part.unflatten(1, (-1, width)) for part in qkv.split([heads * width, kv_heads * width, kv_heads * width], 1))
    if any(context for _, context in layout.chunks):
        sizes = [tokens + context for tokens, context in layout.chunks]
        k = torch.cat([_gathered(k_cache, pages, size) for pages, size in zip(layout.chunk_pages, sizes, strict=True)])
        v = torch.cat([_gathered(v_cache, pages, size) for pages, size in zip(layout.chunk_pages, sizes, strict=True)])
    most_q = max(tokens for tokens, _ in layout.chunks)
    most_k = max(tokens + context for tokens, context in layout.chunks)
    found = flash(q, k, v, layout.cu_q, layout.cu_k, most_q, most_k, 0.0, True, False, scale=scale)
    return found[0].flatten(1)


def _gathered(cache: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens, kv_heads, D] of one request, in order."""
    return cache[pages].transpose(1, 2).flatten(0, 1)[:tokens]


def _reference(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layout: Layout, scale: float,
               out: torch.Tensor) -> torch.Tensor:
    """Each request by itself, in plain torch."""
    page, width = k_cache.shape[2:]
    jobs = []
    for i in range(layout.decodes):
        length = int(layout.lengths[i])
        jobs.append((i, 1, length - 1, layout.tables[i, : -(-length // page)].long()))
    start = layout.decodes
    for (tokens, context), pages in zip(layout.chunks, layout.chunk_pages, strict=True):
        jobs.append((start, tokens, context, pages))
        start += tokens
    for start, tokens, context, pages in jobs:
        keys = context + tokens
        k, v = (_gathered(cache, pages, keys).transpose(0, 1) for cache in (k_cache, v_cache))
        rows = q[start : start + tokens].unflatten(1, (-1, width)).transpose(0, 1)
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(context)
        found = functional.scaled_dot_product_attention(
            rows[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
        )
        out[start : start + tokens] = found[0].transpose(0, 1).flatten(1)
    return out

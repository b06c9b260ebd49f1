"""Attention of one packed step over the paged cache: decodes first, one token each, then the chunks of prompts.

On a GPU decodes go through `kernels.attention` and chunks through `kernels.extend`; elsewhere plain torch computes each
request by itself, which is the reference. It knows where keys lie, not why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.attention import paged_decode
from kernels.extend import extend


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


@dataclass
class Layout:
    """Where the keys of a step's rows lie.

    decodes: rows 0..decodes-1 are one token each, but for those of length 0. tables int32 [requests, pages of one]: the
    decodes' first, then the chunks'. lengths int32 [decodes] (the new token included). blocks int32 [n, 4]: the rows of
    chunks (`kernels.extend.blocks_of`).
    """

    decodes: int
    tables: torch.Tensor
    lengths: torch.Tensor
    blocks: torch.Tensor | None = None


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
        paged_decode(q[:n], k_cache, v_cache, layout.tables, layout.lengths, out[:n], scale)
    if layout.blocks is not None:  # after the decodes: in a graph their surplus rows are chunks' rows
        extend(q, k_cache, v_cache, layout.tables, layout.blocks, out, scale)
    return out


def _gathered(cache: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens, kv_heads, D] of one request, in order."""
    return cache[pages].transpose(1, 2).flatten(0, 1)[:tokens]


def _reference(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, layout: Layout, scale: float,
               out: torch.Tensor) -> torch.Tensor:
    """Each request by itself, in plain torch."""
    page, width = k_cache.shape[2:]
    jobs = []
    for i, length in enumerate(layout.lengths.tolist()):
        if length:
            jobs.append((i, 1, length - 1, layout.tables[i, : -(-length // page)].long()))
    for first, rows, context, table in layout.blocks.tolist() if layout.blocks is not None else ():
        if rows:
            jobs.append((first, rows, context, layout.tables[table, : -(-(context + rows) // page)].long()))
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

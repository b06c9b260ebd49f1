"""The small steps between the linears of a decoder layer, one kernel each: residual + RMSNorm, rotary + KV write, SiLU gate.

On a GPU they replace about thirty launches a layer of the unfused form; elsewhere plain torch computes the same. Rounding
follows the unfused form (a sum is rounded to the tensors' type before it is normalised). With dependent launch each starts
beside its predecessor, waits for it, and lets its successor start at once. They know no model and no batch.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import torch
import triton
import triton.language as tl
from torch.nn import functional

from kernels.dependent import chained, trigger, wait

HEADS_A_PROGRAM = 16


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


@triton.jit
def _add_rms_norm(x_ptr, residual_ptr, weight_ptr, out_ptr, eps, ADD: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    if PDL:
        trigger()
        wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    h = tl.load(residual_ptr + row * H + columns, mask=inside, other=0.0)
    if ADD:
        x = tl.load(x_ptr + row * H + columns, mask=inside, other=0.0)
        h = (h.to(tl.float32) + x.to(tl.float32)).to(h.dtype)
        tl.store(residual_ptr + row * H + columns, h, mask=inside)
    wide = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normed = (wide * scale).to(h.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * H + columns, normed.to(h.dtype), mask=inside)


def add_rms_norm(x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of residual + x, [T, H]; the sum is written into `residual` (x None: residual alone). Rows contiguous."""
    if _fused(residual):
        assert residual.is_contiguous(), "rows lie one behind the other"
        assert x is None or x.is_contiguous(), "rows lie one behind the other"
        rows, width = residual.shape
        out = torch.empty_like(residual)
        if rows:
            _add_rms_norm[(rows,)](
                residual if x is None else x, residual, weight, out, eps, ADD=x is not None, H=width,
                BLOCK=triton.next_power_of_2(width), num_warps=8 if width >= 2048 else 4, **chained(),
            )
        return out
    if x is not None:
        residual += x
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(residual.dtype)


@triton.jit
def _rope_store(
    qkv_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, slots_ptr, qkv_stride,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, runs of HEADS heads of q, k and v side by side). D is a power of two."""
    if PDL:
        trigger()
        wait()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, D // 2)
    low = qkv_ptr + token * qkv_stride + heads[:, None] * D + half[None, :]
    inside = (heads < HQ + 2 * HK)[:, None]
    turned = (heads < HQ + HK)[:, None]
    a = tl.load(low, mask=inside, other=0.0)
    b = tl.load(low + D // 2, mask=inside, other=0.0)
    cos = tl.load(cos_ptr + token * (D // 2) + half)[None, :]
    sin = tl.load(sin_ptr + token * (D // 2) + half)[None, :]
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    a = tl.where(turned, (wide_a * cos - wide_b * sin).to(a.dtype), a)
    b = tl.where(turned, (wide_b * cos + wide_a * sin).to(b.dtype), b)
    tl.store(low, a, mask=turned)
    tl.store(low + D // 2, b, mask=turned)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    kv_head = tl.where(heads < HQ + HK, heads - HQ, heads - HQ - HK)
    at = (((slot // PAGE) * HK + kv_head) * PAGE + slot % PAGE)[:, None] * D + half[None, :]
    is_k = ((heads >= HQ) & (heads < HQ + HK))[:, None]
    is_v = ((heads >= HQ + HK) & (heads < HQ + 2 * HK))[:, None]
    tl.store(k_ptr + at, a, mask=is_k)
    tl.store(k_ptr + at + D // 2, b, mask=is_k)
    tl.store(v_ptr + at, a, mask=is_v)
    tl.store(v_ptr + at + D // 2, b, mask=is_v)


def rope_store(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
               slots: torch.Tensor, heads: int) -> None:
    """Turn q and k of qkv [T, (heads + 2 kv_heads) * D] by their positions, in place, and write k and v into the pages.

    cos, sin float32 [T, D / 2]; caches [pages, kv_heads, page_tokens, D]; slots int32 [T]: page * page_tokens + offset.
    """
    _, kv_heads, page, width = k_cache.shape
    assert cos.is_contiguous(), "the kernel counts rows by themselves"
    assert sin.is_contiguous(), "the kernel counts rows by themselves"
    assert k_cache.is_contiguous(), "the kernel counts pages by themselves"
    if _fused(qkv):
        runs = triton.cdiv(heads + 2 * kv_heads, HEADS_A_PROGRAM)
        if len(qkv):
            _rope_store[(len(qkv), runs)](
                qkv, cos, sin, k_cache, v_cache, slots, qkv.stride(0), HQ=heads, HK=kv_heads, D=width, PAGE=page,
                HEADS=HEADS_A_PROGRAM, num_warps=4, **chained(),
            )
        return
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, width)
    turned = rows[:, : heads + kv_heads]
    a, b = (part.float() for part in turned.chunk(2, dim=-1))
    cos, sin = cos[:, None], sin[:, None]
    turned.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
    pages, offsets = slots.long() // page, slots.long() % page
    k_cache[pages, :, offsets] = rows[:, heads : heads + kv_heads]
    v_cache[pages, :, offsets] = rows[:, heads + kv_heads :]


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        trigger()
        wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + WIDTH + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    act = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, (act * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, I], from [T, 2 I] with gate in the first half."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if _fused(gate_up):
        out = gate_up.new_empty(rows, width)
        if rows:
            block = min(2048, triton.next_power_of_2(width))
            grid = (rows, triton.cdiv(width, block))
            _silu_mul[grid](gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=block, num_warps=4, **chained())
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up

"""The truth that every operator is held to: float32 LoRA branches, row group by row group, in plain torch.

It reads the host's copy of the batch and knows no kernel, no tile and no graph; it is meant for small checks.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.batch import Key, LoraBatch, LoraPool


def reference(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> torch.Tensor:
    """y [T, d_out] plus the branches of x [T, d_in], float32, a new tensor; the mixture mode included."""
    out = y.float().clone()
    index = batch.host_index
    for slot in np.unique(index):
        rows = np.flatnonzero(index == slot)
        if slot >= 0 and slot != batch.merged:
            where = torch.from_numpy(rows).to(x.device)
            out.index_add_(0, where, _branch(x[where], pool, int(slot), key))
    if batch.merged >= 0:
        where = torch.from_numpy(np.flatnonzero(index != batch.merged)).to(x.device)
        out.index_add_(0, where, _branch(x[where], pool, batch.merged, key), alpha=-1)
    return out


def _branch(x: torch.Tensor, pool: LoraPool, slot: int, key: Key) -> torch.Tensor:
    """scale * (x A^T) B of one adapter, its slices side by side, float32."""
    a, b = pool.views(slot, key)
    x = x.float()
    return pool.scales[slot] * torch.cat([(x @ a_s.float().T) @ b_s.float() for a_s, b_s in zip(a, b, strict=True)], 1)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """|got - truth| / |truth| over all elements, in float32; NaN where either holds one, 0 for two empty tensors."""
    if not truth.numel():
        return 0.0
    return float((got.float() - truth.float()).norm() / truth.float().norm())

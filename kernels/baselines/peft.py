"""PEFT's mixed batch (`adapter_names=`, its LoRA layer's `_mixed_batch_forward`), written as the expression it
evaluates.

For each adapter of the batch: result[rows] += lora_B(lora_A(x[rows])) * scaling, a gather, two matmuls, a product, an
indexed addition. PEFT copies each list of rows to the device at every layer; here they are read from the batch, which
is kinder and lets a graph be captured (for the segments that it was captured with). Dropout is off, as in inference.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kernels.baselines.inputs import checked
from kernels.batch import Key, LoraBatch, LoraPool

CAPTURE = "frozen"


def op(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key) -> None:
    """y [T, d_out] += the branches of x [T, d_in], in place. Raises LoraError for inputs that do not fit."""
    _, _, projection = checked(y, x, pool, batch, key)
    if not batch.tokens or not batch.adapters:
        return
    y_slices = y.split(projection.widths, dim=1)
    start = 0
    for slot, found in batch.segments:
        rows = batch.perm[start : start + len(found)].long()
        start += len(found)
        for a, b, y_slice in zip(*pool.views(slot, key), y_slices, strict=True):
            y_slice[rows] += functional.linear(functional.linear(x[rows], a), b.T) * pool.scales[slot]

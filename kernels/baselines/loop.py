"""A loop over the adapters of the batch: one matmul to shrink and one in-place addmm to expand for each, in plain
torch.

The simplest operator that is right, and the fastest where one adapter has all the rows. Rows of an adapter that lie
together are used in place; others are gathered and scattered. The host walks the segments, so a captured graph serves
only the segments that it was captured with.
"""

from __future__ import annotations

import torch

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
    for slot, rows in batch.segments:
        first, count = int(rows[0]), len(rows)
        together = int(rows[-1]) - first + 1 == count  # rows are ascending
        where = batch.perm[start : start + count]
        x_rows = x[first : first + count] if together else x.index_select(0, where)
        for a, b, y_slice in zip(*pool.views(slot, key), y_slices, strict=True):
            v = x_rows @ a.T
            if together:
                y_slice[first : first + count].addmm_(v, b, alpha=pool.scales[slot])
            else:
                y_slice.index_add_(0, where, v @ b, alpha=pool.scales[slot])
        start += count

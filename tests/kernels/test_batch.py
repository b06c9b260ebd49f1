"""Pool and batch: which rows adapters get, and what steps are refused."""

import numpy as np
import pytest
import torch

from kernels.batch import LoraBatch, LoraError, LoraPool, Projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def filled():
    """A pool of five adapters, and a batch of up to 48 rows over it."""
    pool = LoraPool({"o": Projection(96, (64,))}, layers=2, slots=5, rows=112, dtype=torch.float16, device=DEVICE)
    for slot, rank in enumerate((3, 16, 32, 20, 8)):
        pool.reserve(slot, rank)
    return pool, LoraBatch(pool, 48)


@pytest.mark.parametrize(
    ("index", "merged", "says"),
    [
        ([0, 5], -1, "row 1 asks for slot 5"),
        ([0, -2], -1, "row 1 asks for slot -2"),
        ([3], -1, "slot 3 holds no adapter"),
        ([0], 3, "slot 3 holds no adapter"),
        ([0], 9, "merged slot 9"),
        ([0] * 49, -1, "at most"),
    ],
)
def test_a_bad_step_is_refused_and_changes_nothing(index, merged, says):
    pool, batch = filled()
    batch.update(np.arange(37) % 6 - 1)
    before = batch.perm.clone(), batch.tokens
    pool.release(3)
    with pytest.raises(LoraError, match=says):
        batch.update(np.array(index), merged)
    assert torch.equal(batch.perm, before[0])
    assert batch.tokens == before[1]


def test_a_shape_over_the_fixed_one_is_refused():
    _, batch = filled()
    batch.fix(8, 2, 16)
    with pytest.raises(LoraError, match=r"\(3, 3, 16\) exceeds \(8, 2, 16\)"):
        batch.update(np.array([0, 1, 4]))
    with pytest.raises(LoraError, match="exceeds"):
        batch.update(np.array([2]))  # rank 32


def test_the_pool_hands_out_rows_and_takes_them_back():
    pool = LoraPool({"o": Projection(16, (16,))}, layers=1, slots=4, rows=64, dtype=torch.float16)
    runs = [pool.reserve(slot, rank) for slot, rank in enumerate((16, 20, 3))]
    assert runs == [slice(0, 16), slice(16, 48), slice(48, 64)]
    with pytest.raises(LoraError, match="no run of 16 free rows"):
        pool.reserve(3, 1)
    with pytest.raises(LoraError, match="is taken"):
        pool.reserve(1, 4)
    for rank in (0, 257):
        with pytest.raises(LoraError, match=f"rank {rank}"):
            pool.reserve(3, rank)
    pool.release(0)
    pool.release(1)
    assert pool.reserve(3, 48) == slice(0, 48)
    with pytest.raises(LoraError, match="holds no adapter"):
        pool.release(0)


@pytest.mark.parametrize("scale", [1e300, float("inf"), float("nan")])
def test_a_scale_that_the_table_does_not_hold_reserves_nothing(scale):
    pool = LoraPool({"o": Projection(16, (16,))}, layers=1, slots=2, rows=32)
    with pytest.raises(LoraError, match="not a number that float32 holds"):
        pool.reserve(0, 16, scale)
    assert pool.ranks == [0, 0]
    assert pool.reserve(0, 32) == slice(0, 32)

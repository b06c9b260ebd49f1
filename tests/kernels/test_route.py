"""Routes: every row with a branch in exactly one tile of its adapter, in order, whatever the step before left."""

import numpy as np
import pytest
import torch

from kernels.batch import TILE_ROWS, LoraBatch, LoraError, LoraPool, Projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_tiles_cover_exactly_the_rows_that_get_a_branch():
    pool = LoraPool({"o": Projection(32, (32,))}, layers=1, slots=5, rows=128, dtype=torch.float16, device=DEVICE)
    for slot, rank in enumerate((3, 16, 32, 20, 8)):
        pool.reserve(slot, rank, 1.0 + slot)
    batch = LoraBatch(pool, 70)
    for merged, tokens in ((-1, 70), (-1, 1), (-1, 0), (2, 33), (2, 70), (-1, 33)):
        index = np.random.default_rng(tokens).integers(-1, 5, tokens)
        batch.update(index, merged)
        for rows in TILE_ROWS:
            assert covered(batch, rows) == expected(pool, index, merged), (merged, tokens, rows)
            assert int(batch.counts[rows]) == sum(count > 0 for _, count, *_ in batch.routes[rows].tolist())


def covered(batch, rows):
    """[(row, its tile's fields)] from the device's tables, in row order; a row in two tiles would show twice."""
    perm, out = batch.perm.tolist(), []
    for start, count, *fields in batch.routes[rows].tolist():
        assert 0 <= count <= rows
        assert perm[start : start + count] == sorted(perm[start : start + count])
        values = [bits(f) if i % 3 == 2 else f for i, f in enumerate(fields)]
        out += [(row, *values) for row in perm[start : start + count]]
    return sorted(out)


def expected(pool, index, merged):
    other = (pool.offsets[merged], pool.ranks[merged], -pool.scales[merged]) if merged >= 0 else (0, 0, 0.0)
    out = []
    for row, slot in enumerate(index.tolist()):
        if slot >= 0 and slot != merged:
            out.append((row, pool.offsets[slot], pool.ranks[slot], pool.scales[slot], *other))
        elif slot < 0 <= merged:
            out.append((row, 0, 0, 0.0, *other))
    return out


def bits(word):
    return float(np.int32(word).view(np.float32))


def test_more_slots_than_rows_and_more_rows_than_one_chunk():
    pool = LoraPool({"o": Projection(16, (16,))}, layers=1, slots=40, rows=640, dtype=torch.float16, device=DEVICE)
    for slot in range(40):
        pool.reserve(slot, 16)
    batch = LoraBatch(pool, 50)
    index = np.arange(50) % 40
    batch.update(index)
    assert [row for row, *_ in covered(batch, 16)] == list(range(50))
    assert [(slot, rows.tolist()) for slot, rows in batch.segments[:11]] == [
        (slot, [slot, slot + 40] if slot < 10 else [slot]) for slot in range(11)
    ]


def test_long_runs_count_like_single_rows():
    pool = LoraPool({"o": Projection(16, (16,))}, layers=1, slots=6, rows=96, dtype=torch.float16, device=DEVICE)
    for slot in range(6):
        pool.reserve(slot, 16)
    batch = LoraBatch(pool, 4096)
    runs = np.repeat([3, -1, 0, 3, 5], [1500, 20, 1, 700, 300])
    for index in (runs, np.random.default_rng(0).permutation(runs)):
        batch.update(index, route=False)
        assert (batch.tokens, batch.adapters, batch.uneven) == (2521, 3, True)
    with pytest.raises(LoraError, match="row 1520 asks for slot 9"):
        batch.update(np.where(runs == 0, 9, runs), route=False)

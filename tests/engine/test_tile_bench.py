"""The search for tiles inside whole steps: what it tries, what it keeps, and what it writes."""

import pytest

from engine.tile_bench import AGAIN, _note, search
from kernels.linear_tiles import Tile

QKV, OUT = (96, 32), (32, 32)
TILES = [None, *(Tile(split) for split in range(1, 9))]


def test_a_tile_that_is_best_only_beside_another_is_found():
    tried = []

    def time_us(choice):
        tried.append(dict(choice))
        qkv, o = (choice[shape].split if choice[shape] else 0 for shape in (QKV, OUT))
        return 100 - 5 * (o == 3) - 2 * (qkv == 7) - 4 * (qkv == 2 and o == 3)

    best, took = search((QKV, OUT), lambda shape: TILES, time_us, {QKV: None, OUT: None})
    assert (best, took) == ({QKV: Tile(2), OUT: Tile(3)}, 91)
    assert len(tried) == 1 + 2 * (len(TILES) + AGAIN)


def test_noise_keeps_what_stands():
    times = iter([100.0, *[99.9] * 100])
    start = {QKV: Tile(4), OUT: None}
    assert search((QKV, OUT), lambda shape: TILES, lambda choice: next(times), start)[0] == start


def test_a_note_changes_the_rows_it_is_of_and_refuses_a_shape_the_table_lacks():
    other = {"16": None}
    document = {"entries": [{"columns": 96, "depth": 32, "bucket": 16, "branched": dict(other)}]}
    _note(document, 8, {QKV: Tile(2)}, {"us": 1.0})
    (entry,) = document["entries"]
    assert entry["branched"]["8"]["split"] == 2
    assert entry["branched"]["16"] is None
    assert entry["step_us"] == {"8": {"us": 1.0}}
    with pytest.raises(KeyError, match=r"32 x 32 .* 8 rows; run skinny_bench"):
        _note(document, 8, {OUT: None}, {"us": 1.0})

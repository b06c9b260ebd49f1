"""The bench of linears of few rows: what it tries, how it ranks, and the table that it writes."""

import json

import pytest
import torch

from kernels import linear_tiles, skinny_bench
from kernels.launch import EVEN
from kernels.linear_tiles import Tile

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")


def measured(columns, times):
    """Rows of the bench, in disorder."""
    return [dict(zip(skinny_bench.COLUMNS, (columns, 512, count, *tile, us, "1.0", "1e-6"), strict=True))
            for count, tile, us in sorted(times, key=str)]  # fmt: skip


def test_the_bench_writes_what_is_looked_up_and_keeps_other_shapes(tmp_path):
    torchs, first, second = skinny_bench.TORCH, (2, 3, 1, 0, 0, 0), (1, 4, 0, 2, 0, EVEN)
    ours = measured(64, [(1, first, "1.0"), (1, second, "1.5"), (1, torchs, "2.0"), (16, first, "30.0"),
                         (16, second, "26.0"), (16, torchs, "25.0"), (32, first, "3.0"), (32, torchs, "2.0")])  # fmt: skip
    origin = {"device": "a GPU", "date": "2026-01-01", "versions": "v", "command": "c"}
    path = tmp_path / "linears.json"
    skinny_bench.write(path, origin, skinny_bench.entries_of(ours))
    found = {(64, 512): {16: Tile(*first), 32: None}}
    assert linear_tiles.load(path) == found, "1 / 2 + 30 / 25 is less than 1.5 / 2 + 26 / 25"
    again = measured(128, [(1, second, "1.0"), (1, torchs, "2.0")])
    skinny_bench.write(path, origin | {"date": "2026-02-02"}, skinny_bench.entries_of(again))
    assert linear_tiles.load(path) == found | {(128, 512): {16: Tile(*second)}}
    third = measured(256, [(1, first, "2.0"), (1, torchs, "1.0")])
    skinny_bench.write(path, origin | {"date": "2026-02-02"}, skinny_bench.entries_of(third))
    told = json.loads(path.read_text())
    assert (told["date"], told["earlier"]) == ("2026-02-02", [origin]), "a run that writes twice is told once"


def test_many_rows_count_no_more_than_few():
    torchs, first, second = skinny_bench.TORCH, (2, 3, 0, 0, 0, 0), (1, 3, 0, 0, 0, 0)
    times = [(1, torchs, "10"), (1, first, "8"), (1, second, "9.5"), (16, torchs, "40"), (16, first, "39"),
             (16, second, "36")]  # fmt: skip
    (entry,) = skinny_bench.entries_of(measured(64, times))
    assert (entry["us"], entry["tile"]["split"]) == ([8.0, 39.0], 2), "0.80 + 0.975 < 0.95 + 0.90, though 47 > 45.5"


@interpreted
def test_the_bench_ranks_tiles_and_torch_and_proves_each(monkeypatch):
    monkeypatch.setattr(skinny_bench, "COLD_BYTES", 1)
    for gates in ((), ((64, 512),)):
        monkeypatch.setattr(skinny_bench, "GATES", gates)
        next_time = iter((3.0, 1.0, 2.0)).__next__
        tiles = [Tile(2, 3, 1), Tile(shared=2)]
        rows = skinny_bench.shape_rows(64, 512, 2, tiles, "cpu", torch.float32, lambda *_, time=next_time: time())
        assert [(row["us"], row["split"], row["held"]) for row in rows] == [("1.0", 2, 1), ("2.0", 1, 0), ("3.0", "", "")]
        assert [row["shared"] for row in rows] == [0, 2, ""]
        assert all(float(row["error"]) < 1e-5 for row in rows)
        assert all(list(row) == list(skinny_bench.COLUMNS) for row in rows)


def test_the_bench_compiles_ahead_what_it_times(monkeypatch, tmp_path, capsys):
    ahead, timed = {}, set()

    def compile_ahead(work, jobs):
        ahead[work.__name__] = jobs

    def time_them(columns, depth, rows, tiles):
        timed.update((columns, depth, linear_tiles.bucket_of(rows), *vars(tile).values()) for tile in tiles)
        return measured(columns, [(rows, (1, 3, 0, 0, 0, 0), "1.0"), (rows, skinny_bench.TORCH, "2.0")])

    monkeypatch.setattr(skinny_bench, "in_parallel", compile_ahead)
    monkeypatch.setattr(skinny_bench, "shape_rows", time_them)
    monkeypatch.setattr(skinny_bench, "provenance", lambda command: {"device": "a GPU", "date": "2026-01-01"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    table = tmp_path / "linears.json"
    assert skinny_bench.main(["--models", "llava-7b", "--rows", "1", "8", "32", "--table", str(table)]) == 0
    assert len(ahead["precompile"]) == len(timed) == 2 * (12 + 18 + 12 + 18)
    assert set(ahead["precompile"]) == timed
    assert len(capsys.readouterr().out.splitlines()) == 3 + 4 * 3 * 2
    assert {tile for buckets in linear_tiles.load(table).values() for tile in buckets.values()} == {Tile(1, 3)}

"""Points, result files and the verdict on them, from rows made up here."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import results, timing, verdict
from kernels.__main__ import main
from kernels.batch import LoraError
from kernels.linear_tiles import Tile
from kernels.results import Row
from kernels.timing import Point, World

OURS = Row("atmm", "decode", 4096, 4096, 1, 8, 8, 64, "uniform", 4.0, 2.0, 1e-3)


def test_a_point_is_bound_by_its_bytes():
    point = Point("decode", 4096, (4096,), 8, 8, 64)
    moved = 2 * (8 * 3 * 4096 + 8 * 64 * 2 * 4096)
    assert point.floor_us == pytest.approx(moved / 4.3e12 * 1e6)


@pytest.mark.parametrize(
    ("skew", "tokens", "adapters", "counts"),
    [
        ("uniform", 10, 4, [3, 3, 2, 2]),
        ("skew60", 100, 4, [60, 14, 13, 13]),
        ("skew60", 8, 8, [1] * 8),
        ("short", 64, 3, [32, 16, 16]),
    ],
)
def test_rows_fall_to_adapters_as_the_skew_says(skew, tokens, adapters, counts):
    index = Point("prefill", 64, (64,), tokens, adapters, 16, skew).index()
    assert np.bincount(index).tolist() == counts
    with pytest.raises(LoraError, match="skew 'odd'"):
        Point("prefill", 64, (64,), 8, 4, 16, "odd").index()


class Event:
    """Of a GPU whose clock falls by 1 % with every replay."""

    now_ms, slowness = 0.0, 1.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now_ms

    def elapsed_time(self, other):
        return other.at - self.at

    @classmethod
    def replay(cls, us):
        cls.now_ms += us * cls.slowness / 1e3
        cls.slowness *= 1.01


def test_what_a_call_adds_is_told_against_the_faster_linear_at_the_same_clock(monkeypatch):
    """Each linear is captured once, however often it is asked for; an operator in turn runs behind the faster one."""
    ran, took, tile = [], {"plain": 9.0, "tiled": 7.0, "branched": 8.5}, [Tile(2, 3)]
    monkeypatch.setattr(timing, "COLD_BYTES", 1 << 14)
    monkeypatch.setattr(timing.skinny, "linear", lambda x, weight, bias: ran.append("plain"))
    monkeypatch.setattr(timing.skinny, "run", lambda x, weight, bias, tile: ran.append("tiled"))
    monkeypatch.setattr(timing.skinny, "tile_for", lambda x, weight, branched: tile[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def chain(world, call, calls):
        call(world.x, world._weights[0], 0)
        return SimpleNamespace(replay=partial(Event.replay, calls * took[ran[-1]]))

    monkeypatch.setattr(World, "_chain", chain)
    for added, tile[0] in ((1.5, Tile(2, 3)), (-0.5, None)):
        ran.clear()
        monkeypatch.setattr(Event, "slowness", 0.8)
        world = World(Point("decode", 64, (64,), 4, 2, 16), torch.float16, device="cpu", cold_bytes=1 << 14)
        for _ in range(2):
            # the second of a pair is 1 % slower, .1 us; two medians would be of clocks 10 to 30 % apart, .9 us and more
            assert world.behind_us(lambda *call: ran.append("branched")) == pytest.approx(added, abs=0.4)
        assert ran == ["plain", *["tiled"] * bool(tile[0]), "branched", "branched"]
        world.linear(world.x, world._weights[0], None)
        assert ran[-1] == ("tiled" if tile[0] else "plain")


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [OURS, replace(OURS, operator="slora", us=7.5, error=2e-3, behind_us=7.25)]
    assert [row.cost_us for row in rows] == [4.0, 7.25]
    results.write(path, rows, {"device": "a GPU", "versions": "torch 2: 11"})
    assert results.read(path) == rows
    assert results.header(path) == {"device": "a GPU", "versions": "torch 2: 11"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("4.000", "fast", "line 3: us 'fast' is no float"),
        ("8,8,64", "8,64", "line 3: 12 values, expected 13"),
        ("operator", "op", "the columns are not"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, old, new, says):
    path = tmp_path / "rows.csv"
    results.write(path, [OURS], {"device": "a GPU"})
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(LoraError, match=says):
        results.read(path)
    with pytest.raises(LoraError, match="does not exist"):
        results.read(tmp_path / "none.csv")


def test_the_verdict_counts_wins_losses_and_wrong_rows():
    slow, lost = replace(OURS, tokens=16, us=10.0), replace(OURS, operator="rival", tokens=16, us=5.0)
    rows = [
        OURS, slow, lost,
        replace(OURS, operator="rival", us=8.0),
        replace(OURS, operator="cheat", us=1.0, error=0.5),
        replace(OURS, operator="atmm-static", us=6.0),
        replace(OURS, skew="skew60", us=4.4),
    ]  # fmt: skip
    said = verdict.lines(rows, [replace(OURS, operator="peer", us=6.0)])
    for line in (
        "7 rows at 3 points; 1 wrong by 1e-2 or more",
        "decode, 1 slices: 3.16x the floor back to back over 2 points (goal 4.5)",
        "decode, 1 slices, uniform: no slower than a rival measured here at 1 of 2 points, 1.00x the fastest's speed",
        "  lost: 16 tokens, 8 adapters, rank 64: 10.00 us, rival 5.00",
        "decode, 1 slices, uniform: no slower than a peer's own operator (peers file) at 1 of 1 points, "
        "1.50x the fastest's speed",
        "skew60, decode: 1.100x uniform, most 1.10x, 1 points",
        "adaptive tiling, decode, up to 16 rows an adapter, rank from 64: 1.50x the one static tiling (most 1.50) "
        "at 1 points",
        "8 tokens, 8 adapters, 1 slices, rank 64: 4.00 us back to back, 4.00 as it occurs (goal 4.0, floor 2.00)",
    ):
        assert line in said, line


def test_calls_are_compared_as_they_occur_where_that_was_measured():
    rows = [replace(OURS, us=8.0, behind_us=4.0), replace(OURS, skew="skew60", us=8.0, behind_us=5.0)]
    said = verdict.lines([*rows, *(replace(row, operator="rival", us=6.0, behind_us=0.0) for row in rows)], [])
    for line in (
        "decode, 1 slices: 2.00x the floor behind a linear over 1 points (goal 4.5)",
        "decode, 1 slices, uniform: no slower than a rival measured here at 1 of 1 points, 1.50x the fastest's speed",
        "skew60, decode: 1.250x uniform, most 1.25x, 1 points",
    ):
        assert line in said, line


def test_the_papers_ratio_is_of_sums():
    one = replace(OURS, adapters=1)
    rows = [one, replace(one, tokens=64, us=6.0)]
    rows += [replace(row, operator="slora", us=3 * row.us) for row in rows]
    assert any(line.startswith("slora (measured here): 3.00x our latency summed over [8, 64] tokens")
               for line in verdict.lines(rows, []))  # fmt: skip


def test_the_command_line_says_what_it_cannot_do(tmp_path, capsys):
    assert main(["verdict", str(tmp_path / "none.csv")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_committed_results_carry_their_origin_and_are_right():
    for name in ("operators_h200.csv", "peers_h200.csv"):
        about = results.header(results.FOLDER / name)
        assert {"what", "device", "versions", "command"} <= set(about), name
        assert all(row.error < 1e-2 for row in results.read(results.FOLDER / name)), name

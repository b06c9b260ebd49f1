"""The search for tiles inside whole steps: what it tries, what it keeps, and what it writes."""

import json
from types import SimpleNamespace

import pytest
import torch

from engine import tile_bench
from engine.tile_bench import AGAIN, WORTH, Steps, main, note_tile, note_tiling, search
from kernels import atmm, linear_tiles, tiles
from kernels.batch import LoraError, Projection
from kernels.linear_tiles import Tile
from kernels.tiles import Shape, Tiling, as_entry

QKV, OUT = ("qkv", "tile"), ("o", "tile")
TILES = [None, *(Tile(split) for split in range(1, 9))]
WIDE, SQUARE = (4096, (4096, 4096, 4096)), (4096, (4096,))


def test_a_tile_that_is_best_only_beside_another_is_found():
    tried = []

    def time_us(choice):
        tried.append(dict(choice))
        qkv, o = (choice[part].split if choice[part] else 0 for part in (QKV, OUT))
        return 100 - 5 * (o == 3) - 2 * (qkv == 7) - 4 * (qkv == 2 and o == 3)

    best, took, before = search((QKV, OUT), lambda part: TILES, time_us, {QKV: None, OUT: None})
    assert (best, took, before) == ({QKV: Tile(2), OUT: Tile(3)}, 91, 100)
    assert len(tried) == 2 + 2 * (len(TILES) + AGAIN)


def test_a_first_step_that_was_slow_by_accident_hands_nothing_over():
    times = iter([130.0, 100.0, *[100.5] * 100])
    start = {QKV: Tile(4), OUT: None}
    assert search((QKV, OUT), lambda part: TILES, lambda choice: next(times), start) == (start, 100.0, 100.0)


def test_noise_keeps_what_stands():
    times = iter([100.0, *[99.9] * 100])
    start = {QKV: Tile(4), OUT: None}
    assert search((QKV, OUT), lambda part: TILES, lambda choice: next(times), start)[0] == start


def test_a_note_changes_the_rows_it_is_of_and_refuses_a_shape_the_table_lacks():
    document = {"entries": [{"columns": 96, "depth": 32, "bucket": 16, "branched": {"16": None}}]}
    note_tile(document, 8, (96, 32), Tile(2), {"us": 1.0})
    (entry,) = document["entries"]
    assert entry["branched"]["8"]["split"] == 2
    assert entry["branched"]["16"] is None
    assert entry["step_us"] == {"8": {"us": 1.0}}
    with pytest.raises(LoraError, match=r"32 x 32 .* 8 rows; run skinny_bench"):
        note_tile(document, 8, (32, 32), None, {"us": 1.0})


def test_a_tiling_takes_the_place_of_its_shapes_or_a_new_one():
    document = {"entries": [as_entry(Shape(*SQUARE, 64, tokens, 8), Tiling(), 4.0) for tokens in (8, 32)]}
    note_tiling(document, as_entry(Shape(*SQUARE, 64, 8, 8), Tiling("under"), 3.0))
    note_tiling(document, as_entry(Shape(*SQUARE, 64, 16, 16), Tiling(), 5.0))
    told = [(entry["tokens"], entry["tiling"]["form"], entry.get("in_step", False)) for entry in document["entries"]]
    assert told == [(8, "under", True), (32, "two", False), (16, "two", True)]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Two table files that are also what is looked up, and a bench of no GPU whose steps are never timed."""
    linears, tilings = tmp_path / "linears.json", tmp_path / "tilings.json"
    alike = {"depth": 4096, "bucket": 16, "rows": [8], "us": [1.0], "torch_us": [2.0], "tile": vars(Tile(4))}
    plain = [{"columns": columns, **alike} for columns in (12288, 4096)]
    linears.write_text(json.dumps({"entries": plain}))
    shapes = [Shape(*sizes, 64, tokens, 8, ready=True) for sizes in (WIDE, SQUARE) for tokens in (8, 32)]
    forms = [Tiling(), Tiling("under", n_block=64), Tiling(n_block=256), Tiling("under")]
    entries = [as_entry(shape, tiling, 4.0) for shape, tiling in zip(shapes, forms, strict=True)]
    tilings.write_text(json.dumps({"device": "a GPU", "entries": entries}))
    found = {branched: linear_tiles.load(linears, branched=branched) for branched in (False, True)}
    known = tiles.load(tilings)
    for module in (tile_bench, linear_tiles):
        monkeypatch.setattr(module, "tiles", lambda device, branched=False: found[branched])
        monkeypatch.setattr(module, "device_name", lambda: "a-gpu")
    for module in (tile_bench, tiles):
        monkeypatch.setattr(module, "table", lambda device: known)
    monkeypatch.setattr(linear_tiles, "INTERPRETED", False)
    tiles.lookup.cache_clear()
    pool = SimpleNamespace(projections={"qkv": Projection(*WIDE), "o": Projection(*SQUARE)})
    graphs = SimpleNamespace(buckets=[], capture=lambda *kinds: None)
    runner = SimpleNamespace(lora=SimpleNamespace(pool=pool, rank=64), graphs=graphs)
    bench = SimpleNamespace(runner=runner, adapters=16, decode_us=lambda *step: {"graph_us": 90.0})
    yield SimpleNamespace(linears=linears, tilings=tilings, bench=bench)
    tiles.lookup.cache_clear()


def test_the_steps_start_from_the_tables_and_change_them(tables):
    steps = Steps(tables.bench, 5, 8)
    start = steps.start()
    assert start == {("qkv", "tile"): Tile(4), ("qkv", "tiling"): Tiling(), ("o", "tile"): Tile(4),
                     ("o", "tiling"): Tiling(n_block=256)}  # fmt: skip
    assert steps.candidates(("o", "tiling")) == [Tiling(n_block=256), Tiling(), Tiling("under"), Tiling("under", n_block=64)]
    steps.take(start | {("o", "tile"): None, ("o", "tiling"): Tiling("under")})
    assert linear_tiles.measured_tile(8, 4096, 4096, torch.bfloat16, branched=True) is None
    assert linear_tiles.measured_tile(8, 4096, 4096, torch.bfloat16) == Tile(4)
    assert tiles.lookup(steps.shape("o")) == Tiling("under")


def test_the_tiles_worth_a_step_are_the_fastest_with_their_branches(tables, monkeypatch):
    steps, tried = Steps(tables.bench, 5, 8), []

    def behind_us(linear, **repeats):
        tile = linear_tiles.measured_tile(8, 4096, 4096, torch.bfloat16, branched=True)
        tried.append(tile)
        return 9.0 if tile is None else tile.stages + tile.held

    monkeypatch.setattr(Steps, "_world", lambda steps, name: SimpleNamespace(behind_us=behind_us))
    monkeypatch.setattr(tile_bench, "spread", lambda tiles, launch: tiles)
    worth = steps.candidates(("o", "tile"))
    assert len(worth) == WORTH
    assert {tile.stages + tile.held for tile in worth} == {3, 4}
    assert tried[0] is None, "torch's"
    assert len({*tried}) == len(tried) > WORTH


def test_what_is_compiled_ahead_is_every_candidate(tables, monkeypatch):
    ahead = []
    monkeypatch.setattr(tile_bench, "compile_all", ahead.extend)
    Steps(tables.bench, 5, 8).compile()
    kernels = [launch.kernel.__name__ for launch in ahead]
    assert {kernels.count(name) for name in ("shrink", "expand", "under")} == {4}
    assert all(launch.constants["READY"] for launch in ahead if launch.kernel.__name__ == "under")
    assert all(launch.constants["LATE"] for launch in ahead if launch.kernel.__name__.startswith("few_rows"))


def test_a_whole_run_writes_both_tables(tables, monkeypatch):
    def candidates(steps, part):
        return steps.near[part[0]] if part[1] == "tiling" else [Tile(4), Tile(2)]

    def time_us(steps, choice):
        steps.take(choice)
        return 100 - 3 * (choice["o", "tile"] == Tile(2)) - 2 * (choice["qkv", "tiling"].form == "under")

    for name, stand_in in (("candidates", candidates), ("time_us", time_us), ("compile", lambda steps: None),
                           ("alone_us", lambda *_: 2.5)):  # fmt: skip
        monkeypatch.setattr(Steps, name, stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tile_bench, "random_model", lambda *_, **__: None)
    monkeypatch.setattr(tile_bench, "Bench", lambda model, args: tables.bench)
    monkeypatch.setattr(tile_bench, "provenance", lambda command: {"command": command})
    asked = ["--linears", str(tables.linears), "--tilings", str(tables.tilings), "--batches", "8"]
    assert main(asked) == 0
    linears, tilings = (json.loads(path.read_text()) for path in (tables.linears, tables.tilings))
    assert [entry["branched"]["8"]["split"] for entry in linears["entries"]] == [4, 2]
    assert {tuple(entry["step_us"]["8"].values()) for entry in linears["entries"]} == {(90.0, 100, 95)}
    chosen = [entry for entry in tilings["entries"] if entry.get("in_step")]
    assert [(entry["tokens"], entry["adapters"], entry["tiling"]["form"], entry["us"]) for entry in chosen] == [
        (8, 8, "under", 2.5)]  # fmt: skip
    assert len(tilings["entries"]) == 4
    assert ["--batches 8" in run["command"] for run in tilings["in_step"]["runs"]] == [True]
    assert main([*asked, "--repeats", "3"]) == 0
    assert len(json.loads(tables.linears.read_text())["in_step"]["runs"]) == 2
    assert tiles.load(tables.tilings)[Shape(*WIDE, 64, 8, 8, ready=True)].form == "under"


def test_what_is_missing_is_said_before_anything_is_timed(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tile_bench, "random_model", lambda *_, **__: None)
    monkeypatch.setattr(tile_bench, "Bench", lambda model, args: tables.bench)
    absent = tmp_path / "none.json"
    for linears, rows, says in ((absent, "8", "skinny_bench --table"), (tables.linears, "64", "12288 x 4096")):
        with pytest.raises(SystemExit):
            main(["--linears", str(linears), "--tilings", str(tables.tilings), "--batches", rows])
        error = capsys.readouterr().err
        assert says in error
        assert linears.name in error


def test_a_step_takes_the_tiling_of_its_shape(tables):
    """`atmm` looks up what `Steps.take` wrote."""
    steps = Steps(tables.bench, 5, 8)
    steps.take({("o", "tiling"): Tiling("under", n_block=32)})
    of = Shape(*SQUARE, 64, 8, 8)
    assert atmm.lookup(atmm.behind(of, torch.bfloat16)) == Tiling("under", n_block=32)
    assert not atmm.behind(of, torch.float16).ready, "no tile of a linear was measured in float16"

"""The tile table: nearest neighbour, bad files, and committed tables that fit their own shapes."""

import json
from dataclasses import replace

import pytest

from kernels import tiles
from kernels.batch import LoraError
from kernels.tiles import Shape, Tiling, as_entry, default, load


def table_file(folder, *entries):
    path = folder / "device.json"
    path.write_text(json.dumps({"entries": list(entries)}))
    return path


def test_a_table_survives_the_file(tmp_path):
    shape, tiling = Shape(4096, (4096, 512), 64, 8, 4), Tiling(rows=32, span=4)
    assert load(table_file(tmp_path, as_entry(shape, tiling, 4.2))) == {shape: tiling}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tiling": {"blocks": 3}}, "entry 0: unknown tiling field"),
        ({"tiling": {"rows": 17}}, "rows 17"),
        ({"tiling": {"form": "three"}}, "form 'three'"),
    ],
)
def test_a_bad_table_is_named(tmp_path, change, says):
    entry = as_entry(Shape(64, (64,), 16, 1, 1), Tiling(), 1.0) | change
    with pytest.raises(LoraError, match=says):
        load(table_file(tmp_path, entry))
    bad = tmp_path / "broken.json"
    bad.write_text("{")
    with pytest.raises(LoraError, match=r"broken\.json"):
        load(bad)


def test_lookup_takes_the_nearest_of_a_sufficient_rank(tmp_path, monkeypatch):
    few, many, wide = Tiling(split=8), Tiling(rows=64, split=1), Tiling(split=4)
    path = table_file(
        tmp_path,
        as_entry(Shape(4096, (4096,), 16, 8, 8), few, 1.0),
        as_entry(Shape(4096, (4096,), 16, 4096, 8), many, 1.0),
        as_entry(Shape(4096, (4096,), 64, 8, 8), wide, 1.0),
    )
    monkeypatch.setattr(tiles, "table", lambda device: load(path))
    wanted = [Shape(4096, (4096,), *rest) for rest in ((16, 12, 4), (16, 2000, 9), (32, 8, 8), (128, 8, 8))]
    assert [tiles.lookup.__wrapped__(shape) for shape in wanted] == [few, many, wide, default(wanted[-1])]


def test_unequal_shares_have_entries_of_their_own(tmp_path, monkeypatch):
    even, uneven, few = Tiling(rows=128), Tiling("stream", 64, expand_rows=64), Tiling(split=8)
    shape = Shape(4096, (4096,), 64, 4096, 8)
    entries = [(shape, even), (replace(shape, uneven=True), uneven), (replace(shape, tokens=256), few)]
    path = table_file(tmp_path, *(as_entry(known, tiling, 1.0) for known, tiling in entries))
    monkeypatch.setattr(tiles, "table", lambda device: load(path))
    for tokens, adapters in ((4096, 8), (5000, 6)):
        near = [tiles.lookup.__wrapped__(replace(shape, tokens=tokens, adapters=adapters, uneven=u)) for u in (False, True)]
        assert near == [even, uneven]


def test_a_branch_that_may_run_beside_its_linear_has_entries_of_its_own(tmp_path, monkeypatch):
    """13B's layers have no linear of few rows where only 7B's were measured: then a tiling cut for one would be slow."""
    apart, beside = Tiling(split=8), Tiling("under")
    shape = Shape(4096, (4096,), 64, 8, 8)
    entries = [(replace(shape, ready=True), beside), (replace(shape, tokens=64), apart)]
    path = table_file(tmp_path, *(as_entry(known, tiling, 1.0) for known, tiling in entries))
    monkeypatch.setattr(tiles, "table", lambda device: load(path))
    wider = replace(shape, d_in=5120, widths=(5120,))
    assert [tiles.lookup.__wrapped__(replace(wider, ready=ready)) for ready in (False, True)] == [apart, beside]
    assert [tiles.neighbours(replace(wider, ready=ready), 2) for ready in (False, True)] == [[apart], [beside]]
    assert tiles.neighbours(replace(wider, tokens=4096), 2) == []


def test_the_default_fits_every_shape():
    for rank in (16, 32, 64, 128, 256):
        for tokens in (1, 8, 100, 1000, 16384):
            for adapters in {1, min(8, tokens)}:
                t = default(Shape(18944, (3584,), rank, tokens, adapters))
                staged = (t.rows + rank) * t.k_block * 2 * (t.stages if t.split * t.k_block < 18944 else 1)
                assert staged <= 200 << 10, (rank, tokens, adapters)


def test_committed_tables_name_their_origin():
    paths = sorted(tiles.FOLDER.glob("*.json"))
    assert paths, "the repository ships the table of the GPU it was tuned on"
    for path in paths:
        header = json.loads(path.read_text())
        assert {"device", "date", "versions", "command"} <= set(header), path
        assert load(path), path

"""The switch folds adapters into the weights and out: right, bit-exact from the golden copy, all in one launch."""

import numpy as np
import pytest
import torch

from kernels import merge, switch_bench
from kernels.batch import LoraPool, Projection
from kernels.merge import NO_SLOT, Factors, SwitchError, WeightSwitch

WIDTHS = ((48, 32), (16, 32), (32, 176))  # [d_out, d_in]: a query, a narrower key (GQA), and edges that fill no tile
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(g, dtype, *shape):
    return torch.randn(shape, generator=g).to(DEVICE, dtype)


def world(dtype, ranks=(4, 16, 5), form="golden", seed=0):
    """Three matrices and, in slots 0.., adapters of the given ranks; the last leaves the second matrix alone."""
    g = seeded(seed)
    weights = [draw(g, dtype, *shape) for shape in WIDTHS]
    switch = WeightSwitch(weights, slots=len(ranks), form=form)
    adapters = []
    for slot, rank in enumerate(ranks):
        factors = [
            Factors(draw(g, dtype, rank, d_in), draw(g, dtype, rank, d_out), 0.1 + slot / 10) for d_out, d_in in WIDTHS
        ]
        if slot == len(ranks) - 1:
            factors[1] = None
        switch.register(slot, factors)
        adapters.append(factors)
    return switch, adapters


def delta(pair):
    return 0.0 if pair is None else pair.scale * (pair.b.float().T @ pair.a.float())


def error(got, truth):
    return float((got.float() - truth).norm() / truth.norm())


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of many steps and edges on these tiny matrices, whatever the padded rank."""
    monkeypatch.setattr(merge, "TILES", dict.fromkeys(merge.TILES, merge.Tile(16, 16, 2, 2, 4)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_change_from_golden_is_one_rounding_of_the_truth_and_restores_every_bit(dtype):
    switch, adapters = world(dtype)
    golden = [w.clone() for w in switch.weights]
    for slot in (0, 1, 2, 0, NO_SLOT, 2, NO_SLOT):
        switch.to(slot)
        for entry, weight in enumerate(switch.weights):
            pair = None if slot == NO_SLOT else adapters[slot][entry]
            truth = golden[entry].float() + delta(pair)
            assert error(weight, truth) < 4e-3
            if pair is None:
                assert torch.equal(weight, golden[entry])
    assert switch.merged == NO_SLOT


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_adds_the_new_and_subtracts_the_old_in_one_pass(dtype):
    switch, adapters = world(dtype, form="in_place")
    golden = [w.clone() for w in switch.weights]
    assert switch.golden == []
    for slot in (0, 1, 2, 0):
        switch.to(slot)
        for entry, weight in enumerate(switch.weights):
            assert error(weight, golden[entry].float() + delta(adapters[slot][entry])) < 1e-2
    switch.to(NO_SLOT)
    for entry, weight in enumerate(switch.weights):
        assert error(weight, golden[entry].float()) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_in_place_is_a_restore_and_a_merge_bit_for_bit(dtype):
    direct, _ = world(dtype, form="in_place")
    stepwise, _ = world(dtype, form="in_place")
    for slot in (0, 1, 2, 1):
        direct.to(slot)
        stepwise.to(NO_SLOT)
        stepwise.to(slot)
    assert all(torch.equal(a, b) for a, b in zip(direct.weights, stepwise.weights, strict=True))


def test_a_large_rank_in_place_takes_two_launches_and_everything_else_one():
    switch, _ = world(torch.float16, ranks=(16, 200, 5), form="in_place")
    assert switch.passes(0, 2) == [(0, 2)]
    assert switch.passes(1, NO_SLOT) == [(1, NO_SLOT)]
    assert switch.passes(1, 0) == [(NO_SLOT, 0), (1, NO_SLOT)]
    golden, _ = world(torch.float16, ranks=(16, 200, 5))
    assert golden.passes(1, 0) == [(1, 0)]


def test_a_second_launch_that_fails_leaves_plain_weights_that_are_known_to_be(monkeypatch):
    switch, _ = world(torch.float32, ranks=(16, 200, 5), form="in_place")
    switch.to(0)
    launch = switch.launch

    def fails(plus, minus, tile):
        if plus == 1:
            raise RuntimeError("made up")
        launch(plus, minus, tile)

    monkeypatch.setattr(switch, "launch", fails)
    with pytest.raises(RuntimeError, match="made up"):
        switch.to(1)
    assert switch.merged == NO_SLOT
    plain = [w.clone() for w in switch.weights]
    switch.to(NO_SLOT)  # nothing: what was subtracted is not subtracted again
    assert all(torch.equal(a, b) for a, b in zip(switch.weights, plain, strict=True))


def test_tiles_shrink_until_they_fit():
    tile = merge.TILES[128, False]
    assert merge.shared_bytes(tile, 128, False, 2) == 2 * (3 * 128 * (128 + 128) + 128 * 128)
    assert merge.fitted(tile, 128, False, 2, 232448) == tile
    assert merge.fitted(tile, 128, False, 4, 232448) == tile._replace(stages=2, columns=64, steps=64)
    for (rank, subtracts), chosen in merge.TILES.items():
        small = merge.fitted(chosen, rank, subtracts, 4, 99 << 10)
        assert merge.shared_bytes(small, rank, subtracts, 4) <= 99 << 10
        assert small.columns * small.steps == chosen.columns * chosen.steps
    with pytest.raises(SwitchError, match="rank 256 needs more than the 1024 bytes"):
        merge.fitted(tile, 256, False, 2, 1024)


def test_in_place_drifts_where_golden_does_not():
    drift = {}
    for form in merge.FORMS:
        switch, _ = world(torch.float16, form=form)
        before = [w.clone() for w in switch.weights]
        for slot in (0, 1, 2, NO_SLOT):
            switch.to(slot)
        drift[form] = sum(int((w != b).sum()) for w, b in zip(switch.weights, before, strict=True))
    assert drift["golden"] == 0 < drift["in_place"]


@pytest.mark.parametrize("ranks", [(1,), (17,), (64, 3), (100, 256)])
def test_mixed_ranks_up_to_256_share_a_launch(ranks):
    dtype = torch.float32
    g = seeded(3)
    weight, other = (draw(g, dtype, 32, 64) for _ in range(2))
    switch = WeightSwitch([weight, other], slots=len(ranks) + 1, form="in_place")
    truth = weight.float().clone()
    for slot, rank in enumerate((*ranks, 7)):
        pair = Factors(draw(g, dtype, rank, 64), draw(g, dtype, rank, 32), 0.1)
        switch.register(slot, [pair, None])
        switch.to(slot)
        assert error(weight, truth + delta(pair)) < 1e-3


def test_a_nan_in_one_adapter_leaves_with_it():
    switch, adapters = world(torch.float16)
    golden = [w.clone() for w in switch.weights]
    adapters[1][0].a[0, 0] = float("nan")
    switch.to(1)
    assert switch.weights[0].isnan().any()
    assert not switch.weights[0][:, 1:].isnan().any()
    switch.to(NO_SLOT)
    assert all(torch.equal(w, g) for w, g in zip(switch.weights, golden, strict=True))


def test_a_pool_of_fused_projections_is_merged_where_it_lies():
    projection = Projection(32, (48, 16, 24))
    pool = LoraPool({"qkv": projection}, layers=2, slots=2, rows=64, dtype=torch.float16, device=DEVICE)
    g, keys = seeded(5), [(0, "qkv"), (1, "qkv")]
    fused = [draw(g, torch.float16, 88, 32) for _ in keys]
    for slot, rank in enumerate((9, 20)):
        shapes = [((rank, 32), (rank, width)) for width in projection.widths]
        drawn = {key: [tuple(draw(g, torch.float16, *s) for s in pair) for pair in shapes] for key in keys}
        pool.put(slot, drawn, scale=0.25)
    golden = [w.clone() for w in fused]
    switch = WeightSwitch([part for w in fused for part in w.split(projection.widths)], slots=2)
    switch.attach(pool, keys)
    for slot in range(2):
        switch.place(slot, pool.offsets[slot], pool.true_ranks[slot], pool.scales[slot])
    switch.to(0)
    switch.to(1)
    for key, weight, before in zip(keys, fused, golden, strict=True):
        views = zip(*pool.views(1, key), strict=True)
        truth = before.float() + torch.cat([0.25 * b.float().T @ a.float() for a, b in views])
        assert error(weight, truth) < 1e-3
    placed = [w.clone() for w in fused]
    views = [Factors(a[:20], b[:20], 0.25) for key in keys for a, b in zip(*pool.views(1, key), strict=True)]
    switch.to(NO_SLOT)
    switch.register(1, views)
    switch.to(1)
    assert all(torch.equal(w, before) for w, before in zip(fused, placed, strict=True))


def test_strips_cover_every_element_once():
    weights = [torch.zeros(shape) for shape in WIDTHS]
    tile = merge.Tile(16, 16, 3, 2, 4)
    counts = [np.zeros(shape, int) for shape in WIDTHS]
    for entry, row, column in merge._strips(weights, tile).tolist():
        counts[entry][row : row + tile.rows, column : column + tile.columns * tile.steps] += 1
    assert all((c == 1).all() for c in counts)


def test_moved_bytes_count_touched_matrices_only():
    switch, adapters = world(torch.float16)
    switch.to(0)
    touched = [pair for pair in adapters[2] if pair is not None]
    every_matrix = 2 * sum(w.nbytes for w in switch.weights)  # slot 0, which leaves, touched them all
    assert switch.moved_bytes(2, 0) == every_matrix + sum(p.a.nbytes + p.b.nbytes for p in touched)
    assert switch.moved_bytes(NO_SLOT, 2) == 2 * (switch.weights[0].nbytes + switch.weights[2].nbytes)
    assert switch.moved_bytes(NO_SLOT, NO_SLOT) == 0


def bad_calls():
    w = torch.zeros(32, 32)
    pair = Factors(torch.zeros(4, 32), torch.zeros(4, 32))
    switch = WeightSwitch([w], slots=2)
    yield "unknown form", lambda: WeightSwitch([w], form="both")
    yield "keeps no golden copy", lambda: WeightSwitch([w], golden=[w.clone()], form="in_place")
    yield "at least one", lambda: WeightSwitch([])
    yield r"shape \(32, 36\)", lambda: WeightSwitch([torch.zeros(32, 36)])
    yield "contiguous", lambda: WeightSwitch([torch.zeros(32, 64)[:, :32]])
    yield "float64", lambda: WeightSwitch([w.double()])
    yield "one dtype", lambda: WeightSwitch([w, w.half()])
    yield "the weight itself", lambda: WeightSwitch([w], golden=[w])
    yield "2 golden copies", lambda: WeightSwitch([w], golden=[w.clone()] * 2)
    yield r"slot 2 is outside 0\.\.1", lambda: switch.register(2, [pair])
    yield "2 factors for 1", lambda: switch.register(0, [pair, pair])
    yield "rank 257", lambda: switch.register(0, [Factors(torch.zeros(257, 32), torch.zeros(257, 32))])
    yield r"b has shape \(4, 16\)", lambda: switch.register(0, [Factors(torch.zeros(4, 32), torch.zeros(4, 16))])
    yield "convert it first", lambda: switch.register(0, [Factors(pair.a.half(), pair.b.half())])
    yield "slot 1 holds no adapter", lambda: switch.to(1)
    yield "attach one first", lambda: switch.place(0, 0, 4, 1.0)
    narrow = LoraPool({"o": Projection(32, (48,))}, layers=1, slots=2, rows=16, dtype=torch.float32)
    yield r"b has shape \(1, 48\)", lambda: switch.attach(narrow, [(0, "o")])
    yield "2 pairs of factors for 1", lambda: switch.attach(narrow, [(0, "o")] * 2)
    yield r"slot -2 is outside", lambda: switch.to(-2)


@pytest.mark.parametrize(("message", "call"), list(bad_calls()))
def test_bad_input_is_named(message, call):
    with pytest.raises(SwitchError, match=message):
        call()


def test_the_merged_slot_cannot_be_replaced():
    switch, adapters = world(torch.float16)
    switch.to(0)
    with pytest.raises(SwitchError, match="slot 0 is merged"):
        switch.register(0, adapters[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the GPU that is there")
def test_the_benchmark_says_what_it_needs(capsys, tmp_path):
    out = tmp_path / "switch.csv"
    assert switch_bench.main(["--out", str(out)]) == 1
    assert "run it on a machine that has one" in capsys.readouterr().err
    assert not out.exists()


def test_a_row_of_the_benchmark_leaves_empty_what_does_not_apply():
    world = switch_bench.World("llava-7b", 64, [], [], torch.empty(0), torch.empty(0), [])
    merged = switch_bench.row("merge_golden", world, ms=2.0, moved_bytes=8_000_000_000)
    drift = switch_bench.row("drift", world, switches=10)
    assert (merged["gb_per_s"], merged["layers"], merged["switches"]) == (4000.0, 32, "")
    assert (drift["switches"], drift["ms"], drift["gb_per_s"]) == (10, "", "")
    assert tuple(merged) == switch_bench.COLUMNS

"""A linear and its branches in one launch, against float32, and which calls go to it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from kernels import atmm as operator
from kernels import joined, skinny
from kernels.batch import LoraBatch, LoraError, LoraPool, Projection
from kernels.launch import EVEN, Launch
from kernels.linear_tiles import Tile
from kernels.pointwise import add_rms_norm
from kernels.reference import reference, relative_error

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PROJECTIONS = {"qkv": Projection(320, (128, 64, 64)), "o": Projection(512, (64,))}
RANKS = (16, 64, 5, 100, 32)


@pytest.fixture(scope="module")
def pool():
    """Five adapters of mixed ranks; rows of the pool that no adapter owns are not numbers."""
    random = torch.Generator().manual_seed(0)
    pool = LoraPool(PROJECTIONS, layers=2, slots=6, rows=400, dtype=DTYPE, device=DEVICE)
    for factors in (*pool.a.values(), *pool.b.values()):
        factors.fill_(float("nan"))
    for slot, rank in enumerate(RANKS):
        pairs = {
            (layer, name): [(torch.randn(rank, p.d_in, generator=random) * p.d_in**-0.5,
                             torch.randn(rank, width, generator=random) * 0.2) for width in p.widths]
            for name, p in PROJECTIONS.items() for layer in range(2)
        }  # fmt: skip
        pool.put(slot, pairs, scale=0.5 + slot)
    return pool


def operands(pool, name, rows, seed=0, *, bias=True):
    random, p = torch.Generator().manual_seed(seed), pool.projections[name]
    x, w, b = (torch.randn(size, generator=random) for size in ((rows, p.d_in), (p.d_out, p.d_in), (p.d_out,)))
    x, w, b = x.to(DEVICE, DTYPE), (w * p.d_in**-0.5).to(DEVICE, DTYPE), b.to(DEVICE, DTYPE)
    return x, w, b if bias else None


def error(y, x, w, b, pool, batch, key):
    """Relative to float32, the rows behind the step's too."""
    truth = torch.nn.functional.linear(x.float(), w.float(), b.float() if b is not None else None)
    used = len(batch.host_index)
    truth[:used] = reference(truth[:used].clone(), x[:used], pool, batch, key)
    return relative_error(y, truth)


@pytest.mark.parametrize(
    ("rows", "index", "merged", "name", "tile"),
    [
        (1, [3], -1, "qkv", Tile(1, 3, parts=4)),
        (5, [1, -1, 0, 1, 4], -1, "qkv", Tile(1, 3, 3, parts=3)),
        (16, [2, 2, 3, -1, 0], -1, "o", Tile(2, 3, 1, parts=1, fetched=2)),
        (20, [0, 1, 2, 3, 4] * 4, 2, "o", Tile(2, 4, 0, parts=2)),
        (6, [2, 2, -1, -1, 2], 2, "qkv", Tile(1, 3, parts=2)),
        (40, list(range(-1, 5)) * 6, 3, "o", Tile(2, 3, parts=2)),
    ],
    ids=["one row", "base rows between", "a graph with room", "mixture", "mixture of base rows", "parts of both sums"],
)  # fmt: skip
def test_equals_float32_and_itself(pool, rows, index, merged, name, tile):
    batch = LoraBatch(pool, 64)
    if rows > len(index):
        batch.fix(rows, 5, 100)
    batch.update(np.array(index), merged)
    x, w, b = operands(pool, name, rows)
    once = joined.linear(x, w, b, pool, batch, (1, name), tile)
    assert error(once, x, w, b, pool, batch, (1, name)) < TOLERANCE[DTYPE]
    assert torch.equal(joined.linear(x, w, b, pool, batch, (1, name), tile), once), "no launch leaves anything behind"


def test_a_batch_may_change_between_two_launches(pool):
    batch = LoraBatch(pool, 16)
    batch.fix(8, 4, 100)
    for merged, index, layer in ((-1, [0, 1, 2, 3], 0), (0, [0, 1, 2, 3], 1), (-1, [-1] * 8, 1), (0, [4], 0), (-1, [4], 1),
                                 (0, [0, 0, -1], 0)):  # fmt: skip
        batch.update(np.array(index), merged)
        x, w, b = operands(pool, "o", 8, seed=len(index), bias=layer)
        y = joined.linear(x, w, b, pool, batch, (layer, "o"), Tile(1, 3, parts=2))
        assert error(y, x, w, b, pool, batch, (layer, "o")) < TOLERANCE[DTYPE], (index, merged)


@interpreted
def test_rows_without_a_branch_are_those_of_the_linear_alone(pool):
    batch, tile = LoraBatch(pool, 16), Tile(2, 3, 1, parts=2)
    batch.update(np.array([-1, 2, -1, 0]))
    x, w, b = operands(pool, "o", 4)
    y, plain = joined.linear(x, w, b, pool, batch, (0, "o"), tile), skinny.run(x, w, b, tile)
    assert torch.equal(y[[0, 2]], plain[[0, 2]])
    assert not torch.equal(y[[1, 3]], plain[[1, 3]])


def test_one_adapter_that_is_not_a_number_touches_no_other_row(pool):
    batch = LoraBatch(pool, 16)
    batch.update(np.array([0, 1, 2]))
    kept = pool.a["o"].clone()
    pool.views(1, (0, "o"))[0][0].fill_(float("nan"))
    x, w, b = operands(pool, "o", 3)
    y = joined.linear(x, w, b, pool, batch, (0, "o"), Tile(1, 3, parts=2))
    pool.a["o"].copy_(kept)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@interpreted
def test_nothing_before_a_pool_is_read(monkeypatch, pool):
    """Rows of the base model owe a folded adapter's branch and have none of their own, neither rank nor rows of the pool."""
    batch = LoraBatch(pool, 16)
    batch.update(np.array([-1, 2, 0]), 2)
    guarded = torch.full((pool.a["o"].numel() + 4096,), float("nan"), dtype=DTYPE)
    behind = guarded[4096:].view_as(pool.a["o"]).copy_(pool.a["o"])
    monkeypatch.setitem(pool.a, "o", behind)
    read, load = [], interpreter_builder.create_masked_load

    def recording(pointers, mask, *rest):
        read.append(pointers.data[mask.data])
        return load(pointers, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", recording)
    x, w, b = operands(pool, "o", 3)
    y = joined.linear(x, w, b, pool, batch, (0, "o"), Tile(1, 3, parts=2))
    assert error(y, x, w, b, pool, batch, (0, "o")) < 1e-5
    addresses = np.concatenate([each.ravel() for each in read])
    assert (addresses == behind.data_ptr()).any()
    assert not ((addresses >= guarded.data_ptr()) & (addresses < behind.data_ptr())).any()


def test_only_as_many_programs_fit_as_the_grid_needs(monkeypatch, pool):
    asked = []
    monkeypatch.setattr(joined, "room", lambda residents, programs: asked.append((residents, programs)) or 4096)
    batch = LoraBatch(pool, 16)
    batch.update(np.array([0, 1, 2, 3]))  # three slices of 128 ranks, in two chunks and two parts
    launch = joined.launch_of(pool, batch, "qkv", 320, 16, Tile(1, 3, parts=2, residents=EVEN))
    assert (asked, launch.grid, launch.shared_bytes) == ([(EVEN, 4 * 3 * 2 * 2 + 4)], (52, 1), 4096)
    assert launch.code == joined.launch_of(pool, batch, "qkv", 320, 16, Tile(1, 3, parts=2)).code


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched, in order."""
    names, bind = [], Launch.bind

    def recording(launch, device):
        run = bind(launch, device)
        return lambda *arguments: (names.append(launch.kernel.__name__), run(*arguments))

    monkeypatch.setattr(Launch, "bind", recording)
    monkeypatch.setattr(skinny, "_PLANS", {})
    return names


@interpreted
@pytest.mark.parametrize(
    ("tile", "index", "order"),
    [
        (Tile(1, 3, parts=2), [1, 0, -1], ["few_rows_branched"]),
        (Tile(1, 3, parts=2), [-1] * 3, []), (None, [1, 0, -1], ["shrink", "expand"]),
    ],
    ids=["measured", "nothing to add", "not measured"],
)  # fmt: skip
def test_what_was_measured_to_be_faster_is_one_launch(monkeypatch, pool, launched, tile, index, order):
    monkeypatch.setattr(skinny, "fits", lambda x, weight: True)
    monkeypatch.setattr(skinny, "measured_tile", lambda *shape, branched=False: tile if branched else None)
    batch = LoraBatch(pool, 8)
    batch.update(np.array(index))
    launched.clear()
    x, w, b = operands(pool, "o", len(index))
    y = operator.linear(x, w, b, pool, batch, (0, "o"))
    assert error(y, x, w, b, pool, batch, (0, "o")) < 1e-5
    assert launched == order
    if tile and batch.adapters:
        compiled = {launch.code for launch in operator.launches(pool, batch, "o", bias=True)}
        assert joined.launch_of(pool, batch, "o", x.stride(0), 16, tile, bias=True).code in compiled


def test_slices_that_no_block_divides_go_in_turn(monkeypatch):
    monkeypatch.setattr(skinny, "measured_tile", lambda *shape, branched=False: Tile(parts=2))
    for widths, takes in (((128, 64), True), ((128, 96), False)):
        pool = LoraPool({"p": Projection(64, widths)}, layers=1, slots=1, rows=16, dtype=DTYPE, device=DEVICE)
        batch = SimpleNamespace(adapters=1)
        assert (joined.measured_tile(4, pool, batch, "p") is not None) == takes


def test_what_does_not_fit_is_refused_before_it_is_launched(pool):
    batch = LoraBatch(pool, 16)
    batch.update(np.array([0, 1, 2]))
    x, w, _ = operands(pool, "o", 2)
    tile = Tile(1, 3, parts=2)
    with pytest.raises(LoraError, match=r"do not fit .* 3 rows"):
        joined.linear(x, w, None, pool, batch, (0, "o"), tile)
    x, w, _ = operands(pool, "o", 3)
    with pytest.raises(LoraError, match="do not fit"):
        joined.linear(x, w[:, :64], None, pool, batch, (0, "o"), tile)
    with pytest.raises(LoraError, match="65 rows"):
        joined.linear(x.new_zeros(65, 512), w, None, pool, batch, (0, "o"), tile)
    joined.linear(x, w, None, pool, batch, (0, "o"), tile)
    with pytest.raises(LoraError, match="no projection"):
        joined.linear(x, w, None, pool, batch, (2, "o"), tile)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_of_joined_layers_equals_launches_that_wait_for_each_other():
    """Six layers of norm, q, k, v, norm and o over three steps of other adapters, bit for bit."""
    projections = {"qkv": Projection(4096, (4096,) * 3), "o": Projection(4096, (4096,))}
    random = torch.Generator("cuda").manual_seed(0)
    pool = LoraPool(projections, layers=6, slots=16, rows=16 * 64, dtype=torch.bfloat16, device="cuda")
    for slot in range(16):
        pool.reserve(slot, 64, 0.5)
    for factors in (*pool.a.values(), *pool.b.values()):
        factors.normal_(0, 0.02, generator=random)
    weights = {name: [torch.randn(p.d_out, 4096, generator=random, device="cuda").bfloat16() / 64 for _ in range(6)]
               for name, p in projections.items()}  # fmt: skip
    ones = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    tiles = {"qkv": Tile(1, 3, parts=4), "o": Tile(2, 4, parts=8, fetched=3, residents=EVEN)}
    for rows, merged in itertools.product((1, 8, 32, 64), (-1, 2)):
        batch = LoraBatch(pool, rows)
        batch.fix(rows, min(rows, 16), 64)
        hidden, residual = (torch.randn(rows, 4096, generator=random, device="cuda").bfloat16() for _ in range(2))

        def layers(pause, batch=batch, hidden=hidden, residual=residual):
            x, left = hidden, residual.clone()
            for layer in range(6):
                for name in projections:
                    x = add_rms_norm(x[:, :4096].contiguous(), left, ones, 1e-5)
                    pause()
                    x = joined.linear(x, weights[name][layer], None, pool, batch, (layer, name), tiles[name])
                    pause()
            return x

        batch.update(np.arange(rows) % 16, merged)
        layers(torch.cuda.synchronize)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch.route()
            found = layers(lambda: None)
        for step in range(3):
            batch.update((np.arange(rows) * 3 + step) % 17 - 1, merged)
            truth = layers(torch.cuda.synchronize)
            for _ in range(5):
                graph.replay()
                assert torch.equal(found, truth)

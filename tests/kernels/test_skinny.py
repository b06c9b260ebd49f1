"""Linear layers of few rows against torch: every form of the kernel, and which calls go to it."""

import json
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from kernels import launch as launching
from kernels import skinny, skinny_bench
from kernels.batch import LoraError
from kernels.pointwise import silu_mul
from kernels.skinny import Tile, gated, linear, run

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
TABLE_FILES = sorted(skinny.FOLDER.glob("*.json"))
TABLES = {shape: buckets for path in TABLE_FILES for shape, buckets in skinny.load(path).items()}
BRANCHED = {shape: buckets for path in TABLE_FILES for shape, buckets in skinny.load(path, branched=True).items()}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def operands(rows, columns, depth, dtype, *, bias=True, device="cpu"):
    generator = torch.Generator(device).manual_seed(rows + columns)
    sizes = ((rows, depth), (columns, depth), (columns,))
    x, w, b = (torch.randn(size, generator=generator, device=device) for size in sizes)
    return x.to(dtype), (w * depth**-0.5).to(dtype), b.to(dtype) if bias else None


def error(y, x, w, bias):
    """Relative to float32."""
    truth = torch.nn.functional.linear(x.float(), w.float(), bias.float() if bias is not None else None)
    return float((y.float() - truth).norm() / truth.norm())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "tile"),
    [
        (1, 64, 256, Tile()), (5, 80, 512, Tile(2, 3, 1)), (16, 130, 400, Tile(3, 3, 3)), (17, 64, 1024, Tile(4, 3, 3)),
        (64, 64, 640, Tile(2, 4, 2, fetched=2)), (5, 330, 512, Tile(shared=1)), (16, 130, 400, Tile(shared=2)),
        (64, 64, 1280, Tile(shared=1)), (3, 64, 256, Tile(shared=3)),
    ],
    ids=["one row", "columns to spare", "depth to spare", "all of it held", "64 rows", "shared", "shared, depth to spare",
         "one tile for all", "a block each"],
)  # fmt: skip
def test_equals_float32_and_itself(rows, columns, depth, tile, dtype):
    for bias in (False, True):
        x, w, b = operands(rows, columns, depth, dtype, bias=bias)
        once, again = run(x, w, b, tile), run(x, w, b, tile)
        assert error(once, x, w, b) < TOLERANCE[dtype]
        assert torch.equal(once, again), "the counters are back at zero"


@interpreted
@pytest.mark.parametrize("tile", [Tile(), Tile(2, 3, 1), Tile(shared=2)], ids=["a tile each", "parts", "shared"])
def test_a_gate_in_the_linear_rounds_as_one_behind_it(tile):
    for rows, half, depth in ((1, 32, 256), (7, 40, 384), (40, 96, 400)):
        x, w, _ = operands(rows, 2 * half, depth, torch.float16, bias=False)
        once, apart = run(x, w, None, tile, gate=True), silu_mul(run(x, w, None, tile))
        # shared: a column's sum may be cut elsewhere
        assert torch.equal(once, apart) if not tile.shared else torch.allclose(once, apart, rtol=4e-3, atol=1e-3)


@interpreted
def test_whoever_comes_last_adds_the_parts_in_their_order(monkeypatch):
    """The same bytes when the programs run in the other order."""
    x, w, _ = operands(4, 192, 1024, torch.float32)
    forwards = run(x, w, None, Tile(shared=1))
    set_program, order = interpreter_builder.set_grid_idx, []

    def backwards(x, y, z):
        order.append(interpreter_builder.grid_dim[0] - 1 - x)
        set_program(order[-1], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    assert torch.equal(run(x, w, None, Tile(shared=1)), forwards)
    assert order == [3, 2, 1, 0]


@interpreted
def test_rows_may_be_strided():
    x, w, _ = operands(4, 64, 256, torch.float32)
    wide = torch.full((4, 512), float("nan"))
    wide[:, :256] = x
    assert torch.equal(run(wide[:, :256], w, None, Tile(2)), run(x, w, None, Tile(2)))


def test_without_a_gpu_torch_computes():
    x, w, b = operands(3, 32, 48, torch.float32)
    assert torch.equal(linear(x[None], w, b), torch.nn.functional.linear(x[None], w, b))
    assert torch.equal(gated(x, w), silu_mul(torch.nn.functional.linear(x, w)))


def test_every_measured_tile_is_of_a_shape_that_the_kernel_takes():
    for (columns, depth), buckets in TABLES.items():
        assert tuple(buckets) == skinny.BUCKETS
        assert depth % 8 == columns % 16 == 0
        for tile in filter(None, buckets.values()):
            blocks = -(-depth // (tile.split * skinny.BK))
            assert tile.held <= min(3, blocks)
            assert (tile.split - 1) * blocks * skinny.BK < depth, "no part is without columns"


@pytest.mark.parametrize("path", TABLE_FILES, ids=lambda path: path.name)
def test_a_shipped_table_says_where_it_comes_from_and_keeps_what_is_faster(path):
    table = json.loads(path.read_text())
    assert {"device", "date", "versions", "command", "what"} <= set(table)
    for entry in table["entries"]:
        assert len(entry["rows"]) == len(entry["us"]) == len(entry["torch_us"])
        assert (sum(entry["us"]) < sum(entry["torch_us"])) == (entry["tile"] is not None), entry
        if "branched" in entry:
            assert (sum(entry["branched_us"]) < sum(entry["in_turn_us"])) == (entry["branched"] is not None), entry


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "the file: JSONDecodeError"), ("{}", "the file: KeyError('entries')"),
        ('{"entries": [{"columns": 64, "depth": 64, "bucket": 7, "tile": null}]}', "entry 0: .*7 is not among"),
        ('{"entries": [{"columns": 64, "depth": 64, "bucket": 16, "tile": {"width": 1}}]}', "entry 0: .*width"),
    ],
    ids=["no JSON", "no table", "a bucket that is none", "an unknown field"],
)  # fmt: skip
def test_a_file_that_is_no_table_is_named(tmp_path, monkeypatch, text, says):
    monkeypatch.setattr(skinny, "FOLDER", tmp_path)
    (tmp_path / "a-gpu.json").write_text(text)
    with pytest.raises(LoraError, match=says.replace("(", r"\(").replace(")", r"\)")):
        skinny.tiles.__wrapped__("a-gpu")
    assert skinny.tiles.__wrapped__("another") == {}


def test_the_bench_writes_what_is_looked_up_and_keeps_other_shapes(tmp_path):
    def rows(columns, times, branches=""):
        return [dict(zip(skinny_bench.COLUMNS, (columns, 512, count, branches, *tile, us, "1.0", "1e-6"), strict=True))
                for count, tile, us in times]  # fmt: skip

    torchs, first, second, third = skinny_bench.TORCH, (2, 3, 1, 0, 0, 0), (1, 4, 0, 2, 0, 0), (2, 3, 0, 0, 4, 3)
    ours = rows(64, [(1, first, "1.0"), (1, second, "1.5"), (1, torchs, "2.0"),
                     (16, first, "3.0"), (16, second, "2.0"), (16, torchs, "2.5"), (32, first, "3.0"), (32, torchs, "2.0")])
    ours += rows(64, [(1, first, "4.0"), (16, second, "6.0"), (32, torchs, "3.0")], "in turn")
    ours += rows(64, [(1, third, "3.0"), (16, third, "6.0"), (32, third, "3.5")], "joined")
    origin = {"device": "a GPU", "date": "2026-01-01", "versions": "v", "command": "c"}
    path = tmp_path / "linears.json"
    skinny_bench.write(path, origin, skinny_bench.entries_of(ours))
    assert skinny.load(path) == {(64, 512): {16: Tile(*second), 32: None}}
    assert skinny.load(path, branched=True) == {(64, 512): {16: Tile(*third), 32: None}}
    again = rows(128, [(1, first, "1.0"), (1, torchs, "2.0")])
    skinny_bench.write(path, origin | {"date": "2026-02-02"}, skinny_bench.entries_of(again))
    assert skinny.load(path) == {(64, 512): {16: Tile(*second), 32: None}, (128, 512): {16: Tile(*first)}}
    assert skinny.load(path, branched=True)[128, 512] == {16: None}
    assert json.loads(path.read_text())["note"] == "2 of 3 entries are of 2026-01-01"


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


@interpreted
def test_the_bench_times_branches_behind_the_linear_and_in_it(monkeypatch):
    monkeypatch.setattr(skinny_bench, "COLD_BYTES", 1)
    monkeypatch.setattr(skinny_bench, "GATES", ())
    monkeypatch.setattr(skinny_bench, "WIDTHS", {(64, 512): (64,)})
    times = iter((3.0, 1.0, 5.0, 4.0, 2.0))
    branched = [Tile(2, 3, parts=2), Tile(1, 3, parts=4)]
    rows = skinny_bench.shape_rows(64, 512, 2, [Tile()], "cpu", torch.float32, lambda *_: next(times), branched)
    assert [(row["branches"], row["us"], row["parts"]) for row in rows] == [
        ("", "1.0", 0), ("", "3.0", ""), ("in turn", "5.0", 0), ("joined", "2.0", 4), ("joined", "4.0", 2)]  # fmt: skip
    assert all(float(row["error"]) < 1e-5 for row in rows)


def test_the_bench_tries_what_the_table_holds():
    for (columns, _), buckets in TABLES.items():
        assert set(filter(None, buckets.values())) <= set(skinny_bench.candidates(columns))
    for (columns, _), buckets in BRANCHED.items():
        assert set(filter(None, buckets.values())) <= set(skinny_bench.branched_candidates(columns))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What is launched: [(grid, arguments)], with a stand-in for the compiled kernel."""
    seen = []
    device = SimpleNamespace(index=0)
    compiled = SimpleNamespace(
        function=7, packed_metadata=(4, 1, 0), _init_handles=lambda: None,
        run=SimpleNamespace(launch_cooperative_grid=False, launch_pdl=True, launch=lambda *a: seen.append((a[:3], a[13:]))),
    )  # fmt: skip
    monkeypatch.setattr(launching.Launch, "compile", lambda launch: compiled)
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_LOADED", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    monkeypatch.setattr(skinny, "_PLANS", {})
    return SimpleNamespace(seen=seen, device=device)


def test_a_launch_passes_every_argument_of_the_kernel(on_a_gpu):
    x, w, b = operands(5, 4096, 512, torch.float16)
    run(x, w, b, Tile(4, 3, 3))
    ((grid, arguments),) = on_a_gpu.seen
    assert grid == (4, 64, 1)
    assert len(arguments) == len(skinny.few_rows.arg_names)
    named = dict(zip(skinny.few_rows.arg_names, arguments, strict=True))
    assert (named["rows"], named["columns"], named["TOKENS"], named["HELD"]) == (5, 4096, 16, 1)


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33, 64])
@pytest.mark.parametrize(("columns", "depth"), TABLES, ids=str)
def test_measured_shapes_on_the_gpu(columns, depth, rows):
    x, w, b = operands(rows, columns, depth, torch.bfloat16, bias=rows % 2, device="cuda")
    assert error(linear(x, w, b), x, w, b) < TOLERANCE[torch.bfloat16]
    for tile in filter(None, TABLES[columns, depth].values()):
        once = run(x, w, b, tile)
        assert error(once, x, w, b) < TOLERANCE[torch.bfloat16]
        assert all(torch.equal(run(x, w, b, tile), once) for _ in range(5))
    for shared in (1, 2, 3):
        once = run(x, w, b, Tile(1, 3, 0, shared))
        assert error(once, x, w, b) < TOLERANCE[torch.bfloat16]
        assert all(torch.equal(run(x, w, b, Tile(1, 3, 0, shared)), once) for _ in range(5))
    for tile in filter(None, (*TABLES[columns, depth].values(), Tile(1, 3, 0, 1))):
        once, apart = run(x, w, None, tile, gate=True), silu_mul(run(x, w, None, tile))
        assert torch.equal(once, apart) if not tile.shared else torch.allclose(once, apart, rtol=2e-2, atol=2e-2)


@cuda
@pytest.mark.gpu
def test_a_chain_that_overlaps_equals_one_that_does_not():
    """o, norm, gate_up with its SiLU, and down of a layer in one graph, bit for bit what each gives by itself."""
    from kernels.pointwise import add_rms_norm

    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((4096, 4096), (22016, 4096), (4096, 11008))
    weights = [torch.randn(s, generator=generator, device="cuda").bfloat16() * s[1] ** -0.5 for s in shapes]
    scale = torch.ones(4096, dtype=torch.bfloat16, device="cuda")

    def chain(x, residual, pause):
        for _ in range(8):
            x = linear(x, weights[0])
            pause()
            x = add_rms_norm(x, residual, scale, 1e-5)
            pause()
            x = gated(x, weights[1])
            pause()
            x = linear(x, weights[2])
            pause()
        return x

    for rows in (1, 16, 32, 64):
        x = torch.randn(rows, 4096, generator=generator, device="cuda").bfloat16()
        start = torch.randn(rows, 4096, generator=generator, device="cuda").bfloat16()
        apart = chain(x, start.clone(), torch.cuda.synchronize)
        residual, graph = start.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            together = chain(x, residual, lambda: None)
        for _ in range(4):
            residual.copy_(start)
            graph.replay()
            assert torch.equal(together, apart)

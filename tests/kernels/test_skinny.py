"""Linear layers of few rows against torch: every form of the kernel, and which calls go to it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import interpreter_builder

from kernels import launch as launching
from kernels import linear_tiles, skinny, skinny_bench
from kernels.batch import LoraError
from kernels.launch import EVEN
from kernels.linear_tiles import BUCKETS, Tile
from kernels.pointwise import silu_mul
from kernels.skinny import gated, linear, run

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
TABLE_FILES = sorted(linear_tiles.FOLDER.glob("*.json"))
TABLES = {shape: buckets for path in TABLE_FILES for shape, buckets in linear_tiles.load(path).items()}
BRANCHED = {shape: rows for path in TABLE_FILES for shape, rows in linear_tiles.load(path, branched=True).items()}
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
def test_a_gate_in_the_linear_is_as_one_behind_it(tile):
    for rows, half, depth in ((1, 32, 256), (7, 40, 384), (40, 96, 400)):
        x, w, _ = operands(rows, 2 * half, depth, torch.float16, bias=False)
        once, apart = run(x, w, None, tile, gate=True), silu_mul(run(x, w, None, tile))
        assert torch.allclose(once, apart, rtol=4e-3, atol=1e-3)  # a processor's own library may sum a wider tile otherwise


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
        assert tuple(buckets) == BUCKETS
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
        shares = [us / torch_us for us, torch_us in zip(entry["us"], entry["torch_us"], strict=True)]
        assert (sum(shares) < len(shares)) == (entry["tile"] is not None), entry
        assert all(took["us"] <= took["before_us"] for took in entry.get("step_us", {}).values()), entry
        assert entry.get("branched", {}).keys() == entry.get("step_us", {}).keys(), entry


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "the file: JSONDecodeError"), ("{}", "the file: KeyError('entries')"),
        ('{"entries": [{"columns": 64, "depth": 64, "bucket": 7, "tile": null}]}', "entry 0: .*7 is not among"),
        ('{"entries": [{"columns": 64, "depth": 64, "bucket": 16, "tile": {"width": 1}}]}', "entry 0: .*width"),
        ('{"entries": [{"columns": 64, "depth": 64, "bucket": 16, "branched": {"17": null}}]}', "entry 0: .*17.* bucket 16"),
        ('{"entries": [{"columns": 64, "depth": 64, "bucket": 16, "branched": {"few": null}}]}', "entry 0: .*few"),
        ('{"entries": [{"columns": 64, "depth": 64, "bucket": 16, "branched": [1]}]}', "entry 0: AttributeError"),
    ],
    ids=["no JSON", "no table", "a bucket that is none", "an unknown field", "rows of another bucket",
         "rows that are no number", "tiles of no rows"],
)  # fmt: skip
def test_a_file_that_is_no_table_is_named(tmp_path, monkeypatch, text, says):
    monkeypatch.setattr(linear_tiles, "FOLDER", tmp_path)
    (tmp_path / "a-gpu.json").write_text(text)
    with pytest.raises(LoraError, match=says.replace("(", r"\(").replace(")", r"\)")):
        linear_tiles.tiles.__wrapped__("a-gpu", branched="branched" in text)
    assert linear_tiles.tiles.__wrapped__("another") == {}


def test_rows_between_two_measured_numbers_take_the_tile_of_the_larger(monkeypatch):
    known = {1: Tile(1), 8: Tile(2), 32: None, 64: Tile(4)}
    monkeypatch.setattr(linear_tiles, "INTERPRETED", False)
    monkeypatch.setattr(linear_tiles, "device_name", lambda: "a-gpu")
    tables = {True: {(64, 512): known}, False: {(64, 512): {16: Tile(7)}}}
    monkeypatch.setattr(linear_tiles, "tiles", lambda device, branched: tables[branched])
    found = {rows: linear_tiles.measured_tile(rows, 64, 512, torch.bfloat16, branched=True) for rows in (1, 2, 8, 9, 17, 33)}
    assert found == {1: Tile(1), 2: Tile(2), 8: Tile(2), 9: Tile(7), 17: None, 33: Tile(4)}, "9: as without branches"
    assert linear_tiles.measured_tile(2, 64, 512, torch.bfloat16) == Tile(7)
    assert linear_tiles.measured_tile(2, 64, 640, torch.bfloat16, branched=True) is None
    assert linear_tiles.measured_tile(65, 64, 512, torch.bfloat16, branched=True) is None
    with pytest.raises(LoraError, match=r"65 rows: .* 1 to 64"):
        linear_tiles.bucket_of(65)


def test_the_bench_tries_what_the_table_holds():
    for (columns, _), buckets in TABLES.items():
        assert {replace(tile, residents=0) for tile in buckets.values() if tile} <= set(skinny_bench.candidates(columns))
        assert {tile.residents for tile in buckets.values() if tile} <= {0, EVEN}
    for (columns, _), numbers in BRANCHED.items():
        tried = skinny_bench.candidates(columns)
        assert all(replace(tile, residents=0) in tried for tile in numbers.values() if tile)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What is launched: [(grid, shared bytes, arguments)], with a stand-in for compiled kernels that need 60 KB each."""
    seen, need = [], 60 << 10
    compiled = SimpleNamespace(
        function=7, packed_metadata=(4, 1, need), _init_handles=lambda: None,
        run=SimpleNamespace(launch_cooperative_grid=False, launch_pdl=True,
                            launch=lambda *a: seen.append((a[:3], a[9][2], a[13:]))),
    )  # fmt: skip
    monkeypatch.setattr(launching.Launch, "compile", lambda launch: compiled)
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_LOADED", {})
    monkeypatch.setattr(launching, "_most_bytes", lambda: 227 << 10)
    monkeypatch.setattr(launching, "processors", lambda: 132)
    monkeypatch.setattr(skinny_bench, "INTERPRETED", False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    monkeypatch.setattr(skinny, "_PLANS", {})
    return SimpleNamespace(seen=seen, need=need)


def test_a_launch_passes_every_argument_of_the_kernel(on_a_gpu):
    x, w, b = operands(5, 4096, 512, torch.float16)
    run(x, w, b, Tile(4, 3, 3))
    ((grid, shared, arguments),) = on_a_gpu.seen
    assert (grid, shared) == ((4, 64, 1), on_a_gpu.need)
    assert len(arguments) == len(skinny.few_rows.arg_names)
    named = dict(zip(skinny.few_rows.arg_names, arguments, strict=True))
    assert (named["rows"], named["columns"], named["TOKENS"], named["HELD"]) == (5, 4096, 16, 1)


@pytest.mark.parametrize(
    ("tile", "fit"),
    [
        (Tile(), 3), (Tile(residents=1), 1), (Tile(residents=2), 2), (Tile(residents=3), 3), (Tile(residents=9), 3),
        (Tile(residents=EVEN), 1), (Tile(4, residents=EVEN), 2), (Tile(8, residents=EVEN), 3), (Tile(16, residents=EVEN), 3),
        (Tile(shared=2, residents=EVEN), 1),
    ],
    ids=["whatever fits", "one", "two", "three", "more than fit", "64 programs", "256 programs", "512 programs",
         "1,024 programs", "no more blocks than programs"],
)  # fmt: skip
def test_no_more_programs_fit_than_are_to_be_resident(on_a_gpu, tile, fit):
    x, w, _ = operands(1, 4096, 256, torch.float16, bias=False)
    run(x, w, None, tile)
    ((_, shared, _),) = on_a_gpu.seen
    assert on_a_gpu.need <= shared <= 227 << 10
    assert (228 << 10) // (shared + 1024) == fit


def test_tiles_that_differ_in_residents_share_a_kernel_and_no_counters(on_a_gpu):
    x, w, _ = operands(1, 4096, 512, torch.float16, bias=False)
    launches = [skinny.launch_of(4096, 512, 512, 16, Tile(2, residents=residents), x.dtype) for residents in (0, 1, EVEN)]
    assert len({launch.code for launch in launches}) == 1
    assert [launch.shared_bytes for launch in launches] == [0, 227 << 10, 227 << 10]
    for residents in (0, 1):
        run(x, w, None, Tile(2, residents=residents))
    first, second = (dict(zip(skinny.few_rows.arg_names, arguments, strict=True)) for _, _, arguments in on_a_gpu.seen)
    assert first["counters"] != second["counters"]


def test_the_bench_spreads_the_tiles_of_which_more_would_fit(on_a_gpu, monkeypatch):
    of_programs = {48: Tile(2), 96: Tile(4), 192: Tile(8), 384: Tile(16)}  # 60 KB: three fit a multiprocessor, 396 in all
    tiles = [*of_programs.values()]
    found = skinny_bench.spread(tiles, lambda tile: skinny.launch_of(1536, 4096, 4096, 16, tile, torch.float16))
    assert found == tiles + [replace(of_programs[programs], residents=EVEN) for programs in (48, 96, 192)]

    def refuse(launch):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(launching.Launch, "load", refuse)
    assert skinny_bench.spread(tiles, lambda tile: skinny.launch_of(1536, 4096, 4096, 16, tile, torch.float16)) == []


@interpreted
def test_a_bias_that_starts_anywhere_is_read_right():
    x, w, b = operands(3, 64, 256, torch.float32)
    odd = torch.cat([b[:1], b])[1:]
    assert odd.data_ptr() % 16
    assert torch.equal(run(x, w, odd, Tile(2)), run(x, w, b, Tile(2)))
    assert skinny.aligned_bias(x, odd).data_ptr() % 16 == 0
    assert skinny.aligned_bias(x, b) is b


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
    for tile in (Tile(2, 3, residents=residents) for residents in (EVEN, 1, 2)):
        assert torch.equal(run(x, w, b, tile), run(x, w, b, Tile(2, 3)))
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

"""Times linear layers of few rows against torch's, every tile, as a decode step pays for them.

A CUDA graph of calls over different weights (cold in L2), each behind the RMSNorm that makes its x; both are counted, and
behind gate and up their SiLU gate, which ours computes itself. Layers that adapters touch are also timed with the branches
of up to 16 adapters of rank 64: the linear and then the operator, and both in one launch. CSV to stdout, the fastest of a
(shape, rows) first; torch's row has no tile. --table writes what `kernels.skinny` and `kernels.joined` look up. It knows
shapes, no model's weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, fields
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
import triton
from torch.nn import functional

from kernels import joined
from kernels.atmm import atmm
from kernels.batch import LoraBatch, LoraPool, Projection
from kernels.measured import provenance
from kernels.pointwise import add_rms_norm, silu_mul
from kernels.precompile import in_parallel
from kernels.reference import reference
from kernels.skinny import Tile, bucket_of, launch_of, load, run
from kernels.tiles import write_table
from kernels.timing import COPY_TB_S

SHAPES = {
    "llava-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llava-13b": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    "qwen2-vl-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
"""(rows of W, K) of q, k, v together, o, gate and up together, down."""
WIDTHS = {
    (12288, 4096): (4096,) * 3, (4096, 4096): (4096,), (15360, 5120): (5120,) * 3, (5120, 5120): (5120,),
    (4608, 3584): (3584, 512, 512), (3584, 3584): (3584,),
}  # fmt: skip
"""Slices of the layers that adapters touch."""
ADAPTERS, RANK = 16, 64
GATES = tuple(shapes[2] for shapes in SHAPES.values())
EARLY = ((0, 0), (2, 0), (3, 0), (0, 2), (0, 4))
"""(held, fetched)."""
COLD_BYTES = 128 << 20
TILE_FIELDS = tuple(field.name for field in fields(Tile))
COLUMNS = ("columns", "depth", "rows", "branches", *TILE_FIELDS, "us", "floor_us", "error")
TORCH = ("",) * len(TILE_FIELDS)


def candidates(columns: int) -> list[Tile]:
    """Tiles worth a try: sums are cut where the programs would be few."""
    apart = [Tile(split, stages, held, 0, 0, fetched)
             for split, stages, (held, fetched) in product(_splits(columns), (3, 4, 6), EARLY)]  # fmt: skip
    return apart + [Tile(1, stages, 0, shared) for shared, stages in product((1, 2, 3), (3, 4, 6))]


def branched_candidates(columns: int) -> list[Tile]:
    """Tiles worth a try for a layer and its branches in one launch."""
    return [Tile(split, stages, held, 0, parts, fetched)
            for split, stages, parts, (held, fetched) in product(_splits(columns), (3, 4), (4, 8), ((0, 0), (3, 0), (0, 3)))]


def _splits(columns: int) -> tuple[int, ...]:
    return (1,) if columns > 16384 else (1, 2) if columns > 8192 else (2, 4)


def precompile(columns: int, depth: int, tokens: int, branched: bool, *tile: int) -> None:
    """Compile one tile into Triton's disk cache."""
    if branched:
        pool, batch = _adapters(columns, depth, tokens, torch.bfloat16, "cuda", layers=1)
        joined.launch_of(pool, batch, "p", depth, tokens, Tile(*tile)).compile()
    else:
        launch_of(columns, depth, depth, tokens, Tile(*tile), torch.bfloat16, gate=(columns, depth) in GATES).compile()


def _adapters(columns: int, depth: int, rows: int, dtype: torch.dtype, device: str, layers: int
              ) -> tuple[LoraPool, LoraBatch]:  # fmt: skip
    """A pool of random adapters over so many layers, and a step in which the rows ask for them in turn."""
    adapters = min(rows, ADAPTERS)
    pool = LoraPool({"p": Projection(depth, WIDTHS[columns, depth])}, layers=layers, slots=adapters, rows=adapters * RANK,
                    dtype=dtype, device=device)  # fmt: skip
    random = torch.Generator(device).manual_seed(1)
    pool.a["p"].normal_(0, depth**-0.5, generator=random)
    pool.b["p"].normal_(0, RANK**-0.5, generator=random)
    for slot in range(adapters):
        pool.reserve(slot, RANK)
    batch = LoraBatch(pool, rows)
    batch.fix(rows, adapters, RANK)
    batch.update((np.arange(rows) % adapters).astype(np.int32))
    return pool, batch


def graph_us(call: Callable[[int], object], calls: int, replays: int = 5) -> float:
    """Median microseconds of call(i) in a captured graph of i = 0 .. calls - 1."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    spans = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        spans.append(1e3 * start.elapsed_time(stop))
    return median(spans) / calls


def shape_rows(columns: int, depth: int, rows: int, tiles: list[Tile], device: str = "cuda", dtype=torch.bfloat16,
               time_us: Callable = graph_us, branched: Sequence[Tile] = ()) -> list[dict]:
    """Every tile and torch on one shape, the fastest first; then, with branches, the fastest and the operator, and every
    tile of `branched`."""
    random = torch.Generator(device).manual_seed(0)
    layers = max(2, -(-COLD_BYTES // (columns * depth * dtype.itemsize)))
    weights = torch.empty(layers, columns, depth, dtype=dtype, device=device).normal_(0, depth**-0.5, generator=random)
    residual = torch.empty(rows, depth, dtype=dtype, device=device).normal_(generator=random)
    ones = torch.ones(depth, dtype=dtype, device=device)
    calls = -(-16 // layers) * layers
    gate = (columns, depth) in GATES
    sizes, floor = (columns, depth, rows), weights[0].nbytes / COPY_TB_S / 1e6

    def made() -> torch.Tensor:
        return add_rms_norm(None, residual, ones, 1e-5)

    def plain(tile: Tile | None, i: int) -> torch.Tensor:
        if tile:
            return run(made(), weights[i % layers], None, tile, gate=gate)
        y = functional.linear(made(), weights[i % layers])
        return silu_mul(y) if gate else y

    def timed(calls_of: list[tuple], truth: torch.Tensor, branches: str, floor: float) -> list[dict]:
        found = []
        for tile, call in calls_of:
            try:
                error = float((call(0).float() - truth).norm() / truth.norm())
            except triton.runtime.errors.OutOfResources:
                continue
            found.append((time_us(call, calls), tile, f"{error:.1e}"))
        found.sort(key=lambda each: each[0])
        lines = [(*sizes, branches, *(astuple(tile) if tile else TORCH), f"{us:.1f}", f"{floor:.1f}", error)
                 for us, tile, error in found]  # fmt: skip
        return [dict(zip(COLUMNS, line, strict=True)) for line in lines]

    truth = functional.linear(made().float(), weights[0].float())
    plainly = [(tile, partial(plain, tile)) for tile in (None, *tiles)]
    measured = timed(plainly, silu_mul(truth) if gate else truth, "", floor)
    if not branched:
        return measured
    pool, batch = _adapters(columns, depth, rows, dtype, device, layers)
    fastest = tile_of(measured[0])

    def in_turn(i: int) -> torch.Tensor:
        x = made()
        y = run(x, weights[i % layers], None, fastest) if fastest else functional.linear(x, weights[i % layers])
        atmm(y, x, pool, batch, (i % layers, "p"))
        return y

    def together(tile: Tile, i: int) -> torch.Tensor:
        return joined.linear(made(), weights[i % layers], None, pool, batch, (i % layers, "p"), tile)

    truth = reference(truth, made(), pool, batch, (0, "p"))
    floor += (pool.a["p"][0].nbytes + pool.b["p"][0].nbytes) / COPY_TB_S / 1e6
    measured += timed([(fastest, in_turn)], truth, "in turn", floor)
    return measured + timed([(tile, partial(together, tile)) for tile in branched], truth, "joined", floor)


def tile_of(row: dict) -> Tile | None:
    """The tile of a measured row; None for torch."""
    values = tuple(row[name] for name in TILE_FIELDS)
    return None if values == TORCH else Tile(*values)


def entries_of(rows: list[dict]) -> list[dict]:
    """Table entries of one shape's measured rows: a bucket's tile has the least sum of times over its numbers of rows."""
    found = []
    for bucket in sorted({bucket_of(row["rows"]) for row in rows}):
        here = [row for row in rows if bucket_of(row["rows"]) == bucket]
        counts = sorted({row["rows"] for row in here})
        torch_us, tile, us = _least([row for row in here if row["branches"] == ""], [None])
        entry = {"columns": rows[0]["columns"], "depth": rows[0]["depth"], "bucket": bucket, "rows": counts, "us": us,
                 "torch_us": torch_us, "tile": asdict(tile) if sum(us) < sum(torch_us) else None}  # fmt: skip
        in_turn = [float(row["us"]) for row in sorted(here, key=lambda row: row["rows"]) if row["branches"] == "in turn"]
        if in_turn:
            _, tile, us = _least([row for row in here if row["branches"] == "joined"], [])
            entry |= {"branched_us": us, "in_turn_us": in_turn, "branched": asdict(tile) if sum(us) < sum(in_turn) else None}
        found.append(entry)
    return found


def _least(rows: list[dict], apart: list[None]) -> tuple[list[float], Tile, list[float]]:
    """(times of what is kept apart, the tile whose times over all numbers of rows have the least sum, those times)."""
    times: dict[Tile | None, dict[int, float]] = {}
    for row in rows:
        times.setdefault(tile_of(row), {})[row["rows"]] = float(row["us"])
    kept = [us for key in apart for _, us in sorted(times.pop(key).items())]
    most = max(len(each) for each in times.values())
    whole = {tile: [us for _, us in sorted(each.items())] for tile, each in times.items() if len(each) == most}
    best = min(whole, key=lambda tile: sum(whole[tile]))
    return kept, best, whole[best]


def write(path: Path, origin: dict, entries: list[dict]) -> None:
    """A table of the entries, and of those for other shapes and buckets that the file has. LoraError if it is no table."""
    fresh = {(entry["columns"], entry["depth"], entry["bucket"]) for entry in entries}
    kept = []
    if path.exists():
        load(path)
        old = json.loads(path.read_text())
        kept = [entry for entry in old["entries"] if (entry["columns"], entry["depth"], entry["bucket"]) not in fresh]
        if kept:
            origin = origin | {"note": f"{len(kept)} of {len(kept) + len(entries)} entries are of {old['date']}"}
    what = (
        "fastest tile of each linear and bucket of rows, null where torch's linear is as fast; us and torch_us: one call of "
        "so many rows in a CUDA graph, weights cold in L2, behind the small kernel that makes its x, both counted, for gate "
        "and up the SiLU gate too; branched: fastest tile of layer and branches, of min(rows, 16) adapters of rank 64, in "
        "one launch, null where the layer and then the operator is as fast (in_turn_us)"
    )
    write_table(path, origin | {"what": what}, kept + entries)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m kernels.skinny_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", choices=range(1, 65), default=[1, 8, 16, 32, 64], metavar="1..64")
    parser.add_argument("--table", type=Path, help="write the fastest tiles to this file, those of other shapes kept")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skinny_bench times a GPU and CUDA sees none here; run it on a machine that has one", file=sys.stderr)
        return 1
    shapes = list(dict.fromkeys(shape for model in args.models for shape in SHAPES[model]))
    buckets = sorted({bucket_of(rows) for rows in args.rows})
    in_parallel(precompile, [
        (*shape, tokens, branched, *astuple(tile))
        for shape in shapes for tokens in buckets for branched in (False, True)[: 1 + (shape in WIDTHS)]
        for tile in (branched_candidates if branched else candidates)(shape[0])
    ])  # fmt: skip
    origin = provenance(f"python -m kernels.skinny_bench {' '.join(arguments)}".rstrip())
    print("\n".join(f"# {key}: {value}" for key, value in origin.items()), ",".join(COLUMNS), sep="\n")
    entries = []
    for columns, depth in shapes:
        measured = []
        for rows in args.rows:
            branched = branched_candidates(columns) if (columns, depth) in WIDTHS else ()
            measured += shape_rows(columns, depth, rows, candidates(columns), branched=branched)
            print("\n".join(",".join(map(str, row.values())) for row in measured if row["rows"] == rows), flush=True)
        entries += entries_of(measured)
        if args.table:
            write(args.table, origin, entries)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

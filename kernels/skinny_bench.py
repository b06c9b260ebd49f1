"""Times linear layers of few rows against torch's, every tile, as a decode step pays for them.

A CUDA graph of calls over different weights (cold in L2), each behind the RMSNorm that makes its x; both are counted, and
behind gate and up their SiLU gate, which ours computes itself. CSV to stdout, the fastest of a (shape, rows) first; torch's
row has no tile. --table writes what `kernels.skinny` looks up. It knows shapes, no model's weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import astuple, fields
from itertools import product
from pathlib import Path
from statistics import median

import torch
import triton
from torch.nn import functional

from kernels.measured import provenance
from kernels.pointwise import add_rms_norm, silu_mul
from kernels.precompile import in_parallel
from kernels.skinny import Tile, bucket_of, launch_of, load, run
from kernels.tiles import write_table
from kernels.timing import COPY_TB_S

SHAPES = {
    "llava-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llava-13b": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    "qwen2-vl-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
"""(rows of W, K) of q, k, v together, o, gate and up together, down."""
GATES = tuple(shapes[2] for shapes in SHAPES.values())
COLD_BYTES = 128 << 20
TILE_FIELDS = tuple(field.name for field in fields(Tile))
COLUMNS = ("columns", "depth", "rows", *TILE_FIELDS, "us", "floor_us", "error")


def candidates(columns: int) -> list[Tile]:
    """Tiles worth a try: sums are cut where the programs would be few."""
    splits = (1,) if columns > 16384 else (1, 2) if columns > 8192 else (2, 4)
    apart = [Tile(split, stages, held) for split, stages, held in product(splits, (3, 4, 6), (0, 2, 3))]
    return apart + [Tile(1, stages, 0, shared) for shared, stages in product((1, 2, 3), (3, 4, 6))]


def precompile(columns: int, depth: int, tokens: int, *tile: int) -> None:
    """Compile one tile into Triton's disk cache."""
    launch_of(columns, depth, depth, tokens, Tile(*tile), torch.bfloat16, gate=(columns, depth) in GATES).compile()


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
               time_us: Callable = graph_us) -> list[dict]:
    """Every tile and torch on one shape, the fastest first."""
    random = torch.Generator(device).manual_seed(0)
    layers = max(2, -(-COLD_BYTES // (columns * depth * dtype.itemsize)))
    weights = torch.empty(layers, columns, depth, dtype=dtype, device=device).normal_(0, depth**-0.5, generator=random)
    residual = torch.empty(rows, depth, dtype=dtype, device=device).normal_(generator=random)
    ones = torch.ones(depth, dtype=dtype, device=device)
    calls = -(-16 // layers) * layers
    gate = (columns, depth) in GATES
    truth = functional.linear(add_rms_norm(None, residual, ones, 1e-5).float(), weights[0].float())
    truth = silu_mul(truth) if gate else truth
    found = []
    for tile in (None, *tiles):
        def one(i: int, tile: Tile | None = tile) -> torch.Tensor:
            x, w = add_rms_norm(None, residual, ones, 1e-5), weights[i % layers]
            if tile:
                return run(x, w, None, tile, gate=gate)
            return silu_mul(functional.linear(x, w)) if gate else functional.linear(x, w)

        try:
            error = float((one(0).float() - truth).norm() / truth.norm())
        except triton.runtime.errors.OutOfResources:
            continue
        floor = weights[0].nbytes / COPY_TB_S / 1e6
        sizes = (columns, depth, rows, *(astuple(tile) if tile else ("",) * len(TILE_FIELDS)))
        found.append((time_us(one, calls), (*sizes, f"{floor:.1f}", f"{error:.1e}")))
    found.sort(key=lambda row: row[0])
    return [dict(zip(COLUMNS, (*rest[:7], f"{us:.1f}", *rest[7:]), strict=True)) for us, rest in found]


def entries_of(rows: list[dict]) -> list[dict]:
    """Table entries of one shape's measured rows: a bucket's tile has the least sum of times over its numbers of rows."""
    found = []
    for bucket in sorted({bucket_of(row["rows"]) for row in rows}):
        times: dict[tuple, dict[int, float]] = {}
        for row in rows:
            if bucket_of(row["rows"]) == bucket:
                tile = tuple(row[name] for name in TILE_FIELDS)
                times.setdefault(tile, {})[row["rows"]] = float(row["us"])
        torch_us = times.pop(("",) * len(TILE_FIELDS))
        whole = {tile: us for tile, us in times.items() if us.keys() == torch_us.keys()}
        best = min(whole, key=lambda tile: sum(whole[tile].values()))
        faster = sum(whole[best].values()) < sum(torch_us.values())
        found.append({
            "columns": rows[0]["columns"], "depth": rows[0]["depth"], "bucket": bucket, "rows": sorted(torch_us),
            "us": [whole[best][count] for count in sorted(torch_us)],
            "torch_us": [torch_us[count] for count in sorted(torch_us)],
            "tile": dict(zip(TILE_FIELDS, best, strict=True)) if faster else None,
        })  # fmt: skip
    return found


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
        "and up the SiLU gate too"
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
    in_parallel(precompile, [
        (*shape, tokens, *astuple(tile))
        for shape in shapes for tokens in sorted({bucket_of(rows) for rows in args.rows}) for tile in candidates(shape[0])
    ])  # fmt: skip
    origin = provenance(f"python -m kernels.skinny_bench {' '.join(arguments)}".rstrip())
    print("\n".join(f"# {key}: {value}" for key, value in origin.items()), ",".join(COLUMNS), sep="\n")
    entries = []
    for columns, depth in shapes:
        measured = []
        for rows in args.rows:
            measured += shape_rows(columns, depth, rows, candidates(columns))
            print("\n".join(",".join(map(str, row.values())) for row in measured if row["rows"] == rows), flush=True)
        entries += entries_of(measured)
        if args.table:
            write(args.table, origin, entries)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

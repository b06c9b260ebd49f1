"""Times linear layers of few rows against torch's, every tile, as a decode step pays for them.

A CUDA graph of calls over different weights and factors (cold in L2), each behind the RMSNorm that makes its x; both are
counted, and behind gate and up their SiLU gate, which ours computes itself. A tile of which more programs fit on a
multiprocessor than an even spread needs is timed with and without that room. CSV to stdout, the fastest of a (shape, rows)
first; torch's row has no tile. --table writes what `kernels.linear_tiles` looks up. It knows shapes, no model's weights, and
no adapters (`engine.tile_bench`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, fields, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton
from torch.nn import functional

from kernels.launch import EVEN, Launch
from kernels.linear_tiles import FOLDER, Tile, bucket_of, load
from kernels.measured import provenance
from kernels.pointwise import add_rms_norm, silu_mul
from kernels.precompile import in_parallel
from kernels.skinny import launch_of, run
from kernels.target import INTERPRETED, device_name
from kernels.tiles import earlier_runs, write_table
from kernels.timing import COLD_BYTES, COPY_TB_S, captured, events_us

SHAPES = {
    "llava-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llava-13b": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    "qwen2-vl-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
"""(rows of W, K) of q, k, v together, o, gate and up together, down."""
GATES = tuple(shapes[2] for shapes in SHAPES.values())
PIPES = ((3, 0, 0), (3, 2, 0), (3, 3, 0), (3, 0, 2), (4, 0, 0), (4, 0, 2), (6, 0, 0), (6, 0, 2), (6, 0, 4))
"""(stages, held, fetched); others were never the fastest of LLaVA-7B's shapes on an H200."""
SHARED = ((1, 6), (2, 4), (3, 3))
"""(programs a multiprocessor, stages)."""
TILE_FIELDS = tuple(field.name for field in fields(Tile))
COLUMNS = ("columns", "depth", "rows", *TILE_FIELDS, "us", "floor_us", "error")
TORCH = ("",) * len(TILE_FIELDS)


def candidates(columns: int) -> list[Tile]:
    """Tiles worth a try: sums are cut where the programs would be few, blocks shared where they are many."""
    apart = [Tile(split, stages, held, fetched=fetched) for split in _splits(columns) for stages, held, fetched in PIPES]
    return apart + [Tile(1, stages, shared=shared) for shared, stages in SHARED if columns > 8192]


def _splits(columns: int) -> tuple[int, ...]:
    return (1,) if columns > 8192 else (2, 4)


def spread(tiles: Sequence[Tile], launch: Callable[[Tile], Launch]) -> list[Tile]:
    """The tiles, and each spread evenly where more of its programs would fit; without those that do not fit the device."""
    found = list(tiles)
    for tile in () if INTERPRETED else tiles:
        even = replace(tile, residents=EVEN)
        try:
            found += [even] if launch(even).thins() else []
        except triton.runtime.errors.OutOfResources:
            found.remove(tile)
    return found


def precompile(columns: int, depth: int, tokens: int, *tile: int) -> None:
    """Compile one tile into Triton's disk cache."""
    launch_of(columns, depth, depth, tokens, Tile(*tile), torch.bfloat16, gate=(columns, depth) in GATES).compile()


def graph_us(call: Callable[[int], object], calls: int, replays: int = 5) -> float:
    """Median microseconds of call(i) in a captured graph of i = 0 .. calls - 1."""
    return median(events_us(captured(call, calls).replay, replays)) / calls


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
    floor = weights[0].nbytes / COPY_TB_S / 1e6

    def made() -> torch.Tensor:
        return add_rms_norm(None, residual, ones, 1e-5)

    def call(tile: Tile | None, i: int) -> torch.Tensor:
        if tile:
            return run(made(), weights[i % layers], None, tile, gate=gate)
        y = functional.linear(made(), weights[i % layers])
        return silu_mul(y) if gate else y

    truth = functional.linear(made().float(), weights[0].float())
    truth = silu_mul(truth) if gate else truth
    known, found = (columns, depth, depth, bucket_of(rows)), []
    for tile in (None, *spread(tiles, lambda tile: launch_of(*known, tile, dtype, gate=gate))):
        try:
            error = float((call(tile, 0).float() - truth).norm() / truth.norm())
        except triton.runtime.errors.OutOfResources:
            continue
        found.append((time_us(partial(call, tile), calls), tile, f"{error:.1e}"))
    found.sort(key=lambda each: each[0])
    lines = [(columns, depth, rows, *(astuple(tile) if tile else TORCH), f"{us:.1f}", f"{floor:.1f}", error)
             for us, tile, error in found]  # fmt: skip
    return [dict(zip(COLUMNS, line, strict=True)) for line in lines]


def tile_of(row: dict) -> Tile | None:
    """The tile of a measured row; None for torch."""
    values = tuple(row[name] for name in TILE_FIELDS)
    return None if values == TORCH else Tile(*values)


def entries_of(rows: list[dict]) -> list[dict]:
    """Table entries of one shape's measured rows.

    A bucket's tile has the least sum, over its numbers of rows, of its times as shares of torch's, so that many rows count
    no more than few.
    """
    found = []
    for bucket in sorted({bucket_of(row["rows"]) for row in rows}):
        here = [row for row in rows if bucket_of(row["rows"]) == bucket]
        times = _times(here)
        torchs = times.pop(None)
        shares = {tile: [us / torchs[count] for count, us in each.items()] for tile, each in times.items()
                  if each.keys() == torchs.keys()}  # fmt: skip
        best = min(shares, key=lambda tile: sum(shares[tile]))
        found.append({
            "columns": here[0]["columns"], "depth": here[0]["depth"], "bucket": bucket, "rows": [*torchs],
            "us": [*times[best].values()], "torch_us": [*torchs.values()],
            "tile": asdict(best) if sum(shares[best]) < len(torchs) else None,
        })  # fmt: skip
    return found


def _times(rows: list[dict]) -> dict[Tile | None, dict[int, float]]:
    """Tile (None: torch's) -> number of rows, ascending -> microseconds."""
    found: dict[Tile | None, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["rows"]):
        found.setdefault(tile_of(row), {})[row["rows"]] = float(row["us"])
    return found


def write(path: Path, origin: dict, entries: list[dict]) -> None:
    """A table of the entries, and of those for other shapes and buckets that the file has. LoraError if it is no table."""
    fresh = {(entry["columns"], entry["depth"], entry["bucket"]) for entry in entries}
    kept, rest = [], {}
    if path.exists():
        load(path)
        old = json.loads(path.read_text())
        kept = [entry for entry in old["entries"] if (entry["columns"], entry["depth"], entry["bucket"]) not in fresh]
        rest = earlier_runs(old, origin) if kept else {}
    what = (
        "fastest tile of each linear and bucket of rows, null where torch's linear is as fast; us and torch_us: one call of "
        "so many rows in a CUDA graph, weights and factors cold in L2, behind the small kernel that makes its x, both "
        "counted, for gate and up the SiLU gate too"
    )
    write_table(path, origin | {"what": what} | rest, kept + entries)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m kernels.skinny_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", choices=range(1, 65), default=[1, 8, 16, 32, 64], metavar="1..64")
    parser.add_argument("--table", type=Path, nargs="?", const=FOLDER / f"{device_name()}.json", metavar="FILE",
                        help="write the fastest tiles to this file (default: the one that is looked up), those of other "
                        "shapes kept")  # fmt: skip
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skinny_bench times a GPU and CUDA sees none here; run it on a machine that has one", file=sys.stderr)
        return 1
    shapes = list(dict.fromkeys(shape for model in args.models for shape in SHAPES[model]))
    buckets = sorted({bucket_of(rows) for rows in args.rows})
    in_parallel(precompile, [(*shape, tokens, *astuple(tile))
                             for shape in shapes for tokens in buckets for tile in candidates(shape[0])])  # fmt: skip
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

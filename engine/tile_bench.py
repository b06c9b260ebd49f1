"""`python -m engine.tile_bench --table FILE`: chooses, inside the engine's decode steps, the tiles of linears with branches.

`kernels.skinny_bench` times each linear by itself, with cold weights. In a step the layers before it leave L2 and the
multiprocessors in another state, and its branches run beside it, for which a tile must leave room. So here every tile is
timed with its branches, and the fastest are put into the captured graph of a whole step, which is timed: each layer that
adapters touch in turn, the others as they stand, for every number of rows. It changes `branched` in the table and notes the
step's time; nothing else of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from engine.graphs import BRANCHED, PLAIN
from engine.models import random_model
from engine.step_bench import Bench, options
from kernels import atmm, skinny
from kernels.launch import EVEN, Launch
from kernels.linear_tiles import Tile, bucket_of, load, measured_tile, tiles
from kernels.measured import provenance
from kernels.precompile import compile_all
from kernels.skinny_bench import candidates
from kernels.target import device_name
from kernels.tiles import write_table
from kernels.timing import Point, World

WORTH = 6
"""Of the tiles of a linear so many are tried in steps: those that are fastest with their branches, by themselves."""
AGAIN = 4
"""A layer's best tile may change with the other's: so many of its fastest are tried once more."""
TOLD_APART = 0.998
"""A tile must make the step this much faster than the one before it to take its place."""

Shape = tuple[int, int]
Choice = dict[Shape, Tile | None]


def search(shapes: Sequence[Shape], candidates: Callable[[Shape], Sequence[Tile | None]], time_us: Callable[[Choice], float],
           start: Choice) -> tuple[Choice, float]:  # fmt: skip
    """The choice of a tile for each shape that `time_us` finds fastest, one shape at a time, from `start`; its time."""
    best, fastest = dict(start), time_us(start)
    found = {shape: {} for shape in shapes}
    for worth in (candidates, lambda shape: sorted(found[shape], key=found[shape].get)[:AGAIN]):
        for shape in shapes:
            for tile in worth(shape):
                found[shape][tile] = time_us(best | {shape: tile})
                if found[shape][tile] < fastest * TOLD_APART:
                    best, fastest = best | {shape: tile}, found[shape][tile]
    return best, fastest


class Steps:
    """Decode steps whose tiles can be exchanged."""

    def __init__(self, bench: Bench, repeats: int):
        self.bench, self.repeats = bench, repeats
        self.table = tiles(device_name(), branched=True)
        pool = bench.runner.lora.pool
        self.shapes = {(p.d_out, p.d_in): name for name, p in pool.projections.items()}

    def candidates(self, rows: int, shape: Shape) -> list[Tile | None]:
        """The fastest with their branches by themselves, of torch's linear and every tile that this device holds."""
        lora = self.bench.runner.lora
        projection = lora.pool.projections[self.shapes[shape]]
        world = World(Point("decode", projection.d_in, projection.widths, rows, min(rows, self.bench.adapters), lora.rank))
        took, stands = {}, self.table.setdefault(shape, {}).get(rows)
        for tile in self._fitting(rows, shape):
            self.table[shape][rows] = tile
            took[tile] = world.behind_us(atmm.atmm, atmm.linear, replays=3, calls=32)
        self.table[shape][rows] = stands
        return sorted(took, key=took.get)[:WORTH]

    def _fitting(self, rows: int, shape: Shape) -> list[Tile | None]:
        found: list[Tile | None] = [None]
        for tile in candidates(shape[0]):
            even = replace(tile, residents=EVEN)
            with suppress(OutOfResources):
                self._launch(rows, shape, tile).load()
                found += [tile, even] if self._launch(rows, shape, even).thins() else [tile]
        return found

    @staticmethod
    def _launch(rows: int, shape: Shape, tile: Tile) -> Launch:
        return skinny.launch_of(*shape, shape[1], bucket_of(rows), tile, torch.bfloat16, late=True)

    def compile(self, rows: Sequence[int]) -> None:
        """All candidates, on all cores."""
        compile_all([self._launch(count, shape, tile) for count in rows for shape in self.shapes
                     for tile in candidates(shape[0])])  # fmt: skip

    def time_us(self, rows: int, choice: Choice) -> float:
        """The branched step of `rows` requests with these tiles."""
        for shape, tile in choice.items():
            self.table.setdefault(shape, {})[rows] = tile
        graphs = self.bench.runner.graphs
        graphs.forget(BRANCHED, rows)
        graphs.capture((BRANCHED,), (rows,))
        return self.bench.decode_us(BRANCHED, rows, self.repeats)["graph_us"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m engine.tile_bench", description=__doc__.split("\n\n")[0])
    options(parser)
    parser.add_argument("--table", type=Path, required=True, help="what `kernels.skinny_bench --table` wrote, to be changed")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU; tiles are chosen by timing one")
    load(args.table)
    document = json.loads(args.table.read_text())
    bench = Bench(random_model(args.model, dtype=torch.bfloat16, device="cuda"), args)
    steps, graphs = Steps(bench, args.repeats), bench.runner.graphs
    graphs.buckets = sorted(args.batches)
    steps.compile(args.batches)
    graphs.capture((PLAIN,))
    command = "python -m engine.tile_bench " + " ".join(sys.argv[1:] if arguments is None else arguments)
    for rows in args.batches:
        base = bench.decode_us(PLAIN, rows, args.repeats)["graph_us"]
        start = {shape: measured_tile(rows, *shape, torch.bfloat16, branched=True) for shape in steps.shapes}
        before = steps.time_us(rows, start)
        best, took = search([*steps.shapes], lambda shape, rows=rows: steps.candidates(rows, shape),
                            lambda choice, rows=rows: steps.time_us(rows, choice), start)  # fmt: skip
        for shape, tile in best.items():
            steps.table[shape][rows] = tile
        print(f"{rows} rows: base {base:.0f} us, branches {before / base:.3f}x before, {took / base:.3f}x now: {best}",
              file=sys.stderr, flush=True)  # fmt: skip
        _note(document, rows, best, {"base_us": base, "before_us": before, "us": took})
        document["in_step"] = {**provenance(command), "what": "`branched` as chosen in whole decode steps; see `step_us`"}
        write_table(args.table, {k: v for k, v in document.items() if k != "entries"}, document["entries"])
    return 0


def _note(document: dict, rows: int, best: Choice, took: dict[str, float]) -> None:
    """Put a number of rows' tiles into the table's entries. KeyError for a shape that the table lacks."""
    for (columns, depth), tile in best.items():
        entry = next((e for e in document["entries"]
                      if (e["columns"], e["depth"], e["bucket"]) == (columns, depth, bucket_of(rows))), None)  # fmt: skip
        if entry is None:
            raise KeyError(f"the table has no entry for {columns} x {depth} in the bucket of {rows} rows; run skinny_bench")
        entry.setdefault("branched", {})[str(rows)] = tile and asdict(tile)
        entry.setdefault("step_us", {})[str(rows)] = took


if __name__ == "__main__":
    sys.exit(main())

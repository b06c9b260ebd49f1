"""`python -m engine.tile_bench`: chooses tiles inside the engine's decode steps.

`kernels.skinny_bench` times each linear by itself, and `kernels tune` the branches behind it. In a step the layers before
leave L2 and the multiprocessors in another state, the layers behind have weights to fetch early, and a tile of the linear
must leave room for the branch that runs beside it; what is best apart need not be so together. So here the best few of both
are put into the captured graph of a whole step, which is timed: tile and tiling of each layer that adapters touch in turn,
the others as they stand, for every number of rows. It changes `branched` in the one table, with the step's time, and the
entries of the steps' shapes in the other; nothing else of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch

from engine.graphs import BRANCHED, PLAIN
from engine.models import random_model
from engine.step_bench import Bench, options
from kernels import atmm, skinny
from kernels.batch import LoraError
from kernels.launch import Launch
from kernels.linear_tiles import FOLDER as LINEARS
from kernels.linear_tiles import Tile, bucket_of, load, measured_tile, tiles
from kernels.measured import provenance
from kernels.precompile import compile_all
from kernels.skinny_bench import candidates, spread
from kernels.target import device_name
from kernels.tiles import FOLDER as TILINGS
from kernels.tiles import Shape, Tiling, as_entry, entry_shape, lookup, neighbours, table, write_table
from kernels.tiles import load as load_tilings
from kernels.timing import Point, World

WORTH = 6
"""Of the tiles of a linear so many are tried in steps: those that are fastest with their branches, by themselves."""
NEAREST = 3
"""Of the tilings of each form so many are tried, those of the nearest shapes."""
AGAIN = 4
"""The best of one part may change with the others': so many of its fastest are tried once more."""
TOLD_APART = 0.998
"""A candidate must make the step this much faster than the one before it to take its place."""

Part = tuple[str, str]
"""(projection, "tile" of its linear or "tiling" of its branches)."""
Choice = dict[Part, Tile | Tiling | None]


def search(parts: Sequence[Part], candidates: Callable[[Part], Sequence], time_us: Callable[[Choice], float],
           start: Choice) -> tuple[Choice, float, float]:  # fmt: skip
    """The choice for every part that `time_us` finds fastest, one part at a time, from `start`; its time, and `start`'s."""
    before = min(time_us(start) for _ in range(2))  # a process's first step was seen a quarter slower than ever after
    best, fastest = dict(start), before
    found = {part: {} for part in parts}
    for worth in (candidates, lambda part: sorted(found[part], key=found[part].get)[:AGAIN]):
        for part in parts:
            for candidate in worth(part):
                found[part][candidate] = time_us(best | {part: candidate})
                if found[part][candidate] < fastest * TOLD_APART:
                    best, fastest = best | {part: candidate}, found[part][candidate]
    return best, fastest, before


class Steps:
    """Decode steps of `rows` requests whose tiles can be exchanged."""

    def __init__(self, bench: Bench, repeats: int, rows: int):
        self.bench, self.repeats, self.rows = bench, repeats, rows
        self.pool = bench.runner.lora.pool
        self.linears, self.tilings = tiles(device_name(), branched=True), table(device_name())
        self.parts: list[Part] = [(name, what) for name in self.pool.projections for what in ("tile", "tiling")]
        self.near = {name: neighbours(self.shape(name), NEAREST) for name in self.pool.projections}

    def shape(self, name: str) -> Shape:
        """What decides the tiling of a projection's branches in the step."""
        projection, lora = self.pool.projections[name], self.bench.runner.lora
        adapters = min(self.rows, self.bench.adapters)
        return Shape(projection.d_in, projection.widths, lora.rank, self.rows, adapters, ready=True).rounded()

    def sizes(self, name: str) -> tuple[int, int]:
        """(columns, depth) of a projection's linear."""
        projection = self.pool.projections[name]
        return projection.d_out, projection.d_in

    def start(self) -> Choice:
        """What the tables say."""
        found: Choice = {}
        for name in self.pool.projections:
            found[name, "tile"] = measured_tile(self.rows, *self.sizes(name), torch.bfloat16, branched=True)
            found[name, "tiling"] = lookup(self.shape(name))
        return found

    def candidates(self, part: Part) -> list:
        """Tilings: those of the nearest shapes. Tiles: the fastest with their branches, by themselves, of torch's linear and
        all that this device holds."""
        name, what = part
        if what == "tiling":
            return self.near[name]
        world, stands = self._world(name), self._known(name).get(self.rows)
        took = {}
        for tile in (None, *spread(candidates(self.sizes(name)[0]), partial(self._launch, name))):
            self._known(name)[self.rows] = tile
            took[tile] = world.behind_us(atmm.linear, replays=3, calls=32)
        self._known(name)[self.rows] = stands
        return sorted(took, key=took.get)[:WORTH]

    def alone_us(self, name: str, tiling: Tiling) -> float:
        """What the branches of a projection add to its linear, by themselves."""
        return self._world(name).behind_us(partial(atmm.linear, tiling=tiling))

    def _world(self, name: str) -> World:
        shape = self.shape(name)
        return World(Point("decode", shape.d_in, shape.widths, shape.tokens, shape.adapters, shape.rank))

    def _known(self, name: str) -> dict[int, Tile | None]:
        return self.linears.setdefault(self.sizes(name), {})

    def _launch(self, name: str, tile: Tile) -> Launch:
        columns, depth = self.sizes(name)
        return skinny.launch_of(columns, depth, depth, bucket_of(self.rows), tile, torch.bfloat16, late=True)

    def compile(self) -> None:
        """All candidates, on all cores."""
        launches = []
        for name, projection in self.pool.projections.items():
            launches += [self._launch(name, tile) for tile in candidates(projection.d_out)]
            known = {"mixture": False, "strides": (projection.d_in, projection.d_out)}
            for tiling in self.near[name]:
                fitted = atmm.fitting(tiling, projection.d_in, mixture=False)
                launches += atmm.resolve(self.shape(name), fitted, torch.bfloat16, **known)
        compile_all(launches)

    def take(self, choice: Choice) -> None:
        """Make the tables say so."""
        for (name, what), chosen in choice.items():
            if what == "tile":
                self._known(name)[self.rows] = chosen
            else:
                self.tilings[self.shape(name)] = chosen
        lookup.cache_clear()

    def time_us(self, choice: Choice) -> float:
        """The branched step with these."""
        self.take(choice)
        graphs = self.bench.runner.graphs
        graphs.forget(BRANCHED, self.rows)
        graphs.capture((BRANCHED,), (self.rows,))
        return self.bench.decode_us(BRANCHED, self.rows, self.repeats)["graph_us"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m engine.tile_bench", description=__doc__.split("\n\n")[0])
    options(parser)
    parser.add_argument("--linears", type=Path, help="table of `kernels.skinny_bench` to change (default: the device's)")
    parser.add_argument("--tilings", type=Path, help="table of `kernels tune` to change (default: the device's)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU; tiles are chosen by timing one")
    args.linears = args.linears or LINEARS / f"{device_name()}.json"
    args.tilings = args.tilings or TILINGS / f"{device_name()}.json"
    try:
        load(args.linears)
        load_tilings(args.tilings)
    except (OSError, LoraError) as error:
        parser.error(f"{error}; `python -m kernels.skinny_bench --table` and then `python -m kernels tune` make both tables")
    documents = {path: json.loads(path.read_text()) for path in (args.linears, args.tilings)}
    bench = Bench(random_model(args.model, dtype=torch.bfloat16, device="cuda"), args)
    sizes = [(projection.d_out, projection.d_in) for projection in bench.runner.lora.pool.projections.values()]
    try:
        for rows, each in product(args.batches, sizes):
            entry_of(documents[args.linears], rows, each)
    except LoraError as error:
        parser.error(f"{args.linears}: {error}")
    graphs = bench.runner.graphs
    graphs.buckets = sorted(args.batches)
    graphs.capture((PLAIN,))
    origin = provenance("python -m engine.tile_bench " + " ".join(sys.argv[1:] if arguments is None else arguments))
    for rows in args.batches:
        steps = Steps(bench, args.repeats, rows)
        steps.compile()
        base, start = bench.decode_us(PLAIN, rows, args.repeats)["graph_us"], steps.start()
        best, took, before = search(steps.parts, steps.candidates, steps.time_us, start)
        steps.take(best)
        print(f"{rows} rows: base {base:.0f} us, branches {before / base:.3f}x before, {took / base:.3f}x now: {best}",
              file=sys.stderr, flush=True)  # fmt: skip
        times = {"base_us": base, "before_us": before, "us": took}
        for name in steps.pool.projections:
            note_tile(documents[args.linears], rows, steps.sizes(name), best[name, "tile"], times)
            tiling = best[name, "tiling"]
            if tiling != start[name, "tiling"]:
                note_tiling(documents[args.tilings], as_entry(steps.shape(name), tiling, steps.alone_us(name, tiling)))
        note_run(documents[args.linears], origin, "`branched` as chosen in whole decode steps; see `step_us`")
        note_run(documents[args.tilings], origin, "entries `in_step` are as chosen in whole decode steps")
        for path, document in documents.items():
            write_table(path, {key: value for key, value in document.items() if key != "entries"}, document["entries"])
    return 0


def entry_of(document: dict, rows: int, sizes: tuple[int, int]) -> dict:
    """The entry of a table of linears for (columns, depth) and a number of rows. LoraError if it has none."""
    key = (*sizes, bucket_of(rows))
    entry = next((e for e in document["entries"] if (e["columns"], e["depth"], e["bucket"]) == key), None)
    if entry is None:
        raise LoraError(f"no entry for {sizes[0]} x {sizes[1]} in the bucket of {rows} rows; run skinny_bench --table")
    return entry


def note_run(document: dict, origin: dict, what: str) -> None:
    """Put this run behind the others whose choices the table holds."""
    others = [run for run in document.get("in_step", {}).get("runs", []) if run["command"] != origin["command"]]
    document["in_step"] = {"what": what, "runs": [*others, origin]}


def note_tile(document: dict, rows: int, sizes: tuple[int, int], tile: Tile | None, took: dict[str, float]) -> None:
    """Put the tile for (columns, depth) and a number of rows into the table's entry."""
    entry = entry_of(document, rows, sizes)
    entry.setdefault("branched", {})[str(rows)] = tile and asdict(tile)
    entry.setdefault("step_us", {})[str(rows)] = took


def note_tiling(document: dict, entry: dict) -> None:
    """Put an entry in the place of its shape's, or behind the others."""
    shape, entries = entry_shape(entry), document["entries"]
    place = next((i for i, known in enumerate(entries) if entry_shape(known) == shape), len(entries))
    entries[place : place + 1] = [entry | {"in_step": True}]


if __name__ == "__main__":
    sys.exit(main())

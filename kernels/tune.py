"""`python -m kernels tune`: searches tilings on this GPU and writes its table.

The search is staged: the shrink's tiles with a fixed expand, then the expand's with the best shrink, then the forms of
one launch; each candidate is timed whole, cold, in a CUDA graph. A run that is cut short goes on where it stopped. It
knows tilings and shapes, no kernel code.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from math import inf, prod
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from kernels.atmm import atmm, resolve
from kernels.batch import LoraBatch
from kernels.launch import Launch
from kernels.precompile import compile_all
from kernels.target import device_name
from kernels.tiles import FOLDER, FORMS, Shape, Tiling, as_entry, entry_shape, load
from kernels.timing import Point, World

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
ADAPTERS = (1, 4, 8, 16, 32)
COARSE = (8, 64, 512, 4096)
GROUP = 80
"""Shapes whose candidates are compiled together, on all cores, before they are timed."""
SQUARE = (4096, (4096,))
LAYERS = (  # LLaVA-1.5-7B's and Qwen2-VL-7B's other projections
    (4096, (4096, 4096, 4096)), (3584, (3584, 512, 512)), (3584, (3584,)), (4096, (11008, 11008)), (11008, (4096,)),
    (3584, (18944, 18944)), (18944, (3584,)),
)  # fmt: skip


def shapes() -> list[Shape]:
    """Every shape of the search, the most wanted first: the square projection finely, then the models' layers."""
    grid = [(*SQUARE, rank, t, n) for rank in (64, 16, 32, 128) for t in TOKENS for n in ADAPTERS]
    grid += [(*LAYERS[0], 64, t, n) for t in TOKENS for n in (1, 8, 32)]
    grid += [(*layer, rank, t, n) for rank in (64, 16) for layer in LAYERS for t in COARSE for n in (1, 8)]
    return [Shape(*row) for row in dict.fromkeys(grid) if row[-1] <= row[-2]]


def _row_tiles(shape: Shape) -> tuple[int, ...]:
    """Row-tile heights worth trying for this many rows an adapter."""
    per_adapter = shape.tokens / shape.adapters
    for bound, rows in ((16, (16,)), (48, (16, 32)), (128, (32, 64))):
        if per_adapter <= bound:
            return rows
    return (64, 128) if shape.rank <= 128 else (32, 64)


def shrinks(shape: Shape) -> Iterator[Tiling]:
    """Candidates for the shrink, with a middling expand. Few splits where v's planes would cost much."""
    most_split = max(2, min(32, 16384 // shape.tokens))
    for rows in _row_tiles(shape):
        span, n_block = (8, 128) if shape.tokens >= 1024 else (1, 256 if rows <= 32 and shape.rank < 128 else 128)
        tiles = LoraBatch.tile_bound(rows, shape.tokens, shape.adapters) * len(shape.widths)
        for k_block, split in product((64, 128, 256, 512, 1024), (1, 2, 4, 8, 16, 32)):
            steps = -(-shape.d_in // (k_block * split))
            once = steps == 1  # the program's part of A is fetched whole, before it waits for its predecessor
            narrow = shape.tokens * split < 32 and split < 4  # too few programs to pull the factors
            empty = (split - 1) * steps * k_block >= shape.d_in  # the last program would have nothing to do
            if split > most_split or narrow or empty or (not once and k_block in (64, 512, 1024)):
                continue
            for rank_block in {shape.rank, max(16, shape.rank // 2)}:
                fits = k_block * rank_block <= 32768 if once else 3 * k_block * (rank_block + rows) <= 98304
                spread = shape.rank // rank_block * tiles * split
                if fits and (rank_block == shape.rank or shape.rank >= 128 or spread <= 264):
                    warps = 8 if rank_block * k_block >= 32768 or rows == 128 else 4
                    yield Tiling("two", rows, k_block, split, warps, 3, rows, n_block, span, 4, 3, rank_block)


def expands(shape: Shape, best: Tiling) -> Iterator[Tiling]:
    """Candidates for the expand beside the best shrink."""
    few = ((64, 1, 2), (128, 1, 2), (256, 1, 2), (256, 2, 2))
    many = ((128, 1, 2), (256, 1, 2), (128, 2, 2), (256, 2, 2), (64, 8, 3), (64, 8, 4))
    many += ((128, 4, 3), (128, 8, 3), (128, 8, 4), (256, 4, 3))
    for rows in _row_tiles(shape):
        for n_block, span, stages in many if shape.tokens >= 512 else few:
            for warps in (4, 8) if max(rows, shape.rank) * n_block >= 8192 else (4,):
                if rows * n_block <= 16384:
                    tile = {"expand_rows": rows, "n_block": n_block, "span": span}
                    yield replace(best, **tile, expand_stages=stages, expand_warps=warps)


def ones(shape: Shape) -> Iterator[Tiling]:
    """Candidates for the one-launch form: only where row tiles alone fill the GPU, and v fits in registers."""
    if shape.tokens < 4096 or shape.rank * len(shape.widths) > 256:
        return
    for rows in (64, 128):
        for k_block, stages in ((64, 4), (128, 3)):
            for n_block, expand_stages in ((64, 4), (128, 3)):
                for span in (1, 2) if shape.tokens < 8192 else (1,):
                    yield Tiling("one", rows, k_block, 1, rows // 16, stages, rows, n_block, span, 4, expand_stages)


def barriers(shape: Shape) -> Iterator[Tiling]:
    """Candidates for the form of few rows: a program holds its part of A and of B whole."""
    for rows in _row_tiles(shape)[:1]:
        for split in (4, 8, 16, 32, 64):
            part = max(shape.d_in, *shape.widths) / split
            if shape.rank * part > 32768 or part < 32 or split * shape.adapters * len(shape.widths) > 528:
                continue
            for warps in (4, 8):
                if shape.rank * part / warps <= 4096:
                    yield Tiling("barrier", rows, split=split, warps=warps)


class Search:
    """Times tilings of one shape and remembers the best; `known` is the one to beat, if any."""

    def __init__(self, shape: Shape, forms: tuple[str, ...] = FORMS, known: Tiling | None = None):
        self.shape, self.forms, self.known = shape, forms, known
        self.timed: dict[Tiling, float] = {}

    @property
    def best(self) -> Tiling:
        return min(self.timed, key=self.timed.get)

    def first(self) -> list[Tiling]:
        """What does not depend on what was found."""
        every = (*shrinks(self.shape), *ones(self.shape), *barriers(self.shape))
        known = [self.known] if self.known else []
        return known + [tiling for tiling in every if tiling.form in self.forms]

    def second(self) -> list[Tiling]:
        """The expand's candidates beside the best shrink."""
        two = {tiling: us for tiling, us in self.timed.items() if tiling.form == "two" and "two" in self.forms}
        return list(expands(self.shape, min(two, key=two.get))) if two else []

    def launches(self, candidates: list[Tiling]) -> list[Launch]:
        """Every kernel that timing the candidates needs."""
        strides = (self.shape.d_in, sum(self.shape.widths))
        resolved = (resolve(self.shape, t, torch.bfloat16, mixture=False, strides=strides) for t in candidates)
        return [launch for launches in resolved for launch in launches]

    def time(self, candidates: list[Tiling]) -> World:
        """Time what is new among the candidates, with equal and with uneven shares; the world of equal ones."""
        shape = self.shape
        point = Point("tune", shape.d_in, shape.widths, shape.tokens, shape.adapters, shape.rank)
        worlds = [World(point)]
        if 1 < shape.adapters < shape.tokens:  # equal shares can fill row tiles and processors by luck
            worlds.append(World(replace(point, skew="skew60")))
        for tiling in candidates:
            if tiling not in self.timed:
                op = partial(atmm, tiling=tiling)
                try:
                    self.timed[tiling] = prod(world.graph_us(op, replays=3, target_us=400) for world in worlds)
                except OutOfResources:  # shared memory, or programs that wait for one another and do not all fit
                    self.timed[tiling] = inf
        return worlds[0]

    def finish(self) -> dict:
        """The table's entry: the fastest tiling that passes the check against float32, measured again."""
        world = self.time(self.second())
        while not (error := world.error(partial(atmm, tiling=self.best))) < 1e-2:  # NaN is wrong too
            print(f"wrong: {self.shape} {self.best}: error {error:.1e}", file=sys.stderr)
            self.timed[self.best] = inf
        return as_entry(self.shape, self.best, world.graph_us(partial(atmm, tiling=self.best)))


def tune(
    path: Path | None = None, *, budget_s: float = 540.0, forms: tuple[str, ...] = FORMS, again: Callable | None = None
) -> Path:
    """Search all shapes within about budget_s and write the device's table; what the file has is kept.

    again: of a Shape, whether to search these forms for it although the file has it; the faster tiling stays.
    Raises LoraError if the file that is there is no table.
    """
    path = path or FOLDER / f"{device_name()}.json"
    known = load(path) if path.exists() else {}
    kept = json.loads(path.read_text())["entries"] if known else []
    entries = {entry_shape(entry): entry for entry in kept}
    wanted = [shape for shape in shapes() if shape not in known or (again and again(shape))]
    searches = [Search(shape, forms, known.get(shape)) for shape in wanted]
    print(f"{len(searches)} shapes to tune, {len(known)} known", file=sys.stderr)
    start = time.monotonic()
    for i in range(0, len(searches), GROUP):
        group = searches[i : i + GROUP]
        compile_all([launch for s in group for launch in s.launches(s.first())])
        for search in group:
            search.time(search.first())
        compile_all([launch for s in group for launch in s.launches(s.second())])
        entries |= {search.shape: search.finish() for search in group}
        _write(path, list(entries.values()))
        spent = time.monotonic() - start
        print(f"{spent:4.0f} s: {i + len(group)} of {len(searches)} shapes", file=sys.stderr)
        if spent > budget_s:
            print("out of time; run `python -m kernels tune` again to go on", file=sys.stderr)
            break
    return path


def _write(path: Path, entries: list[dict]) -> None:
    """The table with its provenance, whole or not at all."""
    header = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "command": "python -m kernels tune",
        "what": "fastest tiling per shape, by the product of its times with equal shares and with 60 % on one adapter; "
        "us: one call, equal shares, CUDA-graph replay, weights cold in L2",
    }
    rows = ",\n".join(json.dumps(entry) for entry in entries)
    text = json.dumps(header, indent=1)[:-2] + f',\n "entries": [\n{rows}\n ]\n}}\n'
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

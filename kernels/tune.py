"""`python -m kernels tune`: searches tilings on this GPU and writes its table.

The search is staged: the shrink's tiles with a fixed expand, then the expand's with the best shrink, then the next
shrinks with that expand, and deeper loops; each candidate is timed whole, cold, in a CUDA graph; those of short calls as
they occur, behind a linear. A run that is cut short goes on where it stopped. It knows tilings and shapes, no kernel code.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil, inf, prod
from pathlib import Path

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from kernels.atmm import atmm, behind, linear, resolve
from kernels.batch import LONG, LoraBatch
from kernels.launch import Launch
from kernels.measured import provenance
from kernels.precompile import compile_all
from kernels.target import device_name, processors
from kernels.tiles import FOLDER, FORMS, Shape, Tiling, as_entry, earlier_runs, entry_shape, load, neighbours, write_table
from kernels.timing import NOISE_US, Point, World, in_turn

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ADAPTERS = (1, 4, 8, 16, 32)
FEWER_TOKENS, FEWER_ADAPTERS = (1, 8, 32, 64, 128, 256, 512, 1024, 4096, 16384), (1, 8, 32)
SOME, COARSE = (8, 32, 64, 256, 1024, 4096), (8, 64, 512, 4096)
FAR = 1.2
"""A candidate that is slower than the best by more than this factor is timed no further."""
EXPAND = ("expand_rows", "n_block", "span", "expand_warps", "expand_stages")
"""What a tiling of two launches says of its second."""
ONCE_MORE, DEEPENED = 4, 2
"""So many shrinks are timed again with the best expand, so many of them and the best with more stages."""
SHARED_NUMBERS = 108_000
"""16-bit numbers that a program's shared memory holds."""
NEAREST = 2
"""Of each form so many tilings of the nearest shapes are tried."""
COLD = 80 << 20
"""Bytes of factors that calls rotate over: more than L2 holds."""
GROUP = 45
"""Shapes whose candidates are compiled together, on all cores, before they are timed."""
SQUARE = (4096, (4096,))
LAYERS = (  # LLaVA-1.5-7B's and Qwen2-VL-7B's other projections
    (4096, (4096, 4096, 4096)), (3584, (3584, 512, 512)), (3584, (3584,)), (4096, (11008, 11008)), (11008, (4096,)),
    (3584, (18944, 18944)), (18944, (3584,)),
)  # fmt: skip


def shapes() -> list[Shape]:
    """Every shape of the search, the most wanted first: the square projection finely, then the models' layers.

    LONG steps of several adapters come twice, with equal and with unequal shares; so do those of few rows, as they run
    behind a linear that lets them begin early, and as they run elsewhere.
    """
    grid = [(*SQUARE, 64, t, n) for t in TOKENS for n in ADAPTERS]
    grid += [(*SQUARE, 128, t, n) for t in FEWER_TOKENS for n in FEWER_ADAPTERS]
    grid += [(*LAYERS[0], 64, t, n) for t in TOKENS for n in FEWER_ADAPTERS]
    grid += [(*LAYERS[0], rank, t, n) for rank in (16, 128) for t in SOME for n in FEWER_ADAPTERS]
    grid += [(*SQUARE, rank, t, n) for rank in (16, 32) for t in FEWER_TOKENS for n in FEWER_ADAPTERS]
    grid += [(*SQUARE, rank, t, 4) for rank in (16, 32, 128) for t in FEWER_TOKENS]
    grid += [(*layer, 64, t, n) for layer in LAYERS for t in COARSE for n in (1, 8)]
    shares = [(*row, uneven) for row in dict.fromkeys(grid) if row[-1] <= row[-2]
              for uneven in ((False, True) if row[-2] >= LONG and row[-1] > 1 else (False,))]  # fmt: skip
    apart = [Shape(*row) for row in shares]
    return [*dict.fromkeys([*(behind(shape, torch.bfloat16) for shape in apart), *apart])]


def _point(shape: Shape) -> Point:
    """Where a shape is timed first."""
    skew = "skew60" if shape.uneven else "uniform"
    return Point("tune", shape.d_in, shape.widths, shape.tokens, shape.adapters, shape.rank, skew)


def _either(shape: Shape) -> bool:
    """Whether one entry stands for steps of equal and of unequal shares, as where few rows have several adapters."""
    return 1 < shape.adapters < shape.tokens < LONG


def _row_tiles(shape: Shape) -> tuple[int, ...]:
    """Row-tile heights worth trying: for this many rows an adapter, lower ones where most adapters have fewer, and a higher
    one where one adapter may have most of a short step's rows."""
    per_adapter = shape.tokens / shape.adapters
    wide = (32, 64, 128) if shape.uneven or shape.tokens < LONG else (64, 128)
    heights = next((rows for bound, rows in ((16, (16,)), (48, (16, 32)), (128, (32, 64))) if per_adapter <= bound), wide)
    if _either(shape):
        heights = (*heights, 2 * heights[-1])
    return tuple(rows for rows in heights if rows <= (128 if shape.rank <= 128 else 64))


def shrinks(shape: Shape) -> Iterator[Tiling]:
    """Candidates for the shrink, with a middling expand: few splits where v's planes would cost much, and as many
    programs as pull the factors without queueing. Where shares may be unequal, a few row tiles more than the processors
    hold would make a second wave: then five to seven parts may do where eight do not."""
    most_split = max(2, min(32, 16384 // shape.tokens))
    splits = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32) if shape.uneven or _either(shape) else (1, 2, 3, 4, 8, 16, 32)
    for rows in _row_tiles(shape):
        span, n_block = (8, 128) if shape.tokens >= 1024 else (1, 256 if rows <= 32 and shape.rank < 128 else 128)
        tiles = LoraBatch.tile_bound(rows, shape.tokens, shape.adapters) * len(shape.widths)
        k_blocks = (64, 128, 256) if shape.tokens >= LONG and rows >= 64 else (128, 256, 512)
        for k_block, split in product(k_blocks, splits):
            stages = 3 if k_block > 64 else 4
            steps = -(-shape.d_in // (k_block * split))
            once = steps == 1  # the program's part of A is fetched whole, before it waits for its predecessor
            empty = (split - 1) * steps * k_block >= shape.d_in  # the last program would have nothing to do
            if split > most_split or empty or (not once and k_block == 512):
                continue
            for rank_block in {max(16, shape.rank // parts) for parts in ((1, 2, 4) if shape.tokens < LONG else (1, 2))}:
                programs = shape.rank // rank_block * tiles * split
                fits = k_block * rank_block <= 32768 if once else stages * k_block * (rank_block + rows) <= 98304
                fair = min(16 * shape.adapters, 96) <= programs <= 800 or (rank_block == shape.rank and split == 1)
                if fits and fair:
                    warps = 8 if rank_block * k_block >= 32768 or rows == 128 else 4
                    yield Tiling("two", rows, k_block, split, warps, stages, rows, n_block, span, 4, 3, rank_block)


def unders(shape: Shape) -> Iterator[Tiling]:
    """Candidates for one launch of few rows, whose shrink the linear before covers: few parts, for the sum of them is not
    covered."""
    if shape.tokens >= LONG:
        return
    splits = (1, 2, 3, 4, 5, 6, 8, 16) if _either(shape) else (1, 2, 4, 8, 16)
    for rows in _row_tiles(shape):
        tiles = LoraBatch.tile_bound(rows, shape.tokens, shape.adapters) * len(shape.widths)
        n_block = 128 if shape.rank <= 64 else 64
        for k_block, split in product((128, 256, 512), splits):
            steps = -(-shape.d_in // (k_block * split))
            once, empty = steps == 1, (split - 1) * steps * k_block >= shape.d_in
            for rank_block in {max(16, shape.rank // parts) for parts in (1, 2, 4)}:
                programs = shape.rank // rank_block * tiles * split
                fits = k_block * rank_block <= 16384 if once else 3 * k_block * (rank_block + rows) <= 49152
                if fits and not empty and min(8 * shape.adapters, 64) <= programs <= 600:
                    yield Tiling("under", rows, k_block, split, 4, 3, rows, n_block, 1, 4, 3, rank_block)


def under_expands(shape: Shape, best: Tiling) -> Iterator[Tiling]:
    """Candidates for the other half beside the best of `unders`."""
    for n_block, warps in ((32, 4), (64, 4), (128, 4), (128, 8), (256, 8)):
        if n_block * shape.rank <= 16384:
            yield replace(best, n_block=n_block, warps=warps, expand_warps=warps)


def _whole_waves(shape: Shape, rows: int, n_block: int) -> Iterator[int]:
    """Spans at which the expand of unequal shares is one, two or three waves, at two programs a processor.

    A few row tiles more than equal shares have are otherwise often a wave more: 268 programs on 264 places take as long
    as 528 would.
    """
    if not shape.uneven:
        return
    counts = np.bincount(_point(shape).index())
    tiles = int((-(-counts // rows)).sum())
    for waves in (1, 2, 3):
        for span in range(1, ceil(max(shape.widths) / n_block) + 1):
            if tiles * sum(ceil(width / (n_block * span)) for width in shape.widths) <= 2 * waves * processors():
                yield span
                break


def expands(shape: Shape, best: Tiling) -> Iterator[Tiling]:
    """Candidates for the expand beside the best shrink; of unequal shares also in whole waves."""
    few = ((64, 1, 2), (128, 1, 2), (256, 1, 2), (256, 2, 2))
    many = ((128, 1, 2), (256, 1, 2), (128, 2, 2), (256, 2, 2), (64, 8, 3), (128, 4, 3), (128, 8, 3), (256, 4, 3))
    for rows in _row_tiles(shape):
        whole = [(n_block, span, 3) for n_block in (64, 128) for span in _whole_waves(shape, rows, n_block)]
        for n_block, span, stages in dict.fromkeys((*many, *whole)) if shape.tokens >= 512 else few:
            for warps in (4, 8) if max(rows, shape.rank) * n_block >= 8192 else (4,):
                if rows * n_block <= 16384:
                    tile = {"expand_rows": rows, "n_block": n_block, "span": span}
                    yield replace(best, **tile, expand_stages=stages, expand_warps=warps)


def streams(shape: Shape) -> Iterator[Tiling]:
    """Candidates for the shared shrink, with a middling expand, where shares are unequal."""
    if not shape.uneven:
        return
    for rows in _row_tiles(shape):
        for k_block, stages in ((64, 4), (128, 3)):
            for split in (1, 2, 4):
                if 3 * k_block * (shape.rank + rows) <= 98304 and split * shape.tokens <= 16384:
                    for residents in (2, 3) if rows + shape.rank <= 128 else (1, 2):
                        warps = 8 if rows * shape.rank > 4096 else 4
                        yield Tiling("stream", rows, k_block, split, warps, stages, rows, 128, 2, 4, 3,
                                     residents=residents, expand_residents=2)  # fmt: skip


def stream_expands(shape: Shape, best: Tiling) -> Iterator[Tiling]:
    """Candidates for the shared expand beside the best shared shrink."""
    for n_block, stages in ((64, 3), (128, 2), (128, 3), (256, 2)):
        warps = 8 if best.rows * n_block > 8192 else 4
        for residents, span in ((2, 2), (3, 1), (4, 1), (6, 1), (4, 4)):
            if best.rows * n_block <= 16384:
                tile = {"n_block": n_block, "expand_stages": stages, "span": span, "expand_residents": residents}
                yield replace(best, **tile, expand_warps=warps)


def deeper(shape: Shape, tiling: Tiling) -> list[Tiling]:
    """The same with more loads under way in the loop of the shrink, or of the expand: they wait for memory where a step has
    few programs."""
    rank_block, steps = min(tiling.rank_block, shape.rank), -(-shape.d_in // (tiling.k_block * tiling.split))
    shrink = _more_stages(tiling.stages, steps, tiling.k_block * (rank_block + tiling.rows))
    expand = _more_stages(tiling.expand_stages, tiling.span, tiling.n_block * (shape.rank + tiling.expand_rows))
    return [replace(tiling, stages=n) for n in shrink] + [replace(tiling, expand_stages=n) for n in expand]


def _more_stages(stages: int, steps: int, block: int) -> list[int]:
    """As many stages as a loop has steps and memory for (Triton keeps a block less than stages), and half way there."""
    most = 1 + min(steps, SHARED_NUMBERS // block, 8)
    return [more for more in sorted({most, (stages + most + 1) // 2}) if more > stages]


def ones(shape: Shape) -> Iterator[Tiling]:
    """Candidates for the one-launch form: only where row tiles alone fill the GPU, and v fits in registers."""
    if shape.tokens < 8192 or shape.rank * len(shape.widths) > 256:
        return
    for rows, k_block, n_block in product((64, 128), (64, 128), (64, 128)):
        stages, expand_stages = (4 if block == 64 else 3 for block in (k_block, n_block))
        yield Tiling("one", rows, k_block, 1, rows // 16, stages, rows, n_block, 1, 4, expand_stages)


class Search:
    """Times tilings of one shape and remembers the best; `known` are those to beat, if any."""

    def __init__(self, shape: Shape, forms: tuple[str, ...] = FORMS, known: Sequence[Tiling] = ()):
        self.shape, self.forms, self.known = shape, forms, known
        self.timed: dict[Tiling, float] = {}
        self.far: dict[Tiling, float] = {}
        self.least = inf

    @property
    def best(self) -> Tiling:
        return min(self.timed, key=self.timed.get)

    def first(self) -> list[Tiling]:
        """What does not depend on what was found."""
        every = (*shrinks(self.shape), *unders(self.shape), *ones(self.shape), *streams(self.shape))
        return [*dict.fromkeys([*self.known, *(tiling for tiling in every if tiling.form in self.forms)])]

    def second(self) -> list[Tiling]:
        """The expand's candidates beside the best shrinks."""
        found = []
        for form, candidates in (("two", expands), ("under", under_expands), ("stream", stream_expands)):
            timed = {tiling: us for tiling, us in self.timed.items() if tiling.form == form and form in self.forms}
            if timed:  # if all are far behind another form: with the middling expand they may be
                found += candidates(self.shape, min(timed, key=lambda tiling: (timed[tiling], self.far.get(tiling, inf))))
        return found

    def third(self) -> list[Tiling]:
        """The best few shrinks with the expand that was the best beside one of them, where those are two launches, and the
        very best of these with deeper loops."""
        best = self.best
        if best.form != "two" or "two" not in self.forms:
            return []
        expand = {name: getattr(best, name) for name in EXPAND}
        apart = {replace(tiling, **expand): us for tiling, us in self.timed.items() if tiling.form == "two" and us < inf}
        fair = [best, *(tiling for tiling in sorted(apart, key=apart.get) if tiling not in self.timed)][: 1 + ONCE_MORE]
        return [*fair[1:], *(deep for tiling in fair[: 1 + DEEPENED] for deep in deeper(self.shape, tiling))]

    def launches(self, candidates: list[Tiling]) -> list[Launch]:
        """Every kernel that timing the candidates needs."""
        strides = self.shape.d_in, sum(self.shape.widths)
        known = {"dtype": torch.bfloat16, "mixture": False, "strides": strides}
        return [launch for tiling in candidates for launch in resolve(self.shape, tiling, **known)]

    def time(self, candidates: list[Tiling]) -> None:
        """Time what is new among the candidates."""
        new = [tiling for tiling in dict.fromkeys(candidates) if tiling not in self.timed]
        if not new:
            return
        point = _point(self.shape)
        worlds = [World(point, cold_bytes=COLD)]
        if _either(self.shape):  # equal shares can fill row tiles and processors by luck
            worlds.append(World(replace(point, skew="skew60"), cold_bytes=COLD))
        for tiling in new:
            self.timed[tiling] = self._product(worlds, tiling)

    def _product(self, worlds: list[World], tiling: Tiling) -> float:
        """Product of the times in all worlds; infinite if it does not fit, or is far behind the best in the first."""
        try:
            first = self._us(worlds[0], tiling)
            self.least = min(first, self.least)
            if first >= FAR * self.least:
                self.far[tiling] = first
                return inf
            return first * prod(self._us(world, tiling) for world in worlds[1:])
        except OutOfResources:
            return inf

    def _us(self, world: World, tiling: Tiling) -> float:
        """Behind a linear where calls are short; back to back where a launch is no part of the matter."""
        if self.shape.tokens < LONG:
            ready = self.shape.ready
            call = partial(linear, tiling=tiling) if ready else in_turn(partial(atmm, tiling=tiling), world.linear)
            return max(NOISE_US, world.behind_us(call, replays=3, calls=32))
        return world.graph_us(partial(atmm, tiling=tiling), replays=3, target_us=400)

    def finish(self) -> dict:
        """The table's entry: the fastest tiling that passes the check against float32, measured again."""
        world = World(_point(self.shape), cold_bytes=COLD)
        while not (error := world.error(partial(self._alone, self.best))) < 1e-2:  # NaN is wrong too
            print(f"wrong: {self.shape} {self.best}: error {error:.1e}", file=sys.stderr)
            self.timed[self.best] = inf
        return as_entry(self.shape, self.best, self._us(world, self.best))

    def _alone(self, tiling: Tiling, y: torch.Tensor, x: torch.Tensor, *where) -> None:
        """The operator as `_us` runs it: with a linear, here of zeros, where that lets it begin early."""
        if self.shape.ready:
            weight = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
            y += linear(x, weight, None, *where, tiling=tiling)
        else:
            atmm(y, x, *where, tiling=tiling)


def tune(
    path: Path | None = None, *, budget_s: float = 540.0, forms: tuple[str, ...] = FORMS, again: Callable | None = None
) -> Path:
    """Search all shapes within about budget_s and write the device's table; what the file has is kept.

    again: of a Shape, whether to search these forms for it although the file has it; the faster tiling stays, and what was
    chosen in whole steps (`engine.tile_bench`) in any case. What the device's table has for the nearest shapes is tried too.
    Raises LoraError if the file that is there is no table.
    """
    path = path or FOLDER / f"{device_name()}.json"
    known = load(path) if path.exists() else {}
    old = json.loads(path.read_text()) if known else {"entries": []}
    entries = {entry_shape(entry): entry for entry in old["entries"]}
    stands = {shape for shape, entry in entries.items() if entry.get("in_step")}
    wanted = [shape for shape in shapes() if shape not in known or (again and again(shape) and shape not in stands)]
    own = {shape: [known[shape]] if shape in known else [] for shape in wanted}
    searches = [Search(shape, forms, own[shape] + neighbours(shape, NEAREST)) for shape in wanted]
    print(f"{len(searches)} shapes to tune, {len(known)} known", file=sys.stderr)
    start = time.monotonic()
    for i in range(0, len(searches), GROUP):
        group = searches[i : i + GROUP]
        for stage in (Search.first, Search.second, Search.third):
            compile_all([launch for s in group for launch in s.launches(stage(s))])
            for search in group:
                search.time(stage(search))
        entries |= {search.shape: search.finish() for search in group}
        _write(path, old, list(entries.values()))
        spent = time.monotonic() - start
        print(f"{spent:4.0f} s: {i + len(group)} of {len(searches)} shapes", file=sys.stderr)
        if spent > budget_s:
            print("out of time; run `python -m kernels tune` again to go on", file=sys.stderr)
            break
    return path


def _write(path: Path, old: dict, entries: list[dict]) -> None:
    """The table with its provenance, and what the old one says of its own."""
    origin = provenance("python -m kernels tune")
    header = origin | {
        "what": f"fastest tiling per shape: under {LONG} tokens behind a linear, `ready` ones while it runs, then back to "
        "back; the former by the product of its times with equal shares and with 60 % on one adapter; us: one call so, "
        "with equal shares where it is short, CUDA-graph replay, weights cold in L2",
    }
    write_table(path, header | earlier_runs(old, origin), entries)

"""`python -m kernels bench`: the operator, its static ablation and the rivals over the grid, on this GPU, in one run.

It measures and writes rows; what they say is worked out by `kernels.verdict` from the file alone.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from kernels import results
from kernels.atmm import atmm, behind, linear, resolve
from kernels.baselines import OPERATORS, operator
from kernels.batch import LONG, LoraBatch
from kernels.measured import provenance
from kernels.precompile import compile_all, in_parallel
from kernels.results import Row
from kernels.tiles import Shape, Tiling, lookup
from kernels.timing import COPY_TB_S, MATMUL_TFLOP_S, NOISE_US, Point, World, captured, events_us, in_turn

H = 4096
QKV = (H, H, H)
RANKS = (16, 32, 64, 128)
PAPER_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FAR = 100
"""Times the floor from which a call is not measured behind a linear too."""
STATIC = 3
"""Tilings of the table, most often chosen first, that compete to be the one static tiling of a phase."""


def grid() -> list[Point]:
    """The peers' points, then others: the paper's token counts, 16 adapters, short runs, Qwen2-VL-7B's widths.

    Peers' points: a square projection and a fused q, k, v of width 4096, equal shares and one adapter with 60 %.
    """
    points = [Point(r.phase, r.d_in, (H,) * r.slices, r.tokens, r.adapters, r.rank, r.skew)
              for r in results.read(results.PEERS)]  # fmt: skip
    phase = {tokens: "decode" if tokens <= 256 else "prefill" for tokens in (*PAPER_TOKENS, 16384)}
    points += [Point(phase[t], H, (H,), t, 1, 64) for t in PAPER_TOKENS]
    points += [Point(phase[t], H, (H,), t, 16, r) for t in (16, 64, 256, 1024, 4096) for r in (16, 64)]
    short = ((512, 8), (1024, 8), (1024, 32), (4096, 8), (4096, 32), (16384, 32))
    points += [Point("prefill", H, (H,), t, n, 64, skew) for t, n in short for skew in ("uniform", "short")]
    layers = ((3584, (3584, 512, 512)), (3584, (3584,)), (3584, (18944, 18944)), (18944, (3584,)))
    points += [Point(phase[t], d_in, widths, t, 8, 64) for d_in, widths in layers for t in (8, 64, 512, 4096)]
    return list(dict.fromkeys(points))


def _shape(point: Point) -> Shape:
    """Of a call back to back."""
    uneven = point.skew == "skew60" and point.adapters > 1 and point.tokens >= LONG
    return Shape(point.d_in, point.widths, point.rank, point.tokens, point.adapters, uneven)


def _launches(point: Point, tiling: Tiling | None = None) -> list:
    """Of a call back to back and of one behind its linear; tiling: default the table's."""
    known = {"dtype": torch.bfloat16, "mixture": False, "strides": (point.d_in, sum(point.widths))}
    shapes = {_shape(point), behind(_shape(point), torch.bfloat16)}
    return [launch for shape in shapes for launch in resolve(shape, tiling or lookup(shape), **known)]


def _static_points(points: Iterable[Point], phase: str) -> list[Point]:
    """The square projection at equal shares."""
    return [p for p in points if p.phase == phase and p.widths == (H,) and p.d_in == H and p.skew == "uniform"]


def _static_candidates(points: list[Point]) -> list[Tiling]:
    """The tilings that the table chooses most often at these points, of those that can run at all of them."""
    return [tiling for tiling, _ in Counter(lookup(behind(_shape(p), torch.bfloat16)) for p in points).most_common(STATIC)]


def _as_row(point: Point) -> tuple:
    """`Row.point` of its rows."""
    at = (point.phase, point.d_in, sum(point.widths), len(point.widths), point.tokens, point.adapters, point.rank)
    return (*at, point.skew)


def rows_at(point: Point, ops: dict[str, Callable], linears: dict[str, Callable] | None = None, **where) -> Iterator[Row]:
    """One row for each operator that can run the point; what cannot is said on stderr. where: World's dtype, device.

    linears: of operators that have a way of their own to run with the layer's linear.
    """
    world = World(point, **where)
    for name, op in ops.items():
        try:
            error, us, behind_us = world.error(op), world.graph_us(op), 0.0
            if point.tokens < LONG and us < FAR * point.floor_us:
                own = (linears or {}).get(name) or in_turn(op, world.linear)
                behind_us = max(NOISE_US, world.behind_us(own))
        except (torch.OutOfMemoryError, OutOfResources) as reason:
            print(f"{name} cannot run {point}: {reason}", file=sys.stderr)
            continue
        yield Row(name, *_as_row(point), us, point.floor_us, error, behind_us)


def best_static(points: list[Point]) -> list[Row]:
    """Rows of the one tiling for all points with the least geometric mean; what fails anywhere is out."""
    candidates = _static_candidates(points)
    compile_all([launch for p in points for t in candidates for launch in _launches(p, t)])
    ops = {str(i): partial(atmm, tiling=tiling) for i, tiling in enumerate(candidates)}
    linears = {str(i): partial(linear, tiling=tiling) for i, tiling in enumerate(candidates)}
    rows = [row for point in points for row in rows_at(point, ops, linears)]
    by_tiling = [[row for row in rows if row.operator == name] for name in ops]
    whole = [(sum(log(row.us) for row in found), i) for i, found in enumerate(by_tiling) if len(found) == len(points)]
    if not whole:
        return []
    best = min(whole)[1]
    print(f"the one static tiling: {candidates[best]}", file=sys.stderr)
    return [replace(row, operator="atmm-static") for row in by_tiling[best]]


def bench(out: Path, *, rivals: Iterable[str] = OPERATORS, budget_s: float = 540.0, keep: Path | None = None) -> list[Row]:
    """Measure the grid and write `out` as it grows: our operator first, its static ablation, then the rivals.

    keep: a results file whose rivals' rows stand as they are; only those that it lacks are measured. Rivals go by
    prefill first; what budget_s does not allow is left out, as the header says.
    """
    start, points, rivals = time.monotonic(), grid(), list(rivals)
    what = "LoRA operators, one call, CUDA-graph replay, median, weights cold in L2; error against float32"
    floor = f"max(bytes / {COPY_TB_S} TB/s, flops / {MATMUL_TFLOP_S:.0f} TFLOP/s)"
    header = {"what": what, **provenance("python -m kernels bench"), "floor_us": floor}
    compile_all([launch for p in points for launch in _launches(p)])
    print(f"{time.monotonic() - start:4.0f} s: compiled", file=sys.stderr)
    rows = [row for point in points for row in rows_at(point, {"atmm": atmm}, {"atmm": linear})]
    results.write(out, rows, header | {"cut short": "before the static tilings"})
    print(f"{time.monotonic() - start:4.0f} s: our operator at {len(points)} points", file=sys.stderr)
    for phase in ("decode", "prefill"):
        rows += best_static(_static_points(points, phase))
    header |= extras()
    if keep:
        rows += [row for row in results.read(keep) if row.operator in rivals]
        header["rivals kept"] = f"from {keep.name} of {results.header(keep).get('date')}"
    results.write(out, rows, header | {"cut short": "before the rivals"})
    print(f"{time.monotonic() - start:4.0f} s: static tilings, host times", file=sys.stderr)
    have = {(row.operator, row.point) for row in rows}
    in_parallel(_warm, [(name, slices, rank) for name in rivals for slices in (1, 3) for rank in RANKS])
    ops = {name: operator(name) for name in rivals}
    left_out = 0
    for done, point in enumerate(sorted(points, key=lambda p: p.phase == "decode")):
        missing = {name: op for name, op in ops.items() if (name, _as_row(point)) not in have}
        late = time.monotonic() - start > budget_s
        left_out += late and bool(missing)
        rows += [] if late or not missing else rows_at(point, missing)
        if done % 50 == 0:
            results.write(out, rows, header | {"cut short": f"rivals at {done + 1} of {len(points)} points"})
            print(f"{time.monotonic() - start:4.0f} s: rivals at {done + 1} of {len(points)} points", file=sys.stderr)
    counts = {"points": len(points), "points with rivals missing, out of time": left_out}
    results.write(out, rows, header | counts)
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return rows


def _warm(name: str, slices: int, rank: int) -> None:
    """Compile what a rival needs, by calling it; Triton keeps it on disk for the process that measures."""
    for tokens, adapters in ((1, 1), (8, 1), (8, 8), (64, 8), (256, 8), (1024, 32)):
        world = World(Point("warm", H, (H,) * slices, tokens, adapters, rank))
        try:
            operator(name)(world.y, world.x, world.pool, world.batch, (0, "p"))
        except (torch.OutOfMemoryError, OutOfResources):
            continue  # the measurement says so


def extras() -> dict[str, str]:
    """Figures that are no row: host time, metadata of a step, and calls behind an ordinary kernel."""
    lines = {}
    for tokens, adapters, slices in ((1, 1, 1), (8, 8, 1), (32, 8, 1), (256, 8, 1), (32, 8, 3), (4096, 8, 1)):
        world = World(Point("decode", H, (H,) * slices, tokens, adapters, 64))
        for name, op in {"atmm": atmm, "slora": operator("slora"), "vllm": operator("vllm")}.items():
            us = world.behind_us(linear if op is atmm else in_turn(op, world.linear))
            graph_us, host_us = world.graph_us(op), world.host_us(op)
            lines[f"{name}, {tokens} tokens, {adapters} adapters, rank 64, {slices} slices"] = (
                f"{graph_us:.2f} us back to back, {us:.2f} us behind a linear, host {host_us:.1f} us a call"
            )
    for tokens in (32, 256, 4096, 16384):
        index = np.random.default_rng(0).integers(0, world.pool.slots, tokens, dtype=np.int32)
        host_us, device_us = metadata_us(world.pool, index)
        lines[f"metadata of {tokens} tokens"] = f"host {host_us:.1f} us, device {device_us:.1f} us"
    return lines


def metadata_us(pool, index: np.ndarray, times: int = 20) -> tuple[float, float]:
    """(host, device) microseconds to build one step's batch from each row's adapter, int32."""
    batch = LoraBatch(pool, len(index))
    spans = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = perf_counter()
        batch.update(index)
        spans.append(1e6 * (perf_counter() - begin))
    graph = captured(lambda i: batch.route(), times)
    return sorted(spans)[times // 2], events_us(graph.replay, 1)[0] / times

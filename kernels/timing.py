"""Measures one operator call as a layer would pay for it: CUDA-graph replay with weights cold in L2.

A graph holds many calls over rotating layers of factors, together at least twice the L2, so that A and B come from
memory at every call; x and y are the same at every call, so they stay in L2 where they fit, as between the kernels of a
layer. The figure is the median of the replays divided by the calls. It knows operators only as functions
`op(y, x, pool, batch, key)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median

import numpy as np
import torch

from kernels import skinny
from kernels.batch import Key, LoraBatch, LoraError, LoraPool, Projection

COPY_TB_S = 4.3
MATMUL_TFLOP_S = 790.0
COLD_BYTES = 128 << 20
CALLS = 48
NOISE_US = 0.5
"""What a call adds to a linear that covers most of it is the difference of two larger times: less than this is noise."""
SKEWS = ("uniform", "skew60", "short")


@dataclass(frozen=True)
class Point:
    """One place of the grid: a projection, and a step's tokens, adapters (all of one rank) and how rows fall to them.

    skew: uniform (equal shares, rows grouped by adapter), skew60 (the first adapter has 60 % of the rows), short (runs
    of 16 rows, adapters in turn, so that the rows of one adapter lie apart).
    """

    phase: str
    d_in: int
    widths: tuple[int, ...]
    tokens: int
    adapters: int
    rank: int
    skew: str = "uniform"

    @property
    def floor_us(self) -> float:
        """max(bytes / 4.3 TB/s, flops / 790 TFLOP/s): x, A, B read once, y read and written once, 16 bit."""
        slices, d_out = len(self.widths), sum(self.widths)
        factors = self.adapters * self.rank * (slices * self.d_in + d_out)
        moved = 2 * (self.tokens * (self.d_in + 2 * d_out) + factors)
        flops = 2 * self.tokens * self.rank * (slices * self.d_in + d_out)
        return max(moved / COPY_TB_S, flops / MATMUL_TFLOP_S) / 1e6

    def index(self) -> np.ndarray:
        """Adapter of every row, int32 [tokens]."""
        t, n = self.tokens, self.adapters
        if self.skew == "short":
            return (np.arange(t) // 16 % n).astype(np.int32)
        if self.skew == "uniform" or n == 1:
            return np.sort(np.arange(t) % n).astype(np.int32)
        if self.skew == "skew60":
            head = t - max(n - 1, round(0.4 * t))
            return np.concatenate([np.zeros(head), np.sort(np.arange(t - head) % (n - 1)) + 1]).astype(np.int32)
        raise LoraError(f"skew {self.skew!r} must be one of {SKEWS}")


class World:
    """The tensors of one point, random, on the GPU: a pool with enough layers to be cold, a batch, x and y."""

    def __init__(self, point: Point, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str = "cuda",
                 cold_bytes: int = COLD_BYTES):
        self.point = point
        projection = Projection(point.d_in, point.widths)
        factor_bytes = 2 * point.adapters * point.rank * (projection.slices * point.d_in + projection.d_out)
        self.layers = max(2, -(-cold_bytes // factor_bytes))
        rows = point.adapters * -(-point.rank // 16) * 16
        self.pool = LoraPool(
            {"p": projection}, layers=self.layers, slots=point.adapters, rows=rows, dtype=dtype, device=device
        )
        random = torch.Generator(device).manual_seed(seed)
        self.pool.a["p"].normal_(0, projection.d_in**-0.5, generator=random)
        self.pool.b["p"].normal_(0, point.rank**-0.5, generator=random)
        for slot in range(point.adapters):
            self.pool.reserve(slot, point.rank, scale=0.5)
        self.batch = LoraBatch(self.pool, point.tokens)
        self.batch.update(point.index())
        self.x = torch.empty(point.tokens, point.d_in, dtype=dtype, device=device).normal_(generator=random)
        self.y = torch.empty(point.tokens, projection.d_out, dtype=dtype, device=device).normal_(generator=random)
        self._fastest: dict[int, tuple[torch.cuda.CUDAGraph, Callable]] = {}

    @cached_property
    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(y before, y after one call with layer 0 in float32)."""
        from kernels.reference import reference

        before = self.y.clone()
        return before, reference(before, self.x, self.pool, self.batch, (0, "p"))

    def error(self, op: Callable) -> float:
        """Relative error of one call against float32, on fresh y."""
        from kernels.reference import relative_error

        before, after = self.truth
        y = before.clone()
        op(y, self.x, self.pool, self.batch, (0, "p"))
        return relative_error(y, after)

    def graph_us(self, op: Callable, *, replays: int = 7, target_us: float = 1500.0) -> float:
        """Median microseconds a call by graph replay; the graph lasts about target_us, every layer equally often."""
        self.y.normal_()

        def call(i: int) -> None:
            op(self.y, self.x, self.pool, self.batch, (i % self.layers, "p"))

        graph = captured(call, self.layers)  # one round first: a rival may be a hundred times slower than the floor
        round_us = min(events_us(graph.replay, 2))
        rounds = max(1, min(round(target_us / round_us), 512 // self.layers or 1))
        if rounds > 1:
            graph = captured(call, rounds * self.layers)
        return median(events_us(graph.replay, replays if round_us < 4 * target_us else 3)) / (rounds * self.layers)

    def behind_us(self, linear: Callable, *, replays: int = 5, calls: int = CALLS) -> float:
        """What one call adds where calls occur: behind the layer's linear, of cold weights, before the next one.

        linear: (x, weight, bias, pool, batch, key) -> y, a linear with its branches (`in_turn` of an operator that knows no
        better way). Its time less that of the fastest linear without any, replayed in turn: a GPU's clock follows its load
        within milliseconds, and two times of different clocks differ by more than a call takes.
        """

        def pair(x: torch.Tensor, weight: torch.Tensor, i: int) -> None:
            linear(x, weight, None, self.pool, self.batch, (i % self.layers, "p"))

        calls = self._calls(calls)
        alone, _ = self._alone(calls)
        without, added = alternated_us([alone.replay, self._chain(pair, calls).replay], replays)
        return median(more - less for less, more in zip(without, added, strict=True)) / calls

    @property
    def linear(self) -> Callable:
        """The layer's linear without branches, (x, weight, bias) -> y: of those that the engine has, by itself or with
        branches behind it, the one that is faster here."""
        return self._alone(self._calls(CALLS))[1]

    def _alone(self, calls: int) -> tuple[torch.cuda.CUDAGraph, Callable]:
        """(chain, linear) of the one that is faster."""
        if calls not in self._fastest:
            ways: list[Callable] = [skinny.linear]
            if tile := skinny.tile_for(self.x, self._weights[0], branched=True):
                ways.append(partial(skinny.run, tile=tile))
            chains = [self._chain(lambda x, weight, i, way=way: way(x, weight, None), calls) for way in ways]
            took = [median(times) for times in alternated_us([chain.replay for chain in chains], 9)]
            best = took.index(min(took))
            self._fastest[calls] = chains[best], ways[best]
        return self._fastest[calls]

    def _calls(self, least: int) -> int:
        """At least so many, each layer equally often."""
        return -(-least // self.layers) * self.layers

    def _chain(self, call: Callable, calls: int) -> torch.cuda.CUDAGraph:
        """So many of call(x, weight, i), weights in turn."""
        return captured(lambda i: call(self.x, self._weights[i % len(self._weights)], i), calls)

    @cached_property
    def _weights(self) -> list[torch.Tensor]:
        """Of the linear whose output the operator adds to, as often as it takes to be cold."""
        shape = (sum(self.point.widths), self.point.d_in)
        copies = max(2, -(-COLD_BYTES // (2 * shape[0] * shape[1])))
        return [torch.empty(shape, dtype=self.x.dtype, device=self.x.device).normal_(0, 0.02) for _ in range(copies)]

    def host_us(self, op: Callable, calls: int = 200) -> float:
        """CPU microseconds to issue one call outside a graph."""
        from time import perf_counter

        for i in range(20):
            op(self.y, self.x, self.pool, self.batch, (i % self.layers, "p"))
        torch.cuda.synchronize()
        spans = []
        for _ in range(calls // 20):  # short bursts: a full launch queue would make the host wait for the GPU
            start = perf_counter()
            for i in range(20):
                op(self.y, self.x, self.pool, self.batch, (i % self.layers, "p"))
            spans.append((perf_counter() - start) / 20 * 1e6)
            torch.cuda.synchronize()
        return median(spans)


def in_turn(op: Callable, linear: Callable) -> Callable:
    """An operator as `World.behind_us` takes it: behind a linear, (x, weight, bias) -> y."""

    def both(x, weight, bias, pool: LoraPool, batch: LoraBatch, key: Key) -> torch.Tensor:
        y = linear(x, weight, bias)
        op(y, x, pool, batch, key)
        return y

    return both


def captured(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """call(0) .. call(calls - 1), after one outside the capture; replayed once."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    return graph


def events_us(run: Callable, times: int) -> list[float]:
    """GPU microseconds of each of `times` runs."""
    return alternated_us([run], times)[0]


def alternated_us(runs: Sequence[Callable], times: int) -> list[list[float]]:
    """GPU microseconds of each of `times` rounds of the runs, one behind the other: a list a run."""
    rounds = [[_between_events(run) for run in runs] for _ in range(times)]
    torch.cuda.synchronize()
    return [[1e3 * start.elapsed_time(stop) for start, stop in one] for one in zip(*rounds, strict=True)]


def _between_events(run: Callable) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """The events around a run."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    return start, stop

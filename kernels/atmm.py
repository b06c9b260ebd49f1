"""ATMM, the adaptive-tiling operator: the LoRA branch of many adapters of mixed ranks, in place, tiles from a table.

VaLoRA, EuroSys 2025, section 4.3; built anew for Hopper: rows routed on the device, a K-split shrink whose planes the
expand sums (deterministic, no atomics, no zero-fill), weights fetched under the previous kernel by dependent launch.
It resolves a shape to launches once and then only launches; it knows no model, and nothing of how the table was tuned.
"""

from __future__ import annotations

from kernels.target import INTERPRETED, has_dependent_launch, processors  # isort: skip  (before triton)

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter

import torch
import triton
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from kernels import branch, skinny, stream
from kernels.batch import LONG, Key, LoraBatch, LoraError, LoraPool, Projection
from kernels.launch import Launch, argument, layers
from kernels.tiles import Shape, Tiling, default, lookup

MAX_PLANS = 4096
MANY_ROWS = 128
"""Rows from which v's planes are no wider than the factors: every run of columns reads them again from L2."""
GIVEN = ("y", "x", "a", "b")
"""Arguments that are others in each call or layer."""
TYPES = dict.fromkeys(("route", "perm", "counts", "came", "went"), torch.int32)
TYPES |= {"positions": 16, "pool_rows": 16}
TYPES |= dict.fromkeys(("split", "least", "former", "span", "shrinkers"), 3)
"""Run-time arguments of the kernels; all others are in the pool's dtype. 16, 3: whole numbers, multiples of 16 or any."""


def atmm(
    y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key, *, tiling: Tiling | None = None
) -> None:
    """y[t] += scale[j] * (x[t] A_j^T) B_j for every row t with an adapter j; see kernels.batch for the convention.

    x [>= tokens, d_in], y [>= tokens, d_out]: rows may be strided. No synchronisation; no allocation after the first
    call of a shape, which must come before a capture. `tiling` overrides the table. LoraError for a wrong shape,
    stride, dtype or device.
    """
    for run in _runs(y, x, pool, batch, key, tiling=tiling):
        run(y, x, key[0])


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pool: LoraPool, batch: LoraBatch, key: Key, *,
    tiling: Tiling | None = None,
) -> torch.Tensor:  # fmt: skip
    """x W^T + bias with the branches added, [tokens, d_out]: `skinny.linear`, then what `atmm` does, whose errors see.

    A linear of few rows lets the branch read x, and compute all that needs no y, while it runs.
    """
    if not batch.adapters:
        return skinny.linear(x, weight, bias)
    tile = skinny.tile_for(x, weight, branched=True)
    y = skinny.run(x, weight, bias, tile, late=True) if tile else functional.linear(x, weight, bias)
    for run in _runs(y, x, pool, batch, key, tiling=tiling, ready=tile is not None):
        run(y, x, key[0])
    return y


def _runs(
    y, x, pool: LoraPool, batch: LoraBatch, key: Key, *, tiling: Tiling | None = None, ready: bool = False
) -> list:  # fmt: skip
    """The launches of a call, each a function of (y, x, layer). ready: see `branch.shrink`."""
    layer, name = key
    shape_key = (name, batch.tokens, batch.adapters, batch.expected, batch.uneven, batch.rank, batch.merged >= 0)
    shape_key += (x.shape, y.shape, x.stride(), y.stride(), x.dtype, y.dtype, tiling, ready)
    shape_key += ((x.data_ptr() | y.data_ptr()) % 16,)
    runs = batch.plans.get(shape_key)
    if runs is None or pool is not batch.pool or not 0 <= layer < pool.layers:
        pool.factors(key)  # raises where there is no such layer or projection
        _check(y, x, pool=pool, batch=batch, projection=pool.projections[name])
        if len(batch.plans) >= MAX_PLANS:
            batch.plans.clear()
        known = {"pool": pool, "batch": batch, "name": name, "tiling": tiling, "ready": ready}
        runs = batch.plans[shape_key] = _plan(y, x, **known)
    return runs


def _check(y: torch.Tensor, x: torch.Tensor, *, pool: LoraPool, batch: LoraBatch, projection: Projection) -> None:
    """LoraError unless x and y fit the pool, the batch and the projection."""
    if batch.pool is not pool:
        raise LoraError("the batch was built over another pool; build it with LoraBatch(pool, max_tokens)")
    for name, tensor, width in (("x", x, projection.d_in), ("y", y, projection.d_out)):
        if tensor.ndim != 2 or tensor.shape[1] != width or tensor.shape[0] < batch.tokens:
            raise LoraError(f"{name} has shape {tuple(tensor.shape)}, expected (>= {batch.tokens}, {width})")
        if tensor.dtype != pool.dtype or tensor.device.type != pool.device.type:
            raise LoraError(f"{name} is {tensor.dtype} on {tensor.device}, the pool {pool.dtype} on {pool.device}")
        if tensor.stride(1) != 1 or tensor.stride(0) % 8 or tensor.data_ptr() % 16:
            raise LoraError(f"{name} has strides {tensor.stride()}; rows must be contiguous and start on 16 bytes")
    if INTERPRETED and pool.dtype is torch.bfloat16:
        raise LoraError("Triton's interpreter computes bfloat16 wrongly; use float16 or float32 without a GPU")


def _plan(y, x, *, pool: LoraPool, batch: LoraBatch, name: str, tiling: Tiling | None, ready: bool) -> list[Callable]:
    """`_runs`, resolved."""
    if batch.tokens == 0 or batch.adapters == 0:
        return []
    mixture = batch.merged >= 0
    shape, make = _shape(pool, batch, name, (x.stride(0), y.stride(0)), ready=ready)
    if tiling:
        tiling = fitting(tiling, shape.d_in, mixture=mixture)
        launches = make(tiling)
        runs = [launch.bind(pool.device) for launch in launches]
    else:
        tiling, launches, runs = _choose(make, shape, batch)
    known = _places(tiling, shape, batch, mixture=mixture)
    if tiling.form == "under":
        known |= _meeting(launches[0], shape, batch)
    a, b = layers(pool.a[name]), layers(pool.b[name])
    calls = []
    for launch, run in zip(launches, runs, strict=True):
        rows = launch.constants["BM"]
        known |= {"route": argument(batch.routes[rows]), "counts": argument(batch.counts[rows])}
        given = [name for name in launch.types if name in GIVEN]  # a kernel's first arguments, two at least
        calls.append(_call(run, given, tuple(known[name] for name in [*launch.types][len(given) :]), a, b))
    return calls


def _call(run: Callable, given: list[str], rest: tuple, a: list, b: list) -> Callable:
    """One launch as a function of (y, x, layer)."""
    own = itemgetter(*map(GIVEN.index, given))

    def call(y, x, layer):
        run(*own((argument(y), argument(x), a[layer], b[layer])), *rest)

    return call


def _shape(
    pool: LoraPool, batch: LoraBatch, name: str, strides: tuple[int, int], *, ready: bool
) -> tuple[Shape, Callable]:  # fmt: skip
    """(what decides the tiling of a projection, its launches as a function of the tiling)."""
    projection = pool.projections[name]
    rank = max(16, triton.next_power_of_2(batch.rank))
    uneven = batch.uneven and batch.tokens >= LONG
    shape = Shape(projection.d_in, projection.widths, rank, batch.tokens, batch.expected, uneven, ready)
    mixture = batch.merged >= 0
    known = {"dtype": pool.dtype, "mixture": mixture, "strides": strides, "groups": batch.adapters}
    return shape, partial(resolve, shape, **known)


def behind(shape: Shape, dtype: torch.dtype) -> Shape:
    """Of the same call in `linear`: on this device the branch may run while the layer's linear does, or may not."""
    tile = skinny.measured_tile(shape.tokens, sum(shape.widths), shape.d_in, dtype, branched=True)
    return replace(shape, ready=tile is not None)


def launches(pool: LoraPool, batch: LoraBatch, name: str, *, bias: bool = False) -> list[Launch]:
    """What `linear` over `batch` will launch for a projection whose x and y are contiguous, to be compiled ahead of it."""
    projection = pool.projections[name]
    sizes = (projection.d_out, projection.d_in)
    tile = skinny.measured_tile(batch.tokens, *sizes, pool.dtype, branched=True)
    first = []
    if tile:
        rows = skinny.bucket_of(batch.tokens)
        first = [skinny.launch_of(*sizes, projection.d_in, rows, tile, pool.dtype, bias=bias, late=True)]
    shape, make = _shape(pool, batch, name, sizes[::-1], ready=tile is not None)
    return first + make(fitting(lookup(shape.rounded()), shape.d_in, mixture=batch.merged >= 0))


def _places(t: Tiling, shape: Shape, batch: LoraBatch, *, mixture: bool) -> dict:
    """The arguments between the tensors of a call and the routes: scratch and counts."""
    slices, positions = len(shape.widths), -(-shape.tokens // 16) * 16
    known = {"perm": argument(batch.perm), "positions": positions, "pool_rows": batch.pool.rows, "split": t.split}
    if t.form != "one":
        planes = (t.split + (t.form == "stream")) * slices * (1 + mixture)
        known["v"] = argument(batch.workspace(planes * positions * shape.rank, planes_type(shape, batch.pool.dtype)))
    if t.form == "stream":
        steps = triton.cdiv(shape.d_in, t.k_block)
        known |= {"least": triton.cdiv(steps, t.split), "former": processors() * t.residents, "span": t.span}
    return known


def planes_type(shape: Shape, dtype: torch.dtype) -> torch.dtype:
    """Of v's planes: float32, but the factors' type in steps of MANY_ROWS."""
    return dtype if shape.tokens >= MANY_ROWS else torch.float32


def _meeting(launch: Launch, shape: Shape, batch: LoraBatch) -> dict:
    """The arguments by which programs of `branch.under` meet."""
    sizes, tiles = launch.constants, LoraBatch.tile_bound(launch.constants["BM"], shape.tokens, batch.adapters)
    parts = sizes["SPLIT"] * (sizes["R"] // sizes["BR"]) * sizes["SLICES"] * sizes["PASSES"]
    came, went = (batch.keep(torch.zeros(tiles, dtype=torch.int32, device=batch.pool.device)) for _ in range(2))
    return {"came": argument(came), "went": argument(went), "shrinkers": tiles * parts}


def _choose(make: Callable, shape: Shape, batch: LoraBatch) -> tuple[Tiling, list[Launch], list[Callable]]:
    """(tiling, its launches, the same bound): the table's, or the default where a neighbour's is too large to fit."""
    for tiling in (lookup(shape.rounded()), default(shape)):
        chosen = fitting(tiling, shape.d_in, mixture=batch.merged >= 0)
        launches = make(chosen)
        try:
            return chosen, launches, [launch.bind(batch.pool.device) for launch in launches]
        except OutOfResources:
            continue
    raise LoraError(f"no tiling of {shape} fits this GPU; pass one to atmm(tiling=), or lower the rank")


def fitting(tiling: Tiling, d_in: int, *, mixture: bool) -> Tiling:
    """The tiling with no more parts than d_in has blocks (it may have been tuned for a wider projection).

    In mixture mode, where a row has two branches, its neighbour of two launches.
    """
    split = min(tiling.split, triton.cdiv(d_in, tiling.k_block))
    if tiling.form in ("two", "under") or not mixture:
        return replace(tiling, split=split)
    return replace(tiling, form="two", split=split, span=1, expand_rows=tiling.rows, expand_warps=tiling.warps)


def resolve(
    shape: Shape, t: Tiling, dtype: torch.dtype, *, mixture: bool, strides: tuple[int, int], groups: int | None = None
) -> list[Launch]:
    """The kernels of one shape with everything but their tensors; one launch or two, by the tiling's form.

    groups: of rows that the grid must have room for; default: the shape's adapters.
    """
    passes, widths = 1 + mixture, (*shape.widths, 0, 0)[:3]
    slices, groups = len(shape.widths), groups or shape.adapters
    tiles, expand_tiles = (LoraBatch.tile_bound(rows, shape.tokens, groups) for rows in (t.rows, t.expand_rows))
    sizes = {"K": shape.d_in, "D": sum(shape.widths), "W0": widths[0], "W1": widths[1], "W2": widths[2]}
    sizes |= {"R": shape.rank, "PASSES": passes, "SLICES": slices, "XS": strides[0], "YS": strides[1]}
    sizes |= {"READY": shape.ready, "PDL": has_dependent_launch(), "IEEE": dtype is torch.float32}
    sizes |= {"BM": t.rows, "BK": t.k_block, "BN": t.n_block, "SPLIT": t.split, "STAGES": t.stages}
    types = TYPES | {"v": planes_type(shape, dtype)}

    def launch(kernel, grid: tuple[int, int], warps: int, **own) -> Launch:
        known = sizes | own
        constants = {name: known[name] for name in kernel.arg_names if name in known}
        needed = {name: types.get(name, dtype) for name in kernel.arg_names if name not in known}
        return Launch(kernel, grid, constants, needed, warps)

    if t.form == "one":
        return [launch(branch.fused, (t.span, tiles), t.warps, PARTS=t.span, STAGES2=t.expand_stages)]
    expand = {"BM": t.expand_rows, "SPAN": t.span, "STAGES": t.expand_stages}
    once = t.k_block * t.split >= shape.d_in
    planes, rank_block = t.split * slices * passes, min(t.rank_block, shape.rank)
    parts, runs = planes * (shape.rank // rank_block), sum(-(-width // (t.n_block * t.span)) for width in widths)
    if t.form == "under":
        programs = tiles * (parts + runs)
        return [launch(branch.under, (programs, 1), t.warps, BR=rank_block, ONCE=once)]
    if t.form == "stream":
        first, second = (processors() * each for each in (t.residents, t.expand_residents))
        expand |= {"NK": -(-shape.d_in // t.k_block)}
        return [
            launch(stream.shrink_stream, (first, 1), t.warps),
            launch(stream.expand_stream, (second, 1), t.expand_warps, **expand),
        ]
    return [
        launch(branch.shrink, (parts, tiles), t.warps, BR=rank_block, ONCE=once),
        launch(branch.expand, (runs, expand_tiles), t.expand_warps, **expand),
    ]

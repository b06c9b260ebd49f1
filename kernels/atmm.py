"""ATMM, the adaptive-tiling operator: the LoRA branch of many adapters of mixed ranks, in place, tiles from a table.

VaLoRA, EuroSys 2025, section 4.3; built anew for Hopper: rows routed on the device, a K-split shrink whose planes the
expand sums (deterministic, no atomics, no zero-fill), weights fetched under the previous kernel by dependent launch.
It resolves a shape to launches once and then only launches; it knows no model, and nothing of how the table was tuned.
"""

from __future__ import annotations

from kernels.target import INTERPRETED, has_dependent_launch  # isort: skip  (before triton)

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import triton
from triton.runtime.errors import OutOfResources

from kernels import branch
from kernels.batch import Key, LoraBatch, LoraError, LoraPool, Projection
from kernels.launch import Launch, argument
from kernels.tiles import Shape, Tiling, default, lookup, steadier

MAX_PLANS = 4096
LONG = 512
"""Tokens from which a step's row tiles are counted before a tiling is chosen."""


def atmm(
    y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key, *, tiling: Tiling | None = None
) -> None:
    """y[t] += scale[j] * (x[t] A_j^T) B_j for every row t with an adapter j; see kernels.batch for the convention.

    x [>= tokens, d_in], y [>= tokens, d_out]: rows may be strided. No synchronisation; no allocation after the first
    call of a shape, which must come before a capture. `tiling` overrides the table. LoraError for a wrong shape,
    stride, dtype or device.
    """
    layer, name = key
    shape_key = (name, batch.tokens, batch.adapters, batch.expected, batch.rank, batch.merged >= 0)
    if batch.tokens >= LONG:  # how the rows fall to tiles may change the choice
        shape_key += (batch.tiles(64), batch.tiles(128))
    shape_key += (x.stride(0), y.stride(0), x.dtype, y.dtype, tiling)
    plan = batch.plans.get(shape_key)
    if plan is None or not 0 <= layer < pool.layers:
        pool.factors(key)  # raises where there is no such layer or projection
        _check(y, x, pool=pool, batch=batch, projection=pool.projections[name])
        if len(batch.plans) >= MAX_PLANS:
            batch.plans.clear()
        plan = batch.plans[shape_key] = _plan(y, x, pool=pool, batch=batch, name=name, tiling=tiling)
    plan(y, x, layer)


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


def _plan(y, x, *, pool: LoraPool, batch: LoraBatch, name: str, tiling: Tiling | None) -> Callable:
    """The launches of one shape, as a function of (y, x, layer)."""
    if batch.tokens == 0 or batch.adapters == 0:
        return lambda y, x, layer: None
    projection, mixture = pool.projections[name], batch.merged >= 0
    rank = max(16, triton.next_power_of_2(batch.rank))
    shape = Shape(projection.d_in, projection.widths, rank, batch.tokens, batch.expected)
    strides = (x.stride(0), y.stride(0))
    make = partial(resolve, shape, dtype=pool.dtype, mixture=mixture, strides=strides, groups=batch.adapters)
    if tiling:
        tiling = fitting(tiling, mixture=mixture)
        runs = [launch.bind(pool.device) for launch in make(tiling)]
    else:
        tiling, runs = _choose(make, shape, batch)
    a, b = _layers(pool.a[name]), _layers(pool.b[name])
    route, perm = argument(batch.routes[tiling.rows]), argument(batch.perm)
    if tiling.form == "one":
        return lambda y, x, layer: runs[0](argument(y), argument(x), a[layer], b[layer], route, perm, pool.rows)
    positions, expand_route = -(-batch.tokens // 16) * 16, argument(batch.routes[tiling.expand_rows])
    planes = tiling.split * projection.slices * (1 + mixture)
    v = argument(batch.workspace(planes * positions * rank))
    if tiling.form == "barrier":
        rest = (v, route, perm, argument(batch.counters[tiling.split]), positions, pool.rows)
        return lambda y, x, layer: runs[0](argument(y), argument(x), a[layer], b[layer], *rest)
    run_shrink, run_expand, rows = *runs, pool.rows

    def run_two(y, x, layer):
        run_shrink(argument(x), a[layer], v, route, perm, positions, rows)
        run_expand(argument(y), b[layer], v, expand_route, perm, positions)

    return run_two


def _choose(make: Callable, shape: Shape, batch: LoraBatch) -> tuple[Tiling, list[Callable]]:
    """(tiling, its bound launches): the table's, unless it does not fit this step, then a near one that does.

    What was tuned for a neighbour may be too large, or have more programs than can wait for one another. And where
    uneven shares need more row tiles than the table's equal ones, a last few programs can cost a round of their own.
    """
    mixture, near = batch.merged >= 0, lookup(shape.rounded())
    fits = []
    for tiling in (near, steadier(near), lookup(shape.rounded(), meeting=False), default(shape)):
        if fits and tiling != steadier(near):
            break
        chosen = fitting(tiling, mixture=mixture)
        launches = make(chosen)
        try:
            fits.append((chosen, [launch.bind(batch.pool.device) for launch in launches]))
        except OutOfResources:
            continue
        if INTERPRETED or shape.tokens < LONG or not _another_round(launches[0], chosen.rows, shape, batch):
            return fits[-1]
    if not fits:
        raise LoraError(f"no tiling of {shape} fits this GPU; pass one to atmm(tiling=), or lower the rank")
    return fits[-1]


def _another_round(launch: Launch, rows: int, shape: Shape, batch: LoraBatch) -> bool:
    """Whether this step's row tiles need more rounds of resident programs than equal shares would, up to four."""
    even = shape.adapters * -(-shape.tokens // (shape.adapters * rows))
    rounds = [-(-launch.grid[0] * tiles // launch.places) for tiles in (even, batch.tiles(rows))]
    return rounds[0] < min(rounds[1], 4)


def _layers(tensor: torch.Tensor) -> list:
    """One argument a layer of pooled factors, which the pool keeps alive and in place."""
    if INTERPRETED:
        return list(tensor)
    return [tensor.data_ptr() + i * tensor.stride(0) * tensor.element_size() for i in range(len(tensor))]


def fitting(tiling: Tiling, *, mixture: bool) -> Tiling:
    """The tiling, or its two-launch neighbour: in mixture mode (two branches a row), and for programs that wait for one
    another in the interpreter, which runs them one after another.
    """
    if tiling.form == "two" or not (mixture or (INTERPRETED and tiling.form == "barrier")):
        return tiling
    split = tiling.split if tiling.form == "barrier" else 1
    return replace(tiling, form="two", split=split, span=1, expand_rows=tiling.rows, expand_warps=tiling.warps)


def resolve(
    shape: Shape, t: Tiling, dtype: torch.dtype, *, mixture: bool, strides: tuple[int, int], groups: int | None = None
) -> list[Launch]:
    """The kernels of one shape with everything but their tensors; one launch or two, by the tiling's form.

    groups: of rows that the grid must have room for; default: the shape's adapters.
    """
    passes, widths = 1 + mixture, (*shape.widths, 0, 0)[:3]
    slices, d_out = len(shape.widths), sum(shape.widths)
    groups = groups or shape.adapters
    tiles, expand_tiles = (LoraBatch.tile_bound(rows, shape.tokens, groups) for rows in (t.rows, t.expand_rows))
    types = dict.fromkeys(("x", "y", "a", "b"), dtype) | dict.fromkeys(("route", "perm", "counters"), torch.int32)
    types |= {"v": torch.float32, "positions": 16, "pool_rows": 16}
    sizes = {"K": shape.d_in, "D": d_out, "W0": widths[0], "W1": widths[1], "W2": widths[2], "SLICES": slices}
    sizes |= {"R": shape.rank, "PASSES": passes, "XS": strides[0], "YS": strides[1]}
    sizes |= {"PDL": has_dependent_launch(), "IEEE": dtype is torch.float32}
    tile = {"BM": t.rows, "BK": t.k_block, "BN": t.n_block, "SPLIT": t.split, "STAGES": t.stages}

    def launch(kernel, programs: int, row_tiles: int, warps: int, **own) -> Launch:
        known = sizes | tile | own
        constants = {name: known[name] for name in kernel.arg_names if name in known}
        needed = {name: types[name] for name in kernel.arg_names if name not in known}
        return Launch(kernel, (programs, row_tiles), constants, needed, warps, kernel is branch.barrier)

    if t.form == "one":
        return [launch(branch.fused, t.span, tiles, t.warps, PARTS=t.span, STAGES2=t.expand_stages)]
    if t.form == "barrier":
        k_part, n_part = (triton.next_power_of_2(-(-size // t.split)) for size in (shape.d_in, max(widths)))
        return [launch(branch.barrier, t.split * slices, tiles, t.warps, PARTS=t.split, BK=k_part, BN=n_part)]
    planes, rank_block = t.split * slices * passes, min(t.rank_block, shape.rank)
    runs = sum(-(-width // (t.n_block * t.span)) for width in widths)
    expand = {"BM": t.expand_rows, "SPAN": t.span, "STAGES": t.expand_stages}
    return [
        launch(branch.shrink, planes * (shape.rank // rank_block), tiles, t.warps, BR=rank_block),
        launch(branch.expand, runs, expand_tiles, t.expand_warps, **expand),
    ]

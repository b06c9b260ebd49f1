"""ATMM, the adaptive-tiling operator: the LoRA branch of many adapters of mixed ranks, in place, tiles from a profiled table.

VaLoRA, EuroSys 2025, section 4.3; built anew for Hopper: rows routed on the device, a K-split shrink whose planes the expand sums
(deterministic, no atomics, no zero-fill), weights fetched under the previous kernel by dependent launch.
It resolves a shape to launches once and then only launches; it knows no model, and nothing of how the table was tuned.
"""

from __future__ import annotations

from kernels.target import INTERPRETED, has_dependent_launch  # isort: skip  (before triton)

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from kernels import branch
from kernels.batch import Key, LoraBatch, LoraError, LoraPool, Projection
from kernels.tiles import Shape, Tiling, lookup


@dataclass(frozen=True)
class Launch:
    """One kernel with everything but its tensors resolved."""

    kernel: triton.JITFunction
    grid: tuple[int, int]
    constants: dict
    warps: int

    @property
    def options(self) -> dict:
        """Triton's launch options."""
        return {"num_warps": self.warps} | ({"launch_pdl": True} if self.constants["PDL"] else {})


def atmm(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: Key, tiling: Tiling | None = None) -> None:
    """y[t] += scale[j] * (x[t] A_j^T) B_j for every row t of the batch with an adapter j; see kernels.batch for the convention.

    x [>= tokens, d_in], y [>= tokens, d_out]: rows may be strided. No synchronisation, no allocation after the first call of
    a shape. `tiling` overrides the table. LoraError for a wrong shape, stride, dtype or device.
    """
    a, b, projection = pool.factors(key)
    if batch.tokens == 0 or batch.adapters == 0:
        return
    mixture = batch.merged >= 0
    shape_key = (key[1], batch.tokens, batch.adapters, batch.rank, mixture, x.stride(0), y.stride(0), y.dtype, tiling)
    plan = batch.plans.get(shape_key)
    if plan is None:
        _check(y, x, pool, batch, projection)
        plan = batch.plans[shape_key] = _plan(y, x, pool, batch, key[1], tiling)
    plan(y, x, a, b)


def _check(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, projection: Projection) -> None:
    """LoraError unless x and y fit the pool, the batch and the projection."""
    for name, tensor, width in (("x", x, projection.d_in), ("y", y, projection.d_out)):
        if tensor.ndim != 2 or tensor.shape[1] != width or tensor.shape[0] < batch.tokens:
            raise LoraError(f"{name} has shape {tuple(tensor.shape)}, expected (>= {batch.tokens}, {width})")
        if tensor.dtype != pool.dtype or tensor.device.type != pool.device.type:
            raise LoraError(f"{name} is {tensor.dtype} on {tensor.device}, the pool {pool.dtype} on {pool.device}")
        if tensor.stride(1) != 1 or tensor.stride(0) % 8 or tensor.data_ptr() % 16:
            raise LoraError(f"{name} has strides {tensor.stride()}; rows must be contiguous and start on 16 bytes")
    if INTERPRETED and pool.dtype is torch.bfloat16:
        raise LoraError("Triton's interpreter computes bfloat16 wrongly; use float16 or float32 without a GPU")


def _plan(y, x, pool: LoraPool, batch: LoraBatch, name: str, tiling: Tiling | None) -> Callable:
    """The launches of one shape, as a function of (y, x, a, b)."""
    projection = pool.projections[name]
    rank = max(16, triton.next_power_of_2(batch.rank))
    shape = Shape(projection.d_in, projection.widths, rank, batch.tokens, batch.adapters)
    tiling = fitting(tiling or lookup(shape), mixture=batch.merged >= 0)
    launches = resolve(shape, tiling, pool.dtype, mixture=batch.merged >= 0, strides=(x.stride(0), y.stride(0)))
    route, perm = batch.routes[tiling.rows], batch.perm
    if len(launches) == 1:
        run = _bind(launches[0], ("y", "x", "a", "b", "route", "perm", "pool_rows"))
        return lambda y, x, a, b: run(y, x, a, b, route, perm, pool.rows)
    run_shrink = _bind(launches[0], ("x", "a", "v", "route", "perm", "positions", "pool_rows"))
    run_expand = _bind(launches[1], ("y", "b", "v", "route", "perm", "positions"))
    positions, expand_route = -(-batch.tokens // 16) * 16, batch.routes[tiling.expand_rows]
    v = batch.workspace(launches[0].grid[0] * positions * rank)

    def run_two(y, x, a, b):
        run_shrink(x, a, v, route, perm, positions, pool.rows)
        run_expand(y, b, v, expand_route, perm, positions)

    return run_two


def fitting(tiling: Tiling, *, mixture: bool) -> Tiling:
    """The tiling, or its two-launch neighbour in mixture mode, whose two branches need that form."""
    if tiling.form == "two" or not mixture:
        return tiling
    return replace(tiling, form="two", split=1, span=1, expand_rows=tiling.rows, expand_warps=tiling.warps)


def resolve(shape: Shape, t: Tiling, dtype: torch.dtype, *, mixture: bool, strides: tuple[int, int]) -> list[Launch]:
    """The kernels of one shape with everything but their tensors; one launch or two, by the tiling's form."""
    passes, widths = 1 + mixture, (*shape.widths, 0, 0)[:3]
    slices, d_out = len(shape.widths), sum(shape.widths)
    tiles, expand_tiles = (LoraBatch.tile_bound(rows, shape.tokens, shape.adapters) for rows in (t.rows, t.expand_rows))
    shared = {"R": shape.rank, "SLICES": slices, "PDL": has_dependent_launch(), "IEEE": dtype is torch.float32}
    read = {"XS": strides[0], "K": shape.d_in, "BM": t.rows, "BK": t.k_block, "STAGES": t.stages}
    write = {"YS": strides[1], "D": d_out, "W0": widths[0], "W1": widths[1], "W2": widths[2], "BN": t.n_block}
    if t.form == "one":
        constants = shared | write | read | {"PARTS": t.span, "STAGES2": t.expand_stages}
        return [Launch(branch.fused, (t.span, tiles), constants, t.warps)]
    both = shared | {"PASSES": passes, "SPLIT": t.split}
    runs = sum(-(-width // (t.n_block * t.span)) for width in widths)
    write |= {"BM": t.expand_rows, "SPAN": t.span, "STAGES": t.expand_stages}
    return [
        Launch(branch.shrink, (t.split * slices * passes, tiles), both | read, t.warps),
        Launch(branch.expand, (runs, expand_tiles), both | write, t.expand_warps),
    ]


def _bind(launch: Launch, names: tuple[str, ...]) -> Callable:
    """A function of the kernel's tensors that launches it.

    The first call goes through Triton's own launcher, which compiles; later ones call the compiled kernel with positional
    arguments, several times cheaper for the host.
    """
    if INTERPRETED:
        return lambda *tensors: launch.kernel[launch.grid](*tensors, **launch.constants)
    order = launch.kernel.arg_names
    assert tuple(order[: len(names)]) == names
    constants = [launch.constants[name] for name in order[len(names) :]]
    compiled = None

    def run(*tensors):
        nonlocal compiled
        if compiled is None:
            compiled = launch.kernel[launch.grid](*tensors, **launch.constants, **launch.options)
            return
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
        compiled.run(
            *launch.grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *tensors, *constants
        )

    return run

"""A linear layer of few rows and the LoRA branches of many adapters, in one launch: y[t] = x[t] W^T + s (x[t] A_j^T) B_j.

While the weights arrive nothing else need wait: the first programs of the grid compute the branches' z = scale x A^T, as a
linear of theirs over the factors A; the others compute the layer's columns, in `kernels.skinny`'s way, and before they end
wait for z, whose makers started before them, and add z B to the sums that they hold. A branch then costs what its factors
take to arrive: no launch, and no second pass over y. Rows are taken in the order of the batch's routes, in which the rows of
an adapter lie together. Results do not depend on timing, nor a row on another row's adapter, as long as every B is finite
(the sum goes over all adapters, z being zero for other rows; who loads adapters refuses what is not finite).

It knows shapes, slots and rows; no layer and no table. For up to 64 rows; a linear's columns must be whole blocks of 64 in
each slice. Factors and routes must be complete before the first launch of a chain of dependent launches.
"""

from __future__ import annotations

from kernels.target import INTERPRETED, has_dependent_launch  # isort: skip  (before triton)

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kernels import skinny
from kernels.batch import Key, LoraBatch, LoraError, LoraPool
from kernels.branch import entry, number
from kernels.dependent import fetch, trigger, wait
from kernels.launch import Launch, argument, layers, room
from kernels.linear_tiles import Tile, bucket_of
from kernels.skinny import BK, BN, all_stored, dot, finish, partial_sums

CHUNK = 64
"""Ranks that a program takes at a time."""
AHEAD = 3
"""Stages of the loop over the adapters' B, whose addresses are loads too."""
BQ = 128
"""Ranks, of one adapter or more, in one step of that loop."""

if INTERPRETED:

    @triton.jit
    def _await(came, target):
        """Nothing: the interpreter runs the programs in their order."""

else:

    @triton.jit
    def _await(came, target):
        """Until so many came. Who comes runs already: programs start in their order."""
        while tl.atomic_add(came, 0, sem="acquire") < target:
            pass


@triton.jit
def _shrink(
    x, a, z, sums, met, route, live_tiles, token, m, live, pid, pool_rows,
    XS: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
    FETCHED: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, SLICES: tl.constexpr, PASSES: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """One program's part of z, BR ranks of a slice of an adapter over one of PARTS parts of K; the last to come adds all."""
    part = pid % PARTS
    unit = pid // PARTS
    c = unit % (R // BR)
    s = unit // (R // BR) % SLICES
    e = unit // (R // BR * SLICES)
    tile = tl.minimum(e, live_tiles - 1)
    first, rows, offset, rank, scale = entry(route, tile, 0)
    if PASSES > 1:
        folded = e == live_tiles  # behind the rows' own branches the folded adapter's, once, of all rows that owe it
        _, _, m_offset, m_rank, m_scale = entry(route, tile, 1)
        offset = tl.where(folded, m_offset, offset)
        rank = tl.where(folded, m_rank, rank)
        scale = tl.where(folded, m_scale, scale)
        rows = tl.where(folded, first + rows, rows)
        first = tl.where(folded, 0, first)
    r = c * BR + tl.arange(0, BR)
    start = part * ((K + PARTS * BK - 1) // (PARTS * BK) * BK)
    a_row = tl.minimum(r, tl.maximum(rank, 1) - 1)  # rows that owe only the folded adapter's branch have none of their own
    a_rows = a + (s * pool_rows + offset + a_row).to(tl.int64) * K
    acc = partial_sums(a_rows, x + token * XS, live, start, K, TOKENS,
                       BR, BK, PARTS, STAGES, HELD, FETCHED, PDL, IEEE)  # fmt: skip
    mine = (r < rank)[:, None] & ((m >= first) & (m < first + rows))[None, :]
    value = tl.where(mine, acc * scale, 0.0)
    z_at = z + ((e * SLICES + s) * R + r)[:, None] * TOKENS + m[None, :]
    if PARTS == 1:
        tl.store(z_at, value.to(z.dtype.element_ty))
    else:
        at = sums + unit * (PARTS * BR * TOKENS) + tl.arange(0, BR)[:, None] * TOKENS + m[None, :]
        tl.store(at + part * (BR * TOKENS), value)
        all_stored()  # every thread's stores come before the one thread's release
        if tl.atomic_add(met + unit, 1, sem="acq_rel") == PARTS - 1:
            tl.store(met + unit, 0)
            total = tl.load(at, cache_modifier=".cg")
            for p in tl.static_range(1, PARTS):
                total += tl.load(at + p * (BR * TOKENS), cache_modifier=".cg")
            tl.store(z_at, total.to(z.dtype.element_ty))
    all_stored()


@triton.jit
def _lines(route, q, live_tiles, branches, R: tl.constexpr):
    """(first pool row, rank) of the adapter of every of all adapters' ranks, R each; the folded one's come last."""
    e = q // R
    at = route + tl.minimum(e, live_tiles - 1) * 8 + tl.where(e < live_tiles, 2, 5)
    return tl.load(at, mask=e < branches, other=0), tl.load(at + 1, mask=e < branches, other=0)


@triton.jit
def _expand(
    acc, b, z, route, offset, rank, live_tiles, m, n, s, part, columns, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
    R: tl.constexpr, SLICES: tl.constexpr, PASSES: tl.constexpr, BQ: tl.constexpr, AHEAD: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """acc [BN, TOKENS] plus the branches of columns n, a sum over the ranks of all adapters; every SPLIT-th block of BQ."""
    branches = live_tiles + PASSES - 1
    j = tl.arange(0, BQ)
    for i in tl.range(number(part), number((branches * R + BQ - 1) // BQ), SPLIT, num_stages=AHEAD):
        e = (i * BQ + j) // R
        r = (i * BQ + j) % R
        b_at = b + (offset + r).to(tl.int64)[:, None] * columns + n[None, :]
        b_tile = tl.load(b_at, mask=(r < rank)[:, None], other=0.0)
        z_at = z + ((e * SLICES + s) * R + r)[:, None] * TOKENS + m[None, :]
        z_tile = tl.load(z_at, mask=(e < branches)[:, None], other=0.0, cache_modifier=".cg")
        acc = dot(tl.trans(b_tile), z_tile, acc, IEEE)
        offset, rank = _lines(route, (i + SPLIT) * BQ + j, live_tiles, branches, R)  # ahead, as addresses wait for them
    return acc


@triton.jit(do_not_specialize=["rows", "shrinkers"])
def few_rows_branched(
    x, w, bias, y, a, b, z, sums, planes, counters, met, came, went, state, route, count, perm, rows, shrinkers, columns,
    pool_rows, XS: tl.constexpr, K: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, TOKENS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr, FETCHED: tl.constexpr,
    BIAS: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, SLICES: tl.constexpr, PASSES: tl.constexpr, PARTS: tl.constexpr,
    LINEARS: tl.constexpr, BQ: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """y [rows, columns] = x w^T + bias + branches; grid (shrinkers + LINEARS); the latter as `skinny.few_rows`.

    route: of row tiles of TOKENS rows, one an adapter; count: of them. z [adapters, SLICES, R, TOKENS] in B's type: scale
    x A^T of an adapter's rows, zero for others; sums float32 [units, PARTS, BR, TOKENS] and met int32 [units], zero before
    and after, of units = adapters x SLICES x R / BR. came, went int64 [1] count the programs of either kind that ever ended:
    no launch needs them at zero, and a program knows from `went`, to which it has not added yet, for how many it must wait.
    """
    if PDL:
        trigger()
    pid = tl.program_id(0)
    m = tl.arange(0, TOKENS)
    live = (m < rows)[:, None]
    used = tl.minimum(tl.load(state), rows)
    live_tiles = tl.load(count)
    token = tl.where(m < used, tl.load(perm + m, mask=m < used, other=0), m)
    branches = tl.where(live_tiles > 0, live_tiles + PASSES - 1, 0)
    if pid < shrinkers:
        if pid < branches * (PARTS * (R // BR) * SLICES):
            _shrink(x, a, z, sums, met, route, live_tiles, token, m, live, pid, pool_rows,
                    XS, K, TOKENS, BK, STAGES, HELD, FETCHED, R, BR, SLICES, PASSES, PARTS, PDL, IEEE)  # fmt: skip
        elif PDL:
            wait()
        tl.atomic_add(came, 1, sem="release")
    else:
        part = (pid - shrinkers) % SPLIT
        tile = (pid - shrinkers) // SPLIT
        n = tile * BN + tl.arange(0, BN)
        start = part * ((K + SPLIT * BK - 1) // (SPLIT * BK) * BK)
        offset, rank = _lines(route, part * BQ + tl.arange(0, BQ), live_tiles, branches, R)
        if FETCHED and PDL:
            r = (part * BQ + tl.arange(0, BQ)) % R
            fetch(b + (offset + tl.minimum(r, tl.maximum(rank, 1) - 1)).to(tl.int64) * columns + tile * BN)
        acc = partial_sums(w + n.to(tl.int64) * K, x + token * XS, live, start, K, TOKENS,
                           BN, BK, SPLIT, STAGES, HELD, FETCHED, PDL, IEEE)  # fmt: skip
        if live_tiles > 0:
            before = tl.load(went, volatile=True)
            _await(came, (before // LINEARS + 1) * shrinkers)
            s = (tile * BN >= W0).to(tl.int32) + (tile * BN >= W0 + W1).to(tl.int32)
            acc = _expand(acc, b, z, route, offset, rank, live_tiles, m, n, s, part, columns,
                          TOKENS, SPLIT, R, SLICES, PASSES, BQ, AHEAD, IEEE)  # fmt: skip
        tl.atomic_add(went, 1, sem="relaxed")
        finish(acc, y, m, token, live, bias, planes, counters, part, tile, columns, TOKENS, BN, SPLIT, BIAS, False)


def tile_for(x: torch.Tensor, weight: torch.Tensor, pool: LoraPool, batch: LoraBatch, name: str) -> Tile | None:
    """None: a linear and then its branches, for what the kernel does not take or where it was not measured to be faster."""
    if not (batch.adapters and x.dtype is pool.dtype and skinny.fits(x, weight)):
        return None
    return measured_tile(len(x), pool, batch, name)


def measured_tile(rows: int, pool: LoraPool, batch: LoraBatch, name: str) -> Tile | None:
    """The tile for so many rows of a projection, if one launch beat two on this device."""
    projection = pool.projections[name]
    if not batch.adapters or any(width % BN for width in projection.widths):
        return None
    return skinny.measured_tile(rows, projection.d_out, projection.d_in, pool.dtype, branched=True)


def launch_of(pool: LoraPool, batch: LoraBatch, name: str, stride: int, tokens: int, tile: Tile, *, bias: bool = False
              ) -> Launch:  # fmt: skip
    """The kernel for a projection, rows of x `stride` apart, padded to `tokens`, and all adapters that `batch` may have."""
    projection, passes = pool.projections[name], 1 + (batch.merged >= 0)
    rank, depth = max(16, triton.next_power_of_2(batch.rank)), projection.d_in
    chunk, parts = min(CHUNK, rank), min(tile.parts, -(-depth // BK))
    shrinkers = (batch.adapters + passes - 1) * projection.slices * (rank // chunk) * parts
    linears = projection.d_out // BN * tile.split
    held = min(tile.held, -(-depth // (max(tile.split, parts) * BK)))
    constants = {
        "XS": stride, "K": depth, "W0": projection.widths[0], "W1": sum(projection.widths[1:2]), "TOKENS": tokens, "BN": BN,
        "BK": BK, "SPLIT": tile.split, "STAGES": tile.stages, "HELD": held, "FETCHED": tile.fetched, "BIAS": bias,
        "R": rank, "BR": chunk, "SLICES": projection.slices, "PASSES": passes, "PARTS": parts, "LINEARS": linears,
        "BQ": BQ, "AHEAD": AHEAD, "PDL": has_dependent_launch(), "IEEE": pool.dtype is torch.float32,
    }  # fmt: skip
    types = dict.fromkeys(("x", "w", "bias", "y", "a", "b", "z"), pool.dtype)
    types |= dict.fromkeys(("sums", "planes"), torch.float32) | dict.fromkeys(("counters", "met"), torch.int32)
    types |= dict.fromkeys(("came", "went"), torch.int64) | dict.fromkeys(("state", "route", "count", "perm"), torch.int32)
    types |= {"rows": 1, "shrinkers": 1, "columns": 16 if projection.d_out % 16 == 0 else 8, "pool_rows": 16}
    programs = shrinkers + linears
    return Launch(few_rows_branched, (programs, 1), constants, types, shared_bytes=room(tile.residents, programs))


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pool: LoraPool, batch: LoraBatch, key: Key, tile: Tile
) -> torch.Tensor:
    """x [rows, d_in] weight [d_out, d_in]^T + bias with the branches of `batch` added: `tile_for` has taken them.

    Safe in a capture once the same shape has run outside of one (else RuntimeError), and not on two streams at once.
    LoraError for a layer, pool or shape that does not fit.
    """
    layer, name = key
    tokens = bucket_of(len(x))
    shape = ("joined", name, tokens, batch.adapters, batch.rank, batch.merged >= 0, x.stride(0), bias is None, tile)
    plan = batch.plans.get(shape)
    if plan is None or not 0 <= layer < pool.layers:
        pool.factors(key)  # raises where there is no such layer or projection
        projection = pool.projections[name]
        if batch.pool is not pool or len(x) < batch.tokens or weight.shape != (projection.d_out, projection.d_in):
            shapes = f"x {tuple(x.shape)} and W {tuple(weight.shape)}"
            raise LoraError(f"{shapes} do not fit {projection} and {batch.tokens} rows, or the batch is of another pool")
        launch = launch_of(pool, batch, name, x.stride(0), tokens, tile, bias=bias is not None)
        plan = batch.plans[shape] = _plan(x, pool, batch, name, launch)
    y = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    plan(x, weight, skinny.aligned_bias(x, bias), y, layer)
    return y


def _plan(x: torch.Tensor, pool: LoraPool, batch: LoraBatch, name: str, launch: Launch) -> Callable:
    """A launch as a function of (x, weight, bias, y, layer), with counters of its own."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name!r} and a step of this shape have not met yet; run it once, then capture")
    known, start = launch.constants, launch.bind(x.device)
    tokens, split, columns = known["TOKENS"], known["SPLIT"], pool.projections[name].d_out
    shrinkers = launch.grid[0] - known["LINEARS"]
    units = shrinkers // known["PARTS"]
    counters = batch.keep(torch.zeros(columns // BN + units, dtype=torch.int32, device=x.device))
    totals = batch.keep(torch.zeros(2, dtype=torch.int64, device=x.device))
    size = units * known["BR"] * tokens
    scratch = batch.workspace(size * (1 + known["PARTS"]))
    z, sums = scratch[:size].view(pool.dtype), scratch[size:]
    a, b = layers(pool.a[name]), layers(pool.b[name])
    routes = [argument(tensor) for tensor in (batch.state, batch.routes[tokens], batch.counts[tokens], batch.perm)]
    places = [argument(tensor) for tensor in (*counters.split((columns // BN, units)), *totals.split(1))]
    z, sums = argument(z), argument(sums)

    def start_it(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, layer: int) -> None:
        planes = torch.empty((columns // BN) * split if split > 1 else 0, tokens, BN, dtype=torch.float32, device=x.device)
        given = [argument(tensor) for tensor in (x, weight, bias, y)]
        start(*given, a[layer], b[layer], z, sums, argument(planes), *places, *routes, len(x), shrinkers, columns, pool.rows)

    return start_it

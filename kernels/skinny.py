"""Linear layers of few rows, y = x W^T + bias for up to 64 rows, where they beat the vendor's library.

With so few rows a layer takes as long as its weights take to arrive. The weights are the left operand of the tensor cores,
64 of their rows a program, and the rows of x the narrow right one, padded to 16, 32 or 64; long sums are cut into parts so
that the programs are at least two for each multiprocessor, or all blocks are shared evenly (`few_rows_shared`); and with
dependent launch a program may fetch the first blocks of its weights while the kernel before still runs. gate and up can end
as silu(gate) * up. Results do not depend on timing. It knows shapes, no layer.

Weights must be complete before the first launch of a chain of such kernels, x only when its own kernel has ended. What was
not measured, or lost, goes to torch.
"""

from __future__ import annotations

from kernels.target import has_dependent_launch, processors  # isort: skip  (before triton)

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.nn import functional

from kernels.dependent import all_stored, fetch, trigger, wait
from kernels.launch import Launch, argument, room
from kernels.linear_tiles import Tile, bucket_of, measured_tile
from kernels.pointwise import silu_mul

BN = 64
"""Rows of W a program."""
BK = 128
"""Columns of W in one step of a program's loop."""
LINE = tl.constexpr(64)
"""16-bit numbers of a cache line."""


@triton.jit
def _weights(at, k, i, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """Block i [BN, BK] of a program's part of W."""
    if EVEN:
        return tl.load(at + i * BK)
    return tl.load(at + i * BK, mask=(k + i * BK < K)[None, :], other=0.0)


@triton.jit
def _rows(at, live, k, i, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """Block i of a program's part of x, transposed: [BK, TOKENS]."""
    return tl.trans(tl.load(at + i * BK, mask=live if EVEN else live & (k + i * BK < K)[None, :], other=0.0))


@triton.jit
def dot(w, x, acc, IEEE: tl.constexpr):
    """acc + w x in float32; true float32 products for float32 operands (tests), tensor cores otherwise."""
    return tl.dot(w, x, acc, input_precision="ieee" if IEEE else None)


@triton.jit
def partial_sums(
    w_rows, x_rows, live, start, K: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr, FETCHED: tl.constexpr, PDL: tl.constexpr,
    IEEE: tl.constexpr, LATE: tl.constexpr = False,
):  # fmt: skip
    """float32 [BN, TOKENS]: a program's rows of W with x over one of SPLIT parts of K, at column `start`.

    w_rows [BN], x_rows [TOKENS]: where the rows begin. Waits for the kernel before with HELD or FETCHED blocks under way;
    LATE: then triggers.
    """
    NK: tl.constexpr = (K + SPLIT * BK - 1) // (SPLIT * BK)
    EVEN: tl.constexpr = K % (SPLIT * BK) == 0
    k = start + tl.arange(0, BK)
    w_at = w_rows[:, None] + k[None, :]
    x_at = x_rows[:, None] + k[None, :]
    if HELD > 0:
        w0 = _weights(w_at, k, 0, K, BK, EVEN)
    if HELD > 1:
        w1 = _weights(w_at, k, 1, K, BK, EVEN)
    if HELD > 2:
        w2 = _weights(w_at, k, 2, K, BK, EVEN)
    if PDL:
        for i in tl.static_range(min(FETCHED, NK)):
            lines = start + i * BK + tl.arange(0, BK // LINE) * LINE
            fetch(w_rows[:, None] + tl.minimum(lines, K - 1)[None, :])  # a last part may have fewer columns, or none
        wait()
        if LATE:
            trigger()
    acc = tl.zeros([BN, TOKENS], tl.float32)
    for i in tl.range(HELD, NK, num_stages=STAGES):
        acc = dot(_weights(w_at, k, i, K, BK, EVEN), _rows(x_at, live, k, i, K, BK, EVEN), acc, IEEE)
    if HELD > 0:  # after the loop, whose loads are then under way
        acc = dot(w0, _rows(x_at, live, k, 0, K, BK, EVEN), acc, IEEE)
    if HELD > 1:
        acc = dot(w1, _rows(x_at, live, k, 1, K, BK, EVEN), acc, IEEE)
    if HELD > 2:
        acc = dot(w2, _rows(x_at, live, k, 2, K, BK, EVEN), acc, IEEE)
    return acc


@triton.jit
def _lines(tile, columns, BN: tl.constexpr, GATED: tl.constexpr):
    """int32 [BN]: rows of W of a tile; gate and up of a column side by side where they end as one."""
    r = tl.arange(0, BN)
    if GATED:
        return (r % 2) * (columns // 2) + tile * (BN // 2) + r // 2
    return tile * BN + r


@triton.jit
def _finish(y, value, token, live, bias, tile, columns, BN: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr):
    """A tile's sums float32 [TOKENS, BN] to rows `token` of y: as they are, or as silu(gate) * up, rounded as apart."""
    n = _lines(tile, columns, BN, GATED)
    if BIAS:
        value += tl.load(bias + tl.minimum(n, columns - 1)).to(tl.float32)[None, :]
    value = value.to(y.dtype.element_ty)
    if GATED:
        gate, up = tl.split(tl.reshape(value, [value.shape[0], BN // 2, 2]))
        wide = gate.to(tl.float32)
        act = (wide / (1.0 + tl.exp(-wide))).to(value.dtype).to(tl.float32)
        value = (act * up.to(tl.float32)).to(value.dtype)
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
        columns = columns // 2
    tl.store(y + token.to(tl.int64)[:, None] * columns + n[None, :], value, mask=live & (n < columns)[None, :])


@triton.jit
def finish(
    acc, y, m, token, live, bias, planes, counters, part, tile, columns,
    TOKENS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """A program's sums [BN, TOKENS] of a tile to y, rows `token`; of SPLIT parts the last of a tile to come adds all.

    planes float32 [columns / BN, SPLIT, TOKENS, BN]; counters int32 [columns / BN], zero before and after. The parts are
    added in their order, so that the result does not depend on who was last.
    """
    value = tl.trans(acc)
    if SPLIT == 1:
        _finish(y, value, token, live, bias, tile, columns, BN, BIAS, GATED)
    else:
        at = planes + tile.to(tl.int64) * (SPLIT * TOKENS * BN) + m[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(at + part * (TOKENS * BN), value, mask=live)
        all_stored()  # every thread's stores come before the one thread's release
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(counters + tile, 0)
            total = tl.load(at, mask=live, other=0.0, cache_modifier=".cg")
            for s in tl.static_range(1, SPLIT):
                total += tl.load(at + s * (TOKENS * BN), mask=live, other=0.0, cache_modifier=".cg")
            _finish(y, total, token, live, bias, tile, columns, BN, BIAS, GATED)


@triton.jit(do_not_specialize=["rows"])
def few_rows(
    x, w, bias, y, planes, counters, rows, columns,
    XS: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, HELD: tl.constexpr, FETCHED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """y [rows, columns] = x [rows, K] w [columns, K]^T + bias; grid (SPLIT, columns / BN). XS: from row to row of x.

    GATED: y [rows, columns / 2], `_finish`. planes, counters: of `finish`. LATE: see `run`.
    """
    if PDL and not LATE:
        trigger()
    part = tl.program_id(0)
    tile = tl.program_id(1)
    n = _lines(tile, columns, BN, GATED)
    m = tl.arange(0, TOKENS)
    live = (m < rows)[:, None]
    start = part * ((K + SPLIT * BK - 1) // (SPLIT * BK) * BK)
    w_rows = w + tl.minimum(n, columns - 1).to(tl.int64) * K
    acc = partial_sums(w_rows, x + m * XS, live, start, K, TOKENS,
                       BN, BK, SPLIT, STAGES, HELD, FETCHED, PDL, IEEE, LATE)  # fmt: skip
    finish(acc, y, m, m, live, bias, planes, counters, part, tile, columns, TOKENS, BN, SPLIT, BIAS, GATED)


@triton.jit
def _meet(
    value, m, live, planes, counters, y, bias, tile, first, last, program, columns,
    TOKENS: tl.constexpr, BN: tl.constexpr, MOST: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One program's part `value` of a tile that programs first .. last share: the last to come adds all, in their order.

    A program leaves its part in its plane 1 if the tile begins there, else in its plane 0.
    """
    at = m[:, None] * BN + tl.arange(0, BN)[None, :]
    came = tl.atomic_add(counters + tile, 0, sem="acquire")
    if came != last - first:
        mine = (program * 2 + (program == first)).to(tl.int64) * (TOKENS * BN)
        tl.store(planes + mine + at, value, mask=live)
        all_stored()  # every thread's stores come before the one thread's release
        came = tl.atomic_add(counters + tile, 1, sem="acq_rel")
    if came == last - first:
        tl.store(counters + tile, 0)
        total = tl.zeros([TOKENS, BN], tl.float32)
        for s in tl.static_range(MOST):
            other = first + s
            plane = (other * 2 + (s == 0)).to(tl.int64) * (TOKENS * BN)
            there = live & (other <= last) & (other != program)
            part = tl.load(planes + plane + at, mask=there, other=0.0, cache_modifier=".cg")
            total += tl.where(other == program, value, part)
        _finish(y, total, m, live, bias, tile, columns, BN, BIAS, GATED)


@triton.jit(do_not_specialize=["rows"])
def few_rows_shared(
    x, w, bias, y, planes, counters, rows, columns,
    XS: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    PROGRAMS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """`few_rows` with the BLOCKS blocks of all tiles laid end to end and shared evenly among PROGRAMS programs.

    All programs then end together, and none waits for its first weights but once (the schedule of Stream-K, Osama et al.,
    PPoPP 2023). planes float32 [PROGRAMS, 2, TOKENS, BN]; counters as for `few_rows`.
    """
    if PDL and not LATE:
        trigger()
    NK: tl.constexpr = (K + BK - 1) // BK
    EVEN: tl.constexpr = K % BK == 0
    LONGEST: tl.constexpr = (BLOCKS + PROGRAMS - 1) // PROGRAMS
    MOST: tl.constexpr = (NK - 1) // (BLOCKS // PROGRAMS) + 2
    program = tl.program_id(0)
    start = (BLOCKS * program) // PROGRAMS
    end = (BLOCKS * (program + 1)) // PROGRAMS
    m = tl.arange(0, TOKENS)
    k = tl.arange(0, BK)
    live = (m < rows)[:, None]
    x_at = x + m[:, None] * XS + k[None, :]
    if PDL:
        wait()
        if LATE:
            trigger()
    acc = tl.zeros([BN, TOKENS], tl.float32)
    for step in tl.range(LONGEST, num_stages=STAGES):
        u = tl.minimum(start + step, end - 1)  # the last step of a shorter share comes to nothing
        tile = u // NK
        i = u - tile * NK
        n = tl.minimum(_lines(tile, columns, BN, GATED), columns - 1)
        w_at = w + n.to(tl.int64)[:, None] * K + k[None, :]
        acc = dot(_weights(w_at, k, i, K, BK, EVEN), _rows(x_at, live, k, i, K, BK, EVEN), acc, IEEE)
        if (start + step == u) & ((i == NK - 1) | (u == end - 1)):
            first = ((tile * NK + 1) * PROGRAMS - 1) // BLOCKS
            last = ((tile * NK + NK) * PROGRAMS - 1) // BLOCKS
            value = tl.trans(acc)
            if first == last:
                _finish(y, value, m, live, bias, tile, columns, BN, BIAS, GATED)
            else:
                _meet(value, m, live, planes, counters, y, bias, tile, first, last, program, columns, TOKENS, BN, MOST,
                      BIAS, GATED)
            acc = tl.zeros([BN, TOKENS], tl.float32)


_PLANS: dict[tuple, Callable] = {}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] weight [columns, K]^T + bias, as torch.nn.functional.linear, by the faster of the two ways.

    The kernel keeps no gradients. It is safe in a capture once the same shape, with rows of the same bucket, has run outside
    of one (else RuntimeError), and not on two streams at once, which would share counters.
    """
    tile = tile_for(x, weight)
    return run(x, weight, bias, tile) if tile else functional.linear(x, weight, bias)


def gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [rows, I], where weight [2 I, K] holds gate above up; one kernel where `linear` has one.

    Rounded where `pointwise.silu_mul` behind a linear rounds. Of captures and streams see `linear`.
    """
    tile = tile_for(x, weight)
    return run(x, weight, None, tile, gate=True) if tile else silu_mul(functional.linear(x, weight))


def tile_for(x: torch.Tensor, weight: torch.Tensor, *, branched: bool = False) -> Tile | None:
    """None: torch's, for what the kernel does not take or was not measured with. branched: with LoRA branches behind it."""
    return measured_tile(len(x), *weight.shape, x.dtype, branched=branched) if fits(x, weight) else None


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels can read them: on a GPU, of one type, rows that start on 16 bytes."""
    if not x.is_cuda or x.ndim != 2 or x.dtype != weight.dtype:
        return False
    aligned = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and x.stride(1) == 1 and weight.is_contiguous()


def aligned_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The bias on 16 bytes, as the kernels read it; without one x, which nobody then reads as a bias."""
    if bias is None:
        return x
    return bias.clone() if bias.data_ptr() % 16 else bias


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile, *, gate: bool = False,
        late: bool = False) -> torch.Tensor:  # fmt: skip
    """`linear`, or `gated`, by the kernel with the given tile, for up to 64 rows. x and weight rows start on 16 bytes.

    late: a kernel behind it with dependent launch starts when x is complete, not sooner, and may read x, past L1, before it
    waits for y.
    """
    rows, (columns, depth) = len(x), weight.shape
    tokens = bucket_of(rows)
    key = (tile, tokens, columns, depth, x.stride(0), x.dtype, bias is None, gate, late, x.device)
    plan = _PLANS.get(key)
    if plan is None:
        launch = launch_of(columns, depth, x.stride(0), tokens, tile, x.dtype, bias=bias is not None, gate=gate, late=late)
        plan = _PLANS[key] = _plan(x, columns, launch)
    y = torch.empty(rows, columns // 2 if gate else columns, dtype=x.dtype, device=x.device)
    plan(x, weight, aligned_bias(x, bias), y)
    return y


def launch_of(columns: int, depth: int, stride: int, tokens: int, tile: Tile, dtype: torch.dtype, *, bias: bool = False,
              gate: bool = False, late: bool = False) -> Launch:  # fmt: skip
    """The kernel for W [columns, depth] and rows of x `stride` apart, padded to `tokens`."""
    constants = {
        "XS": stride, "K": depth, "TOKENS": tokens, "BN": BN, "BK": BK, "STAGES": tile.stages, "BIAS": bias, "GATED": gate,
        "LATE": late, "PDL": has_dependent_launch(), "IEEE": dtype is torch.float32,
    }  # fmt: skip
    types = dict.fromkeys(("x", "w", "bias", "y"), dtype)
    types |= {"planes": torch.float32, "counters": torch.int32, "rows": 1, "columns": 16 if columns % 16 == 0 else 8}
    tiles, blocks = -(-columns // BN), -(-depth // BK)
    if tile.shared:
        programs = min(tile.shared * processors(), tiles * blocks)
        constants |= {"BLOCKS": tiles * blocks, "PROGRAMS": programs}
        return Launch(few_rows_shared, (programs, 1), constants, types, shared_bytes=room(tile.residents, programs))
    constants |= {"SPLIT": tile.split, "HELD": min(tile.held, -(-depth // (tile.split * BK))), "FETCHED": tile.fetched}
    return Launch(few_rows, (tile.split, tiles), constants, types, shared_bytes=room(tile.residents, tile.split * tiles))


def _plan(x: torch.Tensor, columns: int, launch: Launch) -> Callable:
    """A launch over `columns` rows of weights as a function of (x, weight, bias, y), with counters of its own."""
    known = launch.constants
    tokens = known["TOKENS"]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{tokens} rows and {columns} x {known['K']} weights have not met yet; run it once, then capture")
    start, tiles = launch.bind(x.device), -(-columns // BN)
    parts = 2 * known["PROGRAMS"] if "PROGRAMS" in known else tiles * known["SPLIT"] if known["SPLIT"] > 1 else 0
    counters = torch.zeros(tiles, dtype=torch.int32, device=x.device)

    def start_it(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor) -> None:
        planes = torch.empty(parts, tokens, BN, dtype=torch.float32, device=x.device)
        pointers = [argument(tensor) for tensor in (x, weight, bias, y, planes, counters)]
        start(*pointers, len(x), columns)

    return start_it

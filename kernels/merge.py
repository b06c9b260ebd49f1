"""The swift switch: fold one adapter into the weights of every layer and projection, or out of them, in one launch.

Two forms (`WeightSwitch.form`):
* `golden`: W = round(golden + s B A) from a pristine copy of the weights. Restoring is a copy, bit for bit the
  original after any number of switches; a change from adapter m to n is one read and one write like any other switch.
* `in_place`: W = round(round(W - s_m B_m A_m) + s_n B_n A_n), for GPUs with no room for a copy. Every switch rounds
  once more, so the weights drift; `python -m kernels.switch_bench` measures by how much. The inner rounding costs no
  traffic and matters: a restore undoes most of the error of its merge, while rounding only the sum walks away (1,000
  changes over 8 adapters in bf16: 0.4 % of mean |W| against 14 %).

After VaLoRA (EuroSys 2025), the swift mode switch: only the factors are kept and the deltas of all layers come from one
pass. Simplified: the deltas never exist in memory, each tile is formed in registers while its weights stream by.

It knows nothing of models, layers or requests: it sees a list of matrices and, for each slot, a list of factors.
"""

from __future__ import annotations

import kernels.target  # isort: skip  # noqa: F401  (before triton: it may choose the interpreter)

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.batch import MAX_RANK, Key, LoraPool

NO_SLOT = -1
"""The slot that stands for the plain weights."""

FORMS = ("golden", "in_place")
TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
VECTOR = 8  # elements: rows of any supported type then start on 16-byte boundaries


class SwitchError(ValueError):
    """A matrix, a factor or a slot that cannot be switched. The message names it and the way out."""


class Factors(NamedTuple):
    """The LoRA factors of one matrix: delta = scale * b^T a, with a [rank, d_in] and b [rank, d_out].

    Their rows are contiguous and may lie apart, as in the views of a pool.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0


class Tile(NamedTuple):
    """How one program walks the weights: `steps` tiles of [rows, columns] along a strip of rows."""

    rows: int
    columns: int
    steps: int
    stages: int
    warps: int


TILES = {
    (16, False): Tile(64, 128, 8, 4, 8),
    (32, False): Tile(64, 128, 8, 4, 8),
    (64, False): Tile(64, 128, 32, 3, 8),
    (128, False): Tile(128, 128, 32, 3, 8),
    (256, False): Tile(128, 64, 64, 3, 8),
    (16, True): Tile(64, 128, 32, 4, 4),
    (32, True): Tile(64, 128, 32, 3, 4),
    (64, True): Tile(128, 128, 32, 3, 8),
    (128, True): Tile(128, 64, 16, 3, 8),
}
"""(padded rank, whether another adapter is subtracted in the same pass) -> tile: the fastest of `switch_bench --sweep`
on an H200 in bf16. (256, True) is missing since a restore and a merge take less (7.4 ms against 8.6)."""


def shared_bytes(tile: Tile, rank: int, subtracts: bool, itemsize: int) -> int:
    """Shared memory of one program: the weights' and A's tiles of every stage, and B's, once per adapter."""
    ranks = rank * (2 if subtracts else 1)
    return itemsize * (tile.stages * tile.columns * (tile.rows + ranks) + ranks * tile.rows)


def fitted(tile: Tile, rank: int, subtracts: bool, itemsize: int, limit_bytes: int) -> Tile:
    """`tile`, made smaller until it fits (float32, or a GPU with less shared memory than the one it was found on)."""
    while shared_bytes(tile, rank, subtracts, itemsize) > limit_bytes:
        if tile.stages > 2:
            tile = tile._replace(stages=2)
        elif tile.columns > 32:
            tile = tile._replace(columns=tile.columns // 2, steps=tile.steps * 2)
        elif tile.rows > 16:
            tile = tile._replace(rows=tile.rows // 2)
        else:
            raise SwitchError(f"rank {rank} needs more than the {limit_bytes} bytes of shared memory of this GPU")
    return tile


@triton.jit
def _factors(
    factors_ptr, strides_ptr, scales_ptr, pair, rank, rows, d_out, DTYPE: tl.constexpr, RANK: tl.constexpr,
):
    """Of one adapter in one matrix: where a starts, its row stride, b's columns of this strip transposed, the scale."""
    a = tl.multiple_of(tl.load(factors_ptr + pair * 2).to(tl.pointer_type(DTYPE)), 16)
    b = tl.multiple_of(tl.load(factors_ptr + pair * 2 + 1).to(tl.pointer_type(DTYPE)), 16)
    stride_a = tl.multiple_of(tl.load(strides_ptr + pair * 2), 8)
    stride_b = tl.multiple_of(tl.load(strides_ptr + pair * 2 + 1), 8)
    ks = tl.arange(0, RANK)
    inside = (ks[:, None] < rank) & (rows[None, :] < d_out)
    b_part = tl.load(b + ks[:, None] * stride_b + rows[None, :], mask=inside, other=0.0)
    return a, stride_a, tl.trans(b_part), tl.load(scales_ptr + pair)


@triton.jit
def _delta(a, stride_a, b_transposed, scale, rank, columns, d_in, RANK: tl.constexpr):
    """scale * b^T a of one tile, float32."""
    ks = tl.arange(0, RANK)
    inside = (ks[:, None] < rank) & (columns[None, :] < d_in)
    a_part = tl.load(a + ks[:, None] * stride_a + columns[None, :], mask=inside, other=0.0)
    return scale * tl.dot(b_transposed, a_part, input_precision="ieee")


@triton.jit(do_not_specialize=["entries", "plus", "minus"])
def switch_kernel(
    weights_ptr, shapes_ptr, factors_ptr, strides_ptr, ranks_ptr, scales_ptr, items_ptr, entries, plus, minus,
    DTYPE: tl.constexpr, GOLDEN: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):
    """One strip of one matrix. PLUS and MINUS say whether slots `plus` and `minus` hold an adapter at all."""
    item = tl.program_id(0)
    entry = tl.load(items_ptr + item * 3)
    row = tl.multiple_of(tl.load(items_ptr + item * 3 + 1), 16)
    column = tl.multiple_of(tl.load(items_ptr + item * 3 + 2), 16)
    rank_plus = 0
    rank_minus = 0
    if PLUS:
        rank_plus = tl.load(ranks_ptr + plus * entries + entry)
    if MINUS:
        rank_minus = tl.load(ranks_ptr + minus * entries + entry)
    if rank_plus + rank_minus == 0:  # neither adapter touches this matrix: it already is what it shall be
        return
    d_out = tl.multiple_of(tl.load(shapes_ptr + entry * 2), 8)  # unless this is known, no load is a vector
    d_in = tl.multiple_of(tl.load(shapes_ptr + entry * 2 + 1), 8)
    weight = tl.multiple_of(tl.load(weights_ptr + entry * 2).to(tl.pointer_type(DTYPE)), 16)
    source = weight
    if GOLDEN:
        source = tl.multiple_of(tl.load(weights_ptr + entry * 2 + 1).to(tl.pointer_type(DTYPE)), 16)

    rows = row + tl.arange(0, ROWS)
    offsets = rows.to(tl.int64)[:, None] * d_in
    if PLUS:
        a_plus, stride_plus, b_plus, scale_plus = _factors(
            factors_ptr, strides_ptr, scales_ptr, plus * entries + entry, rank_plus, rows, d_out, DTYPE, RANK
        )
    if MINUS and not GOLDEN:
        a_minus, stride_minus, b_minus, scale_minus = _factors(
            factors_ptr, strides_ptr, scales_ptr, minus * entries + entry, rank_minus, rows, d_out, DTYPE, RANK
        )

    for step in tl.range(STEPS, num_stages=STAGES):
        columns = column + step * COLUMNS + tl.arange(0, COLUMNS)
        tile = (rows[:, None] < d_out) & (columns[None, :] < d_in)
        here = offsets + columns[None, :]
        total = tl.load(source + here, mask=tile, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if MINUS and not GOLDEN:
            total -= _delta(a_minus, stride_minus, b_minus, scale_minus, rank_minus, columns, d_in, RANK)
            total = total.to(DTYPE).to(tl.float32)  # as a restore would: its error cancels that of the merge before it
        if PLUS:
            total += _delta(a_plus, stride_plus, b_plus, scale_plus, rank_plus, columns, d_in, RANK)
        tl.store(weight + here, total.to(DTYPE), mask=tile, eviction_policy="evict_first")


class WeightSwitch:
    """The matrices that adapters fold into, the factors of each adapter slot, and which slot is folded in now.

    weights: matrices [d_out, d_in] (widths may differ), contiguous, on one device, of one dtype, holding the plain
    weights. golden: their pristine copies, in the same order; cloned here when absent; none are kept in the `in_place`
    form. `merged` is the slot that is folded in, NO_SLOT at first. Raises SwitchError on what cannot be switched.
    Once a slot and its tile were used, `to` neither allocates nor synchronises, so it may be captured in a CUDA graph;
    a replay repeats the same change, so it belongs to the caller to keep `merged` true then.
    """

    def __init__(self, weights: Sequence[torch.Tensor], *, golden: Sequence[torch.Tensor] | None = None,
                 slots: int = 64, form: str = "golden"):
        if form not in FORMS:
            raise SwitchError(f"unknown form {form!r}; the forms are {', '.join(FORMS)}")
        if form == "in_place" and golden is not None:
            raise SwitchError("the in_place form keeps no golden copy; leave golden out or choose form='golden'")
        if not weights or slots < 1:
            raise SwitchError(f"{len(weights)} matrices and {slots} slots: there must be at least one of each")
        self.form, self.slots, self.merged = form, slots, NO_SLOT
        self.weights = list(weights)
        self._check_weights(self.weights, "weight")
        self._widest = max(weight.shape[1] for weight in self.weights)
        self.golden = []
        if form == "golden":
            self.golden = [w.clone() for w in self.weights] if golden is None else list(golden)
            self._check_golden()
        device, entries = self.weights[0].device, len(self.weights)
        sources = self.golden or self.weights
        addresses = [[w.data_ptr(), g.data_ptr()] for w, g in zip(self.weights, sources, strict=True)]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._shapes = torch.tensor([list(w.shape) for w in self.weights], dtype=torch.int32, device=device)
        self._factors = torch.zeros((slots, entries, 2), dtype=torch.int64, device=device)
        self._strides = torch.zeros((slots, entries, 2), dtype=torch.int32, device=device)
        self._ranks = torch.zeros((slots, entries), dtype=torch.int32, device=device)
        self._scales = torch.zeros((slots, entries), dtype=torch.float32, device=device)
        self._kept: dict[int, list[Factors | None]] = {}
        self._rank_of: dict[int, int] = {}  # of each slot that holds an adapter, the largest of its ranks
        self._pool: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._items: dict[Tile, torch.Tensor] = {}

    def register(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """Put an adapter into `slot`: the factors of every matrix in order, None where it has none.

        The tensors are used where they lie (as views of a pool, say) and may be overwritten in place while their slot
        is not merged. Raises SwitchError for a wrong slot, shape, dtype or rank, and when the slot is merged now.
        """
        self._check_free(slot)
        if len(factors) != len(self.weights):
            raise SwitchError(f"slot {slot}: {len(factors)} factors for {len(self.weights)} matrices")
        for entry, (weight, pair) in enumerate(zip(self.weights, factors, strict=True)):
            if pair is not None:
                _check_factors(slot, entry, weight, pair)
        self._kept[slot] = list(factors)
        self._rank_of[slot] = max((f.a.shape[0] for f in factors if f is not None), default=1)
        rows = [(f.a.data_ptr(), f.b.data_ptr()) if f is not None else (0, 0) for f in factors]
        self._factors[slot].copy_(torch.tensor(rows, dtype=torch.int64))
        strides = [(f.a.stride(0), f.b.stride(0)) if f is not None else (0, 0) for f in factors]
        self._strides[slot].copy_(torch.tensor(strides, dtype=torch.int32))
        ranks = [f.a.shape[0] if f is not None else 0 for f in factors]
        self._ranks[slot].copy_(torch.tensor(ranks, dtype=torch.int32))
        self._scales[slot].copy_(torch.tensor([f.scale if f is not None else 0.0 for f in factors]))

    def attach(self, pool: LoraPool, keys: Sequence[Key]) -> None:
        """Adapters may lie in this pool from now on (`place`): for each key, each slice of it is one matrix, in order.
        Raises SwitchError where the pool does not fit the matrices."""
        pairs = [
            Factors(pool.a[name][layer, s, :1], b, 1.0) for layer, name in keys
            for s, b in enumerate(pool.b[name][layer, :1].split(pool.projections[name].widths, dim=1))
        ]  # fmt: skip
        if len(pairs) != len(self.weights):
            raise SwitchError(f"a pool with {len(pairs)} pairs of factors for {len(self.weights)} matrices")
        for entry, (weight, pair) in enumerate(zip(self.weights, pairs, strict=True)):
            _check_factors(NO_SLOT, entry, weight, pair)
        strides = torch.tensor([[f.a.stride(0), f.b.stride(0)] for f in pairs])
        rows = torch.tensor([[f.a.data_ptr(), f.b.data_ptr()] for f in pairs])
        device = self.weights[0].device
        self._pool = (rows.to(device), (strides * pool.dtype.itemsize).to(device), strides.to(device, torch.int32))

    def place(self, slot: int, first_row: int, rank: int, scale: float) -> None:
        """Put the adapter with `rank` rows from `first_row` on of the attached pool into `slot`: as `register`
        with the pool's views, but in a few small kernels instead of milliseconds of the host. Raises SwitchError too."""
        self._check_free(slot)
        if self._pool is None or not 1 <= rank <= MAX_RANK:
            raise SwitchError(f"slot {slot}: rank {rank} is outside 1..{MAX_RANK}, or there is no pool; attach one first")
        rows, pitches, strides = self._pool
        torch.add(rows, pitches, alpha=first_row, out=self._factors[slot])
        self._strides[slot].copy_(strides)
        self._ranks[slot].fill_(rank)
        self._scales[slot].fill_(scale)
        self._kept.pop(slot, None)
        self._rank_of[slot] = rank

    def to(self, slot: int) -> None:
        """Make the weights those of `slot` (NO_SLOT: the plain ones), whatever they hold now; see `passes`."""
        if slot != NO_SLOT:
            self._check_slot(slot)
            if slot not in self._rank_of:
                raise SwitchError(f"slot {slot} holds no adapter; register one first")
        if slot == self.merged:
            return
        for plus, minus in self.passes(slot, self.merged):
            self.launch(plus, minus, self.tile(plus, minus))
            self.merged = plus  # between two passes the weights are plain, and the second may fail

    def passes(self, plus: int, minus: int) -> list[tuple[int, int]]:
        """(plus, minus) of each launch of a change: one, but two for ranks over 128 in place, to the same bits."""
        if (self._padded_rank(plus, minus), self._subtracts(plus, minus)) in TILES:
            return [(plus, minus)]
        return [(NO_SLOT, minus), (plus, NO_SLOT)]

    def tile(self, plus: int, minus: int) -> Tile:
        """The tile of one launch, of no more steps than the widest matrix has."""
        rank, subtracts = self._padded_rank(plus, minus), self._subtracts(plus, minus)
        first, tile = self.weights[0], TILES[rank, subtracts]
        if first.is_cuda:
            limit_bytes = torch.cuda.get_device_properties(first.device).shared_memory_per_block_optin
            tile = fitted(tile, rank, subtracts, first.itemsize, limit_bytes)
        return tile._replace(steps=min(tile.steps, -(-self._widest // tile.columns)))

    def _subtracts(self, plus: int, minus: int) -> bool:
        return self.form == "in_place" and NO_SLOT not in (plus, minus)

    def moved_bytes(self, plus: int, minus: int) -> int:
        """Bytes that a change from `minus` to `plus`, which were registered, must move at least: every touched matrix read
        and written once, the factors read once."""
        total = 0
        used = [self._kept.get(plus), self._kept.get(minus)]
        for entry, weight in enumerate(self.weights):
            pairs = [kept[entry] if kept is not None else None for kept in used]
            if any(pair is not None for pair in pairs):
                total += 2 * weight.nbytes
                read = pairs if self.form == "in_place" else pairs[:1]
                total += sum(pair.a.nbytes + pair.b.nbytes for pair in read if pair is not None)
        return total

    def launch(self, plus: int, minus: int, tile: Tile) -> None:
        """Run the change from slot `minus` to slot `plus` with `tile`; `to` does it with the right ones."""
        grid, args, options = self.arguments(plus, minus, tile)
        with torch.cuda.device_of(args[0]):
            switch_kernel[grid](*args, **options)

    def arguments(self, plus: int, minus: int, tile: Tile) -> tuple[tuple[int], tuple, dict]:
        """Grid, arguments and options of the launch that `launch` makes."""
        items = self._items.get(tile)
        if items is None:
            items = self._items[tile] = _strips(self.weights, tile).to(self.weights[0].device)
        args = (self._addresses, self._shapes, self._factors, self._strides, self._ranks, self._scales, items,
                len(self.weights), plus, minus)
        options = {
            "DTYPE": TRITON_TYPES[self.weights[0].dtype], "GOLDEN": self.form == "golden", "PLUS": plus != NO_SLOT,
            "MINUS": minus != NO_SLOT, "RANK": self._padded_rank(plus, minus), "ROWS": tile.rows,
            "COLUMNS": tile.columns, "STEPS": tile.steps, "STAGES": tile.stages, "num_warps": tile.warps,
        }
        return (len(items),), args, options

    def _padded_rank(self, plus: int, minus: int) -> int:
        used = (plus, minus) if self.form == "in_place" else (plus,)
        return max(16, triton.next_power_of_2(max(self._rank_of.get(slot, 1) for slot in used)))

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise SwitchError(f"slot {slot} is outside 0..{self.slots - 1}; make the switch with more slots")

    def _check_free(self, slot: int) -> None:
        self._check_slot(slot)
        if slot == self.merged:
            raise SwitchError(f"slot {slot} is merged into the weights; switch to another before it is replaced")

    def _check_weights(self, matrices: Sequence[torch.Tensor], what: str) -> None:
        first = self.weights[0]
        if first.dtype not in TRITON_TYPES:
            raise SwitchError(f"weights are {first.dtype}; supported are {', '.join(map(str, TRITON_TYPES))}")
        for i, w in enumerate(matrices):
            aligned = w.dim() == 2 and w.is_contiguous() and w.data_ptr() % 16 == 0
            if not aligned or w.shape[0] % VECTOR or w.shape[1] % VECTOR:
                raise SwitchError(f"{what} {i} has shape {tuple(w.shape)} and strides {w.stride()}: it must be a "
                                  f"contiguous matrix on a 16-byte boundary, both sides multiples of {VECTOR}")
            if w.dtype != first.dtype or w.device != first.device:
                raise SwitchError(f"{what} {i} is {w.dtype} on {w.device}, weight 0 is {first.dtype} on "
                                  f"{first.device}; one switch holds one dtype on one device")

    def _check_golden(self) -> None:
        if len(self.golden) != len(self.weights):
            raise SwitchError(f"{len(self.golden)} golden copies for {len(self.weights)} matrices")
        self._check_weights(self.golden, "golden copy")
        for i, (w, g) in enumerate(zip(self.weights, self.golden, strict=True)):
            if g.shape != w.shape or g.data_ptr() == w.data_ptr():
                raise SwitchError(f"golden copy {i} must be another tensor of shape {tuple(w.shape)}, not of shape "
                                  f"{tuple(g.shape)} or the weight itself")


def _check_factors(slot: int, entry: int, weight: torch.Tensor, pair: Factors) -> None:
    rank = pair.a.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise SwitchError(f"slot {slot}, matrix {entry}: rank {rank} is outside 1..{MAX_RANK}")
    for name, tensor, shape in (("a", pair.a, (rank, weight.shape[1])), ("b", pair.b, (rank, weight.shape[0]))):
        aligned = tensor.stride(-1) == 1 and tensor.stride(0) % VECTOR == 0 and tensor.data_ptr() % 16 == 0
        if tuple(tensor.shape) != shape or not aligned:
            raise SwitchError(f"slot {slot}, matrix {entry}: {name} has shape {tuple(tensor.shape)}, strides "
                              f"{tensor.stride()}; it must be {shape} with contiguous rows on 16-byte boundaries")
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise SwitchError(f"slot {slot}, matrix {entry}: {name} is {tensor.dtype} on {tensor.device}, the weights "
                              f"are {weight.dtype} on {weight.device}; convert it first")


def _strips(weights: Sequence[torch.Tensor], tile: Tile) -> torch.Tensor:
    """int32 [strips, 3]: matrix, first row, first column. Neighbours share a strip of A, which then stays in the L2."""
    width = tile.columns * tile.steps
    parts = []
    for entry, weight in enumerate(weights):
        columns, rows = np.meshgrid(
            np.arange(0, weight.shape[1], width), np.arange(0, weight.shape[0], tile.rows), indexing="ij"
        )
        parts.append(np.stack([np.full(rows.size, entry), rows.ravel(), columns.ravel()], axis=1))
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))

"""The LoRA side of a step: the resident adapters, the operator that adds their branches, and the switch that folds one in.

Modes (VaLoRA section 4): base and merged add nothing; unmerged adds each row's own branch; mixture adds it and takes the
folded adapter's out. Slot number and adapter number are the same. It knows slots and rows, not requests.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch

from engine.decoder import ATTENTION, SLICES, Branch, Decoder, projections_of
from kernels.baselines import OPERATORS as RIVALS
from kernels.batch import RANK_ALIGN, Key, LoraBatch, LoraError, LoraPool
from kernels.merge import NO_SLOT, WeightSwitch
from policies.plan import MIXTURE, UNMERGED
from traces.request import Adapter

OPERATORS = ("atmm", *RIVALS, "reference", "none")
"""`reference` is plain torch in float32, what a CPU uses; `none` leaves the branch out (its cost is the yardstick)."""


def operator_of(asked: str | None, policy: str, device: torch.device) -> str:
    """The operator to run: what was asked for, else the policy's own; a CPU, where Triton is interpreted, takes `reference`.

    LoraError lists what there is.
    """
    name = asked or policy
    if name not in OPERATORS:
        raise LoraError(f"unknown operator {name!r}; there are {', '.join(OPERATORS)}")
    return "reference" if asked is None and name != "none" and device.type == "cpu" else name


class Lora:
    """Adapters of one engine.

    operator: of OPERATORS. targets: the projections that adapters may touch. merges: keep a pristine copy of their
    weights and a switch. max_tokens: rows of the largest step. rows: of the pool, None for all adapters at once. spare:
    adapters that may come later, of ranks up to the largest there is.
    """

    def __init__(self, decoder: Decoder, adapters: tuple[Adapter, ...], operator: str, *, merges: bool, max_tokens: int,
                 targets: tuple[str, ...] = ATTENTION, rows: int | None = None, spare: int = 0):
        shape, weight = decoder.shape, decoder.head
        if rows is None:
            rows = sum(padded_rank(adapter.rank) for adapter in adapters)
        slots = len(adapters) + spare
        self.operator = operator
        self.targets = targets
        self.pool = LoraPool(
            projections_of(shape, targets), layers=shape.layers, slots=max(1, slots), rows=max(RANK_ALIGN, rows),
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self._biased = ("qkv",) if decoder.layers[0].qkv_bias is not None else ()  # the other linears have none
        self._moved: set[int] = set()  # adapters that lie elsewhere than the switch believes
        padded = {padded_rank(adapter.rank) for adapter in adapters}
        self._ranks = sorted(padded)
        self.rank = max(padded, default=RANK_ALIGN)
        self.batch = LoraBatch(self.pool, max_tokens)
        self._op = _callable(operator)
        mixture = "reference" if weight.device.type == "cpu" else "atmm"
        self._mixture_op = self._op if operator in ("none", "atmm", "reference") else _callable(mixture)
        self._keys = [(layer, name) for layer in range(shape.layers) for name in targets]
        self.switch = None
        if merges and slots:
            parts = [part for key in self._keys for part in _slices(decoder, key)]
            self.switch = WeightSwitch(parts, slots=slots)
            self.switch.attach(self.pool, self._keys)

    # -- residents --------------------------------------------------------------------------------------------------
    def compact(self) -> None:
        """Move every resident down to the first free row, from the lowest up: all free rows end in one run behind them.
        Behind the steps under way, on their stream; no load may write meanwhile. Nothing is allocated: it cannot stop half
        way for lack of memory."""
        pool = self.pool
        for slot in sorted((slot for slot, rank in enumerate(pool.ranks) if rank), key=pool.offsets.__getitem__):
            before, rank, scale = pool.offsets[slot], pool.true_ranks[slot], pool.scales[slot]
            pool.release(slot)
            rows = pool.reserve(slot, rank, scale)
            if rows.start != before:
                self._moved.add(slot)
                self._move_down(before, rows)

    def _move_down(self, before: int, rows: slice) -> None:
        """The factors from row `before` on to `rows`, which begin lower, in pieces so short that none overlaps its copy."""
        gap = before - rows.start
        for start in range(rows.start, rows.stop, gap):
            to = slice(start, min(start + gap, rows.stop))
            source = slice(to.start + gap, to.stop + gap)
            for name in self.pool.projections:
                a, b = self.pool.a[name], self.pool.b[name]
                a[:, :, to] = a[:, :, source]
                b[:, to] = b[:, source]

    def installed(self, adapter: int) -> None:
        """The factors of `adapter` lie in the pool: make the switch know them, at once or, of one that was evicted while it
        was folded in and still is, when it is folded in the next time."""
        self._moved.discard(adapter)
        if adapter == self.folded >= 0:
            self._moved.add(adapter)
        elif self.switch is not None:
            pool = self.pool
            self.switch.place(adapter, pool.offsets[adapter], pool.true_ranks[adapter], pool.scales[adapter])

    def evict(self, adapter: int) -> None:
        """Give the rows of `adapter` back."""
        self._moved.discard(adapter)
        self.pool.release(adapter)

    def evict_all(self) -> None:
        """Fold nothing in, hold nothing."""
        self.fold(NO_SLOT)
        for adapter in [slot for slot, rank in enumerate(self.pool.ranks) if rank]:
            self.evict(adapter)

    @property
    def folded(self) -> int:
        """The adapter whose weights are folded in, -1 for none."""
        return self.switch.merged if self.switch is not None else -1

    def fold(self, adapter: int) -> None:
        """Make the weights those of `adapter` (-1: the plain ones); nothing if they are."""
        if self.switch is not None:
            if adapter in self._moved and adapter != self.switch.merged:
                self.installed(adapter)
            self.switch.to(adapter)

    # -- a step -----------------------------------------------------------------------------------------------------
    def branch(self, mode: int, merged: int, rows: np.ndarray) -> Branch | None:
        """The branch of one eager step: rows int32 [T] holds each row's adapter, -1 for none. None: nothing is added."""
        if mode not in (UNMERGED, MIXTURE) or self._op is None:
            return None
        folded = merged if mode == MIXTURE else -1
        if (rows == folded).all() if folded >= 0 else (rows < 0).all():
            return None
        op = self._mixture_op if folded >= 0 else self._op
        self.batch.update(rows, folded, route=op is not _reference)
        return self.bound(self.batch, mixture=folded >= 0)

    def bound(self, batch: LoraBatch, *, mixture: bool) -> Branch:
        """The branch over one batch object, as a graph captures it."""
        from kernels import atmm

        op, pool = self._mixture_op if mixture else self._op, self.pool

        def add(y: torch.Tensor, x: torch.Tensor, key: Key) -> None:
            op(y, x, pool, batch, key)

        def joined(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: Key) -> torch.Tensor:
            return atmm.linear(x, weight, bias, pool, batch, key)

        return Branch(add, pool.projections, joined if op is atmm.atmm else None)

    def compile(self, batches: list[LoraBatch]) -> None:
        """Compile, on all cores, what the operator will launch for batches of these shapes, where it can say so."""
        from kernels import atmm, precompile

        known = [batch for batch in batches if (self._mixture_op if batch.merged >= 0 else self._op) is atmm.atmm]
        launches = [launch for batch in known for name in self.pool.projections
                    for launch in atmm.launches(self.pool, batch, name, bias=name in self._biased)]  # fmt: skip
        precompile.make_ready(launches)

    def warm(self, *, mixture: bool, graphs: bool = False) -> None:
        """Run the switch, and operators that no graph has run (`graphs`: those that one can hold, have), once in the shapes
        that may come, on rows of zeros, so that none is compiled while the clock runs. No adapter may be resident."""
        captured = graphs and self.capturable(mixture=False)
        for rank in (rank for rank in self._ranks if rank <= self.pool.rows):
            self._warm_switch(rank)
            if self._op is not None and self._op is not _reference and not captured:
                self._warm_operators(rank, mixture=mixture)

    def _warm_switch(self, rank: int) -> None:
        """In, over to another, out."""
        if self.switch is None:
            return
        slots = [slot for slot in range(min(2, self.pool.slots)) if rank * (slot + 1) <= self.pool.rows]
        for slot in slots:
            self.pool.reserve(slot, rank)
            self.installed(slot)
        for slot in (*slots, NO_SLOT):
            self.fold(slot)
        for slot in slots:
            self.pool.release(slot)

    def _warm_operators(self, rank: int, *, mixture: bool) -> None:
        pool = self.pool
        resident = min(pool.slots, 16, pool.rows // rank)
        for slot in range(resident):
            pool.reserve(slot, rank)
        most = self.batch.max_tokens
        for size in {*(size for size in (1 << i for i in range(14)) if size <= most), most}:
            for adapters in sorted({1, min(4, resident), resident}):
                rows = np.sort(np.arange(size, dtype=np.int32) % adapters)
                for merged in (-1, adapters - 1) if mixture and adapters > 1 else (-1,):
                    self.batch.update(rows, merged)
                    self._warm_once(size, mixture=merged >= 0)
        for slot in range(resident):
            pool.release(slot)

    def _warm_once(self, rows: int, *, mixture: bool) -> None:
        add = self.bound(self.batch, mixture=mixture).add
        for name, projection in self.pool.projections.items():
            place = {"dtype": self.pool.dtype, "device": self.pool.device}
            add(torch.zeros(rows, projection.d_out, **place), torch.zeros(rows, projection.d_in, **place), (0, name))

    @property
    def adds(self) -> bool:
        """False for the operator `none`."""
        return self._op is not None

    def capturable(self, *, mixture: bool) -> bool:
        """True if a graph over one batch object serves other batches of its size."""
        op = self._mixture_op if mixture else self._op
        if op is None or op is _reference:
            return False
        return getattr(import_module(op.__module__), "CAPTURE", "free") == "free"

    def refresh(self, batch: LoraBatch, *, mixture: bool) -> None:
        """What a graph must capture before its first branch: the sort of the rows, and the rivals' lists of segments."""
        batch.route()
        if not mixture and self.operator in RIVALS:
            from kernels.baselines.inputs import refresh

            refresh(batch)


def padded_rank(rank: int) -> int:
    """Rows that an adapter takes in the pool."""
    return -(-rank // RANK_ALIGN) * RANK_ALIGN


def _slices(decoder: Decoder, key: tuple[int, str]) -> list[torch.Tensor]:
    widths = projections_of(decoder.shape)[key[1]].widths
    assert len(widths) == len(SLICES[key[1]])
    return list(decoder.weight(key).split(widths))


def _callable(operator: str):
    if operator == "none":
        return None
    if operator == "reference":
        return _reference
    if operator == "atmm":
        from kernels.atmm import atmm

        return atmm
    from kernels.baselines import operator as rival

    return rival(operator)


def _reference(y: torch.Tensor, x: torch.Tensor, pool: LoraPool, batch: LoraBatch, key: tuple[int, str]) -> None:
    from kernels.reference import reference

    y.copy_(reference(y, x, pool, batch, key))

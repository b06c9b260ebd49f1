"""Adapters from the host to their slots: one contiguous (on a GPU: pinned) copy each, and loads beside the running batch.

A load is one copy over the link into a staging buffer on a stream of its own, then a scatter into the pool there; an event
says when it is done, and nobody waits for it. When to load and whom to evict is the ledger's decision. It knows bytes, no
policy.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from engine.lora import Lora
from engine.peft_format import EFFECT, AdapterError, AdapterWeights
from kernels.batch import RANK_ALIGN, LoraError, Projection


@dataclass(frozen=True)
class HostAdapter:
    """All factors of an adapter in one tensor, projection by projection: A [layers, slices, rank, d_in], B [layers, rank,
    d_out], the rank padded as in the pool."""

    name: str
    rank: int
    scale: float
    digest: str
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


Pieces = list[tuple[str, str, tuple[int, ...]]]
"""(projection, half, shape) in the order in which a HostAdapter's data holds them."""


def _pieces(projections: dict[str, Projection], layers: int, rank: int) -> Pieces:
    padded = -(-rank // RANK_ALIGN) * RANK_ALIGN
    sizes: Pieces = []
    for name, p in projections.items():
        sizes += [(name, "a", (layers, p.slices, padded, p.d_in)), (name, "b", (layers, padded, p.d_out))]
    return sizes


def _parted(data: torch.Tensor, pieces: Pieces) -> list[tuple[str, str, torch.Tensor]]:
    done, views = 0, []
    for name, half, size in pieces:
        count = torch.Size(size).numel()
        views.append((name, half, data[done : done + count].view(size)))
        done += count
    return views


def packed(weights: AdapterWeights, projections: dict[str, Projection], layers: int, dtype: torch.dtype, *,
           pinned: bool) -> HostAdapter:
    """The host copy of an adapter for a pool of these projections, zeros where it has no factors.

    AdapterError for a value that `dtype` cannot hold: as an infinite one it would reach other requests' rows.
    """
    pieces = _pieces(projections, layers, weights.rank)
    data = torch.zeros(sum(torch.Size(size).numel() for _, _, size in pieces), dtype=dtype, pin_memory=pinned)
    parts = {(name, half): view for name, half, view in _parted(data, pieces)}
    for (layer, projection, number), (a, b) in weights.factors.items():
        widths = projections[projection].widths
        start = sum(widths[:number])
        parts[projection, "a"][layer, number, : len(a)] = a
        parts[projection, "b"][layer, : len(a), start : start + widths[number]] = b.T
    if not bool(torch.isfinite(data).all()):
        raise AdapterError(f"adapter {weights.name!r}: has values beyond the range of {str(dtype).removeprefix('torch.')}")
    return HostAdapter(weights.name, weights.rank, weights.scale, weights.digest, data)


def random_packed(name: str, rank: int, projections: dict[str, Projection], layers: int, block: torch.Tensor, *,
                  pinned: bool, rng: np.random.Generator) -> HostAdapter:
    """A host copy with normal factors, scaled as `random_adapter` does it, without the detour over PEFT's layout.

    block: many normal numbers of the model's type, read on from a new place for each piece, so that hundreds of adapters
    take seconds.
    """
    pieces = _pieces(projections, layers, rank)
    data = torch.zeros(sum(torch.Size(size).numel() for _, _, size in pieces), dtype=block.dtype, pin_memory=pinned)
    for projection, half, view in _parted(data, pieces):
        scale = projections[projection].d_in ** -0.5 if half == "a" else EFFECT * rank**-0.5
        flat = view.view(-1)
        done, start = 0, int(rng.integers(len(block)))
        while done < len(flat):
            part = block[start : start + len(flat) - done]
            torch.mul(part, scale, out=flat[done : done + len(part)])
            done, start = done + len(part), 0
        (view[:, :, rank:] if half == "a" else view[:, rank:]).zero_()  # the padding of the rank
    return HostAdapter(name, rank, 2.0, f"random:{name}:{rank}", data)


class Loader:
    """Copies host adapters into the slots of `lora`'s pool, in the order asked for."""

    def __init__(self, lora: Lora, adapters: list[HostAdapter | None]):
        self.adapters = adapters
        self._lora = lora
        self._under_way: deque[tuple[int, torch.cuda.Event | None]] = deque()
        self._stream = self._staging = None
        if lora.pool.device.type == "cuda":
            self._stream = torch.cuda.Stream()
            pieces = _pieces(lora.pool.projections, lora.pool.layers, lora.rank)  # one that comes later may be as large
            most = sum(torch.Size(size).numel() for _, _, size in pieces)
            self._staging = torch.empty(most, dtype=lora.pool.dtype, device=lora.pool.device)

    def start(self, adapter: int) -> None:
        """Begin the load of `adapter`; it may be used once `ready` has named it.

        Its rows may have been another's. Nobody reads those any more: a plan begins when the steps before it are done, so
        the copy need not wait for anything.
        """
        host = self.adapters[adapter]
        assert host is not None, "no request is queued for an adapter that could not be read"
        rows = self._rows(adapter, host)
        if self._stream is None:
            self._scatter(host.data, host.rank, rows)
            self._under_way.append((adapter, None))
            return
        with torch.cuda.stream(self._stream):
            staged = self._staging[: host.data.numel()]
            staged.copy_(host.data, non_blocking=True)
            self._scatter(staged, host.rank, rows)
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((adapter, event))

    def _rows(self, adapter: int, host: HostAdapter) -> slice:
        """Rows of the pool. Where enough are free but none in one run, the residents move together: behind the copies
        under way, and before the next."""
        lora = self._lora
        try:
            return lora.pool.reserve(adapter, host.rank, host.scale)
        except LoraError:
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
            lora.compact()
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
            return lora.pool.reserve(adapter, host.rank, host.scale)

    def ready(self) -> list[int]:
        """Adapters whose load has finished since the last call, in order. Waits for nothing."""
        done = []
        while self._under_way and (self._under_way[0][1] is None or self._under_way[0][1].query()):
            done.append(self._under_way.popleft()[0])
        return done

    def any_ready(self) -> bool:
        """True if `ready` would name one."""
        return bool(self._under_way) and (self._under_way[0][1] is None or self._under_way[0][1].query())

    def busy(self) -> bool:
        """True while a load is under way."""
        return bool(self._under_way)

    def drain(self) -> None:
        """Forget all loads, after waiting for them."""
        if self._stream is not None:
            self._stream.synchronize()
        self._under_way.clear()

    def _scatter(self, data: torch.Tensor, rank: int, rows: slice) -> None:
        pool = self._lora.pool
        for name, half, view in _parted(data, _pieces(pool.projections, pool.layers, rank)):
            if half == "a":
                pool.a[name][:, :, rows].copy_(view)
            else:
                pool.b[name][:, rows].copy_(view)

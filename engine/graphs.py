"""CUDA graphs of pure decode steps: one for each bucket of requests and each kind of branch, replayed with new contents.

Base and merged steps share the graph without a branch (folding an adapter in rewrites weights where they lie); unmerged and
mixture have their own. A batch is padded to its bucket with rows that write into the cache's spare page. Captured largest
first into one memory pool. It knows buffers and buckets, no ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention import Layout
from engine.cache import PageCache
from engine.decoder import Decoder
from engine.lora import Lora
from engine.sequence import Decodes
from engine.staging import Staging, views
from kernels.attention import splits_for
from kernels.batch import LoraBatch
from policies.plan import MIXTURE, UNMERGED

PLAIN, BRANCHED, MIXED = range(3)
KINDS = ("plain", "branched", "mixed")


def buckets_up_to(most: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 8 to 32 and of 16 beyond, ending at `most`."""
    sizes = [b for b in (1, 2, 4, 8, 16, 24, 32, *range(48, most + 16, 16)) if b < most]
    return [*sizes, most]


@dataclass
class Captured:
    """One graph, its input buffer (int32, as `_shapes` lays it out), its LoRA batch and its tokens int32 [bucket]."""

    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor
    batch: LoraBatch | None
    tokens: torch.Tensor


class DecodeGraphs:
    """Graphs for up to `max_batch` requests of up to `width` pages. Nothing is captured before `capture`."""

    def __init__(self, decoder: Decoder, cache: PageCache, lora: Lora, last_tokens: torch.Tensor, *, max_batch: int,
                 width: int):
        self._decoder, self._cache, self._lora, self._last_tokens = decoder, cache, lora, last_tokens
        self.buckets = buckets_up_to(max_batch)
        self._width = width
        self._rows = 3 if decoder.shape.mrope else 1
        self._graphs: dict[tuple[int, int], Captured] = {}
        self._staging = Staging(last_tokens.device)
        self._pool = None

    def capture(self, kinds: tuple[int, ...] = (PLAIN, BRANCHED, MIXED)) -> None:
        """Capture every bucket of the given kinds, the largest first, but no kind whose operator a graph cannot hold."""
        for kind in kinds:
            if kind != PLAIN and not self._lora.capturable(mixture=kind == MIXED):
                continue
            for bucket in reversed(self.buckets):
                if (kind, bucket) not in self._graphs:
                    self._graphs[kind, bucket] = self._capture(kind, bucket)

    def serves(self, mode: int, requests: int) -> bool:
        """True if a step of so many decodes in this mode has a graph."""
        return 0 < requests <= self.buckets[-1] and (self._kind(mode), self._bucket(requests)) in self._graphs

    @torch.inference_mode()
    def replay(self, mode: int, merged: int, decodes: Decodes) -> torch.Tensor:
        """Run the next step of `decodes`; int32 tokens [requests] on the device, valid until the next replay."""
        n = len(decodes.sequences)
        bucket, kind = self._bucket(n), self._kind(mode)
        captured = self._graphs[kind, bucket]
        positions, slots, lengths = decodes.step()
        dummy, page = self._cache.dummy, self._cache.page_tokens
        padded = [
            _padded(decodes.rows, bucket, len(self._last_tokens) - 1),
            np.tile(_padded(positions, bucket, 0), (self._rows, 1)),
            _padded(slots, bucket, dummy * page), _padded(lengths, bucket, 1),
        ]  # fmt: skip
        tables = np.full((bucket, self._width), dummy, np.int32)
        tables[:n] = decodes.tables
        self._staging.send([*padded, tables], into=captured.buffer)
        if captured.batch is not None:
            merged_slot = merged if kind == MIXED else -1
            # In mixture mode a padding row counts as the folded adapter's, which owes nothing.
            captured.batch.update(_padded(decodes.adapters, bucket, merged_slot), merged_slot, route=False)
        captured.graph.replay()
        return captured.tokens[:n]

    def _kind(self, mode: int) -> int:
        if not self._lora.adds:
            return PLAIN
        return {UNMERGED: BRANCHED, MIXTURE: MIXED}.get(mode, PLAIN)

    def _bucket(self, requests: int) -> int:
        return next(size for size in self.buckets if size >= requests)

    def _shapes(self, bucket: int) -> list[tuple[int, ...]]:
        """rows, positions, slots, lengths, tables."""
        return [(bucket,), (self._rows, bucket), (bucket,), (bucket,), (bucket, self._width)]

    @torch.inference_mode()
    def _capture(self, kind: int, bucket: int) -> Captured:
        decoder, lora, device = self._decoder, self._lora, self._last_tokens.device
        shapes, dummy = self._shapes(bucket), self._cache.dummy
        sizes = [-(-int(np.prod(shape)) // 4) * 4 for shape in shapes]
        buffer = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        rows, positions, slots, lengths, tables = views(buffer, shapes)
        rows.fill_(len(self._last_tokens) - 1)
        slots.fill_(dummy * self._cache.page_tokens)
        lengths.fill_(1)
        tables.fill_(dummy)
        layout = Layout(bucket, tables, lengths, splits=splits_for(bucket, decoder.shape.kv_heads))
        batch = branch = None
        if kind != PLAIN:
            batch = LoraBatch(lora.pool, bucket)
            batch.fix(bucket, min(bucket, lora.pool.slots + 1), lora.rank)
            batch.update(np.full(bucket, -1, np.int32), -1)
            batch.merged = 0 if kind == MIXED else -1  # which form the operator captures; the slot comes with each replay
            branch = lora.bound(batch, mixture=kind == MIXED)
        tokens = torch.zeros(bucket, dtype=torch.int32, device=device)

        def step() -> None:
            if batch is not None:
                lora.refresh(batch, mixture=kind == MIXED)
            hidden = decoder.embed(self._last_tokens[rows])
            final = decoder.forward(hidden, positions, slots, layout, self._cache.keys, self._cache.values, branch)
            tokens.copy_(decoder.logits(final).argmax(-1))
            self._last_tokens[rows] = tokens

        return Captured(self._record(step), buffer, batch, tokens)

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = recorded(step, self._pool)
        self._pool = self._pool or graph.pool()
        return graph


def recorded(step: Callable[[], None], pool=None) -> torch.cuda.CUDAGraph:
    """A graph of `step`, after it ran twice: that compiles and warms up what capture must find ready.

    pool: of another graph, whose memory it may share because the two never run at once.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph


def _padded(array: np.ndarray, size: int, value: int) -> np.ndarray:
    out = np.full(size, value, np.int32)
    out[: len(array)] = array
    return out

"""CUDA graphs of steps: pure decodes by a bucket of requests, steps with chunks of prompts by a bucket of tokens; each for
every kind of branch, replayed with new contents.

Base and merged steps share the graph without a branch (folding an adapter in rewrites weights where they lie); unmerged and
mixture have their own. A batch is padded to its bucket with rows that write into the cache's spare page. Captured largest
first into one memory pool. Without graphs a step costs the host 12 to 40 ms (a few hundred launches, and the libraries load
kernels for every new number of rows), more than a GPU needs for most of them. It knows buffers and buckets, no ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention import Layout
from engine.cache import PageCache
from engine.decoder import Branch, Decoder
from engine.lora import Lora
from engine.packing import Packed
from engine.sequence import Decodes
from engine.staging import Staging, views
from kernels.batch import LoraBatch
from kernels.extend import BLOCK_FIELDS, blocks_of, most_blocks
from policies.plan import MIXTURE, UNMERGED

PLAIN, BRANCHED, MIXED = range(3)
KINDS = ("plain", "branched", "mixed")
GROUPS = 4
"""Adapters that a step with prompts is expected to have: its LoRA tiles are cut for so many, and right for any number."""


def buckets_up_to(most: int) -> list[int]:
    """Requests: 1, 2, 4, 8, then multiples of 8 to 32 and of 16 beyond, ending at `most`."""
    sizes = [b for b in (1, 2, 4, 8, 16, 24, 32, *range(48, most + 16, 16)) if b < most]
    return [*sizes, most]


def token_buckets_up_to(most: int) -> list[int]:
    """Tokens: multiples of 16 to 128, of 32 to 512, of 64 beyond, ending at `most`: a matrix product pays for padding."""
    sizes = [b for b in (*range(16, 129, 16), *range(160, 513, 32), *range(576, most + 64, 64)) if b < most]
    return [*sizes, most]


@dataclass
class Captured:
    """One graph, its input buffer (int32, in sections), its LoRA batch and its tokens int32 [bucket]."""

    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor
    batch: LoraBatch | None
    tokens: torch.Tensor


class StepGraphs:
    """What both kinds of steps share: graphs by (kind, bucket), and their branches. Nothing is captured before `capture`."""

    buckets: list[int]
    _expected: int | None = None  # adapters of a step, None: as many as it may have

    def __init__(self, decoder: Decoder, cache: PageCache, lora: Lora, last_tokens: torch.Tensor, width: int):
        self._decoder, self._cache, self._lora, self._last_tokens = decoder, cache, lora, last_tokens
        self._width = width
        self._rows = 3 if decoder.shape.mrope else 1
        self._graphs: dict[tuple[int, int], Captured] = {}
        self._staging = Staging(last_tokens.device)
        self._pool = None

    def capture(self, kinds: tuple[int, ...] = (PLAIN, BRANCHED, MIXED), sizes: Collection[int] | None = None) -> None:
        """Capture every bucket (of `sizes`) of the given kinds, the largest first, but no kind whose operator a graph cannot
        hold."""
        for kind in kinds:
            if kind != PLAIN and not self._lora.capturable(mixture=kind == MIXED):
                continue
            for bucket in reversed(self.buckets):
                if (kind, bucket) not in self._graphs and (sizes is None or bucket in sizes):
                    self._graphs[kind, bucket] = self._capture(kind, bucket)

    def forget(self, kind: int, bucket: int) -> None:
        """Drop a graph, if there is one; `capture` makes it anew, with what is then the fastest."""
        self._graphs.pop((kind, bucket), None)

    def serves(self, mode: int, size: int) -> bool:
        """True if a step of so many requests (decodes) or tokens (with prompts) in this mode has a graph."""
        return 0 < size <= self.buckets[-1] and (self._kind(mode), self._bucket(size)) in self._graphs

    def _kind(self, mode: int) -> int:
        if not self._lora.adds:
            return PLAIN
        return {UNMERGED: BRANCHED, MIXTURE: MIXED}.get(mode, PLAIN)

    def _bucket(self, size: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= size)

    def _buffer(self, shapes: list[tuple[int, ...]]) -> torch.Tensor:
        sizes = [-(-int(np.prod(shape)) // 4) * 4 for shape in shapes]
        return torch.zeros(sum(sizes), dtype=torch.int32, device=self._last_tokens.device)

    def _branch(self, kind: int, bucket: int) -> tuple[LoraBatch | None, Branch | None]:
        """The LoRA side of a graph, made for any adapters."""
        if kind == PLAIN:
            return None, None
        batch = empty_batch(self._lora, kind, bucket, self._expected)
        return batch, self._lora.bound(batch, mixture=kind == MIXED)

    def _update(self, captured: Captured, kind: int, merged: int, adapters: np.ndarray, bucket: int) -> None:
        """Tell the graph's branch which row asks for which adapter."""
        if captured.batch is not None:
            slot = merged if kind == MIXED else -1
            # In mixture mode a padding row counts as the folded adapter's, which owes nothing.
            captured.batch.update(_padded(adapters, bucket, slot), slot, route=False)

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = recorded(step, self._pool)
        self._pool = self._pool or graph.pool()
        return graph


class DecodeGraphs(StepGraphs):
    """Pure decode steps of up to `max_batch` requests of up to `width` pages."""

    def __init__(self, decoder: Decoder, cache: PageCache, lora: Lora, last_tokens: torch.Tensor, *, max_batch: int,
                 width: int):
        super().__init__(decoder, cache, lora, last_tokens, width)
        self.buckets = buckets_up_to(max_batch)

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
            _padded(slots, bucket, dummy * page), _padded(lengths, bucket, 0),
        ]  # fmt: skip
        tables = np.full((bucket, self._width), dummy, np.int32)
        tables[:n] = decodes.tables
        self._staging.send([*padded, tables], into=captured.buffer)
        self._update(captured, kind, merged, decodes.adapters, bucket)
        captured.graph.replay()
        return captured.tokens[:n]

    @torch.inference_mode()
    def _capture(self, kind: int, bucket: int) -> Captured:
        decoder, lora, dummy = self._decoder, self._lora, self._cache.dummy
        shapes = [(bucket,), (self._rows, bucket), (bucket,), (bucket,), (bucket, self._width)]
        buffer = self._buffer(shapes)
        rows, positions, slots, lengths, tables = views(buffer, shapes)
        rows.fill_(len(self._last_tokens) - 1)
        slots.fill_(dummy * self._cache.page_tokens)
        tables.fill_(dummy)
        layout = Layout(bucket, tables, lengths)
        batch, branch = self._branch(kind, bucket)
        tokens = torch.zeros(bucket, dtype=torch.int32, device=buffer.device)

        def step() -> None:
            if batch is not None:
                lora.refresh(batch, mixture=kind == MIXED)
            hidden = decoder.embed(self._last_tokens[rows])
            final = decoder.forward(hidden, positions, slots, layout, self._cache.keys, self._cache.values, branch)
            tokens.copy_(decoder.logits(final).argmax(-1))
            self._last_tokens[rows] = tokens

        return Captured(self._record(step), buffer, batch, tokens)


class PackedGraphs(StepGraphs):
    """Steps with chunks of prompts, of up to `max_tokens` rows and `max_batch` requests of up to `width` pages.

    hidden [max_tokens, hidden]: where the caller puts the rows' embeddings before `replay`.
    """

    _expected = GROUPS

    def __init__(self, decoder: Decoder, cache: PageCache, lora: Lora, last_tokens: torch.Tensor, *, max_batch: int,
                 max_tokens: int, width: int):
        super().__init__(decoder, cache, lora, last_tokens, width)
        self.buckets = token_buckets_up_to(max_tokens)
        self._requests = max_batch
        self.hidden, self._final = torch.zeros(
            2, max_tokens, decoder.shape.hidden, dtype=decoder.head.dtype, device=last_tokens.device
        )

    @torch.inference_mode()
    def replay(self, mode: int, merged: int, step: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `step`: int32 tokens [outputs] and the final hidden states [rows, hidden], valid until the next replay."""
        total, n = len(step.ids), step.decodes
        bucket, kind = self._bucket(total), self._kind(mode)
        captured = self._graphs[kind, bucket]
        dummy, page, requests = self._cache.dummy, self._cache.page_tokens, self._requests
        self.hidden[total:bucket].zero_()
        positions = np.zeros((self._rows, bucket), np.int32)
        positions[:, :total] = step.positions
        tables = np.full((requests, self._width), dummy, np.int32)
        tables[: len(step.tables)] = step.tables
        blocks = np.zeros((most_blocks(bucket, requests), BLOCK_FIELDS), np.int32)
        chunks = blocks_of(step.chunks, n, n)
        blocks[: len(chunks)] = chunks
        arrays = [
            positions, _padded(step.slots, bucket, dummy * page), _padded(step.lengths, min(requests, bucket), 0), tables,
            blocks, _padded(step.out_rows, requests, 0), _padded(step.out_slots, requests, len(self._last_tokens) - 1),
        ]  # fmt: skip
        self._staging.send(arrays, into=captured.buffer)
        self._update(captured, kind, merged, step.adapters, bucket)
        captured.graph.replay()
        return captured.tokens[: len(step.outputs)], self._final[:total]

    @torch.inference_mode()
    def _capture(self, kind: int, bucket: int) -> Captured:
        decoder, lora, dummy, requests = self._decoder, self._lora, self._cache.dummy, self._requests
        decodes = min(requests, bucket)
        shapes = [
            (self._rows, bucket), (bucket,), (decodes,), (requests, self._width),
            (most_blocks(bucket, requests), BLOCK_FIELDS), (requests,), (requests,),
        ]  # fmt: skip
        buffer = self._buffer(shapes)
        positions, slots, lengths, tables, blocks, out_rows, out_slots = views(buffer, shapes)
        slots.fill_(dummy * self._cache.page_tokens)
        tables.fill_(dummy)
        out_slots.fill_(len(self._last_tokens) - 1)
        layout = Layout(decodes, tables, lengths, blocks)
        batch, branch = self._branch(kind, bucket)
        tokens = torch.zeros(requests, dtype=torch.int32, device=buffer.device)

        def step() -> None:
            if batch is not None:
                lora.refresh(batch, mixture=kind == MIXED)
            hidden = self.hidden[:bucket]
            final = decoder.forward(hidden, positions, slots, layout, self._cache.keys, self._cache.values, branch)
            self._final[:bucket].copy_(final)
            tokens.copy_(decoder.logits(final[out_rows]).argmax(-1))
            self._last_tokens[out_slots] = tokens

        return Captured(self._record(step), buffer, batch, tokens)


def compile_branches(lora: Lora, kinds: tuple[int, ...], *, max_batch: int, max_tokens: int) -> None:
    """Compile the LoRA kernels that the graphs of these kinds will capture, on all cores. Before memory is handed out, for
    the compiling processes want some of the GPU's."""
    sizes = [(bucket, None) for bucket in buckets_up_to(max_batch)]
    sizes += [(bucket, GROUPS) for bucket in token_buckets_up_to(max_tokens)]
    lora.compile([empty_batch(lora, kind, *size) for kind in kinds if kind != PLAIN for size in sizes])


def empty_batch(lora: Lora, kind: int, bucket: int, expected: int | None) -> LoraBatch:
    """A batch of no adapter's rows in the largest shape that a bucket may have."""
    batch = LoraBatch(lora.pool, bucket)
    groups = min(bucket, lora.pool.slots + 1)
    batch.fix(bucket, groups, lora.rank, expected and min(expected, groups))
    batch.update(np.full(bucket, -1, np.int32), -1, route=False)
    batch.merged = 0 if kind == MIXED else -1  # which form the operator captures; the slot comes with each replay
    return batch


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


def leave_capture(stream: torch.cuda.Stream, device: torch.device) -> None:
    """After a capture that failed torch stays on the capture's stream, and its generator refuses new seeds."""
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize()
    fresh = torch.Generator(device).graphsafe_get_state()
    torch.cuda.default_generators[device.index or 0].graphsafe_set_state(fresh)

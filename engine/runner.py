"""Executes plans: builds the packed batch of a step, runs the model over it, and keeps pages, slots and tokens in step with
the ledger.

`begin` makes ready what a plan changes, `launch` puts one step on the device, `collect` waits for the oldest step under way
and takes its tokens, `settle` follows the ledger's commit. Sampled tokens stay on the device for the next step, so that two
steps may be under way at once. It decides nothing: which request, how many tokens, which adapter all stand in the plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine.adapters import Loader
from engine.attention import Layout
from engine.cache import PageCache
from engine.decoder import Decoder
from engine.graphs import DecodeGraphs
from engine.heads import Detection, TaskHead
from engine.lora import Lora
from engine.models import Model
from engine.prompts import MadeUp, Prompt, RequestError
from engine.sequence import Decodes, Sequence
from engine.staging import Staging
from engine.vision import VisionGraphs
from policies.ledger import Ledger
from policies.plan import Plan
from traces.request import Request


class Flight(NamedTuple):
    """A step under way: whose tokens it brings, and where they will lie on the host once `done`."""

    sequences: list[Sequence]
    tokens: torch.Tensor
    answers: list[tuple[Sequence, torch.Tensor | Detection]]
    done: torch.cuda.Event | None


@dataclass(frozen=True)
class Answer:
    """What a request got: its tokens, or what its task head said (a class, or a Detection)."""

    tokens: list[int]
    head: int | Detection | None = None


class Runner:
    """One model with its cache and adapters. heads: by adapter number, None where it has none. seed: of made-up prompts."""

    def __init__(self, model: Model, decoder: Decoder, cache: PageCache, lora: Lora, loader: Loader,
                 heads: list[TaskHead | None], *, max_context: int, seed: int = 0, graphs: DecodeGraphs | None = None):
        self.model, self.decoder, self.cache, self.lora, self.loader = model, decoder, cache, lora, loader
        self.heads = heads
        self.made_up = MadeUp(model.shape, seed, dtype=model.dtype, device=model.device)
        self.graphs = graphs
        self.vision = VisionGraphs(model)
        self.width = -(-max_context // cache.page_tokens)
        self.answers: dict[int, Answer] = {}
        self.observer: Callable[[list[Sequence], torch.Tensor], None] | None = None  # sees the logits of eager steps
        self.sequences: dict[int, Sequence] = {}
        device = model.device
        self.last_tokens = torch.zeros(cache.dummy + 1, dtype=torch.int32, device=device)
        self._rows = list(range(cache.dummy - 1, -1, -1))  # a running request holds a page, so there are never more
        self._staging = Staging(device)
        self._flights: deque[Flight] = deque()
        self._head_says: dict[int, int | Detection] = {}
        self._plan = Plan()
        self._decodes: Decodes | None = None
        self._chunks: list[tuple[Sequence, int]] = []
        self._places: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._finishing: list[Sequence] = []  # whose prefill ends with the step

    # -- requests -------------------------------------------------------------------------------------------------------
    def admit(self, request: Request, prompt: Prompt | None = None) -> None:
        """Take a request that arrived. prompt: what it says; made up where absent. RequestError if it cannot be served."""
        if prompt is None:
            prompt = self.made_up.prompt(request)
        if request.adapter >= 0 and self.loader.adapters[request.adapter] is None:
            raise RequestError("its adapter could not be read")
        head = self.heads[request.adapter] if request.head and request.adapter >= 0 else None
        if head is not None and head.queries > len(prompt.ids):
            raise RequestError(f"a prompt of {len(prompt.ids)} tokens is shorter than the head's {head.queries} queries")
        self.sequences[request.id] = Sequence(request, prompt, self.model.shape, head)

    def drop(self, request: int) -> None:
        """Forget a request, whatever it was doing."""
        sequence = self.sequences.pop(request, None)
        if sequence is not None:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.cache.release(sequence.table)
        if sequence.row >= 0:
            self._rows.append(sequence.row)
        sequence.reset()

    # -- a plan -----------------------------------------------------------------------------------------------------------
    def begin(self, plan: Plan, ledger: Ledger) -> None:
        """Follow a plan that the ledger has begun: memory, adapters, weights, and the sequences of its batch.

        RequestError, with the request's id in `request`, if one of them cannot be computed; then the plan must be called
        off, and so after torch.OutOfMemoryError here or in `launch`.
        """
        for request in plan.preempts:
            self._give_back(self.sequences[request])
        for request in plan.aborts:
            self.drop(request)
        for adapter in plan.evicts:
            self.lora.evict(adapter)
        for adapter in plan.loads:
            self.loader.start(adapter)
        self._plan, self._chunks, self._finishing, self._decodes = plan, [], [], None
        if not plan.decodes and not plan.prefills:
            return
        self._places.clear()
        if plan.merged != self.lora.folded:
            with self._timed("switch"):
                self.lora.fold(plan.merged)
        for request, tokens in plan.prefills:
            sequence = self.sequences[request]
            if sequence.table is None:
                entry = ledger.entries[request]
                sequence.table, sequence.kv = self.cache.start(entry), entry.kv
                sequence.row = self._rows.pop()
            self.cache.extend(sequence.table, sequence.kv + tokens)
            self._chunks.append((sequence, tokens))
            if sequence.kv + tokens == sequence.target:
                self._finishing.append(sequence)
        fresh = [sequence for sequence, _ in self._chunks if sequence.features is None]
        if any(sequence.prompt.images for sequence in fresh):
            with self._timed("vision"):
                self._encode_images(fresh)
        self._decodes = Decodes([self.sequences[request] for request in plan.decodes], self.cache, self.width)

    def call_off(self) -> None:
        """The plan will not be executed after all; the ledger has called it off too."""
        self._flights.clear()
        for sequence, _ in self._chunks:
            if sequence.id in self.sequences:
                self._give_back(sequence)
        if self._decodes is not None:
            for sequence in self._decodes.sequences:
                self.cache.trim(sequence.table, sequence.kv)

    def launch(self, ledger: Ledger, number: int) -> None:
        """Put step `number` of the lease (0 the first) on the device."""
        ledger.pool.make_room(ledger.cohort.pages_for(number + 1))
        plan, n = self._plan, len(self._decodes.sequences)
        if self._chunks or self.graphs is None or not self.graphs.serves(plan.mode, n):
            self._launch_eager()
        else:
            tokens = self.graphs.replay(plan.mode, plan.merged, self._decodes)
            self._take_off(self._decodes.sequences, tokens, [])

    def collect(self) -> None:
        """Wait for the oldest step under way and take its tokens."""
        flight = self._flights.popleft()
        if flight.done is not None:
            flight.done.synchronize()
        for sequence, token in zip(flight.sequences, flight.tokens.tolist(), strict=True):
            sequence.generated.append(token)
        for sequence, said in flight.answers:
            if isinstance(said, Detection):
                self._head_says[sequence.id] = Detection(said.classes.cpu(), said.boxes.cpu(), said.scores.cpu())
            else:
                self._head_says[sequence.id] = int(said)

    def settle(self, ledger: Ledger, steps: int) -> None:
        """After the ledger's commit of `steps` steps, all of them collected."""
        for sequence in self._decodes.sequences:
            sequence.kv += steps
            self.cache.trim(sequence.table, sequence.kv)  # a step more may have been prepared and not found memory
        for sequence, tokens in self._chunks:
            sequence.kv += tokens
        for sequence in self._finishing:
            sequence.features = sequence.tail = None
        finished = self._finishing
        # Requests that live on know the node they published; of those that ended the pool is asked, after the others.
        alive = [s for s in finished if s.id in ledger.entries and s.prefix]
        ended = [s for s in finished if s.id not in ledger.entries and s.prefix]
        for sequence in alive:
            self.cache.publish(sequence.table, ledger.entries[sequence.id].node)
        for sequence in ended:
            self.cache.publish(sequence.table, ledger.pool.match(sequence.adapter, sequence.prefix, 1 << 62))
        for sequence in (*self._decodes.sequences, *(s for s, _ in self._chunks)):
            if sequence.id not in ledger.entries:
                self.answers[sequence.id] = Answer(sequence.generated, self._head_says.pop(sequence.id, None))
                self.drop(sequence.id)

    @contextmanager
    def _timed(self, place: str):
        """Note when the GPU begins and ends what is launched inside."""
        if self.model.device.type != "cuda":
            yield
            return
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        stop.record()
        self._places[place] = (start, stop)

    def places_ps(self) -> dict[str, int]:
        """How long the GPU took for the switch and the vision tower of the plan, once its steps are collected."""
        return {place: round(start.elapsed_time(stop) * 1e9) for place, (start, stop) in self._places.items()}

    # -- a step -----------------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def _encode_images(self, sequences: list[Sequence]) -> None:
        """Features of all images that these sequences have yet to compute, in one pass of the vision tower."""
        shape, pixels = self.model.shape, []
        counts = []
        for sequence in sequences:
            left = sequence.images_left(shape)
            counts.append(len(left))
            if left:
                sequence.first_image = left[0]
                pixels += [self._pixels(sequence, number) for number in left]
        if not pixels:
            return
        features = self.vision.encode(torch.stack(pixels)).split(counts)
        for sequence, own in zip(sequences, features, strict=True):
            if len(own):
                sequence.features = own.flatten(0, 1)

    def _pixels(self, sequence: Sequence, number: int) -> torch.Tensor:
        image = sequence.prompt.images[number]
        if not isinstance(image, torch.Tensor):
            return self.made_up.pixels(image)
        if tuple(image.shape) != self.model.shape.pixels or not bool(torch.isfinite(image).all()):
            raise RequestError(f"image {number} is not {self.model.shape.pixels} finite numbers", sequence.id)
        return image.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def _launch_eager(self) -> None:
        """A step of any shape: decodes first, then the chunks."""
        decodes, chunks, shape = self._decodes, self._chunks, self.model.shape
        n = len(decodes.sequences)
        positions, slots, lengths = decodes.step()
        page = self.cache.page_tokens
        ids, slot_parts = [np.zeros(n, np.int32)], [slots]
        position_parts = [np.broadcast_to(positions, (3 if shape.mrope else 1, n))]
        adapters, pages, image_rows, feature_parts, outputs = [decodes.adapters], [], [], [], list(decodes.sequences)
        output_rows, heads, total = list(range(n)), [], n
        for sequence, tokens in chunks:
            start, stop = sequence.kv, sequence.kv + tokens
            ids.append(sequence.ids_at(start, stop))
            position_parts.append(sequence.positions_at(start, stop))
            table = np.array(sequence.table.pages, np.int32)
            at = np.arange(start, stop)
            slot_parts.append(table[at // page] * page + at % page)
            pages.append(table[: -(-stop // page)])
            adapters.append(np.full(tokens, sequence.adapter, np.int32))
            if sequence.features is not None:
                offsets, rows = sequence.image_rows(start, stop, shape)
                image_rows.append(offsets + total)
                feature_parts.append((sequence.features, rows))
            if sequence.head is not None:
                heads.append((sequence, total, total + tokens))
            elif stop == sequence.target:
                outputs.append(sequence)
                output_rows.append(total + tokens - 1)
            total += tokens
        sizes = [(tokens, sequence.kv) for sequence, tokens in chunks]
        cumulative = [np.cumsum([0, *(t for t, _ in sizes)]), np.cumsum([0, *(t + c for t, c in sizes)])]
        arrays = [
            np.concatenate(ids), np.concatenate(position_parts, axis=1), np.concatenate(slot_parts), decodes.rows, lengths,
            decodes.tables, np.array(output_rows, np.int32), np.array([s.row for s in outputs], np.int32), *cumulative,
            np.concatenate([np.empty(0, np.int32), *image_rows]), *(rows for _, rows in feature_parts), *pages,
        ]  # fmt: skip
        sent = self._staging.send(arrays)
        d_ids, d_positions, d_slots, d_rows, d_lengths, d_tables, d_out, d_out_rows, cu_q, cu_k, d_image_rows, *rest = sent
        parts, d_pages = rest[: len(feature_parts)], rest[len(feature_parts) :]
        d_ids[:n] = self.last_tokens[d_rows]
        hidden = self.decoder.embed(d_ids)
        if feature_parts:
            found = [features[rows] for (features, _), rows in zip(feature_parts, parts, strict=True)]
            hidden[d_image_rows] = torch.cat(found).to(hidden.dtype)
        branch = self.lora.branch(self._plan.mode, self._plan.merged, np.concatenate(adapters))
        layout = Layout(n, d_tables, d_lengths, sizes, d_pages, cu_q, cu_k)
        final = self.decoder.forward(hidden, d_positions, d_slots, layout, self.cache.keys, self.cache.values, branch)
        logits = self.decoder.logits(final[d_out])
        if self.observer is not None:
            self.observer(outputs, logits)
        tokens = logits.argmax(-1).int()
        self.last_tokens[d_out_rows] = tokens
        self._take_off(outputs, tokens, self._answers_of_heads(heads, final))

    def _answers_of_heads(self, heads: list[tuple[Sequence, int, int]], final: torch.Tensor) -> list:
        answers = []
        for sequence, start, stop in heads:
            head = sequence.head
            rows = final[start:stop][-head.queries :]
            sequence.tail = rows if sequence.tail is None else torch.cat([sequence.tail, rows])[-head.queries :]
            if sequence.kv + stop - start == sequence.target:
                answers.append((sequence, head.answer(sequence.tail)))
        return answers

    def _take_off(self, sequences: list[Sequence], tokens: torch.Tensor, answers: list) -> None:
        done = None
        if tokens.is_cuda:
            host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            tokens = host.copy_(tokens, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._flights.append(Flight(sequences, tokens, answers, done))

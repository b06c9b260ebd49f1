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

import torch

from engine.adapters import Loader
from engine.attention import Layout
from engine.cache import PageCache
from engine.decoder import Decoder
from engine.graphs import DecodeGraphs, PackedGraphs
from engine.heads import Detection, TaskHead
from engine.lora import Lora
from engine.models import Model
from engine.packing import Packed, packed
from engine.prompts import MadeUp, Prompt, RequestError
from engine.sequence import Decodes, Sequence
from engine.staging import Staging
from engine.vision import VisionGraphs
from kernels.extend import blocks_of
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
        self.packed_graphs: PackedGraphs | None = None
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
        self._plan, self._chunks, self._finishing, self._decodes = plan, [], [], None
        for request in plan.preempts:
            self._give_back(self.sequences[request])
        for request in plan.aborts:
            self.drop(request)
        for adapter in plan.evicts:
            self.lora.evict(adapter)
        for adapter in plan.loads:
            self.loader.start(adapter)
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
        self._compute()

    def _compute(self) -> None:
        """The next step of the plan, by a graph where there is one for its size."""
        plan, n = self._plan, len(self._decodes.sequences)
        if not self._chunks and self.graphs is not None and self.graphs.serves(plan.mode, n):
            tokens = self.graphs.replay(plan.mode, plan.merged, self._decodes)
            self._take_off(self._decodes.sequences, tokens, [])
            return
        step = packed(self._decodes, self._chunks, self.model.shape, self.cache.page_tokens)
        if self.packed_graphs is not None and self.packed_graphs.serves(plan.mode, len(step.ids)):
            into = self.packed_graphs.hidden[: len(step.ids)]
            self._embedded(step, into)
            tokens, final = self.packed_graphs.replay(plan.mode, plan.merged, step)
            self._take_off(step.outputs, tokens, self._answers_of_heads(step.heads, final))
        else:
            self._launch_eager(step)

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
    def _launch_eager(self, step: Packed) -> None:
        """A step of any shape, kernel by kernel."""
        n = step.decodes
        arrays = [step.positions, step.slots, step.lengths, step.tables, step.out_rows, step.out_slots]
        if step.chunks:
            arrays.append(blocks_of(step.chunks, n, n))
        positions, slots, lengths, tables, out_rows, out_slots, *blocks = self._staging.send(arrays)
        branch = self.lora.branch(self._plan.mode, self._plan.merged, step.adapters)
        layout = Layout(n, tables, lengths, *blocks)
        hidden = self._embedded(step)
        final = self.decoder.forward(hidden, positions, slots, layout, self.cache.keys, self.cache.values, branch)
        logits = self.decoder.logits(final[out_rows])
        if self.observer is not None:
            self.observer(step.outputs, logits)
        tokens = logits.argmax(-1).int()
        self.last_tokens[out_slots] = tokens
        self._take_off(step.outputs, tokens, self._answers_of_heads(step.heads, final))

    def _embedded(self, step: Packed, into: torch.Tensor | None = None) -> torch.Tensor:
        """[T, hidden]: embeddings of the tokens, image features in place of image tokens; in `into` where it is given."""
        arrays = [step.ids, step.rows, step.image_rows, *(rows for _, rows in step.features)]
        ids, rows, image_rows, *parts = self._staging.send(arrays)
        if step.decodes:
            ids[: step.decodes] = self.last_tokens[rows]
        hidden = self.decoder.embed(ids, into)
        if step.features:
            found = [features[rows] for (features, _), rows in zip(step.features, parts, strict=True)]
            hidden[image_rows] = torch.cat(found).to(hidden.dtype)
        return hidden

    def _answers_of_heads(self, heads: list[tuple[Sequence, int, int]], final: torch.Tensor) -> list:
        answers = []
        for sequence, start, stop in heads:
            head = sequence.head
            rows = final[start:stop][-head.queries :]
            # a copy: the next step may write where `final` lies
            sequence.tail = rows.clone() if sequence.tail is None else torch.cat([sequence.tail, rows])[-head.queries :]
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

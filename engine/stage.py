"""A stage for timing: an engine whose requests are put in their places without computing what led there.

Requests go through the real ledger and runner (`begin`, `launch`, `collect`, `settle`), but prompts that only set the scene
are never launched: their pages hold whatever lies there. Plans are made by hand and run as the replay runs a lease, with two
steps under way on a GPU. It knows how to time a plan, not which plans are worth it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from engine.build import Engine
from engine.replay import EngineConfig
from policies import Policy, faults
from policies.plan import BASE, MERGED, MIXTURE, UNMERGED, Plan, Work
from traces.request import Request

WARM_STEPS = 3
FEWEST, MOST = 5, 40
"""Steps that one point is timed over."""
POINT_S = 0.12
"""Seconds that one point is timed for, within those bounds."""
REST_S = 0.15
"""Before a step of prompts is timed: a GPU that computes them for about a second lowers its clock by a seventh for a moment,
and that moment must not fall into one point of a table."""
OUTPUT = 4 * MOST + 16


class SceneError(ValueError):
    """A scene that does not fit this engine: more requests, tokens or pages than it takes."""


@dataclass
class Timing:
    """What a lease took, in microseconds. steps: from one end to the next, the first two left out. gpu: of the steps by the
    GPU's events (empty elsewhere). host: of each launch. work: of its first step. context: of the decodes, mean over the
    steps timed. places: the GPU's time for switch and vision. ends_ns: of all steps, by the host's clock."""

    steps: list[float]
    gpu: list[float]
    host: list[float]
    work: Work
    context: float
    places: dict[str, float]
    ends_ns: list[int]


class Stage:
    """One engine under one policy, which is never asked. Every scene begins with `clear`."""

    def __init__(self, engine: Engine, config: EngineConfig, policy: Policy):
        self.engine, self.config, self._policy = engine, config, policy
        self.renew()
        self.runner = engine.runner
        self.cuda = self.runner.last_tokens.is_cuda
        self._ids = 0

    def renew(self) -> None:
        """An empty engine, whoever had it."""
        self.engine.renew(self.config, self._policy)
        self.ledger = self.engine.ledger

    def now_ns(self) -> int:
        """The host's clock."""
        return time.perf_counter_ns()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    # -- scenery ------------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """End all requests; adapters stay."""
        for request in list(self.ledger.entries):
            faults.fail(self.ledger, request, self.now_ns())
            self.runner.drop(request)
        self.runner.answers.clear()

    def load(self, adapters: list[int]) -> None:
        """Make adapters resident."""
        wanted = tuple(a for a in adapters if a not in self.ledger.pool.resident)
        if not wanted:
            return
        plan = Plan(loads=wanted)
        self.ledger.begin(plan, self.now_ns())
        self.runner.begin(plan, self.ledger)
        self.runner.loader.drain()
        for adapter in wanted:
            self.ledger.loaded(adapter)
            self.runner.lora.installed(adapter)

    def admit(self, prompt: int, adapter: int, images: int = 0, output: int = OUTPUT) -> int:
        """A request of `prompt` tokens that waits. SceneError if it cannot be served."""
        output = min(output, self.config.limits.max_context - prompt)
        request = Request(self._ids, self.now_ns(), prompt, output, adapter, images)
        self._ids += 1
        self.runner.admit(request)
        if not self.ledger.enqueue(request):
            self.runner.drop(request.id)
            raise SceneError(f"a request of {prompt} tokens is larger than this engine takes")
        return request.id

    def place(self, request: int, tokens: int, mode: int, merged: int) -> None:
        """Move `tokens` tokens of a request's prompt into the cache without computing them."""
        most = self.config.limits.max_batch_tokens
        while tokens:
            chunk = min(tokens, most)
            if -(-chunk // self.config.page_tokens) + 1 > self.ledger.pool.unused:
                raise SceneError("the pages do not hold this scene")
            plan = Plan(mode, merged, prefills=((request, chunk),))
            self.ledger.begin(plan, self.now_ns())
            self.runner.begin(plan, self.ledger)
            self.ledger.commit(1, self.now_ns(), self.now_ns())
            self.runner.settle(self.ledger, 1)
            tokens -= chunk

    def decoding(self, contexts: list[int], adapters: list[int], mode: int = UNMERGED, merged: int = -1) -> tuple[int, ...]:
        """Requests that decode, with so many tokens in the cache each; their ids."""
        if len(contexts) > self.config.limits.max_batch:
            raise SceneError(f"{len(contexts)} requests in one step, at most {self.config.limits.max_batch}")
        found = []
        for context, adapter in zip(contexts, adapters, strict=True):
            request = self.admit(context, adapter)
            self.place(request, context, mode, merged)
            found.append(request)
        return tuple(found)

    def chunk(self, tokens: int, context: int, adapter: int, mode: int = UNMERGED, merged: int = -1) -> tuple[int, int]:
        """A request with `context` tokens in the cache whose next `tokens` may be a chunk, the last of its prompt."""
        request = self.admit(context + tokens, adapter)
        if context:
            self.place(request, context, mode, merged)
        return request, tokens

    def rest(self) -> None:
        """Let the GPU's clock recover from what was timed before."""
        self.synchronize()
        if self.cuda:
            time.sleep(REST_S)

    # -- timing -------------------------------------------------------------------------------------------------------
    def time(self, plan: Plan, steps: int | None = None, after: Callable[[], object] = lambda: None) -> Timing:
        """Run `plan` over and over as one lease and time its steps; steps None: as many as a point is worth. after: called
        after each.

        A plan with chunks is launched again and again too, each time the same chunks: which writes the same keys again.
        """
        limits, batch = self.config.limits, len(plan.decodes) + len(plan.prefills)
        tokens = len(plan.decodes) + sum(tokens for _, tokens in plan.prefills)
        if batch > limits.max_batch or tokens > limits.max_batch_tokens:
            raise SceneError(f"a step of {batch} requests and {tokens} tokens is larger than this engine's")
        work = self.ledger.begin(plan, self.now_ns())
        self.runner.begin(plan, self.ledger)
        most = self._most(plan, WARM_STEPS + (steps or MOST))
        ends, launches, events, launched = [], [], [], 0
        while True:
            while launched < most and launched - len(ends) < (2 if self.cuda else 1):
                launches.append(self._launch(launched, events))
                launched += 1
            if len(ends) == launched:
                break
            self.runner.collect()
            ends.append(self.now_ns())
            after()
            for request, _ in plan.prefills:
                self.runner.sequences[request].generated.clear()  # the same chunk once more
            if len(ends) == WARM_STEPS and steps is None:
                took_s = max(1e-6, min(np.diff(ends)) / 1e9)
                most = min(most, WARM_STEPS + int(min(MOST, max(FEWEST, POINT_S / took_s))))
        self.ledger.commit(launched, ends[0], ends[-1])
        self.synchronize()
        places = {place: ps / 1e6 for place, ps in self.runner.places_ps().items()}
        self.runner.settle(self.ledger, launched)
        gpu = [1e3 * start.elapsed_time(stop) for start, stop in events[WARM_STEPS:]]
        context = 0.0
        if work.decodes:
            context = work.context_tokens / work.decodes + (WARM_STEPS + launched - 1) / 2
        steps_us = [ns / 1e3 for ns in np.diff(ends)[WARM_STEPS - 1 :].tolist()]
        return Timing(steps_us, gpu, launches[WARM_STEPS:], work, context, places, ends)

    def _most(self, plan: Plan, wanted: int) -> int:
        """Steps that memory and the requests' lengths allow. SceneError if too few to time."""
        if plan.decodes:
            wanted = min(wanted, self.ledger.cohort.steps_within(self.ledger.pool.free))
        if wanted < WARM_STEPS + 2:
            raise SceneError("neither pages nor contexts allow enough steps of this scene")
        return wanted

    def _launch(self, number: int, events: list) -> float:
        """Put a step on the device; microseconds of the host."""
        if self.cuda:
            events.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
            events[-1][0].record()
        began = self.now_ns()
        self.runner.launch(self.ledger, number)
        took = self.now_ns() - began
        if self.cuda:
            events[-1][1].record()
        return took / 1e3

    def begin_only(self, plan: Plan, place: str) -> float:
        """Begin and commit `plan` without its step; microseconds that the GPU (elsewhere: the host) took for `place`."""
        self.synchronize()
        began = self.now_ns()
        self.ledger.begin(plan, began)
        self.runner.begin(plan, self.ledger)
        self.synchronize()
        took = (self.now_ns() - began) / 1e3
        found = self.runner.places_ps().get(place)
        self.ledger.commit(1, self.now_ns(), self.now_ns())
        self.runner.settle(self.ledger, 1)
        return took if found is None else found / 1e6


def spread(values: list[float]) -> dict[str, float]:
    """Median and the percentiles around it, as a row of measurements keeps them."""
    low, high = np.percentile(values, (10, 90))
    return {"us": round(median(values), 3), "p10": round(float(low), 3), "p90": round(float(high), 3), "times": len(values)}


MODES = {"plain": BASE, "unmerged": UNMERGED, "merged": MERGED, "mixture": MIXTURE}

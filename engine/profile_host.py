"""What the host costs, and what serving does to the GPU's clock: short real replays of made-up traffic, lease by lease.

The traffic is made up and no trace: prompts, images, arrivals while others decode, prompts a little apart, quiet seconds. It
measures; `profile_fit` makes of it what a boundary costs, `profile_boost` how the clock settles.
"""

from __future__ import annotations

import time

import numpy as np

from engine.build import Engine
from engine.clock import WallClock
from engine.profile_parts import Row
from engine.replay import Driver, EngineConfig, stripped
from engine.serve import frozen_heap
from engine.stage import Stage, spread
from policies import Policy, make_policy
from policies.journal import result
from policies.plan import Plan, Work
from policies.recorded import Lease, leases
from policies.view import View
from traces.request import Adapter, Trace

BUSY, APART, QUIET = 48, 32, 8
"""Requests while others decode, some time apart, and one by one with nothing to do between them."""


class Watched:
    """A policy whose decisions are timed."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self.times_us: list[float] = []

    def __getattr__(self, name: str):
        return getattr(self._policy, name)

    def decide(self, view: View) -> Plan:
        """The policy's plan."""
        began = time.perf_counter_ns()
        plan = self._policy.decide(view)
        self.times_us.append((time.perf_counter_ns() - began) / 1e3)
        return plan


def traffic(engine: Engine, config: EngineConfig, adapters: tuple[Adapter, ...], busy_s: float, quiet_s: float) -> Trace:
    """BUSY requests over `busy_s` seconds, APART over twice that, then QUIET of them `quiet_s` seconds apart."""
    rng = np.random.default_rng(7)
    shape, n = engine.runner.model.shape, BUSY + APART + QUIET
    longest = min(600, config.limits.max_context // 3)
    prompt = rng.integers(min(16, longest - 1), longest, n)
    most = min(3, (min(config.limits.max_context // 2, config.limits.max_batch_tokens) - 8) // shape.image_tokens)
    images = np.where((np.arange(n) % 3 == 0) & (most > 0), 1 + np.arange(n) // 3 % max(1, most), 0)
    prompt = np.where(images > 0, np.maximum(images * shape.image_tokens + 8, 16), prompt)
    output = rng.integers(4, min(48, config.limits.max_context // 4), n)
    prompt[BUSY:-QUIET] = rng.integers(min(16, longest - 1), min(2 * longest, config.limits.max_batch_tokens) + 1, APART)
    images[BUSY:] = np.minimum(images[BUSY:], (prompt[BUSY:] - 1) // shape.image_tokens)
    arrival = np.concatenate([np.sort(rng.uniform(0, busy_s, BUSY)), np.sort(rng.uniform(2 * busy_s, 4 * busy_s, APART)),
                              4 * busy_s + quiet_s * np.arange(1, QUIET + 1)])  # fmt: skip
    arrival[: BUSY // 4] = 0
    output[BUSY:] = 3
    adapter = (np.arange(n) % len(adapters)).astype(np.int32)
    return Trace.build((arrival * 1e9).astype(np.int64), prompt, output, images=images, adapter=adapter, adapters=adapters,
                       source="made up to time the host")  # fmt: skip


def host_scene(stage: Stage, name: str, *, seconds: float) -> Row:
    """Replay the traffic under policy `name`: every lease of it (by a graph, where there are some), and the times of its
    decisions."""
    engine, config, policy = stage.engine, stage.config, make_policy(name)
    adapters = engine.ledger.pool.adapters
    trace = stripped(traffic(engine, config, adapters, seconds / 4, seconds / 4 / QUIET), policy)
    engine.renew(config, policy)
    watched = Watched(policy)
    with frozen_heap():
        clock = WallClock(engine.runner)
        Driver(trace, watched, engine.ledger, engine.cost, engine.journal, clock, engine.runner).run()
    run = result([engine.journal], policy=name, operator=engine.operator, counters={"end_ns": 0}, config={})
    stage.renew()
    rows = [lease_row(lease) for lease in leases(run) if _by_graph(engine, lease.work)]
    return {"what": "host", "policy": name, "operator": engine.operator, "decide": spread(watched.times_us), "leases": rows,
            **spread(watched.times_us)}  # fmt: skip


def lease_row(lease: Lease) -> dict:
    """What a record tells of a lease, in microseconds, as a row of measurements keeps it.

    gap_us: since the GPU was free (certain where `known`); host_us: until the first step was on the GPU, beyond a switch and
    the vision tower; forward_us: the first step without all those.
    """
    work, first = lease.work, lease.first_ns - lease.start_ns
    us = {
        "start_us": lease.start_ns, "gap_us": lease.start_ns - lease.free_ns, "host_us": lease.host_ns,
        "forward_us": first - lease.host_ns - lease.vision_ns - lease.switch_ns, "vision_us": lease.vision_ns,
    }  # fmt: skip
    return {
        **{name: ns / 1e3 for name, ns in us.items()}, "loads": lease.loads, "idle": int(lease.idle),
        "loading": int(lease.loading), "known": int(lease.known),
        "work": [*work[:3], list(map(list, work.prefills)), *work[4:]],
    }  # fmt: skip


def _by_graph(engine: Engine, work: Work) -> bool:
    """False for a step that was launched kernel by kernel, though others have graphs."""
    runner = engine.runner
    if runner.graphs is None:
        return True
    if work.prefills:
        return runner.packed_graphs.serves(work.mode, work.decodes + work.prefill_tokens)
    return runner.graphs.serves(work.mode, work.decodes)

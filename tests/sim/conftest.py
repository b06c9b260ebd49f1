"""Small worlds for the simulator's tests: a profile with corners, and random traces, limits and clusters.

The fixtures hand out functions, because test files do not import each other.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import strategies as st

from policies.profile import Boost
from policies.view import Limits
from sim.cluster import SimConfig, simulate
from traces.request import Adapter, Trace

US = 1000  # ns

ENGINES = ({}, {
    "steps_ahead": 1, "load_slowdown": 0.03, "decide_us": {"valora": 4.1},
    "lease_us": {"base": 8.0, "load": 3.0, "wake": 6.0, "launch": 5.0, "request": 0.7, "prompts": 3.1, "chunk": 2.3},
    "boost": Boost(40.0, 15.0, [(4.0, 0.9), (32.0, 0.7)], [(4.0, 1.1), (32.0, 1.0)], 0.8, 1.2),
}, {
    "steps_ahead": 1, "host_step_us": 26.0, "prefill_linear": [(1.0, 25.0), (16.0, 25.0), (17.0, 33.0), (64.0, 60.0)],
    "mixed_attention": {1: [(0.0, 2.0), (50.0, 20.0)]},
})  # fmt: skip
"""What a profile says of an engine: nothing; leases that cost the host; a host that sets the pace of small steps."""


def _trace(rows: list[dict], ranks: tuple[int, ...] = (8, 8, 16)) -> Trace:
    """A trace from one dict a request: at_us, prompt, output, and what else a Request has. Sorted by arrival."""
    rows = sorted(rows, key=lambda row: row["at_us"])
    column = lambda name, default, kind=np.int64: np.array([row.get(name, default) for row in rows], kind)  # noqa: E731
    slo = column("slo_us", 0) * US
    return Trace.build(
        [row["at_us"] * US for row in rows], column("prompt", 1), column("output", 1), images=column("images", 0),
        adapter=column("adapter", -1, np.int32), head=column("head", False, bool),
        adapters=tuple(Adapter(f"a{i}", rank) for i, rank in enumerate(ranks)),
        prefix=tuple(row.get("prefix", ()) for row in rows), ttft_slo_ns=slo if slo.any() else None,
    )  # fmt: skip


@st.composite
def _rows(draw, adapters: int, most: int):
    """Bursty arrivals, some with images, heads, shared prefixes, deadlines, or no adapter."""
    gap_us = draw(st.sampled_from((0, 5, 60, 700)))
    favourite = draw(st.integers(-1, adapters - 1))
    longest = draw(st.sampled_from((4, 40)))
    rows, now = [], 0
    for _ in range(draw(st.integers(1, most))):
        now += draw(st.sampled_from((0, 0, gap_us, 3 * gap_us)))
        row = {
            "at_us": now,
            "prompt": draw(st.integers(1, 40)),
            "output": draw(st.integers(1, longest)),
            "adapter": draw(st.sampled_from((favourite, favourite, *range(-1, adapters)))),
            "images": draw(st.sampled_from((0, 0, 0, 1, 3))),
            "head": draw(st.sampled_from((False, False, False, True))),
            "slo_us": draw(st.sampled_from((0, 0, 300, 2000))),
        }
        if row["head"]:
            row["output"] = 1
        segments, left = [], row["prompt"]
        for content in draw(st.lists(st.integers(0, 2), max_size=3)):
            length = (9, 4, 6)[content]
            if left:  # the last one is cut where the prompt ends, as --clip does it
                segments.append((content, min(length, left)))
                left -= segments[-1][1]
        rows.append(row | {"prefix": tuple(segments)})
    return rows


@st.composite
def _worlds(draw, make_profile, most_requests: int = 14):
    """(trace, profile, config): memory from ample to one that holds hardly two requests beside their adapters."""
    ranks = draw(st.sampled_from(((8,), (8, 16), (8, 8, 16, 32))))
    trace = _trace(draw(_rows(len(ranks), most_requests)), ranks)
    max_batch = draw(st.sampled_from((2, 3, 5, 8, 16)))
    limits = Limits(max_batch, max_batch + draw(st.sampled_from((1, 7, 30, 200))), draw(st.sampled_from((4096, 60))))
    profile = make_profile(draw(st.sampled_from((18, 26, 40, 90, 1000))), **draw(st.sampled_from(ENGINES)))
    gpus = draw(st.sampled_from((1, 1, 1, 2)))
    router = draw(st.sampled_from(("least-outstanding", "round-robin", "affinity", "consolidate")))
    config = SimConfig(
        limits=limits, page_tokens=4, prefix_cache=draw(st.booleans()), gpus=gpus, router=router,
        operator=draw(st.sampled_from((None, None, "none", "slora"))), check_invariants=True,
    )  # fmt: skip
    return trace, profile, config


@pytest.fixture(scope="session")
def make_trace():
    """Function: (rows, ranks) -> Trace."""
    return _trace


@pytest.fixture(scope="session")
def worlds(tiny_profile):
    """Strategy of (trace, profile, config)."""
    return _worlds(tiny_profile)


@pytest.fixture(scope="session")
def replay(tiny_profile):
    """Function: (trace, policy, pool_pages=, profile=, **SimConfig fields) -> checked RunResult, invariants proved."""

    def run(trace, policy, *, pool_pages=1000, profile=None, **config):
        settings = dataclasses.replace(SimConfig(page_tokens=4, check_invariants=True), **config)
        result = simulate(trace, policy, profile or tiny_profile(pool_pages), settings)
        result.check()
        return result

    return run

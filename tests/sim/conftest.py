"""Small worlds for the simulator's tests: a profile with corners, and random traces, limits and clusters.

The fixtures hand out functions, because test files do not import each other.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import strategies as st
from policies.profile import Profile
from policies.view import Limits
from sim.cluster import SimConfig, simulate
from traces.request import Adapter, Trace

PAGE_BYTES = 64
OPERATORS = ("sglang", "dlora", "slora", "punica", "vllm")
US = 1000  # ns


def _profile(pool_pages: int = 1000, **changes) -> Profile:
    """Times in the tens of microseconds; attention with several segments; KV 16 bytes a token, 4 tokens a page of 64."""
    attention = {
        1: [(0.0, 0.0), (7.0, 3.3), (20.0, 4.1), (60.0, 19.7)],
        4: [(0.0, 1.0), (13.0, 5.9), (40.0, 11.2)],
        16: [(0.0, 2.0), (10.0, 9.0), (100.0, 77.7)],
    }
    lora = {
        operator: {
            phase: {
                8: {1: [(1.0, 2.0 + i), (64.0, 5.0 + i)], 4: [(1.0, 3.0 + i), (64.0, 9.0 + i)]},
                16: {1: [(1.0, 3.0 + i), (64.0, 8.0 + i)], 4: [(1.0, 4.5 + i), (64.0, 16.0 + i)]},
            }
            for phase in ("decode", "prefill")
        } | {"pads": operator in ("vllm", "dlora")}
        for i, operator in enumerate(OPERATORS)
    }
    values = {
        "name": "tiny", "kind": "analytic", "sha256": "0" * 64, "provenance": {"made_by": "a test"}, "model": "tiny",
        "max_context": 4096, "image_tokens": 6, "video_images": 3, "kv_bytes_per_token": 16,
        "adapter_bytes_per_rank": 16, "weights_bytes": 100, "golden_bytes": 50, "device_bytes": 150 + pool_pages * PAGE_BYTES,
        "reserve_bytes": 0, "linear": [(1.0, 20.0), (8.0, 21.5), (64.0, 40.0)], "decode_attention": attention,
        "prefill_attention": {0: [(1.0, 0.1), (64.0, 9.0)], 32: [(1.0, 0.7), (64.0, 21.3)]},
        "vision": [(1.0, 12.0), (8.0, 31.0)], "output": [(1.0, 1.3), (16.0, 2.9)], "lora": lora,
        "switch": {"fused": [(8.0, 15.0), (16.0, 18.0)], "addmm": [(8.0, 40.0)]}, "load_gb_per_s": 0.003,
        "load_latency_us": 10.0, "host_step_us": 1.7, "host_request_us": 0.23,
    }  # fmt: skip
    return Profile(**(values | changes))


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
            if length <= left:
                segments.append((content, length))
                left -= length
        rows.append(row | {"prefix": tuple(segments)})
    return rows


@st.composite
def _worlds(draw, most_requests: int = 14):
    """(trace, profile, config): memory from ample to one that holds hardly two requests beside their adapters."""
    ranks = draw(st.sampled_from(((8,), (8, 16), (8, 8, 16, 32))))
    trace = _trace(draw(_rows(len(ranks), most_requests)), ranks)
    max_batch = draw(st.sampled_from((2, 3, 5, 8, 16)))
    limits = Limits(max_batch, max_batch + draw(st.sampled_from((1, 7, 30, 200))), draw(st.sampled_from((4096, 60))))
    profile = _profile(draw(st.sampled_from((18, 26, 40, 90, 1000))))
    gpus = draw(st.sampled_from((1, 1, 1, 2)))
    router = draw(st.sampled_from(("least-outstanding", "round-robin", "affinity", "consolidate")))
    config = SimConfig(
        limits=limits, page_tokens=4, prefix_cache=draw(st.booleans()), gpus=gpus, router=router,
        operator=draw(st.sampled_from((None, None, "none", "slora"))), check_invariants=True,
    )  # fmt: skip
    return trace, profile, config


@pytest.fixture(scope="session")
def tiny_profile():
    """Function: (pool_pages, **fields to change) -> Profile."""
    return _profile


@pytest.fixture(scope="session")
def make_trace():
    """Function: (rows, ranks) -> Trace."""
    return _trace


@pytest.fixture(scope="session")
def worlds():
    """Strategy factory: (most_requests) -> strategy of (trace, profile, config)."""
    return _worlds


@pytest.fixture(scope="session")
def replay(tiny_profile):
    """Function: (trace, policy, pool_pages=, profile=, **SimConfig fields) -> checked RunResult, invariants proved."""

    def run(trace, policy, *, pool_pages=1000, profile=None, **config):
        settings = dataclasses.replace(SimConfig(page_tokens=4, check_invariants=True), **config)
        result = simulate(trace, policy, profile or tiny_profile(pool_pages), settings)
        result.check()
        return result

    return run
